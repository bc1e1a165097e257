"""What the lab's hosts hang on: a bridge, and a machine to call from outside."""

import json
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

from cnmdriver.lab import process
from cnmdriver.lab.machine import Machine
from cnmdriver.lab.process import LabError

ADDRESS4 = IPv4Interface("192.0.2.1/24")
ADDRESS6 = IPv6Interface("2001:db8:1::1/64")
BRIDGE = "underlay"
CUTS = "bridge lab cuts"
CUT_RULES = f"""
add table bridge lab
add set {CUTS} {{ type ifname . ifname; }}
add chain bridge lab forward {{ type filter hook forward priority 0; }}
flush chain bridge lab forward
add rule bridge lab forward iifname . oifname @cuts drop
"""


def addresses(suffix: int) -> tuple[IPv4Interface, IPv6Interface]:
    """Return a machine's addresses: 192.0.2.11 and 2001:db8:1::11 for 11."""
    digits = int(str(suffix), 16)
    return (
        IPv4Interface((ADDRESS4.network[suffix], ADDRESS4.network.prefixlen)),
        IPv6Interface((ADDRESS6.network[digits], ADDRESS6.network.prefixlen)),
    )


class Underlay(Machine):
    """The bridge between the hosts, and the outside: a machine without Docker."""

    address4: IPv4Address = ADDRESS4.ip
    address6: IPv6Address = ADDRESS6.ip

    def __init__(self, lab: Path, mtu: int) -> None:
        """Describe the underlay of a lab."""
        super().__init__(lab, "underlay")
        self.mtu = mtu

    def boot(self) -> None:
        """Make the namespaces and the bridge."""
        super().boot()
        self.exec(
            "ip",
            "-batch",
            "-",
            input=f"""
link set lo up
link add {BRIDGE} mtu {self.mtu} type bridge forward_delay 0 mcast_snooping 0
addr add {ADDRESS4} dev {BRIDGE}
addr add {ADDRESS6} dev {BRIDGE} nodad
link set {BRIDGE} up
""",
        )

    def connect(self, host: Machine) -> None:
        """Give a machine its eth0: the other end of a port of the bridge."""
        # The ids in a command mean what they mean outside, so only the network
        # namespace is entered.
        mtu = self.mtu
        done = process.run(
            ["nsenter", f"--net={self.netns}", "ip", "-batch", "-"],
            data=f"""
link add {host.name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {host.pid}
link set {host.name} master {BRIDGE} up
""",
        )
        if done.returncode:
            raise LabError(f"{host.name} cannot be cabled: {done.stderr.strip()}")

    def disconnect(self, name: str) -> None:
        """Remove a machine's port; none is no error."""
        self.exec("ip", "link", "del", name, check=False)

    def set_port(self, machine: Machine, state: str) -> None:
        """Set a machine's port `up` or `down`."""
        if not machine.is_on:
            raise LabError(f"{machine.name} is off: it has no cable until it boots")
        self.exec("ip", "link", "set", machine.name, state)

    def cut(self, first: str, second: str) -> None:
        """Drop all that two machines send each other; cut already is no error."""
        self._change_cuts(f"add element {CUTS} {_both_ways(first, second)}")

    def mend(self, first: str, second: str) -> None:
        """Let two machines reach each other again; not cut is no error."""
        both = _both_ways(first, second)
        self._change_cuts(f"add element {CUTS} {both}\ndelete element {CUTS} {both}")

    def cuts(self) -> set[frozenset[str]]:
        """Return the pairs of machines that are cut from each other."""
        done = self.exec("nft", "-j", "list", "set", *CUTS.split(), check=False)
        if done.returncode:
            return set()
        found = (item.get("set", {}) for item in json.loads(done.stdout)["nftables"])
        pairs = [pair["concat"] for kind in found for pair in kind.get("elem", ())]
        return {frozenset(pair) for pair in pairs}

    def _change_cuts(self, change: str) -> None:
        self.exec("nft", "-f", "-", input=f"{CUT_RULES}{change}\n")


def _both_ways(first: str, second: str) -> str:
    return f"{{ {first} . {second}, {second} . {first} }}"
