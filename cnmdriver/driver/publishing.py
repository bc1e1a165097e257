"""
Published ports: which host port an endpoint gets, and how it changes hands.

A host port is first *held* by a socket, so that no other program, Docker included, has
it or can take it; then the endpoint's record says so, and only then does the kernel
translate it. Revoking goes the other way round.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import structlog

from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, DriverError, Exhausted
from cnmdriver.model import Endpoint, IPAddress, PortRequest, Published
from cnmdriver.plan import firewall, ops, router
from cnmdriver.plan.ops import Plan
from cnmdriver.store import records

EPHEMERAL = range(49153, 65536)
"""Host ports pynet chooses from: IANA's dynamic ports, as Docker's own drivers do."""
TRIES = 128
"""Host ports that are tried before a free one is given up."""

log = structlog.get_logger()


class Taken:
    """Published ports and who has them: any of many is found as soon as a first."""

    def __init__(self) -> None:
        """Begin with none."""
        self._ports: dict[tuple[int, int], list[tuple[Published, str]]] = {}

    def add(self, port: Published, owner: str) -> None:
        """Note that an endpoint has a port."""
        key = (port.protocol, port.host_port)
        self._ports.setdefault(key, []).append((port, owner))

    def owner(self, port: Published) -> str | None:
        """Return the endpoint that has what would clash with a port, None if none."""
        there = self._ports.get((port.protocol, port.host_port), ())
        return next((who for other, who in there if clashing(port, other)), None)


class Publisher:
    """
    Publishes ports of this host's endpoints.

    Host ports belong to all networks together, so that one lock is for all: a port
    changes hands only when its last owner has let go of it in the kernel, too.
    """

    def __init__(self, site: Site) -> None:
        """Work on a site."""
        self.site = site
        self.lock = asyncio.Lock()

    async def publish(self, before: Endpoint, wishes: Sequence[PortRequest]) -> None:
        """Publish all that is wished and nothing else, or leave all as it was."""
        if not wishes and not before.published:
            return
        async with self.lock:
            await self.replace(before, wishes)

    async def replace(self, before: Endpoint, wishes: Sequence[PortRequest]) -> None:
        """Replace what an endpoint publishes."""
        taken = self.taken(before)
        had: dict[object, list[Published]] = {}
        for port in before.published:
            had.setdefault(service(port), []).append(port)
        held: list[Published] = []
        try:
            # Who wants one port only comes before who can do with another.
            for wish in sorted(wishes, key=choices):
                kept = had.get(service(wish), ())
                port = await self.hold(before, wish, taken, kept)
                taken.add(port, before.id)
                held.append(port)
            await self.change(before, replace(before, published=tuple(held)))
        except (DriverError, asyncio.CancelledError):
            await self.take_back(replace(before, published=tuple(held)), before)
            raise

    async def hold(
        self,
        before: Endpoint,
        wish: PortRequest,
        taken: Taken,
        had: Sequence[Published],
    ) -> Published:
        """Find a host port for a wish and hold it; one it had already is kept."""
        for kept in had:
            if fits(kept, wish) and taken.owner(kept) is None:
                return kept
        refused: Conflict | None = None
        for number in candidates(wish):
            port = Published(
                protocol=wish.protocol,
                port=wish.port,
                host_ip=wish.host_ip,
                host_port=number,
            )
            try:
                self.check_free(port, taken)
                await self.site.dataplane.apply((router.hold(port, before),))
            except Conflict as error:
                refused = error
            else:
                return port
        low, high = limits(wish)
        if refused is not None and low == high:
            raise refused
        raise Exhausted(
            f"no free host port for container port {wish.port}: tried "
            f"{low} to {high}, the last: {refused}"
        )

    def check_free(self, port: Published, taken: Taken) -> None:
        """Raise Conflict if an endpoint of this host has published it."""
        owner = taken.owner(port)
        if owner is not None:
            raise Conflict(
                f"host port {port.host_port} is published by "
                f"{self.site.name(owner)}; choose another host port"
            )

    def taken(self, endpoint: Endpoint) -> Taken:
        """Return what all other endpoints of this host publish."""
        taken = Taken()
        for member in self.site.members():
            for other in self.site.endpoints(member.network):
                if other.id != endpoint.id:
                    for port in other.published:
                        taken.add(port, other.id)
        return taken

    async def change(self, before: Endpoint, after: Endpoint) -> None:
        """Change what an endpoint publishes, in the store and then in the kernel."""
        key = records.endpoint(after.network, after.id)
        await self.site.state.commit_own(lambda draft: draft.put(key, after))
        await self.site.clear(self.gone(before, after))
        old = set(self.site.endpoint_plan(before))
        new = self.site.endpoint_plan(after)
        await self.site.dataplane.apply(tuple(op for op in new if op not in old))

    async def take_back(self, after: Endpoint, before: Endpoint) -> None:
        """Restore what an endpoint published before a change that failed."""
        key = records.endpoint(after.network, after.id)
        await self.site.state.remove(lambda draft: draft.put(key, before))
        held = tuple(router.hold(p, after) for p in after.published)
        gone = ops.union((self.gone(after, before), held))
        kept = self.site.endpoint_plan(before)
        await self.site.clear(ops.without(gone, kept))
        await self.site.dataplane.apply(kept)

    async def withdraw(self, before: Endpoint) -> None:
        """Publish nothing any more; never fails."""
        after = replace(before, published=())
        key = records.endpoint(after.network, after.id)
        async with self.lock:
            await self.site.state.remove(lambda draft: draft.put(key, after))
            await self.site.clear(self.gone(before, after))
            old = self.site.endpoint_plan(before)
            new = self.site.endpoint_plan(after)
            try:
                await self.site.dataplane.apply(tuple(o for o in new if o not in old))
            except DriverError as error:
                log.warning("kernel.not_changed", error=str(error))

    def gone(self, before: Endpoint, after: Endpoint) -> Plan:
        """Return what only the earlier state of an endpoint wanted."""
        kept = {op.key for op in self.site.endpoint_plan(after)}
        plan = self.site.endpoint_plan(before)
        return tuple(op for op in plan if op.key not in kept)


def bound_to(
    binding: IPAddress | None, wish: PortRequest, *, ipv6: bool
) -> PortRequest:
    """Give a wish without a host address the network's, if it has one."""
    if wish.host_ip is not None:
        return wish
    if binding is not None:
        return replace(wish, host_ip=binding)
    return wish if ipv6 else replace(wish, host_ip=IPv4Address(0))


def service(port: Published | PortRequest) -> tuple[int, int, IPAddress | None]:
    """Return what is published, and on which address: all but the host's port."""
    return port.protocol, port.port, port.host_ip


def fits(port: Published, wish: PortRequest) -> bool:
    """Tell whether a published port is what a wish asks for."""
    low, high = limits(wish)
    return service(port) == service(wish) and low <= port.host_port <= high


def limits(wish: PortRequest) -> tuple[int, int]:
    """Return the lowest and highest host port that a wish can be given."""
    if wish.host_port:
        return wish.host_port, max(wish.host_port, wish.host_port_end)
    return EPHEMERAL.start, EPHEMERAL.stop - 1


def choices(wish: PortRequest) -> int:
    """Count the host ports that a wish can be given."""
    low, high = limits(wish)
    return high - low + 1


def candidates(wish: PortRequest) -> Iterator[int]:
    """Yield the host ports to try for a wish."""
    if wish.host_port:
        low, high = limits(wish)
        yield from range(low, high + 1)
    else:
        # From a place that differs for each container port, so that first tries meet
        # seldom.
        start = (wish.port * 127 + wish.protocol) % len(EPHEMERAL)
        for turn in range(TRIES):
            yield EPHEMERAL[(start + turn) % len(EPHEMERAL)]


def clashing(one: Published, other: Published) -> bool:
    """Tell whether two published ports would take the same packets."""
    if (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    if one.host_ip is None or other.host_ip is None:
        return True
    if one.host_ip.version != other.host_ip.version:
        return False
    wild = firewall.unspecified(one.host_ip)
    return one.host_ip == other.host_ip or wild in (one.host_ip, other.host_ip)
