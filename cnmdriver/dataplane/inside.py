"""
A thread that stays in one network namespace.

Sockets, libnftables and /proc/sys are of the namespace of the thread that opens them,
and a socket stays in it. The event loop's own thread never leaves the host's.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple, Unpack

from cnmdriver.dataplane.handler import BOUND, too_slow
from cnmdriver.errors import KernelError

CLONE_NEWNET = 0x40000000

T = TypeVar("T")
A = TypeVarTuple("A")


class Inside:
    """Calls functions in a namespace, one at a time, in the order they are given."""

    def __init__(self, name: str, descriptor: int | None = None) -> None:
        """Take the namespace's descriptor; without one it is the caller's own."""
        self._name = name
        self._descriptor = descriptor
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> None:
        """Start the thread, which inherits the caller's namespace, and move it."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        if self._descriptor is None:
            await self.ask("starting a thread", int)
        else:
            await self.ask(f"entering {self._name}", enter, self._descriptor)

    def close(self) -> None:
        """End the thread when it is done; a second time does nothing."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    def call(
        self, function: Callable[[Unpack[A]], T], *arguments: *A
    ) -> asyncio.Future[T]:
        """Hand a call to the thread, whatever time it takes."""
        if self._thread is None:
            raise KernelError("the dataplane is used before it was opened")
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, function, *arguments)

    async def ask(
        self, what: str, function: Callable[[Unpack[A]], T], *arguments: *A
    ) -> T:
        """Wait for a call, as long as an operation of the kernel may take."""
        try:
            async with asyncio.timeout(BOUND):
                return await asyncio.shield(self.call(function, *arguments))
        except TimeoutError as error:
            raise too_slow(what) from error


def enter(descriptor: int) -> None:
    """Move the calling thread into a namespace."""
    system_call("setns", descriptor, CLONE_NEWNET)


def system_call(name: str, *arguments: int | bytes | None) -> None:
    """Make a call of libc's that returns 0 for success; raises OSError."""
    if getattr(LIBC, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


LIBC = ctypes.CDLL(None, use_errno=True)
