"""Work that a cancel must not interrupt."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


async def settled(work: Coroutine[None, None, T]) -> T:
    """
    Await work that a cancel must not interrupt: the cancel is raised when it ended.

    The work bounds itself. Without this nobody could tell what half of it was done.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # A second one can come: a time-out's, and that of whoever ends the daemon.
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            # Nobody else will ask how it ended.
            task.exception()
        raise
