"""
The daemon: builds everything, starts it in order, and stops it in the other.

Order of start: one daemon per network namespace; state; kernel brought into agreement;
only then the sockets, so that Docker's first call finds all in place. A shared store
that does not answer at once is not waited for: the daemon serves what it served before.
Stopping closes the listeners, lets begun calls end, and leaves every network as it is.
"""

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

import structlog
from structlog.typing import Processor

from cnmdriver import failpoints
from cnmdriver.admin.app import application as admin_application
from cnmdriver.admin.app import no_host, tell
from cnmdriver.api import app as api
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.dockerapi import DockerApi
from cnmdriver.driver.authority import Authority
from cnmdriver.driver.hosts import Hosts
from cnmdriver.driver.ipam import IpamDriver
from cnmdriver.driver.network import NetworkDriver
from cnmdriver.driver.questions import Questions
from cnmdriver.driver.site import Site
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import (
    Conflict,
    DriverError,
    InvalidParameter,
    KernelError,
    StoreError,
)
from cnmdriver.insight.events import Events
from cnmdriver.insight.trace import answer
from cnmdriver.insight.watching import Watching
from cnmdriver.listening import listening, make_private
from cnmdriver.logs import Journal, Repeats
from cnmdriver.model import Hop, Host, IPAddress, Question
from cnmdriver.plan import pools
from cnmdriver.redaction import USERINFO
from cnmdriver.service import Notifier, passed
from cnmdriver.settings import FIELDS, Settings, listener
from cnmdriver.store import etcd, records
from cnmdriver.store.base import Store
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.session import Session
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State

NAME = "\0pynet"
"""The abstract socket that the one daemon of a network namespace holds."""
BUSY = 2
"""Exit code for settings that cannot work, and for a second daemon."""
LATER = 1
"""Exit code for what the same settings may do a moment later."""
LINGER = 0.5
"""Seconds in which what a killed daemon had just forked lets go of that."""
PATIENCE = 20.0
"""Seconds to wait at start for an embedded store that another process still has."""
WELCOME = 0.7
"""Seconds in which a shared store should answer a daemon that starts."""
RESOLVING = 0.5
"""Seconds for the names of the store's members."""
RETRY = 1.0
"""Seconds before what the store or the kernel refused is tried again."""
LIVE = ("log_level", "default_pools")
"""Settings that a daemon takes anew at a SIGHUP; the others need a restart."""

log = structlog.get_logger()


class NoAddressError(DriverError):
    """There is no address for tunnels on this host yet, as early in a boot."""


E = TypeVar("E", bound=Exception)

PASSING = (NoAddressError, KernelError)
"""What may be better a moment later."""

Work = Callable[[], Coroutine[None, None, None]]
Reread = Callable[[], Settings]
"""Reads the settings again from where they came; raises InvalidParameter."""


def run(settings: Settings, reread: Reread | None = None) -> int:
    """
    Serve until told to stop; return the exit code.

    Without `reread` a SIGHUP finds the settings as they are.
    """
    journal = Journal()
    configure_logs(settings, Repeats(), journal)
    code = 0
    try:
        asyncio.run(serve(settings, reread, journal))
    except* DriverError as errors:
        for error in single(errors):
            # What may be another time can be tried again, by the unit for instance.
            code = max(code, LATER if isinstance(error, PASSING) else BUSY)
            print(f"pynet: {error}", file=sys.stderr)  # noqa: T201
    return code


def single(errors: ExceptionGroup[E]) -> Iterator[E]:
    """Yield the errors of a group, and of groups in it."""
    for error in errors.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from single(error)
        else:
            yield error


async def serve(
    settings: Settings, reread: Reread | None = None, journal: Journal | None = None
) -> None:
    """Start everything, wait for a signal, stop everything."""
    reread = reread or (lambda: settings)
    os.umask(0o077)
    raise_limits()
    notifier = Notifier(os.environ)
    stop, again = asyncio.Event(), asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.enter_context(only_one())
        stack.enter_context(hang_ups(stop, again))
        given = handed_over(settings, stack)
        admin = Path(settings.run_dir, "admin.sock")
        plugin = Path(settings.socket)
        await stack.enter_async_context(beside(notifier.live()))
        with uncollected():
            daemon = await build(settings, stack, journal)
        # The first comparison can take longer than the lease.
        async with daemon.living():
            with uncollected():
                await daemon.joined_soon()
                await daemon.sync.turn()
            with signals(stop):
                async with (
                    listening(daemon.admin, admin),
                    listening(
                        daemon.plugin, plugin, group=settings.socket_group, given=given
                    ),
                    daemon.seen(),
                ):
                    log.info("daemon.ready", socket=settings.socket, pid=os.getpid())
                    notifier.ready(f"serves {settings.socket}")
                    await daemon.until(stop, daemon.reloads(again, reread, notifier))
                    notifier.stopping()
                await daemon.ipam.settled_down()
        log.info("daemon.stopped")


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile, nor later in what is there then: it stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@asynccontextmanager
async def beside(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do something meanwhile that has no end of its own."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def handed_over(settings: Settings, stack: AsyncExitStack) -> socket.socket | None:
    """Return the plugin socket that systemd made, if it did; closed with the stack."""
    given = passed(os.environ, Path(settings.socket))
    if given is not None:
        stack.callback(given.close)
        if settings.socket_group:
            log.warning(
                "service.socket_group_unused",
                why="systemd made the socket: systemctl edit pynet.socket "
                "(SocketGroup=, SocketMode=0660)",
            )
    return given


def raise_limits() -> None:
    """Allow as many descriptors as may be: a held port is one, a relay many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Daemon:
    """All parts, wired."""

    def __init__(
        self,
        settings: Settings,
        site: Site,
        *,
        session: Session | None = None,
        hosts: Hosts | None = None,
        watching: Watching | None = None,
    ) -> None:
        """Build the drivers on a site; on a shared store, with its session."""
        self.settings = settings
        self.site = site
        self.session = session
        self.hosts = hosts
        self.watching = watching or Watching(Journal())
        self.joined = asyncio.Event()
        """Set when this host has its place among the others, or needs none."""
        self.started = time.monotonic()
        networks = NetworkDriver(site, mode="overlay" if session else "bridge")
        self.remotes = networks.remotes
        ipam = IpamDriver(site, default_ranges(settings), networks)
        self.ipam = ipam
        docker = DockerApi(settings.docker) if settings.docker else None
        self.sync = Sync(
            site, networks, ipam, docker, grace=settings.grace, audit=settings.audit
        )
        self.sync.mends = settings.repair
        self.ipam, self.blocks = ipam, ipam.blocks
        self.authority: Authority | None = None
        self.questions: Questions | None = None
        if session is not None:
            self.questions = Questions(site, session, self.look)
            site.ask = self.questions.ask
        self.remotes.alarm = networks.doubts.alarm = self.sync.wake
        networks.doubts.begin()
        self.plugin = api.runner(
            api.application(
                networks,
                ipam,
                scope=settings.scope,
                on_handshake=self.sync.wake,
                on_call=self.watching.called,
            )
        )
        self.events = Events(site, self.watching.journal, self.glance)
        admin = admin_application(
            site,
            info=self.info,
            remove_endpoint=networks.remove,
            release_address=ipam.release_address,
            remove_host=hosts.remove if hosts is not None else no_host,
            journal=self.watching.journal,
        )
        tell(admin, self.events)
        self.admin = api.runner(admin)

    def info(self) -> dict[str, object]:
        """Return what only the daemon knows of itself."""
        docker = "off" if not self.settings.docker else "away"
        return {
            "version": self.site.host.version,
            "pid": os.getpid(),
            "uptime": time.monotonic() - self.started,
            "store": self.settings.store_url,
            "docker_version": self.sync.docker_version,
            "docker": "connected" if self.sync.inventory is not None else docker,
            "hidden": self.session is not None and self.session.hidden,
            "settings": {
                **dataclasses.asdict(self.settings),
                "store": USERINFO.sub("", self.settings.store_url),
            },
            "mends": self.settings.repair,
            "repairs": dict(self.sync.repairs),
            "orphans": list(self.sync.orphans),
            "conflicts": list(self.conflicts().values()),
            "conflicted": dict(self.conflicts()),
            "problems": list(self.sync.problems),
            "counts": {
                **self.watching.counts(),
                "changes": self.site.view.turns,
                "repairs": self.sync.repairs.total(),
            },
        }

    async def look(self, asking: str, question: Question) -> tuple[Hop, ...]:
        """Look at what another host asks."""
        repairs = self.settings.repair
        return await answer(self.site, asking, question, repairs=repairs)

    def conflicts(self) -> Mapping[str, str]:
        """Return what is another's by now, by network or endpoint."""
        return self.authority.conflicts if self.authority is not None else {}

    def glance(self) -> object:
        """Return what else is news when it changes."""
        hidden = self.session is not None and self.session.hidden
        found = (self.sync.repairs.total(), self.sync.orphans, self.sync.problems)
        return hidden, found, dict(self.conflicts())

    @asynccontextmanager
    async def seen(self) -> AsyncIterator[None]:
        """Let those look who may, meanwhile, if there is a place for it."""
        page = self.watching.page(self.site, self.remotes, self.info, self.events)
        place = listener("listen", self.settings.listen)
        if page is None or place is None:
            yield
            return
        async with listening(api.runner(page), place):
            yield

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """Keep this host in the store meanwhile; what ends that ends the daemon."""
        async with asyncio.TaskGroup() as group:
            state = self.site.state
            works = [state.follow(), state.remember()]
            if self.session is not None and self.hosts is not None:
                works += [self.session.run(), self.join(self.session, self.hosts)]
            loops = [group.create_task(work) for work in works]
            yield
            for task in loops:
                task.cancel()
        await state.keep()

    async def join(self, session: Session, hosts: Hosts) -> None:
        """Take this host's place among the others; raises Conflict if it cannot be."""
        while not self.joined.is_set():
            try:
                await self.site.state.store.open()
                await self.site.state.open()
                await hosts.publish()
                self.joined.set()
            except Conflict:
                await session.leave()
                raise
            except DriverError as error:
                if not isinstance(error, StoreError):
                    # The kernel did not say by which address the others reach us.
                    log.warning("daemon.not_joined", error=str(error))
                elif self.site.state.away is None:
                    self.site.state.suspect(error)
                await asyncio.sleep(RETRY)

    async def joined_soon(self) -> None:
        """Wait a moment for the store, and no longer: nobody waits for it."""
        if self.hosts is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WELCOME):
                await self.joined.wait()

    def hear(self) -> None:
        """Tell those who follow what other hosts do."""
        self.remotes.wake()
        self.blocks.wake()
        if self.questions is not None:
            self.questions.wake()

    async def serve_cluster(self, hosts: Hosts) -> None:
        """Do what only a host among others does, once it is one."""
        await self.joined.wait()
        self.authority = Authority(self.site, hosts.publish)
        async with asyncio.TaskGroup() as group:
            for loop in (hosts, self.blocks, self.authority, self.questions):
                if loop is not None:
                    group.create_task(loop.run())

    async def reloads(
        self, again: asyncio.Event, reread: Reread, notifier: Notifier
    ) -> None:
        """Read the settings again each time the event is set."""
        while True:
            await again.wait()
            again.clear()
            notifier.reloading()
            self.reload(reread)
            notifier.ready(f"serves {self.settings.socket}")

    def reload(self, reread: Reread) -> None:
        """Take what may change while serving; if anything is bad, nothing changes."""
        try:
            fresh = reread()
            ranges = default_ranges(fresh)
        except InvalidParameter as error:
            log.error("settings.kept", why=f"the settings stay as they were: {error}")
            return
        known = self.settings
        late = [n for n in FIELDS if getattr(fresh, n) != getattr(known, n)]
        self.settings = replace(known, **{n: getattr(fresh, n) for n in LIVE})
        self.ipam.ranges = ranges
        configure_logs(self.settings, Repeats(), self.watching.journal)
        self.site.state.store.reread()
        log.info("settings.read", changed=[n for n in late if n in LIVE])
        if late := [n for n in late if n not in LIVE]:
            log.warning("settings.need_restart", settings=late)

    async def until(
        self, stop: asyncio.Event, *more: Coroutine[None, None, None]
    ) -> None:
        """
        Run the loops until the event; if one fails, all end and the daemon too.

        One that the store or the kernel refused something has not failed.
        """
        async with asyncio.TaskGroup() as group:
            works: list[Work] = [
                self.sync.run,
                partial(self.sync.listen, self.site.driver),
                self.sync.watch,
                self.remotes.run,
            ]
            if self.hosts is not None:
                works.append(partial(self.serve_cluster, self.hosts))
            loops = [
                group.create_task(work) for work in (*more, *map(persistently, works))
            ]
            await stop.wait()
            for task in loops:
                task.cancel()


async def persistently(loop: Work) -> None:
    """Run a loop until it ends; what it was refused begins it anew after a moment."""
    while True:
        try:
            await loop()
            return
        except* (DriverError, OSError) as errors:
            for error in single(errors):
                log.error("daemon.loop_refused", error=str(error))
        await asyncio.sleep(RETRY)


def watching_for(settings: Settings, journal: Journal) -> Watching:
    """Make what takes note of the daemon's work: it measures if somebody can ask."""
    if not settings.listen:
        return Watching(journal)
    # It takes time and memory that nobody need spend who does not look.
    from cnmdriver.web.metrics import Metrics  # noqa: PLC0415

    return Metrics(journal, version())


def announcing(*hooks: failpoints.Step) -> failpoints.Step:
    """Make a step hook that announces each step to several, in order."""

    async def step(name: str) -> None:
        for hook in hooks:
            await hook(name)

    return step


def default_ranges(settings: Settings) -> tuple[pools.Range, ...]:
    """Read the default pools; raises InvalidParameter."""
    return tuple(map(pools.parse_range, settings.default_pools.split(",")))


async def build(
    settings: Settings, stack: AsyncExitStack, journal: Journal | None = None
) -> Daemon:
    """Open kernel and state; what was opened is closed with the stack."""
    watching = watching_for(settings, journal or Journal())
    armed = failpoints.hook(os.environ, api.METHODS)
    step = announcing(watching.step, *([armed] if armed is not None else []))
    boot, local, kernel = await open_host(settings, stack, watching, step)
    store, members = open_store(settings)
    store = watching.store(store)
    if not store.shared:
        await patiently(store.open)
    stack.push_async_callback(store.close)
    session = None
    if store.shared:
        session = Session(store, local.host, boot, keep=settings.dead_after)
        stack.push_async_callback(session.rest)
    state = State(store, local, step, lambda: None, session=session)
    host = Host(
        id=local.host,
        name=settings.name,
        version=version(),
        vxlan_port=settings.vxlan_port,
        namespace=settings.namespace,
    )
    site = Site(
        host=host,
        boot=boot,
        state=state,
        dataplane=kernel,
        driver=settings.driver_name,
    )
    if session is None:
        return await alone(settings, site, watching)
    await state.load()

    async def towards() -> tuple[IPAddress, ...]:
        return await resolved(members)

    hosts = Hosts(site, settings.vtep, towards, dead_after=settings.dead_after)
    return await in_cluster(settings, session, hosts, watching)


async def open_host(
    settings: Settings,
    stack: AsyncExitStack,
    watching: Watching,
    step: failpoints.Step,
) -> tuple[str, LocalDatabase, Kernel]:
    """Open what is this host's own: boot id, local database, kernel."""
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
    kernel = watching.kernel(
        host=local.host, run_dir=run_dir, step=step, namespace=settings.namespace
    )
    await kernel.open()
    stack.push_async_callback(kernel.close)
    return boot, local, kernel


async def alone(settings: Settings, site: Site, watching: Watching) -> Daemon:
    """Make the daemon of a host that has a store of its own."""
    host, state = site.host, site.state
    await patiently(state.open)
    await state.commit(lambda draft: draft.put(records.host(host.id), host))
    daemon = Daemon(settings, site, watching=watching)
    state.changed = daemon.sync.wake
    return daemon


async def in_cluster(
    settings: Settings, session: Session, hosts: Hosts, watching: Watching
) -> Daemon:
    """Make the daemon of a host among others; it has yet to take its place."""
    try:
        await hosts.look()
    except InvalidParameter as error:
        if is_never(settings.vtep):
            raise
        raise NoAddressError(str(error)) from None
    daemon = Daemon(
        settings, hosts.site, session=session, hosts=hosts, watching=watching
    )
    hosts.site.state.changed = daemon.hear
    hosts.moved = daemon.sync.wake
    return daemon


def is_never(vtep: str) -> bool:
    """Tell whether this can be no end of a tunnel, now or later in a boot."""
    with contextlib.suppress(ValueError):
        address = ip_address(vtep)
        return address.is_loopback or address.is_link_local or address.is_multicast
    return vtep == "lo"


async def patiently(work: Callable[[], Awaitable[None]]) -> None:
    """Do what needs the store, again for a while if it does not answer."""
    latest = time.monotonic() + PATIENCE
    while True:
        try:
            await work()
        except StoreError as error:
            if time.monotonic() >= latest:
                raise
            log.warning("store.away", error=str(error))
            await asyncio.sleep(1)
        else:
            return


def open_store(settings: Settings) -> tuple[Store, tuple[str, ...]]:
    """Choose the backend by its address; return it and where its members are."""
    scheme, _, rest = settings.store_url.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest)), ()
    if scheme not in {"etcd", "etcds"}:
        raise InvalidParameter(
            f"store {settings.store!r}: give etcd://HOST:PORT,… or "
            "sqlite:///absolute/path"
        )
    options = etcd.read_url(
        settings.store_url,
        prefix=settings.store_prefix,
        ca=settings.store_ca,
        cert=settings.store_cert,
        key=settings.store_key,
        user=settings.store_user,
        password_file=settings.store_password_file,
    )
    # It loads grpc, which takes time and memory that one host alone need not spend.
    from cnmdriver.store.etcd.store import EtcdStore  # noqa: PLC0415

    return EtcdStore(options), options.endpoints


async def resolved(members: Iterable[str]) -> tuple[IPAddress, ...]:
    """Return the addresses of etcd's members, as far as their names are known soon."""
    loop = asyncio.get_running_loop()
    names = [member.rpartition(":")[0].strip("[]") for member in members]
    asked = [
        asyncio.ensure_future(loop.getaddrinfo(n, None, type=socket.SOCK_STREAM))
        for n in names
    ]
    await asyncio.wait(asked, timeout=RESOLVING)
    found: dict[IPAddress, None] = {}
    for task in asked:
        if not task.cancel() and task.exception() is None:
            for *_, place in task.result():
                found[ip_address(str(place[0]).partition("%")[0])] = None
    return tuple(found)


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


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """
    Hold the name of the one daemon of this network namespace.

    An abstract socket: such names are per namespace and vanish with the process.
    """
    latest = time.monotonic() + LINGER
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        while not is_bound(holder):
            if time.monotonic() > latest:
                raise InvalidParameter(
                    f"pynet is running here already (pid {owner()}); stop it first"
                )
            time.sleep(0.02)
        holder.listen(1)
        yield


def is_bound(holder: socket.socket) -> bool:
    """Try to take the name of the one daemon; tell whether that is held now."""
    try:
        holder.bind(NAME)
    except OSError:
        return False
    return True


def owner() -> str:
    """Return the pid of the daemon that holds the name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1)
        with contextlib.suppress(OSError):
            asking.connect(NAME)
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return str(int.from_bytes(credentials[:4], sys.byteorder))
    return "unknown"


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


@contextlib.contextmanager
def hang_ups(stop: asyncio.Event, again: asyncio.Event) -> Iterator[None]:
    """
    Let SIGHUP read the settings again.

    The one that comes as the terminal we run on is closed stops the daemon.
    """
    loop = asyncio.get_running_loop()
    terminal = os.isatty(2)

    def heard() -> None:
        (stop if terminal and not os.isatty(2) else again).set()

    loop.add_signal_handler(signal.SIGHUP, heard)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def configure_logs(settings: Settings, *heard: Processor) -> None:
    """
    Log to standard error: lines for people on a terminal, JSON for machines.

    Every line passes those who heard of it first.
    """
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *heard,
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
