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
    precondition,
    rule,
)

from cnmdriver.dockerapi import Inventory
from cnmdriver.driver.publishing import clashing
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import DriverError
from cnmdriver.model import Endpoint, Reservation, Subnet
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Bridge, Element, Hold, Op, Plan, Veth
from tests.fakes import FakeKernel, rig
from tests.unit.calls import Docker, families, port

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

networks = st.sampled_from(NETWORKS)
boxes = st.sampled_from(BOXES)
cidrs = st.lists(st.sampled_from(CIDRS), min_size=1, max_size=2, unique=True)
ports = st.lists(st.sampled_from(PORTS), max_size=3).map(tuple)
addresses = st.sampled_from(("10.1.0.2/29", "10.1.0.3/29", "10.1.0.2/24", "fd01::5/64"))


class Death(BaseException):
    """The process is gone: no line of it runs any more."""


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
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.fuse = Fuse()
        self.kernel = MortalKernel(self.fuse)
        self.boots = 1
        self.sure = True
        self.nets, self.boxes = {}, {}
        self.pools: list[str] = []


    @initialize()
    def start(self) -> None:
        """Start the daemon over the same files and the same kernel."""
        self.run(self.up())

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
        """Make a call; it may be refused with one of the six errors, in a sentence."""
        try:
            self.run(work)
        except DriverError as error:
            assert str(error)
            if not forgive:
                raise
            return False
        return True

    # Whole commands of Docker.

    @precondition(lambda self: len(self.nets) < len(NETWORKS))
    @rule(name=networks, cidrs=cidrs, internal=st.booleans(), sub=st.booleans())
    def create_network(self, name, cidrs, internal, sub) -> None:
        if name not in self.nets:
            part = "10.1.0.4/30" if sub and cidrs == ["10.1.0.0/29"] else None
            self.call(self.docker.create(name, *cidrs, internal=internal, sub=part))

    @rule(name=networks)
    def remove_network(self, name) -> None:
        busy = any(box.net.id == name for box in self.boxes.values())
        if name in self.nets and not busy:
            self.call(self.docker.remove(name), forgive=False)

    @precondition(lambda self: self.nets)
    @rule(data=st.data(), box=boxes, ports=ports)
    def start_container(self, data, box, ports) -> None:
        if box not in self.boxes:
            name = data.draw(st.sampled_from(sorted(self.nets)))
            self.call(self.docker.start(box, name, ports=ports))

    @precondition(lambda self: self.boxes)
    @rule(data=st.data())
    def stop_container(self, data) -> None:
        box = data.draw(st.sampled_from(sorted(self.boxes)))
        self.call(self.docker.stop(box), forgive=False)

    # Single calls, in their place or out of it.

    @rule(name=networks, box=boxes)
    def join(self, name, box) -> None:
        self.call(self.rig.networks.join(name, box, f"/run/netns/{box}"))

    @rule(name=networks, box=boxes, ports=ports, ipv6=st.booleans())
    def program(self, name, box, ports, ipv6) -> None:
        self.sure = False  # before Join the ports are held, and the audit lets go
        self.call(self.rig.networks.program(name, box, ports=ports, ipv6=ipv6))

    @rule(name=networks, box=boxes)
    def revoke(self, name, box) -> None:
        self.call(self.rig.networks.revoke(name, box), forgive=False)

    @rule(name=networks, box=boxes)
    def leave(self, name, box) -> None:
        self.call(self.rig.networks.leave(name, box), forgive=False)

    @rule(name=networks, box=boxes)
    def delete_endpoint(self, name, box) -> None:
        self.call(self.rig.networks.delete_endpoint(name, box), forgive=False)

    @rule(name=networks, box=boxes, address=addresses)
    def create_endpoint(self, name, box, address) -> None:
        self.call(
            self.rig.networks.create_endpoint(
                name, box, **families([ip_interface(address)]), mac=""
            )
        )

    @rule(name=networks, cidr=st.sampled_from(("10.1.0.0/29", "10.3.0.0/24")))
    def create_without_our_ipam(self, name, cidr) -> None:
        """Docker's own IPAM has the addresses, so ours heard nothing of the pool."""
        pool = ip_interface(cidr).network
        subnet = Subnet(space="x", pool=pool, gateway=pool.network_address + 1)
        self.call(
            self.rig.networks.create(
                name, subnets=(subnet,), options={}, internal=False
            )
        )

    @rule(name=networks)
    def delete_network(self, name) -> None:
        self.call(self.rig.networks.delete(name), forgive=False)

    @rule(cidr=st.sampled_from(CIDRS[:4]))
    def request_pool(self, cidr) -> None:
        async def ask() -> None:
            pool_id = await self.docker.pool(cidr)
            self.pools.append(pool_id)
            for role in (True, False):
                await self.docker.address(pool_id, gateway=role)

        self.call(ask())

    @precondition(lambda self: self.pools)
    @rule(data=st.data())
    def release_pool(self, data) -> None:
        pool_id = data.draw(st.sampled_from(self.pools))
        self.call(self.rig.ipam.release_pool(pool_id), forgive=False)

    @rule(data=st.data())
    def release_address(self, data) -> None:
        held = self.rig.state.view.all(Reservation, "addresses/")
        known = [(f"{r.space}/{r.cidr}", r.ip) for r in held]
        if known:
            pool_id, ip = data.draw(st.sampled_from(known))
            self.call(self.rig.ipam.release_address(pool_id, ip), forgive=False)

    # Trouble.

    @rule(steps=st.integers(1, 40))
    def die_soon(self, steps) -> None:
        """Let the process die at a step of one of the next calls."""

        def die() -> None:
            raise Death

        self.fuse.light(steps, die)

    @rule(steps=st.integers(1, 20))
    def give_up_soon(self, steps) -> None:
        """Let a time limit cancel one of the next calls at a step."""
        self.fuse.light(steps, lambda: asyncio.current_task().cancel())

    @rule(kind=st.sampled_from((Bridge, Veth, Element, Hold)))
    def refuse(self, kind) -> None:
        """Let the kernel refuse something it has."""
        self.kernel.refuse = {
            k for k, op in self.kernel.ops.items() if isinstance(op, kind)
        }

    @rule()
    def refuse_nothing(self) -> None:
        self.kernel.refuse = set()

    @rule(data=st.data())
    def somebody_removes(self, data) -> None:
        """Somebody takes an object of ours away."""
        if self.kernel.ops:
            keys = sorted(self.kernel.ops)
            op = self.kernel.ops[data.draw(st.sampled_from(keys))]
            self.run(FakeKernel.clear(self.kernel, (op,)))
            self.sure = False

    @rule()
    def restart(self) -> None:
        self.fuse.left = 0
        self.run(self.down())
        self.kernel.restart()
        self.sure = False
        self.run(self.up())

    @rule()
    def reboot(self) -> None:
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
            raise DriverError("the call took too long") from None
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # a cancel that came too late
        return answer

    # What must hold.

    @rule(lapse=st.booleans())
    def audit(self, lapse) -> None:
        """Audit; what nobody bound is given back if its time is over."""
        self.fuse.left = 0
        self.kernel.refuse = set()
        self.sync.lapsing.grace = 0 if lapse else 3600
        self.run(self.sync.turn())
        self.sure = True
        assert self.sync.problems == ()

    @invariant()
    def the_kernel_is_as_desired(self) -> None:
        """After an audit, and after every whole call, nothing lacks or is too much."""
        if self.sure and self.fuse.left <= 0 and not self.kernel.refuse:
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
        self.kernel.refuse = set()
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
