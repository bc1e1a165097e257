"""What only the embedded store has: a file, a lock beside it, and sudden deaths."""

import asyncio
import os
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest

from cnmdriver.errors import InvalidParameter, StoreError
from cnmdriver.store.base import Change, CompactedError, Item
from cnmdriver.store.mending import checksum
from cnmdriver.store.sqlite import SqliteStore

ROOT = Path(__file__).parents[2]

WRITER = """
import asyncio, sys
from pathlib import Path
from cnmdriver.store.base import Change
from cnmdriver.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    number = 0
    while True:
        number += 1
        text = str(number).encode()
        puts = {"left": text, "right": text, f"log/{number:06}": text * 500}
        await store.commit(Change(puts=puts))
        print(number, flush=True)

asyncio.run(main())
"""


FIRST = """
CREATE TABLE records (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL, lease INTEGER
) WITHOUT ROWID;
CREATE TABLE history (revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB);
CREATE INDEX history_revision ON history (revision);
CREATE TABLE state (name TEXT PRIMARY KEY, number INTEGER NOT NULL);
INSERT INTO state VALUES ('revision', 9), ('compacted', 0), ('schema', 1);
INSERT INTO records VALUES ('a', x'31', 7, NULL);
"""


@pytest.fixture
async def opened():
    """Open stores, and close them all at the end."""
    stores = []

    async def open_(path: Path) -> SqliteStore:
        store = SqliteStore(path)
        stores.append(store)
        await store.open()
        return store

    yield open_
    for store in stores:
        await store.close()


async def test_content_outlives_the_process(opened, tmp_path):
    """What was committed is there after closing and opening, revisions too."""
    store = await opened(tmp_path / "store.db")
    await store.commit(Change(puts={"a": b"1"}))
    before = await store.read("")
    await store.close()
    again = await opened(tmp_path / "store.db")
    assert await again.read("") == before
    assert await again.commit(Change(puts={"a": b"2"})) > before.revision


async def test_the_directory_is_made(opened, tmp_path):
    """Directories that are not there are made, the last for root alone."""
    await opened(tmp_path / "some" / "where" / "store.db")
    assert (tmp_path / "some" / "where").stat().st_mode & 0o777 == 0o700


async def test_a_second_daemon_is_refused(opened, tmp_path):
    """A store that another daemon has is refused, with the file's name and the pid."""
    path = tmp_path / "store.db"
    first = await opened(path)
    told = rf"^another pynet has .* {path} \(pid {os.getpid()}\); stop it"
    with pytest.raises(StoreError, match=told):
        await opened(path)
    await first.commit(Change(puts={"a": b"1"}))
    await first.close()
    assert list((await (await opened(path)).read("")).items) == ["a"]


async def test_a_killed_writer_leaves_whole_commits(opened, tmp_path):
    """
    A writer that dies by kill -9 loses nothing it was answered, and leaves no half.

    1. A process writes two equal keys and a log entry per commit, and says so.
    2. It is killed in the middle of its work; the file is opened again.
    Result: both keys are equal, not older than what it said, the log is without gap.
    """
    path = tmp_path / "store.db"
    for said_before_death in (5, 40, 90):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path),
            stdout=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        async with asyncio.timeout(20):
            for _ in range(said_before_death):
                await writer.stdout.readline()
            os.kill(writer.pid, signal.SIGKILL)
            said = said_before_death + len((await writer.stdout.read()).splitlines())
            await writer.wait()
        store = await opened(path)
        items = {k: i.value for k, i in (await store.read("")).items.items()}
        assert items["left"] == items["right"]
        assert said <= int(items["left"]) <= said + 1
        entries = sorted(k for k in items if k.startswith("log/"))
        assert len(entries) >= said
        assert entries == [f"log/{n:06}" for n in range(1, len(entries) + 1)]
        await store.close()


async def test_a_newer_schema_is_refused(opened, tmp_path):
    """A file of a newer pynet is refused by name and left as it is."""
    path = tmp_path / "store.db"
    store = await opened(path)
    await store.commit(Change(puts={"a": b"1"}))
    await store.close()
    newer = (3, checksum("schema", 3))
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE state SET (number, checksum) = (?, ?) WHERE name = 'schema'", newer
        )
    connection.close()
    before = path.read_bytes()
    with pytest.raises(
        InvalidParameter, match=f"{path} has schema 3, this pynet knows 2"
    ):
        await opened(path)
    assert path.read_bytes() == before


async def test_an_older_schema_is_taken_over(opened, tmp_path):
    """A file of the first version keeps its records and revisions."""
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(FIRST)
    connection.close()
    store = await opened(path)
    assert store.mended == ""
    kept = sqlite3.connect(tmp_path / "store.db.schema-1")
    assert kept.execute("SELECT key, value FROM records").fetchall() == [("a", b"1")]
    kept.close()
    listing = await store.read("")
    assert listing.items == {"a": Item(value=b"1", revision=7)}
    assert await store.commit(Change(puts={"b": b"2"})) == 10
    await store.close()
    assert sorted((await (await opened(path)).read("")).items) == ["a", "b"]


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"\0" * 5000])
async def test_a_file_that_is_no_database(opened, tmp_path, content):
    """A file of other content is a StoreError that names it, and is not changed."""
    path = tmp_path / "store.db"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"cannot open the embedded store {path}: "):
        await opened(path)
    assert path.read_bytes() == content


async def test_an_unusable_directory(opened, tmp_path):
    """Where no file can be made, the sentence says which and what to check."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(StoreError) as refused:
        await opened(blocker / "store.db")
    assert str(refused.value).startswith(
        f"cannot open the embedded store {blocker}/store.db: "
    )
    assert str(refused.value).endswith("check the disk and the file's permissions")


async def test_a_directory_in_the_way(opened, tmp_path):
    """A directory where the file should be is a sentence, no trace."""
    (tmp_path / "store.db").mkdir()
    with pytest.raises(StoreError, match="cannot open the embedded store"):
        await opened(tmp_path / "store.db")


async def test_using_what_is_not_open(tmp_path):
    """A store that was never opened says so, and can be closed."""
    store = SqliteStore(tmp_path / "store.db")
    with pytest.raises(StoreError, match="is not open"):
        await store.read("")
    await store.close()


async def test_closing_twice(opened, tmp_path):
    """A second close does nothing."""
    store = await opened(tmp_path / "store.db")
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="it is closed"):
        await store.read("")


async def test_leases_of_an_earlier_life_are_over(opened, tmp_path):
    """What an earlier process held on a lease is gone when the file is opened."""
    path = tmp_path / "store.db"
    store = await opened(path)
    lease = await store.lease(60)
    await store.commit(Change(puts={"alive": b"1"}), lease)
    await store.commit(Change(puts={"stays": b"1"}))
    await store.close()
    again = await opened(path)
    assert list((await again.read("")).items) == ["stays"]


async def test_a_lease_may_run_out_after_the_end(opened, tmp_path):
    """A lease whose time ends after the store was closed disturbs nobody."""
    store = await opened(tmp_path / "store.db")
    await store.commit(Change(puts={"alive": b"1"}), await store.lease(0.05))
    await store.close()
    await asyncio.sleep(0.1)
    again = await opened(tmp_path / "store.db")
    assert (await again.read("")).items == {}


async def test_history_is_forgotten_by_itself(opened, tmp_path):
    """After two thousand revisions the first ones can no longer be watched."""
    store = await opened(tmp_path / "store.db")

    def many() -> None:
        store.db.execute("PRAGMA synchronous = OFF")
        for number in range(2000):
            store._commit(Change(puts={"a": str(number).encode()}), None)

    await asyncio.get_running_loop().run_in_executor(store.thread, many)
    with pytest.raises(CompactedError, match="forgotten revision 1000;"):
        await anext(store.watch("", 1000))
    (event,) = await anext(store.watch("", 1001))
    assert (event.revision, event.value) == (1001, b"1000")
    assert len(store.history) == 1000


async def test_a_slow_disk_is_a_sentence(opened, tmp_path, monkeypatch):
    """A call that the disk does not answer in time ends with a StoreError."""
    store = await opened(tmp_path / "store.db")
    monkeypatch.setattr("cnmdriver.store.sqlite.LIMIT", 0.05)
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(5)

    blocked = loop.run_in_executor(store.thread, wait)
    with pytest.raises(StoreError, match=r"did not write within 0\.05 s"):
        await store.commit(Change(puts={"a": b"1"}))
    gate.set()
    await blocked
    assert list((await store.read("")).items) == ["a"]


async def test_a_locked_file_is_a_sentence(opened, tmp_path):
    """Another program that locks the database makes calls fail, not hang."""
    path = tmp_path / "store.db"
    store = await opened(path)
    with sqlite3.connect(path, isolation_level=None) as thief:
        thief.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(4):
            with pytest.raises(StoreError, match=r"cannot write .*locked"):
                await store.commit(Change(puts={"a": b"1"}))
        thief.execute("ROLLBACK")
    thief.close()
    await store.commit(Change(puts={"a": b"1"}))


async def test_a_cancelled_write_is_whole(opened, tmp_path):
    """A commit whose caller gives up is made whole or not at all."""
    store = await opened(tmp_path / "store.db")
    for turn in range(20):
        text = str(turn).encode()
        task = asyncio.create_task(store.commit(Change(puts={"a": text, "b": text})))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        items = (await store.read("")).items
        assert items.get("a") == items.get("b")


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancellation_that_comes_with_the_answer_is_kept(
    opened, tmp_path, turns
):
    """Whoever is cancelled just as the store answers ends: a daemon must stop."""
    store = await opened(tmp_path / "store.db")
    begun, answer = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        answer.wait(5)

    async def follow() -> None:
        await store.call("wait", work)
        await asyncio.Event().wait()

    task = asyncio.create_task(follow())
    while not begun.is_set():
        await asyncio.sleep(0.001)
    answer.set()
    time.sleep(0.02)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    assert not (await asyncio.wait({task}, timeout=1.0))[1]
