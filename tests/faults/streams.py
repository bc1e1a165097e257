"""
Traffic that notices every loss: pings and TCP streams in any network namespaces.

Each runs in threads of its own until it is stopped, and counts exactly: a ping by its
sequence number, a byte of a stream by its place.
"""

import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from tests.dockerd.tools import Place, checksum, family_of

INTERVAL = 0.01
LATE = 3.0
"""Seconds after the last ping in which an answer may still come."""
SILENT = 10.0
"""Seconds after which a stream that does not go on counts as broken."""
CHUNK = 1024
NUMBERED = 1 << 16
"""Sequence numbers that there are: they begin anew after eleven minutes."""
NUMBERS = itertools.count(os.getpid())
KINDS = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}
"""Echo request and echo reply (RFC 792, RFC 4443)."""


class Pings:
    """Pings an address every 10 ms."""

    def __init__(self, place: Place, target: str, what: str) -> None:
        """Take the place to ping from, the address, and the name for people."""
        self.what = what
        self.family = family_of(target)
        six = self.family == socket.AF_INET6
        protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
        self.sock = place.open(self.family, socket.SOCK_RAW, protocol)
        self.sock.connect((target, 0))
        self.identity = next(NUMBERS) & 0xFFFF
        self.sent = 0
        self.heard: dict[int, int] = {}
        self.errors: list[str] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End, and wait for answers that are under way."""
        self.ending.set()
        self.thread.join()
        end = time.monotonic() + LATE
        while len(self.heard) < self.sent and time.monotonic() < end:
            self._hear(end)
        self.sock.close()

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words."""
        lost = sorted({*range(self.sent)} - self.heard.keys())
        twice = [number for number, times in self.heard.items() if times > 1]
        found = [*self.errors]
        if lost:
            found.append(f"lost {len(lost)} of {self.sent}: {lost[:20]}")
        if twice:
            found.append(f"{len(twice)} came twice: {twice[:20]}")
        return found

    def _run(self) -> None:
        due = time.monotonic()
        while not self.ending.is_set():
            try:
                self.sock.send(self._request(self.sent))
            except OSError as error:
                self.errors.append(f"number {self.sent}: {error}")
            self.sent += 1
            due = max(due + INTERVAL, time.monotonic())
            while (left := due - time.monotonic()) > 0:
                self._hear(time.monotonic() + left)

    def _request(self, number: int) -> bytes:
        rest = struct.pack("!HH", self.identity, number % NUMBERED)
        kind, _ = KINDS[self.family]
        # Of ICMPv6 the kernel computes the checksum.
        total = checksum(struct.pack("!BBH", kind, 0, 0) + rest)
        return struct.pack("!BBH", kind, 0, total) + rest

    def _hear(self, end: float) -> None:
        """Read one answer, if one comes before the end."""
        left = max(0.0, end - time.monotonic())
        if not select.select([self.sock], [], [], left)[0]:
            return
        with suppress(OSError):
            data = self.sock.recv(2048)
            if self.family == socket.AF_INET:
                data = data[(data[0] & 0xF) * 4 :]
            kind, _, _, identity, number = struct.unpack("!BBHHH", data[:8])
            if (kind, identity) == (KINDS[self.family][1], self.identity):
                # The latest that was sent by that number.
                number = self.sent - 1 - (self.sent - 1 - number) % NUMBERED
                self.heard[number] = self.heard.get(number, 0) + 1


class Echo:
    """Sends back what comes on one TCP connection."""

    def __init__(self, place: Place, port: int) -> None:
        """Listen on a port of all addresses."""
        self.listener = place.open(socket.AF_INET6, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("::", port))
        self.listener.listen(4)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    def _echo(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while data := client.recv(65536):
                client.sendall(data)


class Stream:
    """A TCP connection on which numbered bytes go and come back all the time."""

    def __init__(self, place: Place, address: str, port: int, what: str) -> None:
        """Connect to an `Echo`."""
        self.what = what
        self.sock = place.open(family_of(address), socket.SOCK_STREAM)
        self.sock.settimeout(SILENT)
        self.sock.connect((address, port))
        self.sent = 0
        self.errors: list[str] = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def stop(self) -> None:
        """End after what is under way."""
        self.ending.set()
        self.thread.join()
        self.sock.close()

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words."""
        return self.errors

    def _run(self) -> None:
        try:
            while not self.ending.wait(INTERVAL):
                data = struct.pack("!Q", self.sent) * (CHUNK // 8)
                self.sock.sendall(data)
                if self._read(CHUNK) != data:
                    self.errors.append(f"number {self.sent}: other bytes came back")
                    return
                self.sent += 1
        except OSError as error:
            self.errors.append(f"number {self.sent}: {error}")

    def _read(self, wanted: int) -> bytes:
        data = b""
        while len(data) < wanted:
            more = self.sock.recv(wanted - len(data))
            if not more:
                raise OSError("the other end closed the connection")
            data += more
        return data


class Traffic:
    """Pings and streams that run together."""

    def __init__(self) -> None:
        self.flows: list[Pings | Stream] = []
        self.echoes: list[Echo] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for echo in self.echoes:
            echo.close()

    def serve(self, place: Place, port: int) -> None:
        """Let streams end in a place."""
        self.echoes.append(Echo(place, port))

    def ping(self, place: Place, target: str, what: str) -> None:
        """Ping an address from a place."""
        self.flows.append(Pings(place, target, what))

    def stream(self, place: Place, address: str, port: int, what: str) -> None:
        """Connect from a place to a served port."""
        self.flows.append(Stream(place, address, port, what))

    @contextmanager
    def unharmed(self, least: int = 50) -> Iterator[None]:
        """Run all as long as the block lasts; none may lose anything."""
        for flow in self.flows:
            flow.start()
        try:
            yield
        finally:
            for flow in self.flows:
                flow.stop()
        print({flow.what: flow.sent for flow in self.flows})
        harmed = {flow.what: flow.failures for flow in self.flows if flow.failures}
        assert not harmed, harmed
        # A flow that stood still would have lost nothing either.
        idle = {flow.what: flow.sent for flow in self.flows if flow.sent < least}
        assert not idle, idle
