"""Sync: kernel, store and Docker's list are brought into agreement, and no further."""

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass, replace
from ipaddress import ip_interface, ip_network
from pathlib import Path

import pytest
import structlog
from aiohttp import web

from cnmdriver.dockerapi import DockerApi, Inventory
from cnmdriver.driver import sync as module
from cnmdriver.driver.sync import Patience, Sync, affected, removable
from cnmdriver.errors import KernelError, StoreError
from cnmdriver.model import Endpoint, Network, Pool, Reservation
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Address, Bridge, Op, Plan, Veth
from cnmdriver.store import records
from cnmdriver.store.base import Change
from tests.fakes import FakeKernel, Rig, rig
from tests.unit.calls import Docker, port

RED, BLUE = "red" * 20, "blue" * 15
BOX, OTHER = "box1" * 16, "box2" * 16


class SharedKernel(FakeKernel):
    """A kernel with devices of another pynet, and in which the test can interfere."""

    def __init__(self) -> None:
        """Hold nothing."""
        super().__init__()
        self.others: tuple[tuple[str, str], ...] = ()
        self.meanwhile = None
        self.stuck = False

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return the other's devices."""
        return self.others

    async def found(self, wanted: Plan = ()) -> Plan:
        """Return what is held, and let something happen right after."""
        held = await super().found(wanted)
        if self.meanwhile is not None:
            work, self.meanwhile = self.meanwhile, None
            await work()
        return held

    async def clear(self, plan: Plan, still=lambda plan: plan) -> None:
        """Let go, unless the test forbids it."""
        if self.stuck:
            raise KernelError("cannot clear: refused by the test")
        await super().clear(plan, still)


@dataclass
class Clock:
    """Tells the time that the test says it is."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Let the test move time for what waits for a grace."""
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
async def parts(tmp_path):
    """Build a driver over a kernel in which others are, too."""
    async with rig(tmp_path, SharedKernel()) as built:
        yield built


@pytest.fixture
def docker(parts) -> Docker:
    """Make the calls of a dockerd."""
    return Docker(parts)


@pytest.fixture
def sync(parts) -> Sync:
    """Build a loop with a grace of a minute, and no way to ask Docker."""
    return Sync(parts.site, parts.networks, parts.ipam, None, grace=60, audit=60)


def inventory(docker: Docker, *, without: tuple[str, ...] = ()) -> Inventory:
    """Make the list of what a dockerd has, less some ids."""
    return Inventory(
        networks=frozenset({*docker.nets} - {*without}),
        endpoints=frozenset({*docker.boxes} - {*without}),
        pools=frozenset(
            ip_network(cidr)
            for net in docker.nets.values()
            for _, cidr in net.pools
            if net.id not in without
        ),
    )


def one(kernel: FakeKernel, kind: type[Op]) -> Op:
    """Return the only operation of a kind that is held."""
    (found,) = [op for op in kernel.ops.values() if isinstance(op, kind)]
    return found


def into_sandbox(kernel: FakeKernel) -> Veth:
    """Let Docker move the only pair's far end into a sandbox."""
    pair = replace(one(kernel, Veth), peer=None, mac=None)
    kernel.ops[pair.key] = pair
    return pair


async def forget(parts: Rig, *prefixes: str) -> None:
    """Let records be lost, as with a store that was put back to an earlier state."""
    keys = frozenset(k for k in parts.records if k.startswith(prefixes))
    await parts.state.store.commit(Change(deletes=keys))
    await parts.state.relist()


# The kernel.


async def test_what_is_to_be_left(parts, docker, sync):
    """Without repairs a difference is logged once and left, also one that is surplus."""
    sync.mends = False
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    await sync.turn()
    sync.settle = 0.01
    into_sandbox(parts.kernel)
    bridge = one(parts.kernel, Bridge)
    parts.kernel.ops[bridge.key] = replace(bridge, up=False)
    stray = replace(bridge, name="pn-stray")
    parts.kernel.ops[stray.key] = stray
    before = dict(parts.kernel.ops)
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
        await sync.turn()
    assert parts.kernel.ops == before
    said = [(e["event"], e["what"]) for e in logs]
    assert said == [
        ("sync.left", f"~ device {bridge.name}: up is False and should be True"),
        ("sync.left", "- device pn-stray"),
    ]


async def test_a_start_makes_what_is_lacking(parts, docker, sync):
    """Without repairs a daemon that starts still makes what its plans need."""
    sync.mends = False
    await docker.create(RED, "10.1.0.0/24")
    held = set(parts.kernel.ops)
    parts.kernel.ops.clear()
    await sync.turn()
    assert set(parts.kernel.ops) == held


async def test_nothing_to_do(parts, docker, sync):
    """A kernel that is as the plans say is left alone, and nothing is reported."""
    await docker.create(RED, "10.1.0.0/24", "fd01::/64")
    await docker.start(BOX, RED, ports=(port(80, 8080),))
    before, applied = dict(parts.kernel.ops), parts.kernel.applied
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert (parts.kernel.ops, parts.kernel.applied) == (before, applied)
    assert (sync.problems, sync.orphans, logs) == ((), (), [])


async def test_an_empty_kernel_is_filled(parts, docker, sync):
    """What lacks is made: of networks, endpoints and published ports."""
    await docker.create(RED, "10.1.0.0/24", "fd01::/64")
    await docker.start(BOX, RED, ports=(port(80, 8080),))
    before = dict(parts.kernel.ops)
    parts.kernel.ops.clear()
    await sync.turn()
    assert parts.kernel.ops == before


@pytest.mark.parametrize("kind", ["device", "address", "element", "hold", "table"])
async def test_what_lacks_is_made(parts, docker, sync, kind):
    """One kind of object that was taken away is made again."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED, ports=(port(80, 8080),))
    before = dict(parts.kernel.ops)
    parts.kernel.ops = {k: op for k, op in before.items() if k[0] != kind}
    assert parts.kernel.ops != before
    await sync.turn()
    assert parts.kernel.ops == before


async def test_what_changed_is_mended(parts, docker, sync):
    """What is not as planned is applied again, and said with what differs."""
    await docker.create(RED, "10.1.0.0/24")
    bridge = one(parts.kernel, Bridge)
    parts.kernel.ops[bridge.key] = replace(bridge, mtu=1400)
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert parts.kernel.ops[bridge.key] == bridge
    assert [(e["event"], e["what"]) for e in logs] == [
        ("sync.repair", f"~ device {bridge.name}: mtu is 1400 and should be 1500")
    ]


async def test_what_stands_on_it_comes_too(parts, docker, sync):
    """With a bridge that is made again everything on it is applied, and no more."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create(BLUE, "10.2.0.0/24")
    await docker.start(BOX, RED)
    applied = []
    apply = parts.kernel.apply

    async def watched(plan: Plan, still) -> None:
        applied.extend(ops.name(op) for op in plan)
        await apply(plan, still)

    parts.kernel.apply = watched
    pair = one(parts.kernel, Veth)
    bridge = next(op for op in parts.kernel.ops.values() if isinstance(op, Bridge))
    assert pair.bridge == bridge.name
    parts.kernel.ops[bridge.key] = replace(bridge, mtu=1400)
    await sync.turn()
    assert applied == [
        f"device {bridge.name}",
        f"sysctl net/ipv4/conf/{bridge.name}/route_localnet",
        f"sysctl net/ipv6/conf/{bridge.name}/disable_ipv6",
        f"address {bridge.name} 10.1.0.1/24",
        f"device {pair.name}",
    ]


async def test_surplus_goes(parts, docker, sync):
    """What no plan has is removed, devices and elements; settings of the host stay."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED, ports=(port(80, 8080),))
    await forget(parts, "")
    assert parts.records == []
    assert parts.kernel.left
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert parts.kernel.left == []
    assert parts.kernel.ops
    assert [e["event"] for e in logs] == ["sync.surplus"]


async def test_only_the_surplus_goes(parts, docker, sync):
    """A network that is wanted stays whole when another's remains are removed."""
    await docker.create(BLUE, "10.2.0.0/24")
    wanted = dict(parts.kernel.ops)
    await docker.create(RED, "10.1.0.0/24")
    member = parts.site.member(RED)
    await forget(parts, f"members/{member.network}/")
    await sync.turn()
    assert parts.kernel.ops == wanted


async def test_what_cannot_be_removed_is_reported(parts, docker, sync):
    """Surplus that the kernel keeps is a problem, until it is gone."""
    await docker.create(RED, "10.1.0.0/24")
    await forget(parts, "")
    parts.kernel.stuck = True
    await sync.turn()
    assert sync.problems == ("cannot clear: refused by the test",)
    parts.kernel.stuck = False
    await sync.turn()
    assert (sync.problems, parts.kernel.left) == ((), [])


async def test_one_refusal_does_not_stop_the_others(parts, docker, sync):
    """A network the kernel refuses is reported; all others are mended."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create(BLUE, "10.2.0.0/24")
    await docker.start(BOX, BLUE)
    before = dict(parts.kernel.ops)
    bridge = parts.site.member(RED).bridge
    key = ("device", "host", bridge)
    parts.kernel.ops.clear()
    parts.kernel.refuse.add(key)
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert len(sync.problems) == 1
    assert bridge in sync.problems[0]
    assert "sync.cannot_repair" in [e["event"] for e in logs]
    red = [k for k in before if bridge in "/".join(k) or "10.1.0" in "/".join(k)]
    assert {k for k in before if k not in parts.kernel.ops} == set(red)
    parts.kernel.refuse.clear()
    await sync.turn()
    assert (parts.kernel.ops, sync.problems) == (before, ())


async def test_an_unknown_mode(parts, docker, sync):
    """A network of a mode that this version lacks has no plan, and harms no other."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    await docker.create(BLUE, "10.2.0.0/24")
    member = parts.site.member(RED)
    network = replace(parts.site.network(member), mode="tunnel")
    await parts.state.commit(
        lambda draft: draft.put(records.network(network.id), network)
    )
    blue = parts.site.member(BLUE).bridge
    await sync.turn()
    assert one(parts.kernel, Bridge).name == blue
    assert sync.problems == ()
    assert parts.site.member(RED) == member
    assert len(parts.site.endpoints(member.network)) == 1


# Between look and repair.


async def test_removed_meanwhile_is_not_made_again(parts, docker, sync):
    """What Docker removed while the kernel was read is not brought back."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    apply = parts.kernel.apply
    parts.kernel.ops.clear()

    async def late(plan: Plan, still) -> None:
        """Let Docker be faster than the repair."""
        parts.kernel.apply = apply
        await docker.stop(BOX)
        await docker.remove(RED)
        await apply(plan, still)

    parts.kernel.apply = late
    await sync.turn()
    assert parts.kernel.left == []
    assert parts.records == []


async def test_a_difference_that_passes(parts, docker, sync):
    """What a call of Docker sets right between two looks is no difference."""
    await docker.create(RED, "10.1.0.0/24")
    before, applied = dict(parts.kernel.ops), parts.kernel.applied
    parts.kernel.ops.clear()

    async def end() -> None:
        """Let the call end that the first look came in between."""
        parts.kernel.ops.update(before)

    sync.settle = 0.01
    parts.kernel.meanwhile = end
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert (parts.kernel.ops, parts.kernel.applied, logs) == (before, applied, [])
    parts.kernel.ops.clear()
    await sync.turn()
    assert parts.kernel.ops == before


async def test_two_looks_that_differ(parts, docker, sync):
    """What lacks at the second look only may be a call's that is half way by then."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create(BLUE, "10.2.0.0/24")
    before = dict(parts.kernel.ops)
    red, blue = (
        next(op for op in before.values() if getattr(op, "name", "") == name)
        for name in (parts.site.member(net).bridge for net in (RED, BLUE))
    )
    del parts.kernel.ops[red.key]

    async def other() -> None:
        parts.kernel.ops[red.key] = red
        del parts.kernel.ops[blue.key]

    sync.settle = 0.01
    parts.kernel.meanwhile = other
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert blue.key not in parts.kernel.ops
    assert logs == []
    await sync.turn()
    assert parts.kernel.ops == before


async def test_what_is_wanted_is_put_together_once(parts, docker, sync, monkeypatch):
    """A turn puts all plans together once; what changes is in the next."""
    await docker.create(RED, "10.1.0.0/24")
    made = []
    keyed = ops.keyed

    def counted(plans):
        made.append(1)
        return keyed(plans)

    monkeypatch.setattr(ops, "keyed", counted)
    wanted = parts.site.wanted()
    assert parts.site.wanted() is wanted
    assert len(made) == 1
    await docker.start(BOX, RED)
    assert parts.site.wanted().keys() > wanted.keys()
    parts.site.docker_bridges = frozenset({"br-1"})
    assert any('"br-1"' in key for key in parts.site.wanted())
    await sync.turn()
    assert parts.site.latest == (None, {})


async def test_docker_lacks_something_and_the_kernel_nothing(parts, docker, sync):
    """What Docker lacks is forgotten in its time without a look at the kernel."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    looks = []
    found = parts.kernel.found

    async def counted(wanted=()):
        looks.append(1)
        return await found(wanted)

    parts.kernel.found = counted
    sync.missing.grace = 0.05
    sync.learn(inventory(docker))
    async with running(sync.run()):
        for _ in range(3):
            sync.learn(inventory(docker, without=(BOX,)))
            await asyncio.sleep(0.1)
        assert looks == []
        await until(lambda: not parts.site.endpoints(parts.site.member(RED).network))
        sync.wake()
        await until(lambda: looks)


async def test_made_meanwhile_is_not_removed(parts, docker, sync):
    """What was made after the kernel was read does not count as surplus."""

    async def create() -> None:
        await docker.create(RED, "10.1.0.0/24")

    await docker.create(BLUE, "10.2.0.0/24")
    parts.kernel.meanwhile = create
    await sync.turn()
    assert {op.name for op in parts.kernel.ops.values() if isinstance(op, Bridge)} == {
        parts.site.member(RED).bridge,
        parts.site.member(BLUE).bridge,
    }


async def test_surplus_that_is_wanted_again(parts, docker, sync):
    """What was surplus when it was seen, but is wanted by now, is left alone."""
    await docker.create(RED, "10.1.0.0/24")
    before = dict(parts.kernel.ops)
    lost = {
        k: parts.state.view.groups[records.group(k)][k].record for k in parts.records
    }
    await forget(parts, "")
    clear = parts.kernel.clear

    async def late(plan: Plan, still) -> None:
        """Let the records come back before the repair."""
        for key, record in lost.items():
            await parts.state.commit(lambda d, k=key, r=record: d.put(k, r))
        await clear(plan, still)

    parts.kernel.clear = late
    await sync.turn()
    assert parts.kernel.ops == before


async def test_what_is_wanted_when_its_turn_comes(parts, docker, sync):
    """A repair applies what is wanted by then, not what was when it was planned."""
    await docker.create(RED, "10.1.0.0/24")
    old = parts.site.desired()
    await docker.start(BOX, RED)
    new = parts.site.desired()
    assert sync.still_wanted(old) == old
    assert sync.still_wanted((*old, *new)) == (*old, *new)
    bridge = one(parts.kernel, Bridge)
    stale = (replace(bridge, mtu=9000), replace(bridge, name="gone"))
    assert sync.still_wanted(stale) == (bridge,)
    assert sync.still_surplus(stale) == (replace(bridge, name="gone"),)


# Sandboxes in use.


async def test_a_pair_in_use_keeps_all(parts, docker, sync):
    """A pair in a sandbox that no record knows stays, and all it stands on with it."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    pair = into_sandbox(parts.kernel)
    await forget(parts, "")
    before = dict(parts.kernel.ops)
    await sync.turn()
    assert parts.kernel.ops == before
    assert sync.orphans == (f"device {pair.name}",)


async def test_a_pair_docker_still_has_stays(parts, docker, sync):
    """An endpoint in Docker's list is in use, whatever the store says."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    into_sandbox(parts.kernel)
    await forget(parts, "")
    before = dict(parts.kernel.ops)
    sync.learn(inventory(docker))
    await sync.turn()
    assert parts.kernel.ops == before
    assert len(sync.orphans) == 1


async def test_a_pair_docker_lacks_goes(parts, docker, sync):
    """Without an endpoint in Docker's list, the pair and its bridge go."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    into_sandbox(parts.kernel)
    await forget(parts, "")
    await sync.turn()
    assert len(sync.orphans) == 1
    # Its first list says whether what was in use still is, and is asked that at once.
    sync.learn(inventory(docker, without=(BOX,)))
    assert sync.curious
    await sync.turn()
    assert parts.kernel.left == []
    sync.curious = False
    sync.learn(inventory(docker, without=(BOX,)))
    assert not sync.curious
    assert sync.orphans == ()


async def test_a_pair_on_the_host_goes(parts, docker, sync):
    """A pair with both ends on the host is in no use, even while another is."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    used = into_sandbox(parts.kernel)
    await docker.start(OTHER, RED)
    await forget(parts, "")
    await sync.turn()
    assert one(parts.kernel, Veth) == used
    assert one(parts.kernel, Bridge).name == used.bridge
    assert sync.orphans == (f"device {used.name}",)


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        ("pynet:0123abcd:endpoint:" + "f" * 64, True),
        ("pynet:0123abcd:network:" + "f" * 64, False),
    ],
)
async def test_a_kernel_shared_with_another(parts, docker, sync, alias, kept):
    """While endpoints of another pynet are here, no bridge and no rule goes."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    parts.kernel.others = (("pe-1", alias),)
    await forget(parts, "")
    await sync.turn()
    assert not [op for op in parts.kernel.left if isinstance(op, Veth)]
    assert bool(parts.kernel.left) is kept
    assert sync.orphans == ()


PAIR = Veth(
    name="pe-1",
    peer=None,
    mac=None,
    bridge="pn-1",
    mtu=1500,
    alias="pynet:h:endpoint:e",
)
LINK = Bridge(name="pn-1", mac="02:42:0a:01:00:01", mtu=1500, alias="pynet:h:network:n")


@pytest.mark.parametrize(
    ("pair", "known", "used"),
    [
        (PAIR, None, True),
        (PAIR, frozenset({"e"}), True),
        (PAIR, frozenset({"f"}), False),
        (PAIR, frozenset(), False),
        (replace(PAIR, alias=""), frozenset(), True),
        (replace(PAIR, alias=None), frozenset(), True),
        (replace(PAIR, peer="pc-1"), None, False),
        (replace(PAIR, peer="pc-1"), frozenset({"e"}), False),
    ],
)
def test_what_may_be_removed(pair, known, used):
    """A pair is in use if it reaches away and Docker may have its endpoint."""
    plan, names = removable((LINK, pair), known, shared=False)
    assert plan == (() if used else (LINK, pair))
    assert names == (("device pe-1",) if used else ())
    plan, _ = removable((LINK, pair), known, shared=True)
    assert plan == (() if used else (pair,))


def test_what_is_affected():
    """What stands on something amiss is amiss, and so on; the order stays."""
    address = Address(device="pn-1", interface=ip_interface("10.1.0.1/24"))
    other = replace(LINK, name="pn-2")
    plan = (other, LINK, address, PAIR)
    assert affected(plan, {LINK.key}) == (LINK, address, PAIR)
    assert affected(plan, {PAIR.key}) == (PAIR,)
    assert affected(plan, {("device", "host", "pn-3")}) == ()
    amiss = {LINK.key}
    affected((LINK,), amiss)
    assert affected((address,), amiss) == (address,)


# What Docker no longer has.


def test_patience(clock):
    """Only what is named without a break for the grace time has expired."""
    patience = Patience(10)
    assert patience.expired(["a", "b"]) == set()
    clock.now += 9
    assert patience.expired(["a"]) == set()
    clock.now += 1
    assert patience.expired(["a", "b"]) == {"a"}
    assert patience.since == {"a": 1000, "b": 1010}
    clock.now += 10
    assert patience.expired(iter(["b", "c"])) == {"b"}
    assert patience.expired([]) == set()
    assert patience.since == {}


async def after_grace(sync: Sync, clock: Clock, parts: Rig) -> None:
    """Turn, see that nothing has changed, and turn again when the grace is over."""
    before = parts.records
    await sync.turn()
    clock.now += 59
    await sync.turn()
    assert parts.records == before
    clock.now += 1
    await sync.turn()


async def test_an_endpoint_docker_lacks(parts, docker, sync, clock):
    """An endpoint goes when Docker's list has been without it for the grace time."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED, ports=(port(80, 8080),))
    await docker.start(OTHER, RED)
    sync.learn(inventory(docker, without=(BOX,)))
    await after_grace(sync, clock, parts)
    (left,) = parts.state.view.all(Endpoint, "endpoints/")
    assert left.id == OTHER
    one(parts.kernel, Veth)
    assert not [op for op in parts.kernel.ops.values() if op.key[0] == "hold"]


async def test_an_endpoint_that_is_listed_again(parts, docker, sync, clock):
    """An endpoint that Docker's list has in between is waited for anew."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    for _ in range(3):
        sync.learn(inventory(docker, without=(BOX,)))
        await sync.turn()
        clock.now += 50
        await sync.turn()
        sync.learn(inventory(docker))
        await sync.turn()
    assert len(list(parts.state.view.all(Endpoint, "endpoints/"))) == 1


async def test_a_network_docker_lacks(parts, docker, sync, clock):
    """A network goes after the grace time, with its endpoints, claims and devices."""
    await docker.create(RED, "10.1.0.0/24", "fd01::/64")
    await docker.start(BOX, RED)
    await docker.create(BLUE, "10.2.0.0/24")
    sync.learn(inventory(docker, without=(RED, BOX)))
    await after_grace(sync, clock, parts)
    (pool,) = parts.state.view.all(Pool, "pools/")
    assert str(pool.cidr) == "10.2.0.0/24"
    assert [m.docker_id for m in parts.site.members()] == [BLUE]
    assert one(parts.kernel, Bridge).name == parts.site.member(BLUE).bridge


async def test_a_pool_docker_lacks(parts, docker, sync, clock):
    """A pool for another driver's network goes once Docker has no such subnet."""
    kept = await docker.pool("10.8.0.0/24")
    await docker.address(kept, "10.8.0.5")
    await docker.pool("10.9.0.0/24")
    sync.learn(Inventory(pools=frozenset({ip_network("10.8.0.0/24")})))
    await after_grace(sync, clock, parts)
    (pool,) = parts.state.view.all(Pool, "pools/")
    assert str(pool.cidr) == "10.8.0.0/24"
    assert len(list(parts.state.view.all(Reservation, "addresses/"))) == 1


async def test_without_dockers_list_nothing_goes(parts, docker, sync, clock):
    """As long as Docker does not answer, nothing is forgotten for its sake."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    before, held = parts.records, dict(parts.kernel.ops)
    for _ in range(3):
        clock.now += 1000
        await sync.turn()
    assert (parts.records, parts.kernel.ops) == (before, held)


async def test_members_of_other_hosts_are_theirs(parts, docker, sync, clock):
    """What another host has a part in is not forgotten for this host's Docker."""
    await docker.pool("10.9.0.0/24")
    (pool,) = parts.state.view.all(Pool, "pools/")
    mine = parts.state.view.groups[f"members/{pool.network}/"]
    (member,) = [known.record for known in mine.values()]
    await parts.state.commit(
        lambda d: d.put(
            records.member(pool.network, "other"), replace(member, host="other")
        )
    )
    sync.learn(Inventory())
    await after_grace(sync, clock, parts)
    assert list(parts.state.view.all(Pool, "pools/")) == [pool]
    assert f"members/{pool.network}/other" in parts.records
    assert f"members/{pool.network}/{parts.site.host.id}" not in parts.records


async def test_what_nobody_has_a_part_in(parts, docker, sync):
    """Networks and pools without a member are deleted, with their addresses."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create(BLUE, "10.2.0.0/24")
    member = parts.site.member(RED)
    await forget(parts, f"members/{member.network}/")
    await sync.turn()
    assert not [k for k in parts.records if member.network in k or "10.1.0" in k]
    assert [n.id for n in parts.state.view.all(Network, "networks/")] == [
        parts.site.member(BLUE).network
    ]


async def test_a_store_that_is_away(parts, docker, sync, clock):
    """While the store is away, the kernel is mended all the same."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    before = dict(parts.kernel.ops)
    sync.learn(inventory(docker))

    async def away(change: Change, lease=None) -> int:
        raise StoreError("the store is away")

    parts.state.store.commit = away
    pool_id = docker.nets[RED].pools[0][0]
    await parts.ipam.release_address(pool_id, docker.boxes[BOX].addresses[0].ip)
    parts.kernel.ops.clear()
    clock.now += 100
    await sync.turn()
    bridge = next(op for op in before.values() if isinstance(op, Bridge))
    assert parts.kernel.ops[bridge.key] == bridge


# Provisional addresses.


async def test_provisional_addresses_lapse(parts, docker, sync, clock):
    """In a pool of ours an address that no endpoint takes lapses after the grace."""
    net = await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    await docker.address(net.pools[0][0], "10.1.0.9", name="x")
    await after_grace(sync, clock, parts)
    found = parts.state.view.all(Reservation, "addresses/")
    assert [str(r.ip) for r in found] == ["10.1.0.1", "10.1.0.2"]


async def test_addresses_of_others_do_not_lapse(parts, docker, sync, clock):
    """Under another driver nothing binds addresses: they stay until released."""
    await docker.address(await docker.pool("10.9.0.0/24"), "10.9.0.9")
    before = parts.records
    for _ in range(3):
        clock.now += 1000
        await sync.turn()
    assert parts.records == before


async def test_an_address_that_is_bound_in_time(parts, docker, sync, clock):
    """An address that an endpoint takes before the grace is over stays."""
    await docker.create(RED, "10.1.0.0/24")
    box = await docker.create_box(BOX, RED)
    await sync.turn()
    clock.now += 1000
    await sync.turn()
    found = {str(r.ip) for r in parts.state.view.all(Reservation, "addresses/")}
    assert str(box.addresses[0].ip) in found


# Docker's news.


async def test_dockers_bridges_enter_the_plans(parts, docker, sync):
    """What Docker calls its own bridges is kept apart from ours by rule."""
    await docker.create(RED, "10.1.0.0/24")
    await sync.turn()
    before = set(parts.kernel.ops)
    sync.learn(
        replace(inventory(docker), bridges=frozenset({"br-123"}), names={RED: "red"})
    )
    assert sync.dirty.is_set()
    await sync.turn()
    assert {key[-1] for key in set(parts.kernel.ops) - before} == {'"br-123"'}
    assert parts.site.docker_bridges == {"br-123", "docker0", "docker_gwbridge"}
    assert parts.site.name(RED) == "red"
    sync.learn(inventory(docker))
    await sync.turn()
    assert set(parts.kernel.ops) == before


async def test_no_news_wakes_nobody(parts, docker, sync):
    """A list that has all of ours and nothing new asks for no comparison."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    sync.learn(inventory(docker))
    sync.dirty.clear()
    sync.learn(inventory(docker))
    assert not sync.dirty.is_set()
    assert not sync.stale(inventory(docker))


@pytest.mark.parametrize("gone", [RED, BOX])
async def test_what_is_missing_wakes(parts, docker, sync, gone):
    """A list that lacks something of ours, or has it again, asks for a comparison."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    sync.learn(inventory(docker))
    sync.dirty.clear()
    sync.learn(inventory(docker, without=(gone,)))
    assert sync.dirty.is_set()
    await sync.turn()
    sync.dirty.clear()
    sync.learn(inventory(docker))
    assert sync.dirty.is_set()


# The loops.


@contextlib.asynccontextmanager
async def running(*loops):
    """Run loops meanwhile; none may end by itself."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield
    finally:
        assert not [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def until(condition) -> None:
    """Wait for something that a loop brings about."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_waking_and_auditing(parts, docker, sync):
    """The loop compares when it is woken, and by itself at every audit."""
    await docker.create(RED, "10.1.0.0/24")
    before = dict(parts.kernel.ops)
    async with running(sync.run()):
        parts.kernel.ops.clear()
        await asyncio.sleep(0.05)
        assert parts.kernel.ops == {}
        sync.wake()
        await until(lambda: parts.kernel.ops == before)
    sync.audit = 0.02
    parts.kernel.ops.clear()
    async with running(sync.run()):
        await until(lambda: parts.kernel.ops == before)


@pytest.mark.parametrize(("own", "again"), [(True, 5.0), (False, 0.3)])
async def test_what_a_look_may_have_missed(parts, docker, sync, own, again):
    """What changes amid a look is looked at in its turn, not at once."""
    await docker.create(RED, "10.1.0.0/24")
    looks = []
    found = parts.kernel.found

    async def disturbed(wanted: Plan = ()) -> Plan:
        looks.append(asyncio.get_running_loop().time())
        if len(looks) == 1:
            for _ in range(3):
                sync.hear(own)
        return await found(wanted)

    parts.kernel.found = disturbed
    async with running(sync.run()):
        sync.hear(False)
        assert sync.planned is not None
        await until(lambda: sync.ended)
        due = sync.planned.when()
        assert due - sync.ended == pytest.approx(again, abs=0.1)
        sync.wake()
        # What is about to be looked at is planned no second time.
        sync.hear(False)
        assert sync.planned.when() == due
        await until(lambda: len(looks) == 2)
        await until(lambda: not sync.looking)
        assert sync.planned is None
        assert len(looks) == 2


async def test_looks_that_take_long_are_rare(sync):
    """Changes of our own are looked at a fifth of the time at most."""
    sync.ended = asyncio.get_running_loop().time()
    for took, wait in ((0.1, 5.0), (3.0, 15.0)):
        sync.took, sync.planned = took, None
        sync.hear(True)
        assert sync.planned.when() - sync.ended == pytest.approx(wait, abs=0.1)
        sync.planned.cancel()


async def test_a_burst_of_our_own_is_looked_at_when_it_is_over(sync):
    """However long nothing was looked at; what others change does not wait for that."""
    loop = asyncio.get_running_loop()
    sync.ended = loop.time() - 1000
    sync.hear(True)
    first = sync.planned.when()
    assert first - loop.time() == pytest.approx(5.0, abs=0.1)
    sync.hear(True)
    assert sync.planned.when() == first
    sync.hear(False)
    assert sync.planned.when() - loop.time() == pytest.approx(0.2, abs=0.1)
    sync.planned.cancel()


async def test_what_moves_amid_a_look_is_no_difference(parts, docker, sync):
    """It is not mended, nor looked at twice; another look is planned for it."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start(BOX, RED)
    sync.settle = 0.01
    looks = []
    found = parts.kernel.found

    async def moved(wanted: Plan = ()) -> Plan:
        looks.append(1)
        held = await found(wanted)
        if len(looks) == 1:
            await docker.stop(BOX)
            await docker.start(OTHER, RED)
        return held

    parts.kernel.found = moved
    with structlog.testing.capture_logs() as logs:
        await sync.turn()
    assert len(looks) == 1
    assert logs == []
    assert sync.planned.when() - asyncio.get_running_loop().time() > 4
    sync.planned.cancel()
    await sync.turn()
    assert len(looks) == 2


async def test_a_turn_that_fails(parts, docker, sync):
    """A turn that fails is logged, and the next does what is left to do."""
    await docker.create(RED, "10.1.0.0/24")
    before = dict(parts.kernel.ops)
    found = parts.kernel.found

    async def broken(wanted: Plan = ()) -> Plan:
        parts.kernel.found = found
        raise KernelError("cannot read: refused by the test")

    parts.kernel.found = broken
    parts.kernel.ops.clear()
    sync.audit = 0.02
    with structlog.testing.capture_logs() as logs:
        async with running(sync.run()):
            await until(lambda: parts.kernel.ops == before)
    assert logs[0] == {
        "event": "sync.failed",
        "log_level": "warning",
        "error": "cannot read: refused by the test",
    }


class Events:
    """A dockerd's socket, whose stream of events the test can cut."""

    def __init__(self, docker: Docker) -> None:
        """Answer what a dockerd has."""
        self.docker = docker
        self.streams: list[asyncio.Queue[bytes | None]] = []
        self.asked = 0

    async def networks(self, _: web.Request) -> web.Response:
        """List its networks."""
        self.asked += 1
        listed = [
            {"Id": name, "Name": name[:3], "Driver": "pynet"}
            for name in self.docker.nets
        ]
        return web.json_response(listed)

    async def network(self, request: web.Request) -> web.Response:
        """Show one, with its containers."""
        name = request.match_info["id"]
        boxes = [b for b in self.docker.boxes.values() if b.net.id == name]
        found = {b.id: {"EndpointID": b.id, "Name": b.id[:4]} for b in boxes}
        return web.json_response({"Id": name, "Containers": found})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Send what the test puts in, until it puts None."""
        answer = web.StreamResponse()
        await answer.prepare(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.streams.append(queue)
        while (chunk := await queue.get()) is not None:
            await answer.write(chunk)
        return answer

    def application(self) -> web.Application:
        """Return what to serve."""
        app = web.Application()
        app.router.add_get("/networks", self.networks)
        app.router.add_get("/networks/{id}", self.network)
        app.router.add_get("/events", self.events)
        return app


@contextlib.asynccontextmanager
async def serving(events: Events, path: Path):
    """Serve a dockerd's socket."""
    runner = web.AppRunner(events.application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


@pytest.fixture
def door(monkeypatch):
    """Name a dockerd's socket, and let little time pass before it is tried again."""
    monkeypatch.setattr(module, "PAUSE", 0.02)
    monkeypatch.setattr(module, "SETTLE", 0.02)
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "docker.sock"


async def test_no_docker_at_all(sync):
    """Without a Docker to ask there is nothing to listen to."""
    async with asyncio.timeout(1):
        await sync.listen("pynet")
    assert sync.inventory is None


async def test_docker_is_away_and_comes(parts, docker, sync, door):
    """
    Docker is tried until it answers, and again when it goes away.

    1. Nobody serves the socket.
    2. Docker comes up; its lists are read, and at each event again.
    3. It drops the stream, and is asked anew.
    4. It goes away.
    Result: the daemon listens on, and knows that it does not know.
    """
    sync.docker = DockerApi(f"unix://{door}")
    events = Events(docker)
    await docker.create(RED, "10.1.0.0/24")
    async with running(sync.listen("pynet")):
        await asyncio.sleep(0.1)
        assert sync.inventory is None
        async with serving(events, door):
            await until(lambda: sync.inventory and RED in sync.inventory.networks)
            await docker.start(BOX, RED)
            events.streams[0].put_nowait(b"{}\n")
            await until(lambda: sync.inventory and BOX in sync.inventory.endpoints)
            assert parts.site.name(BOX) == "box1"
            events.streams[0].put_nowait(None)
            await until(lambda: len(events.streams) == 2)
            await until(lambda: sync.inventory and BOX in sync.inventory.endpoints)
        await until(lambda: sync.inventory is None)
        await asyncio.sleep(0.1)
        assert sync.inventory is None


async def test_many_events_are_one_look(parts, docker, sync, door):
    """Events that come close together make Docker's lists be read but once more."""
    sync.docker = DockerApi(f"unix://{door}")
    events = Events(docker)
    async with serving(events, door), running(sync.listen("pynet")):
        await until(lambda: events.asked == 1)
        for _ in range(20):
            events.streams[0].put_nowait(b"{}\n")
        await asyncio.sleep(0.3)
    assert 2 <= events.asked <= 3


# Networks that Docker gave up.


async def given_up(docker: Docker, name: str):
    """Let Docker's side of a creation fail after ours; return what it forgot."""
    net = await docker.create(name, "10.1.0.0/24")
    del docker.nets[name]
    await docker.give_back(net)
    return net


async def test_a_creation_that_docker_gave_up(parts, docker, sync, door, clock):
    """A network that Docker's list still lacks when asked again goes, and soon."""
    sync.docker, sync.settle = DockerApi(f"unix://{door}"), 0.01
    await given_up(docker, RED)
    assert parts.networks.doubts.names == {RED}
    async with serving(Events(docker), door):
        await sync.turn()
        assert parts.networks.part(RED) is not None
        clock.now += module.DOUBT
        await sync.turn()
    assert parts.networks.part(RED) is None
    assert parts.networks.doubts.names == set()
    await docker.create(BLUE, "10.1.0.0/24")


async def test_a_network_that_docker_has_is_in_no_doubt(
    parts, docker, sync, door, clock
):
    """Of two creations at once the one that failed releases the other's pool."""
    sync.docker, sync.settle = DockerApi(f"unix://{door}"), 0.01
    net = await given_up(docker, RED)
    async with serving(Events(docker), door):
        await sync.turn()
        docker.nets[RED] = net
        clock.now += module.DOUBT
        await sync.turn()
    assert parts.networks.part(RED) is not None
    assert parts.networks.doubts.names == set()


async def test_a_creation_under_way_is_waited_for(parts, docker, sync, door, clock):
    """While a call is at work on a network, and right after, its doubt counts not."""
    sync.docker, sync.settle = DockerApi(f"unix://{door}"), 0.01
    await given_up(docker, RED)
    async with serving(Events(docker), door):
        await sync.turn()
        async with parts.networks.locks.network(RED):
            clock.now += module.DOUBT
            await sync.turn()
        await sync.turn()
        assert parts.networks.part(RED) is not None


async def test_a_doubt_without_docker(parts, docker, sync, door, clock):
    """While Docker does not answer nothing is removed, and the doubt stays."""
    sync.docker, sync.settle = DockerApi(f"unix://{door}"), 0.01
    await given_up(docker, RED)
    await sync.turn()
    clock.now += 5
    await sync.turn()
    assert parts.networks.part(RED) is not None
    assert parts.networks.doubts.names == {RED}


async def test_what_an_earlier_life_left_is_in_doubt(parts, docker):
    """At start a network is in doubt unless it has endpoints, or is created again."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create(BLUE, "10.2.0.0/24")
    await docker.start(BOX, BLUE)
    doubts = parts.networks.doubts
    doubts.begin()
    assert doubts.names == {RED}
    net = docker.nets[RED]
    await parts.networks.create(
        RED, subnets=tuple(net.subnets), options={}, internal=False
    )
    assert doubts.names == set()
