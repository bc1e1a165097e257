"""
The kernel of this host: makes plans hold, takes them back, reads what is ours.

Each type of operation has a handler in a module of its own; here is only what is true
of all. `apply` is all or nothing: on any error and on cancel it takes back what it
changed, last first. `clear` goes on after errors and reports them all at the end.

One of them runs at a time. An operation is never interrupted half way; a cancel counts
when it ended, and each has a bound.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from itertools import groupby
from pathlib import Path

from cnmdriver.dataplane import sandbox
from cnmdriver.dataplane.accept import Accepts
from cnmdriver.dataplane.addresses import Addresses
from cnmdriver.dataplane.handler import Handler, Step, Undo, nothing, settled
from cnmdriver.dataplane.holds import Holds
from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.dataplane.nft import Firewall, Nft
from cnmdriver.dataplane.sockets import Sockets
from cnmdriver.dataplane.sysctl import Sysctls
from cnmdriver.errors import DriverError, KernelError
from cnmdriver.model import IPNetwork
from cnmdriver.plan.ops import (
    Accept,
    Address,
    Bridge,
    Element,
    Hold,
    Op,
    Plan,
    Sysctl,
    Table,
    Veth,
    union,
)

ORDER = (Table, Element, Accept, Sysctl, Bridge, Address, Veth, Hold)


def all_of(plan: Plan) -> Plan:
    """Return a plan as it is."""
    return plan


class Kernel:
    """The namespace in which it is opened, as plans see it."""

    def __init__(self, *, host: str, run_dir: Path, step: Step = nothing) -> None:
        self._run_dir = run_dir
        self._step = step
        self._lock = asyncio.Lock()
        self._netlink = Netlink()
        self._nft = Nft()
        self._sockets = Sockets()
        self._links = Links(self._netlink, host)
        self._sysctls = Sysctls(self._links, run_dir)
        self._firewall = Firewall(self._nft)
        self._handlers: dict[type[Op], Handler] = {
            Table: self._firewall,
            Element: self._firewall,
            Accept: Accepts(self._nft),
            Sysctl: self._sysctls,
            Bridge: self._links,
            Veth: self._links,
            Address: Addresses(self._netlink, self._links),
            Hold: Holds(self._sockets),
        }

    async def open(self) -> None:
        """Open what the handlers need; raises KernelError if something is missing."""
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KernelError(
                f"making {self._run_dir} failed: {error.strerror}"
            ) from error
        self._sysctls.open()
        await self._netlink.open()
        await self._nft.open()

    async def close(self) -> None:
        """Let go of sockets and threads; what is in the kernel stays."""
        async with self._lock:
            await self._sockets.close()
            await self._nft.close()
            await self._netlink.close()

    async def apply(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """
        Make every operation hold, in order, or leave the kernel as it was.

        What is there already is adopted, mended in place or made again. Raises Conflict
        for a foreign object in the way and KernelError for what the kernel refused.
        `still` is asked, once it is this call's turn, what of the plan is wanted by
        then.
        """
        async with self._lock:
            undo: Undo = []
            self._firewall.begin()
            try:
                for handler, ops in self._groups(still(plan)):
                    await self._announce("apply", ops)
                    await settled(handler.apply(ops, undo))
                await settled(self._firewall.end())
            except BaseException as error:
                failures = await settled(_take_back(undo))
                if failures and isinstance(error, DriverError):
                    text = f"{error}; taking back what was done: {'; '.join(failures)}"
                    raise type(error)(text) from error
                raise

    async def clear(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """
        Remove every object, last first; what is gone is well, what is foreign stays.

        `still` is asked, once it is this call's turn, which of the plan is to go by
        then: an object may have found a new user while the call waited.
        Goes on after errors, and raises one KernelError that tells all.
        """
        failures: list[str] = []
        async with self._lock:
            self._firewall.begin()
            for handler, ops in self._groups(still(plan)[::-1]):
                await self._announce("clear", ops)
                failures += await _failure(handler.clear(ops))
            failures += await _failure(self._firewall.end())
        if failures:
            raise KernelError("; ".join(failures))

    async def found(self, wanted: Plan = ()) -> Plan:
        """
        Read everything of ours in the kernel, in the order of a plan.

        `wanted` adds what has no mark: settings, and rules that nothing calls for.
        """
        async with self._lock:
            devices = await settled(self._links.devices())
            ops = [await settled(h.found(wanted, devices)) for h in self._every()]
        return tuple(sorted(union(ops), key=_place))

    async def foreign(self) -> tuple[tuple[str, str], ...]:
        """Return name and alias of devices that another pynet host has marked."""
        return await settled(self._links.foreign())

    async def routes(self) -> tuple[tuple[IPNetwork, str], ...]:
        """Return network and device of the host's routes, but the default and ours."""
        links = await settled(self._links.outside())
        names = {link.index: link.name for link in links}
        routes = await settled(self._netlink.routes())
        return tuple((net, names[index]) for net, index in routes if index in names)

    def has_sandbox(self, key: str) -> bool:
        """Tell whether a sandbox is still there, as far as this process can see."""
        return sandbox.is_there(key)

    def changed_sysctls(self) -> dict[str, str]:
        """Return path and earlier value of each setting changed for good."""
        return self._sysctls.changed()

    def _groups(self, plan: Plan) -> Iterator[tuple[Handler, Plan]]:
        """Yield handler and operations of each step: mostly one operation."""
        for handler, ops in groupby(plan, key=self._handler):
            if handler.together:
                yield handler, tuple(ops)
            else:
                yield from ((handler, (op,)) for op in ops)

    def _handler(self, op: Op) -> Handler:
        return self._handlers[type(op)]

    def _every(self) -> tuple[Handler, ...]:
        return tuple(dict.fromkeys(self._handlers.values()))

    async def _announce(self, verb: str, ops: Plan) -> None:
        for op in ops:
            await self._step(f"{verb}.{op.key[0]}")


async def _failure(work: Coroutine[None, None, None]) -> list[str]:
    """Do something, and return in words what went wrong, if anything did."""
    try:
        await settled(work)
    except DriverError as error:
        return [str(error)]
    return []


async def _take_back(undo: Undo) -> list[str]:
    """Run the undos, last first, whatever becomes of each; return what failed."""
    failures = []
    for back in reversed(undo):
        try:
            await back()
        except DriverError as error:
            failures.append(str(error))
    return failures


def _place(op: Op) -> int:
    """Return where in a plan an operation stands: after what it stands on."""
    match op:
        case Sysctl() if op.device:
            return ORDER.index(Address)
        case Element() if op.value:
            return len(ORDER)
    return ORDER.index(type(op))
