"""
Remotes: what this host's kernel knows of the other hosts' endpoints.

Each record of another host calls for a few forwarding entries here. What was written is
remembered by record, so that a change of one record costs the same however many there
are. Order is the store's: entries follow from the view as it is now, whichever way the
news came. A host that has nothing on a network carries none of its entries.
"""

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import structlog

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.model import Endpoint, IPAddress, Member, Watermark
from cnmdriver.plan.ops import Key, Op, Plan
from cnmdriver.store import records

PACE = 1.0
"""Seconds between two watermarks at the least."""

log = structlog.get_logger()


class Remotes:
    """Follows the records of other hosts."""

    def __init__(self, site: Site) -> None:
        """Know of no record yet."""
        self.site = site
        self.lock = asyncio.Lock()
        self.news = asyncio.Event()
        self.local: defaultdict[str, set[str]] = defaultdict(set)
        """The keys of this host's own endpoints, by network."""
        self.plans: dict[str, Plan] = {}
        """What was written for a record, by its key."""
        self.holders: dict[Key, str] = {}
        """Which record an entry was last written for."""
        self.held: dict[Key, Op] = {}
        self.vteps: dict[str, IPAddress | None] = {}
        self.alarm: Callable[[], None] = lambda: None
        """Called when the kernel did not take what it should."""
        self.worked = 0
        """The store's revision at the last change of the kernel."""

    def wake(self) -> None:
        """Ask for an update soon."""
        self.news.set()

    async def run(self) -> None:
        """Update at once whenever woken, until cancelled; tell the others how far."""
        told, latest = 0, -math.inf
        while True:
            due = latest + PACE - time.monotonic()
            if self.worked > told and due <= 0:
                told, latest = self.worked, time.monotonic()
                await self.tell()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due if self.worked > told else None):
                    await self.news.wait()
            self.news.clear()
            await self.update()

    async def tell(self) -> None:
        """Write how far this host's kernel is."""
        mark = Watermark(revision=self.worked)
        key = records.watermark(self.site.host.id)
        try:
            await self.site.state.commit(lambda draft: draft.put(key, mark))
        except DriverError as error:
            log.debug("remotes.not_told", error=str(error))

    async def update(self) -> None:
        """Bring the kernel up to what the view says by now; failures are logged."""
        try:
            async with self.lock:
                await self.follow(self.site.view.drain())
        except DriverError as error:
            # The audit finds what lacks, mends it and tells.
            log.warning("remotes.not_written", error=str(error))
            self.alarm()

    async def carry(self, network: str) -> None:
        """
        Know the others' endpoints on a network, as this host now has one.

        Raises KernelError if the kernel does not take them.
        """
        async with self.lock:
            await self.follow({*self.site.view.drain(), records.network(network)})

    async def follow(self, fresh: Iterable[str]) -> None:
        """Take in which records changed, and write what follows from them."""
        keys: set[str] = set()
        whole: set[str] = set()
        for key in fresh:
            self.sort(key, keys, whole)
        for network in whole:
            keys.update(self.site.sources(network))
            keys.update(k for k in self.plans if k.split("/")[1] == network)
        if keys:
            await self.write({key: self.wanted(key) for key in keys})

    def sort(self, key: str, keys: set[str], whole: set[str]) -> None:
        """Note what a changed record touches: itself, a network, or every network."""
        kind, _, rest = key.partition("/")
        network = rest.partition("/")[0]
        if kind == "endpoints":
            self.count(key, network, whole)
            keys.add(key)
        elif kind == "members":
            own = key == records.member(network, self.site.host.id)
            (whole if own else keys).add(network if own else key)
        elif kind == "networks":
            whole.add(network)
        elif kind in {"hosts", "alive"}:
            vtep = self.site.vtep(rest)
            if self.vteps.get(rest) != vtep:
                whole.update(member.network for member in self.site.members())
            self.vteps[rest] = vtep

    def count(self, key: str, network: str, whole: set[str]) -> None:
        """Keep track of this host's own endpoints; the first and the last matter."""
        found = self.site.view.get(Endpoint, key)
        before = bool(self.local[network])
        if found is not None and found.host == self.site.host.id:
            self.local[network].add(key)
        else:
            self.local[network].discard(key)
        if bool(self.local[network]) != before:
            whole.add(network)

    def wanted(self, key: str) -> Plan:
        """Return what a record calls for, nothing where it does not matter here."""
        network = key.split("/")[1]
        member = records.member(network, self.site.host.id)
        own = self.site.view.get(Member, member)
        if own is None or not (self.local[network] or own.addresses):
            return ()
        return self.site.source_plan(key)

    async def write(self, plans: dict[str, Plan]) -> None:
        """Make the kernel hold the plans of these records, in place of earlier ones."""
        new = {op.key: op for plan in plans.values() for op in plan}
        fresh = tuple(op for op in new.values() if self.held.get(op.key) != op)
        gone = tuple(
            op
            for key in plans
            for op in self.plans.get(key, ())
            if op.key not in new and self.holders.get(op.key) == key
        )
        touched = any(plan or key in self.plans for key, plan in plans.items())
        for key, plan in plans.items():
            self.holders.update((op.key, key) for op in plan)
            self.plans[key] = plan
            if not plan:
                del self.plans[key]
        if touched:
            self.worked = self.site.view.revision
            # A call may have asked for this; the others are told by the loop.
            self.news.set()
        for op in gone:
            self.held.pop(op.key, None)
            del self.holders[op.key]
        await self.site.clear(gone)
        if fresh:
            await self.site.dataplane.apply(fresh)
            self.held.update((op.key, op) for op in fresh)
