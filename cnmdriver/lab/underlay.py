"""What the lab's hosts hang on: a bridge, and a machine to call from outside."""

from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

from cnmdriver.lab import process
from cnmdriver.lab.machine import Machine
from cnmdriver.lab.process import LabError

ADDRESS4 = IPv4Interface("192.0.2.1/24")
ADDRESS6 = IPv6Interface("2001:db8:1::1/64")
BRIDGE = "underlay"
FIRST_HOST = 10


def host_address4(number: int) -> IPv4Interface:
    """Return the underlay address of host 1, 2, …."""
    return IPv4Interface((ADDRESS4.network[FIRST_HOST + number], 24))


def host_address6(number: int) -> IPv6Interface:
    """Return the IPv6 underlay address of host 1, 2, …: 2001:db8:1::11 for host 1."""
    suffix = int(str(FIRST_HOST + number), 16)
    return IPv6Interface((ADDRESS6.network[suffix], 64))


class Underlay(Machine):
    """The bridge between the hosts, and the outside: a machine without Docker."""

    address4: IPv4Address = ADDRESS4.ip
    address6: IPv6Address = ADDRESS6.ip

    def __init__(self, lab: Path) -> None:
        """Describe the underlay of a lab."""
        super().__init__(lab, "underlay")

    def boot(self) -> None:
        """Make the namespaces and the bridge."""
        super().boot()
        self.exec(
            "ip",
            "-batch",
            "-",
            input=f"""
link set lo up
link add {BRIDGE} type bridge forward_delay 0 mcast_snooping 0
addr add {ADDRESS4} dev {BRIDGE}
addr add {ADDRESS6} dev {BRIDGE} nodad
link set {BRIDGE} up
""",
        )

    def connect(self, host: Machine) -> None:
        """Give a machine its eth0: the other end of a port of the bridge."""
        # The ids in a command mean what they mean outside, so only the network
        # namespace is entered.
        done = process.run(
            ["nsenter", f"--net={self.netns}", "ip", "-batch", "-"],
            data=f"""
link add {host.name} type veth peer name eth0 netns {host.pid}
link set {host.name} master {BRIDGE} up
""",
        )
        if done.returncode:
            raise LabError(f"{host.name} cannot be cabled: {done.stderr.strip()}")

    def disconnect(self, name: str) -> None:
        """Remove a machine's port; none is no error."""
        self.exec("ip", "link", "del", name, check=False)

    def unplug(self, name: str) -> None:
        """Cut the cable of a machine."""
        self.exec("ip", "link", "set", name, "down")

    def plug(self, name: str) -> None:
        """Mend the cable of a machine."""
        self.exec("ip", "link", "set", name, "up")
