"""
What a host keeps for itself: who it is, the outbox, and the last it knew of the store.

The *outbox* holds changes the store could not take, in order. Removing always succeeds
for Docker; what is not yet in the store is written here and replayed when it is back.
The *snapshot* is the view of a shared store as it was last, so that a daemon that
starts while the store is away serves what it served before.
"""

import asyncio
import contextlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cnmdriver.store.base import Change, Item, Listing
from cnmdriver.store.sqlite import mapped

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS snapshot (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
"""
LISTED = "listed"
"""The fact that says at which revision the store was last read whole."""


class LocalDatabase:
    """`local.db` in the state directory. Small and synchronous but for one thread."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is opened yet."""
        self.path = path
        self.thread = ThreadPoolExecutor(1, "local")
        self.connection: sqlite3.Connection | None = None
        self.host = ""

    async def open(self) -> None:
        """Open or make the file, and read or mint the host's id."""
        self.host = await self.call("open", self._open)

    async def close(self) -> None:
        """Close the file."""
        await self.call("close", self._close)
        self.thread.shutdown(wait=False)

    async def remember(self, change: Change) -> int:
        """Append a change to the outbox and return its number."""
        return await self.call("write", lambda: self._append(change))

    async def pending(self) -> list[tuple[int, Change]]:
        """Return what the outbox holds, oldest first."""
        return await self.call("read", self._pending)

    async def done(self, number: int) -> None:
        """Forget the entries up to one: they are in the store."""
        await self.call("write", lambda: self._forget(number))

    async def keep(
        self, changed: Mapping[str, Item | None], listed: int, facts: Mapping[str, str]
    ) -> None:
        """Bring the snapshot up to date; an Item None says that its key is gone."""
        await self.call("write", lambda: self._keep(changed, listed, facts))

    async def snapshot(self) -> Listing:
        """Return what was kept, and the revision of the store's last whole reading."""
        return await self.call("read", self._snapshot)

    async def fact(self, name: str) -> str:
        """Return something the host noted, "" if it did not."""
        return await self.call("read", lambda: self._fact(name))

    async def call(self, doing: str, work: Callable[[], T]) -> T:
        """Run blocking work in the thread."""

        def mapped_work() -> T:
            with mapped(doing, self.path):
                return work()

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, mapped_work)

    @property
    def db(self) -> sqlite3.Connection:
        """The open connection."""
        if self.connection is None:
            raise sqlite3.ProgrammingError("not open")
        return self.connection

    def _open(self) -> str:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=2
        )
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.executescript(SCHEMA)
        self.db.execute(
            "INSERT OR IGNORE INTO facts VALUES ('host', ?)", (secrets.token_hex(8),)
        )
        return self._fact("host")

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _append(self, change: Change) -> int:
        puts = {key: value.decode() for key, value in change.puts.items()}
        text = json.dumps({"puts": puts, "deletes": sorted(change.deletes)})
        row = self.db.execute("INSERT INTO outbox (change) VALUES (?)", (text,))
        return int(row.lastrowid or 0)

    def _pending(self) -> list[tuple[int, Change]]:
        rows = self.db.execute("SELECT number, change FROM outbox ORDER BY number")
        return [(number, _read(text)) for number, text in rows]

    def _forget(self, number: int) -> None:
        self.db.execute("DELETE FROM outbox WHERE number <= ?", (number,))

    def _keep(
        self, changed: Mapping[str, Item | None], listed: int, facts: Mapping[str, str]
    ) -> None:
        gone = [(key,) for key, item in changed.items() if item is None]
        rows = [
            (key, item.value.decode(), item.revision)
            for key, item in changed.items()
            if item is not None
        ]
        noted = [(LISTED, str(listed)), *facts.items()]
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self.db.executemany("DELETE FROM snapshot WHERE key = ?", gone)
            self.db.executemany(
                "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?)", rows
            )
            self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", noted)
        except BaseException:
            # A full disk has ended it already.
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def _snapshot(self) -> Listing:
        rows: Iterable[tuple[str, str, int]] = self.db.execute("SELECT * FROM snapshot")
        items = {k: Item(value=v.encode(), revision=r) for k, v, r in rows}
        return Listing(items=items, revision=int(self._fact(LISTED) or 0))

    def _fact(self, name: str) -> str:
        found = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,))
        row = found.fetchone()
        return "" if row is None else str(row[0])


def _read(text: str) -> Change:
    found = json.loads(text)
    return Change(
        puts={key: value.encode() for key, value in found["puts"].items()},
        deletes=frozenset(found["deletes"]),
    )
