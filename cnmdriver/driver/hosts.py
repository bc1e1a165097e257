"""
Hosts: who this host is to the others, and whether it can be.

Two hosts of one name, two with one tunnel address, and tunnels of two kinds in one
cluster cannot work; the second is refused, with the remedy. What a dead host has
published stands in nobody's way: it is deleted when the host has been away for long, or
when a person says that it is gone.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial

import structlog

from cnmdriver.driver import claims
from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, DriverError, NotFound
from cnmdriver.model import (
    Alive,
    Block,
    Endpoint,
    Host,
    IPAddress,
    Kept,
    Member,
    Pool,
    Underlay,
    Watermark,
)
from cnmdriver.store import records
from cnmdriver.store.view import Draft, View

EVERY = 2.0
"""Seconds between two looks at the host's own address, and at who is away."""

log = structlog.get_logger()


async def nowhere() -> tuple[IPAddress, ...]:
    """Know of no place to go to."""
    return ()


class Hosts:
    """Publishes this host, and keeps what it publishes true."""

    def __init__(
        self,
        site: Site,
        wish: str = "",
        towards: Callable[[], Awaitable[tuple[IPAddress, ...]]] = nowhere,
        *,
        dead_after: float = 86400.0,
    ) -> None:
        """
        Take what the user said of the tunnels, and what finds the store's place.

        A host that has been away for `dead_after` seconds is dead.
        """
        self.dead_after = dead_after
        self.site = site
        self.wish = wish
        self.towards = towards
        self.targets: tuple[IPAddress, ...] = ()
        self.away: dict[str, float] = {}
        """Since when other hosts have been away, as seen from here."""
        self.moved: Callable[[], None] = lambda: None
        """Called when the tunnels have another address: devices must be made anew."""

    async def look(self) -> None:
        """
        Find this host's tunnel address; the one it had before will do.

        Raises InvalidParameter if there is none.
        """
        site = self.site
        known = site.view.get(Host, records.host(site.host.id))
        if known is None or known.vtep is None or self.wish:
            site.host = placed(site.host, await self.find())
            return
        try:
            found = await site.dataplane.underlay(str(known.vtep), ())
        except DriverError:
            found = await self.find()
        site.host = placed(site.host, found)

    async def find(self) -> Underlay:
        """Find the address of this host's tunnels."""
        if not self.targets and not self.wish:
            self.targets = await self.towards()
        return await self.site.dataplane.underlay(self.wish, self.targets)

    async def publish(self) -> bool:
        """
        Find this host's tunnel address and tell the others; tell if it is new.

        Raises Conflict if another live host stands in the way, InvalidParameter if
        there is no such address here.
        """
        host = placed(self.site.host, await self.find())
        await self.site.state.relist()
        known = self.site.view.get(Host, records.host(host.id))

        def decide(draft: Draft) -> None:
            for other in living(self.site.view, but=host.id):
                refuse(host, other)
            draft.put(records.host(host.id), host)

        await self.site.state.commit(decide)
        await self.look_again(host)
        self.site.host = host
        return known != host

    async def look_again(self, host: Host) -> None:
        """Raise Conflict for a host in the way that was published just before."""
        state, own = self.site.state, records.host(host.id)
        await state.relist()
        for other in living(state.view, but=host.id):
            if state.view.seen(records.host(other.id)) < state.view.seen(own):
                refuse(host, other)

    async def run(self) -> None:
        """Publish the address anew whenever it changes, until cancelled."""
        said = ""
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.follow()
                await self.bury_dead()
                said = ""
            except DriverError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("host.not_published", error=said)

    async def follow(self) -> None:
        """Publish the address anew if it is another."""
        found = await self.find()
        if placed(self.site.host, found) != self.site.host:
            log.info("host.moved", address=str(found.address))
            await self.publish()
            self.moved()

    # Hosts that are gone.

    async def bury_dead(self) -> None:
        """Delete what hosts have in the store that have been away for long."""
        view, now = self.site.view, time.monotonic()
        known = {host.id for host in view.all(Host, "hosts/")}
        # Of one that was removed by hand the blocks may be left.
        known |= {block.host for block in view.all(Block, "blocks/")}
        known.discard(self.site.host.id)
        away = [host for host in sorted(known) if not present(view, host)]
        self.away = {host: self.away.get(host, now) for host in away}
        for host in away if self.site.state.away is None else ():
            if view.get(Kept, records.kept(host)) is None:
                log.warning("host.dead", host=claims.host_name(view, host), id=host)
                await self.bury(host, gone=partial(is_dead, host=host), blocks=True)

    async def bury(
        self, host: str, *, gone: Callable[[Draft], bool], blocks: bool
    ) -> bool:
        """
        Delete all that a host has as long as it is `gone`; tell if it always was.

        One network after the other, as a transaction is small, and at last the host: if
        it is broken off, it can be begun again.
        """
        view, commit = self.site.view, self.site.state.commit
        networks = [m.network for m in view.all(Member, "members/") if m.host == host]
        acts = [partial(expel, host=host, network=n, blocks=blocks) for n in networks]
        for act in (*acts, partial(strike, host=host, blocks=blocks)):

            def decide(draft: Draft, act: Callable[[Draft], None] = act) -> bool:
                if gone(draft):
                    act(draft)
                    return True
                return False

            if not await commit(decide):
                return False
        return True

    async def remove(self, name: str, *, force: bool) -> str:
        """
        Delete what a host has in the store; return what became of its blocks.

        Raises NotFound for an unknown name or id, and Conflict for this host and,
        unless forced, for one that is alive or has stopped in good order. The blocks of
        a host that may still give out addresses by itself stay closed.
        """
        await self.site.state.relist()
        host = self.named(name)
        sign = self.site.view.get(Alive, records.alive(host.id))
        if sign is not None and not force:
            how = "its daemon was stopped" if sign.resting else "it is alive"
            raise Conflict(
                f"host {host.name} may have containers that run: {how}; remove its "
                "networks there, or give --force if the machine is gone"
            )
        away = time.monotonic() - self.away.get(host.id, math.inf)
        kept = self.site.view.get(Kept, records.kept(host.id)) is not None
        still = force or (kept and away < self.dead_after / 2)

        def gone(draft: Draft) -> bool:
            return force or draft.get(Alive, records.alive(host.id)) is None

        if not await self.bury(host.id, gone=gone, blocks=not still):
            raise Conflict(
                f"host {host.name} came back while it was removed; it publishes again "
                "what it has"
            )
        log.warning("host.removed", host=host.name, id=host.id, blocks=not still)
        return (
            f"its blocks of addresses stay closed until it has been away for "
            f"{self.dead_after:g} s, as it may still give them out"
            if still
            else "its blocks of addresses are free"
        )

    def named(self, name: str) -> Host:
        """Find another host by name or id; raises NotFound, Conflict for this one."""
        hosts = list(self.site.view.all(Host, "hosts/"))
        found = [h for h in hosts if h.id == name] or [
            h for h in hosts if name in (h.name, h.id[:8])
        ]
        if len(found) != 1:
            raise NotFound(
                f"{len(found) or 'no'} hosts are called {name[:80]!r}; name one by its "
                "id, which pynet host ls shows"
            )
        if found[0].id == self.site.host.id:
            raise Conflict(
                f"host {name} is this one; remove its networks with docker network rm, "
                "and stop pynet here"
            )
        return found[0]


def present(view: View, host: str) -> bool:
    """Tell whether a host is alive, or has stopped in good order."""
    return view.get(Alive, records.alive(host)) is not None


def is_dead(draft: Draft, host: str) -> bool:
    """Tell whether a host has been away for too long, also when this is written."""
    alive = draft.get(Alive, records.alive(host))
    return alive is None and draft.get(Kept, records.kept(host)) is None


def expel(draft: Draft, host: str, network: str, *, blocks: bool) -> None:
    """Delete a host's part in a network, and that if it was the last member."""
    member = draft.get(Member, records.member(network, host))
    if member is None:
        return
    lay_off(draft, host, f"endpoints/{network}/")
    for pool in draft.all(Pool, "pools/"):
        if pool.network == network or claims.claimed(member, pool):
            claims.vacate(draft, host, pool, blocks=blocks)
    draft.delete(records.member(network, host))
    claims.prune(draft, network)


def strike(draft: Draft, host: str, *, blocks: bool) -> None:
    """Delete a host that has a part in no network, and what it left behind."""
    lay_off(draft, host, "endpoints/")
    for pool in draft.all(Pool, "pools/"):
        claims.vacate(draft, host, pool, blocks=blocks)
    for key in (records.host(host), records.alive(host), records.fence(host)):
        draft.delete(key)
    draft.delete(records.watermark(host))
    if blocks:
        draft.delete(records.kept(host))


def lay_off(draft: Draft, host: str, prefix: str) -> None:
    """Delete a host's endpoints."""
    for key, endpoint in list(draft.pairs(prefix)):
        if isinstance(endpoint, Endpoint) and endpoint.host == host:
            draft.delete(key)


def placed(host: Host, found: Underlay) -> Host:
    """Return a host with the tunnel address that was found."""
    return replace(host, vtep=found.address, mtu=found.mtu)


def living(view: View, *, but: str) -> Iterator[Host]:
    """Yield the other hosts that are alive."""
    for host in view.all(Host, "hosts/"):
        if host.id != but and view.get(Alive, records.alive(host.id)) is not None:
            yield host


def refuse(host: Host, other: Host) -> None:
    """Raise Conflict if two hosts cannot be in one cluster."""
    if host.name == other.name:
        raise Conflict(
            f"another host of this cluster is called {host.name!r} (id {other.id}); "
            "give this one another name with --host-name"
        )
    if host.vtep is None or other.vtep is None:
        return
    if host.vtep == other.vtep:
        raise Conflict(
            f"host {other.name} has the tunnel address {host.vtep} too; name an "
            "address of this host that the others reach with --vtep (VirtualBox gives "
            "each machine 10.0.2.15 on its first device)"
        )
    if host.vtep.version != other.vtep.version:
        raise Conflict(
            f"the tunnel address {host.vtep} is IPv{host.vtep.version}, and host "
            f"{other.name} has {other.vtep}; name an IPv{other.vtep.version} address "
            "with --vtep"
        )
    if host.vxlan_port != other.vxlan_port:
        raise Conflict(
            f"host {other.name} has its tunnels on UDP port {other.vxlan_port}, not "
            f"{host.vxlan_port}; use --vxlan-port {other.vxlan_port} on all hosts"
        )


def watermarks(listed: View) -> dict[str, int]:
    """Return how far each host's kernel is, by host."""
    found = {}
    for group in listed.matching(records.WATERMARKS):
        for key in group:
            mark = listed.get(Watermark, key)
            if mark is not None:
                found[key.removeprefix(records.WATERMARKS)] = mark.revision
    return found
