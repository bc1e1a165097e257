"""
The daemon dies or is refused under a real Docker, at steps of each of its calls.

Each call's first, middle and last step; `test_failpoints.py` has them all.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from cnmdriver.lab import process
from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until
from tests.dockerd.cluster import Cluster, census
from tests.dockerd.tools import Container, api, eventually, left_of_pynet

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]

TIMES = ("--grace=2", "--audit=1", "--log-format=json")
"""What Docker has lost is given back after a moment, not only after a minute."""
PATIENCE = 20.0
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
    return make_module_lab(pynet_args=TIMES)


@pytest.fixture(scope="module")
def shared(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return a lab of one host and etcd."""
    return make_module_lab(etcd=1, pynet_args=TIMES)


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

        def succeeds() -> bool:
            done = self.host.docker(*words.split(), check=False)
            if done.returncode:
                self.failures.append(f"{words}: {done.stderr}")
            return done.returncode == 0

        assert wait_until(succeeds, PATIENCE), self.failures[-3:]

    def check(self) -> None:
        """Fail unless no address is there twice and the containers reach each other."""
        one, two = (Container(host=self.host, name=n).look() for n in ("one", "two"))
        given = [c.attachment(n)["IPAddress"] for c in (one, two) for n in c.networks]
        assert len(set(given)) == len(given)
        assert one.pings(two.ip("NET"))
        assert two.pings(one.ip6("NET") or one.ip("NET"))


class Reviver:
    """Starts the daemon again whenever it dies, with the next failpoint."""

    def __init__(self, host: Host, armed: list[str]) -> None:
        """Begin with the first failpoint."""
        self.host = host
        self.armed = armed
        self.deaths = 0
        self.over = threading.Event()
        self.problem: BaseException | None = None
        self.begin()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def begin(self) -> None:
        """Start the daemon with the failpoint whose turn it is."""
        word = ",".join(self.armed[self.deaths :][:1])
        self.host.start_pynet(env={"PYNET_FAILPOINT": word})
        self.pid = self.host.service_pid("pynet")

    def watch(self) -> None:
        """Wait for the daemon's end, again and again."""
        try:
            while not self.over.wait(0.05):
                if process.has_ended(self.pid):
                    wait_until(lambda: self.host.service("pynet") is None, 5.0)
                    self.deaths += 1
                    self.begin()
        except BaseException as error:  # noqa: BLE001 - told where it is waited for
            self.problem = error

    def end(self) -> None:
        """Leave the daemon alone from now on."""
        self.over.set()
        self.thread.join()
        assert self.problem is None


def steps(host: Host) -> dict[str, int]:
    """Return each of Docker's calls with the number of steps it takes, in order."""
    found: dict[str, int] = {}
    for line in events(host, "failpoint.step"):
        if line["call"]:
            found[line["call"]] = max(line["number"], found.get(line["call"], 0))
    return found


def events(host: Host, name: str) -> list[dict[str, Any]]:
    """Return what the daemons have logged under a name."""
    lines = [line for line in host.log("pynet").splitlines() if line[:1] == "{"]
    return [one for one in map(json.loads, lines) if one["event"] == name]


@contextmanager
def unchanged(lab: Lab) -> Iterator[None]:
    """Fail unless all is afterwards as it was before."""
    host = lab.hosts[0]

    def look() -> dict[str, Any]:
        names = [n["Name"] for n in api(host, "GET", "/networks")]
        keys = Cluster(lab).keys() if lab.members else []
        pools = host.pynet("ipam", "ls", "--json").stdout
        return {
            "networks": sorted(set(names) - {"docker_gwbridge"}),
            "left": left_of_pynet(host),
            "census": census(host),
            "keys": keys,
            "pools": pools,
        }

    before = look()
    yield
    eventually(lambda: look() == before, PATIENCE)
    assert look() == before
    assert "Traceback" not in host.log("pynet")


def story_of(lab: Lab) -> tuple[str, ...]:
    """Return the networks that are made in a lab."""
    return OVERLAY if lab.members else BRIDGE


def counted(lab: Lab) -> dict[str, int]:
    """Tell the story undisturbed and return the calls with their steps."""
    host = lab.hosts[0]
    host.kill_pynet()
    host.start_pynet(env={"PYNET_FAILPOINT": "trace"})
    user = User(host)
    user.tells(story_of(lab))
    assert user.failures == []
    found = steps(host)
    assert len(found) >= 11
    return found


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ("lonely", "first"),
        ("lonely", "middle"),
        ("lonely", "last"),
        ("shared", "middle"),
    ],
)
async def test_the_daemon_dies_in_each_call(where, when, request):
    """Commands that failed are typed again, and nothing is left or there twice."""
    lab: Lab = request.getfixturevalue(where)
    host = lab.hosts[0]
    with unchanged(lab):
        armed = [f"{c}.{WHEN[when](n)}:kill" for c, n in counted(lab).items()]
        host.kill_pynet()
        reviver = Reviver(host, armed)
        user = User(host)
        try:
            for _ in range(ROUNDS):
                if reviver.deaths < len(armed):
                    user.tells(story_of(lab))
        finally:
            reviver.end()
        assert reviver.deaths == len(armed)
    hits = [line["failpoint"] for line in events(host, "failpoint.hit")]
    assert hits[-len(armed) :] == [word.partition(":")[0] for word in armed]


@pytest.mark.parametrize("where", ["lonely", "shared"])
async def test_each_call_is_refused(where, request):
    """Docker hears why, rolls back, and the command that is typed again succeeds."""
    lab: Lab = request.getfixturevalue(where)
    host = lab.hosts[0]
    with unchanged(lab):
        places = {f"{c}.{w(n)}" for c, n in counted(lab).items() for w in WHEN.values()}
        armed = ",".join(f"{place}:error" for place in sorted(places))
        host.kill_pynet()
        before = len(events(host, "failpoint.hit"))
        host.start_pynet(env={"PYNET_FAILPOINT": armed})

        def hits() -> set[str]:
            lines = events(host, "failpoint.hit")[before:]
            return {line["failpoint"] for line in lines}

        user = User(host)
        for _ in range(ROUNDS):
            if hits() != places:
                user.tells(story_of(lab))
        assert hits() == places
    for text in user.failures:
        assert "failed, as PYNET_FAILPOINT wants it" in text
