"""Long work that lets others go first."""

import asyncio
import contextlib
from typing import Final

PATIENCE: Final = 1.0
"""Seconds that long work stands back in all; then it goes on."""


class Courtesy:
    """How one piece of long work behaves between its portions."""

    def __init__(self, free: asyncio.Event) -> None:
        """Take what is set while nobody is to go first."""
        self._free = free
        self._patience = PATIENCE

    async def stand_back(self) -> None:
        """Let everybody have a turn, and who goes first come to an end."""
        await asyncio.sleep(0)
        if self._free.is_set():
            return
        loop = asyncio.get_running_loop()
        begin = loop.time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._free.wait()
        self._patience = max(0.0, self._patience - (loop.time() - begin))
