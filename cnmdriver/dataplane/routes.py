"""Routes of the host into overlays that it is a member of."""

from functools import partial

from cnmdriver.dataplane.handler import Undo, only
from cnmdriver.dataplane.link import Link
from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import IPAddress, IPNetwork
from cnmdriver.plan.ops import HOST, Interface, Plan, Route

ACCESS = "ph-"
"""How the names of the devices begin by which the host is a member."""


class Routes:
    """Makes routes by devices of ours."""

    together = False

    def __init__(self, netlink: Netlink, links: Links, where: str = HOST) -> None:
        self._netlink = netlink
        self._links = links
        self._where = where

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Put each route in place of any other of ours to its destination."""
        for op in only(ops, Route):
            link = await self._links.ours(op.device)
            if link is None:
                raise KernelError(
                    f"routing {op.destination} by {op.device} failed: "
                    "there is no such device of pynet's"
                )
            there = await self._netlink.sources()
            if (op.destination, link.index, op.source) in there:
                continue
            await self._refuse_foreign(op)
            for other, index, source in there:
                if (other, index) == (op.destination, link.index):
                    undo.append(partial(self._put, link, other, source))
                    await self._netlink.remove_route(link, other, source)
            undo.append(partial(self._remove, op))
            await self._netlink.put_route(link, op.destination, op.source)

    async def clear(self, ops: Plan) -> None:
        """Remove each route."""
        for op in only(ops, Route):
            await self._remove(op)

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return the routes with a source by devices that the host is a member with."""
        del wanted
        indexes = {
            self._netlink.index(op.name): op.name
            for op in only(devices, Interface)
            if op.name.startswith(ACCESS)
        }
        if not indexes:
            return ()
        return tuple(
            Route(
                where=self._where,
                destination=destination,
                device=indexes[index],
                source=source,
            )
            for destination, index, source in await self._netlink.sources()
            if index in indexes
        )

    async def _refuse_foreign(self, op: Route) -> None:
        """Leave a way to the same network that is not by a device of ours."""
        outside = {link.index: link.name for link in await self._links.outside()}
        for destination, index in await self._netlink.routes():
            if destination == op.destination and index in outside:
                raise Conflict(
                    f"a route to {destination} by {op.device} is needed, but there is "
                    f"one by {outside[index]}; remove that, or choose another subnet"
                )

    async def _put(self, link: Link, to: IPNetwork, source: IPAddress) -> None:
        await self._netlink.put_route(link, to, source)

    async def _remove(self, op: Route) -> None:
        link = await self._links.ours(op.device)
        if link is not None:
            await self._netlink.remove_route(link, op.destination, op.source)
