"""What systemd is to a daemon: makes its socket, hears how it is, and ends it."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 40.0
"""Seconds in which a message must come."""


@dataclass
class Service:
    """A daemon in a network of its own, as its service manager sees it."""

    process: subprocess.Popen[str]
    heard: socket.socket
    log: Path
    plugin: Path
    settings: Path

    def hears(self, wanted: str) -> list[str]:
        """Wait for a message with a line; return all its lines."""
        while True:
            lines = self.heard.recv(1000).decode().split("\n")
            if wanted in lines:
                return lines

    def call(self, path: str, body: bytes = b"{}") -> bytes:
        """Make a call as Docker does; return the whole answer."""
        head = f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as docker:
            docker.settimeout(LIMIT)
            docker.connect(str(self.plugin))
            docker.sendall(head.encode() + body)
            answer = b""
            while more := docker.recv(65536):
                answer += more
        return answer


PYNET = (sys.executable, "-m", "cnmdriver")


@contextlib.contextmanager
def service(
    directory: Path,
    *more: str,
    pynet: Sequence[str] = PYNET,
    before: Sequence[Sequence[str]] = (),
    activated: bool = True,
) -> Iterator[Service]:
    """
    Start a daemon in a network of its own; kill what is left of it.

    Its plugin socket is there before it, unless it is not `activated`.
    """
    plugin, settings = directory / "pynet.sock", directory / "pynet.toml"
    settings.write_text(
        f'state_dir = "{directory}/state"\nrun_dir = "{directory}/run"\n'
        f'socket = "{plugin}"\ndocker = ""\nlog_format = "json"\n'
    )
    words = ("serve", "--config", str(settings), *more)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        if activated:
            own.bind(str(plugin))
            own.listen()
        heard = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        heard.bind(str(directory / "notify"))
        heard.settimeout(LIMIT)
        script = "".join(f"{shlex.join(words)}; " for words in before)
        script += f'exec 3<&{own.fileno()}; export LISTEN_PID=$$; exec "$@"'
        log = stack.enter_context((directory / "log").open("w"))
        process = subprocess.Popen(
            ["unshare", "-n", "-m", "bash", "-c", script, "-", *pynet, *words],
            pass_fds=[own.fileno()],
            stderr=log,
            text=True,
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(directory / "notify"),
                "WATCHDOG_USEC": "500000",
                "LISTEN_FDS": "1" if activated else "",
                "LISTEN_FDNAMES": "plugin",
            },
        )
        try:
            yield Service(process, heard, directory / "log", plugin, settings)
        finally:
            process.kill()
            process.wait()
