"""
The state of the cluster as one host works with it: view, commits, outbox.

A caller gives a *decision*: a plain function that looks at a draft, writes into it and
returns what it found out. If another host was faster, the view is brought up to date
and the decision is made again, so it must have no effects of its own.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from cnmdriver.errors import StoreError
from cnmdriver.model import Cluster
from cnmdriver.store import records
from cnmdriver.store.base import Change, CompactedError, RaceLostError, Store
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.view import Draft, View

T = TypeVar("T")
Step = Callable[[str], Awaitable[None]]
Decision = Callable[[Draft], T]

TRIES = 50
"""Races a decision may lose in turn; each loss is somebody's progress."""
RELIST = 60.0
"""Seconds between two whole readings: a watch is a hint, the list is the truth."""
PAUSE = 1.0
"""Seconds before the store is tried again when it was away."""

OWN = ("endpoints/", "members/", "addresses/")
"""Records with one writer: a host changes its own without looking."""

log = structlog.get_logger()


class State:
    """The view, and the only way to change what is behind it."""

    def __init__(
        self,
        store: Store,
        local: LocalDatabase,
        step: Step,
        changed: Callable[[], None],
    ) -> None:
        """Take the doors; `changed` is called when others changed something."""
        self.store = store
        self.local = local
        self.step = step
        self.changed = changed
        self.view = View()
        self.away: str | None = None
        """Why the store cannot be used now, None if it can."""
        self.behind = True
        """Whether the outbox may hold what is not in the store yet."""
        self.replaying = asyncio.Lock()
        self.unsaved: list[Change] = []
        """What not even the outbox took; oldest first."""
        self.saving = asyncio.Lock()

    async def open(self) -> None:
        """Read everything, and make the cluster's record if the store is empty."""
        await self.relist()
        identity = Cluster(id=secrets.token_hex(8), schema=records.SCHEMA)

        def found(draft: Draft) -> None:
            if draft.get(Cluster, records.CLUSTER) is None:
                draft.put(records.CLUSTER, identity)

        await self.replay()
        await self.commit(found)

    async def relist(self) -> bool:
        """Read everything anew. Tell whether there was news."""
        listing = await self.store.read("")
        return self.view.replace(listing.items.items(), listing.revision)

    async def commit(self, decision: Decision[T]) -> T:
        """
        Decide and write; on a lost race look and decide again.

        Raises what the decision raises, and StoreError if the store is away.
        """
        # In order: what was deferred must not undo what is decided now.
        if self.behind:
            await self.replay()
        for _ in range(TRIES):
            draft = Draft(self.view)
            result = decision(draft)
            change = draft.change()
            if not change:
                return result
            try:
                await self.write(change)
            except RaceLostError as race:
                for key, item in race.current.items():
                    value = item.value if item else None
                    seen = item.revision if item else race.revision
                    self.view.write(key, value, seen)
            else:
                return result
        raise StoreError("lost 50 races for the same record in turn; try again")

    async def write(self, change: Change) -> None:
        """
        Commit a transaction and take it into the view.

        A cancel counts when that has ended, so that its caller can take it back.
        """
        await self.step("commit.before")
        writing = asyncio.ensure_future(self.store.commit(change))
        try:
            revision = await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            if not writing.cancelled() and writing.exception() is None:
                self.take(change, writing.result())
            raise
        await self.step("commit.after")
        self.take(change, revision)

    def take(self, change: Change, revision: int) -> None:
        """Let the view know of our own write without waiting for the watch."""
        for key, value in change.puts.items():
            self.view.write(key, value, revision)
        for key in change.deletes:
            self.view.write(key, None, revision)

    async def remove(self, decision: Decision[T]) -> T:
        """
        Take something back and write that; never fails for the store's sake.

        If the store is away, what it changes of this host's own records goes to the
        outbox and is replayed; what hosts share is left to a later audit.
        """
        try:
            return await self.commit(decision)
        except StoreError as error:
            draft = Draft(self.view)
            result = decision(draft)
            change = own(draft.change())
            log.warning(
                "store.deferred", keys=sorted(change.written()), error=str(error)
            )
            if change:
                await self.defer(change)
            return result

    async def defer(self, change: Change) -> None:
        """Take a change into the view, and write it when the store is back."""
        self.behind = True
        for key in change.written():
            seen = self.view.written.get(key, 0)
            self.view.write(key, change.puts.get(key), seen + 1)
        self.unsaved.append(change)
        # Nothing may stop a removal, not even a full disk.
        with contextlib.suppress(StoreError):
            await self.save()

    async def save(self) -> None:
        """Write into the outbox what could not be written there before."""
        async with self.saving:
            while self.unsaved:
                await self.local.remember(self.unsaved[0])
                del self.unsaved[0]

    async def replay(self) -> None:
        """Write what the outbox holds, oldest first."""
        async with self.replaying:
            await self.save()
            while entries := await self.local.pending():
                for number, change in entries:
                    self.take(change, await self.store.commit(change))
                    await self.local.done(number)
            # A removal may have been deferred since the last look.
            self.behind = bool(self.unsaved)

    async def follow(self) -> None:
        """Keep the view true until cancelled: read everything, watch, and again."""
        while True:
            try:
                await self.catch_up()
                async with asyncio.timeout(RELIST):
                    await self.watch()
            except TimeoutError:
                pass
            except CompactedError:
                log.info("store.compacted")
            except StoreError as error:
                self.note(str(error))
                await asyncio.sleep(PAUSE)

    async def watch(self) -> None:
        """Take in what others write, until the watch ends."""
        async for events in self.store.watch("", self.view.listed + 1):
            fresh = [e for e in events if self.view.write(e.key, e.value, e.revision)]
            if fresh:
                self.changed()

    async def catch_up(self) -> None:
        """Replay the outbox and read everything; raises StoreError."""
        await self.replay()
        news = await self.relist()
        self.note(None)
        if news:
            self.changed()

    def note(self, reason: str | None) -> None:
        """Remember, and log once, that the store went away or came back."""
        if (reason is None) != (self.away is None):
            if reason is None:
                log.info("store.back")
            else:
                log.warning("store.away", error=reason)
        self.away = reason


def own(change: Change) -> Change:
    """Return the part of a change that no other host may contradict."""
    return Change(
        puts={k: v for k, v in change.puts.items() if k.startswith(OWN)},
        deletes=frozenset(k for k in change.deletes if k.startswith(OWN)),
    )
