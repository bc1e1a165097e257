"""The modes a network can have, each a module of pure functions."""

from collections.abc import Mapping
from typing import Protocol

from cnmdriver.model import Endpoint, Member, Network
from cnmdriver.plan import bridge
from cnmdriver.plan.ops import Plan


class Mode(Protocol):
    """What a mode's module must have."""

    MTU: int
    """Bytes, where neither the user nor the underlay says."""

    def network(self, network: Network, member: Member) -> Plan:
        """List what a network needs on a host that is a member of it."""

    def endpoint(self, network: Network, member: Member, endpoint: Endpoint) -> Plan:
        """List what an endpoint adds on its own host."""


MODES: Mapping[str, Mode] = {"bridge": bridge}
