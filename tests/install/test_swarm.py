"""A swarm of two nodes whose network is the managed plugin's, with scope global."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.plan.options import VNIS
from tests.dockerd.cluster import KEPT, census, etcdctl, pairs
from tests.dockerd.tools import Container, eventually
from tests.install.plugins import NAME, create, enable, load

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
BLUE = "blue"
PATIENCE = 120.0
"""Seconds in which a swarm does what it was told."""


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab], image: Path) -> Lab:
    """Return two hosts with the plugin, of which the first manages a swarm."""
    lab = make_module_lab(2, etcd=1, serve=False)
    load(lab, image)
    manager, worker = lab.hosts
    with ThreadPoolExecutor() as pool:
        list(pool.map(create, lab.hosts))
        list(pool.map(lambda host: enable(host, "PYNET_SCOPE=global"), lab.hosts))
    manager.docker("swarm", "init", f"--advertise-addr={manager.address4}")
    token = manager.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    worker.docker("swarm", "join", f"--token={token}", str(manager.address4))
    return lab


@pytest.fixture
def network(lab: Lab) -> Iterator[str]:
    """Return an attachable network; after the test nothing is left of it anywhere."""
    manager = lab.hosts[0]
    words = ("--attachable", "--subnet=10.140.0.0/24", "-d", NAME)
    manager.docker("network", "create", *words, BLUE)
    yield BLUE
    for host in lab.hosts:
        names = host.docker("ps", "-aq").stdout.split()
        if names:
            host.docker("rm", "-f", *names, check=False)
    manager.docker("network", "rm", BLUE)
    assert eventually(lambda: not left(lab), PATIENCE), left(lab)


def left(lab: Lab) -> list[object]:
    """Return what any host or the store has of a network."""
    owned = [thing for host in lab.hosts for thing in census(host)]
    found = etcdctl(lab, "get", "--prefix", "/pynet/v1/", "--keys-only").stdout
    keys = [line.removeprefix("/pynet/v1/") for line in found.split()]
    return [*owned, *(key for key in keys if not key.startswith(KEPT))]


def tasks(host: Host, service: str) -> list[Container]:
    """Return the containers that a service has on a host."""
    shown = host.docker("ps", "-q", "--filter", f"name={service}").stdout.split()
    return [Container(host=host, name=name).look() for name in shown]


def test_a_network_of_a_swarm(lab: Lab, network: str) -> None:
    """
    A network that the manager makes is one on all nodes, with Docker's own id.

    1. The network is created on the manager: Docker shows the VNI that pynet chose.
    2. A container on each node; then one more, on the worker, with an address of the
       user's.
    3. A service of four replicas, two on each node; it is scaled to two, and removed.

    Result: containers reach each other, and replicas each other too, by address and by
    the service's name; both hosts have the network under the same id and VNI.
    """
    attach(lab, network)
    serve(lab, network)


def attach(lab: Lab, network: str) -> None:
    """Let containers of `docker run` on both nodes reach each other."""
    manager, worker = lab.hosts
    shown = ("network", "inspect", "-f", f'{{{{.ID}}}} {{{{index .Options "{VNIS}"}}}}')

    def words(host: Host) -> list[str]:
        return host.docker(*shown, network).stdout.split()

    # The manager asks for it after it has answered the command.
    assert eventually(lambda: len(words(manager)) == 2, PATIENCE)
    identity, vni = words(manager)
    assert len(identity) == 25
    boxes = [run(host, network) for host in lab.hosts]
    boxes.append(run(worker, network, "--ip=10.140.0.77"))
    assert boxes[-1].ip() == "10.140.0.77"
    for one, other in pairs(boxes):
        assert one.pings(other.ip()), (one.host.name, other.host.name)
    for host in lab.hosts:
        # What Docker does not list is taken for removed after some time.
        assert eventually(lambda host=host: named(host) == running(host), 20.0)
        links = host.exec("ip", "-n", "pynet", "-d", "link", "show", "type", "vxlan")
        assert f"vxlan id {vni} " in links.stdout
        assert words(host) == [identity, vni]


def serve(lab: Lab, network: str) -> None:
    """Let replicas of a service on both nodes reach each other, and go with it."""
    manager = lab.hosts[0]
    words = ("--endpoint-mode=dnsrr", "--no-resolve-image", "--detach")
    stop = ("--stop-signal=SIGKILL", f"--network={network}")
    manager.docker(
        *("service", "create", "--name=web", "--replicas=4"),
        *words,
        *stop,
        *("busybox", "sleep", "600"),
    )

    def replicas(number: int) -> bool:
        return sum(len(tasks(host, "web")) for host in lab.hosts) == number

    assert eventually(lambda: replicas(4), PATIENCE), said(manager)
    boxes = [box for host in lab.hosts for box in tasks(host, "web")]
    assert [len(tasks(host, "web")) for host in lab.hosts] == [2, 2]
    for one, other in pairs(boxes):
        assert one.pings(other.ip()), (one.host.name, other.host.name)
    assert all(box.pings_name("web") for box in boxes)
    manager.docker("service", "scale", "--detach", "web=2")
    assert eventually(lambda: replicas(2), PATIENCE), said(manager)
    manager.docker("service", "rm", "web")
    assert eventually(lambda: replicas(0), PATIENCE), said(manager)


def named(host: Host) -> set[str]:
    """Return the names of the endpoints that pynet has on a host, as Docker lists them."""
    shown = json.loads(host.pynet("endpoint", "ls", "--json").stdout)
    return {endpoint["name"] for endpoint in shown}


def running(host: Host) -> set[str]:
    """Return the names of a host's containers."""
    return set(host.docker("ps", "--format={{.Names}}").stdout.split())


def run(host: Host, network: str, *options: str) -> Container:
    """Start a container that only sleeps."""
    words = ("run", "-d", f"--network={network}", *options, "busybox", "sleep", "600")
    name = host.docker(*words).stdout.strip()
    return Container(host=host, name=name).look()


def said(manager: Host) -> str:
    """Return what the manager says of the tasks."""
    return manager.docker("service", "ps", "--no-trunc", "web", check=False).stdout
