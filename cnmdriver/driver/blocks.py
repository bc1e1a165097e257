"""
Blocks: parts of pools that this host gives out by itself, also without the store.

A host takes blocks in advance, so that containers start while the store is away. What
lies in another host's block is asked for: the owner lends the address, or gives up a
block of which it uses nothing. So blocks keep nothing from anybody while all are there,
and a host that is cut off is not robbed: its blocks are its own until it is given up.
"""

import asyncio
import contextlib
import time
from collections.abc import Container, Iterator
from dataclasses import replace
from functools import partial

import structlog

from cnmdriver.driver import claims
from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.model import (
    Alive,
    Block,
    IPAddress,
    IPNetwork,
    Member,
    Pool,
)
from cnmdriver.plan import pools
from cnmdriver.store import records
from cnmdriver.store.view import Draft, View

MOST = 256
"""Free addresses a host has in advance, if the pool is large."""
SHARE = 16
"""Of a small pool the members together have one part in so many in advance."""
ANSWER = 2.5
"""Seconds for another host to lend an address."""
POLL = 0.02
CALM = 0.1
"""Seconds between two looks at who asks."""
PACE = 1.0
"""Seconds between two looks at what is free."""
AGAIN = 30.0
"""Seconds until a block that was given up may be taken again in advance."""
REVIEW = 30.0
"""Seconds until both are done without news."""

log = structlog.get_logger()


class Blocks:
    """Takes, lends and gives up this host's blocks."""

    def __init__(self, site: Site) -> None:
        """Take the site; without a shared store there is nothing to do."""
        self.site = site
        self.news = asyncio.Event()
        self.counted = -PACE
        """When it was last looked at what is free, or could not be."""
        self.owed = True
        """Whether that is to be done again, as soon as it may be."""
        self.given: dict[str, float] = {}
        """When a block was given up because somebody asked, by key."""

    def wake(self) -> None:
        """Look again soon."""
        self.news.set()

    async def run(self) -> None:
        """Keep blocks in advance, and answer who asks, until cancelled."""
        while True:
            try:
                if self.site.state.away is None:
                    await self.turn()
                else:
                    self.counted = time.monotonic()
            except DriverError as error:
                log.warning("blocks.not_kept", error=str(error))
            await asyncio.sleep(CALM)
            due = self.counted + PACE - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(due, 0) if self.owed else REVIEW):
                    await self.news.wait()
            self.news.clear()
            self.owed = True

    async def turn(self) -> None:
        """Do all that is to be done now; raises DriverError if the store is away."""
        for key in list(self.asked(self.site.view)):
            await self.site.state.commit(partial(self.lend, key=key))
        if self.owed and time.monotonic() >= self.counted + PACE:
            self.counted = time.monotonic()
            await self.fill()
            self.owed = False

    async def fill(self) -> None:
        """Take what is lacking in advance, and make sure of what is taken."""
        now, host = time.monotonic(), self.site.host.id
        self.given = {k: t for k, t in self.given.items() if now - t < AGAIN}
        for pool, sub in list(self.served()):
            if lacking(self.site.view, host, pool, sub) > 0:
                await self.site.state.commit(partial(self.take, pool=pool, sub=sub))
        if not self.all_certain():
            await self.site.state.relist()

    def take(self, draft: Draft, pool: Pool, sub: IPNetwork | None) -> None:
        """Take blocks, if the pool and this host's part in it are as they were."""
        host = self.site.host.id
        member = draft.get(Member, records.member(pool.network, host))
        same = draft.get(Pool, records.pool(pool.space, pool.cidr)) == pool
        if same and member is not None and member.docker_id:
            take(draft, host, pool, sub, self.given)

    def served(self) -> Iterator[tuple[Pool, IPNetwork | None]]:
        """Yield this host's pools, each with the part Docker gives out of it here."""
        for member in self.site.members():
            for pool in claims.pools_of(self.site.view, member.network):
                if pool.claimed:
                    yield from ((pool, sub) for sub in parts(member, pool))

    def all_certain(self) -> bool:
        """Tell whether all of this host's blocks can be used without the store."""
        view, host = self.site.view, self.site.host.id
        return all(
            claims.certain(view, pool, span)
            for pool, _ in self.served()
            for span, _ in own(view, host, pool)
        )

    # Between hosts.

    def asked(self, view: View) -> Iterator[str]:
        """Yield the keys of this host's blocks that others want something of."""
        for key, record in view.pairs("blocks/"):
            if not isinstance(record, Block) or record.host != self.site.host.id:
                continue
            if record.wanted or not self.kept(view, key):
                yield key

    def kept(self, view: Draft | View, key: str) -> bool:
        """Tell whether this host has a part in the network a block is of."""
        pool = view.get(Pool, pool_key(key))
        host = self.site.host.id
        return pool is not None and any(
            member.host == host and (member.docker_id or claims.claimed(member, pool))
            for member in view.all(Member, f"members/{pool.network}/")
        )

    def lend(self, draft: Draft, key: str) -> None:
        """Give what is wanted of a block, or all of it if nothing is used here."""
        block = draft.get(Block, key)
        pool = draft.get(Pool, pool_key(key))
        if block is None or block.host != self.site.host.id:
            return
        span = pools.read("/".join(key.split("/")[-2:]))
        every = claims.reservation(draft, pool) if pool is not None else []
        used = [held for held in every if held.ip in span]
        if not self.kept(draft, key) or not any(r.host == block.host for r in used):
            self.given[key] = time.monotonic()
            draft.delete(key)
        elif block.wanted:
            taken = {r.ip for r in used}
            free = [ip for ip in block.wanted if ip not in taken]
            lent = tuple(dict.fromkeys((*block.lent, *free)))
            draft.put(key, replace(block, wanted=(), lent=lent))

    async def ask(self, pool: Pool, ip: IPAddress) -> bool:
        """Ask the owner of an address's block for it; tell if it may be taken now."""
        key = records.block(pool.space, pool.cidr, pools.block(pool.cidr, ip))

        def decide(draft: Draft) -> bool:
            block = draft.get(Block, key)
            if block is None or block.host == self.site.host.id or ip in block.lent:
                return True
            if draft.view.get(Alive, records.alive(block.host)) is None:
                return False
            if ip not in block.wanted:
                draft.put(key, replace(block, wanted=(*block.wanted, ip)))
            return True

        if not await self.site.state.commit(decide):
            return False
        latest = time.monotonic() + ANSWER
        while not self.answered(key, ip):
            if time.monotonic() > latest:
                return False
            await asyncio.sleep(POLL)
        return True

    def answered(self, key: str, ip: IPAddress) -> bool:
        """Tell whether nobody is being asked for an address any more."""
        block = self.site.view.get(Block, key)
        return block is None or ip not in block.wanted


# In advance.


def take(
    draft: Draft,
    host: str,
    pool: Pool,
    sub: IPNetwork | None,
    but: Container[str] = (),
) -> None:
    """Take blocks for a host until enough is free in them, lowest first."""
    want = lacking(draft, host, pool, sub)
    for span in free(draft, host, pool, sub) if want > 0 else ():
        key = records.block(pool.space, pool.cidr, span)
        if key in but:
            continue
        draft.put(key, Block(host=host))
        want -= size(pool, sub, span)
        if want <= 0:
            break


def parts(member: Member, pool: Pool) -> set[IPNetwork | None]:
    """Return the parts of a pool that Docker gives out on a host; None is all of it."""
    held = [claim for claim in member.claims if claims.covers(claim, pool)]
    return {pools.parse_id(claim).sub for claim in held} or {None}


def lacking(view: Draft | View, host: str, pool: Pool, sub: IPNetwork | None) -> int:
    """Return how many addresses more a host should have to itself."""
    members = view.all(Member, f"members/{pool.network}/")
    hosts = max(1, sum(bool(member.docker_id) for member in members))
    share = pools.capacity(pool.cidr, sub) // (SHARE * hosts)
    mine = own(view, host, pool)
    room = sum(size(pool, sub, span) - len(block.lent) for span, block in mine)
    spans = {span for span, _ in mine}
    used = sum(
        pools.block(pool.cidr, held.ip) in spans
        for held in claims.reservation(view, pool)
        if held.host == host or held.gateway
    )
    return max(1, min(MOST, share)) - max(0, room - used)


def own(view: Draft | View, host: str, pool: Pool) -> list[tuple[IPNetwork, Block]]:
    """Return a host's blocks of a pool, lowest first."""
    return [(s, b) for s, b in claims.blocks_of(view, pool) if b.host == host]


def free(
    draft: Draft, host: str, pool: Pool, sub: IPNetwork | None
) -> Iterator[IPNetwork]:
    """Yield blocks that nobody has, nor another host any address of, lowest first."""
    taken = {span for span, _ in claims.blocks_of(draft, pool)}
    for held in claims.reservation(draft, pool):
        if held.host != host and not held.gateway:
            taken.add(pools.block(pool.cidr, held.ip))
    for span in pools.blocks(pool.cidr, sub):
        if span not in taken and size(pool, sub, span):
            yield span


def pool_key(key: str) -> str:
    """Return the key of the pool that a block is of."""
    return "pools/" + key.removeprefix("blocks/").rpartition("/")[0].rpartition("/")[0]


def size(pool: Pool, sub: IPNetwork | None, span: IPNetwork) -> int:
    """Count the addresses of a block that can be given out here."""
    if sub is not None and not pools.overlap(sub, span):
        return 0
    inner = sub is not None and pools.inside(sub, span)
    return pools.capacity(pool.cidr, sub if inner else span)
