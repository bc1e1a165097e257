"""
The kernel's memory of connections, where it outlives a published port.

A udp flow follows its entry for as long as packets come, so after a port has moved to
another container its old clients would stay with the old one for ever. After a change
of the map such entries are deleted, and the next packet is decided anew.

Which entries those are: the original direction goes to the protocol and port of the
element, and to its address or, if it stands for every address, to one that the kernel's
local table has (what `fib daddr type local` matches). So a flow *through* the host to
the same port of another machine stays, translated or not. Of the flows to the host
itself those go that were translated, and udp ones that were not: their client came
before the port was published. A tcp connection that was not translated is with a
program of the host or with a relay of ours, and stays.

The requests are packed by hand: pyroute2 does not read the ports of sctp, and its
deletions leave out id and zone, by which the kernel tells entries apart.
"""

import asyncio
import errno
import socket
import struct
import time
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from cnmdriver.dataplane.handler import BOUND, refusal, too_slow
from cnmdriver.model import PROTOCOLS, TCP, UDP, IPNetwork
from cnmdriver.plan.ops import Element
from cnmdriver.settling import settled

MAPS = {"any4": 4, "any6": 6, "bound4": 4, "bound6": 6}
NUMBERS = {name: number for number, name in PROTOCOLS.items()}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
VERSIONS = {int(family): version for version, family in FAMILIES.items()}

ENTRIES_PER_WALK = 2_000
"""The kernel's walk through its table costs about what so many entries cost here."""

DELETIONS = 64
"""How many requests wait for their answers at once: all fit the receive buffer."""

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
SOL_NETLINK, STRICT_CHECK = 270, 12
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
ERROR, DONE = 2, 3
GET_ROUTE, TABLE_LOCAL, ROUTE_LOCAL, ROUTE_TO = 26, 255, 2, 1
GET_ENTRY, DELETE_ENTRY, GET_STATISTICS, COUNT = 0x101, 0x102, 0x105, 1
ORIGINAL, REPLY, ID, ZONE, FILTER = 1, 2, 12, 18, 25
ADDRESSES, PORTS = 1, 2
NUMBER, SOURCE_PORT, DESTINATION_PORT = 1, 2, 3
SOURCE, DESTINATION = {4: 1, 6: 3}, {4: 2, 6: 4}
FILTER_ORIGINAL, FILTER_NUMBER_AND_PORT = 1, 0x28
NESTED = 0x8000

Place = tuple[bytes, int]
"""An address, as the kernel packs it, and a port."""


Kind = tuple[int, int, int]
"""IP version, protocol, and the port flows are sent to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A published port, as an element states it."""

    kind: Kind
    address: bytes | None
    target: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """An entry: where its first packet was sent, and who answers it in truth."""

    kind: Kind
    sent_to: Place
    answered_by: Place
    handle: bytes
    """The request's words by which the kernel finds this very entry."""


async def forget(elements: Sequence[Element], *, spare: bool = False) -> None:
    """
    Delete what the kernel remembers of connections to published ports.

    With `spare`, which is for elements just added, flows that go to the element's own
    target already stay, and so does all of tcp, whose clients begin anew by themselves.
    Elements of other sets are passed over. It looks at the network namespace of the
    calling thread, and takes `BOUND` seconds at most.
    """
    ports = [port(e) for e in elements if e.set in MAPS]
    if spare:
        ports = [p for p in ports if p.kind[1] != TCP]
    if not ports:
        return
    what = f"forgetting the connections to {len(ports)} published ports"
    try:
        with opened(NETLINK_NETFILTER) as entries, opened(NETLINK_ROUTE) as routes:
            work = asyncio.to_thread(sweep, entries, routes, ports, spare=spare)
            await settled(work)
    except TimeoutError as error:
        raise too_slow(what) from error
    except OSError as error:
        # Without conntrack the kernel knows neither the protocol nor the request.
        if error.errno not in {errno.EPROTONOSUPPORT, errno.EINVAL}:
            raise refusal(what, error.errno or errno.EIO) from error


def opened(protocol: int) -> socket.socket:
    """Open a netlink socket in the namespace of the calling thread."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def port(element: Element) -> Port:
    """Read an element of one of the maps of published ports."""
    *address, protocol, number = element.item
    target, target_port = element.value
    return Port(
        kind=(MAPS[element.set], NUMBERS[protocol], int(number)),
        address=ip_address(address[0]).packed if address else None,
        target=(ip_address(target).packed, int(target_port)),
    )


def sweep(
    entries: socket.socket, routes: socket.socket, ports: Sequence[Port], *, spare: bool
) -> None:
    """Find the flows and delete them; blocks, until the deadline at most."""
    deadline = time.monotonic() + BOUND
    by_kind: dict[Kind, list[Port]] = {}
    for each in ports:
        by_kind.setdefault(each.kind, []).append(each)
    flows = [
        (flow, port)
        for flow in found(entries, by_kind, deadline)
        for port in by_kind[flow.kind]
        if matches(flow, port) and not (spare and flow.answered_by == port.target)
    ]
    if any(port.address is None for _, port in flows):
        local = Local(routes, deadline)
        flows = [(f, p) for f, p in flows if p.address or f.sent_to[0] in local]
    delete(entries, {flow.handle for flow, _ in flows}, deadline)


def matches(flow: Flow, port: Port) -> bool:
    """Tell whether a flow came by the port, if its address is one of the host."""
    return port.address in {None, flow.sent_to[0]} and (
        flow.kind[1] == UDP or flow.sent_to != flow.answered_by
    )


class Local:
    """The addresses that are the host's own: its local routing table."""

    def __init__(self, routes: socket.socket, deadline: float) -> None:
        routes.setsockopt(SOL_NETLINK, STRICT_CHECK, 1)
        self._hosts: set[bytes] = set()
        self._networks: list[IPNetwork] = []
        for family in VERSIONS:
            head = struct.pack("=8BI", family, 0, 0, 0, TABLE_LOCAL, 0, 0, 0, 0)
            for message in dump(routes, GET_ROUTE, head, deadline):
                self._add(message)

    def __contains__(self, packed: bytes) -> bool:
        """Tell whether packets to the address are for the host."""
        if packed in self._hosts:
            return True
        address = ip_address(packed)
        return any(address in network for network in self._networks)

    def _add(self, message: bytes) -> None:
        _, length, _, _, table, _, _, kind = message[:8]
        to = attributes(message[12:]).get(ROUTE_TO)
        if to is None or (table, kind) != (TABLE_LOCAL, ROUTE_LOCAL):
            return
        if length == len(to) * 8:
            self._hosts.add(to)
        else:
            self._networks.append(ip_network((to, length)))


def found(
    entries: socket.socket, wanted: Collection[Kind], deadline: float
) -> Iterator[Flow]:
    """Yield the flows of some kinds, by as few looks at the table as is quick."""
    number = count(entries, deadline)
    if number == 0:
        return
    if number < (len(wanted) - 1) * ENTRIES_PER_WALK:
        requests = [bytes((socket.AF_UNSPEC, 0, 0, 0))]
    else:
        requests = [filtered(*kind) for kind in wanted]
    for request in requests:
        for message in dump(entries, GET_ENTRY, request, deadline):
            flow = read(message, wanted)
            if flow is not None:
                yield flow


def count(entries: socket.socket, deadline: float) -> int:
    """Return how many entries the kernel has."""
    entries.send(packed(GET_STATISTICS, REQUEST, bytes(4)))
    for kind, body in received(entries, deadline):
        if kind == ERROR:
            fail(body)
        (number,) = struct.unpack(">I", attributes(body[4:])[COUNT])
        return int(number)
    return 0


def filtered(version: int, protocol: int, number: int) -> bytes:
    """Pack the request for the entries to one port; old kernels answer with all."""
    what = attribute(NUMBER, bytes((protocol,)))
    what += attribute(DESTINATION_PORT, struct.pack(">H", number))
    by = attribute(FILTER_ORIGINAL, struct.pack("=I", FILTER_NUMBER_AND_PORT))
    return (
        bytes((FAMILIES[version], 0, 0, 0))
        + attribute(ORIGINAL | NESTED, attribute(PORTS | NESTED, what))
        + attribute(FILTER | NESTED, by)
    )


def read(message: bytes, wanted: Container[Kind]) -> Flow | None:
    """Read an entry, if it is of a kind that is wanted."""
    version = VERSIONS.get(message[0])
    there = part(message[4:], ORIGINAL)
    ends = attributes(part(there, PORTS))
    if version is None or DESTINATION_PORT not in ends:
        return None
    kind = (version, ends[NUMBER][0], int.from_bytes(ends[DESTINATION_PORT]))
    if kind not in wanted:
        return None
    rest = attributes(message[4:])
    back = rest[REPLY]
    named = b"".join(attribute(k, rest[k]) for k in (ZONE, ID) if k in rest)
    return Flow(
        kind=kind,
        sent_to=(part(part(there, ADDRESSES), DESTINATION[version]), kind[2]),
        answered_by=(
            part(part(back, ADDRESSES), SOURCE[version]),
            int.from_bytes(part(part(back, PORTS), SOURCE_PORT)),
        ),
        handle=message[:4] + attribute(ORIGINAL | NESTED, there) + named,
    )


def delete(entries: socket.socket, handles: Collection[bytes], deadline: float) -> None:
    """Delete the entries; one that has gone by itself is no error."""
    requests = [packed(DELETE_ENTRY, REQUEST | ACK, handle) for handle in handles]
    for at in range(0, len(requests), DELETIONS):
        some = requests[at : at + DELETIONS]
        entries.send(b"".join(some))
        answers = 0
        while answers < len(some):
            for kind, body in received(entries, deadline):
                if kind == ERROR:
                    answers += 1
                    fail(body, unless=errno.ENOENT)


def dump(
    sock: socket.socket, kind: int, request: bytes, deadline: float
) -> Iterator[bytes]:
    """Yield the bodies of all messages that answer one request; read it to its end."""
    sock.send(packed(kind, REQUEST | DUMP, request))
    while True:
        for answer, body in received(sock, deadline):
            if answer in {ERROR, DONE}:
                fail(body)
                return
            yield body


def received(sock: socket.socket, deadline: float) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of the messages the kernel sent at once."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
    data, at = sock.recv(65_536), 0
    while at < len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        yield kind, data[at + 16 : at + size]
        at += padded(size)


def fail(body: bytes, unless: int = 0) -> None:
    """Raise what the kernel reports, if it is an error."""
    code = -struct.unpack_from("=i", body)[0] if body else 0
    if code not in {0, unless}:
        raise OSError(code, errno.errorcode.get(code, ""))


def packed(kind: int, flags: int, body: bytes) -> bytes:
    """Pack a netlink message."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def attribute(kind: int, data: bytes) -> bytes:
    """Pack an attribute, with the bytes that fill it up to four."""
    size = 4 + len(data)
    return struct.pack("=HH", size, kind) + data + bytes(padded(size) - size)


def attributes(data: bytes) -> dict[int, bytes]:
    """Read the attributes of a message or of an attribute, by their type."""
    read, at = {}, 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        read[kind & 0x3FFF] = data[at + 4 : at + size]
        at += max(4, padded(size))
    return read


def part(data: bytes, wanted: int) -> bytes:
    """Return one attribute, found sooner than by reading all; empty without it."""
    at = 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        if kind & 0x3FFF == wanted:
            return data[at + 4 : at + size]
        at += max(4, padded(size))
    return b""


def padded(size: int) -> int:
    """Return the size with what fills it up to four."""
    return (size + 3) & ~3
