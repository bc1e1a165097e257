"""
Trace and doctor: each step of the way is broken in turn, and the right one is named.

The daemons of this lab report drift and leave it (`--repair=false`). What a trace says
mends it is then typed, as a person would, until a packet arrives.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.plan import devices
from tests.dockerd.cluster import Cluster, etcdctl, fresh_pools
from tests.dockerd.tools import Container, eventually, inspected

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(180)]

WRONG = "02:00:00:00:00:99"
REMEDIES = 5
"""One fault can cause others: a bridge that was down has lost its neighbours."""


@dataclass
class Stage:
    """Two containers on two hosts, and two on one."""

    cluster: Cluster
    network: str
    web: Container
    two: Container
    db: Container
    id: str = ""
    """pynet's own id of the network."""

    @property
    def near(self) -> Host:
        return self.web.host

    @property
    def far(self) -> Host:
        return self.db.host

    def port(self, one: Container) -> str:
        """Name a container's port of its bridge."""
        return devices.port(one.attachment(self.network)["EndpointID"])

    def mac(self, one: Container) -> str:
        """Return a container's MAC."""
        return str(one.attachment(self.network)["MacAddress"])

    def doctor(self) -> tuple[int, list[str]]:
        """Return a doctor's exit code on the first host, and what is not well."""
        done = self.near.pynet("doctor", "--json", check=False)
        assert done.stdout, done.stderr
        found = json.loads(done.stdout)["findings"]
        return done.returncode, [
            f"{one['severity']} {one['check']}: {one['what']}"
            for one in found
            if one["severity"] in {"warning", "error"}
            and "repair=false" not in one["what"]
        ]

    def trace(self, source: str = "", target: str = "") -> dict[str, Any]:
        """Trace on the first host; the exit code says what the answer says."""
        words = (source or self.web.name, target or self.db.ip(self.network))
        done = self.near.pynet("trace", *words, "--json", check=False)
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if found["reachable"] else 1)
        return found


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts that leave what is broken as it is."""
    return make_module_lab(2, etcd=1, pynet_args=["--repair=false"])


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Iterator[Stage]:
    """Return containers on a network of both families."""
    with Cluster(lab) as cluster:
        name = cluster.network()
        web, db = cluster.run(name)
        two = cluster.scenes[0].run(name)
        (network,) = {inspected(host, name)["network"] for host in lab.hosts}
        yield Stage(cluster, name, web, two, db, network)


@pytest.fixture
def stage(whole: Stage) -> Iterator[Stage]:
    """Return the same; when the test is over all must be as it was."""
    yield whole
    found = whole.trace()
    assert is_well(found), found["verdict"]


# What is broken: where, by which commands, and what must be named.
# {v}, {b} are the VXLAN device and the bridge, {web} and {db} the containers' ports.
INSIDE = "nsenter --net={sandbox}"
ELEMENT = "ip netns exec pynet nft delete element bridge pynet "
OUTWARD = "iptables -A OUTPUT -o eth0 -j WALL"
WALL = (
    "nft add table inet wall; nft add chain inet wall in "
    "'{{ type filter hook input priority 5; }}'; "
)
NEAR, FAR = "near", "far"
BREAKS: dict[str, tuple[str, str, str, str]] = {
    "container's device down": (FAR, INSIDE + " ip link set eth0 down", FAR, "interface"),
    "address lost in the container": (
        NEAR, INSIDE + " ip addr del {web4}/24 dev eth0", NEAR, "interface",
    ),
    "wrong neighbour in the container": (
        NEAR, INSIDE + f" ip neigh replace {{db4}} lladdr {WRONG} dev eth0", NEAR,
        "container's neighbour",
    ),
    "port down": (NEAR, "ip -n pynet link set {web} down", NEAR, "port"),
    "port out of the bridge": (FAR, "ip -n pynet link set {db} nomaster", FAR, "port"),
    "bridge down": (FAR, "ip -n pynet link set {b} down", FAR, "bridge"),
    "anti-spoof element missing": (
        NEAR,
        ELEMENT + 'ips4 {{ "{web}" . {web4} }}',
        NEAR, "anti-spoof",
    ),
    "neighbours missing": (
        NEAR,
        "ip -n pynet neigh del {db4} dev {b}; ip -n pynet neigh del {db6} dev {b}; "
        + INSIDE + " ip neigh flush dev eth0",
        NEAR, "neighbour",
    ),
    "bridge entry missing": (
        NEAR, "bridge -n pynet fdb del {dbmac} dev {v} master", NEAR, "bridge entry",
    ),
    "tunnel entry to another host": (
        NEAR,
        "bridge -n pynet fdb replace {dbmac} dev {v} dst 192.0.2.99 self permanent",
        NEAR, "tunnel entry",
    ),
    "way back missing": (
        FAR, "bridge -n pynet fdb del {webmac} dev {v} self", FAR, "tunnel entry",
    ),
    "VXLAN device down": (NEAR, "ip -n pynet link set {v} down", NEAR, "tunnel device"),
    "guard without the other's VTEP": (
        FAR, "nft delete element inet pynet vteps4 {{ {nearvtep} }}", FAR, "tunnel guard",
    ),
    "far iptables": (
        FAR, "iptables -I INPUT -p udp --dport 4789 -j DROP", FAR, "firewall in",
    ),
    "near iptables, another chain, by address": (
        NEAR,
        "iptables -N WALL; iptables -A WALL -d {farvtep}/32 -j REJECT; " + OUTWARD,
        NEAR, "firewall out",
    ),
    "far nftables": (
        FAR,
        WALL + "nft add rule inet wall in udp dport 4000-5000 counter drop",
        FAR, "firewall in",
    ),
}  # fmt: skip


def values(stage: Stage, host: Host) -> dict[str, str]:
    """Return what the commands above are about."""
    name, network = stage.network, stage.id
    box = stage.web if host is stage.near else stage.db
    return {
        "v": devices.vxlan(network),
        "b": devices.bridge(network),
        "web": stage.port(stage.web),
        "db": stage.port(stage.db),
        "web4": stage.web.ip(name),
        "db4": stage.db.ip(name),
        "db6": stage.db.ip6(name),
        "webmac": stage.mac(stage.web),
        "dbmac": stage.mac(stage.db),
        "nearvtep": str(stage.near.address4),
        "farvtep": str(stage.far.address4),
        "sandbox": box.state["NetworkSettings"]["SandboxKey"],
    }


def mend(stage: Stage, found: dict[str, Any]) -> None:
    """Type what a trace says mends it."""
    assert found["remedy"], found["verdict"]
    host = stage.cluster.lab.host(found["at"]["host"])
    host.exec("sh", "-ec", found["remedy"])


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_named_and_mended(whole: Stage, what: str) -> None:
    """A trace names the step and the host where it dies; what it says mends it."""
    stage = whole
    place, commands, at, step = BREAKS[what]
    hosts = {NEAR: stage.near, FAR: stage.far}
    host = hosts[place]
    host.exec("sh", "-ec", commands.format(**values(stage, host)))
    found = stage.trace()
    try:
        assert found["verdict"].startswith(f"dies on {hosts[at].name}, {step}: ")
        for _ in range(REMEDIES):
            # What was just put up may lose a packet, with nothing amiss any more.
            if found["at"] is not None:
                mend(stage, found)
            found = stage.trace()
            if is_well(found):
                break
    finally:
        host.exec("sh", "-c", "iptables -F OUTPUT; iptables -X WALL", check=False)
        host.exec("nft", "delete", "table", "inet", "wall", check=False)
    assert is_well(found), found["verdict"]


def is_well(found: dict[str, Any]) -> bool:
    """Tell whether a trace found nothing amiss."""
    return found["reachable"] and all(hop["well"] for hop in found["hops"])


def test_all_is_well(stage: Stage) -> None:
    """Where all is well each step is, on both hosts, and packets of both sizes pass."""
    found = stage.trace()
    assert found["reachable"]
    assert {hop["host"] for hop in found["hops"]} == {"h1", "h2"}
    assert [hop for hop in found["hops"] if not hop["well"]] == []
    sizes = sorted(probe["bytes"] for probe in found["probes"])
    assert sizes == [84, 84, 84, 1450, 1450]
    kinds = {key.partition("/")[0] for key in stage.cluster.keys()}  # noqa: SIM118
    assert not kinds & {"questions", "answers"}


def test_from_the_other_end(stage: Stage) -> None:
    """Order does not matter, and a name of another host's container is found."""
    found = stage.trace(stage.db.name, stage.web.name)
    assert found["reachable"]
    assert found["from"]["host"] == "h1"


def test_two_isolated_ports(stage: Stage) -> None:
    """On one host too the step is named: two ports that are isolated."""
    ports = [stage.port(one) for one in (stage.web, stage.two)]
    for port in ports:
        stage.near.exec(
            *("bridge", "-n", "pynet", "link", "set"), *("dev", port, "isolated", "on")
        )
    found = stage.trace(target=stage.two.name)
    assert found["verdict"].startswith(
        f"dies on h1, port: {ports[0]}: isolated is True and should be False"
    )
    mend(stage, found)
    found = stage.trace(target=stage.two.name)
    assert found["reachable"]
    assert f"port: {ports[1]}: isolated is True" in found["verdict"]
    mend(stage, found)
    assert stage.trace(target=stage.two.name)["remedy"] == ""


def test_no_way_to_the_other_host(stage: Stage) -> None:
    """A route that rejects the other host's tunnels is named."""
    words = ("blackhole", f"{stage.far.address4}/32")
    stage.near.exec("ip", "route", "add", *words)
    try:
        found = stage.trace()
    finally:
        stage.near.exec("ip", "route", "del", *words)
    assert found["verdict"] == "dies on h1, route: there is none"
    assert str(stage.far.address4) in found["remedy"]


def test_a_small_underlay(stage: Stage) -> None:
    """An underlay without room for full packets is named, though small ones pass."""
    stage.far.exec("ip", "link", "set", "eth0", "mtu", "1400")
    try:
        found = stage.trace()
    finally:
        stage.far.exec("ip", "link", "set", "eth0", "mtu", "1500")
    assert found["verdict"] == "dies on h2, underlay: MTU 1400"
    assert "mtu 1500" in found["remedy"]
    assert "pynet.mtu=1350" in found["remedy"]


def test_the_wire_is_cut(stage: Stage) -> None:
    """Where all is well on both hosts, what is between them is named."""
    stage.cluster.lab.cut("h1", "h2")
    try:
        found = stage.trace()
    finally:
        stage.cluster.lab.mend("h1", "h2")
    assert found["verdict"].startswith("dies between the hosts: all is well on both")
    assert "answers no ping either" in found["verdict"]


def test_the_other_hosts_cable(stage: Stage) -> None:
    """A host without its cable cannot be asked, and that is said."""
    stage.far.unplug()
    try:
        found = stage.trace()
    finally:
        stage.far.plug()
    assert "h2 was not looked at" in found["verdict"]
    assert eventually(lambda: stage.trace()["reachable"], 30)


def test_the_other_daemon_is_stopped(stage: Stage) -> None:
    """A fault on a host whose daemon is stopped cannot be seen, and that is said."""
    port = stage.port(stage.db)
    stage.far.stop_pynet()
    stage.far.exec("ip", "-n", "pynet", "link", "set", port, "down")
    try:
        found = stage.trace()
    finally:
        stage.far.exec("ip", "-n", "pynet", "link", "set", port, "up")
        stage.far.start_pynet()
    assert "h2 was not looked at: its daemon was stopped" in found["verdict"]
    assert eventually(lambda: is_well(stage.trace()), 30)


def test_a_host_that_is_hidden(stage: Stage) -> None:
    """A host whose lease ran out is named, as what it has is hidden."""
    (lease,) = [
        key
        for key in etcdctl(
            stage.cluster.lab, "get", "--prefix", "/pynet/v1/alive/", "--keys-only"
        ).stdout.split()
        if key.rpartition("/")[2] == identity(stage.far)
    ]
    stage.far.kill_pynet()
    etcdctl(stage.cluster.lab, "del", lease)
    try:
        assert eventually(lambda: not stage.trace()["reachable"], 30)
        found = stage.trace()
    finally:
        stage.far.start_pynet()
    assert found["verdict"].startswith("dies on h1, host: its lease ran out")
    assert "start pynet" in found["remedy"]
    assert eventually(lambda: is_well(stage.trace()), 30)


def identity(host: Host) -> str:
    """Return a host's id."""
    return str(
        json.loads(host.pynet("status", "--json", check=False).stdout)["host"]["id"]
    )


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("nobody", "{db}"), "no endpoint is called 'nobody'"),
        (("{web}", "{web}"), "are one endpoint"),
        (("{db}", "{db}"), "are one endpoint"),
    ],
)
def test_who_cannot_be_traced(stage: Stage, pair: tuple[str, str], said: str) -> None:
    """What is no pair of endpoints is refused with a sentence."""
    given = {"web": stage.web.name, "db": stage.db.ip(stage.network)}
    words = [word.format(**given) for word in pair]
    done = stage.near.pynet("trace", *words, check=False)
    assert done.returncode == 1
    assert said in done.stderr


def test_a_bridge_network(stage: Stage) -> None:
    """On a network of one host too: a port that is down is named and mended."""
    scene = stage.cluster.scenes[0]
    name = scene.network("-o", "pynet.mode=bridge", "--subnet", fresh_pools()[0])
    one, other = scene.run(name), scene.run(name)
    inspected(scene.host, name)
    assert eventually(
        lambda: (
            scene.host.pynet("trace", one.name, other.name, check=False).returncode == 0
        )
    )
    port = devices.port(other.attachment(name)["EndpointID"])
    scene.host.exec("ip", "link", "set", port, "down")
    found = stage.trace(one.name, other.name)
    assert found["verdict"].startswith(f"dies on h1, port: {port}: up is False")
    mend(stage, found)
    assert stage.trace(one.name, other.name)["reachable"]


def test_without_talk(stage: Stage) -> None:
    """A network made without inter-container traffic is named as such."""
    scene = stage.cluster.scenes[0]
    subnet = ("--subnet", fresh_pools()[0])
    name = scene.network("-o", "pynet.mode=bridge", "-o", "pynet.icc=false", *subnet)
    one, other = scene.run(name), scene.run(name)
    assert eventually(
        lambda: (
            "pynet.icc=false"
            in scene.host.pynet("trace", one.name, other.name, check=False).stdout
        )
    )


# The doctor.


def passing(rule: str) -> str:
    """Return the commands for a rule where a bridge passes frames on."""
    chain = "'{ type filter hook forward priority 1; }'"
    return "; ".join(
        (
            "nft add table bridge wall",
            f"nft add chain bridge wall pass {chain}",
            f"nft add rule bridge wall pass {rule} drop",
        )
    )


OPEN = "nft delete table bridge wall"
INSIDE_PYNET = "ip netns exec pynet "
OTHERS = "pynet:ffffffff:network:x"
UNDERLAY = "underlay"
AMISS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "a small path": (
        UNDERLAY,
        "ip link set h2 mtu 1400", "ip link set h2 mtu 1500; ip link set underlay mtu 1500",
        ("error host h2: packets of 1400 bytes pass, those of 1500 do not",),
    ),
    "UDP blocked on its way there": (
        UNDERLAY, passing("ip saddr 192.0.2.11 udp dport 4789"), OPEN,
        ("error host h2: frames do not arrive at h2",),
    ),
    "UDP blocked on its way back": (
        UNDERLAY, passing("ip saddr 192.0.2.12 udp dport 4789"), OPEN,
        ("error host h2: frames arrive at h2, and nothing comes back",),
    ),
    "UDP inside the tunnel": (
        FAR,
        f'{INSIDE_PYNET} sh -ec "{passing("meta l4proto udp")}"',
        INSIDE_PYNET + OPEN,
        ("warning host h2: pings pass the tunnel, UDP does not",),
    ),
    "the other's firewall": (
        FAR, "iptables -I INPUT -p udp --dport 4789 -j DROP",
        "iptables -D INPUT -p udp --dport 4789 -j DROP",
        (
            "error host h2: h2, firewall in: iptables: -A INPUT -p udp",
            "error host h2: frames do not arrive at h2",
        ),
    ),
    "a device of another pynet": (
        NEAR,
        f"ip link add pn-x group 28782 type bridge; ip link set pn-x alias {OTHERS}",
        "ip link del pn-x",
        ("warning leftovers: device pn-x is another pynet's",),
    ),
    "a leftover": (
        NEAR,
        "ip -n pynet link add pn-0123456789 group 28782 type bridge",
        "ip -n pynet link del pn-0123456789",
        ("warning leftovers: pynet: device pn-0123456789 is in the kernel",),
    ),
    "something changed": (
        NEAR, "nft add element inet pynet vteps4 '{ 192.0.2.99 }'",
        "nft delete element inet pynet vteps4 '{ 192.0.2.99 }'",
        ("warning leftovers: element inet pynet vteps4 192.0.2.99 is in the kernel",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", AMISS)
def test_a_doctor_finds(whole: Stage, what: str) -> None:
    """What is amiss is found and nothing else, with the exit code of its severity."""
    place, commands, undo, wanted = AMISS[what]
    lab = whole.cluster.lab
    machine = {UNDERLAY: lab.outside, NEAR: whole.near, FAR: whole.far}[place]
    machine.exec("sh", "-ec", commands)
    try:
        code, found = whole.doctor()
    finally:
        machine.exec("sh", "-ec", undo)
    assert len(found) == len(wanted), found
    for said, want in zip(found, wanted, strict=True):
        assert said.startswith(want)
    assert code == max(2 if said.startswith("error") else 1 for said in found)


def test_a_doctor_of_what_is_well(stage: Stage) -> None:
    """Where all is well only the setting is amiss, and each host was tried."""
    done = stage.near.pynet("doctor", check=False)
    assert stage.doctor() == (1, [])
    assert all(
        len(line) <= 80 for line in done.stdout.splitlines() if "-> " not in line
    )
    for said in (
        "packets of 1500 bytes pass unfragmented",
        "tunnels pass both ways",
        "checksums of UDP in the tunnel are right",
        "kernel, store and plans agree",
        "no rule of the host stops a network's traffic",
    ):
        assert said in done.stdout


@pytest.mark.parametrize("tool", ["iptables", "nft"])
def test_a_rule_that_stops_a_network(stage: Stage, tool: str) -> None:
    """A rule of the host that stops a network's way out is named, and its remedy works."""
    scene = stage.cluster.scenes[0]
    name = scene.network("-o", "pynet.mode=bridge", "--subnet", fresh_pools()[0])
    bridge = str(inspected(scene.host, name)["bridge"])
    wall = f"iptables -I FORWARD -i {bridge} -j DROP"
    if tool == "nft":
        wall = "nft add table inet wall; nft add chain inet wall pass "
        wall += "'{ type filter hook forward priority 1; }'; "
        wall += f"nft add rule inet wall pass iifname {bridge} drop"
    scene.host.exec("sh", "-ec", wall)
    code, found = stage.doctor()
    assert (code, len(found)) == (2, 1), found
    assert found[0].startswith(
        f"error filters: the way out of network {name} (IPv4) is stopped by {tool}: "
    )
    findings = json.loads(stage.near.pynet("doctor", "--json", check=False).stdout)
    (remedy,) = [f["remedy"] for f in findings["findings"] if f["check"] == "filters"]
    scene.host.exec("sh", "-ec", remedy)
    assert stage.doctor() == (1, [])


def test_a_doctor_without_the_store(stage: Stage) -> None:
    """A store that does not answer is named; the rest is looked at all the same."""
    member = stage.cluster.lab.members[0]
    member.pause()
    try:
        assert eventually(
            lambda: any("the store is away" in said for said in stage.doctor()[1]), 30
        )
        code, found = stage.doctor()
    finally:
        member.resume()
    assert code == 2
    assert any("the store is away, through which" in said for said in found)
    assert eventually(lambda: is_well(stage.trace()), 60)


def test_a_record_that_cannot_be_read(stage: Stage) -> None:
    """A value in the store that is none of pynet's is named."""
    etcdctl(stage.cluster.lab, "put", "/pynet/v1/hosts/x", "junk")
    try:
        wanted = "warning leftovers: record hosts/x in the store cannot be read"
        assert eventually(lambda: stage.doctor() == (1, [wanted]), 30)
    finally:
        etcdctl(stage.cluster.lab, "del", "/pynet/v1/hosts/x")
    assert eventually(lambda: stage.doctor() == (1, []), 30)


def test_a_doctor_without_the_daemons(stage: Stage) -> None:
    """
    What can be looked at without a daemon is, here and there.

    1. The other host's daemon is stopped: it cannot be asked, and tunnels still pass.
    2. This host's daemon is stopped too: the command says so, and how to start it.
    """
    stage.far.stop_pynet()
    try:
        code, found = stage.doctor()
        assert (code, found) == (
            1,
            ["warning host h2: it could not be asked: its daemon was stopped"],
        )
        stage.near.stop_pynet()
        try:
            code, found = stage.doctor()
        finally:
            stage.near.start_pynet()
    finally:
        stage.far.start_pynet()
    assert code == 2
    assert found[0].startswith("error daemon: pynet does not run here")
    assert eventually(lambda: is_well(stage.trace()), 30)


def test_a_report(stage: Stage) -> None:
    """A report of a real host has everything, and is for root alone."""
    done = stage.near.pynet("report", "/tmp/pynet-report.tar.gz", timeout=60)
    try:
        listed = stage.near.exec("tar", "tzvf", "/tmp/pynet-report.tar.gz").stdout
        mode = stage.near.exec("stat", "-c", "%a", "/tmp/pynet-report.tar.gz").stdout
    finally:
        stage.near.exec("rm", "/tmp/pynet-report.tar.gz")
    assert "look into it before" in done.stdout
    assert mode.strip() == "600"
    for name in ("status", "settings", "census", "diff", "doctor", "log", "hosts"):
        assert f"/{name}.json" in listed
