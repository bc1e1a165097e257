"""
The embedded store: one SQLite file, one host, nothing to install.

All access is by one worker thread, as SQLite calls block. A write is on the disk when
it is answered (WAL, synchronous FULL). A lock beside the file keeps a second daemon
out: two would not see each other's watches.

Leases and what a watch may go back to live in this process: an earlier one's leases are
over when the file is opened, and its watches have ended.

A broken file is rebuilt when it is opened (`mending.py`). On a full disk nothing more
is taken in, but what takes back is written, into room that is kept free for it.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import structlog

from cnmdriver.errors import InvalidParameter, StoreError
from cnmdriver.store import mending
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
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL,
    lease INTEGER, checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
    name TEXT PRIMARY KEY, number INTEGER NOT NULL, checksum INTEGER NOT NULL
);
"""
VERSION = 2
"""Of the tables. What is older (1: rows without checksums) is rebuilt when opened."""
ITS_OWN = "history"
"""A table that only it had."""
REMEMBERED = 1000
"""How many revisions a watch may start behind the newest."""
PAGES = 100
"""Pages in the log at which it is written into the file; a reserve can hold them."""
SLACK = 8
"""Bytes by which a record may grow and still take something back."""
HIGHEST = 1 << 62
"""No revision is as high as that."""
LIMIT = 3.0
"""Seconds a store operation may take."""
WHAT = "the embedded store"
LAST = "\U0010ffff"
"""Behind every key that starts like what stands before it."""

log = structlog.get_logger()


@contextlib.contextmanager
def mapped(doing: str, what: str, path: Path) -> Iterator[None]:
    """Turn SQLite's and the file system's errors into ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        advice = mending.advice(error, path.parent)
        raise StoreError(f"cannot {doing} {what} {path}: {error}; {advice}") from error


def kept_for_removals(what: str, path: Path) -> StoreError:
    """Make the refusal of what would take the last room."""
    return StoreError(
        f"cannot write {what} {path}: the disk that holds {path.parent} is full, its "
        "last room is kept for removals; make room there"
    )


@dataclass(slots=True)
class Content:
    """What is sound in a file, and what is wrong with it."""

    records: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    revision: int = 0
    version: int = VERSION
    damage: str = ""


def content(image: mending.Image) -> Content:
    """Look at every row of a file; raises StoreError if it is not one of ours."""
    with mending.loaded(image) as db:
        found = mending.tables(db)
        damage = image.damage or mending.fault(db) or unlike_ours(found)
        numbers = mending.salvage(db, "state")
        rows = mending.salvage(db, "records")
    if damage and image.data and ITS_OWN not in found:
        with mending.loaded(mending.with_tables(image, SCHEMA)) as db:
            numbers += mending.salvage(db, "state")
            rows += mending.salvage(db, "records")
    state = {row[0]: row[1] for row in numbers if sound(row)}
    good = {row[0]: (row[1], row[2]) for row in rows if sound(row)}
    highest = max((revision for _, revision in good.values()), default=0)
    revision = state.get("revision", -1) if found else 0
    version = state.get("schema", 0) if found else VERSION
    complete = len(good) + len(state) == len(rows) + len(numbers)
    if not (complete and version and highest <= revision < HIGHEST):
        damage = damage or "what it holds has changed"
    return Content(good, max(revision, highest), version or VERSION, damage)


def unlike_ours(found: Mapping[str, str]) -> str:
    """Say if tables are not made as ours; raises StoreError if they are another's."""
    ours = mending.made_by(SCHEMA)
    if not found or found == ours or ITS_OWN in found:
        return ""
    if not ours.keys() & found.keys():
        raise StoreError("another program's database; name another file")
    return "its tables have changed"


def sound(row: tuple[Any, ...]) -> bool:
    """Tell whether a row is as it was written: a record, or a number."""
    match row:
        case (str(), int()):
            return True
        case (str() as name, int() as number, int() as told):
            return told == mending.checksum(name, number)
        case (str(), bytes(), int(), None | int()):
            return True
        case (str() as key, bytes() as value, int() as revision, _, int() as told):
            return told == mending.checksum(key, value, revision)
    return False


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
        self.mended = ""
        """What was wrong with the file when it was opened, in a sentence."""
        self.thread = ThreadPoolExecutor(1, "store")
        self.connection: sqlite3.Connection | None = None
        self.lock: IO[bytes] | None = None
        self.reserve = mending.Reserve(path.with_name(path.name + ".reserve"))
        self.history: deque[tuple[Event, ...]] = deque()
        self.compacted = 0
        self.newest = 0
        self.written = asyncio.Condition()
        self.closed = False
        self.leases = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """
        Open or make the file; raises StoreError if another daemon has it.

        A broken one is rebuilt of what can be read: `mended` then says so.
        """
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

    def reread(self) -> None:
        """Do nothing: there is no login."""

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
                batches, newest = self.events(prefix, start, end or LAST)
                if not batches:
                    start = max(start, newest + 1)
                    if not self.closed:
                        await self.written.wait()
                    continue
            for batch in batches:
                yield batch
            start = batches[-1][0].revision + 1

    def events(
        self, prefix: str, start: int, end: str
    ) -> tuple[list[tuple[Event, ...]], int]:
        """Return the commits from a revision on that touched a prefix, and the last."""
        # Read in this order: the thread writes them the other way round.
        newest, history = self.newest, tuple(self.history)
        if start <= self.compacted:
            raise CompactedError(
                f"the store has forgotten revision {start}; read everything again"
            )
        first, behind = prefix, min(prefix + LAST, end)
        batches = []
        for events in reversed(history):
            if events[0].revision < start:
                break
            batch = tuple(event for event in events if first <= event.key < behind)
            if batch:
                batches.append(batch)
        return batches[::-1], newest

    async def lease(self, ttl: float) -> Lease:
        """Make a lease."""
        self.leases += 1
        return SqliteLease(self, self.leases, ttl)

    async def trouble(self) -> str:
        """Say what keeps the disk from taking anything new, "" if nothing does."""
        return await self.call("read", self.reserve.trouble)

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
            with mapped(doing, WHAT, self.path):
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
        self.path = self.path.resolve()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take(self.path.with_name(self.path.name + ".lock"))
        try:
            self._begin_with_room()
        except BaseException:
            self._close()
            raise
        self.reserve.hold()

    def _take(self, path: Path) -> None:
        self.lock = path.open("a+b")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read(20).decode(errors="replace").strip() or "unknown"
            self.lock.close()
            raise StoreError(
                f"another pynet has the embedded store {self.path} (pid {holder}); "
                "stop it, or use a shared store (--store etcd://…) for several"
            ) from None
        # Who comes second is told the pid; without it the lock is as good.
        with contextlib.suppress(OSError):
            self.lock.truncate(0)
            self.lock.write(f"{os.getpid()}\n".encode())
            self.lock.flush()

    def _begin_with_room(self) -> None:
        try:
            self._begin()
        except sqlite3.Error as error:
            if not mending.is_full(error):
                raise
            self._disconnect()
            self.reserve.release()
            self._begin()

    def _begin(self) -> None:
        self._check()
        self.connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=2
        )
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute(f"PRAGMA wal_autocheckpoint = {PAGES}")
        self._make(self.db, Content())
        mending.check_writable(self.db)
        self.compacted = self.newest = self._number("revision")
        leased = [k for (k,) in self.db.execute(
            "SELECT key FROM records WHERE lease IS NOT NULL"
        )]  # fmt: skip
        if leased:
            self._commit(Change(deletes=frozenset(leased)), None)

    def _check(self) -> None:
        if not self.path.is_file():
            return
        image = mending.read_image(self.path)
        # It is beside every file that was open once.
        ours = self.reserve.path.exists()
        if not image.data and not ours:
            # Its first opening was cut short.
            return
        try:
            found = content(image)
        except StoreError as error:
            raise StoreError(f"the embedded store {self.path} is {error}") from None
        if found.version > VERSION:
            raise InvalidParameter(
                f"the embedded store {self.path} has schema {found.version}, this "
                f"pynet knows {VERSION}; use the newer pynet, or put the file it was "
                f"made from in its place: {self.path.name}.schema-{VERSION}"
            )
        if found.damage and not ours:
            raise StoreError(
                f"cannot open the embedded store {self.path}: {found.damage}, and it "
                "is left alone as pynet never used it; name another file or remove it"
            )
        if found.version < VERSION and not found.damage:
            kept = mending.back_up(self.path, image, found.version)
            log.info("store.migrated", path=str(self.path), backup=str(kept))
        if found.damage or found.version < VERSION:
            self._rebuild(found)

    def _rebuild(self, found: Content) -> None:
        fresh = mending.draft(self.path)
        with closing(sqlite3.connect(fresh, isolation_level=None)) as db:
            self._make(db, found)
        if found.damage:
            kept = mending.keep(self.path)
            self.mended = (
                f"the embedded store {self.path} was broken ({found.damage}): "
                f"{len(found.records)} records could be taken over, what else it held "
                f"is lost; the broken file is kept as {kept.name}"
            )
            log.error("store.mended", path=str(self.path), why=self.mended)
        mending.swap(self.path, fresh)

    def _make(self, db: sqlite3.Connection, found: Content) -> None:
        rows = [
            (k, v, r, None, mending.checksum(k, v, r))
            for k, (v, r) in found.records.items()
        ]
        # No revision that somebody may have seen is used again.
        numbers = (("revision", found.revision), ("schema", VERSION))
        state = [(name, n, mending.checksum(name, n)) for name, n in numbers]
        db.executescript(SCHEMA)
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?)", rows)
        db.executemany("INSERT OR IGNORE INTO state VALUES (?, ?, ?)", state)
        db.execute("COMMIT")

    def _close(self) -> None:
        self._disconnect()
        if self.lock is not None:
            self.lock.close()

    def _disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

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
        if not self._takes_back(change) and not self.reserve.hold():
            raise kept_for_removals(WHAT, self.path)
        try:
            return self._transact(change, lease)
        except sqlite3.Error as error:
            if not mending.is_full(error) or not self._takes_back(change):
                raise
        self.reserve.release()
        # The log's pages go into the file, and the log begins anew where it was.
        self.db.execute("PRAGMA wal_checkpoint(RESTART)")
        return self._transact(change, lease)

    def _takes_back(self, change: Change) -> bool:
        """Tell whether a change makes what is stored no larger, or hardly so."""
        for key, value in change.puts.items():
            item = self._item(key)
            if item is None or len(value) > len(item.value) + SLACK:
                return False
        return True

    def _transact(self, change: Change, lease: int | None) -> int:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            events, revision = self._write(change, lease)
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
        if events:
            self.history.append(events)
        self.newest = revision
        if len(self.history) > REMEMBERED:
            self._compact(self.history[0][0].revision)
        return revision

    def _write(
        self, change: Change, lease: int | None
    ) -> tuple[tuple[Event, ...], int]:
        db, revision = self.db, self._number("revision")
        current = {key: self._item(key) for key in change.expect}
        if any(
            (item.revision if item else 0) != change.expect[key]
            for key, item in current.items()
        ):
            raise RaceLostError(current, revision)
        deletes = [k for k in sorted(change.deletes) if self._item(k) is not None]
        if not change.puts and not deletes:
            return (), revision
        revision += 1
        rows = [
            (k, v, revision, lease, mending.checksum(k, v, revision))
            for k, v in change.puts.items()
        ]
        db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", rows)
        db.executemany("DELETE FROM records WHERE key = ?", [(k,) for k in deletes])
        db.execute(
            "UPDATE state SET number = ?, checksum = ? WHERE name = 'revision'",
            (revision, mending.checksum("revision", revision)),
        )
        written = [(k, v) for k, v in change.puts.items()]
        events = [*written, *((k, None) for k in deletes)]
        return tuple(
            Event(key=k, value=v, revision=revision) for k, v in events
        ), revision

    def _compact(self, revision: int) -> None:
        self.compacted = max(self.compacted, revision)
        while self.history and self.history[0][0].revision <= revision:
            self.history.popleft()

    def _item(self, key: str) -> Item | None:
        row = self.db.execute(
            "SELECT value, revision FROM records WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else Item(value=row[0], revision=row[1])

    def _end_lease(self, number: int) -> None:
        rows = self.db.execute("SELECT key FROM records WHERE lease = ?", (number,))
        self._commit(Change(deletes=frozenset(key for (key,) in rows)), None)
