"""A look at all there is: the same as a comparison at once, and last in the queue."""

import asyncio

import pytest

from cnmdriver import courtesy
from cnmdriver.courtesy import Courtesy
from cnmdriver.driver import looking
from cnmdriver.driver.looking import Look
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Sysctl, Veth
from tests.fakes import FakeKernel, rig
from tests.unit.calls import Docker

RED, BLUE = "red" * 20, "blue" * 15
BOXES = [f"b{number:02}" * 20 for number in range(12)]


@pytest.fixture(autouse=True)
def portions(monkeypatch):
    """Let every portion be a single thing."""
    monkeypatch.setattr(looking, "PORTION", 1)


@pytest.fixture
async def parts(tmp_path):
    """Build a driver."""
    async with rig(tmp_path, FakeKernel()) as built:
        yield built


@pytest.fixture
async def docker(parts):
    """Have two networks with containers."""
    made = Docker(parts)
    await made.create(RED, "10.1.0.0/24")
    await made.create(BLUE, "10.2.0.0/24")
    for number, box in enumerate(BOXES):
        await made.start(box, (RED, BLUE)[number % 2])
    return made


def difference(parts):
    """Compare at once."""
    return ops.compare(parts.site.desired(), tuple(parts.kernel.ops.values()))


async def test_a_look_finds_what_a_comparison_does(parts, docker):
    """What lacks, what differs and what is too much, each once; kept settings are not."""
    assert docker
    assert not await Look(parts.site).difference()
    kept = Sysctl(path="net/ipv4/other", value="1", keep=True)
    parts.kernel.ops[kept.key] = kept
    await docker.stop(BOXES[0])
    others = [op for op in parts.kernel.ops.values() if BOXES[1][:6] in str(op)]
    for op in others:
        del parts.kernel.ops[op.key]
    found = await Look(parts.site).difference()
    assert found == difference(parts)
    assert set(found.lacking) == set(others)
    assert found.surplus == ()


async def test_what_moves_is_passed_over(parts, docker):
    """What is no more wanted as it was when the look began is the next one's."""
    lost = next(op for op in parts.kernel.ops.values() if isinstance(op, Veth))
    del parts.kernel.ops[lost.key]
    found = parts.kernel.found

    async def moved(wanted=()):
        held = await found(wanted)
        await docker.stop(BOXES[1])
        await docker.start("late" * 15, RED)
        return held

    parts.kernel.found = moved
    look = Look(parts.site)
    difference = await look.difference()
    assert look.passed_over
    assert list(difference.amiss()) == [lost.key]
    parts.kernel.found = found
    look = Look(parts.site)
    assert list((await look.difference()).amiss()) == [lost.key]
    assert not look.passed_over


async def test_calls_go_first(parts, docker):
    """A look does not go on while a network is worked on, however often it had to."""
    for _ in range(3):
        look = asyncio.ensure_future(Look(parts.site).difference())
        await asyncio.sleep(0)
        async with parts.site.locks.endpoint(RED, BOXES[0]):
            await asyncio.sleep(0.05)
            assert not look.done()
        assert not await look
    await docker.stop(BOXES[0])


async def test_what_changes_amid_a_look_is_the_next_ones(parts, docker):
    """Containers and networks come and go between any two portions of a look."""
    other = "other" * 12
    late = "late" * 15

    async def come_and_go():
        while not ended:
            await docker.create(late, "10.3.0.0/24")
            await docker.start(other, late)
            await docker.stop(other)
            await docker.remove(late)
            await docker.start(other, RED)
            await docker.stop(other)

    ended = []
    changes = asyncio.ensure_future(come_and_go())
    for _ in range(20):
        found = await Look(parts.site).difference()
        amiss = [ops.name(op) for op in (*found.lacking, *found.surplus)]
        assert not any(box[:6] in name for box in BOXES for name in amiss)
    ended.append(True)
    await changes
    assert not await Look(parts.site).difference()


async def test_a_look_does_not_stand_back_for_ever(monkeypatch):
    """All the standing back of one look has a bound, and time that it works is no part."""
    monkeypatch.setattr(courtesy, "PATIENCE", 0.1)
    free = asyncio.Event()
    loop = asyncio.get_running_loop()
    polite = Courtesy(free)
    begin = loop.time()
    for _ in range(50):
        await polite.stand_back()
    assert 0.1 <= loop.time() - begin < 5
    free.set()
    fresh = Courtesy(free)
    await asyncio.sleep(0.15)
    free.clear()
    waiting = asyncio.ensure_future(fresh.stand_back())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    free.set()
    await waiting
