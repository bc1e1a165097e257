"""
One host's side of everything: who it is, its doors, and what its kernel should hold.

What should be follows from the view alone, but for what only Docker knows (its own
bridges). It is computed once for each state of these.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Final, Protocol

import structlog

from cnmdriver.driver.locks import Locks
from cnmdriver.errors import KernelError, NotFound
from cnmdriver.model import (
    Alive,
    Attachment,
    Endpoint,
    Hop,
    Host,
    IPAddress,
    IPInterface,
    IPNetwork,
    Member,
    Network,
    Question,
    Remote,
    Underlay,
)
from cnmdriver.plan import devices, firewall, ops
from cnmdriver.plan.modes import MODES, Mode
from cnmdriver.plan.ops import Bridge, Key, Op, Plan, Seat, Veth, Vxlan
from cnmdriver.plan.sight import Echo, Filters, Inner, Way
from cnmdriver.store import records
from cnmdriver.store.state import State
from cnmdriver.store.view import View

NOTHING: Final[Mapping[Key, Op]] = {}

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

    def dismiss(
        self, plan: Plan, still: Callable[[Plan], Plan] = ...
    ) -> asyncio.Future[None]:
        """
        Clear a plan soon, with others; return what is done when that is over.

        What could not be cleared is logged, and is found as too much.
        """

    def hurry(self) -> None:
        """Have what was dismissed cleared now: somebody waits for it."""

    async def found(self, wanted: Plan = ()) -> Plan:
        """Read everything of ours; settings are read as far as `wanted` names them."""

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices of another pynet; they are not touched."""

    async def routes(self) -> tuple[tuple[IPNetwork, str], ...]:
        """Return the host's own connected routes, each with its device."""

    async def underlay(self, wish: str, towards: Iterable[IPAddress]) -> Underlay:
        """
        Find the host's end of the tunnels: by address, by device, or for itself.

        An empty wish is the way to the first of the addresses that is not on this
        host, or the default route. Raises InvalidParameter for what cannot be one.
        """

    async def announce(
        self, where: str, device: str, bindings: Iterable[tuple[IPAddress, str]]
    ) -> None:
        """Tell the ports of a bridge which MACs addresses have; raises KernelError."""

    async def vnis(self) -> frozenset[int]:
        """Return the VXLAN network identifiers that devices of others have here."""

    async def drops(self) -> dict[str, int]:
        """Count the packets that nobody may send and that were dropped, by kind."""

    async def reattach(
        self,
        sandbox: str,
        attachment: Attachment,
        addresses: tuple[IPInterface, ...],
        mac: str,
        seat: Seat | None = None,
    ) -> str:
        """
        Give a sandbox the device it has lost; return the name it has there.

        One with a seat is made in its place by its plan, and lacks the way out only.
        What broke off can be repeated.
        """

    async def inside(self, sandbox: str) -> frozenset[str]:
        """
        Return the names of a sandbox's devices.

        Raises KernelError if this daemon could not set up a device there.
        """

    async def vacate(self, seat: Seat, leaving: str) -> None:
        """
        Put an interface in a sandbox out of the way of the next, under another name.

        If either is gone that is well. It is deleted with the other end of its pair.
        """

    async def inner(
        self, sandbox: str, pair: Veth, mac: str, towards: Iterable[IPAddress]
    ) -> Inner:
        """
        Read the device that a sandbox has of a pair, and how it reaches addresses.

        Raises KernelError if the sandbox is gone.
        """

    async def way(self, to: IPAddress) -> Way:
        """Return where the host sends packets to an address."""

    async def received(self, where: str, device: str) -> int | None:
        """Count the frames a device took, None if it is not there."""

    async def filters(self) -> Filters:
        """Read the host's own packet filters, whoever made them."""

    async def ping(
        self, sandbox: str, source: IPAddress, to: IPAddress, size: int = ...
    ) -> Echo:
        """Ask an address for an echo, from a sandbox, or with "" from the host."""

    async def datagram(self, sandbox: str, source: IPAddress, to: IPAddress) -> Echo:
        """Send a datagram that the far kernel refuses if its checksum is right."""

    async def watch(self, heard: Callable[[bool], None]) -> None:
        """
        Call back whenever something of ours may have been changed, until cancelled.

        Which object it is, is not told, but whether it may have been ourselves.
        """

    def has_sandbox(self, key: str) -> bool:
        """Tell whether a sandbox is still there."""

    def changed_sysctls(self) -> dict[str, str]:
        """Return the host's settings that were changed, with their old values."""


Ask = Callable[[str, Question], Awaitable[tuple[Hop, ...]]]
"""Asks the host of an id; raises StoreError if it cannot be asked, or is silent."""


@dataclass(slots=True, kw_only=True)
class Site:
    """One host, with the doors its drivers share."""

    host: Host
    boot: str
    state: State
    dataplane: Dataplane
    driver: str = "pynet"
    """What Docker calls the driver."""
    docker_bridges: frozenset[str] = field(
        default_factory=lambda: frozenset({"docker0", "docker_gwbridge"})
    )
    names: dict[str, str] = field(default_factory=dict)
    """What Docker calls a network or endpoint, by its id, as far as it told."""
    outlived: bool = False
    """Whether containers outlive Docker's daemon, as far as it told: live-restore."""
    lingering: dict[str, float] = field(default_factory=dict)
    """Until when hosts whose lease has run out are not hidden yet."""
    ask: Ask | None = None
    """Asks another host what it has, if there can be others."""
    locks: Locks = field(default_factory=Locks)
    """Who works on which network."""
    latest: tuple[object, Mapping[Key, Op]] = (None, NOTHING)
    """What all plans follow from, as it was last, and their union."""
    sourced: dict[str, tuple[tuple[object, ...], Plan]] = field(default_factory=dict)
    """What a record of another host calls for, by its key, and of which values."""

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

    def mode(self, network: str) -> tuple[Network, Member, Mode] | None:
        """Return what plans of a network are made of, if it is one of this host's."""
        found = self.view.get(Network, records.network(network))
        member = self.view.get(Member, records.member(network, self.host.id))
        if found is None or member is None or found.mode not in MODES:
            return None
        return found, member, MODES[found.mode]

    def network_plan(self, member: Member) -> Plan:
        """Return the plan of a network, whatever is attached to it."""
        plan = self.plan_less_vteps(member)
        if not any(isinstance(op, Vxlan) for op in plan):
            return plan
        # Beside the table, so that one that is made anew keeps no member out.
        place = plan.index(firewall.table()) + 1
        return (*plan[:place], *self.vtep_plan(), *plan[place:])

    async def announce(
        self, network: str, bindings: Iterable[tuple[IPAddress, str]]
    ) -> None:
        """Tell this host's containers of a network which MACs addresses have."""
        member = self.view.get(Member, records.member(network, self.host.id))
        plan = self.plan_less_vteps(member) if member is not None else ()
        for bridge in plan:
            if isinstance(bridge, Bridge):
                await self.dataplane.announce(bridge.where, bridge.name, bindings)

    def plan_less_vteps(self, member: Member) -> Plan:
        """Return that plan without what does not differ between networks."""
        network = self.view.get(Network, records.network(member.network))
        if network is None or network.mode not in MODES:
            return ()
        plan = MODES[network.mode].network(network, member, self.host)
        if firewall.table().key not in {op.key for op in plan}:
            return plan
        return (*plan, *firewall.docker(sorted(self.docker_bridges)))

    def vtep_plan(self) -> Plan:
        """Return the ends of other hosts' tunnels, alive or not, if it has any."""
        if not self.has_tunnels():
            return ()
        hosts = self.view.all(Host, "hosts/")
        return ops.union([tuple(map(firewall.vtep, self.ends(h))) for h in hosts])

    def has_tunnels(self) -> bool:
        """Tell whether this host has a part in a network of several hosts."""
        if self.host.vtep is None:
            return False
        for member in self.members():
            network = self.view.get(Network, records.network(member.network))
            if network is not None and network.vni:
                return True
        return False

    def ends(self, host: Host) -> tuple[IPAddress, ...]:
        """Return the address of a host's tunnels, if it is another host and has one."""
        if host.id == self.host.id or host.vtep is None:
            return ()
        return (host.vtep,)

    def endpoint_plan(self, endpoint: Endpoint) -> Plan:
        """Return the plan of an endpoint: nothing before it joins or after a reboot."""
        found = self.mode(endpoint.network)
        if found is None or not devices.is_live(endpoint, self.boot):
            return ()
        network, member, mode = found
        return mode.endpoint(network, member, endpoint, self.host)

    def source_plan(self, key: str) -> Plan:
        """Return what a record of another host, by its key, calls for on this one."""
        kind, network, *_ = key.split("/")
        if kind == "hosts":
            return self.host_plan(key)
        found = self.mode(network)
        record = self.view.get(Endpoint if kind == "endpoints" else Member, key)
        if found is None or not isinstance(record, Endpoint | Member):
            return ()
        vtep = self.vtep(record.host)
        if vtep is None:
            return ()
        shared, member, mode = found
        # Records are values: of the same ones the plan is the same.
        basis = (record, vtep, shared, member, self.host)
        known, plan = self.sourced.get(key, (None, ()))
        if known is not None and all(map(is_, known, basis)):
            return plan
        plan = ()
        if isinstance(record, Member) and record.docker_id:
            plan = mode.peer(shared, member, vtep, self.host)
        if isinstance(record, Endpoint) or record.addresses:
            plan += mode.remote(shared, member, reached(record, vtep), self.host)
        self.sourced[key] = basis, plan
        return plan

    def host_plan(self, key: str) -> Plan:
        """Return what another host calls for as such, if this one has tunnels."""
        host = self.view.get(Host, key)
        if host is None or not self.has_tunnels():
            return ()
        return tuple(map(firewall.vtep, self.ends(host)))

    def vtep(self, host: str) -> IPAddress | None:
        """Return the tunnel address of another host that is alive, or was just now."""
        if host == self.host.id or not self.sees(host):
            return None
        found = self.view.get(Host, records.host(host))
        return found.vtep if found is not None else None

    def sees(self, host: str) -> bool:
        """Tell whether another host is not to be hidden."""
        alive = self.view.get(Alive, records.alive(host)) is not None
        return alive or time.monotonic() < self.lingering.get(host, 0.0)

    def carries(self, network: str) -> bool:
        """Tell whether this host needs to know of the others' endpoints."""
        member = self.view.get(Member, records.member(network, self.host.id))
        if member is None:
            return False
        return bool(member.addresses or self.endpoints(network))

    def remote_plan(self, member: Member) -> Plan:
        """Return what the records of other hosts on a network call for on this one."""
        if not self.carries(member.network):
            return ()
        return ops.union(map(self.source_plan, self.sources(member.network)))

    def sources(self, network: str) -> Iterator[str]:
        """Yield the keys of all parts and endpoints that hosts have on a network."""
        for prefix in (f"members/{network}/", f"endpoints/{network}/"):
            for group in self.view.matching(prefix):
                # A copy: whoever looks may change the view between two keys.
                yield from [key for key in group if key.startswith(prefix)]

    def desired(self) -> Plan:
        """Return the union of all plans of this host."""
        return tuple(self.wanted().values())

    def wanted(self) -> Mapping[Key, Op]:
        """Return the same by key."""
        basis = self.basis()
        if self.latest[0] != basis:
            self.latest = (basis, ops.keyed(self.plans()))
        return self.latest[1]

    def basis(self) -> object:
        """Return what all plans follow from: while it is equal, so are they."""
        now = time.monotonic()
        lingering = frozenset(h for h, end in self.lingering.items() if now < end)
        return (self.view.turns, self.host, self.docker_bridges, lingering)

    def let_go(self) -> None:
        """Keep no union of plans until it is asked for again: it can be large."""
        self.latest = (None, NOTHING)
        self.sourced = {k: v for k, v in self.sourced.items() if self.view.seen(k)}

    def plans(self) -> Iterator[Plan]:
        """Yield all plans of this host; the view may change between two of them."""
        yield self.vtep_plan()
        for member in list(self.members()):
            yield self.plan_less_vteps(member)
            yield from map(self.endpoint_plan, self.endpoints(member.network))
            if self.carries(member.network):
                yield from map(self.source_plan, self.sources(member.network))

    def unwanted(self, plan: Plan) -> Plan:
        """Return what of a plan no network of this host wants any more."""
        plans = map(self.plan_less_vteps, self.members())
        return ops.without(plan, ops.union((*plans, self.vtep_plan())))

    async def clear(self, plan: Plan) -> None:
        """Take a plan out of the kernel; what is left is the next audit's."""
        try:
            await self.dataplane.clear(plan, self.unwanted)
        except KernelError as error:
            log.warning("kernel.not_cleared", error=str(error))


def reached(record: Endpoint | Member, vtep: IPAddress) -> Remote:
    """Return how an endpoint, or a host itself, is reached through a tunnel."""
    addresses = tuple(a.ip for a in record.addresses)
    mac = record.mac if isinstance(record, Endpoint) else devices.mac(addresses[0])
    return Remote(mac=mac, addresses=addresses, vtep=vtep)
