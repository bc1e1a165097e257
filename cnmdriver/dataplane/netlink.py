"""
The one door to rtnetlink: requests go in as words, answers come out as small values.

pyroute2 drops keywords it does not know without an error, so what is set here is read
back by the tests. `link_lookup` and the databases of pyroute2 are not used: they dump
all devices.
"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from cnmdriver.dataplane.handler import BOUND, refusal, too_slow
from cnmdriver.errors import KernelError
from cnmdriver.model import IPInterface, IPNetwork

UP = 0x1
NODAD = 0x02
PERMANENT = 0x80
MAIN_TABLE = 254
UNICAST = 1
GENMODE_NONE = 1
SKIP_STATS = 8
DUMP_TRIES = 5
BREATH = 64
"""After so many messages of a dump others get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A device as the kernel shows it; `other` is the far end if it is in sight."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    group: int
    alias: str
    master: int
    other: int | None
    up: bool
    genmode: int | None
    """How it makes IPv6 addresses of its own; None for a device without IPv6."""
    snooping: bool
    hairpin: bool
    isolated: bool


class Netlink:
    """A socket to the kernel of the namespace in which it is opened."""

    def __init__(self) -> None:
        self._socket: AsyncIPRoute | None = None
        self._dumping = asyncio.Lock()

    async def open(self) -> None:
        """Open the socket, in the namespace of the calling thread."""
        self._socket = AsyncIPRoute()
        await self._ask("opening a netlink socket", self._ip.setup_endpoint())

    async def close(self) -> None:
        """Close the socket; a second time does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _ip(self) -> AsyncIPRoute:
        if self._socket is None:
            raise KernelError("the dataplane is used before it was opened")
        return self._socket

    async def link(self, name: str) -> Link | None:
        """Return the device of that name, None if there is none."""
        return await self._link(f"looking for {name}", ifname=name)

    async def link_at(self, index: int) -> Link | None:
        """Return the device of that index, None if there is none."""
        return await self._link(f"looking for device {index}", index=index)

    def index(self, name: str) -> int | None:
        """Return the index of a device, None if there is none of that name."""
        try:
            return socket.if_nametoindex(name)
        except OSError:
            return None

    async def links(self, group: int | None = None) -> tuple[Link, ...]:
        """Return all devices of the namespace, or those of one group."""
        # Leaving out statistics halves what there is to decode.
        found = await self._dump("listing the devices", "link", ext_mask=SKIP_STATS)
        return tuple(
            _link(message)
            for message in found
            if group is None or message.get("IFLA_GROUP") == group
        )

    async def add(self, name: str, **request: Any) -> bool:
        """Make a device; tell whether it was made, False if a name is taken."""
        what = f"making device {name}"
        try:
            await self._request(what, self._ip.link("add", ifname=name, **request))
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
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

    async def port(self, link: Link, *, hairpin: bool, isolated: bool) -> None:
        """Change how a bridge treats its port."""
        # pyroute2 calls hairpin by the kernel's name of the attribute, "mode".
        flags = {"mode": int(hairpin), "isolated": int(isolated)}
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
        found = await self._dump("listing the addresses", "addr")
        names = {message["index"]: _device(message["index"]) for message in found}
        return tuple(
            (
                names[m["index"]],
                ipaddress.ip_interface(
                    (m.get("IFA_LOCAL") or m.get("IFA_ADDRESS"), m["prefixlen"])
                ),
            )
            for m in found
            if _flags(m) & PERMANENT
        )

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

    async def _link(self, what: str, **which: str | int) -> Link | None:
        try:
            request = self._ip.link("get", ext_mask=SKIP_STATS, **which)
            answer = await self._request(what, request)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise _refusal(what, error) from error
        return _link(answer[0]) if answer else None

    async def _dump(self, what: str, kind: str, **request: int) -> list[Any]:
        for _ in range(DUMP_TRIES):
            try:
                # The kernel has one dump at a time on a socket, else EBUSY.
                async with self._dumping:
                    found: list[Any] = await self._ask(
                        what, _collect(self._ip, kind, request)
                    )
            except NetlinkDumpInterrupted:
                continue
            return found
        raise KernelError(f"{what} failed: the devices change too fast; try again")

    async def _ask(self, what: str, request: Awaitable[Any]) -> Any:
        try:
            return await self._request(what, request)
        except NetlinkDumpInterrupted:
            raise
        except NetlinkError as error:
            raise _refusal(what, error) from error

    async def _request(self, what: str, request: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(BOUND):
                return await request
        except TimeoutError as error:
            raise too_slow(what) from error
        except OSError as error:
            raise refusal(what, error.errno or errno.EIO) from error


async def _collect(ip: AsyncIPRoute, kind: str, request: dict[str, int]) -> list[Any]:
    answers: AsyncIterator[Any] = await getattr(ip, kind)("dump", **request)
    found = []
    async for message in answers:
        found.append(message)
        if len(found) % BREATH == 0:
            await asyncio.sleep(0)
    return found


def _refusal(what: str, error: NetlinkError) -> KernelError:
    text = error.args[1] if len(error.args) > 1 else ""
    return refusal(what, error.code, str(text or ""))


def _device(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def _flags(message: Any) -> int:
    return int(message.get("IFA_FLAGS") or message["flags"])


def _devices(message: Any) -> list[int]:
    if message.get("RTA_OIF") is not None:
        return [message.get("RTA_OIF")]
    return [hop["oif"] for hop in message.get("RTA_MULTIPATH") or ()]


def _link(message: Any) -> Link:
    def port(name: str) -> bool:
        where = ("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA", f"IFLA_BRPORT_{name}")
        return bool(message.get_nested(*where))

    elsewhere = message.get("IFLA_LINK_NETNSID") is not None
    data = ("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_BR_MCAST_SNOOPING")
    mode = ("IFLA_AF_SPEC", "AF_INET6", "IFLA_INET6_ADDR_GEN_MODE")
    return Link(
        index=message["index"],
        name=message.get("IFLA_IFNAME"),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        mac=message.get("IFLA_ADDRESS") or "",
        mtu=message.get("IFLA_MTU") or 0,
        group=message.get("IFLA_GROUP") or 0,
        alias=message.get("IFLA_IFALIAS") or "",
        master=message.get("IFLA_MASTER") or 0,
        other=None if elsewhere else message.get("IFLA_LINK"),
        up=bool(message["flags"] & UP),
        genmode=message.get_nested(*mode),
        snooping=bool(message.get_nested(*data)),
        hairpin=port("MODE"),
        isolated=port("ISOLATED"),
    )
