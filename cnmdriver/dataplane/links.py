"""
Devices: bridges, VXLAN devices, veth pairs and the ends of them that the host uses.

A device is ours by its alias, or, if the daemon died between making it and giving it
its alias, by link group and name. Another host's alias (two daemons on one kernel with
different state) and everything else is foreign: it is named in an error and left.

What has an end in the host's namespace is made from there, in its place at once: a move
costs more than all the rest, and a VXLAN device has its UDP socket where it was made.
"""

import asyncio
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cnmdriver.dataplane import groups, kinds, pairs, sandbox, seating
from cnmdriver.dataplane.handler import Refusal, Undo, only, refusal, unknown_kind
from cnmdriver.dataplane.kinds import Device
from cnmdriver.dataplane.link import Link, Port
from cnmdriver.dataplane.place import Place
from cnmdriver.dataplane.sockets import holder
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import UDP
from cnmdriver.plan.ops import GROUP, Bridge, Interface, Plan, Seat, Veth, Vxlan

MARK = "pynet:"
OWN = Path("/proc/thread-self/ns/net")
"""The namespace of the thread that opens it: the event loop's is in the host's."""
TRIES, PAUSE = 50, 0.02
"""A namespace that was removed keeps VNIs until the kernel gets round to it."""


class Links:
    """Makes devices in a place, and knows which there are ours."""

    together = False

    def __init__(self, place: Place, host: Place, *, mark: str, namespace: str) -> None:
        """Take the host's place too, and the name of pynet's own."""
        self._place = place
        self._netlink = place.netlink
        self._outer = host.netlink
        self._mark = mark
        self._namespace = namespace
        self._known: dict[int, str] = {}
        """Names by index: a device stays ours when a stranger takes its marks off."""

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Make each device, or make the one that is there as wanted."""
        for op in ops:
            if isinstance(op, Device):
                try:
                    await self._hold(op, undo)
                except Refusal as error:
                    if error.code != errno.ENODEV:
                        raise
                    # It was removed while it was looked at: it is made anew.
                    await self._hold(op, undo)

    async def clear(self, ops: Plan) -> None:
        """
        Remove the devices that are ours; a pair goes with one of its ends.

        Pairs go together.
        """
        pairs = only(ops, Veth)
        together = bool(pairs) and await self._remove_together(pairs)
        for op in ops:
            if isinstance(op, Device) and not (together and op in pairs):
                await self._remove(op.name)

    async def devices(self, wanted: Plan) -> Plan:
        """Return our devices, bridges first."""
        links = await self._grouped()
        await self._learn(links)
        far = await self._outer.links(GROUP) if self._is_elsewhere else ()
        at = {link.index: link for link in links}
        ends = {(link.beyond, link.index): link for link in far if link.kind == "veth"}
        tunnels = {op.name: op for op in only(wanted, Vxlan)}
        found: list[Device] = []
        for link in links:
            if not self._is_marked(link):
                continue
            master = at.get(link.master)
            match link.kind:
                case "bridge":
                    found.append(kinds.bridge(link))
                case "vxlan":
                    found.append(kinds.vxlan(link, master, tunnels.get(link.name)))
                case "veth":
                    other = at.get(link.other or 0)
                    other = other or ends.get((link.index, link.beyond or 0))
                    found.append(self._veth(link, other, master))
        return tuple(
            replace(op, where=self._place.name) for op in sorted(found, key=_rank)
        )

    async def _learn(self, links: Iterable[Link]) -> None:
        marked = {link.index: link.name for link in links if self._is_marked(link)}
        missing = tuple(self._known.keys() - marked.keys())
        # The kernel gives no index twice while a namespace lives.
        there = await self._netlink.links_at(missing)
        for index, link in zip(missing, there, strict=True):
            if link is None:
                self._known.pop(index, None)
        self._known |= marked

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices that another host of pynet's marked."""
        return tuple(
            (link.name, link.alias)
            for link in await self._grouped()
            if link.alias.startswith(MARK) and not link.alias.startswith(self._mark)
        )

    async def foreign_vnis(self) -> frozenset[int]:
        """Return the VXLAN network identifiers of devices that are not ours."""
        return frozenset(
            link.tunnel.vni
            for link in await self._netlink.links()
            if link.tunnel is not None and not self._is_ours(link)
        )

    async def ours(self, name: str) -> Link | None:
        """Return the device of that name if there is one and it is ours."""
        link = await self._netlink.link(name)
        return link if link is not None and self._is_ours(link) else None

    async def outside(self) -> tuple[Link, ...]:
        """Return all devices that are not ours."""
        links = await self._netlink.links()
        return tuple(link for link in links if not self._is_ours(link))

    @property
    def _is_elsewhere(self) -> bool:
        return self._netlink is not self._outer

    def _is_ours(self, link: Link) -> bool:
        if link.alias:
            return link.alias.startswith(self._mark)
        return link.group == GROUP or self._known.get(link.index) == link.name

    def _is_marked(self, link: Link) -> bool:
        if link.alias:
            return link.alias.startswith(self._mark)
        # The far ends of containers' pairs have the group but never an alias.
        names = kinds.NAMES.get(link.kind)
        return names is not None and names.fullmatch(link.name) is not None

    def _veth(self, link: Link, other: Link | None, master: Link | None) -> Device:
        if not self._is_elsewhere:
            end = kinds.interface(link, self._namespace)
            if end is not None:
                return end
        return kinds.veth(link, other, master)

    async def _far_end(self, link: Link) -> Link | None:
        """Return the other end of a pair, where it is in sight."""
        if link.kind != "veth":
            return None
        if link.other:
            return await self._netlink.link_at(link.other)
        if link.beyond and self._is_elsewhere:
            far = await self._outer.link_at(link.beyond)
            # Each names the other's index; in a third namespace there may be the same.
            if far and far.group == GROUP and far.beyond == link.index:
                return far
        return None

    async def _hold(self, op: Device, undo: Undo) -> None:
        link = await self._netlink.link(op.name)
        other = None
        if link is not None:
            self._refuse_foreign(op, link)
            other = await self._far_end(link)
        if link is not None and not kinds.fits(op, link, other):
            await self._give_way(link, other, undo)
            link = other = None
        if link is None and isinstance(op, Veth):
            await self._pair(op, undo)
            return
        if link is None:
            link = await self._make(op, undo)
        await self._mend(op, link, undo)
        if other is not None and isinstance(op, Veth) and other.mtu != op.mtu:
            outer = self._netlink if link.other else self._outer
            await outer.change(other, mtu=op.mtu)

    def _refuse_foreign(self, op: Device, link: Link) -> None:
        if not self._is_ours(link):
            alias = f", alias {link.alias}" if link.alias else ""
            raise Conflict(
                f"device {op.name} is needed, but one of that name exists that is not "
                f"this daemon's ({link.kind or 'no virtual device'}{alias}); "
                "rename or remove it"
            )

    async def _give_way(self, link: Link, other: Link | None, undo: Undo) -> None:
        """Remove a device that cannot be changed into what is wanted."""
        master = await self._netlink.link_at(link.master) if link.master else None
        # Without its far end, which is in a sandbox, a pair cannot be made again.
        before: Device | None = None
        if link.kind == "bridge":
            before = kinds.bridge(link)
        elif link.tunnel is not None and link.tunnel.local is not None:
            before = kinds.vxlan(link, master, None)
        elif link.kind == "veth" and other is not None:
            before = kinds.veth(link, other, master)
        if before is not None:
            undo.append(partial(self._hold, before, []))
        await self._netlink.remove(link)

    async def _pair(self, op: Veth, undo: Undo) -> None:
        """Make a pair, and set up what is in a sandbox; Docker finds that running."""
        if op.peer is None or op.mac is None:
            raise KernelError(
                f"making device {op.name} failed: its far end is not known"
            )
        seat = there(op.seat)
        bridge = self._bridge_of(op)
        with self._far_place(seat) as place:
            # Noted before it is done: what ran out of time may yet succeed.
            undo.append(lambda: self._remove(op.name))
            made, whole = await self._asked(op, bridge, seat, place)
            for _ in range(TRIES):
                if made or seat or not await self._passes(op):
                    break
                await asyncio.sleep(PAUSE)
                made, whole = await self._asked(op, bridge, seat, place)
            if not made:
                undo.pop()
                raise await self._in_the_way(op, seat)
            if whole:
                return
            link = await self._netlink.link(op.name)
            if link is None:
                raise removed(op.name)
            await self._mend(op, link, undo)
            if seat is not None and place is not None:
                await seating.furnished(place, seat)

    @contextmanager
    def _far_place(self, seat: Seat | None) -> Iterator[int | None]:
        """Open where the far end of a pair belongs, None if that is here."""
        if seat is not None:
            with seating.opened(seat.sandbox) as sandbox:
                yield sandbox
        elif self._is_elsewhere:
            host = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield host
            finally:
                os.close(host)
        else:
            yield None

    async def _asked(
        self, op: Veth, bridge: int, seat: Seat | None, place: int | None
    ) -> tuple[bool, bool]:
        """Make a pair if nothing is in the way; tell if that was done, and the rest."""
        what = f"making device {op.name}"
        near = self._place
        try:
            if seat is not None and place is not None:
                code, whole = await seating.within(
                    near.descriptor, what, pairs.build, op, bridge, seat, place
                )
            else:
                code, whole = await near.inside.ask(
                    what, pairs.make, op, bridge, op.peer or "", place
                )
        except OSError as error:
            raise refusal(what, error.errno or errno.EIO) from error
        if code == errno.EOPNOTSUPP:
            raise unknown_kind(what, "veth")
        if code not in {0, errno.EEXIST}:
            raise refusal(what, code)
        return not code, whole

    async def _make(self, op: Device, undo: Undo) -> Link:
        request = kinds.request(op, self._bridge_of(op))
        if isinstance(op, Vxlan):
            await self._refuse_strange_address(op)
        # Noted before it is done: a request that ran out of time may yet succeed.
        undo.append(lambda: self._remove(op.name))
        made = await self._create(op, request)
        if not made:
            undo.pop()
        link = await self._netlink.link(op.name)
        if link is None:
            raise removed(op.name) if made else await self._in_the_way(op)
        if not made:
            self._refuse_foreign(op, link)
        return link

    async def _create(self, op: Device, request: dict[str, Any]) -> bool:
        """Make a device; tell whether it was made, False if something is taken."""
        if not self._is_elsewhere or isinstance(op, Bridge):
            return await self._netlink.add(op.name, **request)
        there = {"net_ns_fd": self._place.descriptor}
        for _ in range(TRIES):
            if await self._outer.add(op.name, **there, **request):
                return True
            if not await self._passes(op):
                return False
            await asyncio.sleep(PAUSE)
        return False

    async def _passes(self, op: Device) -> bool:
        """Tell whether what is in the way of a device is on its way out."""
        if await self._netlink.link(op.name) is not None:
            return False
        if isinstance(op, Veth):
            far = await self._outer.link(op.peer or "")
            if far is not None and self._is_ours(far):
                # Its other end was in a namespace that is no more, or not in use.
                await self._outer.remove(far)
                return True
            return far is None
        return isinstance(op, Vxlan) and await self._user_of(op.vni) is None

    async def _in_the_way(self, op: Device, seat: Seat | None = None) -> Conflict:
        """Say what is in the way of a device."""
        link = await self._netlink.link(op.name)
        if link is not None:
            self._refuse_foreign(op, link)
            return Conflict(f"device {op.name} was made by another; try again")
        if seat is not None:
            return Conflict(
                f"an interface {seat.name} is needed in a sandbox that has one"
            )
        if isinstance(op, Vxlan):
            user = await self._user_of(op.vni)
            named = f"device {user.name}" if user else "one in another namespace"
            return Conflict(
                f"device {op.name} is needed with VXLAN network identifier {op.vni}, "
                f"but {named} has that; remove it"
            )
        taken = op.peer if isinstance(op, Veth) else op.name
        return Conflict(
            f"device {op.name} is needed, but a device {taken} exists; remove it"
        )

    async def _user_of(self, vni: int) -> Link | None:
        for netlink in dict.fromkeys((self._outer, self._netlink)):
            for link in await netlink.links():
                if link.tunnel is not None and link.tunnel.vni == vni:
                    return link
        return None

    async def _refuse_strange_address(self, op: Vxlan) -> None:
        own = await self._outer.own()
        if op.local not in {address.interface.ip for address in own}:
            raise KernelError(
                f"making device {op.name} failed: {op.local} is no address of this "
                "host; choose another with --vtep ADDRESS"
            )

    def _bridge_of(self, op: Device) -> int:
        if not isinstance(op, Veth | Vxlan):
            return 0
        bridge = self._netlink.index(op.bridge)
        if bridge is None:
            raise KernelError(
                f"making device {op.name} failed: bridge {op.bridge} is not there"
            )
        return bridge

    async def _grouped(self) -> tuple[Link, ...]:
        """
        Return all devices that can be pynet's.

        One whose daemon died while it was being deleted has its alias and a strange
        group.
        """
        return tuple(
            link
            for link in await self._netlink.links()
            if link.group == GROUP or link.alias.startswith(MARK)
        )

    async def _remove_together(self, pairs: Iterable[Veth]) -> bool:
        """Remove pairs that are ours at once; tell whether that was possible."""
        links = await self._netlink.links_called(op.name for op in pairs)
        indexes = [link.index for link in links if link and self._is_ours(link)]
        what = f"removing {len(indexes)} devices"
        try:
            return await self._place.inside.ask(what, groups.remove, indexes)
        except OSError as error:
            raise refusal(what, error.errno or 0, error.strerror or "") from error

    async def _remove(self, name: str) -> None:
        link = await self.ours(name)
        if link is not None:
            await self._netlink.remove(link)

    async def _mend(self, op: Device, link: Link, undo: Undo) -> None:
        wanted = kinds.wanted(op, link, self._bridge_of(op) or link.master)
        if wanted == link:
            return
        undo.append(lambda: self._change(wanted, link))
        try:
            await self._change(link, wanted)
        except Refusal as error:
            if not isinstance(op, Vxlan) or error.code != errno.EADDRINUSE:
                raise
            who = await asyncio.to_thread(holder, UDP, op.port)
            raise KernelError(
                f"setting device {op.name} up failed: udp port {op.port} is taken by "
                f"{who}; stop that, or choose another with --vxlan-port on all hosts"
            ) from error

    async def _change(self, old: Link, new: Link) -> None:
        """Turn a device from one state into another, each setting by itself."""
        fields = {
            "ifalias": (old.alias, new.alias),
            "address": (old.mac, new.mac),
            "mtu": (old.mtu, new.mtu),
            "group": (old.group, new.group),
            "master": (old.master, new.master),
        }
        request: dict[str, Any] = {
            name: wanted for name, (was, wanted) in fields.items() if was != wanted
        }
        if request:
            await self._netlink.change(new, **request)
        if old.genmode != new.genmode is not None:
            await self._netlink.generate(new, new.genmode)
        if old.snooping != new.snooping:
            snooping = int(new.snooping)
            await self._netlink.change(new, kind="bridge", br_mcast_snooping=snooping)
        # A port that is new to its bridge begins with the usual flags.
        port = old.port if old.master == new.master else Port()
        if port != new.port and new.master:
            await self._netlink.port(new, new.port)
        if old.up != new.up:
            await self._netlink.change(new, state="up" if new.up else "down")


def removed(name: str) -> Conflict:
    """Make the refusal for a device that went while it was made."""
    return Conflict(f"device {name} was removed while it was made; try again")


def there(seat: Seat | None) -> Seat | None:
    """Return a seat if the sandbox in which it is is there."""
    return seat if seat is not None and sandbox.is_there(seat.sandbox) else None


def _rank(op: Device) -> int:
    return (Bridge, Vxlan, Veth, Interface).index(type(op))
