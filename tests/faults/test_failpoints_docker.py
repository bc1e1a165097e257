"""
The daemon dies in Docker's calls, and a real dockerd makes of it what it makes.

Each command of a container's life is given once undisturbed, to learn the steps of its
calls; then the daemon is killed at a step of each, is started again as a service
manager would, and the command is given again if Docker says that it failed. What Docker
repeats, rolls back and forgets meanwhile is its own. All steps of all calls, with a
Docker that is played, are in `test_failpoints.py`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from cnmdriver.failpoints import VARIABLE
from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until
from tests.dockerd.tools import api, eventually, left_of_pynet, told

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

SOON = 60.0
"""Seconds in which a user who repeats a command must succeed, on a busy machine."""
AGREED = 20.0
"""Seconds in which Docker's list, the store and the kernel must agree."""
LATER = 1.5
"""Seconds in which all is done that a command leaves for after its answer."""
NAME, BOX = "blue", "box"
SUBNETS = ("--ipv6", "--subnet", "10.71.0.0/24", "--subnet", "fd71::/64")
DRIVER = ("-d", "pynet", "--ipam-driver", "pynet")

CREATE = ("network", "create", *DRIVER, *SUBNETS, NAME)
MAKE = ("create", "--name", BOX, "--network", NAME, "-p", "8080:80")
LIFE = (
    CREATE,
    (*MAKE, "busybox", "sleep", "600"),
    ("start", BOX),
    ("network", "disconnect", NAME, BOX),
    ("network", "connect", NAME, BOX),
    ("rm", "-f", BOX),
    ("network", "rm", NAME),
)
"""Commands of Docker's client; what the last two undo the others do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The step of a call in one of the commands, and how often it came before."""

    command: int
    call: str
    number: int
    name: str
    earlier: int

    def __str__(self) -> str:
        """Tell it as a person would."""
        words = " ".join(LIFE[self.command][:2])
        return f"{self.call}.{self.number} ({self.name}) in docker {words}"

    @property
    def armed(self) -> str:
        """Return the failpoints that kill here, and do nothing before."""
        place = f"{self.call}.{self.number}"
        return ",".join([*[f"{place}:sleep=0"] * self.earlier, f"{place}:kill"])


class World:
    """One host, and a user of its Docker."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.log = host.directory / "pynet.log"
        self.seen = 0
        self.killed = threading.Event()

    def serve(self, armed: str = "") -> None:
        """Start pynet anew, with failpoints."""
        if self.host.service("pynet"):
            self.host.stop_pynet()
        self.host.start_pynet(env={VARIABLE: armed} if armed else None)

    def news(self) -> Iterator[dict[str, object]]:
        """Yield what pynet logged since this was asked last."""
        with self.log.open() as file:
            file.seek(self.seen)
            text = file.read()
            self.seen = file.tell()
        for line in text.splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Start pynet again whenever it dies meanwhile, as systemd does."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                if not self.host.service("pynet"):
                    self.killed.set()
                    self.host.start_pynet()

        guard = threading.Thread(target=watch)
        guard.start()
        try:
            yield
        finally:
            over.set()
            guard.join()

    def give(self, command: Sequence[str]) -> None:
        """Give a command, and again while Docker says that it failed."""
        said: list[str] = []

        def works() -> bool:
            done = self.host.docker(*command, check=False)
            said.append(done.stderr)
            return done.returncode == 0 or self.is_done(command, done.stderr)

        assert wait_until(works, SOON), said

    def is_done(self, command: Sequence[str], said: str) -> bool:
        """Tell whether Docker refuses since it has done before what is wanted."""
        done = {
            CREATE: "already exists",
            LIFE[-2]: "No such container",
            LIFE[-1]: "not found",
            LIFE[3]: "is not connected to",
            LIFE[4]: "already exists in network",
        }
        words = done.get(tuple(command))
        return words is not None and words in said

    def agree(self) -> bool:
        """Tell whether Docker, pynet and the kernel say the same."""
        return not self.differences()

    def differences(self) -> list[object]:
        """Return in what they do not."""
        shown = [told(self.host, what) for what in ("networks", "endpoints")]
        networks = {n["Id"] for n in api(self.host, "GET", "/networks")}
        theirs = {n["id"] for n in shown[0]}
        endpoints = {
            container["EndpointID"]
            for name in networks & theirs
            for container in self.details(name).values()
        }
        wrong: list[object] = list(theirs - networks)
        wrong += {e["id"] for e in shown[1]} ^ endpoints
        return wrong + list(told(self.host, "diff")["lines"])

    def details(self, network: str) -> dict[str, dict[str, str]]:
        """Return the containers of a network, as Docker lists them."""
        found = api(self.host, "GET", f"/networks/{network}")
        return dict(found["Containers"])


def played(world: World) -> list[Step]:
    """Live a life undisturbed and return all steps of Docker's calls in it."""
    world.serve("trace")
    list(world.news())
    steps = []
    for number, command in enumerate(LIFE):
        world.give(command)
        # An address is given back after the answer, when its device is gone.
        time.sleep(LATER)
        counts: dict[tuple[str, int], int] = {}
        for line in world.news():
            if line["event"] != "failpoint.step" or not line["call"]:
                continue
            place = str(line["call"]), int(str(line["number"]))
            earlier = counts.get(place, 0)
            counts[place] = earlier + 1
            steps.append(
                Step(
                    command=number,
                    call=place[0],
                    number=place[1],
                    name=str(line["step"]),
                    earlier=earlier,
                )
            )
    return steps


def chosen(steps: list[Step], *, ends: bool) -> list[Step]:
    """Choose a step of each call where it comes first: its last, or its commit."""
    first = {step.call: step.command for step in reversed(steps)}
    some = [s for s in steps if s.command == first[s.call]]
    if not ends:
        some = [s for s in some if s.name.endswith(".after")]
    return list({step.call: step for step in some}.values())


def live(world: World, step: Step) -> None:
    """Live the life with one death in it, and look at what is left."""
    world.killed.clear()
    for number, command in enumerate(LIFE):
        if number == step.command:
            world.serve(step.armed)
            with world.watched():
                world.give(command)
                assert wait_until(world.killed.is_set, SOON), "it was not reached"
            assert eventually(world.agree, AGREED), world.differences()
        else:
            world.give(command)
    assert eventually(lambda: not left_of_pynet(world.host), AGREED)
    assert eventually(lambda: not told(world.host, "pools"), AGREED)


@pytest.mark.parametrize("members", [0, 1], ids=["bridge", "overlay"])
def test_the_daemon_dies_under_docker(
    members: int, make_lab: Callable[..., Lab]
) -> None:
    """Whichever call it dies in, the user repeats at most a command; all agree then."""
    # So long a grace helps nobody here.
    args = ("--log-format=json", "--grace=900")
    lab = make_lab(1, etcd=members, pynet_args=args)
    world = World(lab.hosts[0])
    steps = chosen(played(world), ends=bool(members))
    calls = {step.call for step in steps}
    wanted = {"CreateNetwork", "CreateEndpoint", "Join", "DeleteNetwork"}
    assert calls >= wanted
    for step in steps:
        print(step, flush=True)
        try:
            live(world, step)
        except AssertionError as error:
            raise AssertionError(f"{step}: {error}") from error
    world.serve()
