#!/bin/bash
# pynet.sh CHECKOUT ETCD ADDRESS: install pynet from the checkout as this machine's
# service, on the cluster of that etcd, with its tunnels ending at that address.
set -euo pipefail

checkout=$1
"$checkout/deploy/install.sh" --no-start
set_to() { # setting value: in the file the installer made
    sed -i "s|^#\\?$1 = .*|$1 = \"$2\"|" /etc/pynet/pynet.toml
}
set_to store "etcd://$2:2379"
# The first address of a VirtualBox machine is 10.0.2.15, the same on all of them.
set_to vtep "$3"
pynet settings --check
if [ -d /run/systemd/system ]; then
    systemctl --quiet enable pynet.socket pynet.service
    systemctl restart pynet.socket pynet.service
fi
