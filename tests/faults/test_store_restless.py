"""
The store is there, but not as it should be: leaders die, history goes, slow, or full.

On real dockerds and real etcds. Containers are attached and detached all the time, and
none of it may fail; in the end every host and the store agree, and nothing is left.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from cnmdriver.lab.etcd import Member
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster, nothing_is_left
from tests.dockerd.tools import Container, api, eventually, program
from tests.faults.test_store_away import AHEAD, SOON, in_agreement, reaches, status

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(300),
]

EVERY = 10.0
"""Seconds between two deaths of a leader."""
DEATHS = 3
DELAY = 1.0
"""Seconds that a slow store takes to answer."""
SLOWLY = 40.0
"""Seconds for some ten of its answers, and for what is tried again meanwhile."""
QUOTA = 4 << 20
"""Bytes that etcd may have on its disk before it is full."""
PORT = 4379


def settled(cluster: Cluster, timeout: float = SOON) -> None:
    """Wait until all agree; then remove everything."""
    agreed(cluster, timeout)
    cluster.stack.close()
    assert nothing_is_left(cluster)


def agreed(cluster: Cluster, timeout: float) -> None:
    """Wait until all agree."""
    assert eventually(lambda: in_agreement(cluster), timeout), [
        status(host)["attention"] for host in cluster.lab.hosts
    ]


def attach(network: str, container: Container) -> str:
    """Connect a container and return its address there."""
    path = f"/networks/{network}/connect"
    api(container.host, "POST", path, {"Container": container.name})
    return container.look().ip(network)


def detach(network: str, container: Container) -> None:
    """Disconnect a container."""
    path = f"/networks/{network}/disconnect"
    api(container.host, "POST", path, {"Container": container.name})


def come_and_go(
    network: str, container: Container, over: Callable[[], bool]
) -> list[tuple[float, float, str]]:
    """Attach and detach until it is over; return what it had, from when till when."""
    had = []
    while not over():
        begin = time.monotonic()
        ip = attach(network, container)
        detach(network, container)
        had.append((begin, time.monotonic(), ip))
    return had


def disjoint(one: list[tuple[float, float, str]], other: list[object]) -> bool:
    """Tell whether no address was two containers' at a time."""
    return not any(
        mine[2] == theirs[2] and mine[0] < theirs[1] and theirs[0] < mine[1]
        for mine in one
        for theirs in other
    )


def ask(member: Member, *words: str) -> str:
    """Ask etcd's own client on one of its machines."""
    return member.exec("etcdctl", *words, check=False).stdout


def leader(members: list[Member]) -> Member | None:
    """Return the member that leads, None if there is none now."""
    for member in members:
        with_quorum = ask(member, "endpoint", "status", "-w", "json")
        if with_quorum.strip():
            state = json.loads(with_quorum)[0]["Status"]
            if state["header"]["member_id"] == state.get("leader"):
                return member
    return None


@contextmanager
def compacting(member: Member) -> Iterator[list[int]]:
    """Take the store's history away each second; yield the revisions it was at."""
    over, done = threading.Event(), []

    def work() -> None:
        while not over.wait(1.0):
            shown = ask(member, "get", "x", "-w", "json")
            if shown.strip():
                revision = json.loads(shown)["header"]["revision"]
                ask(member, "compaction", str(revision))
                done.append(revision)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def test_leaders_die_and_history_goes(make_lab: Callable[..., Lab]) -> None:
    """
    Nothing fails while etcd's leader is killed every 10 s and compacted each second.

    1. Two hosts attach and detach containers all the time.
    2. Three times the leader is killed, and is there again before the next one's turn.
    Result: no call failed, no address was two containers' at a time, all agree.
    """
    lab = make_lab(2, etcd=3)
    with Cluster(lab) as cluster:
        name = cluster.network()
        extras = [scene.run("bridge") for scene in cluster.scenes]
        over = threading.Event()
        with compacting(lab.hosts[0]) as revisions, ThreadPoolExecutor(2) as pool:
            lives = [pool.submit(come_and_go, name, c, over.is_set) for c in extras]
            try:
                for _ in range(DEATHS):
                    assert eventually(lambda: leader(lab.members), 20.0)
                    chosen = leader(lab.members) or lab.members[0]
                    chosen.kill_etcd()
                    time.sleep(EVERY / 2)
                    chosen.start_etcd()
                    time.sleep(EVERY / 2)
            finally:
                over.set()
            one, other = (life.result() for life in lives)
        assert len(revisions) > DEATHS
        assert min(len(one), len(other)) > DEATHS
        assert disjoint(one, other)
        settled(cluster)


def test_a_slow_store(make_lab: Callable[..., Lab]) -> None:
    """
    With a second's delay on each of etcd's answers everything works, and no slower.

    Result: networks are made, containers attached and reached by the other host; the
    hosts do not take the store for away.
    """
    lab = make_lab(
        2, etcd=1, serve=False, pynet_args=(f"--store=etcd://127.0.0.1:{PORT}",)
    )
    target = str(lab.members[0].address4)
    module = (sys.executable, "-m", "tests.faults.slow_proxy")
    with ExitStack() as stack:
        for host in lab.hosts:
            words = (*module, str(PORT), target, "2379", str(DELAY))
            proxy = stack.enter_context(program(host, *words))
            assert proxy.stdout is not None
            assert proxy.stdout.readline() == "ready\n"
            host.start_pynet()
        cluster = stack.enter_context(Cluster(lab))
        agreed(cluster, SLOWLY)
        name = cluster.network()
        one, other = cluster.run(name)
        assert reaches(one, other)
        extra = cluster.scenes[0].run(name)
        cluster.scenes[0].remove(extra)
        assert not any(status(host)["store"]["away"] for host in lab.hosts)
        settled(cluster, SLOWLY)


def test_a_full_store(make_lab: Callable[..., Lab]) -> None:
    """
    While etcd has no room left containers come and go; a new network is refused.

    1. Something else fills the store until etcd takes nothing any more.
    2. Containers are attached, detached, removed; a network is asked for.
    3. There is room again.
    Result: only the network is refused, saying why; then all agree.
    """
    lab = make_lab(2, etcd=1, etcd_args=(f"--quota-backend-bytes={QUOTA}",))
    member = lab.members[0]
    with Cluster(lab) as cluster:
        name = cluster.network()
        first, second = cluster.run(name)
        extra = cluster.scenes[0].run("bridge")
        time.sleep(AHEAD)
        blob = "x" * (QUOTA // 16)
        for number in range(64):
            done = member.exec(
                *("etcdctl", "put", f"junk{number}"), input=blob, check=False
            )
            if "space exceeded" in done.stderr:
                break
        assert "NOSPACE" in ask(member, "alarm", "list")
        for _ in range(5):
            attach(name, extra)
            detach(name, extra)
        attach(name, extra)
        assert reaches(first, second)
        cluster.scenes[1].remove(second)
        text = cluster.scenes[0].refused_network("--ipam-driver", "pynet")
        assert "etcd is full" in text
        ask(member, "del", "--prefix", "junk")
        revision = json.loads(ask(member, "get", "x", "-w", "json"))["header"]
        ask(member, "compaction", str(revision["revision"]))
        ask(member, "defrag")
        ask(member, "alarm", "disarm")
        agreed(cluster, SOON)
        far = cluster.scenes[1].run(name)
        assert reaches(far, first)
        settled(cluster)
