"""
Guests with systemd as their first process: what no lab machine can show.

`python -m tests.vm [one] [two]`. They are systemd-nspawn's: Debian with a systemd, a
Docker and a firewalld of its own, on this machine's kernel. Their root is made in
PYNET_VM_DIR (/var/cache/pynet-vm) from Debian's packages and kept there. Each step
prints what it saw; the first that fails ends the run with exit code 1.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.vm import image
from tests.vm.guest import Failed, Guest, booted, cable

OFFLINE = "cd /root/pynet && PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels"
INSTALL = f"{OFFLINE} deploy/install.sh"
BEGAN = time.monotonic()


def step(text: str) -> None:
    """Say what comes next."""
    print(f"{time.monotonic() - BEGAN:6.0f} s  {text}", flush=True)


def expect(seen: object, wanted: object) -> None:
    """Raise Failed unless two values are equal."""
    if seen != wanted:
        raise Failed(f"{wanted!r} was expected and {seen!r} seen")


def prepare(host: Guest, number: int) -> None:
    """Give a guest its name, its address on the wire, and an image."""
    host.run("hostnamectl", "set-hostname", host.name)
    host.shell(f"""
cat >/etc/systemd/network/20-wire.network <<END
[Match]
Name=e*
[Network]
Address=192.0.2.{number}/24
Gateway=192.0.2.254
END
networkctl reload; networkctl reconfigure $(ls /sys/class/net | grep ^e)
""")
    host.until("docker info >/dev/null 2>&1 || { systemctl start docker; false; }", 300)
    host.shell("""
docker import --change 'CMD ["sh"]' - box </root/image.tar >/dev/null
""")
    host.until(f"ip -4 addr | grep -q 192.0.2.{number}")


def one(directory: Path, system: Path) -> None:
    """One guest: installed, booted anew, beside its neighbours, and removed."""
    with cable() as wire, booted(directory, "one", wire, system) as host:
        alone(host)


def alone(host: Guest) -> None:
    """Tell the whole story of one host."""
    step(f"booted: {host.run('uname', '-r').strip()}")
    prepare(host, 1)
    before = state(host)
    installed(host)
    rebooted(host)
    networkd(host)
    watched(host)
    firewalld(host)
    removed(host, before)


def state(host: Guest) -> str:
    """Return the files and the kernel's state that removal must bring back."""
    return host.shell(r"""
find /etc /opt /usr/local \( -path /etc/docker/key.json -o -name 'firewalld.conf*' \
    -o -name .pwd.lock -o -name resolv.conf -o -path /etc/firewalld/zones/docker.xml -o -name ld.so.cache \) -prune \
    -o -type d -printf '%p %M\n' -o -printf '%p %M %s %l\n' | sort
ip -o link | sed 's/^[0-9]*: //; s/ qdisc.*//; s/@if[0-9]*//' | grep -v docker | sort
ip netns
nft list tables | grep -v 'ip6\? \(filter\|nat\|raw\|mangle\)' || true
iptables-save | grep pynet || true
systemctl list-unit-files 'pynet*' --no-legend || true
""")


def installed(host: Guest) -> None:
    """Install: a service that Docker reaches by systemd's socket."""
    step("install.sh")
    print(host.shell(INSTALL, seconds=900))
    shown = host.run("systemctl", "show", "pynet", "-p", "Type,StatusText,ActiveState")
    step(" ".join(shown.split()))
    expect("ActiveState=active" in shown and "StatusText=serves" in shown, True)
    expect(host.run("systemctl", "is-active", "pynet.socket").strip(), "active")
    holders = host.shell("ss -xlp | grep plugins/pynet.sock")
    step(holders.strip())
    expect("systemd" in holders and "pynet" in holders, True)
    failed = host.shell("systemctl --failed --no-legend | grep pynet || true")
    expect(failed, "")
    host.shell("""
docker network create -d pynet --subnet 10.9.0.0/24 blue
docker run -d --name web --restart always --network blue -p 8080:80 \
    box sh -c 'while :; do echo hello | nc -l -p 80; done'
docker run --rm --network blue box ping -c 1 -W 5 web
""")
    expect(
        "hello"
        in host.until(
            "nc -w 5 192.0.2.1 8080 </dev/null || \
        python3 -c 'import socket; s = socket.create_connection((\"192.0.2.1\", 8080), 5); print(s.recv(9))'"
        ),
        True,
    )
    step("a container is reached by name and by its port")
    host.run("systemctl", "stop", "pynet.service")
    expect(host.ask("systemctl", "is-active", "pynet.service")[0] == 0, False)
    host.run("docker", "network", "create", "-d", "pynet", "green")
    expect(host.run("systemctl", "is-active", "pynet.service").strip(), "active")
    host.run("docker", "network", "rm", "green")
    step("a call of Docker's started the daemon that was stopped")


def rebooted(host: Guest) -> None:
    """After a reboot the container is there by itself, as pynet was before Docker."""
    host.reboot()
    times = {}
    for unit in ("pynet", "docker"):
        shown = host.run(
            "systemctl", "show", unit, "-p", "ActiveEnterTimestampMonotonic", "--value"
        )
        times[unit] = int(shown) / 1e6
    began = host.run(
        "systemctl",
        "show",
        "docker",
        "-p",
        "ExecMainStartTimestampMonotonic",
        "--value",
    )
    later = int(began) / 1e6 - times["pynet"]
    step(f"rebooted; dockerd was begun {later:.3f} s after pynet was ready")
    expect(later >= 0, True)
    host.until("docker exec web true")
    host.shell("docker run --rm --network blue box ping -c 1 -W 5 web")
    expect(host.shell("pynet diff").strip(), "")
    step("the container that restarts always is reached")


def networkd(host: Guest) -> None:
    """systemd-networkd has pynet's devices as unmanaged, and udev gives them no MAC."""
    listed = host.shell("networkctl --no-legend list | grep ' p[ne]-'")
    step(f"networkd: {listed.split()}")
    expect(all("unmanaged" in line for line in listed.splitlines()), True)
    # No guest has an udevd; this is what one does with a new device.
    said = host.shell("udevadm test-builtin net_setup_link /sys/class/net/pn-* 2>&1")
    applied = [line for line in said.splitlines() if "is applied" in line]
    step(f"udev: {applied}")
    expect("/etc/systemd/network/10-pynet.link is applied" in said, True)
    expect("static MAC" in said, True)
    host.shell(
        "networkctl reload; systemctl restart systemd-networkd; sleep 2; pynet diff"
    )
    host.shell("docker run --rm --network blue box ping -c 1 -W 5 web")


def watched(host: Guest) -> None:
    """Let the daemon hang: systemd starts it anew; reload it: it reads its settings."""
    host.shell("""
mkdir -p /run/systemd/system/pynet.service.d
printf '[Service]\nWatchdogSec=10\n' >/run/systemd/system/pynet.service.d/quick.conf
systemctl daemon-reload; systemctl restart pynet
systemctl kill --signal=STOP pynet
""")
    host.until("systemctl show pynet -p NRestarts --value | grep -qv '^0$'", 180)
    host.until("systemctl is-active pynet", 120)
    log = host.shell("journalctl -u pynet --no-pager | grep -i watchdog | tail -n 2")
    step(f"watchdog: {log.strip()}")
    host.shell(
        "rm -r /run/systemd/system/pynet.service.d; systemctl daemon-reload; systemctl restart pynet"
    )
    host.shell(
        "echo 'log_level = \"debug\"' >>/etc/pynet/pynet.toml; systemctl reload pynet; sed -i '$d' /etc/pynet/pynet.toml"
    )
    host.until("journalctl -u pynet --no-pager | grep -q settings.read")
    step("reload read the settings")


def firewalld(host: Guest) -> None:
    """With firewalld containers reach each other and the outside, after a reload too."""
    host.shell("""
ip netns add outside
ip link add out0 type veth peer name out1 netns outside
ip addr add 198.51.100.1/24 dev out0; ip link set out0 up
ip -n outside addr add 198.51.100.2/24 dev out1; ip -n outside link set out1 up
ip -n outside link set lo up
systemctl start firewalld
""")
    host.shell(INSTALL, seconds=900)
    for when in ("after install.sh", "after a reload"):
        host.shell("docker run --rm --network blue box ping -c 1 -W 5 web")
        host.shell("docker run --rm --network blue box ping -c 1 -W 5 198.51.100.2")
        zones = host.shell(
            "firewall-cmd --get-active-zones; firewall-cmd --info-policy pynet-vxlan"
        )
        expect("pn-+" in zones and "4789/udp" in zones, True)
        step(f"firewalld {when}: containers reach each other and the outside")
        host.shell("firewall-cmd --reload")
    host.shell("ip netns del outside")


def removed(host: Guest, before: str) -> None:
    """Remove it: refused while the container runs, and then nothing is left."""
    code, _, said = host.ask("bash", "-c", f"{INSTALL} --uninstall --purge")
    step(f"refused: {said.strip()}")
    expect((code, "web" in said), (1, True))
    host.shell("systemctl stop firewalld; docker rm -f web")
    print(host.shell(f"{INSTALL} --uninstall --purge"))
    after = state(host)
    gone = {*before.splitlines()} - {*after.splitlines()}
    more = {*after.splitlines()} - {*before.splitlines()}
    step(f"left: {sorted(more)}; missing: {sorted(gone)}")
    expect((gone, more), (set(), set()))


def two(directory: Path, system: Path) -> None:
    """Two guests are two hosts of a cluster; their containers reach each other."""
    with (
        cable() as wire,
        booted(directory, "h1", wire, system) as first,
        booted(directory, "h2", wire, system) as second,
    ):
        together(first, second)


def together(first: Guest, second: Guest) -> None:
    """Tell the whole story of two hosts."""
    step("two booted")
    for number, host in enumerate((first, second), 1):
        prepare(host, number)
    first.shell("""
printf 'ETCD_LISTEN_CLIENT_URLS=http://192.0.2.1:2379\nETCD_ADVERTISE_CLIENT_URLS=http://192.0.2.1:2379\n' >>/etc/default/etcd
systemctl start etcd
""")
    second.shell("ping -c 3 -W 5 192.0.2.1")
    for host in (first, second):
        host.shell(f"{INSTALL} --no-start", seconds=900)
        host.shell("""
echo 'store = "etcd://192.0.2.1:2379"' >>/etc/pynet/pynet.toml
systemctl enable --now pynet.socket pynet.service
docker network create -d pynet --ipam-driver pynet --subnet 10.1.0.0/24 blue
docker run -d --name box --network blue --restart always box sleep 100000
""")
    step(first.run("pynet", "host", "ls"))
    address = second.shell(
        "docker inspect -f '{{.NetworkSettings.Networks.blue.IPAddress}}' box"
    ).strip()
    said = first.shell(f"docker exec box ping -c 3 -W 5 {address}")
    step(f"over the overlay: {said.strip().splitlines()[-1]}")
    second.reboot()
    second.until("docker exec box true")
    first.until(f"docker exec box ping -c 1 -W 5 {address}")
    step("the second host rebooted, and its container is reached again")


STORIES: dict[str, Callable[[Path, Path], None]] = {
    "one": one,
    "two": two,
}


def main(names: list[str]) -> int:
    """Run stories; return the exit code."""
    cache = Path(os.environ.get("PYNET_VM_DIR", "/var/cache/pynet-vm"))
    system = image.made(cache)
    step(f"{system} is made")
    for name in names or STORIES:
        step(f"story {name}")
        with tempfile.TemporaryDirectory() as directory:
            try:
                STORIES[name](Path(directory), system)
            except Failed as error:
                print(f"FAILED {name}: {error}")
                for console in Path(directory).glob("*.console"):
                    print(
                        *console.read_text(errors="replace").splitlines()[-30:],
                        sep="\n",
                    )
                return 1
    step("all as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
