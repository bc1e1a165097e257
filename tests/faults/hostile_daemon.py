"""
A real `pynet serve` in namespaces of its own, for tests that want to hurt it.

Its network, its mounts, its IPC and its name are its own, and so is `/run`; its sockets
lie in a directory of the test, where the test reaches them by path. Run as a program
(`python -m tests.faults.hostile_daemon SERVE-ARGUMENTS`) this module is what runs
inside before it becomes the daemon.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from cnmdriver.cli.client import UnixConnection

ROOT = Path(__file__).absolute().parents[2]
READY = 30.0
PATIENCE = 60.0
TROUBLE = re.compile(
    rb"Traceback|api\.bug|\"critical\"|Exception ignored|never retrieved"
)
"""What no request may bring about, as it shows in the log."""


def become(arguments: list[str]) -> None:
    """Give the daemon a /run and a loopback, and turn into it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"mode=755") != 0:
        raise OSError(ctypes.get_errno(), "cannot mount /run")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    argv = [sys.executable, "-m", "cnmdriver", "serve", *arguments]
    os.execv(sys.executable, argv)


class Daemon:
    """A daemon that runs, and what its log has said."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        """Start it on a directory with a short path; `close` ends it."""
        self.directory = directory
        self.socket = directory / "plugins" / "pynet.sock"
        self.admin = directory / "run" / "admin.sock"
        self.troubles: list[str] = []
        self.last: deque[str] = deque(maxlen=200)
        self.lines = 0
        self.process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--ipc", "--uts"),
                *("--propagation", "private", sys.executable, "-m", __name__),
                *("--socket", str(self.socket), "--state-dir", f"{directory}/state"),
                *("--run-dir", f"{directory}/run", "--docker", ""),
                *("--log-format", "json", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Follow the log to its end, and keep what must not be in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines += 1
            shown = line[:500].decode("utf-8", "replace").rstrip()
            self.last.append(shown)
            if TROUBLE.search(line) and len(self.troubles) < 20:
                self.troubles.append(shown)

    def wait_ready(self) -> None:
        """Wait until both sockets are there."""
        latest = time.monotonic() + READY
        while not (self.socket.exists() and self.admin.exists()):
            if self.process.poll() is not None or time.monotonic() > latest:
                raise RuntimeError("the daemon did not start: " + "\n".join(self.last))
            time.sleep(0.05)

    @property
    def alive(self) -> bool:
        """Tell whether it runs."""
        return self.process.poll() is None

    def memory(self) -> float:
        """Return what it holds in memory, in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024

    def descriptors(self) -> int:
        """Return how many files it has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def ask(self, verb: str, path: str) -> Any:
        """Ask over the admin socket, with patience."""
        connection = patient(self.admin)
        with contextlib.closing(connection):
            connection.request(verb, f"/v1/{path}")
            return json.loads(connection.getresponse().read())

    def claims(self) -> list[str]:
        """Read from its store which pools it holds for Docker."""
        return [
            claim
            for _, record in self.records("members/")
            for claim in record.get("claims", ())
        ]

    def records(self, prefix: str) -> list[tuple[str, Any]]:
        """Read records from its store, without asking it."""
        path = f"file:{self.directory}/state/store.db?mode=ro"
        ask = "SELECT key, value FROM records WHERE key GLOB ? ORDER BY key"
        with contextlib.closing(sqlite3.connect(path, uri=True)) as db:
            rows = db.execute(ask, (f"{prefix}*",)).fetchall()
        return [(key, json.loads(value)["record"]) for key, value in rows]

    def call(self, method: str, **content: Any) -> tuple[int, Any]:
        """Make one of Docker's calls."""
        connection = patient(self.socket)
        with contextlib.closing(connection):
            connection.request("POST", f"/{method}", json.dumps(content))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def inside(self, *argv: str) -> str:
        """Run a command in the daemon's network."""
        enter = ("nsenter", "--net", "--mount", "-t", str(self.process.pid))
        return subprocess.run(
            [*enter, *argv], check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def close(self) -> int:
        """End it as systemd would, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait(10)
            self.reader.join(10)
            if self.process.stderr is not None:
                self.process.stderr.close()


def patient(path: Path) -> HTTPConnection:
    """Lead to a socket; how long an answer may take is for the caller to judge."""
    connection = UnixConnection(str(path))
    connection.timeout = PATIENCE
    return connection


@contextmanager
def daemon(*arguments: str) -> Iterator[Daemon]:
    """Run a daemon on files of its own."""
    with tempfile.TemporaryDirectory(prefix="pynet-h") as directory:
        one = Daemon(Path(directory), *arguments)
        try:
            one.wait_ready()
            yield one
        finally:
            one.close()


if __name__ == "__main__":
    become(sys.argv[1:])
