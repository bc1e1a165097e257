"""
Remotes: what this host's kernel knows of the other hosts' endpoints.

Each record of another host calls for a few forwarding entries here, and each host for
an element that lets its tunnels in, alive or not. What was written is remembered by
record, so that a change of one record costs the same however many there are. Order is
the store's: entries follow from the view as it is now, whichever way the news came. A
host that has nothing on a network carries none of its entries.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import structlog

from cnmdriver.driver.bindings import Bindings
from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError, KernelError
from cnmdriver.model import Alive, Endpoint, IPAddress, Member, Watermark
from cnmdriver.plan import firewall
from cnmdriver.plan.ops import Fdb, Key, Neighbour, Op, Plan
from cnmdriver.store import records
from cnmdriver.store.view import Draft

PACE = 1.0
"""Seconds between two watermarks at the least."""
AGAIN = 10.0
"""Seconds until what the kernel refused is tried again."""
GRACE = 1.0
"""Seconds that a host whose lease has run out is not hidden yet."""
BREATH = 100
"""After so many records others get their turn."""

log = structlog.get_logger()


@dataclass(slots=True)
class Touched:
    """What some news is about."""

    keys: set[str] = field(default_factory=set)
    networks: set[str] = field(default_factory=set)
    """All records on these."""
    hosts: set[str] = field(default_factory=set)
    """All records of these."""
    members: bool = False
    """Whether it is about which hosts there are."""


class Remotes:
    """Follows the records of other hosts."""

    def __init__(self, site: Site) -> None:
        """Know of no record yet."""
        self.site = site
        self.feed = site.view.feed()
        self.lock = asyncio.Lock()
        self.news = asyncio.Event()
        self.ahead = asyncio.Event()
        """Set while the kernel is further than the others were told."""
        self.local: dict[str, set[str]] = {}
        """The keys of this host's own endpoints, by network."""
        self.plans: dict[str, Plan] = {}
        """What was written for a record, by its key."""
        self.holders: dict[Key, str] = {}
        """Which record an entry was last written for."""
        self.held: dict[Key, Op] = {}
        self.amiss: set[str] = set()
        """Networks of which the kernel did not take everything."""
        self.vteps: dict[str, IPAddress] = {}
        self.bindings = Bindings()
        self.begun = False
        """Whether there was an update: what the first one brings is no news."""
        self.alarm: Callable[[], None] = lambda: None
        """Called when the kernel did not take what it should."""
        self.worked = 0
        """The store's revision at the last change of the kernel."""
        self.heard: float | None = None
        """Since when there is news that the kernel has not."""
        self.programmed: Callable[[float], object] = lambda _: None
        """Called when the kernel has some news, with the seconds since it came."""

    def wake(self) -> None:
        """Ask for an update soon."""
        if self.heard is None:
            self.heard = time.monotonic()
        self.news.set()

    def seen(self, found: Plan) -> None:
        """Know what the kernel has already, until the first update."""
        if not self.begun:
            self.held = {op.key: op for op in found if isinstance(op, Fdb | Neighbour)}

    async def run(self) -> None:
        """Update at once whenever woken, until cancelled; tell the others how far."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keep_up())
            group.create_task(self.keep_trying())
            group.create_task(self.keep_telling())

    async def keep_up(self) -> None:
        """Update whenever woken."""
        while True:
            await self.news.wait()
            self.news.clear()
            await self.update()

    async def keep_trying(self) -> None:
        """Try again what the kernel refused: the audit does not tell that it mended."""
        while True:
            await asyncio.sleep(AGAIN)
            if self.amiss:
                await self.update(again=True)

    async def keep_telling(self) -> None:
        """Write how far this host's kernel is, at most once in a while."""
        while True:
            await self.ahead.wait()
            self.ahead.clear()
            await self.tell()
            await asyncio.sleep(PACE)

    async def tell(self) -> None:
        """Write how far this host's kernel is; if that fails it is to be told yet."""
        key = records.watermark(self.site.host.id)

        def decide(draft: Draft) -> None:
            draft.put(key, Watermark(revision=self.worked))

        try:
            await self.site.state.commit(decide)
        except DriverError as error:
            log.debug("remotes.not_told", error=str(error))
            self.ahead.set()

    async def update(self, *, again: bool = False) -> None:
        """
        Bring the kernel up to what the view says by now; failures are logged.

        What was refused before is tried `again` only by itself: it may be refused for
        good, and must not keep anything else from being written.
        """
        try:
            async with self.lock:
                await self.follow(self.feed.drain())
                if again:
                    await self.follow(list(map(records.network, self.amiss)))
        except DriverError as error:
            log.warning("remotes.not_written", error=str(error))

    async def carry(self, network: str) -> None:
        """
        Know the others' endpoints on a network, as this host has a place there now.

        Raises KernelError if the kernel does not take them.
        """
        async with self.lock:
            fresh = set(self.feed.drain())
            if network in self.amiss:
                fresh.add(records.network(network))
            await self.follow(fresh)

    async def follow(self, fresh: Iterable[str]) -> None:
        """Take in which records changed, and write what follows from them."""
        revision = self.site.view.revision
        heard, self.heard = self.heard, None
        touched = Touched()
        for key in fresh:
            self.sort(key, touched)
        keys = {*touched.keys, *self.concerned(touched)}
        if touched.members or touched.networks:
            keys |= self.hosts()
        try:
            plans = await self.wanted(keys)
            if await self.write(plans):
                self.worked = revision
                self.ahead.set()
                self.programmed(time.monotonic() - (heard or time.monotonic()))
        except (DriverError, asyncio.CancelledError):
            # News comes once only: the audit finds what lacks, mends it and tells.
            self.amiss.update(map(network_of, keys))
            self.alarm()
            raise
        self.amiss -= touched.networks
        await self.announce()

    async def announce(self) -> None:
        """Tell containers here of addresses whose MAC they may know otherwise."""
        news, begun = self.bindings.news(), self.begun
        self.begun = True
        for network, found in news.items() if begun else ():
            if network not in self.local:
                continue
            try:
                await self.site.announce(network, found)
            except KernelError as error:
                # They ask again by themselves when nobody answers, after half a minute.
                log.debug("remotes.not_announced", error=str(error))

    def sort(self, key: str, touched: Touched) -> None:
        """Note what a changed record is about."""
        kind, _, rest = key.partition("/")
        network = rest.partition("/")[0]
        if kind in {"endpoints", "members"} and rest.count("/") != 1:
            # No record can stand there.
            return
        if kind == "endpoints":
            self.count(key, network, touched)
            touched.keys.add(key)
        elif key == records.member(network, self.site.host.id) or kind == "networks":
            touched.networks.add(network)
            if self.site.view.get(object, key) is None:
                self.bindings.forget(network)
        elif kind == "members":
            touched.keys.add(key)
        elif kind in {"hosts", "alive"}:
            touched.members |= kind == "hosts"
            self.locate(rest, touched)

    def count(self, key: str, network: str, touched: Touched) -> None:
        """Keep track of this host's own endpoints; the first and the last matter."""
        found = self.site.view.get(Endpoint, key)
        own = self.local.setdefault(network, set())
        before = bool(own)
        if found is not None and found.host == self.site.host.id:
            own.add(key)
        else:
            own.discard(key)
        if found is not None:
            self.bindings.note(found)
        if bool(own) != before:
            touched.networks.add(network)
        if not own:
            del self.local[network]

    def locate(self, host: str, touched: Touched) -> None:
        """Keep track of where another host's tunnels end."""
        self.linger(host)
        vtep = self.site.vtep(host)
        if vtep != self.vteps.pop(host, None):
            touched.hosts.add(host)
        if vtep is not None:
            self.vteps[host] = vtep

    def linger(self, host: str) -> None:
        """Hide a host whose lease has run out only after a while: it may be back."""
        lingering = self.site.lingering
        if self.site.view.get(Alive, records.alive(host)) is not None:
            lingering.pop(host, None)
        elif host in self.vteps and host not in lingering:
            lingering[host] = time.monotonic() + GRACE
            loop = asyncio.get_running_loop()
            loop.call_later(GRACE, self.look_again, host)

    def look_again(self, host: str) -> None:
        """Look whether a host is to be hidden now."""
        self.feed.add(records.alive(host))
        self.wake()

    def concerned(self, touched: Touched) -> Iterator[str]:
        """Yield the records of the networks and hosts that something is about."""
        for network in touched.networks:
            yield from self.site.sources(network)
        if touched.networks:
            yield from (k for k in self.plans if network_of(k) in touched.networks)
        for member in self.site.members() if touched.hosts else ():
            for prefix in ("members", "endpoints"):
                for group in self.site.view.matching(f"{prefix}/{member.network}/"):
                    for key, known in group.items():
                        if getattr(known.record, "host", "") in touched.hosts:
                            yield key

    def hosts(self) -> set[str]:
        """
        Return the keys of all hosts that are or were known.

        Of two hosts with one address, one may go: it stays the other's.
        """
        known = {key for key, _ in self.site.view.pairs("hosts/")}
        return known | set(filter(is_host, self.plans))

    async def wanted(self, keys: set[str]) -> dict[str, Plan]:
        """Return what records call for, the latest last; nothing if not needed here."""
        hosts = set(filter(is_host, keys))
        plans = self.members(hosts)
        keys = keys - hosts
        carried = {network: self.carries(network) for network in map(network_of, keys)}
        for count, key in enumerate(sorted(keys, key=self.site.view.seen), 1):
            found = carried[network_of(key)]
            plans[key] = self.site.source_plan(key) if found else ()
            if count % BREATH == 0:
                await asyncio.sleep(0)
        return plans

    def members(self, keys: set[str]) -> dict[str, Plan]:
        """Return what hosts call for, or nothing if the kernel has all of that."""
        plans = {key: self.site.source_plan(key) for key in sorted(keys)}
        for key, plan in plans.items():
            if plan != self.plans.get(key, ()) or any(
                self.held.get(op.key) != op for op in plan
            ):
                return plans
        return {}

    def carries(self, network: str) -> bool:
        """Tell whether this host needs to know of the others' endpoints."""
        key = records.member(network, self.site.host.id)
        own = self.site.view.get(Member, key)
        return own is not None and bool(own.addresses or network in self.local)

    async def write(self, plans: dict[str, Plan]) -> bool:
        """
        Make the kernel hold the plans of these records, in place of earlier ones.

        Tell whether it is about anything that hosts have on this one's networks.
        """
        new = {op.key: op for plan in plans.values() for op in plan}
        fresh = tuple(op for op in new.values() if self.held.get(op.key) != op)
        gone = tuple(
            op
            for key in plans
            for op in self.plans.get(key, ())
            if op.key not in new and self.holders.get(op.key) == key
        )
        mattered = any(
            (plan or key in self.plans) and not is_host(key)
            for key, plan in plans.items()
        )
        self.note(plans)
        for op in (*gone, *fresh):
            self.held.pop(op.key, None)
        for op in gone:
            del self.holders[op.key]
        if gone:
            await self.clear(gone)
        if fresh:
            await self.site.dataplane.apply((*ground(fresh), *fresh))
            self.held.update((op.key, op) for op in fresh)
        return mattered

    def note(self, plans: dict[str, Plan]) -> None:
        """Remember what is written for which record."""
        for key, plan in plans.items():
            self.holders.update((op.key, key) for op in plan)
            self.plans[key] = plan
            if not plan:
                del self.plans[key]

    async def clear(self, gone: Plan) -> None:
        """Take entries out of the kernel; what is left is the audit's."""
        try:
            # No network's own plan has such an entry: nobody else can want it.
            await self.site.dataplane.clear(gone)
        except KernelError as error:
            log.warning("remotes.not_cleared", error=str(error))
            self.alarm()


def is_host(key: str) -> bool:
    """Tell whether a key is a host's, and not of what it has on a network."""
    return key.startswith("hosts/")


def ground(plan: Plan) -> Plan:
    """Return the table that a plan's elements stand on: it may be on its way only."""
    table = firewall.table()
    return (table,) if any(table.key in op.stands_on() for op in plan) else ()


def network_of(key: str) -> str:
    """Return the network of a member's or an endpoint's key."""
    return key.split("/")[1]
