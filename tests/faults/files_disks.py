"""
What the files of a host do on small disks, each in a mount namespace of its own.

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
from cnmdriver.store.base import Change, Item
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


async def refused(store: SqliteStore, *changes: Change) -> str:
    """See that a change is refused, and return in which words."""
    try:
        for change in changes:
            await store.commit(change)
    except StoreError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")


def additions(count: int) -> list[Change]:
    """Return changes of which each adds half a page."""
    return [Change(puts={f"new/{n:03}": value(n)}) for n in range(count)]


async def keys(store: SqliteStore) -> set[str]:
    """Return what is stored."""
    return set((await store.read("")).items)


async def removing(directory: Path) -> None:
    """Refuse what is added on a full disk, and write all that takes back."""
    async with opened(directory) as store:
        await populate(store)
        filler = fill(directory)
        # The log has room for some.
        told = await refused(store, *additions(500))
        assert told.startswith(f"cannot write the embedded store {store.path}: "), told
        assert "disk" in told and "full" in told, told
        await remove_all(store, directory)
        told = await refused(store, *additions(1))
        assert "its last room is kept for removals; make room" in told, told
        assert await store.trouble() == (
            f"the disk that holds {directory} is full: make room there"
        )
        await refused(store, Change(puts={"k/099": value(1) * 2}))
        filler.unlink()
        for change in additions(50):
            await store.commit(change)
        assert store.reserve.held
        assert len(await keys(store)) == 51
        assert await store.trouble() == ""


async def remove_all(store: SqliteStore, directory: Path) -> None:
    """Take back all records but one, while somebody takes all room there is."""
    for key in sorted(await keys(store))[:-1]:
        if key == "k/099":
            continue
        fill(directory)
        less = {"k/099": b"{}"}
        await store.commit(Change(puts=less, deletes=frozenset({key})))
    await store.commit(Change(deletes=frozenset(await keys(store) - {"k/099"})))
    assert await keys(store) == {"k/099"}


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
    """Find what was answered on a full disk after kill -9, and open while it is full."""
    async with opened(directory) as store:
        assert store.mended == ""
        found = {f"k/{n:03}" for n in range(90, 100)}
        assert await keys(store) == found
        assert await refused(store, *additions(500))
        await store.commit(Change(deletes=frozenset(found)))
    (directory / "filler").unlink()
    async with opened(directory) as store:
        await store.commit(Change(puts={"last": value(1)}))
        assert not found & await keys(store)


async def mending(directory: Path) -> None:
    """Mend a broken file on a full disk."""
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


async def outbox(directory: Path) -> None:
    """Let the outbox take removals on a full disk, and keep them over a new start."""
    local = LocalDatabase(directory / "local.db")
    await local.open()
    items = {f"k/{n}": Item(value=value(n), revision=1) for n in range(50)}
    await local.keep(items, 1, {})
    fill(directory)
    for number in range(300):
        assert await local.remember(deletion(number)) == number + 1
    await local.close()
    local = LocalDatabase(directory / "local.db")
    await local.open()
    assert local.mended == ""
    pending = [change for _, change in await local.pending()]
    assert pending == [deletion(number) for number in range(300)]
    (directory / "filler").unlink()
    await local.done(300)
    assert local.reserve.held
    assert await local.pending() == []
    await local.close()


def deletion(number: int) -> Change:
    """Return what a container's end leaves in the outbox."""
    return Change(deletes=frozenset({f"endpoints/{'n' * 64}/{number}"}))


async def snapshot(directory: Path) -> None:
    """Forget what is gone on a full disk, and trust the rest no more until it is whole."""
    local = LocalDatabase(directory / "local.db")
    await local.open()
    items = {f"k/{n}": Item(value=value(n), revision=1) for n in range(50)}
    await local.keep(items, 1, {"contact": "boot 1"})
    fill(directory)
    more = {f"new/{n}": Item(value=value(n), revision=2) for n in range(500)}
    changed = {**more, "k/7": None}
    try:
        await local.keep(changed, 2, {"contact": "boot 2"})
    except StoreError as error:
        assert f"the disk that holds {directory} is full" in str(error)
    else:
        raise AssertionError("it was kept")
    kept = await local.snapshot()
    assert (set(kept.items), kept.revision) == (items.keys() - {"k/7"}, 1)
    assert await local.fact("contact") == ""
    (directory / "filler").unlink()
    await local.keep(dict(list(changed.items())[-90:]), 2, {"contact": "boot 2"})
    assert await local.fact("contact") == "boot 2"
    assert local.reserve.held
    await local.close()


async def taking(directory: Path) -> None:
    """Give nothing of the last room to what takes."""
    local = LocalDatabase(directory / "local.db")
    await local.open()
    fill(directory)
    taken = 0
    try:
        for taken in range(500):  # noqa: B007 - it counts
            await local.remember(additions(1)[0], taking=True)
    except StoreError as error:
        assert f"the disk that holds {directory} is full" in str(error)
    else:
        raise AssertionError("all was taken")
    assert local.reserve.held
    for number in range(300):
        await local.remember(deletion(number))
    try:
        await local.remember(additions(1)[0], taking=True)
    except StoreError as error:
        assert "its last room is kept for removals; make room there" in str(error)
    else:
        raise AssertionError("the last room was given away")
    assert len(await local.pending()) == taken + 300
    await local.close()


async def read_only(directory: Path) -> None:
    """Say in a sentence that a directory is read-only, and serve when it is not."""
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
        for door, name, called in (
            (SqliteStore, "store.db", "embedded store"),
            (LocalDatabase, "local.db", "local database"),
        ):
            path = directory / name
            try:
                await door(path).open()
            except StoreError as error:
                told = str(error)
                assert told.startswith(f"cannot open the {called} {path}: ")
                assert told.endswith(
                    f"the disk that holds {directory} takes no writes (Read-only file "
                    "system): mend it or mount it writable"
                )
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
    "outbox": outbox,
    "snapshot": snapshot,
    "taking": taking,
    "read_only": read_only,
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
