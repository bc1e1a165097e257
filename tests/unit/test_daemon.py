"""The daemon: one at a time, its sockets, its files, its logs, its start and end."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import pytest
import structlog

from cnmdriver import daemon, listening
from cnmdriver.daemon import Daemon
from cnmdriver.driver.hosts import Hosts
from cnmdriver.errors import Conflict, InvalidParameter, KernelError, StoreError
from cnmdriver.logs import Journal, Repeats
from cnmdriver.settings import Settings
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.sqlite import SqliteStore
from tests.fakes import cluster, rig
from tests.unit.calls import Docker

SECOND = """
import sys
from cnmdriver import daemon, listening
daemon.NAME = chr(0) + sys.argv[1]
with daemon.only_one():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave the process's log and its file mode as they were."""
    mask = os.umask(0o022)
    yield
    os.umask(mask)
    structlog.reset_defaults()


@pytest.fixture
def name(monkeypatch, tmp_path) -> str:
    """Hold a name of the test's own, not the machine's."""
    own = f"\0pynet-test-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setattr(daemon, "NAME", own)
    return own


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a directory with a short path, as a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def settings(directory: Path, **given: str) -> Settings:
    """Put everything below one directory."""
    return Settings(
        socket=f"{directory}/plugins/pynet.sock",
        state_dir=f"{directory}/state",
        run_dir=f"{directory}/run",
        docker="",
        log_format="json",
        **given,
    )


# One daemon.


def test_the_second_is_refused(name):
    """A second daemon in the same network namespace is told the first one's pid."""
    argv = [sys.executable, "-c", SECOND, name.removeprefix("\0")]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InvalidParameter) as refused, daemon.only_one():
            pass
        first.stdin.close()
        assert first.wait(10) == 0
    assert str(refused.value) == (
        f"pynet is running here already (pid {first.pid}); stop it first"
    )
    with daemon.only_one():
        pass


def test_one_after_another(name):
    """The name is free again when its holder ends, however it ends."""
    with (
        daemon.only_one(),
        pytest.raises(InvalidParameter, match=str(os.getpid())),
        daemon.only_one(),
    ):
        pass
    with pytest.raises(ZeroDivisionError), daemon.only_one():
        raise ZeroDivisionError
    with daemon.only_one():
        pass


def test_a_killed_daemon_that_was_forking(name):
    """A name that a dying process still holds is waited for, for a moment."""
    with ThreadPoolExecutor(1) as pool, ExitStack() as first:
        first.enter_context(daemon.only_one())
        pool.submit(lambda: (time.sleep(0.1), first.close()))
        with daemon.only_one():
            pass


def test_nobody_to_ask(name):
    """Without a holder its pid is unknown."""
    assert daemon.owner() == "unknown"


# Files.


def test_the_boot_is_kept(tmp_path):
    """The boot's id is made once, and the same as long as the file is there."""
    path = tmp_path / "boot"
    made = daemon.boot_id(path)
    assert len(made) == 16
    assert [daemon.boot_id(path), daemon.boot_id(path)] == [made, made]
    assert [p.name for p in tmp_path.iterdir()] == ["boot"]
    path.unlink()
    assert daemon.boot_id(path) != made


def test_a_boot_that_was_cut_off(tmp_path):
    """An empty file, or a draft of one, does not count."""
    path = tmp_path / "boot"
    path.write_text("\n")
    path.with_suffix(".new").write_text("half")
    made = daemon.boot_id(path)
    assert len(made) == 16
    assert path.read_text() == made + "\n"


def test_a_store_by_its_address(tmp_path):
    """The embedded store's address is an absolute path."""
    given = Settings(store=f"sqlite://{tmp_path}/a.db")
    store, members = daemon.open_store(given)
    assert isinstance(store, SqliteStore)
    assert store.path == tmp_path / "a.db"
    assert members == ()


async def test_a_shared_store_by_its_address():
    """The shared store's address names its members; the settings reach it."""
    given = Settings(
        store="etcd://192.0.2.1,h2:23790",
        store_prefix="/lab/",
        store_user="u",
        store_password_file="/p",
    )
    store, members = daemon.open_store(given)
    assert isinstance(store, EtcdStore)
    assert store.shared
    assert members == ("192.0.2.1:2379", "h2:23790")
    assert (store.options.prefix, store.options.user) == ("/lab/", "u")
    assert store.options.password_file == Path("/p")
    await store.close()


async def test_members_have_addresses():
    """Members are known by address; a name nobody knows is left out."""
    members = ("127.0.0.1:1", "[::1]:2", "no-such-name.invalid:3")
    found = await daemon.resolved(members)
    assert found == (ip_address("127.0.0.1"), ip_address("::1"))


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite://a.db", "/a.db", "redis://h", "SQLITE:///a.db"]
)
def test_a_store_that_is_none(url):
    """Any other address is refused, and shown."""
    with pytest.raises(InvalidParameter) as refused:
        daemon.open_store(Settings(store=url))
    assert str(refused.value).startswith(f"store {url!r}: give ")


def test_the_version():
    """The version is that of the installed package, or said to be unknown."""
    assert daemon.version() == "unknown" or daemon.version()[0].isdigit()


# Logs.


def logged(capsys, **given: str) -> list[str]:
    """Configure the log, write two lines, and return what is shown."""
    daemon.configure_logs(Settings(**given))
    log = structlog.get_logger()
    log.info("area.verb", fact=1)
    log.warning("area.mended", error="why")
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("form", ["json", "auto"])
def test_logs_for_machines(capsys, form):
    """Away from a terminal each line is JSON, with event, facts, level and time."""
    first, second = map(json.loads, logged(capsys, log_format=form))
    assert first.pop("timestamp").endswith("Z")
    assert first == {"event": "area.verb", "fact": 1, "level": "info"}
    assert (second["event"], second["level"]) == ("area.mended", "warning")


def test_logs_for_people(capsys):
    """On the console a line reads as text, without colours where there are none."""
    first, _ = logged(capsys, log_format="console")
    assert "area.verb" in first
    assert "fact=1" in first
    assert not first.startswith("{")
    assert "\x1b" not in first


@pytest.mark.parametrize(
    ("level", "lines"), [("debug", 2), ("info", 2), ("warning", 1)]
)
def test_the_level(capsys, level, lines):
    """Only lines of the wanted level and above are shown."""
    assert len(logged(capsys, log_format="json", log_level=level)) == lines


# Settings that cannot work.


def test_a_bad_setting():
    """A setting that cannot work ends the program with code 2 and one line."""
    done = subprocess.run(
        [sys.executable, "-m", "cnmdriver", "serve", "--grace", "soon"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    wanted = "pynet: --grace: grace must be seconds above 0, not 'soon'\n"
    assert done.stderr == wanted


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"store": "redis://a"}, "store 'redis://a': give "),
        ({"state_dir": "{}/file/state"}, "cannot make directory {}/file/state: "),
        ({"run_dir": "{}/file"}, "cannot make directory {}/file: "),
        ({"state_dir": "{}/bad"}, "cannot open the local database {}/bad/local.db: "),
    ],
)
def test_run_says_why(name, short, capsys, given, text):
    """What stops the daemon at its start is told in one line, with the exit code."""
    (short / "file").touch()
    (short / "bad" / "local.db").mkdir(parents=True)
    given = {key: value.format(short) for key, value in given.items()}
    assert daemon.run(replace(settings(short), **given)) == daemon.BUSY == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("pynet: " + text.format(short))
    kinds = [type(each) for each in structlog.get_config()["processors"]]
    # Who looks at the log later sees what is in it, no more.
    assert kinds.index(Repeats) < kinds.index(Journal)


async def test_another_has_the_store(name, short, monkeypatch):
    """A store that another daemon has is refused, and all that was opened is closed."""
    monkeypatch.setattr(daemon, "PATIENCE", 0.5)
    other = SqliteStore(short / "state" / "store.db")
    await other.open()
    with pytest.raises(StoreError, match=r"^another pynet has the embedded store "):
        await daemon.serve(settings(short))
    await other.close()
    with daemon.only_one():
        pass


# The whole of it.


@asynccontextmanager
async def served(short: Path, **given: str) -> AsyncIterator[tuple[Daemon, Docker]]:
    """Serve a daemon over a fake kernel, with its loops, and stop it."""
    async with rig(short) as parts:
        whole = Daemon(settings(short, **given), parts.site)
        parts.networks, parts.ipam = whole.sync.networks, whole.sync.ipam
        parts.state.changed = whole.sync.wake
        stop = asyncio.Event()
        async with (
            listening.listening(whole.admin, short / "run" / "admin.sock"),
            listening.listening(whole.plugin, Path(whole.settings.socket)),
            asyncio.TaskGroup() as group,
        ):
            group.create_task(whole.until(stop))
            try:
                yield whole, Docker(parts)
            finally:
                stop.set()


async def ask(path: Path | str, call: str) -> dict[str, object]:
    """Make a call as Docker does."""
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession("http://plugin", connector=connector) as session,
        session.post(call, json={}) as answer,
    ):
        return json.loads(await answer.read())


async def test_a_life(short):
    """
    A daemon serves, keeps its kernel, and ends without taking anything away.

    1. Docker's handshake is answered, and a network and a container made.
    2. A device that is taken away is made again when the loop is woken.
    3. Told to stop, the loops end and the sockets go.
    Result: the kernel holds what it held, and the records are there.
    """
    async with asyncio.timeout(10), served(short) as (whole, docker):
        kernel = docker.rig.kernel
        found = await ask(whole.settings.socket, "/Plugin.Activate")
        assert found == {"Implements": ["NetworkDriver", "IpamDriver"]}
        await docker.create("red", "10.1.0.0/24")
        await docker.start("box", "red")
        held = dict(kernel.ops)
        kernel.ops = {k: v for k, v in held.items() if k[0] != "device"}
        whole.sync.wake()
        while kernel.ops != held:
            await asyncio.sleep(0.01)
    assert kernel.ops == held
    assert "endpoints/" in "".join(docker.rig.records)
    assert list(short.rglob("*.sock")) == []


async def test_no_password_in_the_settings(short):
    """What the daemon tells of its settings has no user or password of the store."""
    async with rig(short) as parts:
        given = Settings(docker="", store="etcds://root:hunter22@192.0.2.1:2379")
        told = Daemon(given, parts.site).info()["settings"]
    assert told["store"] == "etcds://192.0.2.1:2379"
    assert "hunter22" not in str(told)


@pytest.mark.parametrize(("docker", "said"), [("", "off"), ("unix:///nowhere", "away")])
async def test_what_the_daemon_knows(short, docker, said):
    """The daemon tells its version, age and doors, and whether Docker answers."""
    async with rig(short) as parts:
        given = Settings(docker=docker, store="sqlite:///a.db")
        whole = Daemon(given, parts.site)
        whole.sync.orphans, whole.sync.problems = ("o",), ("p",)
        info = whole.info()
        assert info.pop("uptime") >= 0
        assert info.pop("settings")["store"] == "sqlite:///a.db"
        assert info == {
            "version": "test",
            "pid": os.getpid(),
            "store": "sqlite:///a.db",
            "docker": said,
            "hidden": False,
            "mends": True,
            "docker_version": "",
            "repairs": {},
            "orphans": ["o"],
            "conflicts": [],
            "conflicted": {},
            "counts": {"calls": 0, "refused": 0, "changes": 1, "repairs": 0},
            "problems": ["p"],
        }
        await whole.plugin.cleanup()
        await whole.admin.cleanup()


async def test_a_loop_that_fails_ends_all(short):
    """If one loop fails, the others end too, and the daemon with them."""
    async with rig(short) as parts:
        whole = Daemon(settings(short), parts.site)

        async def broken() -> None:
            raise ZeroDivisionError

        whole.sync.run = broken
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.timeout(5):
                await whole.until(asyncio.Event())
        assert failed.group_contains(ZeroDivisionError)


@pytest.mark.parametrize("together", [False, True])
async def test_a_loop_that_is_refused_begins_anew(short, monkeypatch, together):
    """What the store or the kernel refuses a loop ends neither it nor the daemon."""
    monkeypatch.setattr(daemon, "RETRY", 0.01)
    async with rig(short) as parts:
        whole = Daemon(settings(short), parts.site)
        begun, stop = 0, asyncio.Event()

        async def refused() -> None:
            nonlocal begun
            begun += 1
            if begun == 1 and together:
                raise OSError(errno.EMFILE, "too many open files")
            if begun == 1:
                raise KernelError("the kernel did not answer within 2 s")
            stop.set()
            await asyncio.sleep(60)

        async def among_others() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(refused())
                group.create_task(asyncio.sleep(60))

        whole.sync.watch = among_others if together else refused
        async with asyncio.timeout(5):
            await whole.until(stop)
        assert begun == 2


class Seat:
    """A session that notes whether its place was given up."""

    hidden = left = False

    async def leave(self) -> None:
        """Give it up."""
        self.left = True


async def joining(short: Path, *errors: Exception) -> tuple[Daemon, Seat]:
    """Join a cluster, which is refused at first."""
    seat, refusals = Seat(), list(errors)
    async with cluster(short, 1) as (parts,), asyncio.timeout(5):
        hosts = Hosts(parts.site, "192.0.2.1")
        publish = hosts.publish

        async def opened() -> None:
            pass

        async def published() -> bool:
            if refusals:
                raise refusals.pop(0)
            return await publish()

        parts.state.store.open, hosts.publish = opened, published
        whole = Daemon(settings(short), parts.site, hosts=hosts)
        with suppress(Conflict):
            await whole.join(seat, hosts)
    assert refusals == []
    return whole, seat


async def test_a_place_that_is_taken_later(short, monkeypatch):
    """What keeps a host from its place for a moment does not end the daemon."""
    monkeypatch.setattr(daemon, "RETRY", 0.01)
    whole, seat = await joining(
        short,
        KernelError("the kernel did not answer within 2 s"),
        InvalidParameter("no address for tunnels was found"),
        StoreError("the store is away"),
    )
    assert whole.joined.is_set()
    assert not seat.left


async def test_a_place_that_is_another_s(short):
    """A host that cannot be in the cluster gives up its place at once."""
    whole, seat = await joining(short, Conflict("another host is called 'h1'"))
    assert not whole.joined.is_set()
    assert seat.left


@pytest.mark.parametrize(
    ("error", "code"), [(KernelError("too slow"), 1), (StoreError("broken"), 2)]
)
def test_what_may_be_better_later(name, short, monkeypatch, error, code):
    """The exit code tells the unit whether the same start may succeed a moment later."""

    async def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr(daemon, "open_host", refused)
    assert daemon.run(settings(short)) == code
