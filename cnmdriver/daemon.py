"""
The daemon: builds everything, starts it in order, and stops it in the other.

Order of start: one daemon per network namespace; state; kernel brought into agreement;
only then the sockets, so that Docker's first call finds all in place. Stopping closes
the listeners, lets begun calls end, and leaves every network as it is.
"""

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import metadata
from pathlib import Path

import structlog
from aiohttp import web

from cnmdriver.admin.app import application as admin_application
from cnmdriver.api import app as api
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.dockerapi import DockerApi
from cnmdriver.driver.ipam import IpamDriver
from cnmdriver.driver.network import NetworkDriver
from cnmdriver.driver.site import Site
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import DriverError, InvalidParameter
from cnmdriver.model import Host
from cnmdriver.plan import pools
from cnmdriver.settings import Settings
from cnmdriver.store import records
from cnmdriver.store.base import Store
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State

NAME = "\0pynet"
"""The abstract socket that the one daemon of a network namespace holds."""
BUSY = 2
"""Exit code for settings that cannot work, and for a second daemon."""

log = structlog.get_logger()


async def no_step(name: str) -> None:
    """Announce a step to nobody."""
    del name


def run(settings: Settings) -> int:
    """Serve until told to stop; return the exit code."""
    configure_logs(settings)
    try:
        asyncio.run(serve(settings))
    except DriverError as error:
        print(f"pynet: {error}", file=sys.stderr)  # noqa: T201
        return BUSY
    return 0


async def serve(settings: Settings) -> None:
    """Start everything, wait for a signal, stop everything."""
    os.umask(0o077)
    raise_limits()
    async with AsyncExitStack() as stack:
        stack.enter_context(only_one())
        daemon = await build(settings, stack)
        await daemon.sync.turn()
        stop = asyncio.Event()
        with signals(stop):
            admin = Path(settings.run_dir, "admin.sock")
            async with (
                listening(daemon.admin, admin),
                listening(daemon.plugin, Path(settings.socket)),
            ):
                log.info("daemon.ready", socket=settings.socket, pid=os.getpid())
                await daemon.until(stop)
        log.info("daemon.stopped")


def raise_limits() -> None:
    """Allow as many descriptors as may be: a held port is one, a relay many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Daemon:
    """All parts, wired."""

    def __init__(self, settings: Settings, site: Site) -> None:
        """Build the drivers on a site."""
        self.settings = settings
        self.site = site
        self.started = time.monotonic()
        networks = NetworkDriver(site)
        ranges = [pools.parse_range(t) for t in settings.default_pools.split(",")]
        ipam = IpamDriver(site, ranges, networks)
        docker = DockerApi(settings.docker) if settings.docker else None
        self.sync = Sync(
            site, networks, ipam, docker, grace=settings.grace, audit=settings.audit
        )
        self.driver = Path(settings.socket).stem
        self.plugin = api.runner(
            api.application(
                networks, ipam, scope=settings.scope, on_handshake=self.sync.wake
            )
        )
        self.admin = api.runner(
            admin_application(
                site,
                info=self.info,
                remove_endpoint=networks.remove,
                release_address=ipam.release_address,
            )
        )

    def info(self) -> dict[str, object]:
        """Return what only the daemon knows of itself."""
        docker = "off" if not self.settings.docker else "away"
        return {
            "version": self.site.host.version,
            "pid": os.getpid(),
            "uptime": time.monotonic() - self.started,
            "store": self.settings.store_url,
            "docker": "connected" if self.sync.inventory is not None else docker,
            "orphans": list(self.sync.orphans),
            "problems": list(self.sync.problems),
        }

    async def until(self, stop: asyncio.Event) -> None:
        """Run the loops until the event; if one fails, all end and the daemon too."""
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self.sync.run()),
                group.create_task(self.sync.listen(self.driver)),
                group.create_task(self.site.state.follow()),
            ]
            await stop.wait()
            for task in loops:
                task.cancel()


async def build(settings: Settings, stack: AsyncExitStack) -> Daemon:
    """Open state and kernel; what was opened is closed with the stack."""
    state_dir, run_dir = Path(settings.state_dir), Path(settings.run_dir)
    for directory in (state_dir, run_dir):
        make_private(directory)
    try:
        boot = boot_id(run_dir / "boot")
    except OSError as error:
        raise InvalidParameter(
            f"cannot keep the boot id in {run_dir}: {error}"
        ) from None
    local = LocalDatabase(state_dir / "local.db")
    await local.open()
    stack.push_async_callback(local.close)
    store = open_store(settings.store_url)
    await store.open()
    stack.push_async_callback(store.close)
    kernel = Kernel(host=local.host, run_dir=run_dir, step=no_step)
    await kernel.open()
    stack.push_async_callback(kernel.close)
    state = State(store, local, no_step, lambda: None)
    await state.open()
    host = Host(id=local.host, name=settings.name, version=version())
    await state.commit(lambda draft: draft.put(records.host(host.id), host))
    site = Site(
        host=host,
        boot=boot,
        state=state,
        dataplane=kernel,
    )
    daemon = Daemon(settings, site)
    state.changed = daemon.sync.wake
    return daemon


def open_store(url: str) -> Store:
    """Choose the backend by its address."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest))
    raise InvalidParameter(f"store {url!r}: give sqlite:///absolute/path")


def version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("cnmdriver")
    except metadata.PackageNotFoundError:
        return "unknown"


def boot_id(path: Path) -> str:
    """Return a random value that is kept over restarts and gone with a reboot."""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text().strip()
        if text:
            return text
    fresh = secrets.token_hex(8)
    draft = path.with_suffix(".new")
    draft.write_text(fresh + "\n")
    draft.replace(path)
    return fresh


def make_private(directory: Path) -> None:
    """Make a directory for root alone; raises InvalidParameter if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InvalidParameter(f"cannot make directory {directory}: {error}") from None


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """
    Hold the name of the one daemon of this network namespace.

    An abstract socket: such names are per namespace and vanish with the process.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        try:
            holder.bind(NAME)
        except OSError:
            raise InvalidParameter(
                f"pynet is running here already (pid {owner()}); stop it first"
            ) from None
        holder.listen(1)
        yield


def owner() -> str:
    """Return the pid of the daemon that holds the name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        with contextlib.suppress(OSError):
            asking.connect(NAME)
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return str(int.from_bytes(credentials[:4], sys.byteorder))
    return "unknown"


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


@contextlib.contextmanager
def signals(stop: asyncio.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the daemon cleanly."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def configure_logs(settings: Settings) -> None:
    """Log to standard error: lines for people on a terminal, JSON for machines."""
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(
                [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
                if console
                else [
                    structlog.processors.format_exc_info,
                    structlog.processors.JSONRenderer(),
                ]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
