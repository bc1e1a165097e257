"""Networks of mode bridge, as Docker's users see them."""

import socket

import pytest

from cnmdriver.lab.process import LabError
from tests.dockerd.tools import (
    PATIENCE,
    SILENCE,
    Container,
    Scene,
    Server,
    api,
    bridge_of,
    devices,
    eventually,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]

OWN_IPAM = ("--ipam-driver", "pynet")
IPAMS = pytest.mark.parametrize(
    "ipam", [(), OWN_IPAM], ids=["docker-ipam", "pynet-ipam"]
)


def dual(number: int) -> tuple[str, ...]:
    """Return the options of a network with both families."""
    return (
        *("--subnet", f"10.61.{number}.0/24"),
        *("--ipv6", "--subnet", f"fd61:{number}::/64"),
    )


def reach(client: Container, server: Container, address: str) -> str | None:
    """Return by what address a server in a container sees a client in another."""
    listening = Server(server, server.name, 80)
    try:
        answer = client.tcp(address, 80)
    finally:
        listening.close()
    return answer.client if answer else None


@IPAMS
def test_containers_ping_each_other_by_name_and_by_address(
    scene: Scene, ipam: tuple[str, ...]
) -> None:
    """Two containers of a network without any option reach each other."""
    network = scene.network(*ipam)
    one, two = scene.run(network), scene.run(network)
    assert one.pings_name(two.name)
    assert two.pings_name(one.name)
    assert one.pings(two.ip())
    assert reach(one, two, two.ip()) == one.ip()


@IPAMS
def test_a_dual_stack_network_carries_both_families(
    scene: Scene, ipam: tuple[str, ...]
) -> None:
    """With --ipv6 containers reach each other by either of their addresses."""
    network = scene.network(*dual(1), *ipam)
    one, two = scene.run(network), scene.run(network)
    assert two.ip6().startswith("fd61:1::")
    assert one.pings(two.ip())
    assert one.pings(two.ip6())
    assert reach(one, two, two.ip6()) == one.ip6()
    assert one.default_routes(6) == [
        "default via fd61:1::1 dev eth0 metric 1024 pref medium"
    ]


@IPAMS
def test_subnet_gateway_range_and_aux_addresses_are_kept_to(
    scene: Scene, ipam: tuple[str, ...]
) -> None:
    """Containers get addresses of the range, and none that is spoken for."""
    network = scene.network(
        *("--subnet", "10.61.2.0/24", "--gateway", "10.61.2.254"),
        *("--ip-range", "10.61.2.128/29", "--aux-address", "printer=10.61.2.129"),
        *ipam,
    )
    made = [scene.run(network) for _ in range(3)]
    given = {container.ip() for container in made}
    assert len(given) == 3
    assert given <= {f"10.61.2.{last}" for last in (128, 130, 131, 132, 133, 134, 135)}
    assert made[0].default_routes() == ["default via 10.61.2.254 dev eth0"]
    assert made[0].pings("10.61.2.254")
    assert made[0].pings(made[1].ip())
    shown = scene.host.exec("ip", "-o", "addr", "show", bridge_of(scene.host, network))
    assert "inet 10.61.2.254/24" in shown.stdout


@IPAMS
def test_several_subnets_make_one_network(scene: Scene, ipam: tuple[str, ...]) -> None:
    """Containers of different subnets of a network reach each other and the outside."""
    network = scene.network(
        "--subnet", "10.61.3.0/24", "--subnet", "10.61.4.0/24", *ipam
    )
    one = scene.run(network, "--ip", "10.61.3.7")
    two = scene.run(network, "--ip", "10.61.4.7")
    assert one.default_routes() == ["default via 10.61.3.1 dev eth0"]
    assert two.default_routes() == ["default via 10.61.4.1 dev eth0"]
    assert reach(one, two, "10.61.4.7") == "10.61.3.7"
    assert reach(two, one, "10.61.3.7") == "10.61.4.7"
    outside = str(scene.host.underlay.address4)
    assert one.pings(outside)
    assert two.pings(outside)


@IPAMS
def test_addresses_of_the_users_choice_are_given(
    scene: Scene, ipam: tuple[str, ...]
) -> None:
    """--ip and --ip6 are what the container has, and are free again after it."""
    network = scene.network(*dual(5), *ipam)
    chosen = ("--ip", "10.61.5.77", "--ip6", "fd61:5::77")
    one = scene.run(network, *chosen)
    assert (one.ip(), one.ip6()) == ("10.61.5.77", "fd61:5::77")
    two = scene.run(network)
    assert two.pings("10.61.5.77")
    assert two.pings("fd61:5::77")
    text = scene.refused_run(network, *chosen)
    assert "10.61.5.77" in text or "already in use" in text.lower()
    scene.remove(one)
    assert scene.run(network, *chosen).ip6() == "fd61:5::77"


def test_a_mac_address_of_the_users_choice_is_given(scene: Scene) -> None:
    """The MAC that Docker is told is the container's, and shown as such."""
    network = scene.network()
    name = "with-mac"
    body = {
        "Image": "busybox",
        "Cmd": ["sleep", "600"],
        "MacAddress": "02:00:5e:10:00:01",
        "HostConfig": {"NetworkMode": network},
    }
    api(scene.host, "POST", f"/containers/create?name={name}", body)
    scene.containers.append(name)
    api(scene.host, "POST", f"/containers/{name}/start")
    one, two = Container(host=scene.host, name=name).look(), scene.run(network)
    assert one.attachment(network)["MacAddress"] == "02:00:5e:10:00:01"
    assert devices(one)["eth0"]["address"] == "02:00:5e:10:00:01"
    assert two.pings(one.ip())


def test_the_mac_address_follows_from_the_address(scene: Scene) -> None:
    """A new container at an old address has its MAC, so that no cache is wrong."""
    network = scene.network("--subnet", "10.61.6.0/24")
    one, two = scene.run(network, "--ip", "10.61.6.9"), scene.run(network)
    assert two.pings("10.61.6.9")
    before = devices(one)["eth0"]["address"]
    scene.remove(one)
    three = scene.run(network, "--ip", "10.61.6.9")
    assert devices(three)["eth0"]["address"] == before
    assert three.attachment(network)["MacAddress"] == before
    assert two.pings("10.61.6.9")


def test_an_internal_network_has_no_way_out_or_in(scene: Scene) -> None:
    """Containers of an --internal network reach each other and nobody else."""
    host = scene.host
    network = scene.network("--internal", *dual(7))
    one, two = scene.run(network), scene.run(network, "-p", "7070:80")
    assert one.pings(two.ip())
    assert one.pings(two.ip6())
    assert one.pings_name(two.name)
    assert one.default_routes() == []
    assert one.default_routes(6) == []
    # Without a route nothing leaves; with one made by hand nothing passes either.
    one.net("ip", "route", "add", "default", "via", "10.61.7.1")
    one.net("ip", "route", "add", "default", "via", "fd61:7::1")
    assert not one.pings(str(host.underlay.address4))
    assert not one.pings(str(host.underlay.address6))
    scene.serve(two, 80)
    via = ("via", str(host.address4))
    host.underlay.exec("ip", "route", "add", "10.61.7.0/24", *via)
    try:
        targets = [(two.ip(), 80), (str(host.address4), 7070)]
        assert scene.outside.refused(targets)
    finally:
        host.underlay.exec("ip", "route", "del", "10.61.7.0/24", *via)


def test_a_running_container_is_connected_and_disconnected(scene: Scene) -> None:
    """A network comes and goes at a container that runs, its first one stays."""
    first, second = scene.network(), scene.network(*dual(8))
    one, two = scene.run(first), scene.run(second)
    assert not one.pings(two.ip())
    scene.host.docker("network", "connect", second, one.name)
    one.look()
    assert set(one.networks) == {first, second}
    assert one.pings_name(two.name)
    assert one.pings(two.ip6())
    assert reach(one, two, two.ip()) == one.ip(second)
    scene.host.docker("network", "disconnect", second, one.name)
    assert eventually(lambda: list(devices(one.look())) == ["lo", "eth0"])
    assert not one.pings(two.ip())
    scene.host.docker("network", "connect", second, one.name)
    assert one.look().pings(two.ip())


def test_a_stopped_container_is_connected_and_disconnected(scene: Scene) -> None:
    """What a stopped container is connected to, it has when it starts."""
    first, second = scene.network(), scene.network()
    one, two = scene.run(first), scene.run(second)
    host = scene.host
    host.docker("stop", "-t", "0", one.name)
    host.docker("network", "connect", second, one.name)
    host.docker("network", "disconnect", first, one.name)
    host.docker("start", one.name)
    assert one.look().networks == [second]
    assert one.pings_name(two.name)


def test_a_container_has_its_networks_after_a_restart(scene: Scene) -> None:
    """A `docker restart` keeps networks, names, published ports and the way out."""
    host = scene.host
    network = scene.network(*dual(9))
    one, two = scene.run(network, "-p", "7090:80"), scene.run(network)
    for _ in range(2):
        host.docker("restart", "-t", "0", one.name)
        one.look()
        assert two.pings_name(one.name)
        assert one.pings(two.ip6())
        assert one.pings(str(host.underlay.address4))
        listening = Server(one, one.name, 80)
        try:
            assert scene.outside.tcp(str(host.address4), 7090) is not None
        finally:
            listening.close()


def test_a_container_is_in_several_networks_at_once(scene: Scene) -> None:
    """It reaches the neighbours in each; without one, another gives the way out."""
    host = scene.host
    names = [scene.network() for _ in range(3)]
    one = scene.run(names[0])
    others = [scene.run(name) for name in names]
    for name in names[1:]:
        host.docker("network", "connect", name, one.name)
    one.look()
    for other in others:
        assert one.pings_name(other.name)
        assert reach(one, other, other.ip()) == one.ip(other.networks[0])
    outside = str(host.underlay.address4)
    for name in names[:2]:
        assert len(one.default_routes()) == 1
        assert one.pings(outside)
        host.docker("network", "disconnect", name, one.name)
        one.look()
    assert one.pings(outside)


def test_the_default_route_stays_when_another_network_comes_and_goes(
    scene: Scene,
) -> None:
    """Neither the container's nor the host's default route is touched."""
    host = scene.host

    def routes_of_the_host() -> list[str]:
        return [
            host.exec("ip", family, "route", "show", "default").stdout
            for family in ("-4", "-6")
        ]

    before = routes_of_the_host()
    first, second = (
        scene.network(*dual(10), name="aaa"),
        scene.network(*dual(11), name="zzz"),
    )
    one = scene.run(first)
    kept = one.default_routes()
    assert len(kept) == 1
    host.docker("network", "connect", second, one.name)
    assert one.default_routes() == kept
    host.docker("network", "disconnect", second, one.name)
    assert one.default_routes() == kept
    assert one.pings(str(host.underlay.address4))
    assert routes_of_the_host() == before


def test_two_containers_share_a_namespace(scene: Scene) -> None:
    """With --network container: both are one to the network."""
    network = scene.network()
    one, other = scene.run(network, "-p", "7110:81"), scene.run(network)
    name = "sharing"
    scene.containers.append(name)
    options = ("-d", "--name", name, f"--network=container:{one.name}")
    scene.host.docker("run", *options, "busybox", "httpd", "-f", "-p", "81")
    assert other.pings_name(one.name)
    ping = scene.host.container_exec(name, "ping", "-c1", "-W2", other.name)
    assert "1 packets received" in ping.stdout
    with scene.outside.open(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect((str(scene.host.address4), 7110))
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 404")


def test_the_outside_sees_the_hosts_address(scene: Scene) -> None:
    """What leaves the host has its address as the source, in both families."""
    host = scene.host
    one = scene.run(scene.network(*dual(12)))
    servers = [Server(scene.outside, "outside", 7120, kind) for kind in ("tcp", "udp")]
    try:
        for call in (one.tcp, one.udp):
            answer4 = call(str(host.underlay.address4), 7120)
            answer6 = call(str(host.underlay.address6), 7120)
            assert answer4 is not None
            assert answer6 is not None
            assert answer4.client == str(host.address4)
            assert answer6.client == str(host.address6)
    finally:
        for server in servers:
            server.close()


def test_the_host_and_its_containers_reach_each_other(scene: Scene) -> None:
    """The host reaches a container directly, and is reached at the gateway."""
    network = scene.network(*dual(13))
    one = scene.serve(scene.run(network), 80)
    for address, gateway in ((one.ip(), "10.61.13.1"), (one.ip6(), "fd61:13::1")):
        answer = scene.place.tcp(address, 80)
        assert answer is not None
        assert answer.client == gateway
        assert one.pings(gateway)


def test_a_network_with_containers_cannot_be_removed(scene: Scene) -> None:
    """Removing it is refused and changes nothing; without containers it works."""
    network = scene.network()
    one, two = scene.run(network), scene.run(network)
    with pytest.raises(LabError, match="has active endpoints"):
        scene.remove_network(network)
    assert one.pings(two.ip())
    bridge = bridge_of(scene.host, network)
    scene.remove(one, two)
    scene.remove_network(network)
    shown = scene.host.exec("ip", "link", "show", bridge, check=False)
    assert "does not exist" in shown.stderr


def test_addresses_are_used_again(scene: Scene) -> None:
    """In a /29 with five addresses for containers, twelve run one after the other."""
    network = scene.network("--subnet", "10.61.14.0/29", *OWN_IPAM)
    first = [scene.run(network) for _ in range(5)]
    assert len({container.ip() for container in first}) == 5
    text = scene.refused_run(network)
    assert "10.61.14.0/29" in text
    scene.remove(*first[:1])
    again = scene.run(network)
    assert again.ip() == first[0].ip()
    assert again.pings(first[1].ip())


def test_an_unpublished_port_is_for_the_network_and_the_host(scene: Scene) -> None:
    """Without -p the outside gets no answer from a port that listens."""
    one = scene.serve(scene.run(scene.network()), 80)
    assert scene.outside.tcp(str(scene.host.address4), 80, SILENCE) is None
    assert scene.place.tcp(one.ip(), 80) is not None
