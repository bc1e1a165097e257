"""
One host's side of everything: who it is, its doors, and what its kernel should hold.

What should be is computed from the view each time; nothing here is remembered that the
view does not have, but for what Docker alone knows (its own bridges).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from cnmdriver.errors import KernelError, NotFound
from cnmdriver.model import Endpoint, Host, IPNetwork, Member, Network
from cnmdriver.plan import devices, firewall, ops
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.ops import Plan
from cnmdriver.store import records
from cnmdriver.store.state import State
from cnmdriver.store.view import View

log = structlog.get_logger()


class Dataplane(Protocol):
    """The door to the kernel."""

    async def apply(self, plan: Plan, still: Callable[[Plan], Plan] = ...) -> None:
        """
        Make a plan hold, or take back what was changed and raise KernelError.

        `still` says, when it is this call's turn, what of the plan is wanted by then.
        """

    async def clear(self, plan: Plan, still: Callable[[Plan], Plan] = ...) -> None:
        """
        Take a plan back as far as possible, then raise KernelError for the rest.

        `still` says, when it is this call's turn, what of the plan is to go by then.
        """

    async def found(self, wanted: Plan = ()) -> Plan:
        """Read everything of ours; settings are read as far as `wanted` names them."""

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices of another pynet; they are not touched."""

    async def routes(self) -> tuple[tuple[IPNetwork, str], ...]:
        """Return the host's own connected routes, each with its device."""

    def has_sandbox(self, key: str) -> bool:
        """Tell whether a sandbox is still there."""

    def changed_sysctls(self) -> dict[str, str]:
        """Return the host's settings that were changed, with their old values."""


@dataclass(slots=True, kw_only=True)
class Site:
    """One host, with the doors its drivers share."""

    host: Host
    boot: str
    state: State
    dataplane: Dataplane
    docker_bridges: frozenset[str] = field(
        default_factory=lambda: frozenset({"docker0", "docker_gwbridge"})
    )
    names: dict[str, str] = field(default_factory=dict)
    """What Docker calls a network or endpoint, by its id, as far as it told."""

    @property
    def view(self) -> View:
        """Return the state in memory."""
        return self.state.view

    def name(self, identity: str) -> str:
        """Return Docker's name for an id, or the short id."""
        return self.names.get(identity) or identity[:12]

    def members(self) -> Iterator[Member]:
        """Yield this host's parts in networks that Docker has created here."""
        for member in self.view.all(Member, "members/"):
            if member.host == self.host.id and member.docker_id:
                yield member

    def member(self, docker_id: str) -> Member:
        """Return this host's part in the network Docker means; raises NotFound."""
        for member in self.members():
            if member.docker_id == docker_id:
                return member
        raise NotFound(
            f"network {docker_id[:12]} is not known here; create it again with "
            "docker network rm and docker network create"
        )

    def network(self, member: Member) -> Network:
        """Return the network a member belongs to; raises NotFound."""
        network = self.view.get(Network, records.network(member.network))
        if network is None:
            raise NotFound(f"network {member.network[:12]} has no record in the store")
        return network

    def endpoints(self, network: str) -> list[Endpoint]:
        """Return this host's endpoints on a network."""
        found = self.view.all(Endpoint, f"endpoints/{network}/")
        return [e for e in found if e.host == self.host.id]

    # What the kernel should hold.

    def network_plan(self, member: Member) -> Plan:
        """Return the plan of a network, whatever is attached to it."""
        network = self.view.get(Network, records.network(member.network))
        if network is None or network.mode not in MODES:
            return ()
        return (
            *MODES[network.mode].network(network, member),
            *firewall.docker(sorted(self.docker_bridges)),
        )

    def endpoint_plan(self, endpoint: Endpoint) -> Plan:
        """Return the plan of an endpoint: nothing before it joins or after a reboot."""
        network = self.view.get(Network, records.network(endpoint.network))
        key = records.member(endpoint.network, self.host.id)
        member = self.view.get(Member, key)
        if network is None or network.mode not in MODES or member is None:
            return ()
        if not devices.is_live(endpoint, self.boot):
            return ()
        return MODES[network.mode].endpoint(network, member, endpoint)

    def desired(self) -> Plan:
        """Return the union of all plans of this host."""
        plans = []
        for member in self.members():
            plans.append(self.network_plan(member))
            plans += [self.endpoint_plan(e) for e in self.endpoints(member.network)]
        return ops.union(plans)

    def unwanted(self, plan: Plan) -> Plan:
        """Return what of a plan no network of this host wants any more."""
        kept = ops.union(self.network_plan(member) for member in self.members())
        return ops.without(plan, kept)

    async def clear(self, plan: Plan) -> None:
        """Take a plan out of the kernel; what is left is the next audit's."""
        try:
            await self.dataplane.clear(plan, self.unwanted)
        except KernelError as error:
            log.warning("kernel.not_cleared", error=str(error))
