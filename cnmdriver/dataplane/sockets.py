"""
Sockets that keep published ports from other programs.

The kernel translates a published port before a packet can reach a socket, so a socket
here gets hardly any traffic (`relay` has the exceptions). It is what makes a taken port
an error: here when another program was first, there when this one was.

A tcp socket has SO_REUSEADDR and listens. The option forgives connections that are
just closing; without it the port would be refused for a minute after a server, or a
relay of ours, has ended. Two sockets can share a port by it only while neither listens,
and of two that raced the second is refused by listen. For udp the option would let any
other program with it take the port, so it is not set.
"""

import asyncio
import errno
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cnmdriver.dataplane.handler import refusal
from cnmdriver.dataplane.relay import FAMILIES, Target, TcpRelay, UdpRelay
from cnmdriver.errors import Conflict, DriverError
from cnmdriver.model import PROTOCOLS, SCTP, TCP, UDP, IPAddress
from cnmdriver.plan.ops import Hold

KINDS = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM, SCTP: socket.SOCK_STREAM}
NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})
NO_SCTP = frozenset({errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT})

Number = tuple[int, int]

WALK_SECONDS = 2.0
LISTENING = "0A"
UNKNOWN = "another program"
CLOSING = "a connection that ended less than a minute ago"


@dataclass(slots=True, kw_only=True)
class Held:
    """A held port; where the kernel has no sctp the note alone holds it."""

    op: Hold
    sock: socket.socket | None
    relay: TcpRelay | UdpRelay | None

    async def close(self) -> None:
        """Give the port back before the first wait, and end its relay."""
        if self.relay is not None:
            await self.relay.close()
        elif self.sock is not None:
            self.sock.close()


class Sockets:
    """
    The ports this process holds; belongs to one event loop.

    Holding is immediate: there is no wait between the look and the bind, so that of
    two calls for one port one wins and the other is told.
    """

    def __init__(self) -> None:
        # A number is seldom held twice, and a tuple is the smallest collection.
        self._held: dict[Number, tuple[Held, ...]] = {}

    async def hold(self, op: Hold) -> Hold | None:
        """
        Hold a port, and return as what it was held before, None if it was not.

        If it is held already only the target of its relay follows. A port that another
        program has, and an address the host does not have, are a Conflict.
        """
        others = self._held.get(number(op), ())
        for held in others:
            if held.op.address == op.address:
                before = held.op
                retarget(held, op)
                return before
            if overlap(op.address, held.op.address):
                raise Conflict(
                    f"port {label(op)} is taken by pynet, which publishes "
                    f"{label(held.op)}: publish another host port"
                )
        try:
            sock = bound(op)
        except OSError as error:
            raise await declined(op, error) from error
        held = Held(op=op, sock=sock, relay=relay(op, sock))
        self._held[number(op)] = (*others, held)
        return None

    async def release(self, op: Hold) -> None:
        """Give a port back; one that is not held is no error."""
        there = self._held.pop(number(op), ())
        others = tuple(held for held in there if held.op.address != op.address)
        if others:
            self._held[number(op)] = others
        for held in there:
            if held not in others:
                await held.close()

    def held(self) -> tuple[Hold, ...]:
        """Return what is held."""
        return tuple(held.op for there in self._held.values() for held in there)

    async def close(self) -> None:
        """Give all ports back."""
        for op in self.held():
            await self.release(op)


def retarget(held: Held, op: Hold) -> None:
    """Send what the relay gets to the new target; sctp has none to send."""
    if op == held.op:
        return
    if held.sock is None:
        raise Conflict(
            f"port {label(op)} is taken by pynet, which publishes it for "
            f"{held.op.target}: publish another host port"
        )
    held.op = op
    if held.relay is not None:
        held.relay.target = aim(op)


def relay(op: Hold, sock: socket.socket | None) -> TcpRelay | UdpRelay | None:
    """Start the relay of a held socket, which it then owns."""
    if sock is None or op.protocol == SCTP:
        return None
    return (TcpRelay if op.protocol == TCP else UdpRelay)(sock, aim(op))


def aim(op: Hold) -> Target | None:
    """Return where the relay shall send."""
    return None if op.target is None else (op.target, op.target_port)


def label(op: Hold) -> str:
    """Write a port for people, e.g. "[::1]:8080/tcp"; without address, "8080/tcp"."""
    name = f"{op.port}/{PROTOCOLS[op.protocol]}"
    if op.address is None:
        return name
    bracketed = isinstance(op.address, IPv6Address)
    return f"[{op.address}]:{name}" if bracketed else f"{op.address}:{name}"


def number(op: Hold) -> Number:
    """Return what two ports have in common of which the kernel may refuse one."""
    return op.protocol, op.port


def overlap(one: IPAddress | None, other: IPAddress | None) -> bool:
    """Tell whether two addresses share any; None is every one of both families."""
    if one is None or other is None:
        return True
    return one.version == other.version and (
        one == other or one.is_unspecified or other.is_unspecified
    )


def bound(op: Hold) -> socket.socket | None:
    """Open the socket that holds the port; None if the kernel has no such sockets."""
    try:
        if op.address is not None:
            return opened(op, op.address)
        try:
            return opened(op, IPv6Address("::"))
        except OSError as error:
            if error.errno not in NO_IPV6:
                raise
            return opened(op, IPv4Address("0.0.0.0"))  # noqa: S104
    except OSError as error:
        if op.protocol == SCTP and error.errno in NO_SCTP:
            return None
        raise


def opened(op: Hold, address: IPAddress) -> socket.socket:
    """Open and bind a socket; an IPv6 one takes both families if `op` names none."""
    protocol = op.protocol if op.protocol == SCTP else 0
    sock = socket.socket(FAMILIES[address.version], KINDS[op.protocol], protocol)
    try:
        sock.settimeout(0)
        if isinstance(address, IPv6Address):
            only = int(op.address is not None)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        if op.protocol == TCP:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((str(address), op.port))
        if op.protocol == TCP:
            sock.listen(socket.SOMAXCONN)
    except OSError:
        sock.close()
        raise
    return sock


async def declined(op: Hold, error: OSError) -> DriverError:
    """Say why a port cannot be held, and who has it if somebody has."""
    name = label(op)
    if error.errno == errno.EADDRINUSE:
        who = await asyncio.to_thread(holder, op.protocol, op.port, op.address)
        return Conflict(
            f"port {name} is taken by {who}: publish another host port or stop it"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return Conflict(
            f"port {name} cannot be published: {op.address} is no address of this "
            "host: publish on one of its own addresses"
        )
    return refusal(f"holding port {name}", error.errno or errno.EIO)


def holder(protocol: int, port: int, address: IPAddress | None = None) -> str:
    """
    Name the program that has a port, e.g. "nginx (pid 4242)".

    Blocks, as it walks through all processes; after `WALK_SECONDS` it gives up, and
    the program is "another program".
    """
    deadline = time.monotonic() + WALK_SECONDS
    rows = sorted(users(protocol, port, address, deadline))
    inodes = [inode for _, inode in rows if inode != "0"]
    if rows and not inodes:
        return CLOSING
    # Connections of a server share its port: the one that listens is asked for first.
    for inode in inodes[:1]:
        pid = owner(f"socket:[{inode}]", deadline)
        if pid is not None:
            return f"{program(pid)} (pid {pid})"
    return UNKNOWN


def users(
    protocol: int, port: int, address: IPAddress | None, deadline: float
) -> Iterator[tuple[bool, str]]:
    """Yield whether it does not listen, and the inode, of each socket on the port."""
    for name in (PROTOCOLS[protocol], f"{PROTOCOLS[protocol]}6"):
        path = Path("/proc/thread-self/net", name)
        if not path.exists():
            continue
        with path.open(encoding="ascii") as lines:
            next(lines)
            for line in lines:
                if time.monotonic() > deadline:
                    return
                _, local, _, state, *rest = line.split()
                where, number = local.split(":")
                if int(number, 16) == port and overlap(address, decoded(where)):
                    yield state != LISTENING, rest[5]


def decoded(text: str) -> IPAddress | None:
    """Read an address of /proc/net; None for `::`, which mostly stands for both."""
    words = (int(text[at : at + 8], 16) for at in range(0, len(text), 8))
    address = ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    if isinstance(address, IPv4Address):
        return address
    return None if address.is_unspecified else address.ipv4_mapped or address


def owner(link: str, deadline: float) -> int | None:
    """Return the lowest process id that has a descriptor of this kind open."""
    names = (path.name for path in Path("/proc").iterdir())
    for pid in sorted(int(name) for name in names if name.isdigit()):
        if time.monotonic() > deadline:
            return None
        with suppress(OSError):  # The process may have gone meanwhile.
            if any(shown(each) == link for each in Path(f"/proc/{pid}/fd").iterdir()):
                return pid
    return None


def shown(descriptor: Path) -> str:
    """Return what a descriptor is; empty if it has just been closed."""
    try:
        return str(descriptor.readlink())
    except OSError:
        return ""


def program(pid: int) -> str:
    """Return the name of a process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return UNKNOWN
