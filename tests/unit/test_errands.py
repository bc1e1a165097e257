"""What is taken out of the kernel after the answer, and together."""

import asyncio
import time

import pytest
import structlog

from cnmdriver.dataplane import errands
from cnmdriver.dataplane.errands import Errands
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import Veth


def pair(number: int) -> Veth:
    """Return a pair."""
    return Veth(
        name=f"pe-{number}", peer=None, mac=None, bridge="b", mtu=1500, alias=""
    )


@pytest.fixture
def cleared() -> list:
    """Return the plans that were cleared, each with when."""
    return []


@pytest.fixture
def work(cleared) -> Errands:
    """Return errands that note what they clear."""

    async def clear(plan, still) -> None:
        cleared.append((time.monotonic(), still(plan)))

    return Errands(clear)


async def test_those_that_come_together_go_together(work, cleared, monkeypatch):
    """As long as more come within a moment of the last, all wait for one clearing."""
    monkeypatch.setattr(errands, "MOMENT", 0.05)
    overs = []
    for number in range(4):
        overs.append(work.add((pair(number),), lambda plan: plan))
        await asyncio.sleep(0.02)
    await asyncio.wait_for(asyncio.gather(*overs), 1)
    assert [plan for _, plan in cleared] == [tuple(map(pair, range(4)))]


async def test_the_first_does_not_wait_for_ever(work, cleared, monkeypatch):
    """However many come, the first goes after a while."""
    monkeypatch.setattr(errands, "MOST", 0.1)
    begin = time.monotonic()
    for number in range(20):
        work.add((pair(number),), lambda plan: plan)
        await asyncio.sleep(0.015)
    assert cleared[0][0] - begin < 0.2
    await work.run()
    assert sum(len(plan) for _, plan in cleared) == 20


async def test_who_needs_it_hurries(work, cleared, monkeypatch):
    """In a hurry nothing is waited for; nothing is hurried that is not there yet."""
    monkeypatch.setattr(errands, "MOMENT", 0.2)
    work.hurry()
    begin = time.monotonic()
    over = work.add((pair(1),), lambda plan: plan)
    await asyncio.sleep(0.05)
    assert not over.done()
    work.hurry()
    await asyncio.wait_for(over, 0.1)
    assert cleared[0][0] - begin < 0.15


async def test_what_is_wanted_again_stays(work, cleared):
    """It is asked at the time of the clearing what is still to go."""
    await work.add((pair(1), pair(2)), lambda plan: plan[:1])
    assert [plan for _, plan in cleared] == [(pair(1),)]


async def test_what_cannot_be_cleared_is_over_too():
    """Who waits is let go whatever the kernel says; the audit finds the rest."""

    async def clear(_plan, _still) -> None:
        raise KernelError("refused")

    with structlog.testing.capture_logs() as logs:
        await asyncio.wait_for(Errands(clear).add((pair(1),), lambda plan: plan), 1)
    assert [line["event"] for line in logs] == ["kernel.not_cleared"]
