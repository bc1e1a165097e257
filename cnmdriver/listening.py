"""
Sockets and directories that only those may use who are to.

A socket is made for root alone, or for a group too; a stale one is replaced, and
whatever else stands in its place is left and named. Its directory is opened, checked,
and locked while it is looked at, so that of two daemons that start at once neither
takes the other's new socket for a stale one. In a directory that passes the check
nobody but root or this user can put anything in a socket's place; what is there is
all the same compared by inode before it is touched.
"""

import asyncio
import fcntl
import grp
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path

import structlog
from aiohttp import web

from cnmdriver.errors import InvalidParameter

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
OTHERS = stat.S_IRWXG | stat.S_IRWXO
WRITABLE = stat.S_IWGRP | stat.S_IWOTH
LONGEST = 107
"""Bytes of a Unix socket's path, which the kernel ends with a zero."""
PATIENCE = 5.0
"""Seconds to wait for another daemon that starts in the same directory."""
BACKLOG = 4096
"""A full queue is an error to Docker, which may start many containers at once."""
OWN = {"local.db", "store.db", "boot", "lost+found"}
"""What a directory of pynet's holds, one of them at least."""

Identity = tuple[int, int]
"""Device and inode: what a path stood for when it was looked at."""

log = structlog.get_logger()


def make_private(directory: Path) -> None:
    """
    Make a directory for this user alone; raises InvalidParameter if that cannot be.

    One that is open to others is closed to them, unless it is not pynet's own.
    """
    make_directory(directory, 0o700)
    try:
        with opened(directory) as place:
            tighten(directory, place)
    except OSError as error:
        raise InvalidParameter(f"cannot use directory {directory}: {error}") from None


def make_directory(directory: Path, mode: int) -> None:
    """Make a directory, and those it is in, with these rights; leave what is there."""
    try:
        for path in (*reversed(directory.parents), directory):
            with suppress(FileExistsError):
                if not path.is_dir():
                    path.mkdir(mode=0o700)
                    path.chmod(mode)
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is no directory")
    except OSError as error:
        raise InvalidParameter(f"cannot make directory {directory}: {error}") from None


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Hold a directory by a descriptor."""
    place = os.open(directory, OPEN_DIRECTORY)
    try:
        yield place
    finally:
        os.close(place)


def tighten(directory: Path, place: int) -> None:
    """Take every right from others; raises InvalidParameter if it is not ours."""
    found = os.fstat(place)
    if found.st_uid != os.geteuid():
        raise InvalidParameter(
            f"directory {directory} belongs to user {found.st_uid}, who could change "
            f"what pynet keeps there; do chown {os.geteuid()} {directory}, or choose "
            "another"
        )
    if not found.st_mode & OTHERS:
        return
    held = set(os.listdir(place))
    if held and not held & OWN:
        raise InvalidParameter(
            f"directory {directory} is open to others and holds what is not pynet's; "
            f"give pynet a directory of its own, or do chmod 0700 {directory}"
        )
    os.fchmod(place, 0o700)
    log.warning("daemon.closed_to_others", directory=str(directory))


@asynccontextmanager
async def listening(
    runner: web.AppRunner,
    path: Path | tuple[str, int],
    *,
    group: str = "",
    given: socket.socket | None = None,
) -> AsyncIterator[None]:
    """
    Serve on a Unix socket, for root alone or for a group too, by name or number.

    A stale socket is replaced. At the end the path is removed if it still is ours.
    Instead of a path there can be an address and a TCP port. Raises InvalidParameter
    if something stands in the way. One that is given listens already: its path and
    rights are those of who made it, and stay as they are.
    """
    if given is not None:
        async with serving_given(runner, given):
            yield
        return
    gid = group_id(group)
    with ExitStack() as stack:
        await runner.setup()
        try:
            if not isinstance(path, Path):
                await serve_tcp(runner, *path)
                yield
                return
            make_directory(path.parent, 0o711 if gid is not None else 0o700)
            held = await made(stack, path, gid)
            await web.SockSite(runner, held.own, backlog=BACKLOG).start()
            try:
                yield
            finally:
                held.remove()
        finally:
            await runner.cleanup()


async def serve_tcp(runner: web.AppRunner, address: str, port: int) -> None:
    """Serve on a TCP port until the runner is cleaned up; raises InvalidParameter."""
    try:
        await web.TCPSite(runner, address, port).start()
    except OSError as error:
        raise InvalidParameter(
            f"cannot listen on {address} port {port}: "
            f"{os.strerror(error.errno or 0).lower()}; choose another port"
        ) from None


@asynccontextmanager
async def serving_given(
    runner: web.AppRunner, given: socket.socket
) -> AsyncIterator[None]:
    """Serve on a socket that listens; what comes after the end waits for the next."""
    with closing(given):
        given.setblocking(False)
        await runner.setup()
        try:
            await web.SockSite(runner, given, backlog=BACKLOG).start()
            yield
        finally:
            await runner.cleanup()


def group_id(group: str) -> int | None:
    """Return a group's number, None for no group; raises InvalidParameter."""
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        if group.isascii() and group.isdigit() and int(group[:11]) < (1 << 32) - 1:
            return int(group)
    raise InvalidParameter(
        f"socket_group {group[:80]!r} is no group of this host; make it with groupadd, "
        "or leave the setting empty"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A socket that listens, its directory, and what its path stood for."""

    own: socket.socket
    place: int
    name: str
    identity: Identity

    def remove(self) -> None:
        """Remove the path if it still is ours; the socket must be open."""
        remove(self.name, self.place, self.identity)


async def made(stack: ExitStack, path: Path, gid: int | None) -> Bound:
    """Make a socket that listens, closed with the stack; raises InvalidParameter."""
    try:
        place = stack.enter_context(opened(path.parent))
        check_directory(path.parent, place)
        async with locked(path.parent):
            clear_stale(path, place)
            held = bound(path, place)
        stack.enter_context(closing(held.own))
        try:
            grant(held, gid)
        except OSError:
            held.remove()
            raise
    except OSError as error:
        raise InvalidParameter(f"cannot listen on {path}: {error}") from None
    return held


def check_directory(directory: Path, place: int) -> None:
    """Raise InvalidParameter if others could replace a socket in a directory."""
    found = os.fstat(place)
    if found.st_uid not in {0, os.geteuid()}:
        raise InvalidParameter(
            f"directory {directory} belongs to user {found.st_uid}, who could replace "
            f"the socket; do chown root {directory}"
        )
    # Where it is sticky, others can add what is theirs and not remove what is ours.
    if found.st_mode & WRITABLE and not found.st_mode & stat.S_ISVTX:
        raise InvalidParameter(
            f"directory {directory} can be written by others, who could replace the "
            f"socket; do chmod go-w {directory}"
        )


@asynccontextmanager
async def locked(directory: Path) -> AsyncIterator[None]:
    """Hold the lock of a directory; it goes with the process, however that ends."""
    latest = asyncio.get_running_loop().time() + PATIENCE
    # A description of its own: two holders may be in one process.
    with opened(directory) as place:
        while True:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if asyncio.get_running_loop().time() > latest:
                    raise InvalidParameter(
                        f"another program holds the lock of directory {directory}; "
                        "stop it first"
                    ) from None
            await asyncio.sleep(0.05)
        yield


def clear_stale(path: Path, place: int) -> None:
    """Remove a socket nobody listens on; raises InvalidParameter for anything else."""
    try:
        found = os.stat(path.name, dir_fd=place, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidParameter(f"{path} is in the way and no socket; remove it")
    if is_live(path):
        raise InvalidParameter(f"another program listens on {path}; stop it first")
    remove(path.name, place, identity_of(found))


def is_live(path: Path) -> bool:
    """Tell whether a program has a socket, even if it has no time for us."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        try:
            asking.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            log.debug("daemon.socket_busy", path=str(path), error=str(error))
    return True


def identity_of(found: os.stat_result) -> Identity:
    """Return what tells a file from all others that exist at the time."""
    return found.st_dev, found.st_ino


def remove(name: str, place: int, identity: Identity) -> None:
    """
    Remove a name from a directory, if it still stands for the same file.

    While somebody has the file open no other can have its inode's number.
    """
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=place, follow_symlinks=False)
        if identity_of(found) == identity:
            os.unlink(name, dir_fd=place)


def bound(path: Path, place: int) -> Bound:
    """Make a socket that listens, for this user alone; raises OSError."""
    if len(os.fsencode(path)) > LONGEST:
        raise OSError(f"its path has more than {LONGEST} bytes; choose a shorter one")
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The path gets the descriptor's mode: no umask has to be right meanwhile.
        os.fchmod(own.fileno(), 0o600)
        own.bind(str(path))
        with handle(path.name, place) as found:
            identity = identity_of(os.fstat(found))
        own.listen(BACKLOG)
    except BaseException:
        own.close()
        raise
    return Bound(own=own, place=place, name=path.name, identity=identity)


def grant(held: Bound, gid: int | None) -> None:
    """Let a group use a new socket; raises OSError if another took its place."""
    with handle(held.name, held.place) as found:
        seen = os.fstat(found)
        if identity_of(seen) != held.identity or not stat.S_ISSOCK(seen.st_mode):
            raise OSError("another program put something in its place")
        if gid is not None:
            # First the group, which so far may do nothing, and then its rights.
            os.chown(f"/proc/self/fd/{found}", -1, gid)
            Path(f"/proc/self/fd/{found}").chmod(0o660)


@contextmanager
def handle(name: str, place: int) -> Iterator[int]:
    """Hold what a name stands for, without following or opening it."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    try:
        yield found
    finally:
        os.close(found)
