"""What `docker network create -o` changes, under pynet's names and under Docker's."""

import re

import pytest

from tests.dockerd.tools import (
    Scene,
    Server,
    api,
    bridge_of,
    devices,
    inspected,
    published,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]

DOCKER = "com.docker.network."
LAN4, LAN6, OUT4, OUT6 = "192.0.2.11", "2001:db8:1::11", "192.0.2.1", "2001:db8:1::1"


def dual(number: int) -> tuple[str, ...]:
    """Return the options of a network with both families."""
    return (
        *("--subnet", f"10.64.{number}.0/24"),
        *("--ipv6", "--subnet", f"fd64:{number}::/64"),
    )


def both(name: str, dockers: str) -> pytest.MarkDecorator:
    """Run a test with pynet's name of an option and with Docker's."""
    return pytest.mark.parametrize("option", [name, dockers], ids=["pynet", "docker"])


@both("pynet.mtu", DOCKER + "driver.mtu")
def test_mtu(scene: Scene, option: str) -> None:
    """Bridge and containers have the MTU, and packets of that size pass, none bigger."""
    network = scene.network("-o", f"{option}=1400", *dual(1))
    one, two = scene.run(network), scene.run(network)
    assert devices(one)["eth0"]["mtu"] == 1400
    bridge = scene.host.exec("ip", "link", "show", bridge_of(scene.host, network))
    assert " mtu 1400 " in bridge.stdout
    ping = ("ping", "-c1", "-W1", "-M", "do", two.ip())
    assert one.net(*ping, "-s", "1372", check=False).returncode == 0
    assert one.net(*ping, "-s", "1373", check=False).returncode != 0


def test_a_small_mtu_is_for_ipv4_alone(scene: Scene) -> None:
    """68 bytes are enough for IPv4; IPv6 wants 1280, and the refusal says so."""
    network = scene.network("-o", "pynet.mtu=576")
    one, two = scene.run(network), scene.run(network)
    assert one.pings(two.ip())
    assert "1280" in scene.refused_network("-o", "pynet.mtu=576", *dual(2))


@both("pynet.bridge", DOCKER + "bridge.name")
def test_bridge_name(scene: Scene, option: str) -> None:
    """The bridge is called as wished, works like any other, and goes with the network."""
    network = scene.network("-o", f"{option}=br-mine", *dual(3))
    assert bridge_of(scene.host, network) == "br-mine"
    one, two = scene.run(network, "-p", "8601:80"), scene.run(network)
    scene.serve(one, 80)
    assert two.pings_name(one.name)
    assert two.pings(str(scene.host.underlay.address4))
    assert scene.outside.tcp(LAN4, 8601) is not None
    text = scene.refused_network("-o", f"{option}=br-mine")
    assert f"br-mine is network {network}'s" in text
    scene.remove(one, two)
    scene.remove_network(network)
    assert scene.host.exec("ip", "link", "show", "br-mine", check=False).returncode != 0


def test_a_device_of_the_hosts_is_no_bridge(scene: Scene) -> None:
    """A device that is there already is not taken, and stays as it is."""
    host = scene.host
    host.exec("ip", "link", "add", "mine", "type", "bridge")
    try:
        before = host.exec("ip", "-d", "link", "show", "mine").stdout
        text = scene.refused_network("-o", "pynet.bridge=mine")
        assert "device mine is needed" in text
        assert host.exec("ip", "-d", "link", "show", "mine").stdout == before
    finally:
        host.exec("ip", "link", "del", "mine")


@both("pynet.icc=false", DOCKER + "bridge.enable_icc=false")
def test_inter_container_traffic_off(scene: Scene, option: str) -> None:
    """Containers reach the gateway and the outside, each other only by published ports."""
    network = scene.network("-o", option, *dual(4))
    one = scene.serve(
        scene.run(network, *("-p", "8602:80", "-p", "8602:80/udp")), 80, 81
    )
    two = scene.serve(scene.run(network), 80)
    for address in (one.ip(), one.ip6()):
        assert two.refused([(address, 80), (address, 81)])
        # Nor by the gateway, with a route that leads there.
        gateway = "10.64.4.1" if "." in address else "fd64:4::1"
        two.net("ip", "route", "add", address, "via", gateway)
        assert two.refused([(address, 80), (address, 81)])
        assert two.pings(gateway)
    assert one.refused([(two.ip(), 80), (two.ip6(), 80)])
    assert two.pings(str(scene.host.underlay.address4))
    assert two.pings(str(scene.host.underlay.address6))
    scene.serve(one, 80, kind="udp")
    for client, address in (
        (two, LAN4),
        (two, LAN6),
        (one, LAN4),
        (one, LAN6),
        (scene.outside, LAN4),
        (scene.outside, LAN6),
        (scene.place, "127.0.0.1"),
    ):
        assert client.tcp(address, 8602) is not None
        assert client.udp(address, 8602) is not None


@both("pynet.masquerade=false", DOCKER + "bridge.enable_ip_masquerade=false")
def test_masquerade_off(scene: Scene, option: str) -> None:
    """The outside sees the containers' own addresses; published ports work."""
    network = scene.network("-o", option, *dual(5))
    one = scene.serve(scene.run(network, "-p", "8603:80"), 80)
    host = scene.host
    routes = [("10.64.5.0/24", LAN4), ("fd64:5::/64", LAN6)]
    for subnet, gateway in routes:
        host.underlay.exec("ip", "route", "add", subnet, "via", gateway)
    server = Server(scene.outside, "outside", 8604)
    try:
        for address, own in ((OUT4, one.ip()), (OUT6, one.ip6())):
            answer = one.tcp(address, 8604)
            assert answer is not None
            assert answer.client == own
        assert scene.outside.tcp(LAN4, 8603) is not None
        assert scene.place.tcp("127.0.0.1", 8603) is not None
        assert one.tcp(LAN4, 8603) is not None
    finally:
        server.close()
        for subnet, _ in routes:
            host.underlay.exec("ip", "route", "del", subnet)


@both("pynet.host_binding", DOCKER + "bridge.host_binding_ipv4")
def test_host_binding(scene: Scene, option: str) -> None:
    """Ports without a host address are published on this one; others as they say."""
    network = scene.network("-o", f"{option}=127.0.0.1")
    one = scene.run(network, "-p", "8605:80", "-p", f"{LAN4}:8606:80")
    scene.serve(one, 80)
    assert scene.place.tcp("127.0.0.1", 8605) is not None
    assert scene.outside.refused([(LAN4, 8605), (LAN6, 8605)])
    assert scene.place.refused([(LAN4, 8605)])
    assert scene.outside.tcp(LAN4, 8606) is not None


def test_host_binding_of_ipv6(scene: Scene) -> None:
    """The address may be one of IPv6."""
    network = scene.network("-o", f"pynet.host_binding={LAN6}", *dual(6))
    one = scene.serve(scene.run(network, "-p", "8607:80"), 80)
    assert f"{LAN6} . tcp . 8607 : {one.ip6()} . 80" in published(scene.host)
    assert scene.outside.tcp(LAN6, 8607) is not None
    assert scene.outside.refused([(LAN4, 8607)])


@both("pynet.prefix", DOCKER + "container_iface_prefix")
def test_interface_prefix(scene: Scene, option: str) -> None:
    """Interfaces in the containers have the front part that was asked for."""
    network = scene.network("-o", f"{option}=lan")
    one, two = scene.run(network), scene.run(network)
    assert list(devices(one)) == ["lo", "lan0"]
    assert one.pings_name(two.name)
    scene.host.docker("network", "connect", scene.network(), one.name)
    # What a running container gets is built in it, by a name that Docker does not use.
    assert set(devices(one)) == {"lo", "lan0", "eth10"}


def test_docker_as_the_gateway(scene: Scene) -> None:
    """Docker then publishes the ports, shows them, and gives the way out."""
    host = scene.host
    network = scene.network("-o", "pynet.gateway=docker", *dual(7))
    try:
        one = scene.serve(scene.run(network, "-p", "8608:80"), 80)
        two = scene.run(network)
        assert two.pings_name(one.name)
        assert "80/tcp -> 0.0.0.0:8608" in host.docker("port", one.name).stdout
        assert not any("8608" in element for element in published(host))
        for client, address in ((scene.outside, LAN4), (scene.place, "127.0.0.1")):
            assert client.tcp(address, 8608) is not None
        assert two.pings(OUT4)
        server = Server(scene.outside, "outside", 8609)
        try:
            answer = two.tcp(OUT4, 8609)
        finally:
            server.close()
        assert answer is not None
        assert answer.client == LAN4
        gateway = api(host, "GET", "/networks/docker_gwbridge")
        subnet = gateway["IPAM"]["Config"][0]["Gateway"]
        assert one.default_routes() == [f"default via {subnet} dev eth1"]
    finally:
        scene.close()
        host.docker("network", "rm", "docker_gwbridge", check=False)


def test_an_internal_network_has_no_use_for_a_gateway(scene: Scene) -> None:
    """With --internal nothing leads out, also where Docker would be the gateway."""
    network = scene.network("--internal", "-o", "pynet.gateway=docker")
    one, two = scene.run(network), scene.run(network)
    assert one.pings(two.ip())
    assert one.default_routes() == []
    assert list(devices(one)) == ["lo", "eth0"]


KNOWN = (
    "pynet.attach, pynet.bridge, pynet.flood, pynet.gateway, pynet.host_access, "
    "pynet.host_binding, pynet.icc, pynet.masquerade, pynet.mode, pynet.mtu, "
    "pynet.prefix, pynet.spoof"
)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("pynet.mtuu=1400", KNOWN),
        ("mtu=1400", KNOWN),
        ("internal", KNOWN),
        ("pynet.mtu=0", "give 68 to 65535 bytes"),
        ("pynet.mtu=big", "give 68 to 65535 bytes"),
        ("pynet.bridge=a/b", "give a device name"),
        ("pynet.bridge=much-too-long-name", "give a device name"),
        ("pynet.icc=perhaps", "give true or false"),
        (DOCKER + "bridge.enable_icc=perhaps", "give true or false"),
        ("pynet.host_binding=localhost", "give an IP address"),
        ("pynet.gateway=nobody", "give pynet or docker"),
        ("pynet.mode=magic", "give "),
        ("pynet.prefix=9x", "give 1 to 10 letters"),
    ],
)
def test_bad_options_are_refused(scene: Scene, option: str, text: str) -> None:
    """An unknown option or a bad value is an error that says what is known."""
    said = scene.refused_network("-o", option)
    assert option.partition("=")[0] in said
    assert text in said


def test_two_names_of_one_option_must_agree(scene: Scene) -> None:
    """Both names with the same value are well, with different ones an error."""
    options = ("-o", "pynet.mtu=1300", "-o")
    scene.network(*options, DOCKER + "driver.mtu=1300")
    text = scene.refused_network(*options, DOCKER + "driver.mtu=1400")
    assert "contradicts" in text


def test_options_of_others_are_accepted_and_logged_once(scene: Scene) -> None:
    """What Docker or a plugin has of its own does no harm, and is named in the log."""
    key = DOCKER + "bridge.nobody_knows"
    for _ in range(2):
        network = scene.network("-o", f"{key}=1")
    assert scene.run(network).pings(OUT4)
    lines = [line for line in scene.host.log("pynet").splitlines() if key in line]
    assert len([line for line in lines if "api.call" not in line]) == 1
    assert re.search(r"network\.option_unused", lines[0])


def test_options_are_shown_as_they_were_given(scene: Scene) -> None:
    """What `docker network inspect` has are the user's options, as in pynet's."""
    network = scene.network("-o", "pynet.icc=no", "-o", DOCKER + "driver.mtu=1450")
    shown = api(scene.host, "GET", f"/networks/{network}")["Options"]
    assert shown == {"pynet.icc": "no", DOCKER + "driver.mtu": "1450"}
    told = inspected(scene.host, network)
    assert told["options"] == shown
    assert (told["icc"], told["mtu"]) == (False, 1450)
