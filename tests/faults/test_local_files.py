"""The local database's file: every way to be broken, and what must not be lost."""

import random
import sqlite3
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from cnmdriver.store.base import Change, Item
from cnmdriver.store.local import LocalDatabase, recognize
from tests.faults.test_store_files import (
    behead,
    cut,
    cut_within_a_page,
    empty,
    files,
    flip,
    garble,
    zero,
)

CHANGES = [
    Change(puts={f"members/n/{n}": b'{"some": "record"}' * (n + 1)}) for n in range(40)
]
FIRST = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT, change TEXT NOT NULL
);
INSERT INTO facts VALUES ('host', '0123456789abcdef');
INSERT INTO outbox (change) VALUES ('{"puts": {}, "deletes": ["endpoints/n/e"]}');
"""


@asynccontextmanager
async def opened(path: Path):
    """Open a file, and close it in the end."""
    local = LocalDatabase(path)
    try:
        await local.open()
        yield local
    finally:
        await local.close()


async def populate(path: Path) -> str:
    """Make a file with an outbox and a snapshot; return the host's id."""
    async with opened(path) as local:
        for change in CHANGES:
            await local.remember(change)
        items = {f"k/{n:03}": Item(value=b"x" * 50, revision=n + 1) for n in range(99)}
        await local.keep(items, 100, {"contact": "1"})
        return local.host


@pytest.mark.parametrize(
    "damage", [cut, cut_within_a_page, empty, garble, zero, behead]
)
async def test_the_host_stays_itself(tmp_path, damage):
    """
    However the file is ruined, the host keeps its id, and says what happened.

    Result: the broken file is kept; what could be read of the outbox is in order; the
    snapshot is dropped, as a part of it would show free what is taken.
    """
    path = tmp_path / "local.db"
    host = await populate(path)
    damage(path)
    before = path.read_bytes()
    with structlog.testing.capture_logs() as logs:
        async with opened(path) as local:
            assert (local.host, local.estranged) == (host, False)
            pending = [change for _, change in await local.pending()]
            assert pending == [change for change in CHANGES if change in pending]
            listing = await local.snapshot()
            assert (listing.items, listing.revision) == ({}, 0)
            assert await local.fact("contact") == ""
            text = local.mended
            assert await local.remember(CHANGES[0]) > 0
    assert text.startswith(f"the local database {path} was broken (")
    assert text.endswith(
        f"): this host's id and {len(pending)} changes that wait for the store could "
        "be taken over, others, if any waited, are lost; the broken file is kept as "
        "local.db.broken-1"
    )
    assert [entry["event"] for entry in logs] == ["local.mended"]
    assert path.with_name("local.db.broken-1").read_bytes() == before
    async with opened(path) as local:
        assert (local.host, local.mended) == (host, "")


@pytest.mark.timeout(120)
async def test_flipped_bytes(tmp_path):
    """
    However bytes flip, the id is kept, and no change is replayed that nobody made.

    Result: if anything lacks it is said; a snapshot is whole or not there.
    """
    chance = random.Random(5)
    original = tmp_path / "local.db"
    host = await populate(original)
    content, copy = original.read_bytes(), (tmp_path / "host-id").read_bytes()
    whole = 0
    for number in range(100):
        path = tmp_path / str(number) / "local.db"
        path.parent.mkdir()
        path.write_bytes(content)
        path.with_name("host-id").write_bytes(copy)
        flip(path, chance, chance.randrange(1, 5))
        async with opened(path) as local:
            assert (local.host, local.estranged) == (host, False)
            pending = [change for _, change in await local.pending()]
            kept = await local.snapshot()
            assert len(kept.items) == (0 if local.mended else 99)
        if not local.mended:
            assert pending == CHANGES
        assert all(change in CHANGES for change in pending)
        whole += len(pending) > 20
    assert whole > 50


async def test_either_copy_of_the_id_is_enough(tmp_path):
    """A broken copy is mended from the database, silently; the database counts."""
    path, copy = tmp_path / "local.db", tmp_path / "host-id"
    host = await populate(path)
    good = copy.read_text()
    for text in ("", "nonsense", good.replace(host[0], "g"), "0123456789abcdef 1\n"):
        copy.write_text(text)
        async with opened(path) as local:
            assert (local.host, local.mended) == (host, "")
        assert copy.read_text() == good
    copy.unlink()
    async with opened(path):
        assert copy.read_text() == good


async def test_both_copies_are_lost(tmp_path):
    """Without any copy another id is minted, and that is said; one can be adopted."""
    path, copy = tmp_path / "local.db", tmp_path / "host-id"
    host = await populate(path)
    garble(path)
    copy.write_text("nonsense")
    async with opened(path) as local:
        assert local.estranged
        assert local.host != host
        assert "this host's id is lost and another one taken" in local.mended
        await local.adopt(host)
        assert (local.host, local.estranged) == (host, False)
    async with opened(path) as local:
        assert local.host == host
    assert copy.read_text().startswith(host)


async def test_a_file_that_was_removed(tmp_path):
    """Who removes the database gets a new id: so a copied disk becomes a host."""
    path = tmp_path / "local.db"
    host = await populate(path)
    path.unlink()
    async with opened(path) as local:
        assert local.host != host
        assert (local.mended, local.estranged) == ("", False)
        assert (tmp_path / "host-id").read_text().startswith(local.host)


async def test_a_first_opening_that_was_cut_short(tmp_path):
    """An empty file that never held anything is no broken one."""
    path = tmp_path / "local.db"
    path.touch()
    async with opened(path) as local:
        assert (local.mended, local.estranged) == ("", False)


async def test_the_first_files_are_taken_over(tmp_path):
    """A file without checksums keeps its id and its outbox."""
    path = tmp_path / "local.db"
    with sqlite3.connect(path) as db:
        db.executescript(FIRST)
    db.close()
    for _ in range(2):
        async with opened(path) as local:
            assert (local.host, local.mended) == ("0123456789abcdef", "")
            ((_, change),) = await local.pending()
            assert change == Change(deletes=frozenset({"endpoints/n/e"}))
    assert files(path) == []


@pytest.mark.parametrize(
    ("marks", "hosts", "found"),
    [
        (["aaaaaaaa"], ["aaaaaaaa11111111", "bbbbbbbb22222222"], "aaaaaaaa11111111"),
        (["aaaaaaaa", "aaaaaaaa"], ["aaaaaaaa11111111"], "aaaaaaaa11111111"),
        (["aaaaaaaa", "bbbbbbbb"], ["aaaaaaaa11111111"], ""),
        (["aaaaaaaa"], ["aaaaaaaa11111111", "aaaaaaaa22222222"], ""),
        (["aaaaaaaa"], [], ""),
        ([], ["aaaaaaaa11111111"], ""),
    ],
)
def test_recognizing_a_host(marks, hosts, found):
    """A host is known by its devices only if they and the store leave no doubt."""
    assert recognize(marks, hosts) == found


async def test_a_file_of_a_death_is_whole(tmp_path):
    """What a killed process left, with its log, is no broken file."""
    path = tmp_path / "local.db"
    other = tmp_path / "dead" / "local.db"
    other.parent.mkdir()
    async with opened(path) as local:
        for change in CHANGES:
            await local.remember(change)
        for suffix in ("", "-wal"):
            Path(f"{other}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
        host = local.host
    async with opened(other) as local:
        assert (local.host, local.mended) == (host, "")
        assert [change for _, change in await local.pending()] == CHANGES
