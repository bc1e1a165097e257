"""
Network namespaces of ours, by name.

One is ours by the alias of its loopback device, which it has before it has its name: a
daemon that dies in between leaves nothing. A name that is there without that mark may
be used if nothing is in it, as after `ip netns add`.
"""

from functools import partial

from cnmdriver.dataplane import mounts
from cnmdriver.dataplane.handler import Undo, only
from cnmdriver.dataplane.link import Link
from cnmdriver.dataplane.links import MARK
from cnmdriver.dataplane.place import Place, Places, identity
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.plan.ops import Namespace, Plan
from cnmdriver.plan.seats import BY_ITSELF
from cnmdriver.privileges import NO_ENTRY

LOOPBACK = "lo"


class Namespaces:
    """Makes namespaces, and knows which are ours."""

    together = False

    def __init__(self, places: Places, *, mark: str, name: str) -> None:
        """Take the name that is looked at, and how our marks begin."""
        self._places = places
        self._mark = f"{mark}namespace:"
        self._name = name

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Make each namespace, or take one that is empty."""
        for op in only(ops, Namespace):
            if not self._places.may_enter:
                raise KernelError(NO_ENTRY)
            place = await self._places.get(op.name)
            if place is None:
                undo.append(partial(self._remove, op.name))
                await self._make(op.name)
            elif not await self.is_ours(place):
                await self._refuse_used(place)
                undo.append(partial(self._mark_as, place, ""))
                await self._mark_as(place, f"{self._mark}{op.name}")

    async def clear(self, ops: Plan) -> None:
        """Remove the namespaces that are ours, with nothing left in them."""
        for op in only(ops, Namespace):
            await self._remove(op.name)

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return the namespace, if it is there and ours."""
        del wanted, devices
        place = await self._places.get(self._name)
        if place is None or not await self.is_ours(place):
            return ()
        return (Namespace(name=self._name),)

    async def is_ours(self, place: Place) -> bool:
        """Tell whether a namespace has our mark."""
        loopback = await place.netlink.link(LOOPBACK)
        return loopback is not None and self._is_marked(loopback)

    def _is_marked(self, loopback: Link) -> bool:
        return loopback.alias.startswith(self._mark)

    async def _make(self, name: str) -> None:
        descriptor = mounts.new_namespace()
        place = Place(name, descriptor)
        try:
            await place.open()
            await self._mark_as(place, f"{self._mark}{name}")
            mounts.mount(name, descriptor)
        finally:
            await place.close()

    async def _mark_as(self, place: Place, alias: str) -> None:
        loopback = await place.netlink.link(LOOPBACK)
        if loopback is None:
            raise KernelError(
                f"marking network namespace {place.name} failed: it has no {LOOPBACK}"
            )
        await place.netlink.change(loopback, ifalias=alias, state="up")

    async def _refuse_used(self, place: Place) -> None:
        """Leave a namespace that another uses."""
        stands = await self._used_by(place)
        if stands:
            raise Conflict(
                f"network namespace {place.name} is needed, but there is one of that "
                f"name that is not this daemon's: {stands}; remove it, or choose "
                "another with --namespace NAME"
            )

    async def _used_by(self, place: Place) -> str:
        loopback = await place.netlink.link(LOOPBACK)
        if loopback is not None and loopback.alias.startswith(MARK):
            return f"it has the mark {loopback.alias}"
        others = await self._others(place)
        if others:
            return f"it has device {others[0]}"
        there = identity(place.name)
        if there is not None and mounts.has_processes(there):
            return "a process is in it"
        return ""

    async def _others(self, place: Place) -> list[str]:
        links = await place.netlink.links()
        return [link.name for link in links if link.name not in BY_ITSELF]

    async def _remove(self, name: str) -> None:
        place = await self._places.get(name)
        if place is None or not await self.is_ours(place):
            return
        if await self._others(place):
            return
        if mounts.stays_here():
            # The host gave it, and could not be given another.
            await self._mark_as(place, "")
            await self._places.close(name)
            return
        await self._places.close(name)
        mounts.unmount(name)
