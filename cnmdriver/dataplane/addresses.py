"""Addresses of the host on devices of ours."""

from functools import partial

from cnmdriver.dataplane.handler import Undo, only
from cnmdriver.dataplane.link import Link
from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.errors import KernelError
from cnmdriver.model import IPInterface
from cnmdriver.plan.ops import HOST, Address, Bridge, Interface, Plan


class Addresses:
    """Gives our devices their addresses."""

    together = False

    def __init__(self, netlink: Netlink, links: Links, where: str = HOST) -> None:
        self._netlink = netlink
        self._links = links
        self._where = where

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Add each address."""
        for op in only(ops, Address):
            link = await self._links.ours(op.device)
            if link is None:
                raise KernelError(
                    f"adding address {op.interface} to {op.device} failed: "
                    "there is no such device of pynet's"
                )
            await self._add(link, op.interface, undo)

    async def clear(self, ops: Plan) -> None:
        """Remove each address."""
        for op in only(ops, Address):
            link = await self._links.ours(op.device)
            if link is not None:
                await self._netlink.remove_address(link, op.interface)

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return the addresses of our bridges and of the ends that the host uses."""
        del wanted
        names = {op.name for op in devices if isinstance(op, Bridge | Interface)}
        if not names:
            return ()
        return tuple(
            Address(where=self._where, device=name, interface=address)
            for name, address in await self._netlink.addresses()
            if name in names
        )

    async def _add(self, link: Link, address: IPInterface, undo: Undo) -> None:
        undo.append(lambda: self._take(link, address))
        if await self._netlink.add_address(link, address):
            return
        undo.pop()
        # IPv6 takes an address only once, whatever the length of its prefix.
        found = await self._netlink.addresses()
        there = [interface for name, interface in found if name == link.name]
        if address in there:
            return
        for other in (a for a in there if a.ip == address.ip):
            undo.append(partial(self._put, link, other))
            await self._netlink.remove_address(link, other)
        undo.append(lambda: self._take(link, address))
        await self._netlink.add_address(link, address)

    async def _put(self, link: Link, address: IPInterface) -> None:
        await self._netlink.add_address(link, address)

    async def _take(self, link: Link, address: IPInterface) -> None:
        await self._netlink.remove_address(link, address)
