"""Who may work on a network at one time."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from cnmdriver.driver.locks import Gate, Locks

SOON = 0.05


async def enters(context) -> bool:
    """Tell whether a context is entered at once; it is left again."""
    try:
        async with asyncio.timeout(SOON), context:
            return True
    except TimeoutError:
        return False


async def test_endpoints_go_beside_each_other():
    """Calls about two endpoints of a network do not wait; about one they do."""
    locks = Locks()
    async with locks.endpoint("n", "a"):
        assert await enters(locks.endpoint("n", "b"))
        assert not await enters(locks.endpoint("n", "a"))
        assert not await enters(locks.also("a"))
        assert await enters(locks.also("b"))
    assert await enters(locks.endpoint("n", "a"))


async def test_a_network_is_worked_on_alone():
    """Who works on the network keeps all others out, and waits for all of them."""
    locks = Locks()
    async with locks.network("n"):
        assert not await enters(locks.endpoint("n", "a"))
        assert not await enters(locks.network("n"))
        assert await enters(locks.network("other"))
    async with locks.endpoint("n", "a"):
        assert not await enters(locks.network("n"))
    assert await enters(locks.network("n"))


async def test_who_waits_to_be_alone_is_not_passed():
    """Ever more calls about endpoints do not keep a removal out."""
    gate = Gate()
    order = []

    async def alone() -> None:
        async with gate.alone():
            order.append("alone")

    async def together() -> None:
        async with gate.together():
            order.append("together")

    async with gate.together():
        first = asyncio.create_task(alone())
        await asyncio.sleep(0)
        second = asyncio.create_task(together())
        await asyncio.sleep(SOON)
        assert order == []
    await asyncio.gather(first, second)
    assert order == ["alone", "together"]


async def test_who_gives_up_waiting_lets_others_in():
    """One that was cancelled while it waited to be alone stands in nobody's way."""
    gate = Gate()
    async with gate.together():
        waiting = asyncio.create_task(gate.alone().__aenter__())
        await asyncio.sleep(0)
        other = asyncio.create_task(enters(gate.together()))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await other
    assert not gate.in_use
    assert await enters(gate.alone())


@pytest.mark.parametrize("kind", ["network", "endpoint"])
async def test_a_failure_inside_lets_go(kind):
    """Whatever ends a call, the next one is let in."""
    locks = Locks()
    words = ("n",) if kind == "network" else ("n", "a")
    with pytest.raises(ValueError, match="inside"):
        async with getattr(locks, kind)(*words):
            raise ValueError("inside")
    assert not locks.is_busy("n")
    assert locks.idle.is_set()
    assert await enters(locks.network("n"))


async def test_busy_and_idle():
    """It is told which network is worked on, whether any is, and how often one was."""
    locks = Locks()
    assert locks.idle.is_set()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(locks.endpoint("n", "a"))
        await stack.enter_async_context(locks.network("m"))
        assert locks.is_busy("n")
        assert locks.is_busy("m")
        assert not locks.is_busy("o")
        assert not locks.idle.is_set()
    assert not locks.is_busy("n")
    assert locks.idle.is_set()
    assert locks.begun == 2
