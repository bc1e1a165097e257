"""
What the handlers of operations share: their shape, and the bound on every wait.

Each kind of operation has one handler. `apply` makes operations hold and appends to
`undo` what would take its own changes back, before it makes them; `clear` treats what
is gone as success; `found` reads the kernel.
"""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import Op, Plan

OpT = TypeVar("OpT", bound=Op)

BOUND = 2.0
"""Seconds one operation of the kernel may take."""

Undo = list[Callable[[], Awaitable[None]]]
Step = Callable[[str], Awaitable[None]]


async def nothing(_step: str) -> None:
    """Do nothing: the step hook of those who need none."""


class Handler(Protocol):
    """Makes the operations of some types hold."""

    together: bool
    """Whether operations that follow each other are one operation of the kernel."""

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Make the operations hold, and note in `undo` how to take that back."""

    async def clear(self, ops: Plan) -> None:
        """Remove the objects; what is not there, or not ours, is left."""


class Reader(Handler, Protocol):
    """Finds them, too."""

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """
        Read what is ours.

        `wanted` names what cannot be told by a mark; `devices` are those found.
        """


def only(ops: Plan, kind: type[OpT]) -> tuple[OpT, ...]:
    """Return the operations of one type."""
    return tuple(op for op in ops if isinstance(op, kind))


class Refusal(KernelError):
    """The kernel said no, with an errno."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


def refusal(what: str, code: int, text: str = "") -> Refusal:
    """Word an errno: what was wanted, and what the kernel said."""
    said = (text or os.strerror(code)).lower().rstrip(".")
    name = errno.errorcode.get(code, str(code))
    return Refusal(f"{what} failed: {said} ({name})", code)


def unknown_kind(what: str, kind: str) -> KernelError:
    """Word that the kernel cannot make a kind of device."""
    return KernelError(
        f"{what} failed: the kernel knows no {kind} devices; "
        f"load its module with modprobe {kind}"
    )


def too_slow(what: str) -> KernelError:
    """Word an operation that did not end within the bound."""
    return KernelError(
        f"{what} failed: the kernel did not answer within {BOUND:g} s; "
        "look for a process that holds its network locks"
    )
