"""
The embedded store: one SQLite file, one host, nothing to install.

All access is by one worker thread, as SQLite calls block. A write is on the disk when
it is answered (WAL, synchronous FULL). A lock beside the file keeps a second daemon
out: two would not see each other's watches.

Leases live in this process: those of an earlier one are over when the file is opened.
"""

import asyncio
import contextlib
import fcntl
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from cnmdriver.errors import StoreError
from cnmdriver.store.base import (
    Change,
    CompactedError,
    Event,
    Item,
    Lease,
    Listing,
    RaceLostError,
)

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (
    revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB
);
CREATE INDEX IF NOT EXISTS history_revision ON history (revision);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
INSERT OR IGNORE INTO state VALUES ('revision', 0), ('compacted', 0), ('schema', 1);
"""
VERSION = 1
REMEMBERED = 1000
"""How many revisions a watch may start behind the newest."""
LIMIT = 3.0
"""Seconds a store operation may take."""
LAST = "\U0010ffff"
"""Behind every key that starts like what stands before it."""


@contextlib.contextmanager
def mapped(doing: str, path: Path) -> Iterator[None]:
    """Turn SQLite's and the file system's errors into ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"cannot {doing} the embedded store {path}: {error}; "
            "check the disk and the file's permissions"
        ) from error


class SqliteLease:
    """A lease of this process, ended by a timer."""

    def __init__(self, store: "SqliteStore", number: int, ttl: float) -> None:
        """Start its time."""
        self.number = number
        self.store = store
        self.ttl = ttl
        self.alive = True
        self.timer = self.start()

    def start(self) -> asyncio.TimerHandle:
        """Start the timer."""
        return asyncio.get_running_loop().call_later(self.ttl, self.expire)

    def expire(self) -> None:
        """Delete its keys, as nobody kept it."""
        self.alive = False
        self.store.background(self.end())

    async def end(self) -> None:
        """Delete its keys; if the store is away, the next opening does."""
        with contextlib.suppress(StoreError):
            await self.store.end_lease(self.number)

    async def keep(self) -> None:
        """Start its time anew."""
        if not self.alive:
            raise StoreError("the lease has run out; take a new one")
        self.timer.cancel()
        self.timer = self.start()

    async def revoke(self) -> None:
        """End it now."""
        self.timer.cancel()
        if self.alive:
            self.alive = False
            await self.store.end_lease(self.number)


class SqliteStore:
    """`sqlite:///path`."""

    shared = False

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is opened yet."""
        self.path = path
        self.thread = ThreadPoolExecutor(1, "store")
        self.connection: sqlite3.Connection | None = None
        self.lock: IO[bytes] | None = None
        self.written = asyncio.Condition()
        self.closed = False
        self.leases = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Open or make the file; raises StoreError if another daemon has it."""
        await self.call("open", self._open)

    async def close(self) -> None:
        """Close the file and end all watches."""
        self.closed = True
        for task in self.tasks:
            task.cancel()
        async with self.written:
            self.written.notify_all()
        with contextlib.suppress(StoreError):
            await self.call("close", self._close)
        self.thread.shutdown(wait=False)

    async def read(self, prefix: str) -> Listing:
        """Return all keys under a prefix."""
        return await self.call("read", lambda: self._read(prefix))

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        """Write all or nothing."""
        number = None
        if isinstance(lease, SqliteLease):
            number = lease.number
            if not lease.alive:
                raise StoreError("the lease has run out; nothing was written")
        revision = await self.call("write", lambda: self._commit(change, number))
        async with self.written:
            self.written.notify_all()
        return revision

    async def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        """Yield the commits that touched the prefix, from a revision on."""
        while not self.closed:
            # The condition is taken first: a commit in between still wakes us.
            async with self.written:
                batches, newest = await self.call(
                    "watch", partial(self._events, prefix, start, end or LAST)
                )
                if not batches:
                    start = max(start, newest + 1)
                    if not self.closed:
                        await self.written.wait()
                    continue
            for batch in batches:
                yield batch
            start = batches[-1][0].revision + 1

    async def lease(self, ttl: float) -> Lease:
        """Make a lease."""
        self.leases += 1
        return SqliteLease(self, self.leases, ttl)

    async def end_lease(self, number: int) -> None:
        """Delete the keys of a lease."""
        await self.call("write", lambda: self._end_lease(number))
        async with self.written:
            self.written.notify_all()

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run something that nobody waits for, and keep it from being collected."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def call(self, doing: str, work: Callable[[], T]) -> T:
        """Run blocking work in the store's thread, for a bounded time."""
        if self.thread._shutdown:  # noqa: SLF001  there is no public question
            raise StoreError(f"cannot {doing} the embedded store: it is closed")

        def mapped_work() -> T:
            with mapped(doing, self.path):
                return work()

        future = asyncio.get_running_loop().run_in_executor(self.thread, mapped_work)
        try:
            # Shielded: a write that was begun is not forgotten half-way. (wait_for
            # would lose a cancellation that comes together with the answer.)
            async with asyncio.timeout(LIMIT):
                return await asyncio.shield(future)
        except TimeoutError:
            raise StoreError(
                f"the embedded store {self.path} did not {doing} within {LIMIT:g} s; "
                "the disk is slow or full"
            ) from None

    # What follows runs in the thread.

    @property
    def db(self) -> sqlite3.Connection:
        """The open connection."""
        if self.connection is None:
            raise StoreError(f"the embedded store {self.path} is not open")
        return self.connection

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock = self.path.with_name(self.path.name + ".lock").open("ab")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise StoreError(
                f"another pynet has the embedded store {self.path}; stop it, or use "
                "a shared store (--store etcd://…) for several"
            ) from None
        self.connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=2
        )
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.executescript(SCHEMA)
        self._check_version()
        leased = [k for (k,) in self.db.execute(
            "SELECT key FROM records WHERE lease IS NOT NULL"
        )]  # fmt: skip
        if leased:
            self._commit(Change(deletes=frozenset(leased)), None)

    def _check_version(self) -> None:
        (version,) = self.db.execute(
            "SELECT number FROM state WHERE name = 'schema'"
        ).fetchone()
        if version != VERSION:
            raise StoreError(
                f"the embedded store {self.path} has schema {version}, this pynet "
                f"knows {VERSION}; use the newer pynet"
            )

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.lock is not None:
            self.lock.close()

    def _number(self, name: str) -> int:
        row = self.db.execute("SELECT number FROM state WHERE name = ?", (name,))
        return int(row.fetchone()[0])

    def _read(self, prefix: str) -> Listing:
        self.db.execute("BEGIN")
        try:
            rows = self.db.execute(
                "SELECT key, value, revision FROM records WHERE key >= ? AND key < ?",
                (prefix, prefix + LAST),
            )
            items = {k: Item(value=v, revision=r) for k, v, r in rows}
            return Listing(items=items, revision=self._number("revision"))
        finally:
            self.db.execute("COMMIT")

    def _commit(self, change: Change, lease: int | None) -> int:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            revision = self._write(change, lease)
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
        return revision

    def _write(self, change: Change, lease: int | None) -> int:
        db, revision = self.db, self._number("revision")
        current = {key: self._item(key) for key in change.expect}
        if any(
            (item.revision if item else 0) != change.expect[key]
            for key, item in current.items()
        ):
            raise RaceLostError(current, revision)
        deletes = [k for k in sorted(change.deletes) if self._item(k) is not None]
        if not change.puts and not deletes:
            return revision
        revision += 1
        db.executemany(
            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)",
            [(k, v, revision, lease) for k, v in change.puts.items()],
        )
        db.executemany("DELETE FROM records WHERE key = ?", [(k,) for k in deletes])
        db.executemany(
            "INSERT INTO history VALUES (?, ?, ?)",
            [(revision, k, v) for k, v in change.puts.items()]
            + [(revision, k, None) for k in deletes],
        )
        db.execute("UPDATE state SET number = ? WHERE name = 'revision'", (revision,))
        if revision % REMEMBERED == 0:
            self._compact(revision - REMEMBERED)
        return revision

    def _compact(self, revision: int) -> None:
        self.db.execute("DELETE FROM history WHERE revision <= ?", (revision,))
        self.db.execute(
            "UPDATE state SET number = ? WHERE name = 'compacted'", (revision,)
        )

    def _item(self, key: str) -> Item | None:
        row = self.db.execute(
            "SELECT value, revision FROM records WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Item(value=row[0], revision=row[1])

    def _end_lease(self, number: int) -> None:
        rows = self.db.execute("SELECT key FROM records WHERE lease = ?", (number,))
        self._commit(Change(deletes=frozenset(key for (key,) in rows)), None)

    def _events(
        self, prefix: str, start: int, end: str
    ) -> tuple[list[tuple[Event, ...]], int]:
        if start <= self._number("compacted"):
            raise CompactedError(
                f"the store has forgotten revision {start}; read everything again"
            )
        newest = self._number("revision")
        rows = self.db.execute(
            "SELECT revision, key, value FROM history WHERE revision >= ?"
            " AND key >= ? AND key < ? ORDER BY revision, rowid",
            (start, prefix, min(prefix + LAST, end)),
        )
        batches: dict[int, list[Event]] = {}
        for revision, key, value in rows:
            event = Event(key=key, value=value, revision=revision)
            batches.setdefault(revision, []).append(event)
        return [tuple(events) for events in batches.values()], newest
