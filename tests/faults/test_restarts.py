"""Traffic does not depend on the daemon: streams and pings through 50 restarts."""

import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster, census, left, nothing_is_left
from tests.dockerd.tools import eventually, told
from tests.faults.streams import Traffic

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

RESTARTS = 25
PORT = 7


@pytest.fixture
def cluster(make_lab: Callable[..., Lab]) -> Iterator[Cluster]:
    """Return two hosts on one etcd; after the test nothing is left."""
    with Cluster(make_lab(2, etcd=1)) as made:
        yield made
    assert nothing_is_left(made), left(made)


def restart(host: Host, seed: int) -> None:
    """Restart a host's daemon, killed or stopped by chance."""
    chance = random.Random(seed)
    for _ in range(RESTARTS):
        host.stop_pynet(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        host.start_pynet()


def is_as_planned(host: Host) -> bool:
    """Tell whether the kernel is what the daemon wants."""
    return not told(host, "diff")["lines"]


def test_nothing_is_lost_through_fifty_restarts(cluster: Cluster) -> None:
    """
    Pings every 10 ms and TCP streams notice nothing of 50 restarts, 25 at each end.

    1. An overlay network over two hosts and a bridge network on one; pings and streams
       between hosts in both families, within the host, out of it, and from outside to a
       published port.
    2. Both daemons are restarted 25 times, at once, killed or stopped by chance.

    Result: no ping is lost or comes twice, no stream is reset or differs in one byte;
    kernel and plans agree, and what pynet owns is what it owned.
    """
    near, _ = cluster.scenes
    name = cluster.network()
    one, other = cluster.run(name)
    bridge = near.network("-o", "pynet.mode=bridge", "--subnet=10.90.0.0/24")
    web, client = near.run(bridge, "-p", "8080:7"), near.run(bridge)
    before = [census(host) for host in cluster.lab.hosts]
    with Traffic() as traffic:
        for place in (other, web):
            traffic.serve(place, PORT)
        for label, address in (("4", other.ip(name)), ("6", other.ip6(name))):
            traffic.ping(one, address, f"ping overlay {label}")
            traffic.stream(one, address, PORT, f"stream overlay {label}")
        traffic.ping(other, one.ip(name), "ping overlay, back")
        traffic.ping(client, web.ip(), "ping bridge")
        traffic.ping(client, str(near.host.underlay.address4), "ping out")
        traffic.stream(client, web.ip(), PORT, "stream bridge")
        outside, published = near.outside, str(near.host.address4)
        traffic.stream(outside, published, 8080, "stream to a published port")
        with traffic.unharmed(least=500), ThreadPoolExecutor(2) as pool:
            list(pool.map(restart, cluster.lab.hosts, (1, 2)))
    for host, owned in zip(cluster.lab.hosts, before, strict=True):
        assert eventually(lambda host=host: is_as_planned(host), 10.0)
        assert sorted(map(str, census(host))) == sorted(map(str, owned))
