"""Sockets and directories: who may use them, and what may stand in their way."""

import asyncio
import fcntl
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
from aiohttp import web

from cnmdriver import listening
from cnmdriver.errors import InvalidParameter

GROUP = 54321
"""A group that nobody is in."""
STRANGER = 54322


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Let the process's own mask hide nothing."""
    mask = os.umask(0)
    yield
    os.umask(mask)


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a directory with a short path, as a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def path(short) -> Path:
    """Name a socket in a directory that is not there yet."""
    return short / "run" / "a.sock"


def listener(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Bind a socket as another program would."""
    path.parent.mkdir(exist_ok=True, mode=0o755)
    bound = socket.socket(socket.AF_UNIX, kind)
    bound.bind(str(path))
    if kind == socket.SOCK_STREAM:
        bound.listen(1)
    return bound


def serving(path: Path, group: str = ""):
    """Serve nothing on a socket."""
    return listening.listening(web.AppRunner(web.Application()), path, group=group)


async def refused(path: Path, group: str = "") -> str:
    """Return the sentence with which a socket is not made."""
    with pytest.raises(InvalidParameter) as why:
        async with serving(path, group):
            pass
    return str(why.value)


def rights(path: Path) -> tuple[int, int]:
    """Return mode and group of a file."""
    found = path.lstat()
    return stat.S_IMODE(found.st_mode), found.st_gid


def answers(path: Path) -> bool:
    """Tell whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(5)
        return asking.connect_ex(str(path)) == 0


# Who may use a socket.


async def test_for_its_owner_alone(path):
    """A socket and the directory made for it are their owner's alone, any mask."""
    async with serving(path):
        assert path.is_socket()
        assert rights(path)[0] == 0o600
        assert rights(path.parent)[0] == 0o700
        assert answers(path)
    assert not path.exists()


async def test_a_directory_that_is_there_keeps_its_rights(path):
    """The plugins' directory is Docker's too: who may enter it is left as it is."""
    path.parent.mkdir(mode=0o755)
    async with serving(path):
        assert rights(path.parent)[0] == 0o755
        assert rights(path)[0] == 0o600


@pytest.mark.root
async def test_for_a_group(path):
    """A group by its number gets the socket, a way to it, and nothing else."""
    path = path.parent / "deep" / "a.sock"
    async with serving(path, str(GROUP)):
        assert rights(path) == (0o660, GROUP)
        assert path.lstat().st_uid == os.geteuid()
        assert rights(path.parent)[0] == 0o711
        assert rights(path.parent.parent)[0] == 0o711


async def test_for_a_group_by_name(path):
    """A group is known by its name."""
    name = listening.grp.getgrgid(os.getegid()).gr_name
    async with serving(path, name):
        assert rights(path) == (0o660, os.getegid())


@pytest.mark.parametrize("group", ["no-such-group", "-1", "4294967295", "9" * 5000])
async def test_a_group_that_is_none(path, group):
    """A group that does not exist is refused in a sentence, before anything is made."""
    assert await refused(path, group) == (
        f"socket_group {group[:80]!r} is no group of this host; make it with "
        "groupadd, or leave the setting empty"
    )
    assert not path.parent.exists()


@pytest.mark.root
async def test_never_wider_than_in_the_end(path, monkeypatch):
    """From the moment a socket's path is there nobody has a right he must not have."""
    seen = []

    def look() -> None:
        seen.append(rights(path))

    class Watched(socket.socket):
        def bind(self, address) -> None:
            super().bind(address)
            look()

        def listen(self, backlog=0) -> None:
            look()
            super().listen(backlog)
            look()

    def chown(*given, **named) -> None:
        real(*given, **named)
        look()

    real = os.chown
    monkeypatch.setattr(listening.socket, "socket", Watched)
    monkeypatch.setattr(listening.os, "chown", chown)
    async with serving(path, str(GROUP)):
        seen.append(rights(path))
    assert {mode for mode, _ in seen[:3]} == {0o600}
    assert seen[3] == (0o600, GROUP)
    assert set(seen[4:]) == {(0o660, GROUP)}


async def test_a_group_that_may_not_be_given(path, monkeypatch):
    """Where the group cannot get the socket there is none, and nothing is left."""

    def chown(*_: object) -> None:
        raise PermissionError("not yours to give")

    monkeypatch.setattr(listening.os, "chown", chown)
    text = await refused(path, str(GROUP))
    assert text == f"cannot listen on {path}: not yours to give"
    assert not path.exists()


# What stands in a socket's way.


async def test_a_stale_socket_goes(path):
    """A socket whose program is gone is replaced."""
    listener(path).close()
    before = path.lstat().st_ino
    with handle_of(path):
        async with serving(path):
            assert path.lstat().st_ino != before
            assert answers(path)


@contextmanager
def handle_of(path: Path) -> Iterator[None]:
    """Keep a file's inode, so that its number goes to no other file."""
    with listening.opened(path.parent) as place, listening.handle(path.name, place):
        yield


async def test_a_live_socket_stays(path):
    """A socket with a program behind it is refused and left alone."""
    with listener(path):
        text = await refused(path)
    assert text == f"another program listens on {path}; stop it first"
    assert path.is_socket()


async def test_a_busy_socket_stays(path):
    """A program that has no time for another connection is alive all the same."""
    with listener(path) as busy:
        busy.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            waiting.connect(str(path))
            assert "another program listens" in await refused(path)
    assert path.exists()


async def test_a_socket_of_another_kind_stays(path):
    """A datagram socket is another program's, too."""
    with listener(path, socket.SOCK_DGRAM):
        assert "another program listens" in await refused(path)
    assert path.exists()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
async def test_a_file_stays(path, make):
    """What is no socket is refused and left alone."""
    path.parent.mkdir(mode=0o755)
    make(path)
    assert await refused(path) == f"{path} is in the way and no socket; remove it"
    assert path.exists()


@pytest.mark.parametrize("target", ["live.sock", "stale.sock", "nowhere"])
async def test_a_symlink_stays(path, target):
    """A symbolic link is refused, wherever it leads, and so is not followed."""
    listener(path.with_name("stale.sock")).close()
    with listener(path.with_name("live.sock")):
        path.symlink_to(target)
        assert "is in the way and no socket" in await refused(path)
    assert path.is_symlink()
    left = {p.name for p in path.parent.iterdir()}
    assert left == {"a.sock", "live.sock", "stale.sock"}


async def test_a_path_that_is_too_long(short):
    """A path that no socket can have is refused in words."""
    path = short / ("a" * 120)
    assert (await refused(path)).startswith(
        f"cannot listen on {path}: its path has more than 107 bytes"
    )
    assert not path.exists()


async def test_no_directory(short):
    """A directory that cannot be made is refused with its name."""
    (short / "file").touch()
    path = short / "file" / "a.sock"
    assert (await refused(path)).startswith(f"cannot make directory {path.parent}: ")
    path = short / "file" / "below" / "a.sock"
    assert (await refused(path)).startswith(f"cannot make directory {path.parent}: ")


# The directory.


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o775])
async def test_a_directory_others_write(path, mode):
    """Where others could replace the socket none is made, and the remedy is named."""
    path.parent.mkdir()
    path.parent.chmod(mode)
    assert await refused(path) == (
        f"directory {path.parent} can be written by others, who could replace the "
        f"socket; do chmod go-w {path.parent}"
    )
    assert list(path.parent.iterdir()) == []


async def test_a_sticky_directory(path):
    """Where others can add but not remove, a socket is safe."""
    path.parent.mkdir()
    path.parent.chmod(0o1777)
    async with serving(path):
        assert rights(path)[0] == 0o600


@pytest.mark.root
async def test_a_directory_of_somebody_else(path):
    """A directory that another user owns holds no socket, and the remedy is named."""
    path.parent.mkdir(mode=0o755)
    os.chown(path.parent, STRANGER, -1)
    assert await refused(path) == (
        f"directory {path.parent} belongs to user {STRANGER}, who could replace the "
        f"socket; do chown root {path.parent}"
    )
    assert list(path.parent.iterdir()) == []


# Races.


async def test_two_that_start_at_once(path):
    """Of daemons that start at the same moment one gets the socket, and it works."""
    holds = asyncio.Event()
    outcomes: list[str] = []

    async def start() -> None:
        try:
            async with serving(path):
                outcomes.append("serves")
                await holds.wait()
        except InvalidParameter as error:
            outcomes.append(str(error))

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(start())
        while len(outcomes) < 5:
            await asyncio.sleep(0.01)
        assert answers(path)
        holds.set()
    other = f"another program listens on {path}; stop it first"
    assert sorted(outcomes) == sorted(["serves"] + [other] * 4)


async def test_a_start_that_is_under_way(path, monkeypatch):
    """A socket that is bound and not yet listened on is no stale one: it is waited."""
    path.parent.mkdir(mode=0o755)
    with listening.opened(path.parent) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        half = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        half.bind(str(path))
        waiting = asyncio.create_task(refused(path))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        half.listen(1)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert "another program listens" in await waiting
        half.close()
    assert path.is_socket()


async def test_a_lock_that_stays(path, monkeypatch):
    """A lock that is never let go is named, and not waited for without end."""
    monkeypatch.setattr(listening, "PATIENCE", 0.1)
    path.parent.mkdir(mode=0o755)
    with listening.opened(path.parent) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        text = await refused(path)
    assert text.startswith(f"another program holds the lock of directory {path.parent}")


async def test_a_socket_that_is_swapped_while_it_is_looked_at(path, monkeypatch):
    """What takes the place of a stale socket meanwhile is not removed with it."""
    listener(path).close()

    def swapped(path: Path) -> bool:
        path.rename(path.with_name("old"))
        path.write_text("precious")
        return False

    monkeypatch.setattr(listening, "is_live", swapped)
    assert (await refused(path)).startswith(f"cannot listen on {path}: ")
    assert path.read_text() == "precious"


@pytest.mark.root
async def test_a_socket_that_is_swapped_before_the_group_gets_it(path, monkeypatch):
    """What takes a new socket's place gets no rights, and is not removed."""
    real = listening.bound

    def swapped(path: Path, place: int) -> listening.Bound:
        held = real(path, place)
        path.unlink()
        path.write_text("precious")
        path.chmod(0o600)
        return held

    monkeypatch.setattr(listening, "bound", swapped)
    assert "another program put something in its place" in await refused(
        path, str(GROUP)
    )
    assert path.read_text() == "precious"
    assert rights(path) == (0o600, os.getegid())


async def test_a_directory_that_is_swapped_meanwhile(path, monkeypatch):
    """A socket that came into another directory than the checked one is not used."""
    real = listening.clear_stale

    def swapped(path: Path, place: int) -> None:
        real(path, place)
        path.parent.rename(path.parent.with_name("checked"))
        path.parent.mkdir(mode=0o777)

    monkeypatch.setattr(listening, "clear_stale", swapped)
    assert (await refused(path)).startswith(f"cannot listen on {path}: ")


async def test_the_path_of_a_successor(path):
    """A socket that another daemon has made since is not removed at the end."""
    async with serving(path):
        path.unlink()
        successor = listener(path)
    assert path.is_socket()
    assert answers(path)
    successor.close()


async def test_a_path_that_is_gone_already(path):
    """A socket whose path somebody removed ends without a word."""
    async with serving(path):
        path.unlink()
    assert not path.exists()


async def test_what_fails_meanwhile_is_not_the_sockets(path):
    """An error of the work is told as it is, and the path is removed."""
    with pytest.raises(OSError, match="work"):
        async with serving(path):
            raise OSError("work")
    assert not path.exists()


# Directories of state.


def test_a_new_directory(short):
    """A directory is made for its owner alone, with those it is in."""
    listening.make_private(short / "a" / "b")
    assert rights(short / "a")[0] == rights(short / "a" / "b")[0] == 0o700


@pytest.mark.parametrize("held", [None, "local.db", "boot", "lost+found"])
def test_a_directory_that_is_open(short, held):
    """An empty one, or one of pynet's, is closed to others, and that is logged."""
    own = short / "own"
    own.mkdir()
    own.chmod(0o755)
    if held:
        (own / held).touch()
    with structlog.testing.capture_logs() as lines:
        listening.make_private(own)
        listening.make_private(own)
    assert rights(own)[0] == 0o700
    assert [line["event"] for line in lines] == ["daemon.closed_to_others"]


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777, 0o710, 0o701])
def test_a_directory_of_others_things(short, mode):
    """A directory of the system that was named by mistake keeps its rights."""
    (short / "passwd").touch()
    short.chmod(mode)
    with pytest.raises(InvalidParameter, match="is open to others and holds what is"):
        listening.make_private(short)
    assert rights(short)[0] == mode


def test_a_private_directory_may_hold_anything(short):
    """One that is closed to others already is taken as it is."""
    (short / "file").touch()
    short.chmod(0o700)
    listening.make_private(short)
    assert [p.name for p in short.iterdir()] == ["file"]


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_private_directory_of_somebody_else(short, mode):
    """A directory of another user is refused with the remedy, whatever its rights."""
    own = short / "own"
    own.mkdir()
    own.chmod(mode)
    os.chown(own, STRANGER, -1)
    wanted = f"directory {own} belongs to user {STRANGER}, who could change what"
    with pytest.raises(InvalidParameter, match=f"^{re.escape(wanted)}"):
        listening.make_private(own)
    assert rights(own)[0] == mode


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be(short, name):
    """What cannot be made is refused with its name."""
    (short / "file").touch()
    with pytest.raises(InvalidParameter, match=f"^cannot make directory {short}/"):
        listening.make_private(short / name)
