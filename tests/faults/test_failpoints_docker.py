"""
The daemon dies or is refused under a real Docker, at steps of each of its calls.

Each call's first, middle and last step; `test_failpoints.py` has them all.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster, census
from tests.dockerd.tools import Container, api, eventually, left_of_pynet
from tests.faults.failpoint_world import KILLED, Daemon

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

PATIENCE = 20.0
"""Seconds for what is to become as it was."""
TRIES = 40
"""Times a command is typed, with a breath between."""
ROUNDS = 4
"""Times a story is told: what happens once in it can fail once in it."""
WHEN: dict[str, Callable[[int], int]] = {
    "first": lambda _: 1,
    "middle": lambda last: (last + 1) // 2,
    "last": lambda last: last,
}
CREATE = "network create -d pynet"
POOLS = "--ipam-driver pynet --ipv6 --subnet 10.71.0.0/24 --subnet fd71::/64"
BRIDGE = (
    f"{CREATE} {POOLS} -o pynet.masquerade=false NET",
    f"{CREATE} --subnet 10.72.0.0/24 OTHER",
)
OVERLAY = (
    f"{CREATE} {POOLS} -o pynet.gateway=pynet -o pynet.host_access=true NET",
    f"{CREATE} --ipam-driver pynet --subnet 10.72.0.0/24 OTHER",
)


@pytest.fixture(scope="module")
def lonely(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return a lab of one host with a store of its own."""
    return make_module_lab(serve=False)


@pytest.fixture(scope="module")
def shared(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return a lab of one host and etcd."""
    return make_module_lab(etcd=1, serve=False)


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator["Scene"]:
    """Return a lab with a daemon; afterwards all must be as it was before."""
    with Scene(request.getfixturevalue(request.param)) as made:
        yield made


@dataclass
class User:
    """Somebody who types Docker's commands, again if they fail."""

    host: Host
    failures: list[str] = field(default_factory=list)

    def tells(self, creations: tuple[str, ...]) -> None:
        """Create networks and containers, use them, remove all."""
        for words in creations:
            self.types(words)
        self.types("create --name one --network NET -p 8071:80 busybox sleep 600")
        self.types("create --name two --network NET --ip 10.71.0.77 busybox sleep 600")
        self.types("start one")
        self.types("start two")
        self.types("network connect OTHER one")
        self.check()
        self.types("network disconnect OTHER one")
        self.types("stop -t 0 one")
        self.types("start one")
        self.check()
        self.types("rm -f one two")
        self.types("network rm NET OTHER")

    def types(self, words: str) -> None:
        """Type a command until it succeeds; what it did already is none to repeat."""
        for _ in range(TRIES):
            done = self.host.docker(*words.split(), check=False)
            if not done.returncode:
                return
            self.failures.append(f"{words}: {done.stderr}")
            time.sleep(0.2)
        raise AssertionError(self.failures[-2:])

    def check(self) -> None:
        """Fail unless no address is there twice and the containers reach each other."""
        one, two = (Container(host=self.host, name=n).look() for n in ("one", "two"))
        given = [c.attachment(n)["IPAddress"] for c in (one, two) for n in c.networks]
        assert len(set(given)) == len(given)
        assert one.pings(two.ip("NET"))
        # The newer one asks: the older may know the address by a MAC of before.
        assert one.pings(two.ip6("NET"))


class Scene:
    """A lab with a daemon, of which nothing may be left."""

    def __init__(self, lab: Lab) -> None:
        """Start the daemon."""
        self.lab = lab
        self.host = lab.hosts[0]
        store = f"etcd://{lab.members[0].address4}:2379" if lab.members else ""
        self.daemon = Daemon(self.host, store=store, audit="1")
        self.user = User(self.host)

    def __enter__(self) -> Self:
        self.daemon.start()
        self.before = self.look()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                eventually(lambda: self.look() == self.before, PATIENCE)
                assert self.look() == self.before
                assert "Traceback" not in self.daemon.log()
        finally:
            self.daemon.close()

    def look(self) -> dict[str, Any]:
        """Return what there is of networks, on the host and in the store."""
        names = {n["Name"] for n in api(self.host, "GET", "/networks")}
        return {
            "networks": sorted(names - {"docker_gwbridge"}),
            "left": left_of_pynet(self.host),
            "census": census(self.host),
            "pools": self.host.pynet("ipam", "ls", "--json").stdout,
            "keys": Cluster(self.lab).keys() if self.lab.members else [],
        }

    def tell(self) -> None:
        """Tell the story of this lab."""
        self.user.tells(OVERLAY if self.lab.members else BRIDGE)

    def steps(self) -> dict[str, int]:
        """Tell it undisturbed; return each call with its number of steps, in order."""
        self.daemon.restart("trace")
        self.tell()
        assert self.user.failures == []
        found: dict[str, int] = {}
        for line in self.events("failpoint.step"):
            if line["call"]:
                found[line["call"]] = max(line["number"], found.get(line["call"], 0))
        assert len(found) >= 11
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return what the daemons have logged under a name since this was asked."""
        return [line for line in self.daemon.news() if line["event"] == name]


class Reviver:
    """Starts the daemon again whenever it dies, with the next failpoint."""

    def __init__(self, daemon: Daemon, armed: list[str]) -> None:
        """Begin with the first failpoint."""
        self.daemon = daemon
        self.armed = armed
        self.deaths = 0
        self.over = threading.Event()
        self.problem: BaseException | None = None
        daemon.restart(armed[0])
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        """Wait for the daemon's end, again and again."""
        try:
            while not self.over.is_set():
                state = self.daemon.ask("wait 0.05")
                if state != "alive":
                    assert state == KILLED
                    self.deaths += 1
                    self.daemon.start(",".join(self.armed[self.deaths :][:1]))
        except BaseException as error:  # noqa: BLE001 - told where it is waited for
            self.problem = error

    def end(self) -> None:
        """Leave the daemon alone from now on."""
        self.over.set()
        self.thread.join()
        assert self.problem is None


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("scene", ["lonely", "shared"], indirect=True)
async def test_the_daemon_dies_in_each_call(scene, when):
    """Commands that failed are typed again, and nothing is left or there twice."""
    places = [f"{call}.{WHEN[when](last)}" for call, last in scene.steps().items()]
    reviver = Reviver(scene.daemon, [f"{place}:kill" for place in places])
    try:
        for _ in range(ROUNDS):
            if reviver.deaths < len(places):
                scene.tell()
    finally:
        reviver.end()
    assert [hit["failpoint"] for hit in scene.events("failpoint.hit")] == places


@pytest.mark.parametrize("scene", ["lonely", "shared"], indirect=True)
async def test_each_call_is_refused(scene):
    """Docker hears why, rolls back, and the command that is typed again succeeds."""
    calls = scene.steps().items()
    places = {f"{call}.{when(last)}" for call, last in calls for when in WHEN.values()}
    scene.daemon.restart(",".join(f"{place}:error" for place in sorted(places)))
    hit: set[str] = set()
    for _ in range(ROUNDS):
        if hit != places:
            scene.tell()
            hit |= {line["failpoint"] for line in scene.events("failpoint.hit")}
    assert hit == places
    for text in scene.user.failures:
        assert "failed, as PYNET_FAILPOINT wants it" in text
