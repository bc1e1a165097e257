"""
What is taken out of the kernel after the answer, and together.

Docker waits for the answer to each removal, and the kernel as long for one device as
for many, with its lock held. So removals wait until no others have come for a moment.
Who needs one to be over hurries them, and waits for it.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from cnmdriver.errors import KernelError
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Plan, Veth

MOMENT, MOST = 0.02, 0.1
"""Seconds in which others may come, and seconds that the first waits at most."""

Still = Callable[[Plan], Plan]

log = structlog.get_logger()


class Clear(Protocol):
    """Takes a plan out of the kernel."""

    def __call__(self, plan: Plan, still: Still, /) -> Awaitable[None]:
        """Do so, as far as it is `still` unwanted; raises KernelError for the rest."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A plan that is to go."""

    plan: Plan
    still: Still
    over: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Errands:
    """Plans that are to go, and the task that sees to it while there are any."""

    def __init__(self, clear: Clear) -> None:
        """Take what removes a plan."""
        self._clear = clear
        self._waiting: list[Errand] = []
        self._come = asyncio.Event()
        self._hurry = False
        self._task: asyncio.Task[None] | None = None

    def add(self, plan: Plan, still: Still) -> asyncio.Future[None]:
        """Have a plan removed soon; return what is done when that is over."""
        errand = Errand(plan, still)
        self._waiting.append(errand)
        self._come.set()
        if self._task is None or self._task.done():
            # It is nobody's call any more.
            nobody = contextvars.Context()
            self._task = asyncio.create_task(self._work(), context=nobody)
        return errand.over

    async def run(self) -> None:
        """Wait until all that there is by now is over."""
        task = self._task
        if task is not None and not task.done():
            self.hurry()
            await asyncio.wait({task})

    def hurry(self) -> None:
        """Let what there is by now wait for nothing more."""
        if self._waiting:
            self._hurry = True
            self._come.set()

    async def _work(self) -> None:
        while self._waiting:
            await self._more()
            self._hurry = False
            some, self._waiting = self._waiting, []
            try:
                await self._clear(together(e.plan for e in some), some[-1].still)
            except KernelError as error:
                log.warning("kernel.not_cleared", error=str(error))
            finally:
                for errand in some:
                    errand.over.set_result(None)

    async def _more(self) -> None:
        """Wait for more, as long as more comes and nobody is in a hurry."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MOST):
                while not self._hurry:
                    self._come.clear()
                    async with asyncio.timeout(MOMENT):
                        await self._come.wait()


def together(plans: Iterable[Plan]) -> Plan:
    """
    Merge plans so that what can go at once stands together, pairs last.

    What stands on a pair goes with it.
    """
    every = ops.union(plans)
    pairs = tuple(op for op in every if isinstance(op, Veth))
    keys = {pair.key for pair in pairs}
    others = (op for op in every if not keys.intersection((op.key, *op.stands_on())))
    return (*sorted(others, key=lambda op: op.where), *pairs)
