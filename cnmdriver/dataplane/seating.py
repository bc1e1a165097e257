"""
What is done inside sandboxes: an interface set up as Docker would, and put away again.

A thread enters the sandbox for a moment and ends there. Nothing of it stays open, as
whatever is open keeps a dead sandbox alive.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

from cnmdriver.dataplane import rtnetlink
from cnmdriver.dataplane.handler import BOUND, refusal, too_slow
from cnmdriver.dataplane.inside import enter
from cnmdriver.dataplane.rtnetlink import (
    CREATE,
    DELETE_ADDRESS,
    EXCLUSIVE,
    NAME,
    NEW_ADDRESS,
    NEW_LINK,
    SET_LINK,
    UP,
)
from cnmdriver.model import IPInterface
from cnmdriver.plan.ops import Seat

SETTINGS = Path("/proc/sys/net")
LOCAL, ADDRESS, BROADCAST = 2, 1, 4
NODAD = 0x02
FAMILIES = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
GONE = {errno.ENODEV, errno.EADDRNOTAVAIL}

FACE = struct.Struct("=BBBBi")
"""How an address begins: family, length of its prefix, flags, scope, device."""

T = TypeVar("T")
A = TypeVarTuple("A")


@contextmanager
def opened(sandbox: str) -> Iterator[int]:
    """Open a sandbox by Docker's key of it as long as the block lasts."""
    try:
        descriptor = os.open(sandbox, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(f"opening sandbox {sandbox}", error.errno or 0) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def devices(sandbox: str) -> frozenset[str]:
    """
    Return the names of a sandbox's devices.

    Raises KernelError if the daemon could not set one up there.
    """
    with opened(sandbox) as descriptor:
        return await within(descriptor, f"entering sandbox {sandbox}", _devices)


async def furnished(descriptor: int, seat: Seat) -> None:
    """Set a new interface up in its sandbox."""
    what = f"setting up {seat.name} in sandbox {seat.sandbox}"
    await within(descriptor, what, furnish, seat)


async def vacate(seat: Seat, leaving: str) -> None:
    """
    Put an interface out of the way of the next one: its addresses, routes and name.

    The kernel takes long to delete a device, and these at once.
    """
    what = f"putting {seat.name} away in sandbox {seat.sandbox}"
    with opened(seat.sandbox) as descriptor:
        await within(descriptor, what, _vacate, seat, leaving)


async def within(
    descriptor: int | None,
    what: str,
    function: Callable[[Unpack[A]], T],
    *arguments: *A,
) -> T:
    """Call a function in a namespace, or the host's, in a thread that ends there."""

    def work() -> T:
        if descriptor is not None:
            enter(descriptor)
        return function(*arguments)

    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
    try:
        async with asyncio.timeout(BOUND):
            return await asyncio.shield(loop.run_in_executor(thread, work))
    except TimeoutError as error:
        raise too_slow(what) from error
    except OSError as error:
        raise refusal(what, error.errno or 0, error.strerror or "") from error
    finally:
        thread.shutdown(wait=False)


def _devices() -> frozenset[str]:
    if not os.access(SETTINGS / "ipv4/conf/lo/forwarding", os.W_OK):
        raise OSError(errno.EROFS, f"{SETTINGS} cannot be written")
    return frozenset(name for _, name in socket.if_nameindex())


def furnish(seat: Seat) -> None:
    """Set a new interface up in the thread's namespace; raises OSError."""
    index = socket.if_nametoindex(seat.name)
    six = any(address.version == 6 for address in seat.addresses)
    path = SETTINGS / "ipv6/conf" / seat.name / "disable_ipv6"
    # A device of less than 1280 bytes has no IPv6 at all.
    if path.exists():
        path.write_text("0" if six else "1", encoding="ascii")
    requests = [(NEW_LINK, 0, rtnetlink.link(index, flags=UP, mask=UP))]
    for address in seat.addresses:
        flags = NODAD if address.version == 6 else 0
        body = _face(index, address, flags)
        requests.append((NEW_ADDRESS, CREATE | EXCLUSIVE, body))
    rtnetlink.done(requests)


def _vacate(seat: Seat, leaving: str) -> None:
    try:
        index = socket.if_nametoindex(seat.name)
    except OSError:
        return
    name = rtnetlink.attribute(NAME, rtnetlink.text(leaving))
    faces = [(DELETE_ADDRESS, 0, _face(index, one, 0)) for one in seat.addresses]
    rename = (SET_LINK, 0, rtnetlink.link(index) + name)
    *codes, renamed = rtnetlink.asked([*faces, rename])
    if renamed == errno.EBUSY:
        # Before Linux 6.2 the name of a device that is up could not be changed.
        down = (SET_LINK, 0, rtnetlink.link(index, mask=UP))
        _, renamed = rtnetlink.asked([down, rename])
    for code in (*codes, renamed):
        if code and code not in GONE:
            raise OSError(code, os.strerror(code))


def _face(index: int, address: IPInterface, flags: int) -> bytes:
    """Pack an address of a device."""
    family, length = FAMILIES[address.version], address.network.prefixlen
    body = FACE.pack(family, length, flags, 0, index)
    for kind in (LOCAL, ADDRESS):
        body += rtnetlink.attribute(kind, address.ip.packed)
    if address.version == 4 and length < 31:
        body += rtnetlink.attribute(BROADCAST, address.network.broadcast_address.packed)
    return body
