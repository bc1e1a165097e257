"""Who may work on a network at one time: many on its endpoints, or one on itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Gate:
    """Lets in many together, or one alone, who is not passed by those after it."""

    def __init__(self) -> None:
        """Be open."""
        self._inside = 0
        self._waiting = 0
        self._shut = False
        self._turn = asyncio.Event()

    @property
    def in_use(self) -> bool:
        """Whether anybody is inside."""
        return self._shut or self._inside > 0

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Be inside with others."""
        await self._until(lambda: not self._shut and not self._waiting)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside and nobody else."""
        self._waiting += 1
        try:
            await self._until(lambda: not self.in_use)
            self._shut = True
        finally:
            self._waiting -= 1
            if not self._shut:
                self._tell()
        try:
            yield
        finally:
            self._shut = False
            self._tell()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            await self._turn.wait()

    def _tell(self) -> None:
        self._turn.set()
        self._turn = asyncio.Event()


class Locks:
    """The gates of networks, and a lock for each endpoint."""

    def __init__(self) -> None:
        """Know of nobody."""
        self._gates: WeakValueDictionary[str, Gate] = WeakValueDictionary()
        self._endpoints: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._busy = 0
        self.begun = 0
        """How often somebody has begun."""
        self.idle = asyncio.Event()
        """Set while nobody works on any network."""
        self.idle.set()

    @asynccontextmanager
    async def network(self, docker_id: str) -> AsyncIterator[None]:
        """Work on a network, and let nobody work on any of its endpoints."""
        gate = self._gates.setdefault(docker_id, Gate())
        async with self._working(), gate.alone():
            yield

    @asynccontextmanager
    async def endpoint(self, docker_id: str, endpoint_id: str) -> AsyncIterator[None]:
        """Work on an endpoint of a network that stays meanwhile."""
        gate = self._gates.setdefault(docker_id, Gate())
        async with self._working(), gate.together(), self.also(endpoint_id):
            yield

    @asynccontextmanager
    async def also(self, endpoint_id: str) -> AsyncIterator[None]:
        """Work on an endpoint too, for somebody who works on one of its network."""
        lock = self._endpoints.setdefault(endpoint_id, asyncio.Lock())
        async with lock:
            yield

    def is_busy(self, docker_id: str) -> bool:
        """Tell whether anybody works on a network or on an endpoint of it."""
        gate = self._gates.get(docker_id)
        return gate is not None and gate.in_use

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        self._busy += 1
        self.begun += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self.idle.set()
