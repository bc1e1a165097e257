"""Overlay networks over three hosts with real dockerds and three etcd members."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import (
    Cluster,
    fresh_pools,
    left,
    nothing_is_left,
    pairs,
)
from tests.dockerd.tools import (
    Container,
    Place,
    Scene,
    Server,
    api,
    devices,
    eventually,
    family_of,
    inspected,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(180)]

PORT = 7


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return three hosts and three etcd members."""
    return make_module_lab(3, etcd=3)


@pytest.fixture(scope="module")
def empty(lab: Lab) -> Iterator[Lab]:
    """Return the lab; after the module nothing may be left in etcd or on any host."""
    yield lab
    cluster = Cluster(lab)
    nothing_is_left(cluster)
    assert left(cluster) == []


@pytest.fixture
def cluster(empty: Lab) -> Iterator[Cluster]:
    """Return the hosts, with networks of the test's own."""
    with Cluster(empty) as made:
        yield made


def answers(one: Place, address: str, timeout: float = 2.0) -> bool:
    """Tell whether a server of the tests answers on an address."""
    return one.udp(address, PORT, timeout) is not None


def serve(cluster: Cluster, *containers: Container) -> None:
    """Let containers answer datagrams."""
    for container in containers:
        server = Server(container, container.name, PORT, "udp")
        cluster.stack.callback(server.close)


def test_every_pair_of_a_network_and_none_across(cluster: Cluster) -> None:
    """Two networks over three hosts: all pairs within, none across, both families."""
    blue, red = cluster.network(), cluster.network()
    inside = {name: cluster.run(name) for name in (blue, red)}
    serve(cluster, *inside[blue], *inside[red])
    for name, containers in inside.items():
        for one, other in pairs(containers):
            assert answers(one, other.ip(name)), (one.name, other.name)
            assert answers(one, other.ip6(name)), (one.name, other.name)
    for one in inside[blue]:
        targets = [
            (address, PORT)
            for other in inside[red]
            for address in (other.ip(red), other.ip6(red))
        ]
        assert one.refused(targets, "udp")


def test_all_goes_with_the_last_host(cluster: Cluster) -> None:
    """A network goes from etcd and all kernels when the last host removes it."""
    name = cluster.network()
    containers = cluster.run(name)
    for scene, container in zip(cluster.scenes, containers, strict=True):
        scene.host.docker("stop", "-t0", container.name)
        scene.remove(container)
    for scene in cluster.scenes:
        scene.remove_network(name)
    assert nothing_is_left(cluster), left(cluster)


def test_addresses_are_unique(cluster: Cluster) -> None:
    """Containers that start at once on all hosts have different addresses."""
    name = cluster.network(six=False)
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda scene=scene: found.extend(
                scene.run(name).ip(name) for _ in range(4)
            )
        )
        for scene in cluster.scenes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 12


def test_a_taken_address_is_refused_with_its_owner(cluster: Cluster) -> None:
    """The second host that wants an address is told who has it, and where."""
    name = cluster.network(six=False)
    first = cluster.scenes[0].run(name)
    host = cluster.scenes[0].host.name
    why = cluster.scenes[1].refused_run(name, "--ip", first.ip(name))
    assert first.ip(name) in why
    assert host in why
    listed = cluster.scenes[1].host.pynet("ipam", "ls").stdout
    (line,) = [
        words for words in listed.splitlines() if words.startswith(first.ip(name))
    ]
    assert line.split()[-1] == host


def test_internal_networks_lead_to_no_host(cluster: Cluster) -> None:
    """From an internal network no address of any host is reached, in any family."""
    name = cluster.network("--internal")
    one, *others = cluster.run(name)
    serve(cluster, *others)
    assert answers(one, others[0].ip(name))
    assert one.default_routes(4) == []
    places = [Place(scene.host.netns) for scene in cluster.scenes]
    for scene, place in zip(cluster.scenes, places, strict=True):
        server = Server(place, scene.host.name, PORT, "udp")
        cluster.stack.callback(server.close)
    gateways = [
        str(entry["Gateway"])
        for entry in api(one.host, "GET", f"/networks/{name}")["IPAM"]["Config"]
        if entry.get("Gateway")
    ]
    hosts = [str(scene.host.address4) for scene in cluster.scenes]
    hosts += [str(scene.host.address6) for scene in cluster.scenes]
    assert one.refused([(a, PORT) for a in [*gateways, *hosts]], "udp")
    assert link_local_neighbours(one) <= {link_local(c) for c in others}


def test_overlays_lead_to_no_host(cluster: Cluster) -> None:
    """An overlay's own subnet and link hold containers and nothing else."""
    name = cluster.network()
    one, *others = cluster.run(name)
    gateways = [
        subnet["gateway"] or str(next(ip_network(subnet["pool"]).hosts()))
        for subnet in inspected(one.host, name)["subnets"]
    ]
    for place in (Place(scene.host.netns) for scene in cluster.scenes):
        server = Server(place, "host", PORT, "udp")
        cluster.stack.callback(server.close)
    assert gateways
    assert one.refused([(address, PORT) for address in gateways], "udp")
    assert link_local_neighbours(one) <= {link_local(c) for c in others}


def link_local(container: Container) -> str:
    """Return the link-local address of a container's first device."""
    found = [
        address["local"]
        for address in devices(container)["eth0"]["addr_info"]
        if address["scope"] == "link" and address["family"] == "inet6"
    ]
    return str(found[0]) if found else ""


def link_local_neighbours(container: Container) -> set[str]:
    """Ping all nodes on a container's first link; return who answers, itself apart."""
    done = container.net("ping", "-6", "-c2", "-W1", "ff02::1%eth0", check=False)
    words = done.stdout.replace("%eth0", "").split()
    found = {word.strip(":") for word in words if word.startswith("fe80:")}
    return found - {link_local(container)}


def test_a_moved_address_is_right_everywhere(cluster: Cluster) -> None:
    """An address that went from one host to another is reached there at once."""
    name = cluster.network()
    scenes = cluster.scenes
    prober = scenes[2].run(name)
    home = 0
    moving = scenes[home].run(name)
    four, six = moving.ip(name), moving.ip6(name)
    for turn in range(6):
        scenes[home].remove(moving)
        home = 1 - home
        moving = scenes[home].run(name, "--ip", four, "--ip6", six)
        with Server(moving, f"turn-{turn}", PORT, "udp"):
            for address in (four, six):
                answer = prober.udp(address, PORT, 1.0)
                assert answer is not None
                assert answer.server == f"turn-{turn}"


def test_a_changed_mac_is_known_everywhere(cluster: Cluster) -> None:
    """
    Who knew an address by another MAC reaches it at once all the same.

    1. Containers on the same and on another host, and on the same host's bridge network,
       know a container.
    2. It is made anew: by its IPv6 address, with another IPv4 address and so another
       MAC; with a MAC of the user's; and again without.
    Result: each is answered within a second, in the family whose address stayed.
    """
    name = cluster.network()
    scene, other, _ = cluster.scenes
    pools = ("--subnet", "10.97.0.0/24", "--ipv6", "--subnet", "fd97::/64")
    alone = scene.network("-o", "pynet.mode=bridge", "--ipam-driver", "pynet", *pools)
    for network, probers in (
        (name, [scene.run(name), other.run(name)]),
        (alone, [scene.run(alone)]),
    ):
        first = scene.run(network)
        four, six = first.ip(network), first.ip6(network)
        spare = four.rpartition(".")[0] + ".29"
        for address, ipv4, mac in (
            (six, spare, ""),
            (six, four, ""),
            (four, four, "02:11:22:33:44:55"),
            (four, four, ""),
        ):
            for prober in probers:
                assert prober.pings(address)
            scene.remove(first)
            first = placed(scene, network, ipv4, six, mac)
            with Server(first, "again", PORT, "udp"):
                for prober in probers:
                    assert prober.udp(address, PORT, 1.0) is not None, (ipv4, mac)
        scene.remove(first)


def placed(scene: Scene, network: str, ipv4: str, ipv6: str, mac: str) -> Container:
    """Start a container with addresses and a MAC of the user's, in any Docker."""
    name = f"placed-{len(scene.containers)}"
    place = {"IPAMConfig": {"IPv4Address": ipv4, "IPv6Address": ipv6}}
    body = {
        "Image": "busybox",
        "Cmd": ["sleep", "600"],
        "MacAddress": mac,
        "HostConfig": {"NetworkMode": network},
        # Docker 25 and later have it here.
        "NetworkingConfig": {
            "EndpointsConfig": {network: {**place, "MacAddress": mac}}
        },
    }
    scene.containers.append(name)
    api(scene.host, "POST", f"/containers/create?name={name}", body)
    api(scene.host, "POST", f"/containers/{name}/start")
    return Container(host=scene.host, name=name).look()


@pytest.mark.timeout(400)
def test_the_first_packet_is_answered(cluster: Cluster) -> None:
    """A prober on another host is answered at its first packet after `connect`."""
    name = cluster.network(six=False)
    near, far = cluster.scenes[0], cluster.scenes[1]
    prober = far.run(name)
    target = near.run("none")
    missed = []
    api(near.host, "POST", "/networks/none/disconnect", {"Container": target.name})
    count_arp(cluster.lab)
    for number in range(100):
        address = f"{prober.ip(name).rpartition('.')[0]}.{100 + number % 100}"
        body = {
            "Container": target.name,
            "EndpointConfig": {"IPAMConfig": {"IPv4Address": address}},
        }
        api(near.host, "POST", f"/networks/{name}/connect", body)
        # Late is well on a busy machine: it is one packet, and nobody repeats it.
        if not pinged(prober, address, 3.0):
            missed.append(address)
        api(
            near.host,
            "POST",
            f"/networks/{name}/disconnect",
            {"Container": target.name, "Force": True},
        )
    assert len(missed) <= 1, missed
    assert arp_requests(cluster.lab) == 0


def pinged(place: Place, address: str, timeout: float) -> bool:
    """Send one echo request and tell whether it is answered (RFC 792)."""
    with place.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(timeout)
        raw.sendto(b"\x08\x00\xf7\xff\x00\x00\x00\x00", (address, 0))
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                data, (source, _) = raw.recvfrom(2048)
            except TimeoutError:
                return False
            if source == address and data[20] == 0:
                return True
    return False


def count_arp(lab: Lab) -> None:
    """Count broadcast ARP inside tunnels from now on (RFC 7348, 5: frame format)."""
    lab.outside.exec(
        "nft",
        "-f",
        "-",
        input="""
add table bridge count
delete table bridge count
table bridge count {
	chain forward {
		type filter hook forward priority 0; policy accept;
		udp dport 4789 @th,128,48 0xffffffffffff @th,224,16 0x0806 counter
		udp dport 4789 counter
	}
}
""",
    )


def arp_requests(lab: Lab) -> int:
    """Return how many were counted; the tunnels' other traffic must have been seen."""
    shown = lab.outside.exec("nft", "list", "chain", "bridge", "count", "forward")
    arp, all_of_them = re.findall(r"packets (\d+)", shown.stdout)
    assert int(all_of_them) > 0
    return int(arp)


def test_way_out_and_ports_by_docker(cluster: Cluster) -> None:
    """Without options the way out and `-p` are docker_gwbridge's, and Docker shows it."""
    name = cluster.network()
    scene = cluster.scenes[0]
    container = scene.run(name, "-p", "8090:80")
    scene.serve(container, 80)
    shown = scene.host.docker("port", container.name).stdout
    assert "8090" in shown
    answer = scene.outside.tcp(str(scene.host.address4), 8090)
    assert answer is not None
    assert answer.server == container.name
    with Server(scene.outside, "outside", PORT, "udp"):
        assert answers(container, str(scene.host.underlay.address4))


@pytest.mark.parametrize("family", [4, 6])
def test_one_interface_with_a_gateway_of_pynets(cluster: Cluster, family: int) -> None:
    """With gateway=pynet one interface does all: out by NAT, `-p`, other hosts."""
    name = cluster.network("-o", "pynet.gateway=pynet")
    containers = [
        scene.run(name, "-p", f"{8100 + number}:80")
        for number, scene in enumerate(cluster.scenes)
    ]
    serve(cluster, *containers)
    outside = cluster.scenes[0].outside
    target = (
        cluster.lab.outside.address4 if family == 4 else cluster.lab.outside.address6
    )
    with Server(outside, "outside", PORT, "udp"):
        for number, (scene, container) in enumerate(
            zip(cluster.scenes, containers, strict=True)
        ):
            assert set(devices(container)) == {"lo", "eth0"}
            own = scene.host.address4 if family == 4 else scene.host.address6
            answer = container.udp(str(target), PORT)
            assert answer is not None
            assert ip_address(answer.client) == own
            scene.serve(container, 80)
            published = outside.tcp(str(own), 8100 + number)
            assert published is not None
            assert published.server == container.name
    for one, other in pairs(containers):
        address = other.ip(name) if family == 4 else other.ip6(name)
        assert answers(one, address)


def test_hosts_with_access(cluster: Cluster) -> None:
    """With host_access each host reaches the containers of all hosts, and they it."""
    name = cluster.network("-o", "pynet.host_access=true")
    containers = cluster.run(name)
    serve(cluster, *containers)
    for scene in cluster.scenes:
        for container in containers:
            assert answers(scene.place, container.ip(name))
            assert answers(scene.place, container.ip6(name))


def test_joining_takes_what_the_network_has(cluster: Cluster) -> None:
    """A host that joins needs only the pool; another MTU is refused with both."""
    four, _ = fresh_pools()
    cluster.join(0, "mtu", "--subnet", four, "-o", "pynet.mtu=1400")
    cluster.join(1, "mtu", "--subnet", four)
    container = cluster.scenes[1].run("mtu")
    assert devices(container)["eth0"]["mtu"] == 1400
    why = cluster.scenes[2].refused_network(
        "--ipam-driver", "pynet", "--subnet", four, "-o", "pynet.mtu=1300"
    )
    assert "1400" in why
    assert "1300" in why


def test_dockers_addresses_are_refused(cluster: Cluster) -> None:
    """An overlay with Docker's own IPAM is refused with the words that work."""
    why = cluster.scenes[0].refused_network("--subnet", fresh_pools()[0])
    assert "--ipam-driver pynet" in why


def test_spaces_may_overlap(cluster: Cluster) -> None:
    """Two networks have the same pool in two address spaces, and do not meet."""
    four, _ = fresh_pools()
    for number in range(2):
        for space in ("east", "west"):
            option = ("--ipam-opt", f"pynet.space={space}")
            cluster.join(number, space, "--subnet", four, *option)
    east = [scene.run("east") for scene in cluster.scenes[:2]]
    west = [scene.run("west") for scene in cluster.scenes[:2]]
    assert {c.ip() for c in east} == {c.ip() for c in west}
    serve(cluster, *east)
    assert answers(east[0], east[1].ip())
    assert not answers(west[0], west[1].ip(), 0.5)


def test_hosts_are_listed(cluster: Cluster) -> None:
    """`pynet host ls` shows every host on each, alive and up to date."""
    name = cluster.network()
    cluster.run(name)

    def listed(host: Host) -> bool:
        shown = json.loads(host.pynet("host", "ls", "--json").stdout)
        return (
            [h["state"] for h in shown] == ["alive"] * 3
            and [h["endpoints"] for h in shown] == [1, 1, 1]
            and [h["behind"] for h in shown] == [0, 0, 0]
        )

    for host in cluster.lab.hosts:
        assert eventually(lambda host=host: listed(host))


def test_nobody_carries_what_it_has_no_part_in(cluster: Cluster) -> None:
    """A host without an endpoint on a network has none of its entries."""
    name = cluster.network(six=False)
    for scene in cluster.scenes[:2]:
        scene.run(name)
    entries = [
        scene.host.exec("ip", "netns", "exec", "pynet", "bridge", "fdb").stdout
        for scene in cluster.scenes
    ]
    assert "dst" in entries[0]
    assert "dst" in entries[1]
    assert "dst" not in entries[2]


def test_restarts_lose_nothing(cluster: Cluster) -> None:
    """Daemons that restart on both ends lose no packet of a conversation."""
    name = cluster.network(six=False)
    one, other, _ = cluster.run(name)
    serve(cluster, other)
    lost: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            if not answers(one, other.ip(name), 1.0):
                lost.append(number)

    asking = threading.Thread(target=ask)
    asking.start()
    for scene in cluster.scenes[:2]:
        scene.host.stop_pynet()
        scene.host.start_pynet()
        scene.host.kill_pynet()
        scene.host.start_pynet()
    stop.set()
    asking.join()
    assert lost == []
    assert family_of(other.ip(name)) == socket.AF_INET


def connected(container: Container, network: str, **config: object) -> Container:
    """Connect a running container to a network."""
    body = {"Container": container.name, "EndpointConfig": config}
    api(container.host, "POST", f"/networks/{network}/connect", body)
    return container.look()


def test_a_running_container_gets_one_more_overlay(cluster: Cluster) -> None:
    """Built in place beside docker_gwbridge's: peers and the outside are reached."""
    blue, red = cluster.network(), cluster.network()
    one = cluster.scenes[0].run(blue)
    far_blue, far_red = (cluster.scenes[1].run(name) for name in (blue, red))
    serve(cluster, far_blue, far_red)
    connected(one, red)
    serve(cluster, one)
    assert sorted(devices(one)) == ["eth0", "eth1", "eth10", "lo"]
    for name, far in ((blue, far_blue), (red, far_red)):
        for address in (far.ip(name), far.ip6(name)):
            assert answers(one, address), (name, address)
    for address in (one.ip(red), one.ip6(red)):
        assert answers(far_red, address), address
    assert one.pings("192.0.2.1")
    host = cluster.scenes[0].host
    assert json.loads(host.pynet("diff", "--json").stdout)["lines"] == []


def test_an_address_moves_to_another_host(cluster: Cluster) -> None:
    """Given back where it was built in place, it is had and reached elsewhere."""
    blue = cluster.network("-o", "pynet.gateway=pynet")
    home = cluster.network("-o", "pynet.gateway=pynet")
    boxes = cluster.run(home)
    address = cluster.scenes[0].run(blue).ip(blue).rpartition(".")[0] + ".9"
    wish = {"IPAMConfig": {"IPv4Address": address}}
    serve(cluster, *boxes)
    for number in (0, 1, 0):
        one, other = boxes[number], boxes[1 - number]
        connected(one, blue, **wish)
        connected(other, blue)
        assert "eth10" in devices(one)
        assert answers(other, address)
        assert one.pings("192.0.2.1")
        for box in (one, other):
            body = {"Container": box.name}
            api(box.host, "POST", f"/networks/{blue}/disconnect", body)
