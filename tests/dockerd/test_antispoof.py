"""A container with raw sockets, as every container of Docker's is, and its neighbours."""

import json
import socket
from collections.abc import Callable, Iterator

import pytest

from cnmdriver.lab.lab import Lab
from cnmdriver.plan import devices
from tests import frames
from tests.dockerd.cluster import Cluster, fresh_pools, left, nothing_is_left
from tests.dockerd.tools import Container, api, eventually
from tests.frames import ARP, EVERYBODY, IP4, IP6

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(180)]

MODES = ("overlay", "bridge")
PORT = 7777


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts and an etcd."""
    return make_module_lab(2, etcd=1)


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts; after the test nothing is left on them."""
    with Cluster(lab) as made:
        yield made
    nothing_is_left(made)
    assert left(made) == []


def trio(cluster: Cluster, mode: str, *options: str) -> tuple[str, list[Container]]:
    """Return a network with two containers on one host, and a third, if it can be."""
    hosts = (0, 1) if mode == "overlay" else (0,)
    said = (*options, "-o", f"pynet.mode={mode}")
    name = cluster.network(*said, hosts=hosts)
    places = [cluster.scenes[n] for n in (0, 0, *hosts[1:])]
    return name, [scene.run(name) for scene in places]


def mac(container: Container, network: str) -> str:
    """Return a container's MAC."""
    found: str = container.attachment(network)["MacAddress"]
    return found


def opened(container: Container) -> socket.socket:
    """Open a raw socket on a container's device."""
    made = container.open(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(frames.ALL))
    made.bind(("eth0", frames.ALL))
    made.settimeout(0.2)
    return made


def drops(cluster: Cluster, mode: str) -> dict[str, int]:
    """Return what was dropped on the first host, by kind."""
    inside = ("ip", "netns", "exec", "pynet") if mode == "overlay" else ()
    said = cluster.lab.hosts[0].exec(*inside, "nft", "-j", "list", "counters")
    found = [
        x["counter"] for x in json.loads(said.stdout)["nftables"] if "counter" in x
    ]
    ours = (c for c in found if c["family"] == "bridge" and c["table"] == "pynet")
    return {c["name"]: c["packets"] for c in ours if c["packets"]}


def forged(network: str, one: Container, victim: Container) -> dict[str, bytes]:
    """Return a frame of each kind that a container may not send, by the kind."""
    own, its, to = mac(one, network), victim.ip(network), mac(victim, network)
    six, its6 = one.ip6(network), victim.ip6(network)
    gateway = its.rpartition(".")[0] + ".1"
    link = str(devices.link_local(own).ip)
    about = frames.about(its6, own, 2)
    packets = {
        "ipv4": (IP4, frames.datagram(gateway, its, PORT, PORT)),
        "ipv6": (IP6, frames.datagram(f"{six}9", its6, PORT, PORT)),
        "arp": (ARP, frames.arp(2, own, gateway, its)),
        "nd": (IP6, frames.discovery(six, "ff02::1", frames.NA, about)),
        "router": (IP6, frames.discovery(link, "ff02::1", frames.RA, bytes(8))),
        "dhcp": (IP4, frames.datagram(one.ip(network), its, 67, 68)),
    }
    made = {k: frames.ethernet(to, own, *packet) for k, packet in packets.items()}
    plain = frames.datagram(one.ip(network), its, PORT, PORT, b"forged")
    return made | {"mac": frames.ethernet(to, "02:42:00:00:00:99", IP4, plain)}


@pytest.mark.parametrize("mode", MODES)
def test_a_container_that_forges(cluster: Cluster, mode: str) -> None:
    """
    What a container forges reaches no other, on its host or elsewhere; it is counted.

    1. Containers reach each other by both families, and nothing is counted.
    2. One sends a frame of each kind to each other, and to all.
    3. The others hear of none, and go on reaching each other.

    Result: each drop is counted once, by its kind.
    """
    network, (one, *others) = trio(cluster, mode)
    for other in others:
        assert one.pings(other.ip(network))
        assert one.pings(other.ip6(network))
    assert drops(cluster, mode) == {}
    with opened(one) as mouth:
        for other in others:
            with opened(other) as ear:
                sent = forged(network, one, other)
                for frame in sent.values():
                    mouth.send(frame)
                    mouth.send(frames.octets(EVERYBODY) + frame[6:])
                assert not told(network, one, other, mouth, ear) & {*sent.values()}
    expected = {f"spoofed_{kind}": 2 * len(others) for kind in sent}
    assert drops(cluster, mode) == expected
    for other in others:
        assert other.pings(one.ip(network))
        assert other.pings(one.ip6(network))


def told(
    network: str,
    one: Container,
    other: Container,
    mouth: socket.socket,
    ear: socket.socket,
) -> set[bytes]:
    """Return what a container has heard, up to something that is told it last."""
    packet = frames.datagram(one.ip(network), other.ip(network), PORT, PORT, b"last")
    last = frames.ethernet(mac(other, network), mac(one, network), IP4, packet)
    mouth.send(last)
    return set(frames.hear(ear, last))


@pytest.mark.parametrize("mode", MODES)
def test_a_network_that_allows_it(cluster: Cluster, mode: str) -> None:
    """With `pynet.spoof=allow` all of that passes between the containers of a host."""
    network, (one, other, *_) = trio(cluster, mode, "-o", "pynet.spoof=allow")
    with opened(one) as mouth, opened(other) as ear:
        sent = forged(network, one, other)
        for frame in sent.values():
            mouth.send(frame)
        assert told(network, one, other, mouth, ear) >= {*sent.values()}
    assert drops(cluster, mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_link_local_addresses_of_the_users_choice(cluster: Cluster, mode: str) -> None:
    """Containers with `--link-local-ip` reach each other by those, in both families."""
    network = cluster.network("-o", f"pynet.mode={mode}", hosts=(0,))
    ones = [
        cluster.scenes[0].run(
            network,
            *("--link-local-ip", f"169.254.7.{n}"),
            *("--link-local-ip", f"fe80::7:{n}"),
        )
        for n in (2, 3)
    ]
    shown = ones[0].net("ip", "addr", "show", "dev", "eth0").stdout
    assert "169.254.7.2" in shown
    assert "fe80::7:2" in shown
    assert ones[0].pings("169.254.7.3")
    assert ones[1].pings("169.254.7.2")
    # Docker lets the kernel look whether somebody else has this one.
    assert eventually(lambda: ones[0].pings("fe80::7:3%eth0"))
    assert ones[0].pings(ones[1].ip(network))
    assert drops(cluster, mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_mac_of_the_users_choice(cluster: Cluster, mode: str) -> None:
    """A container with `--mac-address` sends from that, as its own."""
    network, (one, *_) = trio(cluster, mode)
    scene, chosen = cluster.scenes[0], "02:11:22:33:44:55"
    body = {
        "Image": "busybox",
        "Cmd": ["sleep", "600"],
        "MacAddress": chosen,
        "HostConfig": {"NetworkMode": network},
    }
    name = f"mac-{mode}"
    api(scene.host, "POST", f"/containers/create?name={name}", body)
    scene.containers.append(name)
    api(scene.host, "POST", f"/containers/{name}/start")
    other = Container(host=scene.host, name=name).look()
    assert mac(other, network) == chosen
    assert one.pings(other.ip(network))
    assert other.pings(one.ip6(network))
    assert drops(cluster, mode) == {}


def test_hosts_must_agree(cluster: Cluster) -> None:
    """Whether containers may spoof is the network's: a host that joins says the same."""
    pool, _ = fresh_pools()
    said = ("--subnet", pool, "-o")
    cluster.join(0, "agreed", *said, "pynet.spoof=allow")
    options = ("--ipam-driver", "pynet", *said, "pynet.spoof=deny")
    refused = cluster.scenes[1].refused_network(*options)
    assert "pynet.spoof true, not false" in refused
    cluster.join(1, "agreed", *said, "pynet.spoof=allow")
