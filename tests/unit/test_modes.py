"""What holds of every mode: each network of each mode makes a sound plan."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.model import (
    SCTP,
    TCP,
    UDP,
    Endpoint,
    Host,
    Member,
    Network,
    Published,
    Remote,
    Subnet,
)
from cnmdriver.plan import devices, ops, overlay
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.ops import Element, Sysctl


def subnet(cidr, gateway=1):
    """Return a subnet whose gateway is its n-th address."""
    pool = ip_network(cidr)
    return Subnet(
        space="local", pool=pool, gateway=None if gateway is None else pool[gateway]
    )


FOUR, SIX = subnet("10.1.0.0/24"), subnet("fd00::/64")
KINDS = {
    "v4": {"subnets": (FOUR,)},
    "v6": {"subnets": (SIX,)},
    "dual": {"subnets": (FOUR, SIX)},
    "several": {"subnets": (FOUR, subnet("10.2.0.0/16"), SIX, subnet("fd01::/64", 9))},
    "tiny": {"subnets": (subnet("10.1.0.0/31", 0), subnet("fd00::/127", 0))},
    "no gateway": {"subnets": (subnet("10.1.0.0/24", None), subnet("fd00::/64", None))},
    "null ipam": {"subnets": ()},
    "no icc": {"subnets": (FOUR, SIX), "icc": False},
    "no masquerade": {"subnets": (FOUR, SIX), "masquerade": False},
    "small mtu": {"subnets": (FOUR,), "mtu": 68},
    "internal": {"subnets": (FOUR, SIX), "internal": True},
    "internal without icc": {"subnets": (FOUR, SIX), "internal": True, "icc": False},
    "docker": {"subnets": (FOUR, SIX), "gateway": "docker"},
    "internal of docker": {"subnets": (SIX,), "internal": True, "gateway": "docker"},
}
CLOSED = [kind for kind, said in KINDS.items() if {"internal", "gateway"} & set(said)]
PORTS = (
    Published(protocol=TCP, port=80, host_ip=None, host_port=8080),
    Published(protocol=UDP, port=53, host_ip=IPv4Address("127.0.0.1"), host_port=53),
    Published(protocol=SCTP, port=9, host_ip=ip_address("fd09::9"), host_port=9),
    Published(protocol=TCP, port=80, host_ip=ip_address("::1"), host_port=81),
    Published(protocol=TCP, port=80, host_ip=IPv4Address(0), host_port=82),
)
MEMBER = Member(network="n" * 64, host="h" * 16, docker_id="d" * 64, bridge="pn-1")
HOST = Host(
    id="h" * 16, name="h1", version="1", vtep=IPv4Address("192.0.2.1"), mtu=1500
)
ROUTED = {"bridge": "pn-1", "overlay": devices.gateway("n" * 64)}
"""The device by which the host routes for a network."""

every = pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode in MODES for kind in KINDS]
)
closed = pytest.mark.parametrize(
    ("mode", "kind"), [(mode, kind) for mode in MODES for kind in CLOSED]
)
modes = pytest.mark.parametrize("mode", MODES)


def network(mode, kind):
    """Return a network of a kind."""
    said = {"mtu": MODES[mode].mtu(HOST), **KINDS[kind]}
    if mode == "overlay":
        said["vni"] = 10_000_000
    return Network(id="n" * 64, mode=mode, **said)


def endpoint(of, name="e", *, ports=PORTS):
    """Return an endpoint that has an address of each family, and ports."""
    last = {s.pool.version: s.pool[-1 - (s.pool.version == 4)] for s in of.subnets}
    return Endpoint(
        network=of.id,
        id=name * 64,
        host=MEMBER.host,
        boot="b",
        mac="02:42:0a:01:00:02",
        ipv4=ip_interface(f"{last[4]}/24") if 4 in last else None,
        ipv6=ip_interface(f"{last[6]}/64") if 6 in last else None,
        sandbox="/var/run/docker/netns/1",
        published=() if of.internal or of.gateway == "docker" else ports,
    )


def plans(mode, kind):
    """Return the plan of a network, and the plans of two endpoints on it."""
    of = network(mode, kind)
    module = MODES[mode]
    other = endpoint(of, "f", ports=())
    return (
        module.network(of, MEMBER, HOST),
        module.endpoint(of, MEMBER, endpoint(of), HOST),
        module.endpoint(of, MEMBER, other, HOST),
    )


@modes
def test_mtu(mode):
    """A mode's own MTU carries IPv6."""
    assert 1280 <= MODES[mode].mtu(HOST) <= 65535


@every
def test_order(mode, kind):
    """Each operation stands only on earlier ones of its network and its own plan."""
    net, *ends = plans(mode, kind)
    for end in ends:
        made = set()
        for op in (*net, *end):
            assert set(op.stands_on()) <= made
            made.add(op.key)


@every
def test_keys_are_unique(mode, kind):
    """No object appears twice, nor do two endpoints share one."""
    keys = [op.key for plan in plans(mode, kind) for op in plan]
    assert len(keys) == len(set(keys))


@every
def test_plan_is_a_value(mode, kind):
    """The same network makes the same plan, which can be hashed and compared."""
    assert plans(mode, kind) == plans(mode, kind)
    assert len({hash(plan) for plan in plans(mode, kind)}) == 3


@every
def test_network_knows_no_endpoint(mode, kind):
    """Neither the number of endpoints nor Docker's id changes a network's plan."""
    net, *_ = plans(mode, kind)
    of = network(mode, kind)
    other = replace(MEMBER, docker_id="x", claims=("a",))
    again = MODES[mode].network(of, other, HOST)
    assert again == net


@every
def test_commands_are_words(mode, kind):
    """Each command is argv: a program and words, none of them empty."""
    for plan in plans(mode, kind):
        for op in plan:
            for command in op.commands():
                assert isinstance(command, tuple)
                assert all(isinstance(word, str) and word for word in command)
                assert command[0] in {
                    "ip", "bridge", "nft", "sysctl", "iptables", "ip6tables",
                }  # fmt: skip


@every
def test_names_fit(mode, kind):
    """Device names have 15 bytes at most, and say the host in their alias."""
    for plan in plans(mode, kind):
        for op in plan:
            if op.key[0] == "device":
                assert 0 < len(op.key[2]) <= 15
                assert op.alias.startswith(f"pynet:{'h' * 8}:")


@every
def test_mtu_is_everywhere(mode, kind):
    """All devices of a network have its MTU."""
    wanted = network(mode, kind).mtu
    found = {op.mtu for plan in plans(mode, kind) for op in plan if hasattr(op, "mtu")}
    assert found == {wanted}


@every
def test_families(mode, kind):
    """A network of one IP version turns on nothing of the other."""
    of = network(mode, kind)
    for version in (4, 6):
        if of.has(version):
            continue
        for op in MODES[mode].network(of, MEMBER, HOST):
            if isinstance(op, Element) and not op.set.startswith("ends"):
                assert not op.set.endswith(str(version))
            if isinstance(op, Sysctl):
                assert f"ipv{version}" not in op.path or op.path.endswith(
                    "disable_ipv6"
                )


@closed
def test_closed_networks(mode, kind):
    """Where the host is no router nothing is masqueraded, forwarded or published."""
    for plan in plans(mode, kind):
        for op in plan:
            assert not (isinstance(op, Sysctl) and op.keep)
            assert "route_localnet" not in ops.name(op)
            if isinstance(op, Element):
                assert not op.set.startswith(("masq", "any", "bound"))
    net, *_ = plans(mode, kind)
    if mode == "bridge":
        assert Element(set="internal", item=('"pn-1"',)) in net
    else:
        guard = overlay.guard(network(mode, kind), HOST)
        inside = [op for op in net if op.key[0] != "namespace" and op not in guard]
        assert {op.where for op in inside} == {HOST.namespace}


@every
def test_open_networks_are_forwarded(mode, kind):
    """An open network turns on forwarding, which stays, for its own IP versions."""
    if kind in CLOSED:
        return
    of = network(mode, kind)
    wanted = {"net/ipv4/ip_forward": 4, "net/ipv6/conf/all/forwarding": 6}
    net, *_ = plans(mode, kind)
    assert Element(set="bridges", item=(f'"{ROUTED[mode]}"',)) in net
    kept = {op.path for op in net if isinstance(op, Sysctl) and op.keep}
    assert kept == {path for path, version in wanted.items() if of.has(version)}


@every
def test_masquerade(mode, kind):
    """A pool is hidden behind the host only where masquerading is on."""
    of = network(mode, kind)
    hidden = {
        op.item[0]
        for op in MODES[mode].network(of, MEMBER, HOST)
        if isinstance(op, Element) and op.set.startswith("masq")
    }
    on = of.masquerade and kind not in CLOSED
    assert hidden == ({str(s.pool) for s in of.subnets} if on else set())


@every
def test_others_come_after(mode, kind):
    """What is on other hosts stands on the network alone, and shares no object."""
    of, module = network(mode, kind), MODES[mode]
    vtep = IPv4Address("192.0.2.2")
    addresses = tuple(s.pool[-2] for s in of.subnets)
    remote = Remote(mac="02:42:0a:01:00:09", addresses=addresses, vtep=vtep)
    net, *ends = plans(mode, kind)
    others = (
        *module.remote(of, MEMBER, remote, HOST),
        *module.peer(replace(of, flood=True), MEMBER, vtep, HOST),
    )
    made = {op.key for op in net}
    assert all(set(op.stands_on()) <= made for op in others)
    keys = [op.key for plan in (net, *ends, others) for op in plan]
    assert len(keys) == len(set(keys))
    assert bool(others) is (mode == "overlay")
