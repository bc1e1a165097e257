"""
Failpoints: places at which the daemon dies, fails or waits, for tests of its recovery.

`PYNET_FAILPOINT` lists them as NAME:ACTION, with commas between. A name is a call of
Docker's with the number of a step in it (`CreateEndpoint.3`), or a step whoever takes
it (`commit.after`). The actions are `kill`, `error` and `sleep`, or `sleep=SECONDS`.
Each acts once, one that is named twice acts twice. The word `trace` among them logs
every step. What has no failpoint is not changed by this module at all.
"""

import asyncio
import os
import re
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import structlog
from structlog.contextvars import get_contextvars

from cnmdriver.errors import InvalidParameter, KernelError, StoreError

VARIABLE = "PYNET_FAILPOINT"
TRACE = "trace"
STEP = re.compile(r"(commit|alone)\.(before|after)|(apply|clear)\.[a-z]+")
NUMBERED = re.compile(r"(?P<call>[A-Za-z]+)\.[1-9][0-9]{0,5}")
ACTION = re.compile(r"kill|error|sleep(=(?P<seconds>[0-9]{1,4}(\.[0-9]{1,3})?))?")

AT_ONCE = 1000
"""Calls whose steps are counted at a time."""

Step = Callable[[str], Awaitable[None]]

log = structlog.get_logger()


@dataclass(slots=True)
class Call:
    """A call of Docker's, and how many steps it has taken."""

    method: object
    steps: int = 0


async def kill(_step: str) -> None:
    """End the process as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


async def fail(step: str) -> None:
    """Raise what is raised if the store or the kernel refuses the step."""
    kernel = step.startswith(("apply.", "clear."))
    kind = KernelError if kernel else StoreError
    raise kind(f"{step} failed, as {VARIABLE} wants it; unset that")


async def pause(seconds: float, _step: str) -> None:
    """Let the step take some time."""
    await asyncio.sleep(seconds)


class Failpoints:
    """A step hook that acts at the failpoints that are armed."""

    def __init__(self, armed: list[tuple[str, Step]], *, trace: bool) -> None:
        """Take the failpoints by name; `trace` logs each step."""
        self.armed = armed
        self.trace = trace
        self.calls: deque[Call] = deque(maxlen=AT_ONCE)

    async def __call__(self, step: str) -> None:
        """Act if this step is a failpoint."""
        call, number = self.count()
        if self.trace:
            log.info("failpoint.step", call=call, number=number, step=step)
        for failpoint in self.armed:
            name, act = failpoint
            if name in (f"{call}.{number}", step):
                self.armed.remove(failpoint)
                log.warning("failpoint.hit", failpoint=name, step=step)
                await act(step)
                return

    def count(self) -> tuple[str, int]:
        """Count a step of the call it is taken for; "" and 0 if it is for none."""
        method = get_contextvars().get("method")
        if method is None:
            return "", 0
        # Each request binds a text of its own, which is the same object in every task
        # that works for it.
        call = next((c for c in self.calls if c.method is method), None)
        if call is None:
            call = Call(method)
            self.calls.appendleft(call)
        call.steps += 1
        return str(method).rpartition(".")[2], call.steps


def hook(environment: Mapping[str, str], calls: Collection[str]) -> Step | None:
    """
    Return the step hook that the environment asks for, None if it asks for none.

    `calls` are the methods Docker can call. Raises InvalidParameter for a failpoint
    that cannot be.
    """
    words = environment.get(VARIABLE, "").replace(",", " ").split()
    if not words:
        return None
    known = {name.rpartition(".")[2] for name in calls}
    armed = [read(word, known) for word in words if word != TRACE]
    log.warning("failpoint.armed", failpoints=words)
    return Failpoints(armed, trace=TRACE in words)


def read(word: str, calls: Collection[str]) -> tuple[str, Step]:
    """Read one failpoint."""
    name, _, wish = word.partition(":")
    action = ACTION.fullmatch(wish)
    numbered = NUMBERED.fullmatch(name)
    if action is None or (numbered is None and STEP.fullmatch(name) is None):
        raise InvalidParameter(
            f"{VARIABLE}: {word!r} is no failpoint; write CALL.NUMBER:ACTION or "
            "STEP:ACTION, as in CreateEndpoint.3:kill or commit.after:error, with the "
            "action kill, error, sleep or sleep=SECONDS"
        )
    if numbered is not None and numbered["call"] not in calls:
        raise InvalidParameter(
            f"{VARIABLE}: Docker has no call {numbered['call']!r}; known are "
            f"{', '.join(sorted(calls))}"
        )
    if wish.startswith("sleep"):
        return name, partial(pause, float(action["seconds"] or 1))
    return name, {"kill": kill, "error": fail}[wish]
