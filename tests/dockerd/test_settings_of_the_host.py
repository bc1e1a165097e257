"""pynet on hosts of all kinds: what is set there before must neither matter nor change."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import (
    Container,
    Scene,
    Server,
    accepts,
    eventually,
    left_of_pynet,
)

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(90)]

LAN4, LAN6 = "192.0.2.11", "2001:db8:1::11"
OUT4, OUT6 = "192.0.2.1", "2001:db8:1::1"
POOLS4 = ("--subnet", "10.65.1.0/24")
POOLS = (*POOLS4, "--ipv6", "--subnet", "fd65:1::/64")
WEB = ("-p", "8701:80", "-p", "8701:80/udp", "-p", "127.0.0.1:8702:80")


@pytest.fixture(scope="module")
def laboratory(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host whose settings the tests change, and set back."""
    return make_module_lab().hosts[0]


def assert_pair_works(scene: Scene, web: Container, peer: Container) -> None:
    """Assert that two containers reach all they should, and are reached."""
    families = [(web.ip(), LAN4, OUT4), (web.ip6(), LAN6, OUT6)]
    servers = [Server(scene.outside, "outside", 8700, kind) for kind in ("tcp", "udp")]
    try:
        for own, lan, out in families[: 2 if web.ip6() else 1]:
            assert peer.pings(own)
            assert peer.pings(out)
            for client, address, port in (
                (peer, out, 8700),
                (peer, own, 80),
                (scene.outside, lan, 8701),
                (scene.place, lan, 8701),
                (peer, lan, 8701),
                (web, lan, 8701),
            ):
                assert client.tcp(address, port) is not None
                assert client.udp(address, port) is not None
        for port in (8701, 8702):
            assert scene.place.tcp("127.0.0.1", port) is not None
        assert scene.outside.refused([(LAN4, 8702)])
        assert peer.pings_name(web.name)
    finally:
        for server in servers:
            server.close()


def assert_works(host: Host, *options: str) -> None:
    """Assert that a new network with two containers does all it should."""
    with Scene(host) as scene:
        network = scene.network(*options)
        web, peer = scene.run(network, *WEB), scene.run(network)
        for kind in ("tcp", "udp"):
            scene.serve(web, 80, kind=kind)
        assert_pair_works(scene, web, peer)


def assert_clean(host: Host) -> None:
    """Assert that nothing of pynet's is left; an audit may need another turn."""
    eventually(lambda: not left_of_pynet(host))
    assert left_of_pynet(host) == []


# Settings that come and go.


@contextmanager
def sysctls(host: Host, value: str, *names: str) -> Iterator[None]:
    """Set some sysctls of a host, and set them back."""
    with ExitStack() as stack:
        for name in names:
            stack.callback(host.sysctl, name, host.sysctl(name))
            host.sysctl(name, value)
        yield


@contextmanager
def policy(host: Host, word: str) -> Iterator[None]:
    """Set the policy of FORWARD in both families."""
    tools = ("iptables", "ip6tables")
    before = {
        tool: host.exec(tool, "-S", "FORWARD").stdout.split("\n")[0].split()[-1]
        for tool in tools
    }
    for tool in tools:
        host.exec(tool, "-P", "FORWARD", word)
    try:
        yield
    finally:
        for tool in tools:
            host.exec(tool, "-P", "FORWARD", before[tool])


@contextmanager
def foreign_drop(host: Host) -> Iterator[None]:
    """Let FORWARD end with a rule of somebody's that drops all."""
    tools = ("iptables", "ip6tables")
    for tool in tools:
        host.exec(tool, "-A", "FORWARD", "-j", "DROP")
    try:
        yield
    finally:
        for tool in tools:
            host.exec(tool, "-D", "FORWARD", "-j", "DROP")


def rp_filter(host: Host, value: str) -> AbstractContextManager[None]:
    """Set the reverse path filter, for all devices there are and those to come."""
    devices = ("all", "default", "eth0")
    return sysctls(host, value, *(f"net.ipv4.conf.{d}.rp_filter" for d in devices))


def bridge_nf(host: Host, value: str) -> AbstractContextManager[None]:
    """Let frames that a bridge passes on see the host's rules, or not."""
    tools = ("iptables", "ip6tables")
    return sysctls(host, value, *(f"net.bridge.bridge-nf-call-{t}" for t in tools))


Setting = Callable[[Host], AbstractContextManager[None]]

DROP: Setting = partial(policy, word="DROP")
STRICT: Setting = partial(rp_filter, value="1")
NF_OFF: Setting = partial(bridge_nf, value="0")
NF_ON: Setting = partial(bridge_nf, value="1")
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "policy-drop": (DROP,),
    "policy-accept": (partial(policy, word="ACCEPT"),),
    "foreign-drop": (foreign_drop,),
    "rp-filter-1": (STRICT,),
    "rp-filter-2": (partial(rp_filter, value="2"),),
    "bridge-nf-0": (NF_OFF,),
    "bridge-nf-1": (NF_ON,),
    "bridge-nf-0-and-the-rest": (DROP, foreign_drop, STRICT, NF_OFF),
    "bridge-nf-1-and-the-rest": (DROP, foreign_drop, STRICT, NF_ON),
}


@contextmanager
def set_on(host: Host, name: str) -> Iterator[None]:
    """Make some settings of a host, and undo them."""
    with ExitStack() as stack:
        for setting in SETTINGS[name]:
            stack.enter_context(setting(host))
        yield


@pytest.mark.parametrize("name", SETTINGS)
def test_a_network_works_with(laboratory: Host, name: str) -> None:
    """Containers reach each other and out, and are reached; then nothing is left."""
    with set_on(laboratory, name):
        before = accepts(laboratory)
        assert_works(laboratory, *POOLS)
        assert_clean(laboratory)
        assert accepts(laboratory) == before


@pytest.mark.parametrize("value", ["0", "1"])
def test_inter_container_traffic_is_off_with_bridge_nf(
    laboratory: Host, value: str
) -> None:
    """Whether or not the bridge asks the host's rules, only published ports are open."""
    with bridge_nf(laboratory, value), Scene(laboratory) as scene:
        network = scene.network("-o", "pynet.icc=false", *POOLS)
        web, peer = scene.run(network, *WEB), scene.run(network)
        scene.serve(web, 80)
        assert peer.refused([(web.ip(), 80), (web.ip6(), 80)])
        for client in (peer, web, scene.outside):
            assert client.tcp(LAN4, 8701) is not None
            assert client.tcp(LAN6, 8701) is not None


def test_settings_of_a_network_in_use_may_change(laboratory: Host) -> None:
    """What works goes on when policy, filters and bridge-nf are changed under it."""
    with Scene(laboratory) as scene:
        network = scene.network(*POOLS4)
        web, peer = scene.run(network, *WEB), scene.run(network)
        for kind in ("tcp", "udp"):
            scene.serve(web, 80, kind=kind)
        for name in ("policy-drop", "policy-accept", "bridge-nf-0", "bridge-nf-1"):
            with set_on(laboratory, name):
                assert_pair_works(scene, web, peer)


# iptables, and who starts first.


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_a_network_works_with_iptables(
    kind: str,
    make_lab: Callable[..., Lab],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever iptables dockerd and pynet find on PATH, FORWARD lets all pass."""
    programs = tmp_path_factory.mktemp("programs")
    for family in ("iptables", "ip6tables"):
        for end in ("", "-save", "-restore"):
            target = shutil.which(f"{family}-{kind}{end}")
            assert target is not None
            (programs / f"{family}{end}").symlink_to(target)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    host = make_lab().hosts[0]
    shown = host.exec("iptables", "-V").stdout
    assert ("legacy" in shown) == (kind == "legacy")
    assert "-P FORWARD DROP" in host.exec("iptables", "-S", "FORWARD").stdout
    before = accepts(host)
    with foreign_drop(host):
        assert_works(host, *POOLS)
    assert eventually(lambda: accepts(host) == before)
    assert_clean(host)


def test_legacy_tables_beside_nftables_do_not_stop_us(
    make_lab: Callable[..., Lab],
) -> None:
    """On a host that also has legacy tables with policy DROP traffic passes as well."""
    host = make_lab().hosts[0]
    host.exec("iptables-legacy", "-P", "FORWARD", "DROP")
    assert_works(host, *POOLS4)
    shown = partial(host.exec, "iptables-legacy", "-S")
    assert eventually(lambda: "pynet" not in shown().stdout)


def test_dockerd_starts_after_pynet(make_lab: Callable[..., Lab]) -> None:
    """With pynet up first, before any chain of Docker's, all works as ever."""
    lab = make_lab(serve=False)
    host = lab.hosts[0]
    host.power_cut()
    host.boot()
    host.start_pynet()
    assert "DOCKER-USER" not in host.exec("iptables", "-S").stdout
    host.start_dockerd()
    assert_works(host, *POOLS)
    assert_clean(host)


def test_networks_are_there_before_dockerds_chains(
    make_lab: Callable[..., Lab],
) -> None:
    """After a reboot pynet makes networks, dockerd comes later, and its containers work."""
    host = make_lab().hosts[0]
    with Scene(host) as scene:
        network = scene.network(*POOLS)
        options = ("--restart", "always")
        made = scene.run(network, *options, *WEB), scene.run(network, *options)
        host.stop_pynet()
        host.power_cut()
        host.boot()
        host.start_pynet()
        rules = accepts(host)
        assert len([rule for rule in rules if "pynet" in rule]) == 2
        host.start_dockerd()
        assert eventually(lambda: all(running(c) for c in made))
        web, peer = made
        for kind in ("tcp", "udp"):
            scene.serve(web, 80, kind=kind)
        assert_pair_works(scene, web, peer)
    assert_clean(host)
    assert accepts(host) == ["-N DOCKER-USER", "-A DOCKER-USER -j RETURN"]


def running(container: Container) -> bool:
    """Look whether a container runs."""
    return bool(container.look().state["State"]["Running"])


# IPv6.


def test_ipv6_is_off_on_the_host(make_lab: Callable[..., Lab]) -> None:
    """A network with IPv6 is refused, naming the setting; one with IPv4 works."""
    host = make_lab().hosts[0]
    host.sysctl("net.ipv6.conf.all.disable_ipv6", "1")
    host.sysctl("net.ipv6.conf.default.disable_ipv6", "1")
    with Scene(host) as scene:
        text = scene.refused_network(*POOLS)
        assert "net.ipv6.conf.all.disable_ipv6" in text
    assert_clean(host)
    assert_works(host, *POOLS4)
    assert_clean(host)


def test_the_default_route_of_router_advertisements_stays(
    make_lab: Callable[..., Lab],
) -> None:
    """A host that listens to a router keeps the route, and goes on listening."""
    lab = make_lab()
    host = lab.hosts[0]
    assert host.sysctl("net.ipv6.conf.eth0.accept_ra") == "1"
    assert host.sysctl("net.ipv6.conf.all.forwarding") == "0"
    host.exec("ip", "-6", "route", "del", "default")
    # Else it would deny to be a router as soon as it is asked for its MAC.
    lab.outside.sysctl("net.ipv6.conf.all.forwarding", "1")
    lab.outside.exec("ip", "addr", "add", "2001:db8:99::1/128", "dev", "lo")

    def routed() -> bool:
        advertise(lab, 1800)
        shown = host.exec("ip", "-6", "route", "show", "default").stdout
        return "proto ra" in shown

    assert eventually(routed)
    before = host.exec("ip", "-6", "route", "show", "default").stdout.split("expires")[
        0
    ]
    server = Server(Scene(host).outside, "outside", 8710)
    try:
        with Scene(host) as scene:
            one = scene.run(scene.network(*POOLS))
            after = host.exec("ip", "-6", "route", "show", "default").stdout
            assert after.split("expires")[0] == before
            assert host.sysctl("net.ipv6.conf.all.forwarding") == "1"
            assert host.sysctl("net.ipv6.conf.eth0.accept_ra") == "2"
            answer = one.tcp("2001:db8:99::1", 8710)
            assert answer is not None
            assert answer.client == LAN6
        assert "proto ra" in host.exec("ip", "-6", "route", "show", "default").stdout
        # It listens: the router's word that it goes is heard.
        advertise(lab, 0)
        assert eventually(
            lambda: not host.exec("ip", "-6", "route", "show", "default").stdout
        )
    finally:
        server.close()


def advertise(lab: Lab, lifetime: int) -> None:
    """Send a router advertisement to all hosts (RFC 4861, 4.2)."""
    shown = json.loads(lab.outside.exec("ip", "-j", "link", "show", "underlay").stdout)
    place = Scene(lab.hosts[0]).outside
    with place.open(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        packet = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, lifetime, 0, 0)
        raw.sendto(packet, ("ff02::1", 0, 0, shown[0]["ifindex"]))


def test_a_container_gives_the_host_no_route(laboratory: Host) -> None:
    """A router advertisement from a container changes nothing on the host."""
    with Scene(laboratory) as scene:
        one = scene.run(scene.network(*POOLS), "--cap-add", "NET_ADMIN")
        shown = json.loads(one.net("ip", "-j", "link", "show", "eth0").stdout)
        before = laboratory.exec("ip", "-6", "route").stdout
        with one.open(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            packet = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)

            def sent() -> bool:
                try:
                    raw.sendto(packet, ("ff02::1", 0, 0, shown[0]["ifindex"]))
                except OSError:
                    return False
                return True

            # Its link-local address takes a second to be its own.
            assert eventually(sent)
        assert not eventually(
            lambda: laboratory.exec("ip", "-6", "route").stdout != before, 0.3
        )


def test_the_hosts_settings_are_as_before_or_listed(
    make_lab: Callable[..., Lab],
) -> None:
    """After the last network every setting is as before, but for what census names."""
    host = make_lab().hosts[0]

    def settings() -> dict[str, str]:
        lines = host.exec("sysctl", "-a", check=False).stdout.splitlines()
        pairs = (line.partition(" = ") for line in lines if line.startswith("net."))
        return {
            name: value for name, _, value in pairs if "conntrack_count" not in name
        }

    before = settings()
    assert_works(host, *POOLS)
    after = settings()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    listed = json.loads(host.pynet("census", "--json").stdout)["settings"]
    names = {path.replace("/", ".") for path in listed}
    # The kernel itself passes forwarding on to every device.
    spread = {
        n for n in changed if n.startswith("net.ipv6.conf.") and "forwarding" in n
    }
    assert changed - spread <= names
    for path, values in listed.items():
        assert before[path.replace("/", ".")] == values["was"]
