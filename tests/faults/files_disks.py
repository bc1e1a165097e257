"""
What happens on small disks, each in a mount namespace of its own.

Run as a program under `unshare -m`, with a scenario's name and a directory, over which
a disk of two megabytes is mounted first. It ends with 0 if all was as it must be.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cnmdriver.errors import StoreError
from cnmdriver.store.base import Change
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore

SIZE = 2 << 20


@asynccontextmanager
async def opened(directory: Path):
    """Open the store of a directory, and close it in the end."""
    store = SqliteStore(directory / "store.db")
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def fill(directory: Path) -> Path:
    """Write until the disk has no room, not for a byte."""
    filler = directory / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


def value(number: int) -> bytes:
    """Return a record that fills half a page."""
    return f"{number:04}".encode() * 500


async def populate(store: SqliteStore, count: int = 100) -> None:
    """Write records, each in a commit."""
    for number in range(count):
        await store.commit(Change(puts={f"k/{number:03}": value(number)}))


async def refused(store: SqliteStore, change: Change) -> str:
    """See that a change is refused, and return in which words."""
    try:
        await store.commit(change)
    except StoreError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")


async def keys(store: SqliteStore) -> set[str]:
    """Return what is stored."""
    return set((await store.read("")).items)


async def removing(directory: Path) -> None:
    """What is added is refused on a full disk, what takes back is written, all of it."""
    async with opened(directory) as store:
        await populate(store)
        filler = fill(directory)
        added = Change(puts={f"new/{n}": value(n) for n in range(40)})
        told = await refused(store, added)
        assert told.startswith(f"cannot write the embedded store {store.path}: "), told
        assert "disk" in told and "full" in told, told
        before = await keys(store)
        assert len(before) == 100
        for number in range(90):
            # Somebody else takes all that becomes free.
            fill(directory)
            less = {f"k/{number + 5:03}": b"{}"}
            await store.commit(
                Change(puts=less, deletes=frozenset({f"k/{number:03}"}))
            )
        assert await keys(store) == {f"k/{n:03}" for n in range(90, 100)}
        told = await refused(store, added)
        assert "its last room is kept for removals; make room" in told, told
        await refused(store, Change(puts={"k/095": value(1)}))
        filler.unlink()
        await store.commit(added)
        assert len(await keys(store)) == 50
        assert store.reserve.held


async def dies(directory: Path) -> None:
    """Remove on a full disk, and die."""
    store = SqliteStore(directory / "store.db")
    await store.open()
    await populate(store)
    fill(directory)
    for number in range(90):
        await store.commit(Change(deletes=frozenset({f"k/{number:03}"})))
    os.kill(os.getpid(), signal.SIGKILL)


async def dying(directory: Path) -> None:
    """What was answered on a full disk is there after kill -9; it opens while full."""
    async with opened(directory) as store:
        assert store.mended == ""
        assert await keys(store) == {f"k/{n:03}" for n in range(90, 100)}
        assert await refused(store, Change(puts={"new": value(1)}))
        await store.commit(Change(deletes=frozenset({"k/090"})))
    (directory / "filler").unlink()
    async with opened(directory) as store:
        await store.commit(Change(puts={"new": value(1)}))
        assert len(await keys(store)) == 10


async def mending(directory: Path) -> None:
    """A broken file is mended on a full disk too, or is left for when there is room."""
    async with opened(directory) as store:
        await populate(store, 40)
        path = store.path
    with path.open("r+b") as file:
        file.seek(5 * 4096 + 100)
        file.write(b"x" * 50)
    before = path.read_bytes()
    filler = fill(directory)
    async with opened(directory) as store:
        assert store.mended.endswith("kept as store.db.broken-1")
        assert 30 <= len(await keys(store)) < 40
        await store.commit(Change(deletes=frozenset(await keys(store))))
        assert "full" in await refused(store, Change(puts={"new": value(1)}))
    assert (directory / "store.db.broken-1").read_bytes() == before
    filler.unlink()


async def read_only(directory: Path) -> None:
    """A directory that became read-only is told of in a sentence, at a start too."""
    store = SqliteStore(directory / "store.db")
    local = LocalDatabase(directory / "local.db")
    await local.open()
    await local.close()
    await store.open()
    await populate(store, 3)
    await store.close()
    subprocess.run(
        ["mount", "-o", "remount,ro,bind", str(directory)], check=True, timeout=10
    )
    try:
        for door, name in ((SqliteStore, "store.db"), (LocalDatabase, "local.db")):
            path = directory / name
            try:
                await door(path).open()
            except StoreError as error:
                told = str(error)
                assert told.startswith(f"cannot open the embedded store {path}: ")
                assert "read-only" in told.lower() or "readonly" in told, told
                continue
            raise AssertionError(f"{name} was opened")
    finally:
        subprocess.run(
            ["mount", "-o", "remount,rw,bind", str(directory)], check=True, timeout=10
        )
    async with opened(directory) as store:
        assert len(await keys(store)) == 3
        assert store.mended == ""


def main(scenario: str, directory: Path) -> None:
    """Mount the disk, and do the scenario."""
    argv = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(directory)]
    subprocess.run(argv, check=True, timeout=10)
    if scenario == "dying":
        child = os.fork()
        if not child:
            asyncio.run(dies(directory))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    asyncio.run(SCENARIOS[scenario](directory))


SCENARIOS = {
    "removing": removing,
    "dying": dying,
    "mending": mending,
    "read_only": read_only,
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
