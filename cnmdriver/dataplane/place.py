"""
A place: a network namespace in which operations hold, with the ways to reach it.

The host's is open as long as the daemon works. Others are opened by name when they are
needed. Whatever is open keeps a namespace alive, so one whose name is gone, or has come
to mean another namespace, is closed as soon as that is seen.
"""

import os
from collections.abc import Callable
from pathlib import Path

from cnmdriver.dataplane.handler import refusal
from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.dataplane.nft import Nft
from cnmdriver.plan.ops import HOST
from cnmdriver.privileges import may_enter

NAMES = Path("/run/netns")
"""Where `ip netns` has its names, each a mount of the namespace."""

Identity = tuple[int, int]


class Place:
    """One network namespace."""

    def __init__(self, name: str = HOST, descriptor: int | None = None) -> None:
        """Take the namespace's descriptor, which is closed with the place."""
        self.name = name
        self.descriptor = descriptor
        self.inside = Inside(name, descriptor)
        self.netlink = Netlink(self.inside)
        self.nft = Nft(self.inside)

    async def open(self) -> None:
        """Open sockets and thread; raises KernelError if something is missing."""
        try:
            await self.inside.open()
        except OSError as error:
            what = f"entering network namespace {self.name}"
            raise refusal(what, error.errno or 0) from error
        await self.netlink.open()
        await self.nft.open()

    async def close(self) -> None:
        """Let go of the namespace; a second time does nothing."""
        await self.nft.close()
        await self.netlink.close()
        self.inside.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def is_at(self, identity: Identity) -> bool:
        """Tell whether it is this namespace."""
        return self.descriptor is not None and identified(self.descriptor) == identity


class Places:
    """The places that are open, by name."""

    def __init__(self, opened: Callable[[Place], None]) -> None:
        """Take what is told of each place that is opened."""
        self._opened = opened
        self._open: dict[str, Place] = {}
        self.may_enter = may_enter()

    async def get(self, name: str) -> Place | None:
        """Return the place of that name as it is now, None if there is none."""
        there = identity(name)
        place = self._open.get(name)
        if place is not None and there is not None and place.is_at(there):
            return place
        await self.close(name)
        if there is None or not self.may_enter:
            return None
        try:
            descriptor = os.open(NAMES / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            what = f"opening network namespace {name}"
            raise refusal(what, error.errno or 0) from error
        return await self._opened_at(name, descriptor)

    async def close(self, name: str) -> None:
        """Close a place, if it is open."""
        place = self._open.pop(name, None)
        if place is not None:
            await place.close()

    async def close_all(self) -> None:
        """Close everything."""
        for name in list(self._open):
            await self.close(name)

    async def _opened_at(self, name: str, descriptor: int) -> Place:
        place = Place(name, descriptor)
        try:
            await place.open()
        except BaseException:
            await place.close()
            raise
        self._open[name] = place
        self._opened(place)
        return place


def identity(name: str) -> Identity | None:
    """Return what a name stands for, None if it stands for no namespace."""
    try:
        found = (NAMES / name).stat()
        # Without a mount the name is a file of another file system.
        if found.st_dev != Path("/proc/self/ns/net").stat().st_dev:
            return None
    except OSError:
        return None
    return (found.st_dev, found.st_ino)


def identified(descriptor: int) -> Identity:
    """Return what a descriptor stands for."""
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino)
