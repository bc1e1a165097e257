"""
Sandboxes: which endpoints can still have one, and whose addresses are on their way out.

When Docker dies it forgets endpoints without a call, and its next life may give their
addresses to others. Such an endpoint is told by its sandbox: it is gone, and no device
of the endpoint reaches into one.
"""

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from cnmdriver.driver.site import Site
from cnmdriver.errors import KernelError
from cnmdriver.model import Endpoint, IPAddress, Member
from cnmdriver.plan import devices, seats
from cnmdriver.plan.ops import Key, Veth

LEAVING = 10.0
"""Seconds in which Docker releases an endpoint's addresses once it is deleted."""
FINISHING = 3.0
"""Seconds after a Join in which Docker is not done with what was built for it."""
PATIENCE = 5.0
"""Seconds to wait for a device to go before its address is used again."""
STARTING = 15.0
"""Seconds after a Join in which a sandbox need not be seen: Docker makes it later."""

log = structlog.get_logger()


class Sandboxes:
    """Knows when endpoints of this daemon's life have joined."""

    def __init__(self, site: Site) -> None:
        """Know of none."""
        self.site = site
        self.times: dict[str, float] = {}
        self.leaving: dict[tuple[str, IPAddress], float] = {}
        self.departing: dict[str, tuple[Endpoint, asyncio.Future[None]]] = {}
        self.underway: set[str] = set()
        self.told: set[str] = set()
        """Why interfaces could not be built in sandboxes, as far as it was told."""

    def deleted(self, endpoint: Endpoint) -> None:
        """Note that Docker has deleted an endpoint, and will release its addresses."""
        now = time.monotonic()
        self.leaving = {k: t for k, t in self.leaving.items() if now - t < LEAVING}
        for address in endpoint.addresses:
            self.leaving[endpoint.network, address.ip] = now

    def released(self, network: str, ip: IPAddress) -> None:
        """Note that Docker has released an address."""
        self.leaving.pop((network, ip), None)

    def is_leaving(self, network: str, ip: IPAddress) -> bool:
        """Tell whether Docker has yet to release an address of a deleted endpoint."""
        since = self.leaving.get((network, ip), -math.inf)
        return time.monotonic() - since < LEAVING

    def departs(self, endpoint: Endpoint, over: asyncio.Future[None]) -> None:
        """Note that an endpoint's device is on its way out."""
        if not over.done():
            self.departing[endpoint.id] = (endpoint, over)
            over.add_done_callback(lambda _: self.departing.pop(endpoint.id, None))

    async def departed(self, new: Endpoint) -> None:
        """Wait until no device is left of an endpoint that a new one is to follow."""
        faces = {address.ip for address in new.addresses}
        await self.waited(
            over
            for old, over in self.departing.values()
            if old.network == new.network
            and (
                new.id == old.id
                or new.mac == old.mac
                or faces & {address.ip for address in old.addresses}
            )
        )

    async def all_departed(self, network: str) -> None:
        """Wait until no device is left of a network's endpoints that are removed."""
        await self.waited(
            over for old, over in self.departing.values() if old.network == network
        )

    async def waited(self, overs: Iterable[asyncio.Future[None]]) -> None:
        """Wait for departures; their kernel's time is bounded, and so is this."""
        some = set(overs)
        if some:
            self.site.dataplane.hurry()
            await asyncio.wait(some, timeout=PATIENCE)

    def departure(self, network: str, ip: IPAddress) -> asyncio.Future[None] | None:
        """Return what is done when an address's device is gone, None if it is."""
        for old, over in self.departing.values():
            if old.network == network and ip in [a.ip for a in old.addresses]:
                return over
        return None

    @contextmanager
    def joining(self, endpoint: Endpoint) -> Iterator[None]:
        """Let it be known that an endpoint's device is being made."""
        self.underway.add(endpoint.id)
        try:
            yield
        finally:
            self.underway.discard(endpoint.id)

    def made_now(self) -> frozenset[Key]:
        """Return the keys of all that calls are about to make."""
        if not self.underway:
            return frozenset()
        return frozenset(
            op.key
            for member in self.site.members()
            for endpoint in self.site.endpoints(member.network)
            if endpoint.id in self.underway
            for op in self.site.endpoint_plan(endpoint)
        )

    def joined(self, endpoint: Endpoint) -> None:
        """Note that an endpoint joins now."""
        self.times[endpoint.id] = time.monotonic()

    async def seated(self, endpoint: Endpoint, member: Member) -> Endpoint:
        """Return an endpoint that joins with the name it gets if it is built there."""
        wish = endpoint.attach or member.attach
        dataplane = self.site.dataplane
        if wish == "moved" or not dataplane.has_sandbox(endpoint.sandbox):
            return replace(endpoint, device="")
        if wish == "auto" and self.site.outlived:
            # Docker finds a container's interfaces again by the number behind the
            # prefix that it was told, and at one without it gives up on all others
            # (libnetwork osl/namespace_linux.go Restore).
            self.refused(
                "live-restore is on, and a Docker that starts anew cannot take back "
                "containers with interfaces that it has not moved"
            )
            return replace(endpoint, device="")
        try:
            present = await dataplane.inside(endpoint.sandbox)
        except KernelError as error:
            self.refused(str(error))
            return replace(endpoint, device="")
        if endpoint.device in present:
            return endpoint
        if not seats.is_direct(wish, present):
            return replace(endpoint, device="")
        return replace(endpoint, device=seats.free_name(member.prefix, present))

    def refused(self, why: str) -> None:
        """Tell, once for each reason, that Docker moves what could not be built."""
        if why not in self.told:
            self.told.add(why)
            log.warning("network.not_direct", error=why)

    async def vacate(self, endpoint: Endpoint) -> None:
        """Put what was built in a sandbox out of the way of what comes there next."""
        seat = seats.seat(endpoint)
        if seat is None or not devices.is_live(endpoint, self.site.boot):
            return
        try:
            await self.site.dataplane.vacate(seat, devices.peer(endpoint.id))
        except KernelError as error:
            log.warning("kernel.not_cleared", error=str(error))

    def left(self, endpoint: Endpoint) -> None:
        """Forget an endpoint."""
        self.times.pop(endpoint.id, None)

    def has_settled(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint's sandbox is there, and Docker done with it."""
        joined = self.times.get(endpoint.id, -math.inf)
        wait = FINISHING if endpoint.device else STARTING
        if time.monotonic() - joined < wait:
            return False
        return self.site.dataplane.has_sandbox(endpoint.sandbox)

    async def is_gone(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint has joined a sandbox that is there no more."""
        joined = self.times.get(endpoint.id, -math.inf)
        if not endpoint.sandbox or time.monotonic() - joined < STARTING:
            return False
        if self.site.dataplane.has_sandbox(endpoint.sandbox):
            return False
        return not await self.is_reached(endpoint)

    async def is_reached(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint's device reaches into a sandbox now."""
        name = devices.port(endpoint.id)
        found = await self.site.dataplane.found()
        pairs = [op for op in found if isinstance(op, Veth) and op.name == name]
        return any(pair.peer is None for pair in pairs)
