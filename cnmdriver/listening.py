"""
Sockets and directories that only those may use who are to.

A socket is made for root alone, or for a group too; a stale one is replaced, and
whatever else stands in its place is left and named.
"""

import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from aiohttp import web

from cnmdriver.errors import InvalidParameter

log = structlog.get_logger()


def make_private(directory: Path) -> None:
    """Make a directory for root alone; raises InvalidParameter if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidParameter(f"cannot make directory {directory}: {error}") from None


@asynccontextmanager
async def listening(runner: web.AppRunner, path: Path) -> AsyncIterator[None]:
    """Serve on a Unix socket for root alone; a stale one is replaced."""
    await runner.setup()
    try:
        await start_site(runner, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        await runner.cleanup()


async def start_site(runner: web.AppRunner, path: Path) -> None:
    """Listen; raises InvalidParameter if something stands in the way."""
    try:
        clear_stale(path)
        await web.UnixSite(runner, str(path)).start()
        path.chmod(0o600)
    except OSError as error:
        raise InvalidParameter(f"cannot listen on {path}: {error}") from None


def clear_stale(path: Path) -> None:
    """Remove a socket nobody listens on; raises InvalidParameter for anything else."""
    make_private(path.parent)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidParameter(f"{path} is in the way and no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        try:
            asking.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError:
            log.debug("daemon.socket_busy", path=str(path))
    raise InvalidParameter(f"another program listens on {path}; stop it first")
