import base64
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnmdriver.lab import process
from cnmdriver.lab.etcd import Member
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.node import Node
from cnmdriver.lab.process import LabError
from tests.lab.tools import STUB, cli, leftovers, machine_state, start

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def shared(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts without pynet and three members."""
    return make_module_lab(hosts=2, etcd=3, serve=False)


@pytest.fixture
def trio(shared: Lab) -> Iterator[Lab]:
    """Return the shared lab; its cluster must be well when the test is over."""
    yield shared
    for member in shared.members:
        member.wait_healthy()


def ask(member: Member, method: str, **body: object) -> dict[str, object]:
    """Call a method of etcd's JSON gateway; return {} if it does not answer."""
    text = json.dumps(body).encode()
    head = f"POST /v3/{method} HTTP/1.0\r\nContent-Length: {len(text)}\r\n\r\n"
    with member.tcp_socket() as client:
        client.settimeout(5.0)
        try:
            client.connect(("127.0.0.1", 2379))
            client.sendall(head.encode() + text)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        except OSError:
            return {}
    headers, _, found = answer.partition(b"\r\n\r\n")
    return json.loads(found) if b" 200 " in headers.splitlines()[0] else {}


def put(member: Member, key: str) -> bool:
    """Write a key through a member; tell whether it was written."""
    name = base64.b64encode(key.encode()).decode()
    return bool(ask(member, "kv/put", key=name, value=name))


def has(member: Member, key: str) -> bool:
    """Ask a member whether there is a key."""
    name = base64.b64encode(key.encode()).decode()
    return "kvs" in ask(member, "kv/range", key=name)


def reaches(first: Node, second: Node) -> tuple[bool, bool]:
    """Tell whether a machine reaches another, by IPv4 and by IPv6."""
    found = [
        first.exec("ping", "-c1", "-W1", str(address), check=False).returncode == 0
        for address in (second.address4, second.address6)
    ]
    return found[0], found[1]


def runs(lab: Lab, container: str) -> bool:
    """Tell whether a container of the first host runs."""
    shown = lab.hosts[0].docker(
        "inspect", "-f", "{{.State.Running}}", container, check=False
    )
    return shown.stdout == "true\n"


def test_members_are_one_cluster(trio: Lab) -> None:
    """What is written through one member is read from the others."""
    assert [member.name for member in trio.members] == ["e1", "e2", "e3"]
    assert trio.member("e2").client_url == "http://192.0.2.102:2379"
    assert put(trio.member("e1"), "one")
    assert [has(member, "one") for member in trio.members] == [True] * 3
    assert len(ask(trio.member("e1"), "cluster/member/list")["members"]) == 3  # type: ignore[arg-type]


def test_hosts_reach_members_by_both_families(trio: Lab) -> None:
    """Hosts and members have addresses of both families on the underlay."""
    assert reaches(trio.host("h1"), trio.member("e1")) == (True, True)
    assert reaches(trio.member("e3"), trio.host("h2")) == (True, True)


@pytest.mark.parametrize("end", [Member.stop_etcd, Member.kill_etcd])
def test_cluster_serves_without_one_member(
    trio: Lab, end: Callable[[Member], object]
) -> None:
    """A member that was stopped or killed is not missed, and comes back by itself."""
    first, second, _ = trio.members
    end(first)
    assert first.state("etcd") == "down"
    assert wait_until(second.is_healthy, 10)
    assert put(second, end.__name__)
    first.start_etcd()
    first.wait_healthy()
    assert has(first, end.__name__)


def test_paused_member_keeps_its_connections(trio: Lab) -> None:
    """A paused member accepts and does not answer; resumed, it has what it missed."""
    first, second, _ = trio.members
    first.pause()
    try:
        assert first.state("etcd") == "paused"
        assert not first.is_healthy()
        with first.tcp_socket() as client:
            client.connect(("127.0.0.1", 2379))
        assert wait_until(second.is_healthy, 10)
        assert put(second, "paused")
        with pytest.raises(LabError, match="etcd on e1 is paused: resume or kill it"):
            first.stop_etcd()
    finally:
        first.resume()
    first.wait_healthy()
    assert has(first, "paused")


def test_paused_daemon_is_killed(trio: Lab) -> None:
    """A paused daemon ends when it is killed, at once."""
    first = trio.members[0]
    first.pause()
    began = time.monotonic()
    first.kill_etcd()
    assert time.monotonic() - began < 2
    with pytest.raises(LabError, match="etcd does not run on e1"):
        first.pause()
    first.start_etcd()


def test_two_of_three_are_a_quorum_and_one_is_not(trio: Lab) -> None:
    """One member alone accepts connections and says that it is not healthy."""
    first, second, third = trio.members
    first.kill_etcd()
    second.kill_etcd()
    assert wait_until(lambda: third.state("etcd") == "unhealthy", 10)
    first.start_etcd()
    third.wait_healthy()
    second.start_etcd()


def test_a_cut_pair_is_cut_in_both_directions(trio: Lab) -> None:
    """Two machines that are cut do not reach each other; all others do."""
    host, other = trio.hosts
    member = trio.member("e1")
    trio.cut("h1", "e1")
    trio.cut("e1", "h1")
    assert trio.outside.cuts() == {frozenset({"h1", "e1"})}
    assert reaches(host, member) == (False, False)
    assert reaches(member, host) == (False, False)
    assert reaches(host, trio.member("e2")) == (True, True)
    assert reaches(other, member) == (True, True)
    assert reaches(host, other) == (True, True)
    trio.mend("e1", "h1")
    trio.mend("e1", "h1")
    assert trio.outside.cuts() == set()
    assert reaches(host, member) == (True, True)


def test_a_member_cut_from_its_peers_is_alone(trio: Lab) -> None:
    """A member without its peers has no quorum, though its clients reach it."""
    trio.cut("e1", "e2")
    trio.cut("e1", "e3")
    try:
        assert wait_until(lambda: trio.member("e1").state("etcd") == "unhealthy", 10)
        trio.member("e2").wait_healthy()
        assert reaches(trio.hosts[0], trio.member("e1")) == (True, True)
    finally:
        trio.mend("e1", "e2")
        trio.mend("e1", "e3")


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("h1", "h9"), "there is no h9 in the lab: it has h1, h2, e1, e2, e3, under"),
        (("h1", "h1"), "h1 cannot be cut from itself: name two machines"),
        (("h1", "underlay"), "underlay only connects the others: name one of them"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    trio: Lab, pair: tuple[str, str], reason: str
) -> None:
    """A cut needs two different machines with cables."""
    with pytest.raises(LabError, match=reason):
        trio.cut(*pair)


def test_an_unplugged_member_comes_back(trio: Lab) -> None:
    """A member without its cable has no quorum, and has one when it is plugged in."""
    member = trio.member("e3")
    member.unplug()
    assert wait_until(lambda: member.state("etcd") == "unhealthy", 10)
    member.plug()
    member.wait_healthy()


def test_paused_dockerd_does_not_answer(trio: Lab) -> None:
    """A paused dockerd is silent; resumed, it goes on where it was."""
    host = trio.hosts[0]
    host.pause("dockerd")
    assert host.state("dockerd") == "paused"
    assert not host.docker_answers()
    host.resume("dockerd")
    assert host.docker_answers()
    host.resume("dockerd")
    with pytest.raises(LabError, match="no etcd on h1: it runs pynet and dockerd"):
        host.pause("etcd")


def test_power_comes_back(trio: Lab) -> None:
    """
    A host and a member come back from a power cut with their disks.

    1. A container that is always restarted, and one that is not; a key in etcd.
    2. Power cut for host and member: neither runs, the others do not notice.
    3. Power on.

    Result: dockerd and its one container run again, /run was emptied, etcd has the key.
    """
    host, member = trio.hosts[0], trio.member("e2")
    run = ("run", "-d", "--network", "none")
    host.docker(*run, "--restart=always", "--name=always", "busybox", "sleep", "1000")
    host.docker(*run, "--name=once", "busybox", "sleep", "1000")
    host.exec("touch", "/run/left", "/var/lib/pynet/kept")
    assert put(member, "power")

    host.power_cut()
    member.power_cut()
    assert (host.state("dockerd"), member.state("etcd")) == ("down", "down")
    with pytest.raises(LabError, match="h1 is off: it has no cable until it boots"):
        host.unplug()
    assert wait_until(trio.member("e1").is_healthy, 10)

    host.power_on()
    member.power_on()
    with pytest.raises(LabError, match="h1 is on already"):
        host.power_on()
    assert wait_until(lambda: runs(trio, "always"), 10)
    assert not runs(trio, "once")
    assert host.exec("ls", "/run/left", check=False).returncode == 2
    host.exec("ls", "/var/lib/pynet/kept")
    member.wait_healthy()
    assert has(member, "power")
    host.docker("rm", "-f", "always", "once")


def test_power_cut_of_a_machine_with_a_paused_daemon(trio: Lab) -> None:
    """A machine whose daemon is paused loses its power as fast as another."""
    member = trio.member("e3")
    member.pause()
    began = time.monotonic()
    member.power_cut()
    assert time.monotonic() - began < 2
    member.power_on()


def test_a_wiped_cluster_starts_empty(make_lab: Callable[..., Lab]) -> None:
    """A member gives up its data when it is wiped, which must not run then."""
    member = make_lab(etcd=1, serve=False).member("e1")
    assert put(member, "gone")
    with pytest.raises(LabError, match="etcd runs on e1: stop it before"):
        member.wipe()
    assert member.stop_etcd() in (0, -signal.SIGTERM)
    member.wipe()
    member.start_etcd()
    member.wait_healthy()
    assert not has(member, "gone")


@pytest.mark.parametrize("mtu", [1400, 9000])
def test_underlay_carries_its_mtu(make_lab: Callable[..., Lab], mtu: int) -> None:
    """A packet of the underlay's MTU passes, and one byte more does not."""
    lab = make_lab(etcd=1, mtu=mtu, serve=False)
    for address, headers in (("192.0.2.101", 28), ("2001:db8:1::101", 48)):
        ping = ("ping", "-c1", "-W2", "-Mdo", address, "-s")
        lab.hosts[0].exec(*ping, str(mtu - headers))
        too_large = lab.hosts[0].exec(*ping, str(mtu - headers + 1), check=False)
        assert too_large.returncode != 0


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((), ["--store", "etcd://192.0.2.101:2379"]),
        (("--store=sqlite:///x",), ["--store=sqlite:///x"]),
    ],
)
def test_hosts_use_the_cluster_as_their_store(
    make_lab: Callable[..., Lab],
    tmp_path: Path,
    own: tuple[str, ...],
    expected: list[str],
) -> None:
    """Pynet is told where etcd is, unless it was given a store."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    daemon = (sys.executable, str(stub), "serve")
    host = make_lab(etcd=1, daemon=daemon, pynet_args=own).hosts[0]
    started = f"stub {['serve', *expected]} None\n"
    assert host.log("pynet") == started
    assert host.environment()["ETCDCTL_ENDPOINTS"] == "192.0.2.101:2379"
    host.power_cut()
    host.power_on()
    assert host.log("pynet") == started * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"etcd": 6}, "a lab has 0 to 5 etcd members, not 6"),
        ({"hosts": 0}, "a lab has 1 to 90 hosts, not 0"),
        ({"mtu": 900}, "a lab has 1280 to 65535 bytes of MTU, not 900"),
    ],
)
def test_a_lab_that_cannot_be_is_refused(
    place: Path, options: dict[str, int], reason: str
) -> None:
    """Numbers out of range are refused before anything is made."""
    with pytest.raises(LabError, match=reason):
        Lab.create(place, **options)  # type: ignore[arg-type]
    assert not place.exists()


def test_member_that_cannot_start_is_told_with_its_log(place: Path) -> None:
    """A lab whose etcd fails is gone, and the log's end is in the error."""
    lab = Lab.create(place, etcd=1, etcd_args=["--election-timeout=100"], serve=False)
    with pytest.raises(LabError, match=r"(?s)etcd did not start on e1 .*5 times"):
        lab.up()
    assert leftovers(lab, frozenset()) == []


@pytest.mark.parametrize("moment", [0.1, 0.4, 0.8])
def test_down_after_a_cluster_was_killed_on_its_way_up(
    place: Path, moment: float
) -> None:
    """All of a cluster goes that was left behind by a killed process."""
    before = machine_state()
    with start(cli(place, "up", "--no-serve", "--hosts=1", "--etcd=3")) as child:
        assert wait_until((place / "lab.json").exists, 10.0)
        time.sleep(moment)
        child.kill()
    lab = Lab.attach(place)
    lab.down()
    assert leftovers(lab, frozenset()) == []
    assert machine_state() == before


def test_another_process_has_the_lab_in_hand(place: Path) -> None:
    """
    A process that has not started a lab stops and starts its daemons.

    1. A lab is started by a command, which ends.
    2. Daemons are stopped, started, killed and paused from here, a pair is cut.
    3. down, with a daemon paused.

    Result: each does what it says, and nothing is left.
    """
    up = process.run(cli(place, "up", "--hosts=1", "--etcd=3", "--no-serve"))
    assert (up.returncode, up.stderr) == (0, "")
    lab = Lab.attach(place)
    host, member = lab.host("h1"), lab.member("e1")
    assert host.stop_dockerd() is None
    assert not host.docker_answers()
    host.start_dockerd()
    assert host.stop_dockerd() == 0
    member.kill_etcd()
    assert member.state("etcd") == "down"
    member.start_etcd()
    member.wait_healthy()
    lab.member("e2").pause()
    lab.cut("h1", "e1")
    with process.held([machine.pid for machine in lab.machines]) as spaces:
        lab.down()
        assert leftovers(lab, spaces) == []


def test_command_line_of_a_cluster(place: Path) -> None:
    """Each command does what it says, and says in one sentence why it cannot."""

    def say(*args: str) -> str:
        done = process.run(cli(place, *args))
        assert "Traceback" not in done.stderr
        return done.stderr if done.returncode else done.stdout

    up = say("up", "--hosts=1", "--etcd=1", "--mtu=1400", "--no-serve")
    assert re.search(r"e1 +192\.0\.2\.101 +2001:db8:1::101 +on +etcd up\n", up)
    assert say("exec", "e1", "hostname") == "e1\n"
    assert say("cut", "h1", "e1") == ""
    assert "e1 and h1 are cut from each other\n" in say("ls")
    assert say("mend", "h1", "e1") == ""
    assert say("pause", "e1") == ""
    assert re.search(r"e1 .* etcd paused\n", say("ls"))
    assert say("resume", "e1") == ""
    assert say("kill", "e1", "etcd") == ""
    assert re.search(r"e1 .* etcd down\n", say("ls"))
    assert say("stop", "e1") == "Error: no daemon on e1 is up or unhealthy\n"
    assert say("start", "e1") == ""
    assert say("stop", "h1", "dockerd") == ""
    assert say("unplug", "h1") == say("plug", "h1") == ""
    assert say("power-cut", "h1") == ""
    assert re.search(r"h1 .* off +-\n", say("ls"))
    assert say("start", "h1", "dockerd") == "Error: h1 is off: switch it on first\n"
    assert say("power-on", "h1") == ""
    assert re.search(r"h1 .* on +pynet down, dockerd up\n", say("ls"))
    expected = "Error: e1 has no Docker: only hosts have\n"
    assert say("docker", "e1", "ps") == expected
    assert say("down") == ""
    assert not place.exists()
