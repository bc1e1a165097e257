"""Small honest stand-ins for the kernel, and a whole driver built on them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

from cnmdriver.driver.ipam import IpamDriver
from cnmdriver.driver.network import NetworkDriver
from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import Host, IPNetwork
from cnmdriver.plan import pools
from cnmdriver.plan.ops import Hold, Key, Op, Plan, Sysctl
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State

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
        self.applied = 0
        self.dead: set[str] = set()

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
            if isinstance(op, Sysctl) and op.keep:
                continue
            self.ops.pop(op.key, None)
            for other in list(self.ops.values()):
                if op.key in other.stands_on():
                    self.ops.pop(other.key, None)

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
        return sorted(k for k in keys if not k.startswith(("cluster", "spaces/")))


@asynccontextmanager
async def rig(
    directory: Path, kernel: FakeKernel | None = None, boot: str = "boot1"
) -> AsyncIterator[Rig]:
    """Build a driver over a real embedded store and a fake kernel."""
    local = LocalDatabase(directory / "local.db")
    await local.open()
    store = SqliteStore(directory / "store.db")
    await store.open()
    steps: list[str] = []

    async def step(name: str) -> None:
        steps.append(name)

    state = State(store, local, step, lambda: None)
    await state.open()
    kernel = kernel or FakeKernel()
    site = Site(
        host=Host(id=local.host, name="h1", version="test"),
        boot=boot,
        state=state,
        dataplane=kernel,
    )
    networks = NetworkDriver(site)
    ranges = [pools.parse_range(text) for text in POOLS.split(",")]
    ipam = IpamDriver(site, ranges, networks)
    try:
        yield Rig(site, kernel, state, networks, ipam, steps)
    finally:
        await store.close()
        await local.close()
