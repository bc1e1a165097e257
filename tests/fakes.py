"""Small honest stand-ins for the kernel, and a whole driver built on them."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path

from cnmdriver.driver.ipam import IpamDriver
from cnmdriver.driver.network import NetworkDriver
from cnmdriver.driver.site import Site, Underlay
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import Alive, Host, IPAddress, IPNetwork
from cnmdriver.plan import pools
from cnmdriver.plan.ops import Hold, Key, Op, Plan, Seat, Sysctl, Veth
from cnmdriver.plan.sight import Echo, Filters, Inner, Way
from cnmdriver.store import records
from cnmdriver.store.base import Change, Event, Lease, Listing
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State
from cnmdriver.store.view import Draft

POOLS = "10.200.0.0/16/24,fd70:796e:6574::/48/64"


class FakeKernel:
    """
    Holds operations in a dict, as strict as the kernel: nothing stands on nothing.

    `refuse` names keys that the kernel will not take; `busy` ports another program has.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self.ops: dict[Key, Op] = {}
        self.refuse: set[Key] = set()
        self.busy: set[tuple[int, int]] = set()
        self.route_list: tuple[tuple[IPNetwork, str], ...] = ()
        self.foreign_vnis: frozenset[int] = frozenset()
        self.applied = 0
        self.dead: set[str] = set()
        self.reattached: list[str] = []
        self.announced: list[tuple[str, str, str, str]] = []
        self.inners: dict[str, Inner] = {}
        self.walls = Filters()
        self.silent = False
        self.devices: frozenset[str] = frozenset({"lo"})
        self.locked = False
        self.vacated: list[tuple[str, str]] = []

    async def apply(
        self, plan: Plan, still: Callable[[Plan], Plan] = lambda plan: plan
    ) -> None:
        """Take all or nothing."""
        plan = still(plan)
        before = dict(self.ops)
        try:
            for op in plan:
                self.one(op)
        except (KernelError, Conflict):
            self.ops = before
            raise

    def one(self, op: Op) -> None:
        """Take one operation."""
        if op.key in self.refuse:
            raise KernelError(f"cannot make {op.key}: refused by the test")
        if isinstance(op, Hold) and (op.protocol, op.port) in self.busy:
            raise Conflict(f"port {op.port} is taken by another program")
        for key in op.stands_on():
            if key not in self.ops:
                raise KernelError(f"{op.key} stands on {key}, which is not there")
        self.applied += self.ops.get(op.key) != op
        self.ops[op.key] = op

    async def clear(
        self, plan: Plan, still: Callable[[Plan], Plan] = lambda plan: plan
    ) -> None:
        """Let go; a device takes with it what stands on it."""
        for op in reversed(still(plan)):
            self.gone(op)

    def gone(self, op: Op) -> None:
        """Let one operation go, with what stands on it."""
        if isinstance(op, Sysctl) and op.keep:
            return
        self.ops.pop(op.key, None)
        for other in list(self.ops.values()):
            if op.key in other.stands_on():
                self.ops.pop(other.key, None)

    def dismiss(
        self, plan: Plan, still: Callable[[Plan], Plan] = lambda plan: plan
    ) -> asyncio.Future[None]:
        """Let go at once."""
        for op in reversed(still(plan)):
            self.gone(op)
        over = asyncio.get_running_loop().create_future()
        over.set_result(None)
        return over

    def hurry(self) -> None:
        """Do nothing: all is gone."""

    async def found(self, wanted: Plan = ()) -> Plan:
        """Return what is held."""
        del wanted
        return tuple(self.ops.values())

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return nothing."""
        return ()

    async def routes(self) -> tuple[tuple[IPNetwork, str], ...]:
        """Return the host's routes."""
        return self.route_list

    async def announce(
        self, where: str, device: str, bindings: Iterable[tuple[IPAddress, str]]
    ) -> None:
        """Note what was announced."""
        self.announced += [(where, device, str(ip), mac) for ip, mac in bindings]

    async def vnis(self) -> frozenset[int]:
        """Return the VNIs that the test gave to others."""
        return self.foreign_vnis

    async def underlay(self, wish: str, towards: Iterable[IPAddress]) -> Underlay:
        """Return the address that is wished, on an ordinary device."""
        del towards
        return Underlay(
            address=ip_address(wish or "192.0.2.1"), device="eth0", mtu=1500
        )

    async def drops(self) -> dict[str, int]:
        """Have dropped nothing."""
        return {}

    async def reattach(self, sandbox: str, *_: object) -> str:
        """Note which sandbox got a device."""
        self.reattached.append(sandbox)
        return "eth0"

    async def inner(self, sandbox: str, pair: Veth, mac: str, towards: object) -> Inner:
        """Return what the test put into the sandbox."""
        del pair, mac, towards
        return self.inners.get(sandbox, Inner(face=None))

    async def way(self, to: IPAddress) -> Way:
        """Return an ordinary way."""
        return Way(to=to, device="eth0", up=True, carrier=True, mtu=1500)

    async def received(self, where: str, device: str) -> int | None:
        """Have counted nothing."""
        del where, device
        return None

    async def filters(self) -> Filters:
        """Return the filters of the test."""
        return self.walls

    async def ping(
        self, sandbox: str, source: IPAddress, to: IPAddress, size: int = 84
    ) -> Echo:
        """Answer at once, unless the test is silent."""
        del sandbox, source
        return Echo(to=to, size=size, milliseconds=None if self.silent else 0.5)

    async def datagram(self, sandbox: str, source: IPAddress, to: IPAddress) -> Echo:
        """Do the same."""
        return await self.ping(sandbox, source, to, 44)

    async def inside(self, sandbox: str) -> frozenset[str]:
        """Return what the test says is in every sandbox."""
        if self.locked:
            raise KernelError(f"entering sandbox {sandbox} failed: the test says so")
        return self.devices

    async def vacate(self, seat: Seat, leaving: str) -> None:
        """Note which interface was put away."""
        self.vacated.append((seat.name, leaving))

    async def watch(self, heard: Callable[[bool], None]) -> None:
        """Have no news."""
        del heard
        await asyncio.Event().wait()

    def route(self, cidr: str, device: str) -> None:
        """Give the host a route."""
        self.route_list = (*self.route_list, (ip_network(cidr), device))

    def has_sandbox(self, key: str) -> bool:
        """Tell whether the test let the sandbox live."""
        return key not in self.dead

    def changed_sysctls(self) -> dict[str, str]:
        """Return nothing."""
        return {}

    @property
    def left(self) -> list[Op]:
        """Return what is held but for settings that stay."""
        return [
            op for op in self.ops.values() if not (isinstance(op, Sysctl) and op.keep)
        ]


@dataclass
class Rig:
    """A driver with its parts."""

    site: Site
    kernel: FakeKernel
    state: State
    networks: NetworkDriver
    ipam: IpamDriver
    steps: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[str]:
        """Return the keys of all records but the cluster's own."""
        keys = [k for g in self.state.view.groups.values() for k in g]
        own = ("cluster", "hosts/", "alive/", records.WATERMARKS)
        return sorted(k for k in keys if not k.startswith(own))


async def driver(
    stack: AsyncExitStack, state: State, site: Site, mode: str
) -> tuple[NetworkDriver, IpamDriver]:
    """Build both drivers on an open state."""
    await state.open()
    stack.push_async_callback(state.local.close)
    networks = NetworkDriver(site, mode=mode)
    ranges = [pools.parse_range(text) for text in POOLS.split(",")]
    return networks, IpamDriver(site, ranges, networks)


@asynccontextmanager
async def rig(
    directory: Path, kernel: FakeKernel | None = None, boot: str = "boot1"
) -> AsyncIterator[Rig]:
    """Build a driver over a real embedded store and a fake kernel."""
    async with AsyncExitStack() as stack:
        store = SqliteStore(directory / "store.db")
        await store.open()
        stack.push_async_callback(store.close)
        host = Host(id="", name="h1", version="test")
        yield await on_store(
            stack, store, directory / "local.db", host, kernel=kernel, boot=boot
        )


async def on_store(
    stack: AsyncExitStack,
    store: "SqliteStore | Shared",
    path: Path,
    host: Host,
    *,
    kernel: FakeKernel | None = None,
    boot: str = "boot1",
) -> Rig:
    """Build a host's drivers; `host` has all but its id, which its database has."""
    local = LocalDatabase(path)
    await local.open()
    steps: list[str] = []

    async def step(name: str) -> None:
        steps.append(name)

    state = State(store, local, step, lambda: None)
    kernel = kernel or FakeKernel()
    site = Site(
        host=replace(host, id=local.host), boot=boot, state=state, dataplane=kernel
    )
    networks, ipam = await driver(
        stack, state, site, "overlay" if store.shared else "bridge"
    )
    return Rig(site, kernel, state, networks, ipam, steps)


# Several hosts.


class Shared:
    """
    One host's way to a store that others write to as well.

    Every call takes up to `delay` seconds each way, and so does news, so that calls of
    several hosts meet in any order. A commit can be lost to others, never to chance.
    """

    shared = True

    def __init__(self, store: SqliteStore, delay: float) -> None:
        """Go to a store that is open."""
        self.store = store
        self.delay = delay
        self.deaf = asyncio.Event()
        self.deaf.set()
        """News is held back while this is clear."""

    async def wait(self) -> None:
        """Take some time."""
        await asyncio.sleep(random.uniform(0, self.delay))

    async def read(self, prefix: str) -> Listing:
        """Read after a while."""
        await self.wait()
        return await self.store.read(prefix)

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        """Commit after a while, and tell after a while."""
        await self.wait()
        try:
            return await self.store.commit(change, lease)
        finally:
            await self.wait()

    async def trouble(self) -> str:
        """Have a disk with room."""
        return ""

    async def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        """Hear of each commit after a while."""
        async for events in self.store.watch(prefix, start, end=end):
            await self.wait()
            await self.deaf.wait()
            yield events


@asynccontextmanager
async def cluster(
    directory: Path, count: int, *, delay: float = 0.0
) -> AsyncIterator[list[Rig]]:
    """Build hosts `h1`, `h2` … that share one store; each follows what others write."""
    async with AsyncExitStack() as stack:
        store = SqliteStore(directory / "store.db")
        await store.open()
        stack.push_async_callback(store.close)
        rigs = []
        for number in range(1, count + 1):
            host = Host(
                id="",
                name=f"h{number}",
                version="test",
                vtep=ip_address(f"192.0.2.{number}"),
            )
            path = directory / f"h{number}.db"
            rigs.append(await on_store(stack, Shared(store, delay), path, host))
            await announce(rigs[-1])
        for one in rigs:
            one.state.changed = one.ipam.blocks.wake
            for work in (one.state.follow(), one.ipam.blocks.run()):
                stack.push_async_callback(ended, asyncio.create_task(work))
        yield rigs


async def announce(one: Rig) -> None:
    """Write what a daemon writes of its host."""
    host = one.site.host

    def decide(draft: Draft) -> None:
        draft.put(records.host(host.id), host)
        draft.put(records.alive(host.id), Alive(instance="i", boot=one.site.boot))

    await one.state.commit(decide)


async def ended(task: asyncio.Task[None]) -> None:
    """End a loop."""
    task.cancel()
    await asyncio.wait({task})


async def level(*rigs: Rig) -> None:
    """Let every host know what all have written, and do what follows from it."""
    for one in rigs:
        await one.state.relist()
        await one.networks.remotes.update()
