"""
Requests to rtnetlink that are packed by hand: many in one send, and in any namespace.

The kernel does them in order, goes on after one that fails, and answers each. The
calls block, and are for a thread in the namespace that they are about.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence

from cnmdriver.dataplane.handler import BOUND

NEW_LINK, DELETE_LINK, GET_LINK, SET_LINK = 16, 17, 18, 19
NEW_ADDRESS, DELETE_ADDRESS = 20, 21
ERROR, DONE = 2, 3
REQUEST, ACK, EXCLUSIVE, CREATE, DUMP = 0x1, 0x4, 0x200, 0x400, 0x300
NAME, GROUP, EXTENT = 3, 27, 29
SKIP_STATS = 8
UP = 0x1
INTERRUPTED = 0x10
"""The flag of a message that does not go together with those before it."""
TOGETHER = 64
"""How many go in one send; there must be room for all their answers."""

MESSAGE = struct.Struct("=IHHII")
"""How each begins: size, type, flags, number, port."""
LINK = struct.Struct("=BxHiII")
"""How a device begins: family, type, index, flags, and which of them count."""
ATTRIBUTE = struct.Struct("=HH")

Request = tuple[int, int, bytes]
"""Type, flags, and what follows the head."""


def link(index: int, *, flags: int = 0, mask: int = 0) -> bytes:
    """Pack what names a device, with flags to set."""
    return LINK.pack(0, 0, index, flags, mask)


def called(name: str) -> bytes:
    """Pack what names a device by its name."""
    return link(0) + attribute(NAME, text(name))


def text(name: str) -> bytes:
    """Return a name as the kernel reads it."""
    return os.fsencode(name) + b"\0"


def index(packed: bytes) -> int:
    """Return the index of a device as it is packed."""
    found: int = LINK.unpack_from(packed)[2]
    return found


def attribute(kind: int, data: bytes) -> bytes:
    """Pack an attribute."""
    size = 4 + len(data)
    return ATTRIBUTE.pack(size, kind) + data + bytes(-size % 4)


def number(kind: int, value: int) -> bytes:
    """Pack an attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def asked(requests: Sequence[Request]) -> list[int]:
    """Send requests; return the errno of each, 0 for what was done."""
    codes: list[int] = []
    with _opened() as sock:
        for at in range(0, len(requests), TOGETHER):
            some = requests[at : at + TOGETHER]
            sock.send(b"".join(_message(one, n) for n, one in enumerate(some)))
            while len(codes) < at + len(some):
                data = sock.recv(65_536)
                codes += [_code(data, place) for _, place, _ in messages(data)]
    return codes


def done(requests: Sequence[Request]) -> None:
    """Send requests; raises OSError for the first that was not done."""
    for code in asked(requests):
        if code:
            raise OSError(code, os.strerror(code))


def described(which: Sequence[bytes]) -> list[bytes | int]:
    """Return each device, by what names it, as it is packed, or the errno of asking."""
    found: list[bytes | int] = []
    extent = number(EXTENT, SKIP_STATS)
    with _opened() as sock:
        for at in range(0, len(which), TOGETHER):
            some = which[at : at + TOGETHER]
            requests = [(GET_LINK, 0, one + extent) for one in some]
            sock.send(b"".join(_message(one, n) for n, one in enumerate(requests)))
            while len(found) < at + len(some):
                data = sock.recv(65_536)
                found += [
                    _code(data, place)
                    if kind == ERROR
                    else data[place + MESSAGE.size : end]
                    for kind, place, end in messages(data)
                ]
    return found


def links() -> tuple[list[bytes], bool]:
    """Return each device as it is packed, and whether they are of one moment."""
    body = link(0) + number(EXTENT, SKIP_STATS)
    found: list[bytes] = []
    whole = True
    with _opened() as sock:
        sock.send(_message((GET_LINK, DUMP, body), 1))
        while True:
            data = sock.recv(65_536)
            for kind, at, end in messages(data):
                whole = whole and not MESSAGE.unpack_from(data, at)[2] & INTERRUPTED
                if kind == DONE:
                    return found, whole
                if kind == ERROR:
                    code = _code(data, at)
                    raise OSError(code, os.strerror(code))
                found.append(data[at + MESSAGE.size : end])


def messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield type, place and end of each message that came at once."""
    at = 0
    while at + MESSAGE.size <= len(data):
        size, kind, _, _, _ = MESSAGE.unpack_from(data, at)
        yield kind, at, at + size
        at += (size + 3) & ~3


def _opened() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    sock.settimeout(BOUND)
    return sock


def _message(request: Request, count: int) -> bytes:
    kind, flags, body = request
    flags |= REQUEST | (0 if kind == GET_LINK else ACK)
    return MESSAGE.pack(MESSAGE.size + len(body), kind, flags, count, 0) + body


def _code(data: bytes, at: int) -> int:
    code: int = struct.unpack_from("=i", data, at + MESSAGE.size)[0]
    return -code
