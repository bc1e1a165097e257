"""Networks keep to themselves: those of pynet, and those of Docker, in both families."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations

import pytest

from tests.dockerd.tools import SILENCE, Container, Scene, api, eventually

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]

NETWORKS = {"red": "pynet", "teal": "pynet", "docked": "bridge"}
PORTS = (80, 81)
PUBLISHED = {"red": 8501, "teal": 8502, "docked": 8503, "bridge": 8504}


@pytest.fixture(scope="module")
def town(stage: Scene) -> dict[str, Container]:
    """Return a container in each of two networks of pynet's and two of Docker's."""
    for number, (name, driver) in enumerate(NETWORKS.items(), 1):
        pools = ("--subnet", f"10.63.{number}.0/24", "--subnet", f"fd63:{number}::/64")
        stage.network("--ipv6", *pools, driver=driver, name=name)
    bridge = f"br-{api(stage.host, 'GET', '/networks/docked')['Id'][:12]}"
    listed = ("nft", "list", "set", "inet", "pynet", "docker")
    assert eventually(lambda: bridge in stage.host.exec(*listed).stdout)
    made = {}
    for name in (*NETWORKS, "bridge"):
        made[name] = stage.run(name, "-p", f"{PUBLISHED[name]}:80")
        for kind in ("tcp", "udp"):
            stage.serve(made[name], *PORTS, kind=kind)
    return made


def addresses(container: Container) -> list[str]:
    """Return the addresses of a container of either family."""
    return [address for address in (container.ip(), container.ip6()) if address]


# With iptables alone, as dockerd 20.10 has it, Docker does not divide its own networks
# from each other in IPv6, and pynet has no say in that.
PAIRS = [
    (one, two)
    for one, two in permutations((*NETWORKS, "bridge"), 2)
    if "pynet" in (NETWORKS.get(one), NETWORKS.get(two))
]


def reached(client: Container, server: Container) -> list[str]:
    """Return by what a client reaches the server's own addresses."""
    calls: dict[str, Callable[[], object]] = {}
    for address in addresses(server):
        calls[f"ping {address}"] = partial(client.pings, address)
        for port in PORTS:
            calls[f"tcp {address} {port}"] = partial(client.tcp, address, port, SILENCE)
            calls[f"udp {address} {port}"] = partial(client.udp, address, port, SILENCE)
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = pool.map(lambda call: call(), calls.values())
        return [name for name, answer in zip(calls, answers, strict=True) if answer]


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
def test_networks_do_not_reach_each_other(
    town: dict[str, Container], one: str, two: str
) -> None:
    """By no port, published or not, and no ping does one reach the other's address."""
    assert reached(town[one], town[two]) == []


def test_a_network_and_the_host_reach_what_others_do_not(
    town: dict[str, Container], stage: Scene
) -> None:
    """What the other tests miss is there for a neighbour and for the host."""
    neighbour = stage.run("red")
    assert len(reached(neighbour, town["red"])) == 2 * (1 + 2 * len(PORTS))
    for server in town.values():
        for address in addresses(server):
            assert stage.place.tcp(address, 81) is not None
            assert stage.place.udp(address, 81) is not None


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
def test_networks_reach_what_others_publish(
    town: dict[str, Container], one: str, two: str
) -> None:
    """A published port is reached from every network by the host's address."""
    answer = town[one].tcp(str(town[two].host.address4), PUBLISHED[two])
    assert answer is not None
    assert answer.server == town[two].name


def test_the_other_way_round_is_closed_too(town: dict[str, Container]) -> None:
    """Who is answered cannot be called back: only the answers pass."""
    red, teal = town["red"], town["teal"]
    answer = red.tcp(str(red.host.address4), PUBLISHED["teal"])
    assert answer is not None
    assert answer.client == red.ip()
    assert teal.refused([(red.ip(), 80), (red.ip6(), 80)])


def test_a_container_in_both_networks_does_not_join_them(scene: Scene) -> None:
    """It reaches both; its neighbours do not reach each other."""
    first, second = scene.network(), scene.network()
    both, one, two = scene.run(first), scene.run(first), scene.run(second)
    scene.host.docker("network", "connect", second, both.name)
    both.look()
    scene.serve(one, 80)
    scene.serve(two, 80)
    assert both.tcp(one.ip(), 80) is not None
    assert both.tcp(two.ip(), 80) is not None
    assert one.refused([(two.ip(), 80)])
    assert two.refused([(one.ip(), 80)])


def test_no_network_reaches_another_through_its_gateway(
    town: dict[str, Container],
) -> None:
    """A route to the other subnet by the own gateway, or by the other, is no way in."""
    red, teal = town["red"], town["teal"]
    for target, gateway in ((teal.ip(), "10.63.1.1"), (teal.ip6(), "fd63:1::1")):
        red.net("ip", "route", "add", target, "via", gateway)
        try:
            assert red.refused([(target, port) for port in PORTS])
        finally:
            red.net("ip", "route", "del", target)


def test_nobody_outside_pretends_to_be_of_the_network(scene: Scene) -> None:
    """What comes in by the host's cable with a container's address is not let through."""
    network = scene.network("--subnet", "10.63.9.0/24")
    one, two = scene.run(network), scene.run(network)
    server = scene.serve(one, 80, kind="udp")
    host = scene.host
    host.underlay.exec("ip", "addr", "add", f"{two.ip()}/32", "dev", "lo")
    host.underlay.exec(
        *("ip", "route", "add", "10.63.9.0/24", "via", str(host.address4)),
        *("src", two.ip()),
    )
    try:
        assert scene.outside.refused([(server.ip(), 80)], "udp")
    finally:
        host.underlay.exec("ip", "route", "del", "10.63.9.0/24")
        host.underlay.exec("ip", "addr", "del", f"{two.ip()}/32", "dev", "lo")
    assert two.udp(server.ip(), 80) is not None
