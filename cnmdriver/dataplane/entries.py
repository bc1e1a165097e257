"""
What the bridges and VXLAN devices of an overlay know: forwarding entries, neighbours.

A network has four of them for each remote endpoint, so they go to the kernel by the
hundred. The requests are packed by hand: pyroute2 needs a hundred microseconds for one,
the kernel two. In a send they are done in order, one that fails does not stop the
others, and only the last needs an answer to be known as done.

Each is first asked for as a new one. What was there already is then replaced: a failed
plan takes back only what it added. What it replaced stays replaced, until an audit.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv6Address
from itertools import count

from cnmdriver.courtesy import Courtesy
from cnmdriver.dataplane.handler import (
    BOUND,
    Refusal,
    Undo,
    only,
    refusal,
    too_slow,
)
from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.errors import KernelError
from cnmdriver.model import IPAddress
from cnmdriver.plan.ops import (
    FLOOD,
    HOST,
    Bridge,
    Fdb,
    Neighbour,
    Op,
    Plan,
    Veth,
    Vxlan,
    name,
)
from cnmdriver.settling import settled

Entry = Fdb | Neighbour

TOGETHER = 128
"""How many go in one send; in a millisecond at most others get their turn."""
READING, CHANGING = "reading the entries", "changing entries"
BUFFER = 1_048_576
"""Room for the answers if each of them fails."""

SO_RCVBUFFORCE, SOL_NETLINK, BRIEF_ANSWERS = 33, 270, 10
NEW, DELETE, GET, ERROR, DONE = 28, 29, 30, 2, 3
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
REPLACE, EXCLUSIVE, CREATE, APPEND = 0x100, 0x200, 0x400, 0x800
AF_BRIDGE = 7
FAMILIES = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
SELF, MASTER, STICKY = 0x02, 0x04, 0x40
STATIC, PERMANENT = 0x40, 0x80
DESTINATION, ADDRESS, VLAN = 1, 2, 5

MESSAGE = struct.Struct("=IHHII")
"""How each begins: size, type, flags, number, port."""
BODY = struct.Struct("=BxxxiHBB")
"""How an entry begins: family, device, state, flags, type."""
ANSWER = struct.Struct("=IHHIIi")
ATTRIBUTE = struct.Struct("=HH")

DUMP_TRIES = 4
INTERRUPTED = 0x10
"""The flag of a message that does not go together with those before it."""
PASSING = {errno.EBUSY, errno.EINTR, errno.ENOBUFS}
"""Refusals of a dump that the next one need not meet."""
GONE = {errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL, errno.EOPNOTSUPP}
"""What the kernel says to removing what is not there, or no port of a bridge."""


class Entries:
    """Makes entries hold, many at a time."""

    together = True

    def __init__(
        self, inside: Inside, netlink: Netlink, links: Links, where: str = HOST
    ) -> None:
        self._inside = inside
        self._netlink = netlink
        self._links = links
        self._where = where

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Add or replace each entry."""
        devices = await self._devices(ops)
        for op in _entries(ops):
            if op.device not in devices:
                raise KernelError(
                    f"adding {name(op)} failed: pynet has no device {op.device}"
                )
        added: list[Entry] = []
        undo.append(partial(self._take_back, added))
        with await self._socket() as sock:
            there: list[Entry] = []
            for some in _portions(ops):
                requests = [_new(op, devices[op.device]) for op in some]
                refused = await _send(sock, NEW, requests)
                added += [op for at, op in enumerate(some) if at not in refused]
                there += [some[at] for at in sorted(refused)]
                _raise_first("adding", some, refused, {errno.EEXIST})
            for some in _portions(there):
                requests = [_replacement(op, devices[op.device]) for op in some]
                refused = await _send(sock, NEW, requests)
                _raise_first("replacing", some, refused, set())

    async def clear(self, ops: Plan) -> None:
        """Remove each entry that is there."""
        devices = await self._devices(ops)
        have = [op for op in _entries(ops) if op.device in devices]
        failures: list[str] = []
        with await self._socket() as sock:
            for some in _portions(have):
                requests = [_removal(op, devices[op.device]) for op in some]
                refused = await _send(sock, DELETE, requests)
                try:
                    _raise_first("removing", some, refused, GONE)
                except KernelError as error:
                    failures.append(str(error))
        if failures:
            raise KernelError("; ".join(failures))

    async def found(self, wanted: Plan, devices: Plan, courtesy: Courtesy) -> Plan:
        """
        Return all entries of our devices.

        What is `wanted` and there is surely found, whatever comes and goes meanwhile.
        """
        if not only(devices, Vxlan):
            return ()
        kinds = (Bridge, Veth, Vxlan)
        named = [op for op in devices if isinstance(op, kinds)]
        at = {self._netlink.index(op.name): op for op in named}
        known = {index: op for index, op in at.items() if index is not None}
        with await self._socket() as sock:
            return await Reading(sock, known, self._where, wanted, courtesy).all()

    async def _take_back(self, added: Sequence[Entry]) -> None:
        await self.clear(tuple(added[::-1]))

    async def _devices(self, ops: Plan) -> dict[str, int]:
        """Return the indexes of those devices that are ours."""
        names = dict.fromkeys(op.device for op in _entries(ops))
        links = [await self._links.ours(device) for device in names]
        return {link.name: link.index for link in links if link is not None}

    async def _socket(self) -> socket.socket:
        what = "opening a netlink socket"
        try:
            return await self._inside.ask(what, _opened)
        except OSError as error:
            raise refusal(what, error.errno or 0) from error


class Reading:
    """
    A look at all entries, which takes a while and needs nothing but its own socket.

    The namespace can go meanwhile.
    """

    def __init__(
        self,
        sock: socket.socket,
        devices: Mapping[int, Op],
        where: str,
        wanted: Plan,
        courtesy: Courtesy,
    ) -> None:
        """Take the devices whose entries count, by index, and what is wanted."""
        self._courtesy = courtesy
        self._socket = sock
        self._devices = devices
        self._where = where
        self._wanted = wanted
        self._unseen: dict[int, set[Entry]] = {}
        """Wanted entries of a family that were in no dump."""
        self._found: dict[Entry, None] = {}
        self._numbers = count(1)

    async def all(self) -> Plan:
        """Read forwarding entries, then neighbours."""
        ports = {
            index: op.name
            for index, op in self._devices.items()
            if isinstance(op, Veth | Vxlan)
        }
        bridges = {
            index: op.name
            for index, op in self._devices.items()
            if isinstance(op, Bridge)
        }
        for some in _portions(self._wanted):
            for op in some:
                self._unseen.setdefault(_family(op), set()).add(op)
            await self._courtesy.stand_back()
        await self._dump(AF_BRIDGE, ports, self._forwarding)
        for family in FAMILIES.values():
            await self._dump(family, bridges, self._neighbour)
        return tuple(self._found)

    async def _dump(
        self,
        family: int,
        names: Mapping[int, str],
        read: "Callable[[str, int, int, bytes], Entry | None]",
    ) -> None:
        """Read a family again while it is not of one moment; add what it had to all."""
        unseen = self._unseen.get(family, set())
        last: list[Entry] = []
        for turn in range(1, DUMP_TRIES + 1):
            before, last = last, []
            try:
                whole = await self._read(family, names, read, last)
            except Refusal as error:
                if error.code not in PASSING or turn == DUMP_TRIES:
                    raise
                continue
            if whole:
                before = []
                break
        # What stays is in one of two dumps at least.
        for some in _portions(before + last):
            self._found.update(dict.fromkeys(some))
            unseen.difference_update(some)
            await self._courtesy.stand_back()
        await self._ask_for_rest(names, read, unseen)

    async def _ask_for_rest(
        self,
        names: Mapping[int, str],
        read: "Callable[[str, int, int, bytes], Entry | None]",
        unseen: Iterable[Entry],
    ) -> None:
        """
        Ask for each wanted entry that the dumps have not shown; add those there are.

        A dump goes on by counting: it passes by what has moved up since its last
        portion, and of forwarding entries the kernel does not say so. What has several
        destinations is not asked for, as only the first of them would be told.
        """
        at = {device: index for index, device in names.items()}
        rest = [op for op in unseen if op.device in at and op.mac != FLOOD]
        for some in _portions(rest):
            asked = dict(zip(some, self._numbers, strict=False))
            left = set(asked.values())
            questions = (
                _message(GET, REQUEST, number, _question(op, at[op.device]))
                for op, number in asked.items()
            )
            _sent(self._socket, READING, b"".join(questions))
            while left:
                data = _received(self._socket, READING)
                for kind, place, end in _messages(data):
                    number = MESSAGE.unpack_from(data, place)[3]
                    op = None
                    if number in left and kind == NEW:
                        op = _entry(names, read, data, place + MESSAGE.size, end)
                    left.discard(number)
                    if op is not None:
                        self._found[op] = None
            await self._courtesy.stand_back()

    async def _read(
        self,
        family: int,
        names: Mapping[int, str],
        read: "Callable[[str, int, int, bytes], Entry | None]",
        found: list[Entry],
    ) -> bool:
        """Read all entries of a family; tell whether they are of one moment."""
        asked = next(self._numbers)
        body = BODY.pack(family, 0, 0, 0, 0)
        _sent(self._socket, READING, _message(GET, REQUEST | DUMP, asked, body))
        whole = True
        while True:
            # The kernel can be at the deletion of a device, and takes its time.
            wait = asyncio.to_thread(_received, self._socket, READING)
            data = await settled(wait)
            for place, (kind, at, end) in enumerate(_messages(data)):
                _, _, word, number, _ = MESSAGE.unpack_from(data, at)
                if number != asked:
                    # Of an earlier dump, which ended with an error.
                    continue
                whole = whole and not word & INTERRUPTED
                if kind in {ERROR, DONE}:
                    _fail(READING, data, at)
                    return whole
                op = _entry(names, read, data, at + MESSAGE.size, end)
                if op is not None:
                    found.append(op)
                if place % TOGETHER == TOGETHER - 1:
                    await self._courtesy.stand_back()
            await self._courtesy.stand_back()

    def _forwarding(
        self, device: str, state: int, flags: int, body: bytes
    ) -> Fdb | None:
        have = dict(_attributes(body))
        mac, to = have.get(ADDRESS), have.get(DESTINATION)
        if mac is None or VLAN in have:
            return None
        if flags & SELF:
            if to is None:
                return None
            dst = _address(to)
        elif state == STATIC and flags & STICKY:
            dst = None
        else:
            return None
        return Fdb(where=self._where, device=device, mac=mac.hex(":"), dst=dst)

    def _neighbour(
        self, device: str, state: int, flags: int, body: bytes
    ) -> Neighbour | None:
        del flags
        have = dict(_attributes(body))
        mac, address = have.get(ADDRESS), have.get(DESTINATION)
        if state != PERMANENT or mac is None or address is None:
            return None
        return Neighbour(
            where=self._where,
            device=device,
            address=_address(address),
            mac=mac.hex(":"),
        )


def _entry(
    names: Mapping[int, str],
    read: Callable[[str, int, int, bytes], Entry | None],
    data: bytes,
    start: int,
    end: int,
) -> Entry | None:
    """Read one entry, None if it does not count."""
    _, index, state, flags, _ = BODY.unpack_from(data, start)
    device = names.get(index)
    if device is None:
        return None
    return read(device, state, flags, data[start + BODY.size : end])


def _opened() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    # More than the host's own limit, which root may exceed.
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    sock.setsockopt(SOL_NETLINK, BRIEF_ANSWERS, 1)
    sock.settimeout(BOUND)
    return sock


def _entries(ops: Sequence[Op]) -> Iterator[Entry]:
    return (op for op in ops if isinstance(op, Entry))


def _portions(ops: Sequence[Op]) -> Iterator[list[Entry]]:
    entries = list(_entries(ops))
    for at in range(0, len(entries), TOGETHER):
        yield entries[at : at + TOGETHER]


def _new(op: Entry, index: int) -> tuple[int, bytes]:
    return CREATE | EXCLUSIVE, _body(op, index)


def _replacement(op: Entry, index: int) -> tuple[int, bytes]:
    many = isinstance(op, Fdb) and op.mac == FLOOD
    return CREATE | (APPEND if many else REPLACE), _body(op, index)


def _family(op: Entry) -> int:
    return FAMILIES[op.address.version] if isinstance(op, Neighbour) else AF_BRIDGE


def _question(op: Entry, index: int) -> bytes:
    """Pack what asks for one entry."""
    head = BODY.pack(_family(op), index, 0, 0, 0)
    if isinstance(op, Neighbour):
        return head + _attribute(DESTINATION, op.address.packed)
    flags = MASTER if op.dst is None else SELF
    head = BODY.pack(AF_BRIDGE, index, 0, flags, 0)
    return head + _lladdr(bytes.fromhex(op.mac.replace(":", "")))


def _removal(op: Entry, index: int) -> tuple[int, bytes]:
    return 0, _body(op, index)


def _body(op: Entry, index: int) -> bytes:
    """Pack what says which entry: the same for a new one and for a removal."""
    mac = bytes.fromhex(op.mac.replace(":", ""))
    if isinstance(op, Neighbour):
        family = FAMILIES[op.address.version]
        head = BODY.pack(family, index, PERMANENT, 0, 0)
        return head + _attribute(DESTINATION, op.address.packed) + _lladdr(mac)
    if op.dst is None:
        return BODY.pack(AF_BRIDGE, index, STATIC, MASTER | STICKY, 0) + _lladdr(mac)
    head = BODY.pack(AF_BRIDGE, index, PERMANENT, SELF, 0)
    return head + _lladdr(mac) + _attribute(DESTINATION, op.dst.packed)


def _lladdr(mac: bytes) -> bytes:
    return b"\x0a\x00\x02\x00" + mac + b"\x00\x00"


def _attribute(kind: int, data: bytes) -> bytes:
    return ATTRIBUTE.pack(4 + len(data), kind) + data


async def _send(
    sock: socket.socket, kind: int, requests: Sequence[tuple[int, bytes]]
) -> dict[int, int]:
    """Send requests, and return the errno of each that failed, by its number."""
    last = len(requests) - 1
    messages = (
        _message(kind, flags | REQUEST | (ACK if at == last else 0), at, body)
        for at, (flags, body) in enumerate(requests)
    )
    _sent(sock, CHANGING, b"".join(messages))
    refused: dict[int, int] = {}
    done = False
    while not done:
        data = _received(sock, CHANGING)
        for _, at, _ in _messages(data):
            *_, number, _, code = ANSWER.unpack_from(data, at)
            if code:
                refused[number] = -code
            done = done or number == last
    await asyncio.sleep(0)
    return refused


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return MESSAGE.pack(MESSAGE.size + len(body), kind, flags, number, 0) + body


def _sent(sock: socket.socket, what: str, data: bytes) -> None:
    try:
        sock.send(data)
    except OSError as error:
        raise refusal(what, error.errno or errno.EIO) from error


def _received(sock: socket.socket, what: str) -> bytes:
    try:
        return sock.recv(65_536)
    except TimeoutError as error:
        raise too_slow(what) from error
    except OSError as error:
        raise refusal(what, error.errno or errno.EIO) from error


def _messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield type, place and end of each message that came at once."""
    at = 0
    while at + 16 <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        yield kind, at, at + size
        at += (size + 3) & ~3


def _attributes(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(body):
        size, kind = ATTRIBUTE.unpack_from(body, at)
        yield kind & 0x3FFF, body[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)


@lru_cache(1024)
def _address(packed: bytes) -> IPAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _fail(what: str, data: bytes, at: int) -> None:
    code = -ANSWER.unpack_from(data, at)[5]
    if code:
        raise refusal(what, code)


def _raise_first(
    verb: str, ops: Sequence[Entry], refused: Mapping[int, int], spare: set[int]
) -> None:
    """Raise the first error that is none of those to be expected."""
    for at, code in sorted(refused.items()):
        if code not in spare:
            raise refusal(f"{verb} {name(ops[at])}", code, os.strerror(code))
