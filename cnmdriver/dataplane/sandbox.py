"""Sandboxes, as far as the daemon may look: whether one is there, and what is in it."""

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from cnmdriver.dataplane.handler import refusal
from cnmdriver.dataplane.link import Link
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.dataplane.place import Place
from cnmdriver.model import IPAddress
from cnmdriver.plan.sight import Face, Inner, Way


def is_there(key: str) -> bool:
    """
    Tell whether Docker's key of a sandbox is a network namespace now.

    Docker bind-mounts the namespace on that path (libnetwork osl/namespace_linux.go);
    without the mount it is an empty file, or nothing.
    """
    try:
        return Path(key).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


@asynccontextmanager
async def opened(key: str) -> AsyncIterator[Place]:
    """Enter a sandbox; raises KernelError if it is gone or may not be entered."""
    what = f"entering sandbox {key}"
    try:
        descriptor = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(what, error.errno or 0) from error
    place = Place(what, descriptor)
    try:
        await place.open()
        yield place
    finally:
        # Whatever holds the descriptor keeps a dead sandbox alive.
        await place.close()


async def look(
    key: str, beyond: int | None, mac: str, towards: Iterable[IPAddress]
) -> Inner:
    """
    Read a sandbox's device, and how it reaches addresses.

    The device is known as the far end of a pair, or where that is lost by its MAC.
    """
    async with opened(key) as place:
        netlink = place.netlink
        link = await netlink.link_at(beyond) if beyond is not None else None
        if link is None:
            every = await netlink.links()
            link = next((one for one in every if one.mac == mac), None)
        if link is None:
            return Inner(face=None)
        addresses = [a.interface for a in await netlink.own() if a.device == link.name]
        face = Face(
            name=link.name,
            mac=link.mac,
            mtu=link.mtu,
            up=link.up,
            carrier=link.carrier,
            addresses=tuple(addresses),
        )
        ways = [await way(netlink, address) for address in towards]
        neighbours = await netlink.neighbours(link)
    return Inner(face=face, ways=tuple(ways), neighbours=neighbours)


async def way(netlink: Netlink, to: IPAddress) -> Way:
    """Return where packets to an address leave."""
    found = await netlink.towards(to)
    link: Link | None = None
    if found is not None and found.index:
        link = await netlink.link_at(found.index)
    if found is None or link is None:
        return Way(to=to)
    return Way(
        to=to,
        device=link.name,
        source=found.source,
        up=link.up,
        carrier=link.carrier,
        mtu=link.mtu,
    )
