#!/bin/bash
# Make this host a part of the network `blue`: the pool makes it one network.
set -euo pipefail

if docker network inspect blue >/dev/null 2>&1; then
    exit
fi
docker network create --driver pynet --ipam-driver pynet --subnet 10.1.0.0/24 blue
