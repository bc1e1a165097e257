"""
A network's whole life, cut at any of its steps by the death of the daemon.

Run as a program, with a life's name, a directory and "patient" or "impatient": it lives
the life whole and then once for each step, every time in a namespace and a state
directory of its own, and writes what it saw into `0.json`, `1.json` and so on. The
daemon that dies is a process that ends there and then: nothing after the step runs.
Docker is the process that outlives it; a patient one makes the cut call again, another
takes it for failed.
"""

import asyncio
import json
import os
import pickle
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from cnmdriver.dockerapi import Inventory
from cnmdriver.errors import DriverError
from cnmdriver.plan import devices
from tests.kernel.conftest import CLONE_NEWNET, call, run
from tests.kernel.machine import (
    VTEP,
    Daemon,
    Door,
    Doors,
    Sandbox,
    daemon,
    drop_namespace,
    left_in_kernel,
)
from tests.unit.calls import UDP, Docker, port

NET, BOX = "ab" * 32, "cd" * 32
KILLED = 137
TOGETHER = 4
"""Lives at a time: most of a life is waiting for the kernel."""


async def named(docker: Docker) -> None:
    """Live with everything named, so that each call can come again."""
    await docker.create(NET, "10.1.0.0/24")
    await docker.start(BOX, NET, ip="10.1.0.5", ports=(port(80, 8080),))
    await docker.stop(BOX)
    await docker.remove(NET)


async def chosen(docker: Docker) -> None:
    """Live with everything chosen by pynet, in both families."""
    options = {"pynet.icc": "false"}
    await docker.create(NET, None, "ipv6", options=options)
    await docker.start(BOX, NET, ports=(port(80), port(53, protocol=UDP)))
    await docker.stop(BOX)
    await docker.remove(NET)


async def overlaid(docker: Docker) -> None:
    """Live in an overlay whose gateway and member the host is."""
    options = {
        "pynet.mode": "overlay",
        "pynet.gateway": "pynet",
        "pynet.host_access": "true",
    }
    await docker.create(NET, "10.1.0.0/24", "fd01::/64", options=options)
    await docker.start(BOX, NET, ip="10.1.0.5", ports=(port(80, 8080),))
    await docker.stop(BOX)
    await docker.remove(NET)


LIVES: dict[str, Callable[[Docker], Awaitable[None]]] = {
    "named": named,
    "chosen": chosen,
    "overlaid": overlaid,
}


class Journal:
    """What Docker got of its calls, which it remembers when the daemon dies."""

    def __init__(self, path: Path, sandbox: Sandbox, *, patient: bool) -> None:
        """Remember; an impatient Docker gives the cut call up."""
        self.path = path
        self.sandbox = sandbox
        self.answers: list[tuple[str, Any]] = []
        self.patient = patient
        self.past: deque[tuple[str, Any]] = deque()
        if path.exists():
            with path.open("rb") as file:
                while file.peek(1):
                    self.past.append(pickle.load(file))

    async def call(self, name: str, work: Callable[[], Any]) -> Any:
        """Make a call, unless it was answered before the daemon died."""
        if self.past:
            entry = self.past.popleft()
            assert entry[0] == name
            self.answers.append(entry)
            return entry[1]
        if not self.patient:
            self.patient = True
            raise GaveUp(name)
        answer = await work()
        self.answers.append((name, answer))
        self.docker_does(name)
        with self.path.open("ab") as file:
            pickle.dump((name, answer), file)
        return answer

    def docker_does(self, name: str) -> None:
        """Move the device into the sandbox, or back."""
        if name == "join":
            self.sandbox.enter(devices.peer(BOX))
        if name == "leave" and self.sandbox.has_device():
            self.sandbox.leave(devices.peer(BOX), f"/proc/{os.getpid()}/ns/net")


class GaveUp(DriverError):
    """Docker did not wait for the daemon to come back."""


class Case:
    """One life, cut at one step, or at none."""

    def __init__(self, life: str, directory: Path, *, at: int, patient: bool) -> None:
        """Take a directory that is not there yet."""
        self.life = LIVES[life]
        self.directory = directory
        self.at = at
        self.patient = patient
        self.steps: list[str] = []

    def run(self) -> dict[str, Any]:
        """Live and die in a process that ends, then come back in this one."""
        self.directory.mkdir()
        call("unshare", CLONE_NEWNET)
        run("ip", "link", "set", "lo", "up")
        run("ip", "addr", "add", VTEP, "dev", "lo")
        self.sandbox = Sandbox(self.directory / "sandbox")
        if self.at and not self.dies():
            return {"problem": "the daemon did not die"}
        return asyncio.run(self.comes_back())

    def dies(self) -> bool:
        """Live in a process of its own until the step."""
        child = os.fork()
        if not child:
            code = 1
            try:
                asyncio.run(self.lives())
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == KILLED

    async def lives(self) -> None:
        async with daemon(self.directory, self.step) as alive:
            await self.life(self.docker(alive, patient=True)[0])

    async def step(self, name: str) -> None:
        """Count the steps, and end the process at one."""
        self.steps.append(name)
        if len(self.steps) == self.at:
            (self.directory / "last").write_text(name)
            os._exit(KILLED)

    def where(self, _endpoint: str) -> str:
        """Return where the sandbox is."""
        return str(self.sandbox.path)

    def docker(self, alive: Daemon, *, patient: bool) -> tuple[Docker, Journal]:
        """Let Docker speak to a daemon, with what it remembers."""
        journal = Journal(self.directory / "journal", self.sandbox, patient=patient)
        doors = Doors(
            Door(lambda: alive.rig.networks, journal.call, self.where),
            Door(lambda: alive.rig.ipam, journal.call, self.where),
        )
        return Docker(doors), journal

    async def comes_back(self) -> dict[str, Any]:
        """Start anew over the same files, audit, and let Docker go on."""
        count, self.at = self.at, 0
        async with daemon(self.directory, self.step) as alive:
            if count:
                await alive.sync.turn()
            report = {"audit": await alive.difference(), "refused": ""}
            docker, journal = self.docker(alive, patient=self.patient)
            try:
                await self.life(docker)
            except DriverError as error:
                report["refused"] = str(error)
            # What goes after an answer has gone then.
            await alive.difference()
            report["answers"] = [repr(answer) for answer in journal.answers]
            report["left_by_docker"] = [
                *alive.rig.records,
                *left_in_kernel(self.directory),
            ]
            self.sandbox.remove()
            alive.sync.lapsing.grace = alive.sync.missing.grace = 0
            alive.sync.learn(Inventory())
            await alive.sync.turn()
            report["left"] = [*alive.rig.records, *left_in_kernel(self.directory)]
            report["steps"] = self.steps
        return report


def told(case: Case, file: Path) -> int:
    """Run a case in a process of its own, which writes what it saw."""
    child = os.fork()
    if child:
        return child
    try:
        report = {"problem": "", **case.run()}
    except BaseException:  # noqa: BLE001
        report = {"problem": traceback.format_exc()}
        drop_namespace(case.directory)
    last = case.directory / "last"
    report["cut"] = last.read_text() if last.exists() else ""
    file.write_text(json.dumps(report))
    os._exit(0)


def distinct(steps: list[str]) -> list[int]:
    """
    Return the numbers of the steps that some work lies before.

    What a handler does together is announced together before it is done.
    """
    together = {
        *product(("table", "element"), repeat=2),
        *product(("fdb", "neighbour"), repeat=2),
    }
    pairs = [
        (old.partition(".")[0] == new.partition(".")[0], old[6:], new[6:])
        for old, new in pairwise(["", *steps])
    ]
    return [
        number
        for number, (same, *kinds) in enumerate(pairs, 1)
        if not (same and tuple(kinds) in together)
    ]


def every(life: str, directory: Path, *, patient: bool) -> None:
    """Live once whole, then once for each step and patience of Docker's."""
    first = directory / "0.json"
    whole = Case(life, directory / "0", at=0, patient=True)
    os.waitpid(told(whole, first), 0)
    steps = json.loads(first.read_text()).get("steps", ())
    running: set[int] = set()
    for at in distinct(steps):
        if len(running) == TOGETHER:
            running.remove(os.wait()[0])
        case = Case(life, directory / str(at), at=at, patient=patient)
        running.add(told(case, directory / f"{at}.json"))
    for _ in running:
        os.wait()


if __name__ == "__main__":
    every(sys.argv[1], Path(sys.argv[2]), patient=sys.argv[3] == "patient")
