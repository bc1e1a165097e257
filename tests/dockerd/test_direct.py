"""Interfaces that are built straight in the sandbox, beside those that Docker moves."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import (
    Container,
    Scene,
    accepts,
    api,
    devices,
    eventually,
    left_of_pynet,
    published,
    told,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(180)]

AT_ONCE = 20
PORT = 80


@pytest.fixture(scope="module")
def direct_host(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host whose daemons may be killed."""
    return make_module_lab(pynet_args=("--grace=2", "--audit=1")).hosts[0]


@pytest.fixture
def scene(direct_host: Host) -> Iterator[Scene]:
    """Return a scene; after it nothing of pynet may be left, and nothing was odd."""
    before = accepts(direct_host)
    with Scene(direct_host) as made:
        yield made
    assert eventually(lambda: not left_of_pynet(direct_host)), left_of_pynet(
        direct_host
    )
    assert accepts(direct_host) == before
    assert told(direct_host, "endpoints") == []


def both(number: int, *options: str) -> tuple[str, ...]:
    """Return the options of a network of both families, and pynet's addresses."""
    pools = ("--subnet", f"10.5.{number}.0/24", "--subnet", f"fd05:{number}::/64")
    return ("--ipam-driver", "pynet", "--ipv6", *pools, *options)


def connect(container: Container, network: str, **config: object) -> Container:
    """Connect a container to a network, and look at it."""
    body = {"Container": container.name, "EndpointConfig": config}
    api(container.host, "POST", f"/networks/{network}/connect", body)
    return container.look()


def disconnect(container: Container, network: str) -> Container:
    """Disconnect a container from a network, and look at it."""
    body = {"Container": container.name}
    api(container.host, "POST", f"/networks/{network}/disconnect", body)
    return container.look()


def names(container: Container) -> list[str]:
    """Return the names of a container's interfaces, but of those that are going."""
    found = devices(container)
    going = {name for name in found if name.startswith("pc-")}
    for name in going:
        assert not [a for a in found[name]["addr_info"] if a["scope"] == "global"]
    return sorted(found.keys() - going - {"lo"})


def ways(container: Container) -> dict[str, str]:
    """Return gateway and device of the default routes, by IP version."""
    found = {}
    for version in (4, 6):
        for line in container.default_routes(version):
            words = line.split()
            found[f"{version}"] = f"{words[2]} {words[4]}"
    return found


def agrees(host: Host) -> bool:
    """Tell whether the kernel is as planned."""
    return not told(host, "diff")["lines"]


def test_all_that_docker_would_have_made(scene: Scene) -> None:
    """
    A running container gets an interface as Docker would have made it.

    1. A container that has eth0 is connected to a second network of both families.
    2. What it has there is looked at, in Docker's words and in the kernel's.
    3. It is disconnected, and connected again.

    Result: eth10 has addresses, MAC and MTU, peers answer by address and by name, and
    the next one is eth10 again.
    """
    first, second = (
        scene.network(*both(1)),
        scene.network(*both(2, "-o", "pynet.mtu=1400")),
    )
    peer, one = scene.run(second), scene.run(first)
    connect(one, second)
    assert names(one) == ["eth0", "eth10"]
    found = devices(one)["eth10"]
    assert {"UP", "LOWER_UP"} <= set(found["flags"])
    assert found["mtu"] == 1400
    shown = one.attachment(second)
    assert found["address"] == shown["MacAddress"]
    faces = {a["local"]: a for a in found["addr_info"] if a["scope"] == "global"}
    assert set(faces) == {shown["IPAddress"], shown["GlobalIPv6Address"]}
    assert faces[shown["IPAddress"]]["prefixlen"] == 24
    assert faces[shown["IPAddress"]]["broadcast"] == "10.5.2.255"
    assert (shown["Gateway"], shown["IPv6Gateway"]) == ("10.5.2.1", "fd05:2::1")
    for target in (peer.ip(second), peer.ip6(second)):
        assert one.pings(target)
    assert one.pings_name(peer.name)
    assert peer.pings_name(one.name)
    assert "eth10" in one.exec("ip", "link").stdout
    listed = {e["interface"]: e["attached"] for e in told(scene.host, "endpoints")}
    assert listed == {"": "moved", "eth10": "direct"}
    assert agrees(scene.host)
    disconnect(one, second)
    assert names(one) == ["eth0"]
    connect(one, second)
    assert names(one) == ["eth0", "eth10"]
    assert eventually(lambda: one.pings(peer.ip(second)))


def test_the_way_out_is_handed_over(scene: Scene) -> None:
    """The default route goes to the network that Docker elects, and back again."""
    here = scene.network(*both(3), name="n-here")
    before = scene.network("--subnet", "10.6.1.0/24", driver="bridge", name="a-bridge")
    after = scene.network("--subnet", "10.6.2.0/24", driver="bridge", name="z-bridge")
    one = scene.run(after)
    assert ways(one)["4"].startswith("10.6.2.1")
    connect(one, here)
    assert ways(one) == {"4": "10.5.3.1 eth10", "6": "fd05:3::1 eth10"}
    assert one.pings("192.0.2.1")
    connect(one, before)
    assert ways(one)["4"].split()[0] in {"10.6.1.1", "10.5.3.1"}
    disconnect(one, before)
    assert ways(one)["4"] == "10.5.3.1 eth10"
    disconnect(one, here)
    assert ways(one)["4"].startswith("10.6.2.1")
    connect(one, here)
    assert ways(one) == {"4": "10.5.3.1 eth10", "6": "fd05:3::1 eth10"}
    assert one.pings("192.0.2.1")


def test_ports_end_to_end(scene: Scene) -> None:
    """Ports are published by the network whose gateway it is, while it is."""
    inner = scene.network("--internal", "--subnet", "10.6.3.0/24")
    outer = scene.network(*both(4))
    one = scene.serve(scene.run(inner, "-p", f"8088:{PORT}"), PORT)
    assert scene.outside.tcp("192.0.2.11", 8088, 0.4) is None
    connect(one, outer)
    answer = scene.outside.tcp("192.0.2.11", 8088)
    assert answer is not None
    assert answer.server == one.name
    assert scene.place.tcp("127.0.0.1", 8088) is not None
    assert scene.place.tcp("::1", 8088) is not None
    disconnect(one, outer)
    assert published(scene.host) == []
    assert scene.outside.tcp("192.0.2.11", 8088, 0.4) is None


def test_settings_of_the_container(scene: Scene) -> None:
    """What `--sysctl` said for later devices holds; IPv6 is on where it has some."""
    first, second = scene.network("--subnet", "10.6.4.0/24"), scene.network(*both(5))
    third = scene.network("--subnet", "10.6.5.0/24")
    sysctls = (
        "--sysctl=net.ipv4.conf.default.arp_ignore=1",
        "--sysctl=net.ipv6.conf.all.disable_ipv6=1",
    )
    one, peer = scene.run(first, *sysctls), scene.run(second)
    connect(one, second)
    connect(one, third)
    assert names(one) == ["eth0", "eth10", "eth11"]

    def setting(path: str) -> str:
        return one.net("cat", f"/proc/sys/net/{path}").stdout.strip()

    assert setting("ipv4/conf/eth10/arp_ignore") == "1"
    assert setting("ipv6/conf/eth10/disable_ipv6") == "0"
    assert setting("ipv6/conf/eth11/disable_ipv6") == "1"
    assert one.pings(peer.ip6(second))


def test_who_chooses(scene: Scene) -> None:
    """`moved` keeps Docker's way and `direct` takes the other, also for one alone."""
    moved = scene.network("-o", "pynet.attach=moved", "--subnet", "10.6.6.0/24")
    direct = scene.network("-o", "pynet.attach=direct", "--subnet", "10.6.7.0/24")
    auto = scene.network("-o", "pynet.prefix=lan", "--subnet", "10.6.8.0/24")
    one = scene.run(auto)
    assert names(one) == ["lan0"]
    connect(one, moved)
    assert names(one) == ["eth0", "lan0"]
    connect(one, direct)
    assert names(one) == ["eth0", "eth10", "lan0"]
    for network in (moved, direct, auto):
        disconnect(one, network)
    assert names(one) == []
    connect(one, direct)
    assert names(one) == ["eth10"]
    connect(one, auto)
    assert names(one) == ["eth10", "lan10"]
    disconnect(one, auto)
    connect(one, auto, DriverOpts={"pynet.attach": "moved"})
    assert "lan10" not in names(one)
    assert agrees(scene.host)


def test_a_restart_gives_dockers_names(scene: Scene) -> None:
    """Where Docker makes the sandbox after it asked, a restart takes its own way."""
    first, second = scene.network(*both(6)), scene.network(*both(7))
    one, peer = scene.run(first), scene.run(second)
    connect(one, second)
    scene.host.docker("restart", "-t0", one.name)
    one.look()
    assert names(one) == ["eth0", "eth1"]
    assert one.pings(peer.ip(second))
    assert one.pings(peer.ip6(second))
    assert agrees(scene.host)


def test_twenty_at_once(scene: Scene) -> None:
    """Many connect and disconnect at once, twice, while others talk."""
    first, second = scene.network(*both(8)), scene.network(*both(9))
    with ThreadPoolExecutor(4) as pool:
        boxes = list(pool.map(lambda _: scene.run(first), range(AT_ONCE)))
    for _ in range(2):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda one: connect(one, second), boxes))
        assert all(names(one) == ["eth0", "eth10"] for one in boxes)
        assert len({one.ip(second) for one in boxes}) == AT_ONCE
        assert boxes[0].pings(boxes[-1].ip(second))
        assert agrees(scene.host)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda one: disconnect(one, second), boxes))
        assert all(names(one) == ["eth0"] for one in boxes)
        (left,) = [n for n in told(scene.host, "networks") if n["name"] == second]
        assert left["endpoints"] == 0
    scene.remove(*boxes)
    scene.remove_network(second)


def test_disconnect_under_traffic(scene: Scene) -> None:
    """A container that talks all the time is disconnected and connected again."""
    first, second = scene.network(*both(10)), scene.network(*both(11))
    one, peer = scene.run(first), scene.run(second)
    connect(one, second)
    ending = threading.Event()

    def talk() -> None:
        while not ending.is_set():
            one.pings(peer.ip(second))

    talkers = [threading.Thread(target=talk) for _ in range(2)]
    for talker in talkers:
        talker.start()
    try:
        for _ in range(8):
            disconnect(one, second)
            assert names(one) == ["eth0"]
            connect(one, second)
    finally:
        ending.set()
        for talker in talkers:
            talker.join()
    assert one.pings(peer.ip(second))
    assert agrees(scene.host)


def test_the_same_address_at_once(scene: Scene) -> None:
    """An address that was just given back is had by the next who asks for it."""
    network, other = scene.network(*both(12)), scene.network(*both(13))
    first, second = scene.run(network), scene.run(network)
    wish = {"IPAMConfig": {"IPv4Address": "10.5.13.77"}}
    for one in (first, second) * 3:
        connect(one, other, **wish)
        assert one.ip(other) == "10.5.13.77"
        assert one.pings("10.5.13.1")
        disconnect(one, other)
    for _ in range(2):
        one = scene.run(network, "--ip", "10.5.12.77")
        assert one.pings("10.5.12.1")
        scene.remove(one)


@contextmanager
def live_restore(host: Host) -> Iterator[None]:
    """Have a dockerd with live-restore as long as the block lasts."""
    host.stop_dockerd()
    host.start_dockerd(["--live-restore"])
    try:
        yield
    finally:
        host.stop_dockerd()
        host.start_dockerd()


def test_live_restore(scene: Scene) -> None:
    """
    What was built stays while dockerd restarts, and is taken back after.

    1. A container has eth10, and dockerd with live-restore is killed and started.
    2. Traffic goes on; the container is disconnected and connected.
    """
    host = scene.host
    with live_restore(host):
        direct = ("-o", "pynet.attach=direct")
        first, second = scene.network(*both(14)), scene.network(*both(15), *direct)
        one, peer = scene.run(first), scene.run(second)
        connect(one, second)
        host.kill_dockerd()
        assert one.pings(peer.ip(second))
        host.start_dockerd(["--live-restore"])
        time.sleep(3.0)
        assert one.pings(peer.ip(second))
        assert agrees(host)
        one.look()
        disconnect(one, second)
        assert names(one) == ["eth0"]
        connect(one, second)
        assert one.pings(peer.ip(second))
        scene.close()


def test_auto_with_live_restore(scene: Scene) -> None:
    """
    With live-restore all is Docker's way, so that a new dockerd can take all back.

    1. A container is connected to a second network, and dockerd is killed and started.
    2. It is connected to a bridge of Docker's, and disconnected from both; again.
    Result: nothing is refused; the container has what Docker says, and no more.
    """
    host = scene.host
    with live_restore(host):
        first, second = scene.network(*both(18)), scene.network(*both(19))
        own = scene.network(driver="bridge")
        one, peer = scene.run(first), scene.run(second)
        assert eventually(lambda: told(host, "status")["docker"] == "connected")
        connect(one, second)
        assert names(one) == ["eth0", "eth1"]
        for _ in range(4):
            host.kill_dockerd()
            host.start_dockerd(["--live-restore"])
            connect(one.look(), own)
            assert len(names(one)) == 3
            disconnect(one, second)
            disconnect(one, own)
            assert names(one) == ["eth0"]
            connect(one, second)
            assert one.pings(peer.ip(second))
        scene.close()


def test_dockerd_restarts_without_live_restore(scene: Scene) -> None:
    """What was built ends with its container, and comes by Docker's names."""
    host = scene.host
    first, second = scene.network(*both(16)), scene.network(*both(17))
    one, peer = (
        scene.run(first, "--restart=always"),
        scene.run(second, "--restart=always"),
    )
    connect(one, second)
    host.kill_dockerd()
    host.start_dockerd()
    assert eventually(lambda: one.look().state["State"]["Running"], 20.0)
    assert eventually(lambda: peer.look().state["State"]["Running"], 20.0)
    assert eventually(lambda: one.look().pings(peer.look().ip(second)), 20.0)
    assert eventually(lambda: agrees(host), 10.0)


def test_the_daemon_is_killed(scene: Scene) -> None:
    """A daemon that comes back finds what it built, and takes it back when asked."""
    host = scene.host
    first, second = scene.network(*both(18)), scene.network(*both(19))
    one, peer = scene.run(first), scene.run(second)
    connect(one, second)
    host.kill_pynet()
    assert one.pings(peer.ip(second))
    host.start_pynet()
    assert agrees(host)
    assert names(one) == ["eth0", "eth10"]
    disconnect(one, second)
    assert names(one) == ["eth0"]
    assert eventually(lambda: agrees(host))


def test_a_lost_interface_comes_back(scene: Scene) -> None:
    """A deleted pair is built again, under its name, with addresses and the way out."""
    first, second = scene.network("--internal"), scene.network(*both(20))
    one = scene.run(first)
    connect(one, second)
    before = ways(one)
    assert before == {"4": "10.5.20.1 eth10", "6": "fd05:20::1 eth10"}
    one.net("ip", "link", "del", "eth10")
    assert eventually(lambda: names(one) == ["eth0", "eth10"], 15.0)
    assert eventually(lambda: ways(one) == before, 10.0)
    assert one.pings("10.5.20.1")
    assert one.pings("fd05:20::1")
    assert eventually(lambda: agrees(scene.host))


def test_a_name_that_the_container_has_taken(scene: Scene) -> None:
    """A name that is in use in the container is passed by."""
    first, second = scene.network(*both(21)), scene.network(*both(22))
    one, peer = scene.run(first), scene.run(second)
    one.net("ip", "link", "add", "eth10", "type", "veth")
    connect(one, second)
    assert {"eth0", "eth10", "eth11"} <= set(names(one))
    assert one.pings(peer.ip(second))
