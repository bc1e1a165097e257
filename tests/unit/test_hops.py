"""The steps of a way: each says what is wrong with it, and how that is mended."""

import json
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.insight.hops import BACK, IN, OUT, Look, hops, ordered
from cnmdriver.model import Endpoint, Hop, Host, Member, Network, Remote, Subnet
from cnmdriver.plan import devices, firewall
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.ops import Bridge, Element, Fdb, Neighbour, Table, Veth, Vxlan
from cnmdriver.plan.sight import FAILED, PERMANENT, Face, Filters, Inner, Near, Way

HERE = Host(id="h1", name="h1", version="1", vtep=ip_address("192.0.2.11"))
THERE = Host(id="h2", name="h2", version="1", vtep=ip_address("192.0.2.12"))
NETWORK = Network(
    id="n1",
    mode="overlay",
    vni=10_000_001,
    mtu=1450,
    gateway="docker",
    subnets=(
        Subnet(space="s", pool=ip_network("10.1.0.0/24")),
        Subnet(space="s", pool=ip_network("fd01::/64")),
    ),
)
MEMBER = Member(network="n1", host="h1", docker_id="d", bridge="pn-x")
MINE = Endpoint(
    network="n1",
    id="e1",
    host="h1",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    ipv6=ip_interface("fd01::2/64"),
    sandbox="/run/docker/netns/0123",
)
OTHER = replace(
    MINE,
    id="e2",
    host="h2",
    mac="02:42:0a:01:00:03",
    ipv4=ip_interface("10.1.0.3/24"),
    ipv6=ip_interface("fd01::3/64"),
)
MODE = MODES["overlay"]
OWN = MODE.endpoint(NETWORK, MEMBER, MINE, HERE)
SHARED = (*MODE.network(NETWORK, MEMBER, HERE), firewall.vtep(THERE.vtep))
REMOTE = MODE.remote(
    NETWORK,
    MEMBER,
    Remote(mac=OTHER.mac, addresses=(OTHER.ipv4.ip, OTHER.ipv6.ip), vtep=THERE.vtep),
    HERE,
)
PAIR = next(op for op in OWN if isinstance(op, Veth))
FOUND = tuple(
    replace(op, peer=None, mac=None) if op is PAIR else op
    for op in (*SHARED, *OWN, *REMOTE)
)
FACE = Face(name="eth0", mac=MINE.mac, mtu=1450, up=True, addresses=MINE.addresses)
INNER = Inner(face=FACE, ways=(Way(to=OTHER.ipv4.ip, device="eth0"),))
WAY = Way(
    to=THERE.vtep, device="eth1", source=HERE.vtep, up=True, carrier=True, mtu=1500
)
WELL = Look(
    network=NETWORK,
    host=HERE,
    mine=MINE,
    other=OTHER,
    peer=THERE,
    own=OWN,
    shared=SHARED,
    remote=REMOTE,
    found=FOUND,
    inner=INNER,
    way=WAY,
    received=7,
    repairs=False,
)
PORT, BRIDGE, TUNNEL = devices.port("e1"), devices.bridge("n1"), devices.vxlan("n1")


def without(kind, **fields):
    """Return what is found, less the operations of a kind with these fields."""
    return tuple(
        op
        for op in FOUND
        if not isinstance(op, kind)
        or any(getattr(op, name) != value for name, value in fields.items())
    )


def changed(kind, **fields):
    """Return what is found, with the operations of a kind changed."""
    return tuple(replace(op, **fields) if isinstance(op, kind) else op for op in FOUND)


def amiss(look):
    """Return the steps that are not well, by name."""
    return {hop.name: hop for hop in hops(look) if hop.well is False}


def test_all_is_well():
    """A way with nothing amiss has each step once, and no remedy."""
    found = hops(WELL)
    assert {hop.name for hop in found} <= {*OUT, *BACK}
    assert len({hop.name for hop in found}) == len(found) == 20
    assert [hop for hop in found if hop.well is not True or hop.remedy] == []
    assert next(h for h in found if h.name == "tunnel received").found.startswith("7 ")


NETNS = "nsenter --net=/run/docker/netns/0123"

CASES = [
    (
        replace(WELL, own=(), inner=None),
        "endpoint",
        "it has not joined",
        "start its container",
    ),
    (
        replace(WELL, taken=(MINE.ipv4.ip,)),
        "address",
        "another endpoint has 10.1.0.2 too",
        "pynet ipam ls",
    ),
    (
        replace(WELL, inner=Inner(face=None), lost="its sandbox is gone"),
        "interface",
        "its sandbox is gone",
        "docker network disconnect",
    ),
    (replace(WELL, inner=Inner(face=None)), "interface", "it is not there", "restart"),
    (
        replace(WELL, inner=replace(INNER, face=replace(FACE, up=False))),
        "interface",
        "eth0 is down",
        f"{NETNS} ip link set eth0 up",
    ),
    (
        replace(
            WELL, inner=replace(INNER, face=replace(FACE, mac="02:00:00:00:00:01"))
        ),
        "interface",
        "eth0 is MAC 02:00:00:00:00:01 instead of 02:42:0a:01:00:02",
        f"{NETNS} ip link set eth0 address 02:42:0a:01:00:02",
    ),
    (
        replace(WELL, inner=replace(INNER, face=replace(FACE, addresses=(MINE.ipv6,)))),
        "interface",
        "eth0 is without 10.1.0.2/24",
        f"{NETNS} ip addr add 10.1.0.2/24 dev eth0",
    ),
    (
        replace(WELL, inner=replace(INNER, ways=(Way(to=OTHER.ipv4.ip),))),
        "container's route",
        "there is no way to 10.1.0.3",
        f"{NETNS} ip route show",
    ),
    (
        replace(WELL, inner=replace(INNER, ways=(Way(to=OTHER.ipv4.ip, device="e9"),))),
        "container's route",
        "10.1.0.3 goes to e9",
        f"{NETNS} ip route show",
    ),
    (
        replace(
            WELL,
            inner=replace(
                INNER,
                neighbours=(Near(address=OTHER.ipv4.ip, mac="02:99", state=PERMANENT),),
            ),
        ),
        "container's neighbour",
        "10.1.0.3 is 02:99",
        f"{NETNS} ip neigh del 10.1.0.3 dev eth0",
    ),
    (
        replace(WELL, found=changed(Veth, up=False)),
        "port",
        f"{PORT}: up is False and should be True",
        f"ip -n pynet link set {PORT} up",
    ),
    (
        replace(WELL, found=changed(Veth, bridge="")),
        "port",
        f"{PORT}: bridge is none and should be {BRIDGE}",
        f"ip -n pynet link set {PORT} master {BRIDGE}",
    ),
    (
        replace(WELL, found=changed(Veth, isolated=True)),
        "port",
        f"{PORT}: isolated is True",
        f"bridge -n pynet link set dev {PORT} isolated off",
    ),
    (
        replace(WELL, found=changed(Veth, mtu=1300)),
        "port",
        f"{PORT}: mtu is 1300",
        f"ip -n pynet link set {PORT} mtu 1450",
    ),
    (
        replace(WELL, found=without(Veth)),
        "port",
        f"{PORT} is not there",
        "restart the container",
    ),
    (
        replace(WELL, found=without(Element, set="ips4")),
        "anti-spoof",
        f'ips4 {{ "{PORT}" . 10.1.0.2 }} is not there',
        "ip netns exec pynet nft add element bridge pynet ips4",
    ),
    (
        replace(WELL, found=changed(Bridge, up=False)),
        "bridge",
        f"{BRIDGE}: up is False",
        f"ip -n pynet link set {BRIDGE} up",
    ),
    (
        replace(WELL, found=without(Bridge)),
        "bridge",
        f"{BRIDGE} is not there",
        f"ip -n pynet link add {BRIDGE}",
    ),
    (
        replace(WELL, network=replace(NETWORK, icc=False)),
        "policy",
        "pynet.icc=false",
        "without -o pynet.icc=false",
    ),
    (
        replace(WELL, found=without(Table, family="bridge")),
        "filter",
        "table bridge pynet is not there",
        "restart pynet",
    ),
    (
        replace(WELL, hidden="its lease ran out", remote=()),
        "host",
        "its lease ran out",
        "on h2: start pynet",
    ),
    (
        replace(WELL, peer=replace(THERE, vtep=None)),
        "host",
        "one of the two hosts has none",
        "--vtep",
    ),
    (
        replace(WELL, found=without(Neighbour)),
        "neighbour",
        "10.1.0.3 is 02:42:0a:01:00:03 is not there, fd01::3",
        f"ip -n pynet -4 neigh replace 10.1.0.3 lladdr {OTHER.mac} dev {BRIDGE}",
    ),
    (
        replace(WELL, found=without(Fdb, dst=None)),
        "bridge entry",
        f"{OTHER.mac} by {TUNNEL} is not there",
        f"bridge -n pynet fdb replace {OTHER.mac} dev {TUNNEL} master static",
    ),
    (
        replace(WELL, found=without(Fdb, dst=THERE.vtep)),
        "tunnel entry",
        f"{OTHER.mac} by {TUNNEL} to 192.0.2.12 is not there",
        f"bridge -n pynet fdb replace {OTHER.mac} dev {TUNNEL} dst 192.0.2.12",
    ),
    (
        replace(WELL, found=changed(Vxlan, up=False)),
        "tunnel device",
        f"{TUNNEL}: up is False",
        f"ip -n pynet link set {TUNNEL} up",
    ),
    (replace(WELL, way=Way(to=THERE.vtep)), "route", "there is none", "ip -4 route"),
    (
        replace(WELL, way=replace(WAY, up=False)),
        "underlay",
        "it is down",
        "ip link set eth1 up",
    ),
    (
        replace(WELL, way=replace(WAY, carrier=False)),
        "underlay",
        "nobody is at its other end",
        "cable",
    ),
    (
        replace(WELL, way=replace(WAY, mtu=1400)),
        "underlay",
        "MTU 1400",
        "mtu 1500, or make the network anew with -o pynet.mtu=1350",
    ),
    (
        replace(WELL, filters=Filters(listings=(("iptables", "-P INPUT DROP"),))),
        "firewall in",
        "iptables: -P INPUT DROP",
        "iptables -I INPUT -p udp -s 192.0.2.12 --dport 4789 -j ACCEPT",
    ),
    (
        replace(WELL, filters=Filters(listings=(("iptables", "-P OUTPUT DROP"),))),
        "firewall out",
        "iptables: -P OUTPUT DROP",
        "iptables -I OUTPUT -p udp -s 192.0.2.11 --dport 4789 -j ACCEPT",
    ),
    (
        replace(WELL, found=without(Element, set="vteps4")),
        "tunnel guard",
        "vteps4 { 192.0.2.12 } is not there",
        "nft add element inet pynet vteps4 '{ 192.0.2.12 }'",
    ),
    (
        replace(WELL, found=without(Element, set="tunnels")),
        "tunnel guard",
        "tunnels { 4789 . 0x989681 } is not there",
        "nft add element inet pynet tunnels",
    ),
]


@pytest.mark.parametrize(("look", "name", "found", "remedy"), CASES)
def test_a_step_that_is_amiss(look, name, found, remedy):
    """The step is named, with what was found and what mends it."""
    hop = amiss(look)[name]
    assert found in hop.found
    assert remedy in hop.remedy


@pytest.mark.parametrize(
    "name", sorted({*OUT, *BACK} - {"tunnel received", "container's neighbour"})
)
def test_every_step_can_be_amiss(name):
    """No step is for show only."""
    assert name in {case[1] for case in CASES}


def test_a_sandbox_that_cannot_be_entered():
    """What the daemon may not look at proves nothing."""
    look = replace(WELL, inner=None, lost="entering it failed: (EPERM)")
    assert amiss(look) == {}
    (hop,) = [hop for hop in hops(look) if hop.well is None]
    assert (hop.name, hop.found) == ("interface", "entering it failed: (EPERM)")
    assert "pynet status" in hop.remedy


def test_a_neighbour_nobody_answered_for():
    """That the sandbox asked in vain is no fault of the sandbox."""
    near = Near(address=OTHER.ipv4.ip, mac="", state=FAILED)
    assert amiss(replace(WELL, inner=replace(INNER, neighbours=(near,)))) == {}


def test_a_device_that_was_deleted():
    """What is made anew is made by all its commands."""
    hop = amiss(replace(WELL, found=without(Vxlan)))["tunnel device"]
    assert hop.remedy.startswith(f"ip link add {TUNNEL} netns pynet mtu 1450")
    assert hop.remedy.endswith(f"ip -n pynet link set {TUNNEL} up")


def test_pynet_mends_by_itself():
    """Where drift is put right, that is said before what a person can do."""
    hop = amiss(replace(WELL, repairs=True, found=changed(Veth, up=False)))["port"]
    assert hop.remedy == (
        f"pynet does so by itself within seconds; by hand: ip -n pynet link set {PORT} up"
    )


def test_one_host():
    """Two endpoints of one host need nothing of what is between hosts."""
    look = replace(
        WELL, peer=None, other=replace(OTHER, host="h1"), remote=(), way=None
    )
    names = {hop.name for hop in hops(look)}
    assert not names & {"host", "route", "tunnel device", "firewall in", "neighbour"}
    assert {"port", "bridge", "interface"} <= names


def test_order():
    """Steps are in the order in which a packet meets them; unknown ones come last."""
    given = [Hop(name=n) for n in ("zeal", "port", "underlay", "interface")]
    names = [hop.name for hop in ordered(given, OUT)]
    assert names == ["interface", "port", "underlay", "zeal"]
    names = [hop.name for hop in ordered(given, IN)]
    assert names == ["underlay", "port", "interface", "zeal"]


def test_names_fit_a_record():
    """What a host answers to another can be stored."""
    for hop in hops(WELL):
        assert len(hop.name) <= 64
        assert len(json.dumps(hop.found)) < 500
