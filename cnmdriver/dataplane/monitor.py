"""
The kernel's own news: something of ours may have been changed by somebody else.

Sockets in the host's namespace and in pynet's own are told of each change of devices,
addresses, routes, entries and firewall (rtnetlink(7), linux/netfilter/nfnetlink.h).
What is not ours is passed by. What is said is only a hint: whoever is woken looks at
all. A socket that overflowed has lost news, which is news too.

Our own changes are told as well, so the looker is woken no more often than costs it a
tenth of its time.
"""

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator

from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.place import Identity
from cnmdriver.plan.ops import GROUP, HOST

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1
LINK, NEIGH, IPV4_ADDRESS, IPV4_ROUTE, IPV6_ADDRESS, IPV6_ROUTE = 1, 3, 5, 7, 9, 11
NFTABLES = 7
BUFFER = 1 << 20
LARGEST = 1 << 16
AT_ONCE = 64
"""Messages read before others get their turn."""

HEADER = struct.Struct("=IHHII")
NEW_LINK, DELETE_LINK = 16, 17
NEW_NEIGHBOUR = 28
ADDRESSES = {20, 21}
ROUTES = {24, 25}
OUTGOING = struct.Struct("=HHI")
RTA_OIF = 4
LASTING = 0x80 | 0x40
"""NUD_PERMANENT and NUD_NOARP: other states come and go by themselves."""
OURS = struct.pack("=HHI", 8, 27, GROUP)
"""IFLA_GROUP as it stands in a message."""
RULES = (b"pynet\0", b"DOCKER-USER\0")
"""What a message about our part of the firewall has in it."""


class Ear:
    """The sockets in one namespace."""

    def __init__(self, where: str, identity: Identity | None) -> None:
        """Name the namespace; `identity` says which one has that name."""
        self.where = where
        self.identity = identity
        self.sockets: list[socket.socket] = []
        self.indexes: set[int] = set()
        """Of our devices, as far as was heard."""

    async def open(self, inside: Inside) -> None:
        """Open the sockets in the thread's namespace."""
        what = "listening to the kernel"
        self.sockets = await inside.ask(what, opened, self.where == HOST)

    def close(self) -> None:
        """Hear no more."""
        loop = asyncio.get_running_loop()
        for each in self.sockets:
            loop.remove_reader(each)
            each.close()
        self.sockets = []

    def listen(self, heard: Callable[[], None]) -> None:
        """Call back whenever something of ours may have changed."""
        loop = asyncio.get_running_loop()
        for each in self.sockets:
            loop.add_reader(each, self.read, each, heard)

    def read(self, source: socket.socket, heard: Callable[[], None]) -> None:
        """Read what there is, as far as fits into a turn."""
        for _ in range(AT_ONCE):
            try:
                data = source.recv(LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    heard()
                return
            firewall = source.proto == NETLINK_NETFILTER
            if any(name in data for name in RULES) if firewall else self.concerns(data):
                heard()

    def concerns(self, data: bytes) -> bool:
        """Tell whether messages are about something of ours."""
        # All are looked at: from some the indexes of our devices are learnt.
        verdicts = [self.is_ours(kind, body) for kind, body in messages(data)]
        return any(verdicts)

    def is_ours(self, kind: int, body: bytes) -> bool:
        """Tell whether one message is about something of ours."""
        if kind in {NEW_LINK, DELETE_LINK}:
            (index,) = struct.unpack_from("=i", body, 4)
            if OURS in body:
                self.indexes.add(index)
                return True
            return index in self.indexes
        if kind == NEW_NEIGHBOUR and not struct.unpack_from("=H", body, 8)[0] & LASTING:
            return False
        if self.where != HOST:
            return True
        if kind in ADDRESSES:
            return struct.unpack_from("=I", body, 4)[0] in self.indexes
        return kind in ROUTES and bool(self.indexes.intersection(outgoing(body)))


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of the netlink messages in what was received."""
    place = 0
    while place + HEADER.size <= len(data):
        length, kind, *_ = HEADER.unpack_from(data, place)
        if length < HEADER.size:
            return
        body = data[place + HEADER.size : place + length]
        # The shortest that is looked into has twelve bytes before its attributes.
        if len(body) >= 12:
            yield kind, body
        place += (length + 3) & ~3


def outgoing(body: bytes) -> Iterator[int]:
    """Yield the devices of a route's message."""
    place = 12
    while place + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, place)
        if length < 4:
            return
        if kind == RTA_OIF and length == 8 and place + 8 <= len(body):
            yield struct.unpack_from("=I", body, place + 4)[0]
        place += (length + 3) & ~3


def opened(host: bool) -> list[socket.socket]:
    """Open the sockets in the namespace of the calling thread."""
    groups = [LINK, IPV4_ADDRESS, IPV4_ROUTE, IPV6_ADDRESS, IPV6_ROUTE]
    if not host:
        # The host's own neighbours are none of ours, and come and go.
        groups.append(NEIGH)
    return [
        subscribed(NETLINK_ROUTE, groups),
        subscribed(NETLINK_NETFILTER, [NFTABLES]),
    ]


def subscribed(protocol: int, groups: list[int]) -> socket.socket:
    """Open a socket that hears what the kernel tells some groups."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    with contextlib.suppress(OSError):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    made.bind((0, 0))
    for group in groups:
        made.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)
    made.setblocking(False)
    return made
