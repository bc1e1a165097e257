#!/bin/bash
# etcd.sh ADDRESS: serve etcd there, open to all on that network. For a lab only: whoever
# reaches it owns the networks.
set -euo pipefail

if ! command -v etcd >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get --quiet=2 update
    apt-get --quiet=2 install --yes --no-install-recommends etcd-server etcd-client \
        >/dev/null
fi
sed -i '/^ETCD_.*CLIENT_URLS=/d' /etc/default/etcd 2>/dev/null || true
cat >>/etc/default/etcd <<TEXT
ETCD_LISTEN_CLIENT_URLS=http://$1:2379,http://127.0.0.1:2379
ETCD_ADVERTISE_CLIENT_URLS=http://$1:2379
TEXT
if [ -d /run/systemd/system ]; then
    systemctl --quiet enable etcd
    systemctl restart etcd
fi
