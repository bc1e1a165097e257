"""`--ipam-driver pynet`, under pynet's networks and under Docker's own bridges."""

import json
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import Scene, api, inspected, left_of_pynet

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]

GRACE = 1
IPAM = "--ipam-driver=pynet"


@pytest.fixture(scope="module")
def home(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host whose pynet is quick to give back what nobody uses."""
    lab = make_module_lab(pynet_args=(f"--grace={GRACE}", "--audit=0.5"))
    return lab.hosts[0]


@pytest.fixture
def scene(home: Host) -> Iterator[Scene]:
    """Return a scene; after it no pool, address or device is left."""
    with Scene(home) as made:
        yield made
    assert pools(home) == []
    assert left_of_pynet(home) == []


def pools(host: Host) -> list[dict[str, Any]]:
    """Return the pools with the addresses taken of them."""
    found: list[dict[str, Any]] = json.loads(host.pynet("ipam", "ls", "--json").stdout)
    return found


def taken(host: Host, pool: str) -> set[str]:
    """Return the addresses that are taken of a pool."""
    found = next(p for p in pools(host) if p["pool"] == pool)
    return {address["address"] for address in found["addresses"]}


def milliseconds(host: Host, outcome: str) -> float:
    """Return how long pynet took for its last call with this outcome."""
    calls = [json.loads(line) for line in host.log("pynet").splitlines()]
    return float([c["ms"] for c in calls if c.get("outcome") == outcome][-1])


def ipam_of(host: Host, network: str) -> list[dict[str, str]]:
    """Return the subnets that Docker shows of a network."""
    found: list[dict[str, str]] = api(host, "GET", f"/networks/{network}")["IPAM"][
        "Config"
    ]
    return found


def test_without_subnet_each_network_gets_a_pool_of_the_defaults(scene: Scene) -> None:
    """Pools are drawn from 10.200.0.0/16, one for each network, lowest free first."""
    first, second = scene.network(IPAM), scene.network(IPAM)
    shown = [ipam_of(scene.host, name)[0] for name in (first, second)]
    assert [s["Subnet"] for s in shown] == ["10.200.0.0/24", "10.200.1.0/24"]
    assert shown[0]["Gateway"].partition("/")[0] == "10.200.0.1"
    one, two = scene.run(first), scene.run(second)
    assert (one.ip(), two.ip()) == ("10.200.0.2", "10.200.1.2")
    assert one.pings("10.200.0.1")
    scene.remove(one)
    scene.remove_network(first)
    third = scene.network(IPAM)
    assert ipam_of(scene.host, third)[0]["Subnet"] == "10.200.0.0/24"


def test_subnet_range_gateway_and_aux_address_are_kept(scene: Scene) -> None:
    """Addresses come from the range; gateway and aux addresses are given to nobody."""
    network = scene.network(
        IPAM,
        "--subnet=10.61.0.0/24",
        "--ip-range=10.61.0.128/25",
        "--gateway=10.61.0.129",
        "--aux-address=router=10.61.0.128",
        "--aux-address=printer=10.61.0.9",
    )
    one, two = scene.run(network), scene.run(network)
    assert (one.ip(), two.ip()) == ("10.61.0.130", "10.61.0.131")
    assert one.default_routes() == ["default via 10.61.0.129 dev eth0"]
    assert one.pings(two.ip())
    assert "10.61.0.9" in scene.refused_run(network, "--ip=10.61.0.9")
    assert "10.61.0.129" in scene.refused_run(network, "--ip=10.61.0.129")
    outside_the_range = scene.run(network, "--ip=10.61.0.10")
    assert one.pings(outside_the_range.ip())
    time.sleep(GRACE + 1.0)
    held = {"10.61.0.9", "10.61.0.128", "10.61.0.129"}
    assert held < taken(scene.host, "10.61.0.0/24")


def test_ipv6_with_a_subnet(scene: Scene) -> None:
    """With --ipv6 and a subnet of each family a container has both addresses."""
    network = scene.network(
        IPAM, "--ipv6", "--subnet=10.62.0.0/24", "--subnet=fd00:62::/64"
    )
    one = scene.run(network)
    two = scene.run(network, "--ip=10.62.0.77", "--ip6=fd00:62::77")
    assert (one.ip(), one.ip6()) == ("10.62.0.2", "fd00:62::2")
    assert (two.ip(), two.ip6()) == ("10.62.0.77", "fd00:62::77")
    assert one.pings("10.62.0.77")
    assert one.pings("fd00:62::77")


def test_ipv6_without_a_subnet(scene: Scene) -> None:
    """With --ipv6 alone the IPv6 pool is drawn from pynet's ULA prefix."""
    network = scene.network(IPAM, "--ipv6")
    one, two = scene.run(network), scene.run(network)
    assert ip_address(one.ip6()) in ip_network("fd70:796e:6574::/48")
    assert one.pings(two.ip6())


def test_static_address_is_held_and_named(scene: Scene) -> None:
    """An address asked for is given once; a second wish is told who has it."""
    network = scene.network(IPAM, "--subnet=10.63.0.0/24")
    fixed = scene.run(network, "--ip=10.63.0.2", name="fixed")
    assert scene.run(network).ip() == "10.63.0.3"
    error = scene.refused_run(network, "--ip=10.63.0.2")
    assert "address 10.63.0.2 of pool 10.63.0.0/24 is taken by fixed" in error
    scene.remove(fixed)
    assert scene.run(network, "--ip=10.63.0.2").ip() == "10.63.0.2"


def test_overlap_is_refused_with_the_network_in_the_way(scene: Scene) -> None:
    """A pool that overlaps another network's is refused, and the network is named."""
    inspected(scene.host, scene.network(IPAM, "--subnet=10.64.0.0/16", name="wide"))
    error = scene.refused_network(IPAM, "--subnet=10.64.7.0/24")
    assert "pool 10.64.7.0/24 overlaps 10.64.0.0/16 of network wide" in error
    error = scene.refused_network(IPAM, "--subnet=10.64.0.0/16")
    assert "network wide" in error


def test_overlap_is_refused_with_the_route_in_the_way(scene: Scene) -> None:
    """A pool that overlaps a network the host is on is refused, and that is named."""
    error = scene.refused_network(IPAM, "--subnet=192.0.2.128/25")
    expected = "pool 192.0.2.128/25 overlaps this host's route 192.0.2.0/24 dev eth0"
    assert expected in error


def test_exhaustion_is_told_at_once_and_ends_with_a_release(scene: Scene) -> None:
    """
    A full pool is refused with its name and counts, and one release is enough.

    1. A /29 has six addresses; the gateway and five containers take them.
    2. The next container is refused in less than a second.
    3. One container is removed.

    Result: the next container gets its address.
    """
    network = scene.network(IPAM, "--subnet=10.65.0.0/29")
    five = [scene.run(network) for _ in range(5)]
    assert [c.ip() for c in five] == [f"10.65.0.{n}" for n in range(2, 7)]
    error = scene.refused_run(network)
    assert milliseconds(scene.host, "Exhausted") < 1000
    assert "pool 10.65.0.0/29 has no free address: 6 taken of 6" in error
    scene.remove(five[2])
    assert scene.run(network).ip() == "10.65.0.4"


def test_a_pool_of_two_addresses_works(scene: Scene) -> None:
    """A /31 has room for the gateway and one container, and the container gets out."""
    network = scene.network(IPAM, "--subnet=10.66.0.0/31")
    only = scene.run(network)
    assert only.ip() == "10.66.0.1"
    assert only.default_routes() == ["default via 10.66.0.0 dev eth0"]
    assert only.pings("192.0.2.1")
    assert "2 taken of 2" in scene.refused_run(network)


def test_several_subnets_on_one_network(scene: Scene) -> None:
    """Docker takes addresses of one subnet, or of the one that --ip lies in."""
    network = scene.network(IPAM, "--subnet=10.67.0.0/24", "--subnet=10.68.0.0/24")
    first = scene.run(network)
    second = scene.run(network, "--ip=10.68.0.7")
    # Docker's client sends the subnets in random order, and the first counts.
    nets = [ip_network("10.67.0.0/24"), ip_network("10.68.0.0/24")]
    assert any(ip_address(first.ip()) in net for net in nets)
    assert second.ip() == "10.68.0.7"
    assert second.default_routes() == ["default via 10.68.0.1 dev eth0"]
    assert first.pings("10.68.0.7")
    assert second.pings("192.0.2.1")


def test_under_dockers_bridge_no_address_is_given_twice(scene: Scene) -> None:
    """
    Under a driver of Docker's own an address is held until Docker releases it.

    1. A bridge network of Docker's with pynet's IPAM, three containers.
    2. The grace time passes, twice over; no call of a driver ever binds an address.
    3. Three more containers; one of the first is stopped and started.

    Result: all have addresses of their own and reach each other; removed, all addresses
    and the pool are free again.
    """
    host = scene.host
    network = scene.network(IPAM, "--subnet=10.69.0.0/24", driver="bridge")
    quick = "--stop-signal=SIGKILL"
    old = [scene.run(network, quick) for _ in range(3)]
    time.sleep(2 * GRACE + 1.0)
    new = [scene.run(network, quick) for _ in range(3)]
    host.docker("restart", old[0].name)
    both = [container.look() for container in (*old, *new)]
    addresses = {container.ip() for container in both}
    assert len(addresses) == 6
    assert taken(host, "10.69.0.0/24") == {"10.69.0.1", *addresses}
    assert all(new[0].pings(address) for address in addresses)
    scene.remove(*both)
    assert taken(host, "10.69.0.0/24") == {"10.69.0.1"}


def test_under_dockers_bridge_pools_are_pynets(scene: Scene) -> None:
    """Networks of Docker's draw from the same pools, and overlaps are refused too."""
    mine = scene.network(IPAM)
    theirs = scene.network(IPAM, driver="bridge")
    shown = [ipam_of(scene.host, name)[0]["Subnet"] for name in (mine, theirs)]
    assert shown == ["10.200.0.0/24", "10.200.1.0/24"]
    error = scene.refused_network(IPAM, "--subnet=10.200.1.0/25")
    assert "overlaps 10.200.1.0/24" in error
