"""
The kernel of this host: makes plans hold, takes them back, reads what is ours.

Each type of operation has a handler in a module of its own; here is only what is true
of all. `apply` is all or nothing: on any error and on cancel it takes back what it
changed, last first. `clear` goes on after errors and reports them all at the end. A
plan's operations hold in the host's namespace or in another, each of which has handlers
of its own.

One of them runs at a time. An operation is never interrupted half way; a cancel counts
when it ended, and each has a bound.
"""

import asyncio
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import structlog

from cnmdriver.courtesy import Courtesy
from cnmdriver.dataplane import announcing, probe, seating
from cnmdriver.dataplane import sandbox as inside
from cnmdriver.dataplane.accept import Accepts
from cnmdriver.dataplane.addresses import Addresses
from cnmdriver.dataplane.entries import Entries
from cnmdriver.dataplane.errands import Errands
from cnmdriver.dataplane.handler import (
    Handler,
    Reader,
    Step,
    Undo,
    nothing,
    refusal,
)
from cnmdriver.dataplane.holds import Holds
from cnmdriver.dataplane.links import MARK, Links
from cnmdriver.dataplane.monitor import Ear
from cnmdriver.dataplane.namespaces import Namespaces
from cnmdriver.dataplane.nft import Firewall
from cnmdriver.dataplane.place import Place, Places, identity
from cnmdriver.dataplane.reattach import reattach
from cnmdriver.dataplane.routes import Routes
from cnmdriver.dataplane.sockets import Sockets
from cnmdriver.dataplane.sysctl import Memory, Sysctls
from cnmdriver.dataplane.underlay import underlay
from cnmdriver.errors import DriverError, KernelError
from cnmdriver.model import Attachment, IPAddress, IPInterface, IPNetwork, Underlay
from cnmdriver.plan.ops import (
    GROUP,
    HOST,
    Accept,
    Address,
    Bridge,
    Element,
    Fdb,
    Hold,
    Interface,
    Namespace,
    Neighbour,
    Op,
    Plan,
    Route,
    Seat,
    Sysctl,
    Table,
    Veth,
    Vxlan,
    name,
    union,
)
from cnmdriver.plan.sight import Echo, Filters, Inner, Way
from cnmdriver.settling import settled

log = structlog.get_logger()

HANDLERS: Mapping[type[Op], type[Handler]] = {
    Namespace: Namespaces,
    Table: Firewall,
    Element: Firewall,
    Accept: Accepts,
    Sysctl: Sysctls,
    Bridge: Links,
    Vxlan: Links,
    Veth: Links,
    Interface: Links,
    Address: Addresses,
    Fdb: Entries,
    Neighbour: Entries,
    Route: Routes,
    Hold: Holds,
}
"""Who makes which operations hold, in the order in which one stands on another."""

ORDER = tuple(HANDLERS)
ECHO = 0.1
"""Seconds in which our own changes are announced, and Docker goes on with them."""
EARS = 0.5
"""Seconds between two looks whether pynet's namespace is another one."""
BREATH = 1_000
"""After so many operations others get their turn."""


def all_of(plan: Plan) -> Plan:
    """Return a plan as it is."""
    return plan


@dataclass(frozen=True, slots=True)
class Crew:
    """The handlers of one place."""

    links: Links
    firewall: Firewall
    entries: Entries
    others: tuple[Reader, ...]

    @property
    def all(self) -> tuple[Handler, ...]:
        """Return them."""
        return (*self.others, self.firewall, self.links, self.entries)

    def one(self, kind: type[Handler]) -> Handler:
        """Return the one of a type."""
        return next(handler for handler in self.all if type(handler) is kind)


class Kernel:
    """The namespace in which it is opened, and pynet's own, as plans see them."""

    def __init__(
        self,
        *,
        host: str,
        run_dir: Path,
        step: Step = nothing,
        namespace: str = "pynet",
    ) -> None:
        """Take the host's id, and the name of pynet's own namespace, for overlays."""
        self._run_dir = run_dir
        self._step = step
        self._namespace = namespace
        self._mark = f"{MARK}{host[:8]}:"
        self._lock = asyncio.Lock()
        self._sockets = Sockets()
        self._memory = Memory(run_dir)
        self._host = Place()
        self._places = Places(self._staff)
        self._crews: dict[str, Crew] = {}
        self._changing = 0
        self._changed = 0.0
        self._callers = 0
        self._free = asyncio.Event()
        """Set while nobody changes the kernel, or waits for that."""
        self._free.set()
        self._errands = Errands(self.clear)
        self._staff(self._host)

    async def open(self) -> None:
        """Open what the handlers need; raises KernelError if something is missing."""
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KernelError(
                f"making {self._run_dir} failed: {error.strerror}"
            ) from error
        self._memory.open()
        await self._host.open()

    async def close(self) -> None:
        """Let go of sockets and threads; what is in the kernel stays."""
        await self._errands.run()
        async with self._lock:
            await self._sockets.close()
            await self._places.close_all()
            await self._host.close()

    async def apply(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """
        Make every operation hold, in order, or leave the kernel as it was.

        What is there already is adopted, mended in place or made again. Raises Conflict
        for a foreign object in the way and KernelError for what the kernel refused.
        `still` is asked, once it is this call's turn, what of the plan is wanted by
        then.
        """
        if not plan:
            return
        async with self._turn():
            undo: Undo = []
            self._begin()
            try:
                for where, kind, ops in _groups(still(plan)):
                    await self._announce("apply", ops)
                    await settled(self._apply(where, kind, ops, undo))
                await settled(self._end())
            except BaseException as error:
                failures = await settled(_take_back(undo))
                if failures and isinstance(error, DriverError):
                    text = f"{error}; taking back what was done: {'; '.join(failures)}"
                    raise type(error)(text) from error
                raise

    async def clear(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """
        Remove every object, last first; what is gone is well, what is foreign stays.

        `still` is asked, once it is this call's turn, which of the plan is to go by
        then: an object may have found a new user while the call waited.
        Goes on after errors, and raises one KernelError that tells all.
        """
        failures: list[str] = []
        if not plan:
            return
        async with self._turn():
            self._begin()
            for where, kind, ops in _groups(still(plan)[::-1], {Links}):
                await self._announce("clear", ops)
                failures += await _failure(self._clear(where, kind, ops))
            failures += await _failure(self._end())
        if failures:
            raise KernelError("; ".join(failures))

    def dismiss(
        self, plan: Plan, still: Callable[[Plan], Plan] = all_of
    ) -> asyncio.Future[None]:
        """
        Clear a plan soon, with others; return what is done when that is over.

        What could not be cleared is logged, and is found as too much.
        """
        return self._errands.add(plan, still)

    def hurry(self) -> None:
        """Have what was dismissed cleared now: somebody waits for it."""
        self._errands.hurry()

    async def found(self, wanted: Plan = ()) -> Plan:
        """
        Read everything of ours in the kernel, in the order of a plan, entries last.

        `wanted` adds what has no mark: settings, and rules that nothing calls for.
        Others have their turn after each kind of thing, and what there can be much of
        is read while they change it, so what is found need not be of one moment. What
        was dismissed is gone before.
        """
        await self._errands.run()
        courtesy = Courtesy(self._free)
        ops, entries = await self._look(HOST, wanted, courtesy)
        if any(isinstance(op, Namespace) for op in ops):
            more = await self._look(self._namespace, wanted, courtesy)
            ops, entries = ops + more[0], entries + more[1]
        return (*sorted(union([ops]), key=_place), *entries)

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices that another pynet host has marked."""
        async with self._lock:
            crews = await settled(self._in_sight())
            return tuple(
                [pair for c in crews for pair in await settled(c.links.foreign())]
            )

    async def drops(self) -> dict[str, int]:
        """Count the packets that nobody may send and that were dropped, by kind."""
        found: Counter[str] = Counter()
        async with self._lock:
            for crew in await settled(self._in_sight()):
                found.update(await settled(crew.firewall.drops()))
        return dict(found)

    async def routes(self) -> tuple[tuple[IPNetwork, str], ...]:
        """Return network and device of the host's routes, but the default and ours."""
        links = await settled(self._crews[HOST].links.outside())
        names = {link.index: link.name for link in links}
        routes = await settled(self._host.netlink.routes())
        return tuple((net, names[index]) for net, index in routes if index in names)

    async def underlay(self, wish: str, towards: Iterable[IPAddress]) -> Underlay:
        """
        Find the host's end of the tunnels: by address, by device, or for itself.

        An empty wish is the way to the first of the addresses that is not on this
        host, or the default route. Raises InvalidParameter for what cannot be one.
        """
        links = self._crews[HOST].links
        return await settled(underlay(self._host.netlink, links, wish, towards))

    async def announce(
        self, where: str, device: str, bindings: Iterable[tuple[IPAddress, str]]
    ) -> None:
        """Tell the ports of a bridge which MACs addresses have; raises KernelError."""
        async with self._lock:
            place = self._host if where == HOST else await self._places.get(where)
        if place is None:
            return
        what = f"announcing addresses on {device}"
        try:
            await place.inside.ask(what, announcing.send, device, bindings)
        except OSError as error:
            raise refusal(what, error.errno or 0) from error

    async def vnis(self) -> frozenset[int]:
        """Return the VXLAN network identifiers that devices of others have here."""
        async with self._lock:
            crews = await settled(self._in_sight())
            every = [await settled(crew.links.foreign_vnis()) for crew in crews]
        return frozenset().union(*every)

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
        async with self._lock:
            return await settled(
                reattach(self._host.netlink, sandbox, attachment, addresses, mac, seat)
            )

    async def inner(
        self, sandbox: str, pair: Veth, mac: str, towards: Iterable[IPAddress]
    ) -> Inner:
        """
        Read the device that a sandbox has of a pair, and how it reaches addresses.

        Raises KernelError if the sandbox is gone.
        """
        async with self._lock:
            crew = await settled(self._crew(pair.where))
        port = await crew.links.ours(pair.name) if crew is not None else None
        beyond = None if port is None else port.beyond
        return await inside.look(sandbox, beyond, mac, towards)

    async def way(self, to: IPAddress) -> Way:
        """Return where the host sends packets to an address."""
        return await settled(inside.way(self._host.netlink, to))

    async def received(self, where: str, device: str) -> int | None:
        """Count the frames a device took, None if it is not there."""
        async with self._lock:
            if await settled(self._crew(where)) is None:
                return None
            place = self._host if where == HOST else await self._places.get(where)
            if place is None:
                return None
            return await settled(place.netlink.received(device))

    async def filters(self) -> Filters:
        """Read the host's own packet filters, whoever made them."""
        async with self._lock:
            crew = self._crews[HOST]
            accepts = next(h for h in crew.others if isinstance(h, Accepts))
            listings = await settled(accepts.listings())
            ruleset = await settled(crew.firewall.ruleset())
        return Filters(listings=listings, ruleset=ruleset)

    async def ping(
        self, sandbox: str, source: IPAddress, to: IPAddress, size: int = probe.SMALL
    ) -> Echo:
        """
        Ask an address for an echo, from a sandbox, or with "" from the host.

        Ends within two seconds. Nobody may fragment the packets of `size` bytes.
        """
        return await probe.ping(sandbox, source, to, size)

    async def datagram(self, sandbox: str, source: IPAddress, to: IPAddress) -> Echo:
        """Send a datagram that the far kernel refuses if its checksum is right."""
        return await probe.datagram(sandbox, source, to)

    async def inside(self, sandbox: str) -> frozenset[str]:
        """
        Return the names of a sandbox's devices.

        Raises KernelError if this daemon could not set up a device there.
        """
        return await settled(seating.devices(sandbox))

    async def vacate(self, seat: Seat, leaving: str) -> None:
        """
        Put an interface in a sandbox out of the way of the next, under another name.

        If either is gone that is well. It is deleted with the other end of its pair.
        """
        if inside.is_there(seat.sandbox):
            await settled(seating.vacate(seat, leaving))

    async def watch(self, heard: Callable[[bool], None]) -> None:
        """
        Call back whenever something of ours may have been changed, until cancelled.

        Which object it is, is not told, but whether it may have been ourselves: our own
        changes are announced too, and what Docker does with a new device follows them.
        """
        ears: dict[str, Ear] = {}

        def told() -> None:
            now = asyncio.get_running_loop().time()
            heard(self._changing > 0 or now < self._changed + ECHO)

        try:
            while True:
                for where in (HOST, self._namespace):
                    await self._keep_ear(ears, where, told)
                await asyncio.sleep(EARS)
        finally:
            for ear in ears.values():
                ear.close()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Change the kernel, alone, and before whoever only reads goes on."""
        self._callers += 1
        self._free.clear()
        try:
            async with self._lock, self._own_change():
                yield
        finally:
            self._callers -= 1
            if not self._callers:
                self._free.set()

    @asynccontextmanager
    async def _own_change(self) -> AsyncIterator[None]:
        """Let it be known that what is announced now may be our own doing."""
        self._changing += 1
        try:
            yield
        finally:
            self._changing -= 1
            self._changed = asyncio.get_running_loop().time()

    async def _keep_ear(
        self, ears: dict[str, Ear], where: str, heard: Callable[[], None]
    ) -> None:
        """Listen in a namespace as long as it is the one of that name."""
        now = None if where == HOST else identity(where)
        ear = ears.get(where)
        if ear is not None and ear.identity == now:
            return
        if ear is not None:
            ears.pop(where).close()
            heard()
        if where != HOST and now is None:
            return
        ear = Ear(where, now)
        async with self._lock:
            try:
                place = self._host if where == HOST else await self._places.get(where)
                if place is None:
                    return
                await ear.open(place.inside)
                ear.indexes = {link.index for link in await place.netlink.links(GROUP)}
            except (OSError, KernelError) as error:
                log.warning("kernel.no_news", where=where, error=str(error))
                ear.close()
                return
        ears[where] = ear
        ear.listen(heard)
        # What happened before was not heard.
        heard()

    def has_sandbox(self, key: str) -> bool:
        """Tell whether a sandbox is still there, as far as this process can see."""
        return inside.is_there(key)

    def changed_sysctls(self) -> dict[str, str]:
        """Return path and earlier value of each setting changed for good."""
        return dict(self._memory.old)

    def _staff(self, place: Place) -> None:
        """Give a place its handlers."""
        where, netlink = place.name, place.netlink
        links = Links(place, self._host, mark=self._mark, namespace=self._namespace)
        others: tuple[Reader, ...] = (
            Sysctls(place.inside, links, self._memory, where),
            Addresses(netlink, links, where),
            Routes(netlink, links, where),
        )
        if where == HOST:
            others += (
                Namespaces(self._places, mark=self._mark, name=self._namespace),
                Accepts(place.nft),
                Holds(self._sockets),
            )
        self._crews[where] = Crew(
            links,
            Firewall(place.nft, where),
            Entries(place.inside, netlink, links, where),
            others,
        )

    async def _crew(self, where: str) -> Crew | None:
        """Return the handlers of a place as it is now, None if it is not there."""
        if where != HOST and await self._places.get(where) is None:
            return None
        return self._crews[where]

    async def _in_sight(self) -> list[Crew]:
        crews = [await self._crew(where) for where in (HOST, self._namespace)]
        return [crew for crew in crews if crew is not None]

    def _begin(self) -> None:
        for crew in self._crews.values():
            crew.firewall.begin()

    async def _end(self) -> None:
        for crew in list(self._crews.values()):
            await crew.firewall.end()

    async def _apply(
        self, where: str, kind: type[Handler], ops: Plan, undo: Undo
    ) -> None:
        crew = await self._crew(where)
        if crew is None:
            raise KernelError(
                f"making {name(ops[0])} failed: there is no network namespace {where}"
            )
        await crew.one(kind).apply(ops, undo)

    async def _clear(self, where: str, kind: type[Handler], ops: Plan) -> None:
        crew = await self._crew(where)
        # What was in a namespace has gone with it.
        if crew is not None:
            await crew.one(kind).clear(ops)

    async def _look(
        self, where: str, wanted: Plan, courtesy: Courtesy
    ) -> tuple[Plan, Plan]:
        """Read a place; return what is there and, apart, the entries of overlays."""
        here = tuple(op for op in wanted if op.where == where)
        async with self._lock:
            crew = await settled(self._crew(where))
        if crew is None:
            return (), ()
        try:
            devices = await settled(crew.links.devices(here))
            found = devices + await settled(crew.firewall.found(here, devices))
            entries = await crew.entries.found(here, devices, courtesy)
            for handler in crew.others:
                async with self._lock:
                    if not await self._is_there(where, crew):
                        return (), ()
                    found += await settled(handler.found(here, devices))
        except KernelError:
            async with self._lock:
                if await self._is_there(where, crew):
                    raise
            # What was in the namespace has gone with it.
            return (), ()
        return found, entries

    async def _is_there(self, where: str, crew: Crew) -> bool:
        return await settled(self._crew(where)) is crew

    async def _announce(self, verb: str, ops: Plan) -> None:
        for count, op in enumerate(ops, 1):
            await self._step(f"{verb}.{op.key[0]}")
            if count % BREATH == 0:
                await asyncio.sleep(0)


def _groups(
    plan: Plan, together: Collection[type[Handler]] = ()
) -> Iterator[tuple[str, type[Handler], Plan]]:
    """
    Yield place, handler and operations of each step: mostly one operation.

    `together` adds to the handlers that take all that follow each other.
    """
    for (where, kind), ops in groupby(plan, key=lambda op: (op.where, _handler(op))):
        if kind.together or kind in together:
            yield where, kind, tuple(ops)
        else:
            yield from ((where, kind, (op,)) for op in ops)


def _handler(op: Op) -> type[Handler]:
    return HANDLERS[type(op)]


async def _failure(work: Coroutine[None, None, None]) -> list[str]:
    """Do something, and return in words what went wrong, if anything did."""
    try:
        await settled(work)
    except DriverError as error:
        return [str(error)]
    return []


async def _take_back(undo: Undo) -> list[str]:
    """Run the undos, last first, whatever becomes of each; return what failed."""
    failures = []
    for back in reversed(undo):
        try:
            await back()
        except DriverError as error:
            failures.append(str(error))
    return failures


def _place(op: Op) -> int:
    """Return where in a plan an operation stands: after what it stands on."""
    match op:
        case Sysctl() if op.device:
            return ORDER.index(Address)
        case Element() if op.value:
            return len(ORDER)
    return ORDER.index(type(op))
