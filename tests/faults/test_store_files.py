"""The embedded store's file: sudden deaths, two owners, and every way to be broken."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from cnmdriver.errors import StoreError
from cnmdriver.store import mending
from cnmdriver.store.base import Change, Item, Listing
from cnmdriver.store.sqlite import SqliteStore

ROOT = Path(__file__).parents[2]

WRITER = """
import asyncio, os, sys, time
from pathlib import Path
from cnmdriver.store.base import Change
from cnmdriver.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    items = (await store.read("")).items
    number = int(items["left"].value) if items else 0
    while True:
        number += 1
        text = str(number).encode()
        puts = {"left": text, "right": text, f"log/{number:06}": text * 500}
        deletes = frozenset({f"log/{number - 5:06}"})
        revision = await store.commit(Change(puts=puts, deletes=deletes))
        os.write(1, f"{number} {revision}\\n".encode())

# A process for each life: what is imported is imported once.
while True:
    sys.stdin.readline()
    child = os.fork()
    if not child:
        asyncio.run(main())
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""
HOLDER = """
import asyncio, sys
from pathlib import Path
from cnmdriver.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    print("open", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@asynccontextmanager
async def opened(path: Path):
    """Open a store, and close it in the end."""
    store = SqliteStore(path)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def program(text: str, path: Path):
    """Run a program that is killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", text, str(path), cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def files(path: Path) -> list[str]:
    """Name the files beside a store that tell of something broken."""
    return sorted(p.name for p in path.parent.iterdir() if ".broken-" in p.name)


# Sudden deaths.


async def life(writer, moment: float) -> list[tuple[int, int]]:
    """Let a process write, kill it at a moment, and return what it said."""
    writer.stdin.write(b"\n")
    said: list[tuple[int, int]] = []
    pid, deadline = 0, 0.0
    while (line := await writer.stdout.readline()) != b"dead\n":
        first, second = line.split()
        if first == b"pid":
            pid = int(second)
        else:
            said.append((int(first), int(second)))
        if pid and said and not deadline:
            deadline = time.monotonic() + moment
            asyncio.get_running_loop().call_later(moment, os.kill, pid, signal.SIGKILL)
    return said


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_kill_9_in_500_writes(tmp_path):
    """
    Whenever a writer is killed, what it was answered is there, and nothing is half.

    1. A process writes two equal keys and a log entry, and deletes an old one, in one
       commit after the other, and says so; it is killed at a random moment.
    2. The file is opened: 500 times.
    Result: both keys are equal, not older than what was said, the log has its last
    five, revisions go on, and no file was called broken.
    """
    path, chance = tmp_path / "store.db", random.Random(4)
    newest = (0, 0)
    async with program(WRITER, path) as writer:
        for _ in range(500):
            said = await life(writer, chance.uniform(0, 0.02))
            assert said[0][1] > newest[1], "a revision came twice"
            async with opened(path) as store:
                found = await store.read("")
                assert store.mended == ""
            number = consistent(found)
            assert said[-1][0] <= number <= said[-1][0] + 1
            newest = (number, found.revision)
            assert found.revision >= said[-1][1]
    assert newest[0] > 500


def consistent(found: Listing) -> int:
    """See that a listing is that of one commit; return its number."""
    items = {key: item.value for key, item in found.items.items()}
    assert items["left"] == items["right"]
    number = int(items["left"])
    entries = [key for key in items if key.startswith("log/")]
    last = range(max(1, number - 4), number + 1)
    assert sorted(entries) == [f"log/{n:06}" for n in last]
    assert found.items["left"].revision == found.revision
    return number


# Two daemons.


@pytest.mark.parametrize("name", ["store.db", "link.db"])
async def test_two_daemons_on_one_file(tmp_path, name):
    """
    A second daemon is told the first one's pid, by whatever name it has the file.

    Result: the first goes on; when it is killed, the second gets the file at once.
    """
    path = tmp_path / "store.db"
    (tmp_path / "link.db").symlink_to(path)
    async with program(HOLDER, path) as first:
        assert await first.stdout.readline() == b"open\n"
        with pytest.raises(StoreError) as refused:
            await SqliteStore(tmp_path / name).open()
        assert str(refused.value) == (
            f"another pynet has the embedded store {path} (pid {first.pid}); stop it, "
            "or use a shared store (--store etcd://…) for several"
        )
        first.kill()
        await first.wait()
        async with opened(tmp_path / name) as store:
            await store.commit(Change(puts={"a": b"1"}))


# Broken files.


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """Make a directory with a store of 300 records, as a sudden death leaves it."""
    directory = tmp_path_factory.mktemp("sample")

    async def make() -> None:
        async with opened(directory / "store.db") as store:
            for number in range(300):
                value = f'{{"number": {number}}}'.encode() * (1 + number % 9)
                await store.commit(Change(puts={f"k/{number:03}": value}))
            dead = directory / "dead"
            dead.mkdir()
            for suffix in ("", "-wal", ".lock", ".reserve"):
                shutil.copy(f"{store.path}{suffix}", dead)

    asyncio.run(make())
    return directory


@pytest.fixture(scope="module")
def truth(sample) -> dict[str, Item]:
    """Return what the sample holds."""
    with sqlite3.connect(sample / "store.db") as db:
        rows = db.execute("SELECT key, value, revision FROM records").fetchall()
    db.close()
    return {k: Item(value=v, revision=r) for k, v, r in rows}


@pytest.fixture
def broken(tmp_path, sample) -> Callable[[str], Path]:
    """Return what makes a copy of the sample, which the test may break."""

    def copy(state: str) -> Path:
        directory = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        source = sample / "dead" if state == "dead" else sample
        directory.mkdir()
        for file in source.glob("store.db*"):
            shutil.copy(file, directory)
        return directory / "store.db"

    return copy


def flip(path: Path, chance: random.Random, count: int) -> None:
    """Change some bytes of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    path.write_bytes(data)


def test_the_sample(sample):
    """The sample is what the tests below take it for: many pages, and a log."""
    assert (sample / "store.db").stat().st_size >= 12 * 4096
    assert not (sample / "store.db-wal").exists()
    assert (sample / "dead" / "store.db-wal").stat().st_size > 20 * 4096


@pytest.mark.parametrize("state", ["clean", "dead"])
async def test_a_whole_file_is_left_alone(broken, truth, state):
    """A file nobody touched is opened as it is, whether it was closed or not."""
    path = broken(state)
    async with opened(path) as store:
        assert store.mended == ""
        assert (await store.read("")).items == truth
    assert files(path) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("state", ["clean", "dead"])
async def test_flipped_bytes(broken, truth, state):
    """
    However bytes flip, no record is served that was not written, and a loss is told.

    1. One to six bytes of the file are changed; it is opened: 150 times.
    Result: what is read is what was written. If something lacks, `mended` says so, the
    broken file is beside it, byte for byte, and the next opening finds all well.
    """
    chance = random.Random(9)
    saved = []
    for _ in range(150):
        path = broken(state)
        flip(path, chance, chance.randrange(1, 7))
        before = path.read_bytes()
        async with opened(path) as store:
            found, mended = await store.read(""), store.mended
            revision = await store.commit(Change(puts={"new": b"1"}))
        assert {(k, i.value) for k, i in found.items.items()} <= {
            (k, i.value) for k, i in truth.items()
        }
        assert revision > max((i.revision for i in found.items.values()), default=0)
        if mended:
            assert path.with_name("store.db.broken-1").read_bytes() == before
            assert "\n" not in mended
        else:
            assert found.items == truth
        async with opened(path) as store:
            assert store.mended == ""
            assert len((await store.read("")).items) == len(found.items) + 1
        saved.append(len(found.items))
    # One leaf of the tree has about twenty.
    assert sum(count >= 200 for count in saved) > 75


@pytest.mark.timeout(60)
async def test_flipped_bytes_in_the_log(broken, truth):
    """
    A log that breaks off before commits that were answered is told, not passed over.

    Result: the records are those of a moment; if that is not the last but one, it is
    said, and the broken log is beside its file.
    """
    chance = random.Random(3)
    told = 0
    for _ in range(60):
        path = broken("dead")
        log = path.with_name("store.db-wal")
        flip(log, chance, 1)
        before = log.read_bytes()
        async with opened(path) as store:
            found = (await store.read("")).items
            newest = max(i.revision for i in found.values())
            assert found == {k: i for k, i in truth.items() if i.revision <= newest}
            if store.mended:
                told += 1
                assert path.with_name("store.db.broken-1-wal").read_bytes() == before
            else:
                assert newest >= 299
    assert told > 10


def cut(path: Path) -> None:
    """Take the second half away."""
    os.truncate(path, path.stat().st_size // 2)


def cut_within_a_page(path: Path) -> None:
    """Take the end away, not at a page's bound."""
    os.truncate(path, path.stat().st_size - 5000)


def empty(path: Path) -> None:
    """Take everything away."""
    os.truncate(path, 0)


def garble(path: Path) -> None:
    """Write something else over it."""
    path.write_bytes(random.Random(1).randbytes(50_000))


def zero(path: Path) -> None:
    """Make it all zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def behead(path: Path) -> None:
    """Write over the first bytes."""
    with path.open("r+b") as file:
        file.write(b"not a database")


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (cut, 50),
        (cut_within_a_page, 200),
        (empty, 0),
        (garble, 0),
        (zero, 0),
        (behead, 300),
    ],
)
async def test_a_ruined_file(broken, truth, damage, least):
    """
    A file that is cut, emptied or overwritten is told of, kept, and begun anew.

    Result: what could be saved is served, revisions go on, a log line says it.
    """
    path = broken("clean")
    damage(path)
    before = path.read_bytes()
    with structlog.testing.capture_logs() as logs:
        async with opened(path) as store:
            found = (await store.read("")).items
            text = store.mended
            assert await store.commit(Change(puts={"new": b"1"})) > len(found)
    assert truth.items() >= found.items()
    assert least <= len(found)
    assert text.startswith(f"the embedded store {path} was broken (")
    assert text.endswith(
        f"): {len(found)} records could be taken over, what else it held is lost; "
        "the broken file is kept as store.db.broken-1"
    )
    assert [(e["event"], e["why"]) for e in logs] == [("store.mended", text)]
    assert path.with_name("store.db.broken-1").read_bytes() == before


async def test_broken_files_are_bounded(broken):
    """Of many broken files the first two are kept, and the last."""
    path = broken("clean")
    seen = []
    for _ in range(5):
        flip(path, random.Random(2), 200)
        seen.append(path.read_bytes())
        async with opened(path) as store:
            assert store.mended
    kept = [path.with_name(name).read_bytes() for name in files(path)]
    assert files(path) == [f"store.db.broken-{n}" for n in (1, 2, 3)]
    assert kept == [seen[0], seen[1], seen[4]]


async def test_another_programs_file(tmp_path):
    """A database of something else is refused in a sentence, and left alone."""
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreError) as refused:
        await SqliteStore(path).open()
    assert str(refused.value) == (
        f"the embedded store {path} is another program's database; name another file"
    )
    assert path.read_bytes() == before
    assert files(path) == []


async def test_a_broken_file_that_was_never_ours(tmp_path):
    """What pynet never opened is not taken for a broken store, and left alone."""
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0:root:/root:/bin/bash\n" * 50)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match="left alone as pynet never used it"):
            await SqliteStore(path).open()
        assert path.read_bytes() == before


async def test_a_death_while_it_is_mended(broken, truth):
    """A rebuilding that was cut short is done again, whatever it left."""
    path = broken("clean")
    flip(path, random.Random(2), 50)
    before = path.read_bytes()
    path.with_name("store.db.new").write_bytes(b"half")
    path.with_name("store.db.new-journal").write_bytes(b"half")
    # It was given its other name already, and not replaced yet.
    os.link(path, path.with_name("store.db.broken-1"))
    async with opened(path) as store:
        assert store.mended.endswith("kept as store.db.broken-2")
        assert truth.items() >= (await store.read("")).items.items()
    assert path.with_name("store.db.broken-1").read_bytes() == before
    assert not path.with_name("store.db.new").exists()


async def test_a_first_opening_that_was_cut_short(tmp_path):
    """An empty file that never held anything is no broken one."""
    path = tmp_path / "store.db"
    path.touch()
    path.with_name("store.db.lock").touch()
    async with opened(path) as store:
        assert store.mended == ""
        await store.commit(Change(puts={"a": b"1"}))


def test_a_checksum_tells_rows_apart():
    """Neither a value nor its place nor its kind can change unseen."""
    rows = [
        ("a", b"1", 1),
        ("a", b"1", 2),
        ("a", b"2", 1),
        ("b", b"1", 1),
        ("a1", b"", 1),
    ]
    assert len({mending.checksum(*row) for row in rows}) == len(rows)
    assert mending.checksum("a", None) == mending.checksum(1.5) == -1
