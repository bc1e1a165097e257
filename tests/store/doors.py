"""A door to a real store that a test takes away, or whose answers it swallows."""

from collections.abc import AsyncIterator

from cnmdriver.errors import StoreError
from cnmdriver.store.base import (
    Change,
    Event,
    Lease,
    Listing,
    RaceLostError,
    Store,
    UnknownOutcomeError,
)


class Moody:
    """A store that the test takes away, makes lose, or whose answers it swallows."""

    def __init__(self, store: Store) -> None:
        """Stand before a store."""
        self.store = store
        self.shared = False
        self.away = False
        self.losing = 0
        self.swallowed: list[str] = []
        """For the next commits: `done` swallows the answer, `lost` the question."""
        self.held: list[tuple[Change, Lease | None]] = []
        """What was lost, and may be delivered late."""
        self.commits: list[Change] = []
        self.starts: list[int] = []
        self.reads: list[str] = []
        self.broken: StoreError | None = None

    def check(self) -> None:
        """Fail if the test wants it."""
        if self.away:
            raise StoreError("the store is away")

    async def open(self) -> None:
        await self.store.open()

    async def close(self) -> None:
        await self.store.close()

    async def read(self, prefix: str) -> Listing:
        self.check()
        self.reads.append(prefix)
        return await self.store.read(prefix)

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        self.check()
        if self.losing:
            self.losing -= 1
            raise RaceLostError({}, 0)
        fault = self.swallowed.pop(0) if self.swallowed else ""
        if fault == "lost":
            self.held.append((change, inner(lease)))
            raise UnknownOutcomeError("the answer was lost")
        revision = await self.store.commit(change, inner(lease))
        self.commits.append(change)
        if fault == "done":
            raise UnknownOutcomeError("the answer was lost")
        return revision

    async def deliver(self) -> list[int | StoreError]:
        """Let what was lost reach the store after all."""
        found: list[int | StoreError] = []
        for change, lease in self.held:
            try:
                found.append(await self.store.commit(change, lease))
            except StoreError as error:
                found.append(error)
        self.held.clear()
        return found

    async def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        self.check()
        self.starts.append(start)
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        async for events in self.store.watch(prefix, start, end=end):
            self.check()
            yield events

    async def trouble(self) -> str:
        return await self.store.trouble()

    async def lease(self, ttl: float) -> Lease:
        self.check()
        return MoodyLease(self, await self.store.lease(ttl))


class MoodyLease:
    """A lease that cannot be kept while its store is away."""

    def __init__(self, moody: Moody, lease: Lease) -> None:
        """Stand before a lease."""
        self.moody = moody
        self.lease = lease

    async def keep(self) -> None:
        self.moody.check()
        await self.lease.keep()

    async def revoke(self) -> None:
        self.moody.check()
        await self.lease.revoke()


def inner(lease: Lease | None) -> Lease | None:
    """Return the store's own lease."""
    return lease.lease if isinstance(lease, MoodyLease) else lease
