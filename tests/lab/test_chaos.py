import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from cnmdriver.lab import process
from cnmdriver.lab.chaos.history import History, State, Stay, twice
from cnmdriver.lab.chaos.notes import (
    BUG,
    DUPLICATES,
    LEAKS,
    UNKNOWN,
    WRONG,
    Notes,
    refusal,
)
from cnmdriver.lab.chaos.oracle import (
    amiss,
    check_history,
    check_left,
    check_logs,
    state,
)
from cnmdriver.lab.chaos.schedule import CALM, Fault, kills, schedule
from cnmdriver.lab.lab import Lab
from tests.lab.tools import cli, leftovers

HOSTS = ("h1", "h2", "h3")
MEMBERS = ("e1", "e2", "e3")


def faults(seed: int, seconds: float = 600.0, least_kills: int = 0) -> list[Fault]:
    """Return the schedule of a run on a usual lab."""
    return [*schedule(seed, HOSTS, MEMBERS, seconds=seconds, least_kills=least_kills)]


def stay(container: str, since: float, until: float | None, **more: str) -> Stay:
    """Return a stay at one address, unless told otherwise."""
    words = {"network": "blue", "address": "10.1.0.2", "host": "h1", **more}
    return Stay(container=container, since=since, until=until, **words)


def test_a_seed_has_one_schedule() -> None:
    """The same seed makes the same faults, in the same places and at the same times."""
    assert faults(7) == faults(7)


def test_other_seeds_have_other_schedules() -> None:
    """No two of a hundred seeds have a common schedule."""
    assert len({tuple(faults(seed, 60.0)) for seed in range(100)}) == 100


def test_a_schedule_ends_with_calm() -> None:
    """Every fault is over some seconds before the end."""
    for seed in range(20):
        assert max(f.at + f.lasts for f in faults(seed, 120.0)) < 120.0 - CALM


def test_a_lane_has_one_fault_at_a_time() -> None:
    """A lane's fault begins after the one before is undone; lanes overlap."""
    found = faults(3)
    together = [b for a, b in pairwise(found) if b.at < a.at + a.lasts]
    for lane in {fault.lane for fault in found}:
        mine = [fault for fault in found if fault.lane == lane]
        for one, other in pairwise(mine):
            assert one.at + one.lasts < other.at
    assert together


def test_a_long_schedule_has_every_kind_of_fault() -> None:
    """Daemons, dockerds, members, cables and machines all have their faults."""
    found = {(fault.what, len(fault.where)) for fault in faults(5, 3600.0)}
    assert {
        ("kill pynet", 1),
        ("pause pynet past its lease", 1),
        ("kill dockerd", 1),
        ("kill both", 1),
        ("power cut", 1),
        ("kill etcd", 1),
        ("kill etcd", 3),
        ("pause etcd", 2),
        ("cut host from all members", 4),
        ("cut hosts", 2),
        ("unplug host", 1),
    } <= found


@pytest.mark.parametrize("wanted", [1, 50, 1000])
def test_a_schedule_goes_on_till_enough_is_killed(wanted: int) -> None:
    """With a number of kills, the schedule ends with the fault that reaches it."""
    found = faults(11, least_kills=wanted)
    assert sum(map(kills, found)) >= wanted
    assert sum(map(kills, found[:-1])) < wanted


def test_an_address_given_twice_is_found() -> None:
    """Two containers with one address of a network at one time are found."""
    one, other = stay("a", 1.0, 5.0), stay("b", 4.9, None)
    assert twice([other, one]) == [(one, other)]


def test_a_stay_within_another_and_one_after_it_are_found() -> None:
    """A stay without an end overlaps with all that come later, however many."""
    first = stay("a", 0.0, None)
    others = [stay("b", 1.0, 2.0), stay("c", 3.0, 4.0)]
    assert twice([first, *others]) == [(first, others[0]), (first, others[1])]


@pytest.mark.parametrize(
    "other",
    [
        stay("b", 5.0, 6.0),
        stay("b", 2.0, 3.0, network="red"),
        stay("b", 2.0, 3.0, address="10.1.0.3"),
        stay("a", 2.0, 3.0),
    ],
    ids=["later", "another network", "another address", "the same container"],
)
def test_what_is_not_given_twice_is_not_found(other: Stay) -> None:
    """An address may be given again, and on another network."""
    assert twice([stay("a", 1.0, 5.0), other]) == []


def test_history_ends_stays_before_a_fault() -> None:
    """What was asked before a fault says nothing about the time after it."""
    history = History()
    life = history.life("h1")
    history.begin("h1", "a", [("blue", "10.1.0.2")], life)
    history.end_host("h1")
    history.begin("h1", "b", [("blue", "10.1.0.2")], life)
    assert [(s.container, s.until is None) for s in history.stays()] == [("a", False)]
    history.begin("h1", "b", [("blue", "10.1.0.2")], history.life("h1"))
    assert twice(history.stays()) == []


def test_history_ends_stays_of_one_network() -> None:
    """A container that leaves a network keeps its address on the other."""
    history = History()
    places = [("blue", "10.1.0.2"), ("red", "10.2.0.2")]
    history.begin("h1", "a", places, history.life("h1"))
    history.begin("h1", "a", places, history.life("h1"))
    history.end("a", "blue")
    ends = {s.network: s.until is None for s in history.stays()}
    assert ends == {"blue": False, "red": True}
    assert len(history.stays()) == 2


def test_an_address_that_docker_only_goes_on_showing_is_not_believed() -> None:
    """After a connect that failed, a stay begins only when a command has succeeded."""
    history = History()
    life = history.life("h1")
    history.doubt("a", "blue")
    history.begin("h1", "a", [("blue", "10.1.0.2"), ("red", "10.2.0.2")], life)
    assert [s.network for s in history.stays()] == ["red"]
    history.trust("a", "red")
    history.begin("h1", "a", [("blue", "10.1.0.2")], life)
    assert [s.network for s in history.stays()] == ["red"]
    history.trust("a")
    history.begin("h1", "a", [("blue", "10.1.0.2")], life)
    assert sorted(s.network for s in history.stays()) == ["blue", "red"]


def test_a_leak_is_what_was_not_there_before() -> None:
    """What was there at the start is no leak; what came is, with its place."""
    before = State(things={"etcd": ("a",), "census on h1": ()})
    after = State(things={"etcd": ("a", "b"), "census on h1": ("veth",), "x": ()})
    assert after.beyond(before) == ["census on h1: veth", "etcd: b"]
    assert before.beyond(after) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("NetworkDriver.Join: internal error: KeyError: 3", BUG),
        ("cannot commit: no member of 192.0.2.101:2379 did it", "store is away"),
        ("dial unix /run/docker/plugins/pynet.sock: connect", "pynet is away"),
        ("pool 10.1.0.0/28 has no free address: 13 taken of 13", "no free address"),
        ("its body is empty, as Docker repeats a call", "its call broke off"),
        ("the moon is in the way", UNKNOWN),
    ],
    ids=lambda text: text[:20],
)
def test_refusals_are_told_apart(text: str, kind: str) -> None:
    """A refusal is of the kind that its words say, and otherwise unknown."""
    assert refusal(text) == kind


def test_only_refusals_that_nobody_can_explain_are_findings() -> None:
    """An internal error and an unknown text are found; a full pool is only counted."""
    notes = Notes(seed=1)
    notes.refuse("docker run a", "pool 10.1.0.0/28 has no free address")
    assert notes.well
    notes.refuse("docker run b", "internal error: KeyError")
    notes.refuse("docker run c", "the moon is in the way")
    assert len(notes.findings[WRONG]) == 2
    assert notes.commands["refused"] == 3
    assert notes.as_dict()["well"] is False
    assert any("the moon" in line for line in notes.summary())


def test_in_peace_a_store_that_is_away_explains_nothing() -> None:
    """When all faults are over, only what others have may stand in the way."""
    notes = Notes(seed=1)
    notes.refuse("docker run a", "pool 10.1.0.0/28 has no free address", peace=True)
    notes.refuse("docker run a", "the store is away")
    assert notes.well
    notes.refuse("docker run a", "the store is away", peace=True)
    assert not notes.well


@pytest.mark.root
@pytest.mark.dockerd
@pytest.mark.timeout(120)
def test_the_oracle_sees_what_is_left(make_lab: Callable[..., Lab]) -> None:
    """
    A network that was not removed is found in the store, the kernel and Docker.

    1. Remember how a host is; make a network, and put a key of nobody's into etcd.
    2. Ask the oracle at once what is left.
    3. Take both away again, and ask once more.
    Result: the first time it names all, the second time nothing; the host is well.
    """
    lab = make_lab(1, etcd=1)
    host = lab.hosts[0]
    before = state(lab)
    kind = ("-d", "pynet", "--ipam-driver", "pynet")
    host.docker("network", "create", *kind, "left")
    host.exec("etcdctl", "put", "/pynet/v1/vnis/1", "{}")
    found = state(lab).beyond(before)
    assert "etcd: vnis/1" in found
    assert "networks of docker on h1: left" in found
    assert any(thing.startswith("census on h1: ") for thing in found)
    assert any(thing.startswith("etcd: networks/") for thing in found)

    host.docker("network", "rm", "left")
    host.exec("etcdctl", "del", "/pynet/v1/vnis/1")
    notes = Notes(seed=1)
    check_left(lab, before, notes)
    assert notes.findings[LEAKS] == []
    assert amiss(host) == ""

    history = History()
    for name in ("a", "b"):
        history.begin("h1", name, [("blue", "10.1.0.2")], history.life("h1"))
    check_history(lab, history, notes)
    assert len(notes.findings[DUPLICATES]) == 1

    check_logs(lab, notes)
    assert notes.findings[WRONG] == []
    with (host.directory / "pynet.log").open("a", encoding="utf-8") as log:
        log.write("Traceback (most recent call last):\n  File …\nKeyError: 3\n")
    check_logs(lab, notes)
    assert "KeyError: 3" in notes.findings[WRONG][0]


@pytest.mark.root
@pytest.mark.dockerd
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_takes_the_lab_down(place: Path) -> None:
    """
    A run that is interrupted leaves nothing on the machine.

    1. Start `pynet lab chaos` and wait until it has made a fault.
    2. Press Ctrl-C.
    Result: the program ends, and neither processes nor files are left.
    """
    argv = [*cli(place, "chaos", "--seconds=600", "--seed=1"), "--users=1"]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    with child.stderr as told:
        assert any(" s  " in line for line in told)
        lab = Lab.attach(place)
        pids = process.machine_processes(lab.directory)
        with process.held(pids) as spaces:
            child.send_signal(signal.SIGINT)
            told.read()
            assert child.wait(120) not in {0, None}
            assert leftovers(lab, spaces) == []
