"""
Bridges and veth pairs.

A device is ours by its alias, or, if the daemon died between making it and giving it
its alias, by link group and name. Another host's alias (two daemons on one kernel with
different state) and everything else is foreign: it is named in an error and left.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

from cnmdriver.dataplane.handler import Undo
from cnmdriver.dataplane.netlink import GENMODE_NONE, Link, Netlink
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.plan.ops import GROUP, Bridge, Plan, Veth, differing

MARK = "pynet:"
NAMES = {
    "bridge": re.compile(r"pn-[0-9a-f]{10}"),
    "veth": re.compile(r"pe-[0-9a-f]{10}"),
}
"""The names of devices whose alias may be missing."""

Device = Bridge | Veth


class Links:
    """Makes devices, and knows which are ours."""

    together = False

    def __init__(self, netlink: Netlink, host: str) -> None:
        self._netlink = netlink
        self._mark = f"{MARK}{host[:8]}:"

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Make each device, or make the one that is there as wanted."""
        for op in ops:
            if isinstance(op, Device):
                await self._hold(op, undo)

    async def clear(self, ops: Plan) -> None:
        """Remove the devices that are ours; a pair goes with one of its ends."""
        for op in ops:
            if isinstance(op, Device):
                await self._remove(op.name)

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return what `devices` found."""
        del wanted
        return devices

    async def devices(self) -> Plan:
        """Return our devices, bridges first."""
        links = await self._netlink.links(GROUP)
        at = {link.index: link for link in links}
        ours = [link for link in links if self._is_marked(link)]
        bridges = [_bridge(link) for link in ours if link.kind == "bridge"]
        pairs = [
            _veth(link, at.get(link.other or 0), at.get(link.master))
            for link in ours
            if link.kind == "veth"
        ]
        return (*bridges, *pairs)

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices that another host of pynet's marked."""
        return tuple(
            (link.name, link.alias)
            for link in await self._netlink.links(GROUP)
            if link.alias.startswith(MARK) and not link.alias.startswith(self._mark)
        )

    async def ours(self, name: str) -> Link | None:
        """Return the device of that name if there is one and it is ours."""
        link = await self._netlink.link(name)
        return link if link is not None and self._is_ours(link) else None

    async def outside(self) -> tuple[Link, ...]:
        """Return all devices that are not ours."""
        links = await self._netlink.links()
        return tuple(link for link in links if not self._is_ours(link))

    def _is_ours(self, link: Link) -> bool:
        marked = link.alias.startswith(self._mark)
        return marked or (link.group == GROUP and not link.alias)

    def _is_marked(self, link: Link) -> bool:
        if link.alias:
            return link.alias.startswith(self._mark)
        # The far ends of our pairs have the group but never an alias.
        names = NAMES.get(link.kind)
        return names is not None and names.fullmatch(link.name) is not None

    async def _hold(self, op: Device, undo: Undo) -> None:
        link = await self._netlink.link(op.name)
        other = None
        if link is not None:
            self._refuse_foreign(op, link)
            other = await self._netlink.link_at(link.other) if link.other else None
        if link is not None and not _fits(op, link, other):
            await self._give_way(link, other, undo)
            link = other = None
        if link is None:
            link = await self._make(op, undo)
        await self._mend(op, link, undo)
        if other is not None and isinstance(op, Veth) and other.mtu != op.mtu:
            await self._netlink.change(other, mtu=op.mtu)

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
        # Without its far end, which is in a sandbox, a pair cannot be made again.
        if link.kind == "bridge":
            undo.append(partial(self._hold, _bridge(link), []))
        elif link.kind == "veth" and other is not None:
            master = await self._netlink.link_at(link.master) if link.master else None
            undo.append(partial(self._hold, _veth(link, other, master), []))
        await self._netlink.remove(link)

    async def _make(self, op: Device, undo: Undo) -> Link:
        request = (
            _bridge_request(op)
            if isinstance(op, Bridge)
            else _veth_request(op, self._index_of(op))
        )
        # Noted before it is done: a request that ran out of time may yet succeed.
        undo.append(lambda: self._remove(op.name))
        made = await self._netlink.add(op.name, **request)
        if not made:
            undo.pop()
        link = await self._netlink.link(op.name)
        if link is None:
            taken = op.peer if isinstance(op, Veth) else op.name
            raise Conflict(
                f"device {op.name} is needed, but a device {taken} exists; remove it"
                if not made
                else f"device {op.name} was removed while it was made; try again"
            )
        if not made:
            self._refuse_foreign(op, link)
        return link

    def _index_of(self, op: Veth) -> int:
        bridge = self._netlink.index(op.bridge)
        if bridge is None:
            raise KernelError(
                f"making device {op.name} failed: bridge {op.bridge} is not there"
            )
        return bridge

    async def _remove(self, name: str) -> None:
        link = await self.ours(name)
        if link is not None:
            await self._netlink.remove(link)

    async def _mend(self, op: Device, link: Link, undo: Undo) -> None:
        master = self._index_of(op) if isinstance(op, Veth) else link.master
        wanted = _wanted(op, link, master)
        if wanted != link:
            undo.append(lambda: self._change(wanted, link))
            await self._change(link, wanted)

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
        if (old.hairpin, old.isolated) != (new.hairpin, new.isolated) and new.master:
            flags = {"hairpin": new.hairpin, "isolated": new.isolated}
            await self._netlink.port(new, **flags)
        if old.up != new.up:
            await self._netlink.change(new, state="up" if new.up else "down")


def _fits(op: Device, link: Link, other: Link | None) -> bool:
    """Tell whether a device can be changed into what is wanted."""
    if isinstance(op, Bridge) or link.kind != "veth":
        return isinstance(op, Bridge) and link.kind == "bridge"
    return not op.REMAKE.intersection(differing(op, _veth(link, other, None)))


def _bridge_request(op: Bridge) -> dict[str, Any]:
    return {"kind": "bridge", "address": op.mac, "group": GROUP, "br_mcast_snooping": 0}


def _veth_request(op: Veth, master: int) -> dict[str, Any]:
    if op.peer is None or op.mac is None:
        raise KernelError(f"making device {op.name} failed: its far end is not known")
    peer = {"ifname": op.peer, "address": op.mac, "mtu": op.mtu, "group": GROUP}
    request = {"kind": "veth", "mtu": op.mtu, "group": GROUP, "master": master}
    return {**request, "peer": peer}


def _wanted(op: Device, link: Link, master: int) -> Link:
    alias = link.alias if op.alias is None else op.alias
    # A device that has no IPv6 has no such mode; a larger MTU can bring it.
    none = link.genmode is None and link.mtu == op.mtu
    mode = None if none else GENMODE_NONE
    wanted = replace(link, alias=alias, mtu=op.mtu, group=GROUP, genmode=mode, up=op.up)
    if isinstance(op, Bridge):
        return replace(wanted, mac=op.mac, snooping=False)
    return replace(wanted, master=master, hairpin=op.hairpin, isolated=op.isolated)


def _bridge(link: Link) -> Bridge:
    return Bridge(
        name=link.name, mac=link.mac, mtu=link.mtu, up=link.up, alias=link.alias
    )


def _veth(link: Link, other: Link | None, master: Link | None) -> Veth:
    return Veth(
        name=link.name,
        peer=other.name if other else None,
        mac=other.mac if other else None,
        bridge=master.name if master else "",
        mtu=link.mtu,
        hairpin=link.hairpin,
        isolated=link.isolated,
        up=link.up,
        alias=link.alias,
    )
