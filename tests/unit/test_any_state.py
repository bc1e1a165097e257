"""
Any state follows any other: calls, crashes, cancels, restarts and reboots at random.

The machine is one Docker, its pynet and its kernel. A call may be made in its place or
out of it, twice, cancelled half-way, refused by the kernel, or cut by the death of the
process at any step; a restart keeps the kernel, a reboot empties it. Whatever came
before, one audit makes the kernel what the records say; no address and no host port is
given twice; and when Docker has let everything go, nothing is left.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections import Counter
from ipaddress import ip_interface
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from cnmdriver.dockerapi import Inventory
from cnmdriver.driver.publishing import clashing
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import DriverError, KernelError
from cnmdriver.model import Endpoint, Reservation, Subnet
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Bridge, Element, Hold, Op, Plan, Veth
from tests.fakes import FakeKernel, rig
from tests.unit.calls import Docker, Net, families, port

NETWORKS = ("red" * 20, "green" * 12, "blue" * 15)
BOXES = tuple(f"box{n}" * 16 for n in range(5))
CIDRS = (None, "10.1.0.0/29", "10.1.0.0/24", "10.2.0.0/30", "fd01::/64", "ipv6")
PORTS = (
    port(80, 8080),
    port(81, 8080),
    port(80, 8080, ip="127.0.0.1"),
    port(80, 8080, ip="::1"),
    port(82, 8080, 8082),
    port(53),
    port(53, 8081, protocol=17),
)

ADDRESSES = ("10.1.0.2/29", "10.1.0.3/29", "10.1.0.2/24", "fd01::5/64")

numbers = st.integers(0, 1000)
networks = st.sampled_from(NETWORKS)
cidrs = st.lists(st.sampled_from(CIDRS), min_size=1, max_size=2, unique=True)
ports = st.lists(st.sampled_from(PORTS), max_size=3).map(tuple)


def pick(things, number):
    """Choose by number: what there is to choose from is not drawn, but found."""
    return things[number % len(things)]


class Death(BaseException):
    """The process is gone: no line of it runs any more."""


class TooLate(DriverError):
    """The call ran into its time limit; Docker sees an error."""


class Fuse:
    """Counts the steps until something goes wrong."""

    def __init__(self) -> None:
        """Nothing will go wrong."""
        self.left = 0
        self.action = None

    def light(self, steps: int, action) -> None:
        """Let it go wrong at that step."""
        self.left, self.action = steps, action

    def burn(self) -> None:
        """Take one step."""
        self.left -= 1
        if self.left == 0:
            self.action()


class MortalKernel(FakeKernel):
    """A kernel that keeps the half that was done when its daemon dies."""

    def __init__(self, fuse: Fuse) -> None:
        """Hold nothing."""
        super().__init__()
        self.fuse = fuse
        self.refused = None

    async def apply(self, plan: Plan, still=lambda plan: plan) -> None:
        before = dict(self.ops)
        await asyncio.sleep(0)
        await super().apply(plan, still)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.ops = before
            raise

    def one(self, op: Op) -> None:
        self.fuse.burn()
        if self.refused is not None and isinstance(op, self.refused):
            raise KernelError(f"cannot make {op.key}: refused")
        super().one(op)

    async def clear(self, plan: Plan, still=lambda plan: plan) -> None:
        for op in reversed(still(plan)):
            self.fuse.burn()
            await super().clear((op,))
        await asyncio.sleep(0)

    def restart(self) -> None:
        """Lose what the process held itself."""
        self.ops = {k: o for k, o in self.ops.items() if not isinstance(o, Hold)}


class AnyState(RuleBasedStateMachine):
    """One Docker, its pynet, its kernel."""

    def __init__(self) -> None:
        """Start with nothing."""
        super().__init__()
        # In memory where that can be: not the disk is on trial here.
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.fuse = Fuse()
        self.kernel = MortalKernel(self.fuse)
        self.boots = 1
        self.sure = True
        self.nets, self.boxes = {}, {}
        self.pools: list[str] = []

    @initialize(cidrs=cidrs, ports=ports, count=st.integers(0, 3))
    def start(self, cidrs, ports, count) -> None:
        """Start the daemon with some containers on a network."""
        self.runner.run(self.up())
        self.create_network(0, cidrs, 1, sub=False)
        for box in BOXES[:count]:
            self.start_container(0, box, ports)

    async def up(self) -> None:
        self.rig = await self.stack.enter_async_context(
            rig(self.directory, self.kernel, f"boot{self.boots}")
        )
        self.docker = Docker(self.rig)
        self.docker.nets, self.docker.boxes = self.nets, self.boxes

        async def step(name: str) -> None:
            del name
            self.fuse.burn()

        self.rig.state.step = step
        self.sync = Sync(
            self.rig.site, self.rig.networks, self.rig.ipam, None, grace=0, audit=60
        )

    async def down(self) -> None:
        await self.stack.aclose()
        self.stack = contextlib.AsyncExitStack()

    def call(self, work, *, forgive: bool = True) -> bool:
        """
        Make a call; it may be refused with one of the six errors, in a sentence.

        A removing call is not: it may only be late, and leave the kernel to the audit.
        """
        try:
            self.run(work)
        except TooLate:
            self.sure &= forgive
            return False
        except DriverError as error:
            assert str(error)
            if not forgive:
                raise
            return False
        return True

    # Whole commands of Docker.

    @rule(n=numbers, cidrs=cidrs, internal=st.integers(0, 4), sub=st.booleans())
    def create_network(self, n, cidrs, internal, sub) -> None:
        """Create a network Docker does not have; few are internal."""
        name = pick([n for n in NETWORKS if n not in self.nets] or NETWORKS, n)
        part = "10.1.0.4/30" if sub and cidrs == ["10.1.0.0/29"] else None
        if name not in self.nets:
            work = self.docker.create(name, *cidrs, internal=not internal, sub=part)
            self.call(work)

    @rule(n=numbers)
    def remove_network(self, n) -> None:
        """Remove a network that nothing is attached to."""
        busy = [box.net.id for box in self.boxes.values()]
        idle = [name for name in self.nets if name not in busy]
        if idle:
            self.call(self.docker.remove(pick(idle, n)), forgive=False)

    @rule(n=numbers, box=st.sampled_from(BOXES), ports=ports)
    def start_container(self, n, box, ports) -> None:
        """Start a container that does not run."""
        if self.nets and box not in self.boxes:
            self.call(self.docker.start(box, pick(list(self.nets), n), ports=ports))

    @rule(n=numbers)
    def stop_container(self, n) -> None:
        """Stop a container that runs."""
        if self.boxes:
            self.call(self.docker.stop(pick(list(self.boxes), n)), forgive=False)

    # Single calls, twice or out of their place.

    @rule(n=numbers, name=networks, box=st.sampled_from(BOXES), known=st.integers(0, 3))
    def build(self, n, name, box, known) -> None:
        """Join, or ask for the endpoint again, or for another of that id."""
        name, box = self.somewhere(name, box, known, n)
        drivers = self.rig.networks
        kind = n % 3
        if kind == 0:
            self.call(drivers.join(name, box, f"/run/netns/{box}"))
        elif kind == 1 and box in self.boxes:
            given = families(self.boxes[box].addresses)
            self.call(drivers.create_endpoint(name, box, **given, mac=""))
        else:
            given = families([ip_interface(pick(ADDRESSES, n))])
            self.call(drivers.create_endpoint(name, box, **given, mac=""))

    @rule(
        n=numbers,
        name=networks,
        box=st.sampled_from(BOXES),
        known=st.integers(0, 3),
        ports=ports,
        ipv6=st.booleans(),
    )
    def program(self, n, name, box, known, ports, ipv6) -> None:
        """Publish ports, once more or out of place."""
        name, box = self.somewhere(name, box, known, n)
        self.sure = False  # before Join the ports are held, and the audit lets go
        self.call(self.rig.networks.program(name, box, ports=ports, ipv6=ipv6))

    @rule(n=numbers, name=networks, box=st.sampled_from(BOXES), known=st.integers(0, 3))
    def take_down(self, n, name, box, known) -> None:
        """Revoke, leave or delete, whatever was before."""
        name, box = self.somewhere(name, box, known, n)
        drivers = self.rig.networks
        call = pick((drivers.revoke, drivers.leave, drivers.delete_endpoint), n)
        self.call(call(name, box), forgive=False)

    def somewhere(self, name, box, known, n) -> tuple[str, str]:
        """Choose an endpoint that there is, mostly."""
        if known and self.boxes:
            box = pick(list(self.boxes), n)
            name = self.boxes[box].net.id
        return name, box

    @rule(name=networks, cidr=st.sampled_from(("10.1.0.0/29", "10.3.0.0/24")))
    def create_without_our_ipam(self, name, cidr) -> None:
        """Docker's own IPAM has the addresses, so ours heard nothing of the pool."""
        pool = ip_interface(cidr).network
        subnet = Subnet(space="x", pool=pool, gateway=pool.network_address + 1)
        made = self.call(
            self.rig.networks.create(
                name, subnets=(subnet,), options={}, internal=False
            )
        )
        if made:
            self.nets.setdefault(name, Net(name))

    @rule(name=networks)
    def delete_network(self, name) -> None:
        """Delete a network with whatever is attached."""
        self.call(self.rig.networks.delete(name), forgive=False)

    @rule(n=numbers, cidr=st.sampled_from(CIDRS[:4]))
    def use_pools(self, n, cidr) -> None:
        """Ask for a pool and two of its addresses for nothing, or give one back."""

        async def ask() -> None:
            pool_id = await self.docker.pool(cidr)
            self.pools.append(pool_id)
            for role in (True, False):
                await self.docker.address(pool_id, gateway=role)

        if self.pools and n % 2:
            work = self.rig.ipam.release_pool(pick(self.pools, n))
            self.call(work, forgive=False)
        else:
            self.call(ask())

    @rule(n=numbers)
    def release_address(self, n) -> None:
        """Give an address back that somebody may use."""
        held = list(self.rig.state.view.all(Reservation, "addresses/"))
        if held:
            one = pick(held, n)
            work = self.rig.ipam.release_address(f"{one.space}/{one.cidr}", one.ip)
            self.call(work, forgive=False)

    # Trouble.

    @rule(steps=st.integers(1, 25), death=st.booleans())
    def trouble_soon(self, steps, death) -> None:
        """Let the process die, or a time limit cancel the call, so many steps on."""

        def die() -> None:
            raise Death

        def cancel() -> None:
            asyncio.current_task().cancel()

        self.fuse.light(steps, die if death else cancel)

    @rule(kind=st.sampled_from((Bridge, Veth, Element, Hold, None)))
    def refuse(self, kind) -> None:
        """Let the kernel refuse one kind of object from now on, or none."""
        self.kernel.refused = kind

    @rule(n=numbers)
    def somebody_removes(self, n) -> None:
        """Somebody takes an object of ours away."""
        if self.kernel.ops:
            op = pick(list(self.kernel.ops.values()), n)
            self.run(FakeKernel.clear(self.kernel, (op,)))
            self.sure = False

    @rule()
    def restart(self) -> None:
        """End the process and start it again."""
        self.fuse.left = 0
        self.run(self.down())
        self.kernel.restart()
        self.sure = False
        self.run(self.up())

    @rule()
    def reboot(self) -> None:
        """Restart the whole machine."""
        self.boots += 1
        self.kernel.ops = {}
        self.restart()

    def run(self, work):
        """Run to the end, or to the death of the process or the call's time limit."""
        try:
            return self.runner.run(self.limited(work))
        except Death:
            self.restart()
            return None

    async def limited(self, work):
        """Turn a cancel into what Docker sees of it."""
        try:
            answer = await work
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
            raise TooLate("the call took too long") from None
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # a cancel that came too late
        return answer

    # What must hold.

    @rule(lapse=st.booleans())
    def audit(self, lapse) -> None:
        """Audit; what nobody bound is given back if its time is over."""
        self.fuse.left = 0
        self.kernel.refused = None
        self.sync.lapsing.grace = 0 if lapse else 3600
        self.run(self.sync.turn())
        self.sure = True
        assert self.sync.problems == ()

    @invariant()
    def the_kernel_is_as_desired(self) -> None:
        """After an audit, and after every whole call, nothing lacks or is too much."""
        if self.sure and self.fuse.left <= 0 and self.kernel.refused is None:
            difference = ops.compare(
                self.rig.site.desired(), tuple(self.kernel.ops.values())
            )
            assert list(difference.lines()) == []

    @invariant()
    def no_address_is_given_twice(self) -> None:
        if not hasattr(self, "rig"):
            return
        found = list(self.rig.state.view.all(Endpoint, "endpoints/"))
        taken = Counter((e.network, a.ip) for e in found for a in e.addresses)
        assert [place for place, count in taken.items() if count > 1] == []

    @invariant()
    def no_host_port_is_published_twice(self) -> None:
        if not hasattr(self, "rig"):
            return
        found = list(self.rig.state.view.all(Endpoint, "endpoints/"))
        given = [p for e in found for p in e.published]
        clashes = [
            (a, b) for n, a in enumerate(given) for b in given[:n] if clashing(a, b)
        ]
        assert clashes == []

    def teardown(self) -> None:
        """Docker lets everything go, then tells that it has nothing."""
        try:
            if hasattr(self, "rig"):
                self.let_go()
        finally:
            self.runner.run(self.down())
            self.runner.close()
            shutil.rmtree(self.directory)

    def let_go(self) -> None:
        self.fuse.left = 0
        self.kernel.refused = None
        for box in list(self.boxes):
            self.call(self.docker.stop(box), forgive=False)
        for name in list(self.nets):
            self.call(self.docker.remove(name), forgive=False)
        for pool_id in self.pools:
            self.call(self.rig.ipam.release_pool(pool_id), forgive=False)
        self.sync.learn(Inventory())
        self.run(self.sync.turn())
        assert (self.rig.records, self.kernel.left) == ([], [])


AnyState.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyState = pytest.mark.timeout(120)(AnyState.TestCase)
