"""Hosts of a cluster: who may be one, and what happens when one goes or moves."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster
from tests.dockerd.tools import Server, eventually, told

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(120)]

PORT = 7
LEASE = 15.0
TURNS = 4.0
"""Seconds for an election, a watch and a kernel."""


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts and one etcd member."""
    return make_module_lab(2, etcd=1)


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts, with networks of the test's own."""
    with Cluster(lab) as made:
        yield made


def states(host: Host) -> dict[str, str]:
    """Return the state of each host, as one of them sees it."""
    shown = told(host, "hosts")
    return {h["name"]: h["state"] for h in shown}


def refusal(host: Host, *args: str, code: int = 2) -> str:
    """Start a second daemon's worth of settings on a host; return why it would not."""
    host.stop_pynet()
    try:
        argv = [*host.software.daemon, "--store", store(host), *args]
        done = host.exec(*argv, check=False, timeout=60)
        assert done.returncode == code
        return done.stderr.splitlines()[-1]
    finally:
        host.start_pynet()


def store(host: Host) -> str:
    """Return the address of the lab's store."""
    return f"etcd://{','.join(host.software.endpoints)}"


def test_two_hosts_of_one_name(lab: Lab) -> None:
    """A second host of one name is refused, with the setting that mends it."""
    first, second = lab.hosts
    name = next(n for n in states(first) if n != "" and n in names(first, here=True))
    why = refusal(second, "--host-name", name)
    assert f"is called {name!r}" in why
    assert "--host-name" in why


def names(host: Host, *, here: bool) -> set[str]:
    """Return the names of hosts that are, or are not, the one that is asked."""
    shown = told(host, "hosts")
    return {h["name"] for h in shown if h["here"] is here}


def test_one_tunnel_address_twice(lab: Lab) -> None:
    """A tunnel address another live host has is refused, with the remedy."""
    first, second = lab.hosts
    second.exec("ip", "addr", "add", f"{first.address4}/32", "dev", "lo")
    try:
        why = refusal(second, "--vtep", str(first.address4))
    finally:
        second.exec("ip", "addr", "del", f"{first.address4}/32", "dev", "lo")
    assert str(first.address4) in why
    assert first.name in why
    assert "--vtep" in why


@pytest.mark.parametrize(
    ("vtep", "code"),
    [("lo", 2), ("127.0.0.1", 2), ("fe80::1", 2), ("192.0.2.250", 1), ("eth9", 1)],
)
def test_addresses_that_cannot_be_a_tunnels_end(lab: Lab, vtep: str, code: int) -> None:
    """A loopback or link-local address is refused for good; others may be there later."""
    why = refusal(lab.hosts[1], "--vtep", vtep, code=code)
    assert vtep in why
    assert "--vtep" in why


def test_tunnels_of_two_kinds(lab: Lab) -> None:
    """An IPv6 tunnel address in a cluster with IPv4 ones is refused."""
    why = refusal(lab.hosts[1], "--vtep", str(lab.hosts[1].address6))
    assert "IPv4" in why


def test_another_port(lab: Lab) -> None:
    """A UDP port that is not the others' is refused."""
    why = refusal(lab.hosts[1], "--vxlan-port", "4790")
    assert "--vxlan-port 4789" in why


def test_a_cloned_identity(lab: Lab) -> None:
    """A second machine with a host's identity is refused and told what to remove."""
    first, second = lab.hosts
    second.stop_pynet()
    clone = second.directory / "clone"
    clone.mkdir()
    try:
        for file in (first.directory / "pynet").glob("local.db*"):
            (clone / file.name).write_bytes(file.read_bytes())
        argv = [*second.software.daemon, "--store", store(second)]
        argv += ["--state-dir", str(clone)]
        done = second.exec(*argv, check=False, timeout=90)
    finally:
        second.start_pynet()
    assert done.returncode == 2
    assert "local.db" in done.stderr.splitlines()[-1]


def test_a_power_cut(cluster: Cluster) -> None:
    """The entries of a host without power go with its lease, and come back whole."""
    name = cluster.network(six=False)
    prober, _ = cluster.run(name)
    second = cluster.lab.hosts[1]
    assert entries(prober.host) > 0
    second.power_cut()
    begin = time.monotonic()
    assert eventually(lambda: entries(prober.host) == 0, LEASE + TURNS)
    assert time.monotonic() - begin > LEASE / 2
    assert "gone" in states(prober.host).values()
    second.power_on()
    assert eventually(lambda: "gone" not in states(prober.host).values(), 10)
    again = cluster.scenes[1].run(name)
    with closing(Server(again, "again", PORT, "udp")):
        assert prober.udp(again.ip(name), PORT) is not None


def entries(host: Host) -> int:
    """Count the tunnel entries of a host."""
    shown = host.exec("ip", "netns", "exec", "pynet", "bridge", "fdb", "show")
    return sum(" dst " in line for line in shown.stdout.splitlines())


def test_a_clean_stop_hides_nothing(cluster: Cluster) -> None:
    """A daemon that was stopped leaves its containers in reach, past its lease."""
    name = cluster.network(six=False)
    prober, other = cluster.run(name)
    other.host.stop_pynet()
    try:
        time.sleep(LEASE + TURNS)
        assert entries(prober.host) > 0
        assert "resting" in states(prober.host).values()
        with closing(Server(other, "other", PORT, "udp")):
            assert prober.udp(other.ip(name), PORT) is not None
    finally:
        other.host.start_pynet()


def test_a_tunnel_address_that_changes(cluster: Cluster) -> None:
    """A host whose address changes is reached at the new one within five seconds."""
    name = cluster.network(six=False)
    prober, moved = cluster.run(name)
    host = moved.host
    with closing(Server(moved, "moved", PORT, "udp")):
        assert prober.udp(moved.ip(name), PORT) is not None
        exchange(host, str(host.address4), "192.0.2.77")
        try:
            reached = eventually(
                lambda: prober.udp(moved.ip(name), PORT, 0.3) is not None, 7.0
            )
            shown = told(prober.host, "hosts")
        finally:
            exchange(host, "192.0.2.77", str(host.address4))
    assert reached
    assert "192.0.2.77" in {h["vtep"] for h in shown}


def exchange(host: Host, old: str, new: str) -> None:
    """Give a host another address on the underlay."""
    host.exec("ip", "addr", "del", f"{old}/24", "dev", "eth0")
    host.exec("ip", "addr", "add", f"{new}/24", "dev", "eth0")
    host.exec("ip", "route", "replace", "default", "via", "192.0.2.1")
