"""
What a host keeps for itself: who it is, the outbox, and the last it knew of the store.

The *outbox* holds changes the store could not take, in order. Removing always succeeds
for Docker; what is not yet in the store is written here and replayed when it is back.
The *snapshot* is the view of a shared store as it was last, so that a daemon that
starts while the store is away serves what it served before.

A broken file is rebuilt when it is opened (`mending.py`). The host's id is in a file of
its own besides: whoever loses it is a stranger to his own records and devices. A file
that is not there at all was removed by somebody who wanted a new id.
"""

import asyncio
import contextlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog

from cnmdriver.errors import InvalidParameter
from cnmdriver.store import mending
from cnmdriver.store.base import Change, Item, Listing
from cnmdriver.store.sqlite import PAGES, kept_for_removals, mapped

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (
    name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS snapshot (
    key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
"""
UNSUMMED = "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
"""How the first files began, whose rows had no checksums."""
LISTED = "listed"
"""The fact that says at which revision the store was last read whole."""
HOST = "host"
"""The fact that says who this host is."""
VERSION = 1
"""Of the tables: 0 had no checksums, and of the first 1 no fact tells."""
SCHEMA_FACT = "schema"
"""The fact that says which version it is."""
WHAT = "the local database"
COPY = "host-id"
"""The file beside the database that says so, too."""
MARK = 8
"""Characters of a host's id that its devices carry."""

log = structlog.get_logger()


@dataclass(slots=True)
class Content:
    """What is sound in a file, and what is wrong with it."""

    facts: dict[str, str] = field(default_factory=dict)
    outbox: list[str] = field(default_factory=list)
    snapshot: list[tuple[str, str, int]] = field(default_factory=list)
    damage: str = ""
    old: bool = False
    version: int = VERSION


def content(image: mending.Image) -> Content:
    """Look at every row of a file."""
    with mending.loaded(image) as db:
        made = mending.tables(db)
        old = made.get("facts") == UNSUMMED
        damage = image.damage or mending.fault(db)
        if not damage and not old and made and made != mending.made_by(SCHEMA):
            damage = "its tables have changed"
        found = Content(damage=damage, old=old)
        lost = take(db, found)
    if found.damage and image.data and not old:
        with mending.loaded(mending.with_tables(image, SCHEMA)) as db:
            lost += take(db, found)
    with contextlib.suppress(ValueError):
        found.version = int(found.facts.get(SCHEMA_FACT, found.version))
    if lost:
        found.damage = found.damage or "what it holds has changed"
    if found.damage:
        # Of what others have, a part is worse than nothing: it looks free.
        found.snapshot = []
        found.facts = {name: v for name, v in found.facts.items() if name == HOST}
    return found


def take(db: sqlite3.Connection, found: Content) -> int:
    """Take over the sound rows of all tables; return how many are not."""
    tables = ("facts", "outbox", "snapshot")
    rows = {name: mending.salvage(db, name) for name in tables}
    good = {name: [r for r in rows[name] if sound(name, r, found.old)] for name in rows}
    found.facts |= {row[0]: row[1] for row in good["facts"]}
    changes = {row[0]: row[1] for row in good["outbox"]}
    found.outbox = found.outbox or [changes[number] for number in sorted(changes)]
    found.snapshot = [(row[0], row[1], row[2]) for row in good["snapshot"]]
    return sum(len(rows[name]) - len(good[name]) for name in tables)


def sound(table: str, row: tuple[Any, ...], old: bool) -> bool:
    """Tell whether a row is as it was written."""
    if old:
        return all(isinstance(part, str | int) for part in row)
    *parts, told = row
    # An entry's number is given by the database, and says no more than its order.
    summed = parts[1:] if table == "outbox" else parts
    return bool(told == mending.checksum(*summed) != -1)


def recognize(marks: Iterable[str], hosts: Iterable[str]) -> str:
    """
    Return who this host must be, by its devices and the store's hosts, "" if unclear.

    `marks` are the beginnings of ids that the aliases of found devices carry, `hosts`
    the ids of the hosts in the store.
    """
    found = {mark[:MARK] for mark in marks}
    if len(found) != 1:
        return ""
    (mark,) = found
    fitting = [host for host in hosts if host.startswith(mark)]
    return fitting[0] if len(fitting) == 1 else ""


def copied_host(state_dir: Path) -> str:
    """Return the id that the file beside the database tells, "" if it tells none."""
    with contextlib.suppress(OSError, ValueError):
        host, told = (state_dir / COPY).read_text().split()
        if told == str(mending.checksum(host)):
            return host
    return ""


class LocalDatabase:
    """`local.db` in the state directory. Small and synchronous but for one thread."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is opened yet."""
        self.path = path
        self.thread = ThreadPoolExecutor(1, "local")
        self.connection: sqlite3.Connection | None = None
        self.host = ""
        self.mended = ""
        """What was wrong with the file when it was opened, in a sentence."""
        self.estranged = False
        """Whether the id is new because the old one could not be read."""
        self.reserve = mending.Reserve(path.with_name(path.name + ".reserve"))

    async def open(self) -> None:
        """
        Open or make the file, and read or mint the host's id.

        A broken one is rebuilt of what can be read: `mended` then says so.
        """
        self.host = await self.call("open", self._open)

    async def close(self) -> None:
        """Close the file."""
        await self.call("close", self._close)
        self.thread.shutdown(wait=False)

    async def adopt(self, host: str) -> None:
        """Be another host from now on: the one that was recognized."""
        await self.call("write", lambda: self._name(host))
        self.host, self.estranged = host, False

    async def remember(self, change: Change, *, taking: bool = False) -> int:
        """
        Append a change to the outbox and return its number.

        On a full disk there is still room for what takes back, not for `taking`.
        """
        if taking:
            return await self.call("write", lambda: self._append_more(change))
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
        """
        Bring the snapshot up to date; an Item None says that its key is gone.

        If the disk is full, what is gone goes all the same, but the facts are dropped:
        what the rest says may be over. StoreError is raised.
        """
        await self.call("write", lambda: self._keep(changed, listed, facts))

    async def snapshot(self) -> Listing:
        """Return what was kept, and the revision of the store's last whole reading."""
        return await self.call("read", self._snapshot)

    async def trouble(self) -> str:
        """Say what keeps the disk from taking anything new, "" if nothing does."""
        return await self.call("read", self.reserve.trouble)

    async def fact(self, name: str) -> str:
        """Return something the host noted, "" if it did not."""
        return await self.call("read", lambda: self._fact(name))

    async def call(self, doing: str, work: Callable[[], T]) -> T:
        """Run blocking work in the thread."""

        def mapped_work() -> T:
            with mapped(doing, WHAT, self.path):
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
        try:
            host = self._begin()
        except sqlite3.Error as error:
            self._close()
            if not mending.is_full(error):
                raise
            self.reserve.release()
            host = self._begin()
        self.reserve.hold()
        self._copy(host)
        return host

    def _begin(self) -> str:
        self._check()
        self.connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=2
        )
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute(f"PRAGMA wal_autocheckpoint = {PAGES}")
        self.db.executescript(SCHEMA)
        mending.check_writable(self.db)
        if not self._fact(HOST):
            self._name(secrets.token_hex(8))
        if not self._fact(SCHEMA_FACT):
            self._note({SCHEMA_FACT: str(VERSION)})
        return self._fact(HOST)

    def _check(self) -> None:
        if not self.path.is_file():
            return
        image = mending.read_image(self.path)
        copied = self._copied()
        if not image.data and not copied:
            # Its first opening was cut short.
            return
        found = content(image)
        if found.version > VERSION:
            raise InvalidParameter(
                f"the local database {self.path} has schema {found.version}, this "
                f"pynet knows {VERSION}; use the newer pynet, or put the file it was "
                f"made from in its place: {self.path.name}.schema-{VERSION}"
            )
        if found.old and not found.damage:
            kept = mending.back_up(self.path, image, 0)
            log.info("local.migrated", path=str(self.path), backup=str(kept))
        if found.damage or found.old:
            known = found.facts.setdefault(HOST, copied)
            self.estranged = not known
            self._rebuild(found)

    def _rebuild(self, found: Content) -> None:
        fresh = mending.draft(self.path)
        with closing(sqlite3.connect(fresh, isolation_level=None)) as db:
            fill(db, found)
        if found.damage:
            kept = mending.keep(self.path)
            self.mended = (
                f"the local database {self.path} was broken ({found.damage}): "
                f"{self._saved(found)}; the broken file is kept as {kept.name}"
            )
            log.error("local.mended", path=str(self.path), why=self.mended)
        mending.swap(self.path, fresh)

    def _saved(self, found: Content) -> str:
        """Say what of a broken file is not lost."""
        number = len(found.outbox)
        if self.estranged:
            return (
                f"this host's id is lost and another one taken, and {number} changes "
                "that wait for the store could be taken over; remove what this host "
                "had before with pynet host rm"
            )
        return (
            f"this host's id and {number} changes that wait for the store could be "
            "taken over, others, if any waited, are lost"
        )

    def _name(self, host: str) -> None:
        self._note({HOST: host})
        self._copy(host)

    def _note(self, facts: Mapping[str, str]) -> None:
        rows = [(n, value, mending.checksum(n, value)) for n, value in facts.items()]
        self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", rows)

    def _copied(self) -> str:
        return copied_host(self.path.parent)

    def _copy(self, host: str) -> None:
        """Write that file, if there is room."""
        if self._copied() == host:
            return
        with contextlib.suppress(OSError):
            fresh = self.path.with_name(f"{COPY}.new")
            fresh.write_text(f"{host} {mending.checksum(host)}\n")
            mending.put_in_place(self.path.with_name(COPY), fresh)

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _append_more(self, change: Change) -> int:
        if not self.reserve.hold():
            raise kept_for_removals(WHAT, self.path)
        return self._insert(change)

    def _append(self, change: Change) -> int:
        try:
            return self._insert(change)
        except sqlite3.Error as error:
            if not mending.is_full(error):
                raise
        self._make_room()
        return self._insert(change)

    def _make_room(self) -> None:
        self.reserve.release()
        # The log's pages go into the file, and the log begins anew where it was.
        self.db.execute("PRAGMA wal_checkpoint(RESTART)")

    def _insert(self, change: Change) -> int:
        puts = {key: value.decode() for key, value in change.puts.items()}
        text = json.dumps({"puts": puts, "deletes": sorted(change.deletes)})
        row = self.db.execute(
            "INSERT INTO outbox (change, checksum) VALUES (?, ?)",
            (text, mending.checksum(text)),
        )
        return int(row.lastrowid or 0)

    def _pending(self) -> list[tuple[int, Change]]:
        rows = self.db.execute("SELECT number, change FROM outbox ORDER BY number")
        return [(number, _read(text)) for number, text in rows]

    def _forget(self, number: int) -> None:
        self.db.execute("DELETE FROM outbox WHERE number <= ?", (number,))
        self.reserve.hold()

    def _keep(
        self, changed: Mapping[str, Item | None], listed: int, facts: Mapping[str, str]
    ) -> None:
        try:
            self._keep_all(changed, {LISTED: str(listed), **facts})
        except sqlite3.Error as error:
            if mending.is_full(error):
                self._make_room()
                gone = {key: None for key, item in changed.items() if item is None}
                self._keep_all(gone, dict.fromkeys(facts, ""))
            raise
        self.reserve.hold()

    def _keep_all(
        self, changed: Mapping[str, Item | None], facts: Mapping[str, str]
    ) -> None:
        gone = [(key,) for key, item in changed.items() if item is None]
        rows = [
            summed(key, item.value.decode(), item.revision)
            for key, item in changed.items()
            if item is not None
        ]
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self.db.executemany("DELETE FROM snapshot WHERE key = ?", gone)
            self.db.executemany(
                "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?, ?)", rows
            )
            self._note(facts)
        except BaseException:
            # A full disk has ended it already.
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def _snapshot(self) -> Listing:
        rows: Iterable[tuple[str, str, int]] = self.db.execute(
            "SELECT key, value, revision FROM snapshot"
        )
        items = {k: Item(value=v.encode(), revision=r) for k, v, r in rows}
        return Listing(items=items, revision=int(self._fact(LISTED) or 0))

    def _fact(self, name: str) -> str:
        found = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,))
        row = found.fetchone()
        return "" if row is None else str(row[0])


def fill(db: sqlite3.Connection, found: Content) -> None:
    """Write into a new file what is sound of another one."""
    facts = [
        (name, value, mending.checksum(name, value))
        for name, value in found.facts.items()
        if value
    ]
    changes = [(text, mending.checksum(text)) for text in found.outbox]
    db.executescript(SCHEMA)
    db.execute("BEGIN IMMEDIATE")
    db.executemany("INSERT INTO facts VALUES (?, ?, ?)", facts)
    db.executemany("INSERT INTO outbox (change, checksum) VALUES (?, ?)", changes)
    rows = [summed(*row) for row in found.snapshot]
    db.executemany("INSERT INTO snapshot VALUES (?, ?, ?, ?)", rows)
    db.execute("COMMIT")


def summed(key: str, value: str, revision: int) -> tuple[str, str, int, int]:
    """Return a row of the snapshot."""
    return key, value, revision, mending.checksum(key, value, revision)


def _read(text: str) -> Change:
    found = json.loads(text)
    return Change(
        puts={key: value.encode() for key, value in found["puts"].items()},
        deletes=frozenset(found["deletes"]),
    )
