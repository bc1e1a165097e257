"""
The store is away, wiped, restored or slow: containers come and go all the same.

On real dockerds and a real etcd. The oracle is always the same: when the store is back,
every host and the store agree; after everything is removed nothing is left.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster, etcdctl, nothing_is_left
from tests.dockerd.tools import Container, Scene, Server, api, eventually, told
from tests.faults.streams import Pings

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

PORT = 7
LEASE = 15.0
TURNS = 4.0
"""Seconds for an election, a watch and a kernel."""
AGREED = 5.0
"""Seconds until all hosts know what was done while the store was away."""
SOON = 12.0
"""The same, where something else is to happen too and the machine is loaded."""
READY = 7.0
"""Seconds in which a loaded machine does what takes two or three on another."""
AHEAD = 6.0
"""Seconds until a host has blocks in advance again."""
DEAD = 40.0
MANY = 200
"""Containers on each of two hosts."""


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return three hosts and one etcd member."""
    return make_module_lab(3, etcd=1)


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts; after the test nothing of it may be left anywhere."""
    with Cluster(lab) as made:
        yield made
        made.stack.close()
        assert nothing_is_left(made)


@contextmanager
def away(lab: Lab) -> Iterator[None]:
    """Kill etcd, for as long as the block lasts."""
    for member in lab.members:
        member.kill_etcd()
    try:
        yield
    finally:
        back(lab)


def back(lab: Lab) -> None:
    """Start etcd again, if it does not run."""
    for member in lab.members:
        if not member.service("etcd"):
            member.start_etcd()
    for member in lab.members:
        member.wait_healthy()


def status(host: Host) -> Any:
    """Return what a host says of itself."""
    return told(host, "status")


def in_agreement(cluster: Cluster) -> bool:
    """Tell whether every host has what it should, and waits for nothing."""
    return all(status(host)["well"] for host in cluster.lab.hosts)


def reaches(one: Container, other: Container, timeout: float = SOON) -> bool:
    """Tell whether one container soon has an answer of the other."""
    with closing(Server(other.look(), other.name, PORT, "udp")):
        return eventually(lambda: one.udp(other.ip(), PORT, 0.3) is not None, timeout)


def had(container: Container) -> tuple[str, str]:
    """Return a container's addresses of both families."""
    container.look()
    return container.ip(), container.ip6()


@pytest.mark.timeout(900)
def test_containers_come_and_go_without_the_store(cluster: Cluster) -> None:
    """
    Nothing fails while etcd is away, no address is given twice, and soon all know it.

    1. Two containers on different hosts ping each other through it all.
    2. etcd is killed. On two hosts at once many containers are started and stopped,
       one after another, and some restarted and removed.
    3. etcd comes back.
    Result: no call failed; no address was two containers' at a time; within five
    seconds the hosts agree, and all that run reach each other.
    """
    name = cluster.network()
    first, second, _ = cluster.run(name)
    pings = Pings(first, second.ip(), "through it all")
    pings.start()
    running = []
    with away(cluster.lab), ThreadPoolExecutor(2) as pool:
        lives = list(pool.map(lambda n: life(cluster.scenes[n], name), range(2)))
        for kept, given in lives:
            running += kept
            assert len(given) == MANY
            assert all(given)
        addresses = [had(container) for container in running]
    begin = time.monotonic()
    assert eventually(lambda: in_agreement(cluster), AGREED)
    print(f"agreed after {time.monotonic() - begin:.1f} s")
    assert len({ip for pair in addresses for ip in pair}) == 2 * len(running)
    assert [had(container) for container in running] == addresses
    prober = cluster.scenes[2].run(name)
    for container in running:
        assert reaches(prober, container)
    pings.stop()
    assert pings.sent == len(pings.heard)


def life(scene: Scene, network: str) -> tuple[list[Container], list[str]]:
    """Let containers come and go; return those that stay, and all others' addresses."""
    given = []
    for number in range(MANY):
        body = {
            "Image": "busybox",
            "Cmd": ["sleep", "600"],
            "HostConfig": {"NetworkMode": network},
        }
        made = api(scene.host, "POST", f"/containers/create?name=m{number}", body)
        path = f"/containers/{made['Id']}"
        api(scene.host, "POST", f"{path}/start")
        shown = api(scene.host, "GET", f"{path}/json")
        given.append(shown["NetworkSettings"]["Networks"][network]["IPAddress"])
        api(scene.host, "POST", f"{path}/stop?t=0")
        api(scene.host, "DELETE", path)
    kept = [scene.run(network) for _ in range(4)]
    scene.host.docker("restart", "-t0", kept[0].name)
    scene.host.docker("stop", "-t0", kept[1].name)
    scene.host.docker("start", kept[1].name)
    scene.remove(kept.pop())
    return kept, given


def test_what_needs_the_cluster_is_refused_soon(cluster: Cluster) -> None:
    """A new network, or another host's address, is refused within 3 s, with since."""
    name = cluster.network()
    cluster.run(name)
    four = etcdctl(cluster.lab, "get", "--prefix", "/pynet/v1/networks/").stdout
    subnet = json.loads(four.splitlines()[1])["record"]["subnets"][0]["pool"]
    far = subnet.rpartition(".")[0] + ".250"
    with away(cluster.lab):
        host = cluster.lab.hosts[0]
        assert eventually(lambda: status(host)["store"]["away"], 10)
        for refuse in (
            lambda: cluster.scenes[0].refused_network("--ipam-driver", "pynet"),
            lambda: cluster.scenes[0].refused_run(name, "--ip", far),
        ):
            begin = time.monotonic()
            text = refuse()
            # Docker's own part of it is not the store's.
            assert time.monotonic() - begin < READY
            assert "the store has been away since" in text
            assert " UTC" in text
    assert eventually(lambda: in_agreement(cluster), SOON)


def test_an_address_of_another_hosts_block(cluster: Cluster) -> None:
    """A host asks for an address in another's block, and has it unless it is used."""
    name = cluster.network(six=False)
    first, second, third = cluster.run(name)
    mine = first.ip()
    stem, _, last = mine.rpartition(".")
    free = f"{stem}.{int(last) + 5}"
    got = cluster.scenes[1].run(name, "--ip", free)
    assert got.ip() == free
    assert reaches(third, got)
    text = cluster.scenes[2].refused_run(name, "--ip", mine)
    assert "is taken by" in text
    # Its owner goes on around it.
    more = [cluster.scenes[0].run(name) for _ in range(6)]
    assert free not in {container.ip() for container in more}
    cluster.scenes[0].host.stop_pynet()
    try:
        text = cluster.scenes[1].refused_run(name, "--ip", f"{stem}.{int(last) + 20}")
        assert "gives out" in text
    finally:
        cluster.scenes[0].host.start_pynet()
    del second


def test_a_small_pool_over_three_hosts(cluster: Cluster) -> None:
    """All addresses of a /29 can be had on any of three hosts, and one more on none."""
    names = [f"small{n}" for n in range(3)]
    for number in range(3):
        cluster.join(number, names[0], "--subnet", "10.99.1.0/29")
    for turn in range(3):
        made = [cluster.scenes[turn].run(names[0]) for _ in range(5)]
        assert len({container.ip() for container in made}) == 5
        other = cluster.scenes[(turn + 1) % 3]
        assert "no free address" in other.refused_run(names[0])
        cluster.scenes[turn].remove(*made)
        shared = [cluster.scenes[n % 3].run(names[0]) for n in range(5)]
        assert len({container.ip() for container in shared}) == 5
        for number, container in enumerate(shared):
            cluster.scenes[number % 3].remove(container)


def test_a_daemon_that_starts_without_the_store(cluster: Cluster) -> None:
    """
    It serves from its snapshot within two seconds, and what it did comes after.

    1. etcd is killed, then a daemon, which is started again; and stopped once more.
    2. Containers are started, restarted and removed; a prober on another host pings
       one that stays all the time.
    3. etcd comes back.
    Result: ready in two seconds both times; nothing was lost; soon all agree.
    """
    name = cluster.network()
    stays, prober, _ = cluster.run(name)
    goes = cluster.scenes[0].run(name)
    host = stays.host
    pings = Pings(prober, stays.ip(), "a container whose daemon restarts")
    pings.start()
    with away(cluster.lab):
        host.kill_pynet()
        begin = time.monotonic()
        host.start_pynet()
        times = [time.monotonic() - begin]
        fresh = cluster.scenes[0].run(name)
        cluster.scenes[0].remove(goes)
        host.stop_pynet()
        begin = time.monotonic()
        host.start_pynet()
        times.append(time.monotonic() - begin)
        shown = told(host, "diff")
        assert not any(shown.values()), shown
        host.docker("restart", "-t0", fresh.name)
        assert reaches(stays, fresh)
    print(f"ready after {times}")
    assert max(times) < READY
    assert eventually(lambda: in_agreement(cluster), SOON)
    pings.stop()
    assert pings.sent == len(pings.heard)
    assert reaches(prober, fresh)


def test_a_daemon_that_never_saw_the_store(make_lab: Callable[..., Lab]) -> None:
    """A first start without the store answers Docker, refuses, and joins when it can."""
    with ExitStack() as stack:
        lab = make_lab(1, etcd=1, serve=False)
        host = lab.hosts[0]
        lab.members[0].kill_etcd()
        begin = time.monotonic()
        host.start_pynet()
        assert time.monotonic() - begin < READY
        cluster = stack.enter_context(Cluster(lab))
        text = cluster.scenes[0].refused_network("--ipam-driver", "pynet")
        assert "the store has been away since" in text
        back(lab)
        assert eventually(lambda: status(host)["well"], SOON)
        cluster.run(cluster.network())


def test_etcd_is_wiped_under_running_containers(cluster: Cluster) -> None:
    """Nothing in use is removed, no packet is lost, and all is published again."""
    name = cluster.network()
    made = cluster.run(name)
    pings = [
        Pings(one, other.ip(), f"{one.name} to {other.name}")
        for one, other in ((made[0], made[1]), (made[1], made[2]))
    ]
    for each in pings:
        each.start()
    before = sorted(cluster.keys())
    for member in cluster.lab.members:
        member.kill_etcd()
        member.wipe()
    back(cluster.lab)
    assert eventually(lambda: kept(cluster, before), 30), (before, cluster.keys())
    assert eventually(lambda: in_agreement(cluster), 30)
    for each in pings:
        each.stop()
    assert [each.sent - len(each.heard) for each in pings] == [0, 0]
    fresh = cluster.run(name)
    assert reaches(fresh[0], fresh[2])


def kept(cluster: Cluster, before: list[str]) -> bool:
    """Tell whether the store has again what it had, blocks aside."""
    now = set(cluster.keys())
    return all(key in now for key in before if not key.startswith("blocks/"))


def test_etcd_is_restored_from_an_older_snapshot(cluster: Cluster) -> None:
    """
    What was made since the copy is published again, what was removed stays removed.

    The store then still has what is gone; its host takes that away.
    """
    name = cluster.network()
    removed = cluster.scenes[0].run(name)
    member = cluster.lab.members[0]
    copy = cluster.lab.hosts[0].directory / "copy.db"
    etcdctl(cluster.lab, "snapshot", "save", str(copy))
    later = cluster.run(name)
    cluster.scenes[0].remove(removed)
    # Its address is given back when its device is gone.
    freed = f"/{removed.ip()}"
    assert eventually(lambda: not [k for k in sorted(cluster.keys()) if freed in k])
    pings = Pings(later[0], later[1].ip(), "through the restoration")
    pings.start()
    before = sorted(cluster.keys())
    member.kill_etcd()
    member.wipe()
    data = member.directory / "etcd" / "data"
    restore(cluster.lab.hosts[0], copy, data, member)
    back(cluster.lab)
    assert eventually(lambda: kept(cluster, before), 30), (before, cluster.keys())
    pings.stop()
    assert pings.sent == len(pings.heard)
    fresh = cluster.run(name)
    assert reaches(fresh[0], fresh[1])
    copy.unlink()


def restore(host: Host, copy: Any, data: Any, member: Any) -> None:
    """Make a member's data of a copy."""
    peer = f"http://{member.cluster.peers[member.name]}:2380"
    host.exec(
        *("env", "ETCDCTL_API=3", "etcdctl", "snapshot", "restore", str(copy)),
        *("--name", member.name, "--data-dir", str(data), "--skip-hash-check"),
        *("--initial-cluster", f"{member.name}={peer}"),
        *("--initial-advertise-peer-urls", peer),
    )


def test_a_host_is_cut_off_past_its_lease(cluster: Cluster) -> None:
    """
    The others hide it only after its lease; it is back at once, and whole.

    Meanwhile containers of the host come and go, and reach each other.
    """
    name = cluster.network()
    prober, far, _ = cluster.run(name)
    second, etcd = far.host, cluster.lab.members[0]
    cluster.lab.cut(second.name, etcd.name)
    try:
        time.sleep(5)
        assert reaches(prober, far)
        begin = time.monotonic()
        assert eventually(lambda: states(prober.host)[second.name] != "alive", 20)
        assert time.monotonic() - begin > 3
        near = cluster.scenes[1].run(name)
        assert reaches(far, near)
        assert "no lease" in " ".join(status(second)["attention"])
    finally:
        cluster.lab.mend(second.name, etcd.name)
    assert eventually(lambda: in_agreement(cluster), 2 * SOON)
    assert reaches(prober, far)
    assert reaches(prober, near)


def test_a_host_is_cut_off_for_a_moment(cluster: Cluster) -> None:
    """Five seconds without etcd are noticed by nobody's containers."""
    name = cluster.network()
    prober, far, _ = cluster.run(name)
    pings = Pings(prober, far.ip(), "a host that is cut off from etcd")
    pings.start()
    cluster.lab.cut(far.host.name, cluster.lab.members[0].name)
    time.sleep(5)
    cluster.lab.mend(far.host.name, cluster.lab.members[0].name)
    assert eventually(lambda: in_agreement(cluster), SOON)
    pings.stop()
    assert pings.sent == len(pings.heard)


def test_a_daemon_that_is_stopped_past_its_lease(cluster: Cluster) -> None:
    """It takes its place again before it writes, and its containers are reached."""
    name = cluster.network()
    prober, far, _ = cluster.run(name)
    far.host.pause("pynet")
    try:
        hidden = eventually(
            lambda: states(prober.host)[far.host.name] != "alive", LEASE + TURNS
        )
    finally:
        far.host.resume("pynet")
    assert hidden
    again = cluster.scenes[1].run(name)
    assert eventually(lambda: in_agreement(cluster), SOON)
    assert reaches(prober, far)
    assert reaches(prober, again)


def states(host: Host) -> dict[str, str]:
    """Return the state of each host, as one of them sees it."""
    shown = told(host, "hosts")
    return {h["name"]: h["state"] for h in shown}


# Hosts that are given up.


def test_a_host_that_is_cut_off_for_long_and_given_up(
    make_lab: Callable[..., Lab],
) -> None:
    """
    An owner of blocks stops giving them out before others may take them.

    1. A host is cut off from the store; at first it starts containers by itself.
    2. Half of `dead_after` later it refuses. Another host gives it up; its blocks stay
       closed until it is dead. Then an address of them has another owner.
    3. The host is back.
    Result: what it has is known again, but for the address that is another's, which is
    reported until one of the two goes; a host that is alive is not given up.
    """
    lab = make_lab(2, etcd=1, pynet_args=("--dead-after", str(DEAD)))
    with Cluster(lab) as cluster:
        cluster.join(0, "blue", "--subnet", "10.98.1.0/28")
        cluster.join(1, "blue", "--subnet", "10.98.1.0/28")
        prober, stays = cluster.run("blue")
        first, second = lab.hosts
        refused = first.pynet("host", "rm", second.name, check=False)
        assert refused.returncode != 0
        assert "it is alive" in refused.stderr
        # Of so small a pool a host has few addresses in advance: it takes more at once.
        time.sleep(AHEAD)
        lab.cut(second.name, lab.members[0].name)
        begin = time.monotonic()
        assert eventually(lambda: status(second)["store"]["away"], 10)
        alone = cluster.scenes[1].run("blue")
        time.sleep(max(0.0, begin + DEAD / 2 + TURNS - time.monotonic()))
        assert "the store has been away since" in cluster.scenes[1].refused_run("blue")
        assert states(first)[second.name] != "alive"
        said = first.pynet("host", "rm", second.name).stdout
        assert "stay closed" in said
        assert second.name not in states(first)
        theirs = alone.ip()
        assert "gives out" in cluster.scenes[0].refused_run("blue", "--ip", theirs)
        blocks = ("get", "--prefix", "/pynet/v1/blocks/", "--print-value-only")
        owner = status(second)["host"]["id"]
        assert eventually(lambda: owner not in etcdctl(lab, *blocks).stdout, DEAD)
        cluster.scenes[0].run("blue", "--ip", theirs)
        lab.mend(second.name, lab.members[0].name)
        assert eventually(lambda: states(first).get(second.name) == "alive", 10)
        clash = f"address {theirs} of container"
        assert eventually(lambda: clash in " ".join(status(second)["attention"]), 10)
        assert reaches(prober, stays)
        cluster.scenes[1].remove(alone)
        assert eventually(lambda: status(second)["well"], 10)


def test_a_dead_host_is_cleared_away(make_lab: Callable[..., Lab]) -> None:
    """What a host had that has been away for `dead_after` is there for others."""
    lab = make_lab(2, etcd=1, pynet_args=("--dead-after", "16"))
    with Cluster(lab) as cluster:
        for number in range(2):
            cluster.join(number, "blue", "--subnet", "10.98.2.0/29")
        gone = cluster.scenes[1].run("blue", "--ip", "10.98.2.5")
        host = lab.hosts[1]
        host.power_cut()
        first = cluster.scenes[0]
        assert "10.98.2.5" in first.refused_run("blue", "--ip", "10.98.2.5")
        assert eventually(lambda: host.name not in states(lab.hosts[0]), 60)
        assert first.run("blue", "--ip", "10.98.2.5").ip() == "10.98.2.5"
        host.power_on()
        assert eventually(lambda: states(lab.hosts[0]).get(host.name) == "alive", 10)
        del gone
