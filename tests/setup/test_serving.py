"""The daemon under a service manager: readiness, activation, reload, end."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.setup.systemd import service
from tests.unit.test_listening import rights

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

LO_UP = ("ip", "link", "set", "lo", "up")


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a directory with a short path, as a socket's has 107 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_a_life_under_systemd(short):
    """
    The daemon serves on systemd's socket, and tells when it is ready, lives, and ends.

    1. It starts, tells that it is ready, and gives signs of life; Docker calls.
    2. SIGHUP with another level, then with a file that is bad.
    3. SIGTERM.
    Result: each time it tells so; the bad file changes nothing and is named in the
    log; the socket's file is what it was.
    """
    with service(short) as daemon:
        before = daemon.plugin.stat().st_ino
        assert daemon.hears("READY=1") == [
            "READY=1",
            f"STATUS=serves {daemon.plugin}",
        ]
        assert b"NetworkDriver" in daemon.call("/Plugin.Activate")
        for _ in range(2):
            daemon.hears("WATCHDOG=1")
        whole = daemon.settings.read_text()
        for text, event in (
            (whole + 'log_level = "debug"\n', '"settings.read"'),
            (whole + 'default_pools = "none"\n', '"settings.kept"'),
        ):
            daemon.settings.write_text(text)
            daemon.process.send_signal(signal.SIGHUP)
            daemon.hears("RELOADING=1")
            daemon.hears("READY=1")
            assert event in daemon.log.read_text()
        assert b"NetworkDriver" in daemon.call("/Plugin.Activate")
        daemon.process.terminate()
        daemon.hears("STOPPING=1")
        assert daemon.process.wait(30) == 0
        assert daemon.plugin.stat().st_ino == before


def test_a_call_before_the_daemon_waits(short):
    """Who calls while the daemon starts gets an answer, and no refusal."""
    with service(short) as daemon:
        assert b"NetworkDriver" in daemon.call("/Plugin.Activate")
        daemon.hears("READY=1")


def test_ready_without_the_store(short):
    """A daemon whose store does not answer is ready all the same."""
    address = ("ip", "address", "add", "192.0.2.2/24", "dev", "lo")
    words = ("--store", "etcd://192.0.2.1:2379", "--vtep", "192.0.2.2")
    with service(short, *words, before=(address, LO_UP)) as daemon:
        daemon.hears("READY=1")
        assert b"NetworkDriver" in daemon.call("/Plugin.Activate")


def test_an_address_that_is_not_there_yet(short):
    """Without an address for tunnels it ends with code 1, so that it is tried again."""
    with service(short, "--store", "etcd://192.0.2.1:2379") as daemon:
        assert daemon.process.wait(30) == 1
        assert "no address for tunnels was found" in daemon.log.read_text()


def test_a_socket_elsewhere_is_refused(short):
    """A setting that disagrees with systemd's socket ends it with code 2, and why."""
    with service(short, "--socket", str(short / "other.sock")) as daemon:
        assert daemon.process.wait(30) == 2
        assert "ListenStream=" in daemon.log.read_text()


def test_a_loop_that_hangs_says_where(short):
    """The signal of systemd's watchdog makes the daemon write where it hung."""
    with service(short) as daemon:
        daemon.hears("READY=1")
        daemon.process.send_signal(signal.SIGABRT)
        assert daemon.process.wait(30) == -signal.SIGABRT
        assert "most recent call first" in daemon.log.read_text()


def test_a_socket_of_its_own(short):
    """Without systemd's socket it makes one, for a group if one is set, and removes it."""
    with service(short, "--socket-group", "54321", activated=False) as daemon:
        daemon.hears("READY=1")
        assert rights(daemon.plugin) == (0o660, 54321)
        daemon.process.terminate()
        assert daemon.process.wait(30) == 0
        assert not daemon.plugin.exists()
