"""What a host keeps for itself: its id and the outbox, over every restart."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cnmdriver.errors import StoreError
from cnmdriver.store.base import Change
from cnmdriver.store.local import LocalDatabase

ONE = Change(puts={"members/n/a": b"1"})
TWO = Change(deletes=frozenset({"endpoints/n/e", "addresses/s/10.0.0.0/8/10.0.0.1"}))
THREE = Change(puts={"members/n/a": "grün 🐍".encode()}, deletes=frozenset({"x"}))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[LocalDatabase]:
    """Open a file, and close it in the end."""
    database = LocalDatabase(path)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@pytest.fixture
def path(tmp_path) -> Path:
    """Name a file in a directory that is not there yet."""
    return tmp_path / "state" / "local.db"


@pytest.fixture
async def local(path):
    """Open a file of its own."""
    async with opened(path) as database:
        yield database


async def test_the_host_is_kept(path):
    """A host's id is minted once and the same after every opening."""
    hosts = set()
    for _ in range(3):
        async with opened(path) as local:
            hosts.add(local.host)
    (host,) = hosts
    assert len(host) == 16
    int(host, 16)


async def test_hosts_differ(local, tmp_path):
    """Two files have two ids."""
    async with opened(tmp_path / "other.db") as other:
        assert other.host != local.host


async def test_the_directory_is_private(local):
    """The directory that is made for the file is for its owner alone."""
    assert local.path.parent.stat().st_mode & 0o777 == 0o700


async def test_an_empty_outbox(local):
    """Nothing is pending at first."""
    assert await local.pending() == []


async def test_the_outbox_is_in_order(local):
    """Changes are pending as they were given, in order, whole."""
    numbers = [await local.remember(change) for change in (ONE, TWO, THREE)]
    assert numbers == sorted(set(numbers))
    assert await local.pending() == list(zip(numbers, (ONE, TWO, THREE), strict=True))


async def test_many_at_once(local):
    """Changes that are given at the same moment are all kept, in the order of calls."""
    changes = [Change(puts={"k": str(n).encode()}) for n in range(50)]
    await asyncio.gather(*(local.remember(change) for change in changes))
    assert [change for _, change in await local.pending()] == changes


async def test_what_is_done_is_forgotten(local):
    """An entry that is done goes, the others stay; a number is never used again."""
    first, second = await local.remember(ONE), await local.remember(TWO)
    await local.done(first)
    assert await local.pending() == [(second, TWO)]
    await local.done(second)
    await local.done(second)
    assert await local.pending() == []
    assert await local.remember(THREE) > second


async def test_the_outbox_survives_reopening(path):
    """What is pending is still pending after a restart, in the same order."""
    async with opened(path) as local:
        numbers = [await local.remember(change) for change in (THREE, ONE)]
    async with opened(path) as local:
        assert await local.pending() == list(zip(numbers, (THREE, ONE), strict=True))


async def test_expectations_are_not_kept(local):
    """A change in the outbox is made whatever was expected when it was decided."""
    await local.remember(Change(expect={"a": 3}, puts={"a": b"1"}))
    ((_, change),) = await local.pending()
    assert change == Change(puts={"a": b"1"})


async def test_a_path_that_cannot_be_made(tmp_path):
    """A path below a file is refused with a sentence that names it."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "local.db"
    database = LocalDatabase(path)
    with pytest.raises(StoreError) as refused:
        await database.open()
    text = str(refused.value)
    assert text.startswith(f"cannot open the local database {path}: ")
    assert text.endswith("; check the disk and the file's permissions")
    await database.close()


async def test_a_directory_in_the_way(tmp_path):
    """A path that is a directory is refused."""
    with pytest.raises(StoreError, match="unable to open database file"):
        await LocalDatabase(tmp_path).open()


async def test_a_file_that_is_no_database(tmp_path):
    """A file of other content is kept under another name, and begun anew."""
    path = tmp_path / "local.db"
    path.write_text("not a database, but long enough to be read as one\n" * 50)
    before = path.read_bytes()
    async with opened(path) as local:
        assert local.mended.endswith("the broken file is kept as local.db.broken-1")
        assert local.estranged
        assert len(local.host) == 16
    assert path.with_name("local.db.broken-1").read_bytes() == before


async def test_a_locked_file(local):
    """A file that another program has locked is refused, not waited for without end."""
    with sqlite3.connect(local.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="database is locked"):
            await local.remember(ONE)
        other.execute("ROLLBACK")
    other.close()
    await local.remember(ONE)


async def test_not_open(tmp_path):
    """A question before opening is refused like any other that cannot be answered."""
    database = LocalDatabase(tmp_path / "local.db")
    with pytest.raises(StoreError, match="not open"):
        await database.pending()
    await database.close()
