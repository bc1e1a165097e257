"""
Real packets, from a sandbox or the host: is there an answer, and how large may one be.

A socket stays in the namespace it was made in, so one is made in a thread that goes
there for a moment. Nothing holds the sandbox longer than the probe takes.
"""

import asyncio
import errno
import os
import secrets
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

from cnmdriver.dataplane.inside import enter
from cnmdriver.model import IPAddress
from cnmdriver.plan.sight import Echo

LIMIT = 1.8
"""Seconds until the last answer."""
AGAIN = 0.3
"""Seconds until another packet is sent."""
SMALL = 84
"""Bytes of an ordinary probe with its IP header."""
HEADERS = {4: 20, 6: 40}
ECHO = struct.Struct("!BBHHH")
REQUEST, REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
NONCE = 16
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, IPV6_DONTFRAG, PROBE = 10, 23, 62, 3
"""ip(7), ipv6(7): never fragment, whatever the path's MTU is said to be."""
UNREACHABLE = {errno.ECONNREFUSED}
PORTS = (33434, 33523)
"""Where nobody listens, by the custom of traceroute."""


async def ping(
    sandbox: str, source: IPAddress, to: IPAddress, size: int = SMALL
) -> Echo:
    """Ask an address for an echo, with packets of a size that nobody may fragment."""
    kind = socket.SOCK_RAW
    protocol = socket.IPPROTO_ICMP if to.version == 4 else socket.IPPROTO_ICMPV6
    began = time.monotonic()
    try:
        with await made(sandbox, family(to), kind, protocol) as sock:
            prepare(sock, source, to)
            sock.connect((str(to), 0))
            answered = await exchange(sock, to.version, size)
    except OSError as error:
        return Echo(to=to, size=size, error=said(error))
    return Echo(to=to, size=size, milliseconds=answered and elapsed(began, answered))


async def datagram(sandbox: str, source: IPAddress, to: IPAddress) -> Echo:
    """
    Send a datagram to a port where nobody listens, which the far kernel refuses.

    It refuses only what came with a right checksum, so an answer says that too.
    """
    size = HEADERS[to.version] + 8 + NONCE
    began = time.monotonic()
    try:
        with await made(sandbox, family(to), socket.SOCK_DGRAM, 0) as sock:
            prepare(sock, source, to)
            port = PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])
            sock.connect((str(to), port))
            answered = await refused(sock)
    except OSError as error:
        return Echo(to=to, size=size, error=said(error))
    return Echo(to=to, size=size, milliseconds=answered and elapsed(began, answered))


def elapsed(began: float, ended: float) -> float:
    """Return milliseconds."""
    return round((ended - began) * 1000, 2)


def family(address: IPAddress) -> int:
    """Return the family of sockets for an address."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


async def made(sandbox: str, family: int, kind: int, protocol: int) -> socket.socket:
    """Make a socket in a sandbox, or with "" in the daemon's own namespace."""

    def work() -> socket.socket:
        if sandbox:
            descriptor = os.open(sandbox, os.O_RDONLY | os.O_CLOEXEC)
            try:
                enter(descriptor)
            finally:
                os.close(descriptor)
        return socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)

    # The thread ends where it went, and is never used again.
    thread = ThreadPoolExecutor(1, thread_name_prefix="probe")
    try:
        return await asyncio.get_running_loop().run_in_executor(thread, work)
    finally:
        thread.shutdown(wait=False)


def prepare(sock: socket.socket, source: IPAddress, to: IPAddress) -> None:
    """Send from an address, and nothing in parts."""
    if to.version == 4:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PROBE)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PROBE)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
    sock.bind((str(source), 0))


async def exchange(sock: socket.socket, version: int, size: int) -> float | None:
    """Send echo requests until one is answered; return when that was."""
    loop, nonce = asyncio.get_running_loop(), secrets.token_bytes(NONCE)
    packet = request(version, size, nonce)
    latest = time.monotonic() + LIMIT
    while (left := latest - time.monotonic()) > 0:
        await loop.sock_sendall(sock, packet)
        try:
            async with asyncio.timeout(min(AGAIN, left)):
                while not is_reply(await loop.sock_recv(sock, 65_536), version, nonce):
                    pass
        except TimeoutError:
            continue
        return time.monotonic()
    return None


async def refused(sock: socket.socket) -> float | None:
    """Send datagrams until one is refused; return when that was."""
    loop = asyncio.get_running_loop()
    latest = time.monotonic() + LIMIT
    while (left := latest - time.monotonic()) > 0:
        try:
            await loop.sock_sendall(sock, bytes(NONCE))
            async with asyncio.timeout(min(AGAIN, left)):
                await loop.sock_recv(sock, 2048)
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno not in UNREACHABLE:
                raise
        return time.monotonic()
    return None


def request(version: int, size: int, nonce: bytes) -> bytes:
    """Build an echo request of a size with its IP header; the nonce comes first."""
    room = size - HEADERS[version] - ECHO.size
    content = nonce.ljust(room, b"\0")[:room]
    number = int.from_bytes(nonce[:2], "big")
    head = ECHO.pack(REQUEST[version], 0, 0, number, 1)
    # The kernel writes ICMPv6's checksum itself.
    summed = checksum(head + content) if version == 4 else 0
    return ECHO.pack(REQUEST[version], 0, summed, number, 1) + content


def is_reply(packet: bytes, version: int, nonce: bytes) -> bool:
    """Tell whether a packet answers the request with this nonce."""
    start = (packet[0] & 15) * 4 if version == 4 and packet else 0
    message = packet[start:]
    return message[:1] == bytes((REPLY[version],)) and message[8:24] == nonce


def checksum(data: bytes) -> int:
    """Compute the Internet checksum (RFC 1071)."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def said(error: OSError) -> str:
    """Say why a packet could not be sent."""
    if error.errno == errno.EMSGSIZE:
        return "it is larger than the MTU on its way"
    return (error.strerror or str(error)).lower()
