"""
The one door to rtnetlink: requests go in as words, answers come out as small values.

pyroute2 drops keywords it does not know without an error, so what is set here is read
back by the tests. `link_lookup` and the databases of pyroute2 are not used: they dump
all devices. It passes by the kernel's word that a dump is not of one moment, and is of
no more use once its socket has overflowed: both are seen to here.
"""

import asyncio
import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cnmdriver.dataplane import rtnetlink
from cnmdriver.dataplane.handler import BOUND, Refusal, refusal, too_slow, unknown_kind
from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.link import BRIDGE_FLAGS, Link, Port, read
from cnmdriver.dataplane.packed import Packed
from cnmdriver.errors import KernelError
from cnmdriver.model import IPAddress, IPInterface, IPNetwork
from cnmdriver.plan.sight import Near

NODAD = 0x02
PERMANENT = 0x80
UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40
"""Addresses that are temporary, taken by another, about to go, or not yet tried."""
MAIN_TABLE = 254
UNICAST = 1
BY_KERNEL = 2
DUMP_TRIES = 4
PAUSE = 0.02
"""Seconds after a dump in vain."""
INTERRUPTED = 0x10
"""The flag of a message that does not go together with those before it."""
PASSING = {errno.EBUSY, errno.EINTR, errno.ENOBUFS, errno.EAGAIN}
"""Refusals of a dump that the next one need not meet."""
GET_NAME, GET_INDEX = 0x8910, 0x8933
INDEX = struct.Struct("I")
NO_WAY = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.EACCES,
    errno.EINVAL,
}
BREATH = 16
"""After so many messages of a dump others get their turn."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """An address of this host, on a device."""

    device: str
    interface: IPInterface
    usable: bool
    """Whether packets to other machines can come from it."""
    lasting: bool
    """Whether it was given for good, not by DHCP or a router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where the kernel sends packets for an address, and where they come from."""

    index: int
    source: IPAddress | None


class Netlink:
    """A socket to the kernel of the namespace in which it is opened."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._socket: AsyncIPRoute | None = None
        self._names: socket.socket | None = None
        self._dumping = asyncio.Lock()
        self._renewing = asyncio.Lock()

    async def open(self) -> None:
        """Open the sockets, in the namespace of the thread."""
        what = "opening a netlink socket"
        try:
            rtnetlink, self._names = await self._inside.ask(what, _sockets)
        except OSError as error:
            raise refusal(what, error.errno or errno.EIO) from error
        self._socket = AsyncIPRoute(fileno=rtnetlink.detach())
        await self._ask(what, self._ip.setup_endpoint())

    async def close(self) -> None:
        """Close the sockets; a second time does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._names is not None:
            self._names.close()
            self._names = None

    @property
    def _ip(self) -> AsyncIPRoute:
        if self._socket is None:
            raise KernelError("the dataplane is used before it was opened")
        return self._socket

    async def link(self, name: str) -> Link | None:
        """Return the device of that name, None if there is none."""
        # For a new device that is the answer, and by far the cheaper question.
        if self.index(name) is None:
            return None
        return (await self.links_called([name]))[0]

    async def link_at(self, index: int) -> Link | None:
        """Return the device of that index, None if there is none."""
        return (await self.links_at([index]))[0]

    async def links_called(self, names: Iterable[str]) -> tuple[Link | None, ...]:
        """Return the device of each name, None where there is none."""
        return await self._described(map(rtnetlink.called, names))

    async def links_at(self, indexes: Iterable[int]) -> tuple[Link | None, ...]:
        """Return the device of each index, None where there is none."""
        return await self._described(map(rtnetlink.link, indexes))

    def index(self, name: str) -> int | None:
        """Return the index of a device, None if there is none of that name."""
        found = self._look(GET_INDEX, struct.pack("16sI", os.fsencode(name)[:15], 0))
        return None if found is None else int(INDEX.unpack_from(found, 16)[0])

    def name(self, index: int) -> str:
        """Return the name of a device, "" if there is none of that index."""
        found = self._look(GET_NAME, struct.pack("16sI", b"", index))
        return "" if found is None else os.fsdecode(found[:16].rstrip(b"\0"))

    def _look(self, what: int, request: bytes) -> bytes | None:
        # The functions of the socket module ask the namespace of the calling thread.
        if self._names is None:
            raise KernelError("the dataplane is used before it was opened")
        try:
            return fcntl.ioctl(self._names, what, request.ljust(40, b"\0"))
        except OSError:
            return None

    async def received(self, name: str) -> int | None:
        """Count the frames a device took, None if there is none of that name."""
        what = f"reading the counters of {name}"
        try:
            answer = await self._request(what, self._ip.link("get", ifname=name))
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise _refusal(what, error) from error
        counters = answer[0].get("IFLA_STATS64") or {}
        return int(counters.get("rx_packets", 0))

    async def links(self, group: int | None = None) -> tuple[Link, ...]:
        """Return all devices of the namespace, or those of one group."""
        what = "listing the devices"
        pooled: list[bytes] = []
        last: list[bytes] = []
        for _ in range(DUMP_TRIES):
            try:
                found, whole = await self._inside.ask(what, rtnetlink.links)
            except OSError as error:
                raise refusal(what, error.errno or errno.EIO) from error
            # As with other dumps: what stays is in one of two of them at least.
            pooled, last = ([], found) if whole else (pooled + last, found)
            if whole:
                break
        # One that was read twice counts as it was read last.
        latest = {rtnetlink.index(one): one for one in pooled + last}
        mark = b"" if group is None else rtnetlink.number(rtnetlink.GROUP, group)
        links = []
        for count, one in enumerate(latest.values(), 1):
            if mark in one:
                links.append(read(Packed(one)))
            if count % BREATH == 0:
                await asyncio.sleep(0)
        return tuple(links)

    async def add(self, name: str, **request: Any) -> bool:
        """Make a device; tell whether it was made, False if a name is taken."""
        what = f"making device {name}"
        try:
            await self._request(what, self._ip.link("add", ifname=name, **request))
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            if error.code == errno.EOPNOTSUPP:
                raise unknown_kind(what, request["kind"]) from error
            raise _refusal(what, error) from error
        return True

    async def change(self, link: Link, **request: Any) -> None:
        """Change a device in place."""
        words = ", ".join(sorted(name.lower() for name in request))
        what = f"setting {words} of {link.name}"
        await self._ask(what, self._ip.link("set", index=link.index, **request))

    async def generate(self, link: Link, mode: int) -> None:
        """Set how a device makes IPv6 addresses of its own; before it goes up."""
        family = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", mode]]}
        request = {"IFLA_AF_SPEC": {"attrs": [["AF_INET6", family]]}}
        what = f"keeping {link.name} from making addresses"
        try:
            await self._request(what, self._ip.link("set", index=link.index, **request))
        except NetlinkError as error:
            # With an MTU below 1280 a device has no IPv6, and makes none anyway.
            if error.code != errno.EAFNOSUPPORT:
                raise _refusal(what, error) from error

    async def port(self, link: Link, port: Port) -> None:
        """Change how a bridge treats its port."""
        flags = {word: int(getattr(port, name)) for name, word in BRIDGE_FLAGS.items()}
        await self._ask(
            f"setting the bridge port {link.name}",
            self._ip.brport("set", index=link.index, **flags),
        )

    async def remove(self, link: Link) -> None:
        """Remove a device; if it is gone that is well."""
        what = f"removing device {link.name}"
        try:
            await self._request(what, self._ip.link("del", index=link.index))
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise _refusal(what, error) from error

    async def addresses(self) -> tuple[tuple[str, IPInterface], ...]:
        """Return the lasting addresses of all devices, with the device's name."""
        return tuple((a.device, a.interface) for a in await self.own() if a.lasting)

    async def own(self) -> tuple[Own, ...]:
        """Return all addresses of all devices."""
        found = await self._dump("listing the addresses", "addr")
        names = {m["index"]: self.name(m["index"]) for m in found}
        return tuple(_own(message, names[message["index"]]) for message in found)

    async def add_address(self, link: Link, address: IPInterface) -> bool:
        """Add an address; tell whether it was added, False if it was there."""
        what = f"adding address {address} to {link.name}"
        flags = {"flags": NODAD} if address.version == 6 else {}
        place = {"index": link.index, "address": str(address.ip)}
        length = address.network.prefixlen
        try:
            await self._request(
                what, self._ip.addr("add", **place, prefixlen=length, **flags)
            )
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            raise _refusal(what, error) from error
        return True

    async def remove_address(self, link: Link, address: IPInterface) -> bool:
        """Remove an address; tell whether it was there."""
        what = f"removing address {address} from {link.name}"
        place = {"index": link.index, "address": str(address.ip)}
        length = address.network.prefixlen
        try:
            await self._request(what, self._ip.addr("del", **place, prefixlen=length))
        except NetlinkError as error:
            if error.code in {errno.EADDRNOTAVAIL, errno.ENODEV}:
                return False
            raise _refusal(what, error) from error
        return True

    async def neighbours(self, link: Link) -> tuple[Near, ...]:
        """Return what a device takes the MACs of addresses to be."""
        found = await self._dump("listing the neighbours", "neigh")
        return tuple(
            Near(
                address=ipaddress.ip_address(m.get("NDA_DST")),
                mac=m.get("NDA_LLADDR") or "",
                state=m["state"],
            )
            for m in found
            if m["ifindex"] == link.index and m.get("NDA_DST")
        )

    async def routes(self) -> tuple[tuple[IPNetwork, int], ...]:
        """Return network and device index of the main table's routes."""
        found = await self._dump("listing the routes", "route", table=MAIN_TABLE)
        return tuple(
            (ipaddress.ip_network((m.get("RTA_DST"), m["dst_len"])), index)
            for m in found
            if m["type"] == UNICAST
            and m.get("RTA_TABLE") == MAIN_TABLE
            and m["dst_len"] > 0
            for index in _devices(m)
        )

    async def sources(self) -> tuple[tuple[IPNetwork, int, IPAddress], ...]:
        """Return network, device index and source of routes with a source."""
        found = await self._dump("listing the routes", "route", table=MAIN_TABLE)
        return tuple(
            (
                ipaddress.ip_network((m.get("RTA_DST"), m["dst_len"])),
                m.get("RTA_OIF"),
                ipaddress.ip_address(m.get("RTA_PREFSRC")),
            )
            for m in found
            if m["type"] == UNICAST
            and m["proto"] != BY_KERNEL
            and m.get("RTA_TABLE") == MAIN_TABLE
            and m.get("RTA_OIF")
            and m.get("RTA_PREFSRC")
            and m["dst_len"] > 0
        )

    async def put_route(self, link: Link, to: IPNetwork, source: IPAddress) -> None:
        """Have packets for a network leave by a device, in place of any other way."""
        what = f"routing {to} by {link.name} from {source}"
        await self._ask(what, self._ip.route("replace", **_route(link, to, source)))

    async def remove_route(self, link: Link, to: IPNetwork, source: IPAddress) -> bool:
        """Remove such a route; tell whether it was there."""
        what = f"removing the route to {to} by {link.name}"
        try:
            request = self._ip.route("del", **_route(link, to, source))
            await self._request(what, request)
        except NetlinkError as error:
            if error.code in {errno.ESRCH, errno.ENODEV}:
                return False
            raise _refusal(what, error) from error
        return True

    async def add_default(self, link: Link, gateway: IPAddress) -> None:
        """Send what has no other way to a gateway; one that is there already stays."""
        what = f"routing by {gateway}"
        place = {"dst": "default", "gateway": str(gateway), "oif": link.index}
        family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
        try:
            await self._request(what, self._ip.route("add", family=family, **place))
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise _refusal(what, error) from error

    async def towards(self, address: IPAddress) -> Way | None:
        """Return the way to an address, None if there is none."""
        what = f"looking for the way to {address}"
        try:
            request = self._ip.route("get", dst=str(address))
            answer = await self._request(what, request)
        except NetlinkError as error:
            if error.code in NO_WAY:
                return None
            raise _refusal(what, error) from error
        source = answer[0].get("RTA_PREFSRC")
        return Way(
            index=answer[0].get("RTA_OIF") or 0,
            source=ipaddress.ip_address(source) if source else None,
        )

    async def _described(self, which: Iterable[bytes]) -> tuple[Link | None, ...]:
        what, packed = "looking at devices", tuple(which)
        if not packed:
            return ()
        try:
            answers = await self._inside.ask(what, rtnetlink.described, packed)
        except OSError as error:
            raise refusal(what, error.errno or errno.EIO) from error
        found: list[Link | None] = []
        for one in answers:
            if isinstance(one, int) and one != errno.ENODEV:
                raise refusal(what, one)
            found.append(None if isinstance(one, int) else read(Packed(one)))
        return tuple(found)

    async def _dump(self, what: str, kind: str, **request: int) -> list[Any]:
        """
        Return the messages of a dump.

        While things come and go all the time no dump is of one moment. What stays is
        hardly in none of them, so they are put together, the older first. One that
        seems whole can still lack something, if seldom: seen on Linux 6.18 with
        addresses that came and went without a pause. So what one look lacks the next
        has to lack as well.
        """
        pooled: list[Any] = []
        for count in range(1, DUMP_TRIES + 1):
            try:
                # The kernel has one dump at a time on a socket, else EBUSY.
                async with self._dumping:
                    dump = _collect(self._ip, kind, request)
                    found, whole = await self._ask(what, dump, None)
            except Refusal as error:
                if error.code not in PASSING or count == DUMP_TRIES:
                    raise
            else:
                if whole:
                    return found
                pooled += found
            await asyncio.sleep(PAUSE)
        return pooled

    async def _ask(
        self, what: str, request: Awaitable[T], bound: float | None = BOUND
    ) -> T:
        try:
            return await self._request(what, request, bound)
        except NetlinkError as error:
            raise _refusal(what, error) from error

    async def _request(
        self, what: str, request: Awaitable[T], bound: float | None = BOUND
    ) -> T:
        used = self._socket
        try:
            async with asyncio.timeout(bound):
                return await request
        except TimeoutError as error:
            await self._renew(used)
            raise too_slow(what) from error
        except OSError as error:
            await self._renew(used)
            raise refusal(what, error.errno or errno.EIO) from error
        finally:
            drop_late(used)

    async def _renew(self, used: AsyncIPRoute | None) -> None:
        """
        Ask by another socket from now on.

        One that overflowed has lost answers, and gives its error to all who ask after.
        """
        async with self._renewing:
            if used is None or used is not self._socket:
                return
            try:
                rtnetlink, names = await self._inside.ask("opening a socket", _sockets)
            except (OSError, KernelError):
                # The next who asks meets the same error, and tries again.
                return
            names.close()
            if used is self._socket:
                self._socket = AsyncIPRoute(fileno=rtnetlink.detach())
                used.close()
            else:
                rtnetlink.close()


def drop_late(ip: AsyncIPRoute | None) -> None:
    """
    Drop what came after an answer.

    The kernel also acknowledges what it has answered, and pyroute2 keeps that for ever:
    for whoever asks for messages that belong to no request.
    """
    queue = getattr(ip, "msg_queue", None)
    while queue is not None and not queue.root.empty():
        queue.root.get_nowait()
        queue.root.task_done()


async def _collect(
    ip: AsyncIPRoute, kind: str, request: dict[str, int]
) -> tuple[list[Any], bool]:
    """Return all messages of a dump, and whether they are of one moment."""
    found = []
    whole = True
    loop = asyncio.get_running_loop()
    with _ends(ip) as ends:
        async with asyncio.timeout(BOUND) as limit:
            answers: AsyncIterator[Any] = await getattr(ip, kind)("dump", **request)
            async for message in answers:
                found.append(message)
                whole = whole and not message["header"]["flags"] & INTERRUPTED
                if len(found) % BREATH == 0:
                    # What is bounded is the kernel's time, not that of reading much.
                    limit.reschedule(loop.time() + BOUND)
                    await asyncio.sleep(0)
    return found, whole and not any(flags & INTERRUPTED for flags in ends)


@contextmanager
def _ends(ip: AsyncIPRoute) -> Iterator[list[int]]:
    """
    Note the flags of the message that ends a dump, which pyroute2 keeps to itself.

    If all that was left moved up meanwhile, that message alone tells of it.
    """
    ends: list[int] = []
    marshal: Any = ip.marshal
    usual = marshal.is_enough

    def is_enough(message: Any) -> Any:
        if message["header"]["type"] == rtnetlink.DONE:
            ends.append(message["header"]["flags"])
        return usual(message)

    marshal.is_enough = is_enough
    try:
        yield ends
    finally:
        marshal.is_enough = usual


def _refusal(what: str, error: NetlinkError) -> KernelError:
    text = error.args[1] if len(error.args) > 1 else ""
    return refusal(what, error.code, str(text or ""))


def _flags(message: Any) -> int:
    return int(message.get("IFA_FLAGS") or message["flags"])


def _devices(message: Any) -> list[int]:
    if message.get("RTA_OIF") is not None:
        return [message.get("RTA_OIF")]
    return [hop["oif"] for hop in message.get("RTA_MULTIPATH") or ()]


def _own(message: Any, device: str) -> Own:
    address = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
    flags = _flags(message)
    return Own(
        device=device,
        interface=ipaddress.ip_interface((address, message["prefixlen"])),
        usable=message["scope"] == 0 and not flags & UNUSABLE,
        lasting=bool(flags & PERMANENT),
    )


def _route(link: Link, to: IPNetwork, source: IPAddress) -> dict[str, Any]:
    # Without a scope the kernel would look for a gateway.
    scope = {"scope": "link"} if to.version == 4 else {}
    return {"dst": str(to), "oif": link.index, "prefsrc": str(source), **scope}


def _sockets() -> tuple[socket.socket, socket.socket]:
    rtnetlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0)
    return rtnetlink, socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
