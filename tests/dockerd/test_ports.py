"""Published ports: who reaches them, as whom, who does not, and who holds them."""

import errno
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from cnmdriver.lab.host import Host
from tests.dockerd.tools import (
    SILENCE,
    Container,
    Place,
    Scene,
    Server,
    asked,
    eventually,
    program,
    published,
    sctp,
    send_frame,
    udp4,
    udp6,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(60)]

WEB_PORTS = (
    *("-p", "8080:80", "-p", "8080:80/udp"),
    *("-p", "127.0.0.1:8081:80", "-p", "127.0.0.1:8081:80/udp"),
    *("-p", "192.0.2.11:8082:80", "-p", "[2001:db8:1::11]:8083:80"),
    *("-p", "[::1]:8084:80", "-p", "[::1]:8084:80/udp"),
    *("-p", "8090-8092:90-92", "-p", "8100-8105:80"),
    *("-p", "85", "--expose", "86", "-P"),
    *("-p", "9999:99/sctp"),
)
GATEWAY = {"blue": ("10.62.1.1", "fd62:1::1"), "green": ("10.62.2.1", "fd62:2::1")}
DOCKER0 = "172.17.0.1"
LAN4, LAN6 = "192.0.2.11", "2001:db8:1::11"
OUT4, OUT6 = "192.0.2.1", "2001:db8:1::1"
KINDS = pytest.mark.parametrize("kind", ["tcp", "udp"])


@dataclass(frozen=True, slots=True, kw_only=True)
class City:
    """A container that publishes, and all who may call it."""

    stage: Scene
    web: Container
    plain: Container
    places: dict[str, Place]
    addresses: dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def city(stage: Scene) -> City:
    """Return networks blue, green and Docker's own, with a container in each."""
    pools = {
        name: ("--subnet", f"10.62.{n}.0/24", "--ipv6", "--subnet", f"fd62:{n}::/64")
        for n, name in enumerate(("blue", "green", "dock", "plain"), 1)
    }
    stage.network(*pools["blue"], name="blue")
    stage.network(*pools["green"], name="green")
    stage.network(*pools["dock"], driver="bridge", name="dock")
    stage.network("--subnet", "10.62.4.0/24", name="plain")
    web = stage.run("blue", *WEB_PORTS, name="web")
    for kind in ("tcp", "udp"):
        stage.serve(web, 80, kind=kind)
    stage.serve(web, 81, 85, 86, 90, 91, 92)
    plain = stage.run("plain", "-p", "8280:80", "-p", "8280:80/udp", name="plain4")
    for kind in ("tcp", "udp"):
        stage.serve(plain, 80, kind=kind)
    containers = {
        "itself": web,
        "peer": stage.run("blue"),
        "far": stage.run("green"),
        "docker": stage.run("dock"),
        "docker0": stage.run("bridge"),
    }
    return City(
        stage=stage,
        web=web,
        plain=plain,
        places={"outside": stage.outside, "host": stage.place, **containers},
        addresses={name: (made.ip(), made.ip6()) for name, made in containers.items()},
    )


REACHED = [
    ("outside", LAN4, OUT4),
    ("outside", LAN6, OUT6),
    ("host", LAN4, "a host's"),
    ("host", DOCKER0, "a host's"),
    ("host", "10.62.1.1", "10.62.1.1"),
    ("host", "10.62.2.1", "a host's"),
    ("host", "127.0.0.1", "10.62.1.1"),
    ("host", "127.7.7.7", "10.62.1.1"),
    ("host", LAN6, "a host's"),
    ("host", "fd62:1::1", "fd62:1::1"),
    ("host", "fd62:2::1", "a host's"),
    ("host", "::1", "fd62:1::1"),
    ("itself", LAN4, "10.62.1.1"),
    ("itself", LAN6, "fd62:1::1"),
    ("itself", "10.62.1.1", "10.62.1.1"),
    ("peer", LAN4, "10.62.1.1"),
    ("peer", LAN6, "fd62:1::1"),
    ("peer", "10.62.2.1", "10.62.1.1"),
    ("far", LAN4, "own4"),
    ("far", LAN6, "own6"),
    ("far", "10.62.2.1", "own4"),
    ("far", "fd62:2::1", "own6"),
    ("far", "10.62.1.1", "own4"),
    ("docker", LAN4, "10.62.1.1"),
    ("docker", LAN6, "own6"),
    ("docker0", LAN4, "10.62.1.1"),
    ("docker0", DOCKER0, "10.62.1.1"),
]


@KINDS
@pytest.mark.parametrize(
    ("client", "address", "seen"), REACHED, ids=[f"{c}-{a}" for c, a, _ in REACHED]
)
def test_a_published_port_is_reached(
    city: City, kind: str, client: str, address: str, seen: str
) -> None:
    """A client reaches the container by an address of the host, and is seen as it is."""
    answer = getattr(city.places[client], kind)(address, 8080)
    assert answer is not None
    assert answer.server == "web"
    own4, own6 = city.addresses.get(client, ("", ""))
    expected = {
        "a host's": {LAN4, LAN6, DOCKER0, *GATEWAY["blue"], *GATEWAY["green"]},
        "own4": {own4},
        "own6": {own6},
    }
    assert answer.client in expected.get(seen, {seen})


@KINDS
@pytest.mark.parametrize(
    ("client", "address"),
    [("outside", LAN4), ("outside", LAN6), ("host", "::1"), ("host", LAN6)],
)
def test_an_ipv4_container_is_reached_by_either_family(
    city: City, kind: str, client: str, address: str
) -> None:
    """Clients of IPv6 reach a container that has only IPv4, through the relay."""
    answer = getattr(city.places[client], kind)(address, 8280)
    assert answer is not None
    assert answer.server == "plain4"
    assert answer.client == (OUT4 if address == LAN4 else "10.62.4.1")


@KINDS
def test_a_port_bound_to_127_0_0_1_is_for_the_host_alone(city: City, kind: str) -> None:
    """The host reaches it at 127.0.0.1; nobody does at any other address."""
    assert getattr(city.places["host"], kind)("127.0.0.1", 8081) is not None
    for name in ("outside", "host", "peer", "far", "docker0", "itself"):
        targets = [(LAN4, 8081), ("10.62.1.1", 8081), (DOCKER0, 8081)]
        assert city.places[name].refused(targets, kind)


def test_a_port_bound_to_an_address_is_reached_by_that_alone(city: City) -> None:
    """With a host address, IPv4 or IPv6, the host's other addresses do not answer."""
    for place in ("outside", "host", "far"):
        assert city.places[place].tcp(LAN4, 8082) is not None
        assert city.places[place].tcp(LAN6, 8083) is not None
    others = [DOCKER0, "10.62.1.1", "127.0.0.1", LAN6, "::1", "fd62:1::1"]
    assert city.places["host"].refused([(address, 8082) for address in others])
    others = [DOCKER0, "10.62.1.1", "127.0.0.1", LAN4, "::1", "fd62:1::1"]
    assert city.places["host"].refused([(address, 8083) for address in others])


@KINDS
def test_a_port_bound_to_the_ipv6_loopback_is_relayed(city: City, kind: str) -> None:
    """The host reaches it at ::1, nobody at any other address."""
    answer = getattr(city.places["host"], kind)("::1", 8084)
    assert answer is not None
    assert answer.server == "web"
    targets = [(LAN6, 8084), (LAN4, 8084)]
    assert city.places["outside"].refused(targets, kind)
    assert city.places["host"].refused([*targets, ("127.0.0.1", 8084)], kind)


def test_ranges_are_published_port_by_port(city: City) -> None:
    """A range to a range goes one to one; a range to one port takes its first free."""
    elements = published(city.stage.host)
    for number in (0, 1, 2):
        assert f"tcp . 809{number} : {city.web.ip()} . 9{number}" in elements
        assert city.places["outside"].tcp(LAN4, 8090 + number) is not None
    assert city.places["outside"].tcp(LAN4, 8100) is not None
    assert city.places["outside"].refused([(LAN4, port) for port in range(8101, 8106)])


@pytest.mark.parametrize("port", [85, 86])
def test_a_free_port_is_chosen_and_shown(city: City, port: int) -> None:
    """Without a host port, or by -P, pynet chooses one; `pynet port ls` tells which."""
    shown = json.loads(city.stage.host.pynet("port", "ls", "--json").stdout)
    found = [row for row in shown if (row["endpoint"], row["port"]) == ("web", port)]
    assert len(found) == 1
    chosen = found[0]["host_port"]
    assert chosen in range(49153, 65536)
    assert city.places["outside"].tcp(LAN4, chosen) is not None
    assert city.places["outside"].tcp(LAN6, chosen) is not None


def test_the_address_of_the_container_is_not_reached_from_outside(city: City) -> None:
    """Another machine with a route to the subnet gets no answer, by any port or ping."""
    host, outside = city.stage.host, city.places["outside"]
    routes = [("10.62.1.0/24", LAN4), ("fd62:1::/64", LAN6)]
    for subnet, gateway in routes:
        host.underlay.exec("ip", "route", "add", subnet, "via", gateway)
    try:
        targets = [(a, p) for a in (city.web.ip(), city.web.ip6()) for p in (80, 81)]
        assert outside.refused(targets)
        assert outside.refused([(city.web.ip(), 80), (city.web.ip6(), 80)], "udp")
        for address in (city.web.ip(), city.web.ip6()):
            ping = ("ping", "-c1", "-W1", address)
            assert host.underlay.exec("busybox", *ping, check=False).returncode != 0
    finally:
        for subnet, _ in routes:
            host.underlay.exec("ip", "route", "del", subnet)
    # While the host's own route leads there.
    assert city.places["host"].tcp(city.web.ip(), 81) is not None


def test_the_udp_reply_comes_from_the_address_that_was_asked(city: City) -> None:
    """A client that takes answers from the asked address alone gets one by each."""
    outside = city.stage.host.underlay
    outside.exec("ip", "route", "add", "10.62.2.1/32", "via", LAN4)
    try:
        for address in (LAN4, LAN6, "10.62.2.1"):
            with city.places["outside"].udp_client(address, 8080) as client:
                assert asked(client) is not None
                assert asked(client) is not None
    finally:
        outside.exec("ip", "route", "del", "10.62.2.1/32")


# Packets made by hand.


def mac_of(host: Host) -> str:
    """Return the MAC of the host's eth0."""
    return str(
        json.loads(host.exec("ip", "-j", "link", "show", "eth0").stdout)[0]["address"]
    )


@contextmanager
def guard_emptied(host: Host) -> Iterator[None]:
    """Take the rules out of the guard chain, and put them back."""
    listed = host.exec("nft", "list", "chain", "inet", "pynet", "guard").stdout
    rules = re.findall(r"^\t\t(ip6? daddr .*)$", listed, re.MULTILINE)
    assert len(rules) == 2
    host.exec("nft", "flush", "chain", "inet", "pynet", "guard")
    try:
        yield
    finally:
        for rule in rules:
            words = re.sub(r"packets \d+ bytes \d+ ?", "", rule).split()
            host.exec("nft", "add", "rule", "inet", "pynet", "guard", *words)


def test_crafted_packets_do_not_reach_what_is_bound_to_127_0_0_1(scene: Scene) -> None:
    """A frame to 127.0.0.1 from the next machine is dropped, and the guard does it."""
    host = scene.host
    one = scene.run(scene.network(), "-p", "127.0.0.1:8301:80/udp")
    server = Server(one, one.name, 80, "udp")
    frame = udp4((OUT4, 4444), ("127.0.0.1", 8301), b"?")
    mac = mac_of(host)

    def arrives() -> bool:
        server.heard.clear()
        send_frame(scene.outside, "underlay", mac, frame)
        return eventually(lambda: server.heard, 0.5)

    try:
        assert scene.place.udp("127.0.0.1", 8301) is not None
        assert not arrives()
        with guard_emptied(host):
            assert arrives()
        assert not arrives()
    finally:
        server.close()


def test_crafted_packets_do_not_reach_what_is_bound_to_the_ipv6_loopback(
    city: City,
) -> None:
    """A frame to ::1 from the next machine comes to nobody."""
    server = Server(city.web, "more", 87, "udp")
    try:
        frame = udp6((OUT6, 4444), ("::1", 8084), b"?")
        send_frame(city.places["outside"], "underlay", mac_of(city.stage.host), frame)
        assert not eventually(lambda: server.heard, 0.3)
    finally:
        server.close()


def test_crafted_packets_do_not_reach_the_containers_address(city: City) -> None:
    """A frame with the container's address and the host's MAC is dropped."""
    server = Server(city.web, "more", 88, "udp")
    try:
        mac = mac_of(city.stage.host)
        for source, target, build in (
            (OUT4, city.web.ip(), udp4),
            (OUT6, city.web.ip6(), udp6),
            # As if it came from the container's own network.
            (city.addresses["peer"][0], city.web.ip(), udp4),
        ):
            frame = build((source, 4444), (target, 88), b"?")
            send_frame(city.places["outside"], "underlay", mac, frame)
        assert not eventually(lambda: server.heard, 0.5)
        assert city.places["peer"].udp(city.web.ip(), 88) is not None
    finally:
        server.close()


def test_sctp_is_translated(city: City) -> None:
    """An SCTP packet to the host's port reaches the container's, and the answer back."""
    elements = published(city.stage.host)
    assert f"sctp . 9999 : {city.web.ip()} . 99" in elements
    assert f"sctp . 9999 : {city.web.ip6()} . 99" in elements
    raw = (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with city.web.open(*raw) as server, city.places["outside"].open(*raw) as client:
        client.settimeout(3)
        server.settimeout(3)
        client.sendto(sctp(5000, 9999, 1, 0), (LAN4, 0))
        packet, (source, _) = server.recvfrom(4096)
        assert source == OUT4
        assert packet[20:24] == (5000).to_bytes(2) + (99).to_bytes(2)
        server.sendto(sctp(99, 5000, 2, 7), (source, 0))
        packet, (source, _) = client.recvfrom(4096)
        assert source == LAN4
        assert packet[20:24] == (9999).to_bytes(2) + (5000).to_bytes(2)


# Who holds a port.


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize(
    ("kind", "reuse"),
    [
        (socket.SOCK_STREAM, False),
        (socket.SOCK_STREAM, True),
        (socket.SOCK_DGRAM, False),
        (socket.SOCK_DGRAM, True),
    ],
)
def test_a_published_port_is_held(
    city: City, family: int, kind: int, reuse: bool
) -> None:
    """No other program on the host takes it, not even one that is willing to share."""
    with city.places["host"].open(family, kind) as sock:
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        with pytest.raises(OSError, match="in use") as caught:
            sock.bind(("", 8080))
            sock.listen()
        assert caught.value.errno == errno.EADDRINUSE


def test_docker_cannot_take_a_published_port(city: City) -> None:
    """Docker's own bridge is refused a port that pynet publishes."""
    text = city.stage.refused_run("bridge", "-p", "8080:80")
    assert "address already in use" in text


def test_a_port_taken_by_a_program_is_an_error_that_names_it(scene: Scene) -> None:
    """The message has the program's name and process id, and nothing is left."""
    network = scene.network()
    listen = ("busybox", "nc", "-ll", "-p", "8401", "-e", "true")
    with program(scene.host, *listen):
        busy = [("127.0.0.1", 8401)]
        assert eventually(lambda: listens(scene.place, *busy[0]))
        text = scene.refused_run(network, "-p", "8400:80", "-p", "8401:80")
        assert re.search(r"8401/tcp is taken by busybox \(pid \d+\)", text)
        assert ". 8400 :" not in " ".join(published(scene.host))
    assert eventually(lambda: not listens(scene.place, "127.0.0.1", 8401))
    one = scene.run(network, "-p", "8400:80", "-p", "8401:80")
    scene.serve(one, 80)
    assert scene.outside.tcp(LAN4, 8401) is not None


def listens(place: Place, address: str, port: int) -> bool:
    """Tell whether a connection is accepted."""
    with place.open(socket.AF_INET, socket.SOCK_STREAM) as client:
        return client.connect_ex((address, port)) == 0


def test_a_port_taken_by_docker_is_an_error_that_names_it(scene: Scene) -> None:
    """A port that Docker's bridge publishes is refused, and goes on working."""
    one = scene.serve(scene.run("bridge", "-p", "8410:80"), 80)
    text = scene.refused_run(scene.network(), "-p", "8410:80")
    assert re.search(r"8410/tcp is taken by docker-proxy \(pid \d+\)", text)
    answer = scene.outside.tcp(LAN4, 8410)
    assert answer is not None
    assert answer.server == one.name


def test_a_port_taken_by_pynet_is_an_error_that_names_the_container(city: City) -> None:
    """The message has the name of the container that has the port."""
    for wish in ("8080:80", "127.0.0.1:8080:80", "8082:80", "[::1]:8080:80/udp"):
        text = city.stage.refused_run("green", "-p", wish)
        port = re.search(r":(\d+):", f":{wish}")
        assert port is not None
        assert f"host port {port[1]} is published by web" in text
    # The same number is free for another address or protocol.
    extra = ("-p", "10.62.2.1:8082:80", "-p", "8081:80/sctp")
    city.stage.remove(city.stage.run("green", *extra))


def test_a_port_of_an_address_the_host_does_not_have_is_refused(scene: Scene) -> None:
    """Publishing on a foreign address is an error that says so."""
    text = scene.refused_run(scene.network(), "-p", "198.51.100.7:8420:80")
    assert "198.51.100.7 is no address of this host" in text


# How ports change hands.


@pytest.mark.parametrize("address", [LAN4, LAN6, "127.0.0.1"])
def test_a_udp_client_that_was_there_before_reaches_the_new_container(
    scene: Scene, address: str
) -> None:
    """A flow that never pauses follows the port from nobody to one, then to another."""
    network = scene.network(
        "--subnet", "10.62.20.0/24", "--ipv6", "--subnet", "fd62:20::/64"
    )
    local = address == "127.0.0.1"
    with (scene.place if local else scene.outside).udp_client(address, 8430) as client:
        assert asked(client, 0.1) is None
        for number in ("10", "11"):
            options = ("--ip", f"10.62.20.{number}", "--ip6", f"fd62:20::{number}")
            one = scene.run(network, "-p", "8430:80/udp", *options)
            server = Server(one, one.name, 80, "udp")
            try:
                answer = next(
                    filter(None, (asked(client, 0.5) for _ in range(3))), None
                )
            finally:
                server.close()
            assert answer is not None
            assert answer.server == one.name
            scene.remove(one)
            assert asked(client, 0.1) is None


def test_nothing_is_left_of_a_port_after_the_container(scene: Scene) -> None:
    """The maps, the socket and the way to the container go with it."""
    network = scene.network()
    before = published(scene.host)
    options = ("-p", "8440:80", "-p", "8440:80/udp", "-p", "127.0.0.1:8441:80")
    one = scene.serve(scene.run(network, *options), 80)
    assert scene.outside.tcp(LAN4, 8440) is not None
    assert len(published(scene.host)) == len(before) + 3
    scene.remove(one)
    assert published(scene.host) == before
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with scene.place.open(socket.AF_INET6, kind) as sock:
            sock.bind(("::", 8440))
    assert not listens(scene.outside, LAN4, 8440)


def test_ports_move_with_the_way_out(scene: Scene) -> None:
    """When the network that gave the way out goes, another one publishes the ports."""
    first, second = scene.network(name="m1"), scene.network(name="m2")
    one = scene.run(first, "-p", "8450:80")
    scene.host.docker("network", "connect", second, one.name)
    scene.serve(one.look(), 80)
    assert scene.outside.tcp(LAN4, 8450) is not None
    assert f"tcp . 8450 : {one.ip(first)} . 80" in published(scene.host)
    scene.host.docker("network", "disconnect", first, one.name)
    one.look()
    assert scene.outside.tcp(LAN4, 8450) is not None
    assert f"tcp . 8450 : {one.ip(second)} . 80" in published(scene.host)
    scene.host.docker("network", "disconnect", second, one.name)
    assert not listens(scene.outside, LAN4, 8450)


def test_a_stopped_container_publishes_nothing(scene: Scene) -> None:
    """Its port is free for others while it is stopped; taken then, it cannot start."""
    network = scene.network()
    one = scene.run(network, "-p", "8460:80")
    scene.host.docker("stop", "-t", "0", one.name)
    two = scene.serve(scene.run(network, "-p", "8460:80"), 80)
    answer = scene.outside.tcp(LAN4, 8460)
    assert answer is not None
    assert answer.server == two.name
    done = scene.host.docker("start", one.name, check=False)
    assert done.returncode != 0
    scene.remove(two)
    scene.host.docker("start", one.name)
    scene.serve(one.look(), 80)
    assert scene.outside.tcp(LAN4, 8460) is not None


def test_many_connections_at_once(city: City) -> None:
    """A hundred connections through the kernel and through the relay all get through."""
    for address in (LAN4, "::1"):
        place = city.places["outside" if address == LAN4 else "host"]
        clients = [
            place.open(
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
            )
            for _ in range(100)
        ]
        try:
            for client in clients:
                client.settimeout(5)
                client.connect((address, 8080))
            assert all(client.recv(100).startswith(b"web ") for client in clients)
        finally:
            for client in clients:
                client.close()


def test_a_real_web_server_answers(scene: Scene) -> None:
    """A browser on another machine gets the page of a web server in a container."""
    name = "httpd"
    scene.containers.append(name)
    page = "mkdir /www && echo hello > /www/index.html && exec httpd -f -p 80 -h /www"
    options = ("-d", "--name", name, f"--network={scene.network()}", "-p", "8470:80")
    scene.host.docker("run", *options, "busybox", "sh", "-c", page)

    def answer() -> bytes:
        with scene.outside.open(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(SILENCE)
            try:
                client.connect((LAN4, 8470))
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return client.recv(1000) + client.recv(1000)
            except OSError:
                return b""

    assert eventually(lambda: b"hello" in answer())


def test_four_thousand_ports(scene: Scene) -> None:
    """A wide range is published to its end, and is free again at once."""
    network = scene.network()
    for _ in range(2):
        one = scene.run(network, "-p", "20000-23999:1000-4999")
        scene.serve(one, 1000, 4999)
        for port in (20000, 23999):
            assert scene.outside.tcp(LAN4, port) is not None
        scene.remove(one)
