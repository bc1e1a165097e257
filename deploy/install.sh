#!/bin/bash
# Install pynet as this machine's service, or remove it with all it has left.
# `deploy/install.sh --help` tells how; a second run brings the first up to date.
set -euo pipefail
umask 022

usage() {
    cat <<'TEXT'
usage: deploy/install.sh [--wheel FILE] [--root DIR] [--no-start]
       deploy/install.sh --uninstall [--purge] [--root DIR]

Installs pynet from this checkout: a virtual environment in /opt/pynet, the command
/usr/local/bin/pynet, the units pynet.service, pynet.socket and pynet-prepare.service,
/etc/pynet/pynet.toml (only if there is none), what Docker finds the driver by, shell
completion, and what keeps systemd-networkd, NetworkManager and dhcpcd off pynet's
devices and lets firewalld and ufw pass its traffic. Needs root and Debian 12, Ubuntu
24.04, Fedora 40, or newer. Docker is not installed. Without a way to a package index
set PIP_NO_INDEX=1 and PIP_FIND_LINKS=DIRECTORY with the wheels.

  --wheel FILE   install this wheel, not the checkout; its dependencies are the lock's
  --no-start     start and enable nothing
  --root DIR     install below DIR, for an image that is made there; start nothing
  --uninstall    stop the daemon, remove pynet's networks from Docker and everything of
                 pynet from the kernel, then every file that was installed; refuses
                 while containers use a network, and names them
  --purge        with --uninstall: also settings and state (this host's id, networks)
  --help         this text

Exit codes: 0 done, 1 refused or failed, with the reason; 2 wrong use.
TEXT
}

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=""
wheel=""
start=yes
purge=""
action=install
while [ $# -gt 0 ]; do
    case $1 in
    --wheel | --root)
        if [ $# -lt 2 ]; then
            echo "install.sh: $1 needs an argument" >&2
            exit 2
        fi
        if [ "$1" = --wheel ]; then wheel=$(realpath -- "$2"); else
            root=$(realpath -m -- "$2")
        fi
        shift
        ;;
    --no-start) start="" ;;
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    -h | --help)
        usage
        exit
        ;;
    *)
        echo "install.sh: what is $1? See --help" >&2
        exit 2
        ;;
    esac
    shift
done
root=${root%/}

place=/opt/pynet
settings=/etc/pynet/pynet.toml
units=(pynet.service pynet.socket pynet-prepare.service)
manifest=$root$place/installed
# What a machine has now; below --root nothing runs.
live() { [ -z "$root" ]; }
runs_systemd() { live && [ -d /run/systemd/system ]; }
has() { command -v "$1" >/dev/null; }
is_active() { runs_systemd && systemctl --quiet is-active "$1"; }

# Files, and a list of what was made.

note() { grep -qxF -- "$1" "$manifest" 2>/dev/null || echo "$1" >>"$manifest"; }

directory() { # path: made with those it is in, and noted
    if [ -d "$root$1" ]; then return; fi
    directory "$(dirname "$1")"
    mkdir "$root$1"
    note "$1/"
}

put() { # path [mode]: written from standard input, if it is another
    local new
    directory "$(dirname "$1")"
    new=$(mktemp "$root$1.XXXXXX")
    cat >"$new"
    chmod "${2:-644}" "$new"
    if cmp --quiet "$new" "$root$1" && [ ! -L "$root$1" ]; then rm "$new"; else
        mv -f "$new" "$root$1"
    fi
    note "$1"
}

# What it needs.

packages() {
    local missing=()
    need() { if ! has "$1"; then missing+=("$2"); fi; }
    if has apt-get; then
        need ip iproute2
        need iptables iptables
        need nft nftables
        "$checkout/deploy/python" >/dev/null || missing+=(python3 python3-venv)
        if [ ${#missing[@]} -gt 0 ]; then
            echo "installing ${missing[*]}"
            apt-get --quiet=2 update >/dev/null
            DEBIAN_FRONTEND=noninteractive apt-get --quiet=2 install --yes \
                --no-install-recommends "${missing[@]}" >/dev/null
        fi
    elif has dnf; then
        need ip iproute
        need iptables iptables-nft
        need nft nftables
        "$checkout/deploy/python" >/dev/null || missing+=(python3)
        if [ ${#missing[@]} -gt 0 ]; then
            echo "installing ${missing[*]}"
            dnf --quiet --assumeyes install "${missing[@]}"
        fi
    else
        for program in ip iptables nft; do
            has "$program" || fail "there is no $program here, and neither apt-get" \
                "nor dnf to install it with; install it and try again"
        done
    fi
    "$checkout/deploy/python" >/dev/null ||
        fail "pynet needs Python 3.11 or newer with its venv module; install it and" \
            "try again"
}

# The virtual environment: made beside the old one, which serves until it is whole.

wanted() {
    local sources=("$checkout/requirements.lock" "$checkout/deploy/install.sh")
    if [ -n "$wheel" ]; then sources+=("$wheel"); else
        sources+=("$checkout/pyproject.toml")
        while IFS= read -r -d '' path; do sources+=("$path"); done \
            < <(find "$checkout/cnmdriver" -name '*.py' -print0 | sort -z)
    fi
    { "$("$checkout/deploy/python")" --version; cat "${sources[@]}"; } | sha256sum
}

environment() {
    local made kept new=$root$place.new
    made=$(wanted)
    if [ -x "$root$place/bin/pynet" ] &&
        [ "$made" = "$(cat "$root$place/made" 2>/dev/null)" ]; then
        return
    fi
    echo "making $root$place"
    rm -rf "$new"
    if [ ! -d "$root/opt" ]; then local outer=/opt/; fi
    mkdir -p "$new"
    "$("$checkout/deploy/python")" -m venv "$new"
    pip() { "$new/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
    mkdir "$new/tmp"
    if [ -z "$wheel" ]; then build "$new/tmp"; else cp "$wheel" "$new/tmp"; fi
    dependencies "$new/tmp"/*.whl >"$new/tmp/needed"
    pip install --require-hashes --no-deps --requirement "$new/tmp/needed"
    pip install --no-deps "$new/tmp"/*.whl
    rm -rf "$new/tmp"
    # It is moved, and its programs say where their Python is.
    grep -rlIF "$new" "$new/bin" "$new/pyvenv.cfg" |
        xargs sed -i "s|$new|$place|g"
    echo "$made" >"$new/made"
    # What belongs to what was installed, and not to this version.
    for kept in installed settings ufw; do
        if [ -e "$root$place/$kept" ]; then cp -p "$root$place/$kept" "$new"; fi
    done
    rm -rf "$root$place.old"
    if [ -e "$root$place" ]; then mv "$root$place" "$root$place.old"; fi
    mv "$new" "$root$place"
    rm -rf "$root$place.old"
    if [ -n "${outer:-}" ]; then note "$outer"; fi
}

build() { # directory: a wheel of the checkout in it
    # A copy, as building leaves files beside the sources.
    mkdir "$1/source"
    cp -a "$checkout"/{pyproject.toml,README.md,LICENSE,cnmdriver} "$1/source"
    locked setuptools >"$1/needed"
    pip install --require-hashes --no-deps --target "$1/setuptools" \
        --requirement "$1/needed"
    PYTHONPATH=$1/setuptools pip wheel --no-deps --no-build-isolation \
        --wheel-dir "$1" "$1/source"
}

dependencies() { # wheel: lines of the lock for what it needs, which is not all of it
    local report=$1.json names
    locked >"$1.constraints"
    sed -n 's/^\([^ ]*==[^ ]*\) .*/\1/p' "$1.constraints" >"$1.versions"
    pip install --dry-run --ignore-installed --report "$report" \
        --constraint "$1.versions" "$1" >/dev/null
    names=$("$new/bin/python" -c '
import json, re, sys
for found in json.load(open(sys.argv[1]))["install"]:
    print(re.sub("[-_.]+", "-", found["metadata"]["name"]).lower())
' "$report")
    # shellcheck disable=SC2086 # one word a name
    locked $names | grep -v '^cnmdriver=='
}

locked() { # name…: their entries in the lock, all without a name
    awk -v names=" $* " '
        /^[a-z0-9]/ { split($1, word, "="); keep = names == "  " || \
            index(names, " " word[1] " ") }
        keep' "$checkout/requirements.lock"
}

# The venv's own Python, wherever it stands now.
pynet() { "$root$place/bin/python" -I -m cnmdriver "$@"; }

files() {
    local unit
    directory /usr/local/bin
    if [ "$(readlink "$root/usr/local/bin/pynet")" != "$place/bin/pynet" ]; then
        ln -sfn "$place/bin/pynet" "$root/usr/local/bin/pynet"
    fi
    note /usr/local/bin/pynet
    for unit in "${units[@]}"; do
        put "/etc/systemd/system/$unit" <"$checkout/deploy/$unit"
    done
    if [ ! -e "$root$settings" ]; then
        pynet settings | put "$settings"
        pynet settings | sha256sum >"$root$place/settings"
    fi
    put /etc/docker/plugins/pynet.spec <"$checkout/plugin-spec/pynet.spec"
    pynet completion bash | put /etc/bash_completion.d/pynet
    if has zsh; then
        pynet completion zsh | put /usr/local/share/zsh/site-functions/_pynet
    fi
    if has fish; then
        pynet completion fish | put /etc/fish/completions/pynet.fish
    fi
}

# Others who would take pynet's devices for theirs, or stop its traffic.

udp() { # the port of the tunnels
    local set
    set=$(sed -n 's/^ *vxlan_port *= *\([0-9]*\).*/\1/p' "$root$settings")
    echo "${set:-4789}"
}

ufw_is_on() { live && has ufw && grep -qs '^ENABLED=yes' /etc/ufw/ufw.conf; }

ufw_rules() { # port [delete]: add or delete all rules
    local device
    ufw ${2:+--force delete} allow "$1/udp"
    for device in pn-+ pg-+ ph-+; do
        ufw ${2:+--force delete} allow in on "$device"
        ufw ${2:+--force} route ${2:+delete} allow in on "$device"
        ufw ${2:+--force} route ${2:+delete} allow out on "$device"
    done
}

neighbours() {
    local from=$checkout/deploy/host
    put /etc/systemd/network/10-pynet.network <"$from/pynet.network"
    put /etc/systemd/network/10-pynet.link <"$from/pynet.link"
    if [ -d "$root/etc/NetworkManager" ]; then
        put /etc/NetworkManager/conf.d/pynet.conf <"$from/NetworkManager.conf"
    fi
    if [ -f "$root/etc/dhcpcd.conf" ]; then
        without_block /etc/dhcpcd.conf "$from/dhcpcd.conf"
    fi
    if [ -d "$root/etc/firewalld" ]; then
        put /etc/firewalld/zones/pynet.xml <"$from/firewalld-zone.xml"
        sed "s/\"4789\"/\"$(udp)\"/" "$from/firewalld-policy.xml" |
            put /etc/firewalld/policies/pynet-vxlan.xml
    fi
    if ufw_is_on; then
        # By the port it had before, if that is another.
        if [ -e "$place/ufw" ]; then
            ufw_rules "$(cat "$place/ufw")" delete >/dev/null || true
        fi
        ufw_rules "$(udp)" >/dev/null
        udp >"$place/ufw"
    fi
}

without_block() { # path [file]: without pynet's block, and with another at the top
    local new
    new=$(mktemp "$root$1.XXXXXX")
    # An `interface` line would make it count for that one only, if it came later.
    { if [ -n "${2:-}" ]; then cat "$2"; fi
        sed '/^# BEGIN pynet/,/^# END pynet/d' "$root$1"; } >"$new"
    if cmp --quiet "$new" "$root$1"; then rm "$new"; else
        chmod --reference="$root$1" "$new"
        chown --reference="$root$1" "$new"
        mv "$new" "$root$1"
    fi
}

tell_neighbours() {
    if ! runs_systemd; then return; fi
    systemctl daemon-reload
    if is_active systemd-udevd; then udevadm control --reload; fi
    if is_active systemd-networkd; then networkctl reload; fi
    if is_active NetworkManager; then nmcli general reload conf; fi
    if is_active dhcpcd; then systemctl restart dhcpcd; fi
    if is_active firewalld; then firewall-cmd --quiet --reload; fi
}

install() {
    if [ -n "$wheel" ] && [ ! -f "$wheel" ]; then fail "there is no file $wheel"; fi
    if live; then packages; fi
    environment
    files
    neighbours
    tell_neighbours
    if runs_systemd && [ -n "$start" ]; then
        systemctl --quiet enable pynet.socket pynet.service
        # The daemon that runs has the socket, if it made it itself.
        if ! is_active pynet.socket; then systemctl stop pynet.service; fi
        systemctl start pynet.socket
        systemctl restart pynet.service ||
            fail "pynet is installed and does not start: journalctl -u pynet.service"
        echo "pynet serves: docker network create -d pynet NAME; pynet status"
    elif live && [ -n "$start" ]; then
        echo "pynet is installed; there is no systemd here to start it:" \
            "/usr/local/bin/pynet serve, before dockerd"
    else
        echo "pynet is installed in $root/ and not started"
    fi
    echo "its settings: $root$settings"
}

# Removal.

clear_kernel() {
    local code=0
    if [ ! -x "$place/bin/pynet" ]; then return; fi
    pynet clear --dry-run >/dev/null || fail "nothing was removed"
    if has docker && docker info >/dev/null 2>&1; then
        # Through Docker, so that neither it nor the other hosts keep them.
        docker network ls --quiet --no-trunc --filter driver=pynet |
            while read -r network; do
                docker network rm "$network" >/dev/null ||
                    echo "Docker keeps its network $network" >&2
            done
    fi
    if runs_systemd; then
        systemctl --quiet disable --now pynet.socket pynet.service || true
        systemctl stop pynet-prepare.service || true
    fi
    pynet clear || code=$?
    if [ "$code" = 2 ]; then fail "nothing was removed but networks without containers"
    elif [ "$code" != 0 ]; then fail "the files stay until this is mended"; fi
    # pynet-prepare.service made it, and an empty one has no other device.
    if [ -e /run/netns/pynet ] && [ "$(ip -n pynet -o link | wc -l)" -le 1 ]; then
        ip netns del pynet
    fi
}

uninstall() {
    local path paths
    if [ ! -e "$manifest" ]; then
        echo "pynet is not installed in ${root:-/}"
        return
    fi
    if live; then clear_kernel; fi
    if live && [ -e "$place/ufw" ] && has ufw; then
        ufw_rules "$(cat "$place/ufw")" delete >/dev/null || true
    fi
    if [ -f "$root/etc/dhcpcd.conf" ]; then without_block /etc/dhcpcd.conf; fi
    keep_settings
    mapfile -t paths < <(tac "$manifest")
    rm -rf "$root$place"
    if [ -n "$purge" ]; then
        remove /var/lib/pynet
        remove /etc/pynet
    fi
    # Directories were noted before what is in them.
    for path in "${paths[@]}"; do
        case $path in
        */) rmdir --ignore-fail-on-non-empty "$root${path%/}" 2>/dev/null || true ;;
        *) rm -f "$root$path" ;;
        esac
    done
    if live; then rm -rf /run/pynet; fi
    if runs_systemd; then systemctl reset-failed 'pynet*' 2>/dev/null || true; fi
    tell_neighbours
    echo "pynet is removed from ${root:-/}"
    if [ -d "$root/var/lib/pynet" ]; then
        echo "its state stays in $root/var/lib/pynet (--purge removes it)"
    fi
}

remove() { # directory, which may be a mount
    if [ -d "$root$1" ]; then
        find "$root$1" -mindepth 1 -delete
        rmdir "$root$1" 2>/dev/null || true
    fi
}

keep_settings() {
    if [ -z "$purge" ] && [ -e "$root$settings" ] &&
        [ "$(sha256sum <"$root$settings")" != "$(cat "$root$place/settings" 2>/dev/null)" ]
    then
        sed -i "\\|^$settings\$|d; \\|^/etc/pynet/\$|d" "$manifest"
        echo "$root$settings was changed, and stays (--purge removes it)"
    fi
}

if [ -n "$purge" ] && [ "$action" != uninstall ]; then
    echo "install.sh: --purge belongs to --uninstall" >&2
    exit 2
fi
if [ "$(id -u)" != 0 ]; then fail "this needs root: sudo deploy/install.sh"; fi
if [ -n "$root" ] && [ ! -d "$root" ]; then fail "there is no directory $root"; fi
"$action"
