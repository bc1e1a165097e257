"""
What systemd and the daemon tell each other: readiness, life, and a socket made before.

All of it is a datagram and five variables (sd_notify(3), sd_listen_fds(3)), and own
code: the libraries for it have no release in years or build against libsystemd.
Started by anything else the variables are not there, and nothing happens here.
"""

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from cnmdriver.errors import InvalidParameter

FIRST = 3
"""The first descriptor that is passed (SD_LISTEN_FDS_START)."""
PLUGIN = "plugin"
"""What the unit calls the plugin socket (FileDescriptorName=)."""
UNNAMED = ("", "unknown")
"""What a socket is called that nobody gave a name."""
LIMIT = 1.0
"""Seconds to wait while systemd does not take a message."""

log = structlog.get_logger()


class Notifier:
    """Tells systemd how the daemon is; without systemd it tells nobody."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Take the address and the watchdog's time from the environment."""
        address = environment.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero that an abstract name begins with.
        self.address = "\0" + address[1:] if address[:1] == "@" else address
        self.period = watchdog(environment)
        """Seconds between two signs of life, 0 if nobody waits for them."""

    def ready(self, status: str) -> None:
        """Say that the daemon serves, at first or again, and a line for people."""
        self.tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that settings are being read; `ready` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Say that the daemon ends."""
        self.tell("STOPPING=1")

    async def live(self) -> None:
        """Give signs of life for ever; a loop that hangs gives none."""
        while self.address and self.period:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self.period)

    def tell(self, *lines: str) -> None:
        """Send a message; one that nobody takes is logged and no error."""
        if not self.address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(LIMIT)
                sender.sendto("\n".join(lines).encode(), self.address)
        except OSError as error:
            log.warning("service.not_told", said=lines[0], error=str(error))


def watchdog(environment: Mapping[str, str]) -> float:
    """Return half of the seconds after which systemd takes this process for dead."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = environment.get("WATCHDOG_USEC", "")
    return int(text) / 2_000_000 if text.isascii() and text.isdigit() else 0.0


def passed(environment: Mapping[str, str], path: Path) -> socket.socket | None:
    """
    Return the plugin socket that systemd made at a path, None if it made none.

    Other descriptors that were passed are closed. Raises InvalidParameter for one that
    cannot be the plugin socket.
    """
    found: socket.socket | None = None
    for number, name in descriptors(environment):
        if name in (PLUGIN, *UNNAMED) and found is None:
            os.set_inheritable(number, False)
            found = as_plugin(number, path)
        else:
            log.warning("service.socket_unused", name=name)
            os.close(number)
    return found


def descriptors(environment: Mapping[str, str]) -> list[tuple[int, str]]:
    """Return the descriptors that were passed to this process, with their names."""
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * int(count)
    return [(FIRST + place, names[place]) for place in range(int(count))]


def as_plugin(number: int, path: Path) -> socket.socket:
    """Return a descriptor as the socket at a path; raises InvalidParameter."""
    try:
        own = socket.socket(fileno=number)
    except OSError as error:
        raise InvalidParameter(
            f"descriptor {number} that systemd passed is no socket: {error}"
        ) from None
    try:
        check(own, path)
    except BaseException:
        own.close()
        raise
    return own


def check(own: socket.socket, path: Path) -> None:
    """Raise InvalidParameter unless a socket listens at a path."""
    listens = own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens or (own.family, own.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise InvalidParameter(
            f"descriptor {own.fileno()} that systemd passed is no Unix socket that "
            "listens; pynet.socket needs ListenStream= with a path"
        )
    name = own.getsockname()
    if not isinstance(name, str) or not is_same(Path(name), path):
        raise InvalidParameter(
            f"systemd listens on {name!r}, the setting socket is {str(path)!r}; make "
            "them equal: systemctl edit pynet.socket (ListenStream=), or the setting"
        )


def is_same(one: Path, other: Path) -> bool:
    """Tell whether two paths name one file, /var/run and /run for instance."""
    return one == other or (
        one.name == other.name and one.parent.resolve() == other.parent.resolve()
    )
