#!/bin/bash
# Install Docker from the distribution, unless it is there.
set -euo pipefail

if command -v dockerd >/dev/null; then
    exit
fi
export DEBIAN_FRONTEND=noninteractive
apt-get --quiet=2 update
packages=(docker.io)
# Until Debian 12, and in Ubuntu, the client is part of docker.io.
if apt-cache show docker-cli >/dev/null 2>&1; then packages+=(docker-cli); fi
if [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ]; then
    packages+=(apparmor)
fi
apt-get --quiet=2 install --yes --no-install-recommends "${packages[@]}" >/dev/null
if id vagrant >/dev/null 2>&1; then usermod --append --groups docker vagrant; fi
