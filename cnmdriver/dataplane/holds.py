"""Sockets of the daemon as operations."""

from functools import partial

from cnmdriver.dataplane.handler import Undo, only
from cnmdriver.dataplane.sockets import Sockets
from cnmdriver.plan.ops import Hold, Plan


class Holds:
    """Makes `Hold` operations hold."""

    together = False

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Hold each port, or turn the relay of one that is held."""
        for op in only(ops, Hold):
            before = await self._sockets.hold(op)
            if before is None:
                undo.append(partial(self._sockets.release, op))
            elif before != op:
                undo.append(partial(self._again, before))

    async def clear(self, ops: Plan) -> None:
        """Release each port."""
        for op in only(ops, Hold):
            await self._sockets.release(op)

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return what is held."""
        del wanted, devices
        return self._sockets.held()

    async def _again(self, op: Hold) -> None:
        await self._sockets.hold(op)
