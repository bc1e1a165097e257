"""
What is done about a database file that a disk, a crash or a hand has broken.

A file is looked at *before* SQLite opens it, as an image in memory: the file with the
committed part of its log on top. What reads there and carries a right checksum can be
taken over into a new file; the broken one is kept beside it under another name. Nothing
is repaired in place, so that whatever goes wrong here can be tried again.

SQLite finds what is wrong with a file's structure, not a flipped byte in a value: for
that rows have a checksum of their own. A damaged log ends silently for SQLite, before
the damage; here the commits behind it are counted.
"""

import contextlib
import errno
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MAGIC = b"SQLite format 3\0"
PAGE = 4096
ROLLBACK, WAL = b"\1\1", b"\2\2"
FRACTIONS = bytes((0, 64, 32, 32))
"""Bytes 20 to 23 of every SQLite file."""
LONGEST = 1 << 16
"""Pages that a broken header is believed to announce."""
LOG_HEADER, FRAME_HEADER = 32, 24
KEPT = 3
"""Broken files that are kept: the first ones, which have the most, and the last."""
RESERVED = 512 * 1024
"""Bytes that are kept free for removals: more than what a log may hold."""
ROOM = 64 * 1024
"""Bytes without which a disk counts as full."""
PROBE = ".probe"
"""The file that finds that out, and is gone at once."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
UNREADABLE = (sqlite3.Error, UnicodeError)
"""What reading a broken file raises; SQLite's own words may be broken, too."""
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What a file and its log hold together, and what is wrong with it."""

    data: bytes
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """The pages that were committed to a log."""

    pages: dict[int, bytes]
    damage: str = ""


def checksum(*parts: Any) -> int:
    """Return a row's checksum; -1, which no row has, if it cannot have one."""
    total = 0
    for part in parts:
        kind = type(part)
        if kind not in {str, int, bytes}:
            return -1
        data = part if kind is bytes else str(part).encode(errors="surrogateescape")
        total = zlib.crc32(data + b"\0", total)
    return total


def read_image(path: Path) -> Image:
    """Read a file and its log; raises OSError."""
    data = bytearray(path.read_bytes())
    log = read_log(path.with_name(path.name + "-wal"))
    for number, page in sorted(log.pages.items()):
        start = (number - 1) * len(page)
        data.extend(bytes(max(0, start + len(page) - len(data))))
        data[start : start + len(page)] = page
    if not data:
        return Image(data=b"", damage="it is empty")
    damage = "" if sound_header(data) else "its header is damaged"
    mended = with_header(data)
    return Image(data=mended, damage=damage or log.damage)


def sound_header(data: bytes | bytearray) -> bool:
    """Tell whether the first bytes are those of every SQLite file."""
    return (
        len(data) >= PAGE
        and data[:16] == MAGIC
        and int.from_bytes(data[16:18]) == PAGE
        and bytes(data[18:20]) in {ROLLBACK, WAL}
        and data[20:24] == FRACTIONS
    )


def with_header(data: bytearray) -> bytes:
    """Return an image that SQLite takes from memory: whole, and without a log."""
    data[:24] = MAGIC + PAGE.to_bytes(2) + ROLLBACK + FRACTIONS
    pages = int.from_bytes(data[28:32])
    size = max(len(data), PAGE * pages if pages <= LONGEST else 0)
    size += -size % PAGE
    return bytes(data.ljust(size, b"\0"))


# The log (https://sqlite.org/walformat.html).


def read_log(path: Path) -> Log:
    """Read a log up to its last whole commit."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Log({})
    if len(data) <= LOG_HEADER + FRAME_HEADER:
        return Log({})
    order = ">" if data[3] & 1 else "<"
    last = summed(order, data[:24])
    magic, _, size = struct.unpack(">3I", data[:12])
    if struct.pack(">2I", *last) != data[24:32] or magic & ~1 != 0x377F0682:
        return Log({}, damage="the header of its log is damaged")
    return read_frames(list(frames(data, size)), data[16:24], order, last)


def frames(data: bytes, size: int) -> Iterator[bytes]:
    """Yield the frames of a log, each a header and a page."""
    bounds = range(LOG_HEADER, len(data) + 1, FRAME_HEADER + size)
    for begin, end in pairwise(bounds):
        yield data[begin:end]


def read_frames(
    found: list[bytes], salts: bytes, order: str, last: tuple[int, int]
) -> Log:
    """Return what is committed before the first frame that is not of this log."""
    committed: dict[int, bytes] = {}
    begun: dict[int, bytes] = {}
    number = 0
    for frame in found:
        page, commit = struct.unpack(">2I", frame[:8])
        last = summed(order, frame[:8] + frame[FRAME_HEADER:], last)
        if frame[8:16] != salts or struct.pack(">2I", *last) != frame[16:24]:
            break
        number += 1
        begun[page] = frame[FRAME_HEADER:]
        if commit:
            committed |= begun
            begun = {}
    lost = commits_behind(found[number:], salts)
    damage = f"its log is damaged before its last {lost} commits" if lost else ""
    return Log(committed, damage)


def commits_behind(found: Iterable[bytes], salts: bytes) -> int:
    """
    Count the commits behind the end of a log, if they prove that it is damaged.

    What a death tears is the last transaction, which nobody was told of.
    """
    marks = [frame[4:8] != bytes(4) for frame in found if frame[8:16] == salts]
    torn = marks.index(True) if True in marks else len(marks)
    return sum(marks) if marks[torn + 1 :] else 0


def summed(order: str, data: bytes, start: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Return the checksum that logs have."""
    one, two = start
    words = struct.iter_unpack(f"{order}2I", data)
    for left, right in words:
        one = (one + left + two) & 0xFFFFFFFF
        two = (two + right + one) & 0xFFFFFFFF
    return one, two


# What an image holds.


@contextmanager
def loaded(image: Image) -> Iterator[sqlite3.Connection]:
    """Open an image in memory."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.text_factory = lambda text: text.decode(errors="surrogateescape")
        if image.data:
            db.deserialize(image.data)
        yield db


def fault(db: sqlite3.Connection) -> str:
    """Return what is wrong with a database's structure, "" if nothing is."""
    try:
        (text,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except UNREADABLE as error:
        return str(error)
    return "" if text == "ok" else " ".join(str(text).split())


def tables(db: sqlite3.Connection) -> dict[str, str]:
    """Return how each table was made, as far as that can be read."""
    made: dict[str, str] = {}
    with contextlib.suppress(*UNREADABLE):
        for name, sql in db.execute("SELECT name, sql FROM sqlite_master"):
            if sql is not None:
                made[str(name)] = str(sql)
    return made


def made_by(schema: str) -> dict[str, str]:
    """Return how each table is made by a schema."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(schema)
        return tables(db)


def with_tables(image: Image, schema: str) -> Image:
    """Return an image whose first page says that its tables are made by a schema."""
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(schema)
        first = db.serialize()[:PAGE]
    # The header has the file's size, and what follows it the tables' places.
    return Image(data=image.data[:100] + first[100:] + image.data[PAGE:])


def salvage(db: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    """Return the rows of a table up to a broken place, from either end."""
    rows: dict[tuple[Any, ...], None] = {}
    for order in ("ASC", "DESC"):
        try:
            for row in db.execute(f"SELECT * FROM {table} ORDER BY 1 {order}"):  # noqa: S608
                rows[row] = None
        except UNREADABLE:
            continue
        break
    return list(rows)


# Files.


def keep(path: Path) -> Path:
    """Give a broken file and its log another name beside it; return that."""
    names = [path.with_name(f"{path.name}.broken-{n}") for n in range(1, KEPT + 1)]
    kept = next((name for name in names if not name.exists()), names[-1])
    kept.unlink(missing_ok=True)
    os.link(path, kept)
    log = path.with_name(path.name + "-wal")
    if log.exists():
        # A log that stayed would be taken for that of the new file.
        log.replace(kept.with_name(kept.name + "-wal"))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    return kept


def back_up(path: Path, image: Image, schema: int) -> Path:
    """Keep what a file of an older schema holds beside it; return where."""
    kept = path.with_name(f"{path.name}.schema-{schema}")
    fresh = kept.with_name(kept.name + ".new")
    fresh.write_bytes(image.data)
    put_in_place(kept, fresh)
    return kept


def draft(path: Path) -> Path:
    """Name the file that is to replace another one, and see that it is not there."""
    fresh = path.with_name(path.name + ".new")
    for suffix in ("", "-journal"):
        fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    return fresh


def swap(path: Path, fresh: Path) -> None:
    """Put a new file in an old one's place, and its log out of the way."""
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    put_in_place(path, fresh)


def put_in_place(path: Path, fresh: Path) -> None:
    """Replace a file by a new one, at once and lastingly."""
    flush(fresh)
    fresh.replace(path)
    flush(path.parent)


def flush(place: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk is full."""
    return getattr(error, "sqlite_errorcode", None) in FULL


def full(directory: Path) -> str:
    """Say that a disk is full, and what to do."""
    return f"the disk that holds {directory} is full: make room there"


def advice(error: Exception, directory: Path) -> str:
    """Say what to do about an error of SQLite's or the file system's."""
    # The room that was kept may be free by now.
    if is_full(error):
        return full(directory)
    found = trouble(directory) if directory.is_dir() else ""
    return found or "check the disk and the file's permissions"


def trouble(directory: Path) -> str:
    """Say what keeps a disk from taking anything new, "" if nothing does."""
    path = directory / PROBE
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
        try:
            path.unlink()
            os.posix_fallocate(descriptor, 0, ROOM)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in NO_ROOM:
            return full(directory)
        return (
            f"the disk that holds {directory} takes no writes "
            f"({os.strerror(error.errno or errno.EIO)}): mend it or mount it writable"
        )
    return ""


def check_writable(db: sqlite3.Connection) -> None:
    """Raise what a write would: SQLite opens a read-only file as it is, for good."""
    db.execute("BEGIN IMMEDIATE")
    try:
        db.execute("PRAGMA user_version = 0")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


class Reserve:
    """Room on the disk that is given up so that what takes back can be written."""

    def __init__(self, path: Path) -> None:
        """Name the file that holds the room."""
        self.path = path
        self.held = False

    def hold(self) -> bool:
        """Take the room if it is not held, and tell whether it is."""
        if not self.held:
            with contextlib.suppress(OSError):
                self.take()
                self.held = True
        return self.held

    def trouble(self) -> str:
        """Say what keeps the disk from taking anything new, "" if nothing does."""
        directory = self.path.parent
        found = trouble(directory)
        if not found and not self.hold():
            # There is room because it was given up, and for removals alone.
            return full(directory)
        return found

    def take(self) -> None:
        """Take the room, or none of it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVED)
        except OSError:
            os.ftruncate(descriptor, 0)
            raise
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Give the room up; raises OSError."""
        self.held = False
        if self.path.exists():
            os.truncate(self.path, 0)
