"""Readiness, signs of life, and the socket that systemd made."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cnmdriver import daemon, service, settings
from cnmdriver.daemon import Daemon
from cnmdriver.errors import InvalidParameter
from cnmdriver.service import Notifier
from cnmdriver.settings import Settings
from tests.fakes import rig
from tests.unit.test_listening import answers, rights

SERVE = """
import asyncio, os, sys
from pathlib import Path
from aiohttp import web
from cnmdriver import listening, service

path = Path(sys.argv[1])

async def main():
    given = service.passed(os.environ, path)
    runner = web.AppRunner(web.Application())
    async with listening.listening(runner, path, group="nobody-has-it", given=given):
        print("serves", flush=True)
        await asyncio.to_thread(sys.stdin.read)

os.environ["LISTEN_PID"] = str(os.getpid())
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Leave the process's log as it was."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a directory with a short path, as a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


@contextlib.contextmanager
def systemd(address: str) -> Iterator[socket.socket]:
    """Hear what is told at an address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.bind(address)
        hearing.settimeout(10)
        yield hearing


def environment(address: str, **more: str) -> dict[str, str]:
    """Return what systemd tells its services."""
    return {"NOTIFY_SOCKET": address.replace("\0", "@"), **more}


def test_what_is_told(short):
    """Ready, reloading and stopping are told, to a path and to an abstract name."""
    for address in (f"{short}/notify", f"\0pynet-test-{os.getpid()}"):
        notifier = Notifier(environment(address))
        with systemd(address) as heard:
            notifier.ready("serves")
            assert heard.recv(100) == b"READY=1\nSTATUS=serves"
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            notifier.reloading()
            first, second = heard.recv(100).decode().split("\n")
            assert first == "RELOADING=1"
            assert int(second.removeprefix("MONOTONIC_USEC=")) >= before
            notifier.stopping()
            assert heard.recv(100) == b"STOPPING=1"


def test_nobody_is_told(short, capsys):
    """Without an address nothing happens; one that is gone is logged, and no error."""
    Notifier({}).ready("serves")
    assert capsys.readouterr() == ("", "")
    daemon.configure_logs(Settings(log_format="json"))
    Notifier(environment(f"{short}/gone")).ready("serves")
    assert "service.not_told" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "period"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "60000000"}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_the_watchdog_is_told_twice_in_its_time(given, period):
    """A sign comes at half of the time, and only from the process that is meant."""
    assert Notifier(given).period == period


async def test_signs_of_life(short):
    """
    A loop that runs gives signs of life, and one that hangs gives none.

    1. Signs come, one after another.
    2. Something blocks the loop for many periods.
    Result: no sign is added meanwhile.
    """
    address = f"{short}/notify"
    notifier = Notifier(environment(address, WATCHDOG_USEC="40000"))
    with systemd(address) as heard:
        async with daemon.beside(notifier.live()):
            for _ in range(3):
                said = await asyncio.to_thread(heard.recv, 100)
                assert said == b"WATCHDOG=1"
            heard.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while heard.recv(100):
                    pass
            time.sleep(0.4)
            with pytest.raises(BlockingIOError):
                heard.recv(100)


# A socket that was made before.


def activated(path: Path, names: str | None = service.PLUGIN) -> subprocess.Popen[str]:
    """Start a program that serves as systemd does: with a socket on descriptor 3."""
    own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with own:
        path.unlink(missing_ok=True)
        own.bind(str(path))
        path.chmod(0o640)
        own.listen(1)
        # The shell moves it to where systemd would have it.
        words = ("-c", f'exec 3<&{own.fileno()} "$@"', "-", sys.executable, "-c")
        named = {} if names is None else {"LISTEN_FDNAMES": names}
        return subprocess.Popen(
            ["bash", *words, SERVE, str(path)],
            pass_fds=[own.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LISTEN_FDS": "1", **named},
        )


@pytest.mark.parametrize("names", ["plugin", "unknown", None])
def test_a_socket_of_systemd_is_served_and_left(short, names):
    """
    The socket that systemd made is served on; its path and rights stay systemd's.

    1. A program is started with it, and serves.
    2. It ends.
    Result: the path is the same file with the same rights as before.
    """
    path = short / "a.sock"
    with activated(path, names) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "serves\n"
        assert answers(path)
        before = (path.stat().st_ino, rights(path))
        program.stdin.close()
        assert program.wait(20) == 0
    assert (path.stat().st_ino, rights(path)) == before
    assert before[1][0] == 0o640
    assert not answers(path)


def listening_at(path: Path, kind: int = socket.SOCK_STREAM) -> int:
    """Return the descriptor of a socket, which listens if it is of a kind that can."""
    own = socket.socket(socket.AF_UNIX, kind)
    own.bind(str(path))
    if kind == socket.SOCK_STREAM:
        own.listen(1)
    return own.detach()


def test_only_the_plugin_socket_will_do(short):
    """A socket at another path, one that does not listen, and a file are refused."""
    path = short / "a.sock"
    with pytest.raises(InvalidParameter, match=r"systemd listens on .*b\.sock"):
        service.as_plugin(listening_at(short / "b.sock"), path)
    with pytest.raises(InvalidParameter, match="no Unix socket that listens"):
        service.as_plugin(listening_at(path, socket.SOCK_DGRAM), path)
    number = os.open(short, os.O_RDONLY)
    with pytest.raises(InvalidParameter, match="is no socket"):
        service.as_plugin(number, path)
    os.close(number)


def test_another_name_for_the_directory(short):
    """A path by way of a link, as /var/run is, names the same socket."""
    (short / "link").symlink_to(short)
    own = service.as_plugin(listening_at(short / "a.sock"), short / "link" / "a.sock")
    assert own.getsockname() == str(short / "a.sock")
    own.close()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_nothing_was_passed(given, short):
    """Sockets for another process, or none, are none."""
    assert service.passed(given, short / "a.sock") is None


# Settings while serving.


@pytest.fixture
async def whole(short):
    """Make a daemon over a fake kernel."""
    async with rig(short) as parts:
        made = Daemon(Settings(docker="", log_format="json"), parts.site)
        yield made
        await made.plugin.cleanup()
        await made.admin.cleanup()


async def test_settings_are_read_again(whole, capsys):
    """The level and the pools change at once; of others a restart is said to be due."""
    fresh = Settings(
        docker="",
        log_format="json",
        log_level="warning",
        default_pools="10.77.0.0/16/26",
        vtep="192.0.2.9",
    )
    whole.reload(lambda: fresh)
    assert [str(r.base) for r in whole.ipam.ranges] == ["10.77.0.0/16"]
    assert (whole.settings.log_level, whole.settings.vtep) == ("warning", "")
    shown = capsys.readouterr().err
    assert '"settings.need_restart"' in shown
    assert '"settings": ["vtep"]' in shown
    structlog.get_logger().info("area.verb")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["default_pools = 'x'", "log_level = 'loud'", "oops"])
async def test_bad_settings_change_nothing(whole, short, capsys, text):
    """A file that is bad in whatever way leaves all as it was, and is named."""
    daemon.configure_logs(whole.settings)
    before, ranges = whole.settings, whole.ipam.ranges
    file = short / "pynet.toml"
    file.write_text(f"{text}\n")
    whole.reload(lambda: daemon_settings(file))
    assert (whole.settings, whole.ipam.ranges) == (before, ranges)
    (line,) = capsys.readouterr().err.splitlines()
    assert '"settings.kept"' in line
    assert "the settings stay as they were: " in line


def daemon_settings(file: Path) -> Settings:
    """Read settings from a file alone."""
    return settings.load({}, {}, file)


async def test_a_hang_up_is_heard():
    """SIGHUP asks for the settings; it is not the end, and not afterwards either."""
    stop, again = asyncio.Event(), asyncio.Event()
    with daemon.hang_ups(stop, again):
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            await again.wait()
    assert not stop.is_set()


def test_the_terminal_that_goes_ends_the_daemon():
    """
    A daemon in the foreground ends with its terminal.

    1. A program on a terminal of its own waits for a hang-up.
    2. The terminal is closed.
    Result: it is told to stop, and not to read settings.
    """
    code = """
import asyncio, fcntl, os, termios
from cnmdriver import daemon
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
async def main():
    stop, again = asyncio.Event(), asyncio.Event()
    with daemon.hang_ups(stop, again):
        os.write(2, b"ready")
        await asyncio.wait_for(asyncio.wait(
            [asyncio.create_task(stop.wait()), asyncio.create_task(again.wait())],
            return_when=asyncio.FIRST_COMPLETED), 20)
    os._exit(7 if stop.is_set() else 8)
asyncio.run(main())
"""
    terminal, end = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=end, start_new_session=True
    ) as child:
        os.close(end)
        assert os.read(terminal, 100) == b"ready"
        os.close(terminal)
        assert child.wait(20) == 7
