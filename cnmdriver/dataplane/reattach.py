"""
A container whose device was deleted gets another one, as Docker had made it.

Docker moves a device into a sandbox once, and never looks again. Its name there is its
prefix and the lowest free number (libnetwork osl/interface_linux.go).
"""

from pathlib import Path

from cnmdriver.dataplane.link import Link
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.dataplane.place import Place
from cnmdriver.dataplane.sandbox import opened
from cnmdriver.errors import KernelError
from cnmdriver.model import Attachment, IPInterface
from cnmdriver.plan.ops import Seat

MOST = 64
"""Devices of one prefix in a sandbox."""


async def reattach(
    outer: Netlink,
    sandbox: str,
    attachment: Attachment,
    addresses: tuple[IPInterface, ...],
    mac: str,
    seat: Seat | None,
) -> str:
    """
    Move a new device into a sandbox and set it up; return its name there.

    One that has its seat already is left as it is, but for the way out. One that was
    moved before, by its MAC, is set up.
    """
    async with opened(sandbox) as place:
        inner = await place.netlink.link(seat.name) if seat is not None else None
        if inner is None:
            inner = await _moved(outer, place, attachment, mac)
            await _set_up(place, inner, addresses)
        await _lead_out(place, inner, attachment)
        return inner.name


async def _moved(
    outer: Netlink, place: Place, attachment: Attachment, mac: str
) -> Link:
    """Move a device into a sandbox, or find it there."""
    link = await outer.link(attachment.device)
    if link is None:
        for each in await place.netlink.links():
            if (each.kind, each.mac) == ("veth", mac):
                return each
        raise KernelError(f"device {attachment.device} is not there")
    name = await _free_name(place.netlink, attachment.prefix)
    await outer.change(link, net_ns_fd=place.descriptor, ifname=name)
    inner = await place.netlink.link(name)
    if inner is None:
        raise KernelError(f"device {name} is not in the sandbox it was moved to")
    return inner


async def _set_up(
    place: Place, inner: Link, addresses: tuple[IPInterface, ...]
) -> None:
    six = any(address.version == 6 for address in addresses)
    what = f"setting up {inner.name}"
    await place.inside.ask(what, _allow_ipv6, inner.name, six)
    await place.netlink.change(inner, state="up")
    for address in addresses:
        await place.netlink.add_address(inner, address)


async def _lead_out(place: Place, inner: Link, attachment: Attachment) -> None:
    for gateway in (attachment.gateway4, attachment.gateway6):
        if gateway is not None:
            await place.netlink.add_default(inner, gateway)


async def _free_name(inner: Netlink, prefix: str) -> str:
    for number in range(MOST):
        name = f"{prefix}{number}"
        if inner.index(name) is None:
            return name
    raise KernelError(f"the sandbox has {MOST} devices called {prefix} and a number")


def _allow_ipv6(name: str, allowed: bool) -> None:
    path = Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
    if path.exists():
        path.write_text("0" if allowed else "1", encoding="ascii")
