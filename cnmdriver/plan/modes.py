"""The modes a network can have, each a module of pure functions."""

from collections.abc import Mapping
from typing import Protocol

from cnmdriver.model import Endpoint, Host, IPAddress, Member, Network, Remote
from cnmdriver.plan import bridge, overlay
from cnmdriver.plan.ops import Plan


class Mode(Protocol):
    """What a mode's module must have."""

    def mtu(self, host: Host) -> int:
        """Return the MTU in bytes that a network made on a host has room for."""

    def network(self, network: Network, member: Member, host: Host) -> Plan:
        """List what a network needs on a host that is a member of it."""

    def endpoint(
        self, network: Network, member: Member, endpoint: Endpoint, host: Host
    ) -> Plan:
        """List what an endpoint adds on its own host."""

    def remote(
        self, network: Network, member: Member, remote: Remote, host: Host
    ) -> Plan:
        """List what lets a host reach an endpoint of another host."""

    def peer(
        self, network: Network, member: Member, vtep: IPAddress, host: Host
    ) -> Plan:
        """List what a host needs for another host that has a part in the network."""


MODES: Mapping[str, Mode] = {"bridge": bridge, "overlay": overlay}
