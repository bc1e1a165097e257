"""Mode `overlay`: whole plans of networks, endpoints and what other hosts have."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.model import (
    TCP,
    Endpoint,
    Host,
    Member,
    Network,
    Published,
    Remote,
    Subnet,
)
from cnmdriver.plan import antispoof, devices, firewall, ops, overlay
from cnmdriver.plan.ops import (
    FLOOD,
    Accept,
    Address,
    Bridge,
    Element,
    Fdb,
    Hold,
    Interface,
    Namespace,
    Neighbour,
    Route,
    Sysctl,
    Veth,
    Vxlan,
)

FOUR = Subnet(
    space="global", pool=ip_network("10.1.0.0/24"), gateway=IPv4Address("10.1.0.1")
)
SIX = Subnet(
    space="global", pool=ip_network("fd00::/64"), gateway=ip_address("fd00::1")
)
NETWORK = Network(
    id="red",
    mode="overlay",
    subnets=(FOUR, SIX),
    mtu=1450,
    gateway="docker",
    vni=10_000_007,
)
OPEN = replace(NETWORK, gateway="pynet")
HOST = Host(
    id="0123456789",
    name="h1",
    version="1",
    vtep=IPv4Address("192.0.2.1"),
    vxlan_port=4790,
    mtu=1500,
    namespace="blue",
)
HOST6 = replace(HOST, vtep=ip_address("2001:db8::1"))
MEMBER = Member(network="red", host="0123456789", docker_id="d" * 64)
TAKES_PART = replace(
    MEMBER, ipv4=ip_interface("10.1.0.9/24"), ipv6=ip_interface("fd00::9/64")
)
ENDPOINT = Endpoint(
    network="red",
    id="web",
    host="0123456789",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    ipv6=ip_interface("fd00::2/64"),
)
REMOTE = Remote(
    mac="02:42:0a:01:00:03",
    addresses=(IPv4Address("10.1.0.3"), ip_address("fd00::3")),
    vtep=IPv4Address("192.0.2.2"),
)
PORT = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)
X = "b1f51a511f"
"""The digits of the network's devices."""

BARE = (
    Namespace(name="blue", alias="pynet:01234567:namespace:blue"),
    Sysctl(where="blue", path="net/bridge/bridge-nf-call-iptables", value="0"),
    Sysctl(where="blue", path="net/bridge/bridge-nf-call-ip6tables", value="0"),
    Sysctl(where="blue", path="net/bridge/bridge-nf-call-arptables", value="0"),
    overlay.table("blue"),
)
GUARD = (
    firewall.table(),
    Element(set="tunnels", item=("4790", "0x989687")),
    Element(set="ends4", item=("192.0.2.1",)),
)
GROUND = (*BARE, *GUARD)
BRIDGE = Bridge(
    where="blue",
    name=f"pn-{X}",
    mac="0e:b1:f5:1a:51:1f",
    mtu=1450,
    alias="pynet:01234567:network:red",
)
IPV6 = Sysctl(
    where="blue",
    path=f"net/ipv6/conf/pn-{X}/disable_ipv6",
    value="0",
    device=f"pn-{X}",
)
VXLAN = Vxlan(
    where="blue",
    name=f"pv-{X}",
    vni=10_000_007,
    local=IPv4Address("192.0.2.1"),
    port=4790,
    bridge=f"pn-{X}",
    mtu=1450,
    alias="pynet:01234567:tunnel:red",
)
PLAIN = (*GROUND, BRIDGE, IPV6, VXLAN)


def setting(device, path, value):
    """Return a setting of a device in the host's namespace."""
    return Sysctl(path=f"net/{path}".format(device), value=value, device=device)


def names(plan):
    """Name the operations of a plan."""
    return [ops.name(op) for op in plan]


# MTU.


@pytest.mark.parametrize(
    ("vtep", "underlay", "mtu"),
    [
        ("192.0.2.1", 1500, 1450),
        ("2001:db8::1", 1500, 1430),
        ("192.0.2.1", 9000, 8950),
        ("2001:db8::1", 1400, 1330),
        (None, 1500, 1450),
    ],
)
def test_mtu(vtep, underlay, mtu):
    """A tunnel takes 50 bytes over IPv4 and 70 over IPv6."""
    address = None if vtep is None else ip_address(vtep)
    assert overlay.mtu(replace(HOST, vtep=address, mtu=underlay)) == mtu


# Networks.


def test_network():
    """With Docker's gateway all but the guard is in pynet's namespace: two devices."""
    assert overlay.network(NETWORK, MEMBER, HOST) == PLAIN


def test_table():
    """The namespace's table keeps gateways out of tunnels, and has a mark as ours do."""
    table = overlay.table("blue")
    assert (table.where, table.family, table.name) == ("blue", "bridge", "pynet")
    assert table.text.startswith(overlay.TEXT)
    assert f"\tchain {table.mark} {{\n\t}}\n}}\n" in table.text
    assert table.text.count("{") == table.text.count("}")


def test_ipv6_alone():
    """A network of IPv6 alone has the same devices."""
    assert overlay.network(replace(NETWORK, subnets=(SIX,)), MEMBER, HOST) == PLAIN


def test_ipv4_alone():
    """Without IPv6 the bridge has none."""
    plan = overlay.network(replace(NETWORK, subnets=(FOUR,)), MEMBER, HOST)
    assert plan == (*GROUND, BRIDGE, replace(IPV6, value="1"), VXLAN)


def test_ipv6_underlay():
    """The tunnel's own end may be an IPv6 address."""
    plan = overlay.network(NETWORK, MEMBER, HOST6)
    end = Element(set="ends6", item=("2001:db8::1",))
    device = replace(VXLAN, local=ip_address("2001:db8::1"))
    assert plan == (*BARE, *GUARD[:2], end, BRIDGE, IPV6, device)


def test_flood_and_no_icc():
    """What the user says of broadcasts and of containers' traffic is the tunnel's."""
    plan = overlay.network(replace(NETWORK, flood=True), MEMBER, HOST)
    assert plan == (*PLAIN[:-1], replace(VXLAN, flood=True))
    plan = overlay.network(replace(NETWORK, icc=False), MEMBER, HOST)
    assert plan == (*PLAIN[:-1], replace(VXLAN, isolated=True))


@pytest.mark.parametrize("gateway", ["docker", "pynet"])
def test_internal(gateway):
    """An internal network has nothing on the host but the guard, whoever its router."""
    network = replace(NETWORK, internal=True, gateway=gateway)
    assert overlay.network(network, MEMBER, HOST) == PLAIN


@pytest.mark.parametrize(
    ("network", "host"),
    [(replace(NETWORK, vni=0), HOST), (NETWORK, replace(HOST, vtep=None))],
)
def test_without_a_tunnel(network, host):
    """A host that has lost its VTEP address keeps all but the tunnel."""
    assert overlay.network(network, MEMBER, host) == (*BARE, BRIDGE, IPV6)
    assert overlay.remote(network, MEMBER, REMOTE, host) == ()
    assert overlay.peer(replace(network, flood=True), MEMBER, REMOTE.vtep, host) == ()


GATEWAY_RULES = (
    Element(set="bridges", item=(f'"pg-{X}"',)),
    Element(set="self", item=(f'"pg-{X}"', f'"pg-{X}"')),
    Element(set="own4", item=("10.1.0.0/24", f'"pg-{X}"')),
    Element(set="masq4", item=("10.1.0.0/24",)),
    Element(set="own6", item=("fd00::/64", f'"pg-{X}"')),
    Element(set="masq6", item=("fd00::/64",)),
    Accept(version=4),
    Accept(version=6),
    Sysctl(path="net/ipv4/ip_forward", value="1", keep=True),
    Sysctl(path="net/ipv6/conf/all/forwarding", value="1", keep=True),
    Element(
        where="blue",
        family="bridge",
        set="gateways",
        item=(f'"pv-{X}"', "02:42:0a:01:00:01"),
    ),
)
GATEWAY_PAIR = (
    Veth(
        where="blue",
        name=f"pgp-{X}",
        peer=f"pg-{X}",
        mac="02:42:0a:01:00:01",
        bridge=f"pn-{X}",
        mtu=1450,
        alias="pynet:01234567:gateway:red",
    ),
    Interface(
        name=f"pg-{X}",
        pair=("device", "blue", f"pgp-{X}"),
        alias="pynet:01234567:gateway:red",
    ),
    Fdb(where="blue", device=f"pgp-{X}", mac="02:42:0a:01:00:01"),
    setting(f"pg-{X}", "ipv4/conf/{}/route_localnet", "1"),
    setting(f"pg-{X}", "ipv6/conf/{}/disable_ipv6", "0"),
    setting(f"pg-{X}", "ipv6/conf/{}/accept_ra", "0"),
)
GATEWAYS = (
    Address(device=f"pg-{X}", interface=ip_interface("fe80::1/64")),
    Address(device=f"pg-{X}", interface=ip_interface("10.1.0.1/24")),
    Address(device=f"pg-{X}", interface=ip_interface("fd00::1/64")),
)


def test_gateway():
    """With pynet as the gateway the host has all of a bridge, on one end of a pair."""
    assert overlay.network(OPEN, MEMBER, HOST) == (
        *GROUND,
        *GATEWAY_RULES,
        BRIDGE,
        IPV6,
        VXLAN,
        *GATEWAY_PAIR,
        *GATEWAYS,
    )


def test_gateway_of_ipv6():
    """A network of IPv6 alone has a gateway of it, and nothing of IPv4."""
    plan = overlay.network(replace(OPEN, subnets=(SIX,)), MEMBER, HOST)
    assert names(plan)[8:] == [
        f'element inet pynet bridges "pg-{X}"',
        f'element inet pynet self "pg-{X}" "pg-{X}"',
        f'element inet pynet own6 fd00::/64 "pg-{X}"',
        "element inet pynet masq6 fd00::/64",
        "accept 6",
        "sysctl net/ipv6/conf/all/forwarding",
        f'blue: element bridge pynet gateways "pv-{X}" 02:42:cb:2a:2b:4d',
        f"blue: device pn-{X}",
        f"blue: sysctl net/ipv6/conf/pn-{X}/disable_ipv6",
        f"blue: device pv-{X}",
        f"blue: device pgp-{X}",
        f"device pg-{X}",
        f"blue: fdb pgp-{X} 02:42:cb:2a:2b:4d master",
        f"sysctl net/ipv6/conf/pg-{X}/disable_ipv6",
        f"sysctl net/ipv6/conf/pg-{X}/accept_ra",
        f"address pg-{X} fe80::1/64",
        f"address pg-{X} fd00::1/64",
    ]


def test_gateway_without_icc():
    """The pair of the gateway is never isolated: it is for everybody."""
    plan = overlay.network(replace(OPEN, icc=False), MEMBER, HOST)
    assert Element(set="icc_off", item=(f'"pg-{X}"',)) in plan
    assert GATEWAY_PAIR[0] in plan
    assert replace(VXLAN, isolated=True) in plan


# The host as a member.


def access_rules(*, closed):
    """Return the elements of the host's own device."""
    return (
        Element(set="bridges", item=(f'"ph-{X}"',)),
        Element(set="internal" if closed else "hosts", item=(f'"ph-{X}"',)),
        Element(set="own4", item=("10.1.0.0/24", f'"ph-{X}"')),
        Element(set="own6", item=("fd00::/64", f'"ph-{X}"')),
    )


def access_pair(*settings):
    """Return the host's own pair and what is on it."""
    return (
        Veth(
            where="blue",
            name=f"php-{X}",
            peer=f"ph-{X}",
            mac="02:42:0a:01:00:09",
            bridge=f"pn-{X}",
            mtu=1450,
            alias="pynet:01234567:access:red",
        ),
        Interface(
            name=f"ph-{X}",
            pair=("device", "blue", f"php-{X}"),
            alias="pynet:01234567:access:red",
        ),
        Fdb(where="blue", device=f"php-{X}", mac="02:42:0a:01:00:09"),
        *settings,
        setting(f"ph-{X}", "ipv6/conf/{}/disable_ipv6", "0"),
        setting(f"ph-{X}", "ipv6/conf/{}/accept_ra", "0"),
        setting(f"ph-{X}", "ipv4/conf/{}/arp_ignore", "1"),
        setting(f"ph-{X}", "ipv4/conf/{}/arp_announce", "2"),
        Address(device=f"ph-{X}", interface=ip_interface("fe80::42:aff:fe01:9/64")),
        Address(device=f"ph-{X}", interface=ip_interface("10.1.0.9/32")),
        Address(device=f"ph-{X}", interface=ip_interface("fd00::9/128")),
        Route(
            destination=ip_network("10.1.0.0/24"),
            device=f"ph-{X}",
            source=IPv4Address("10.1.0.9"),
        ),
        Route(
            destination=ip_network("fd00::/64"),
            device=f"ph-{X}",
            source=ip_address("fd00::9"),
        ),
    )


@pytest.mark.parametrize(
    "change", [{}, {"internal": True}, {"internal": True, "gateway": "pynet"}]
)
def test_host_access(change):
    """A host's own place is a pair of its own, by which it routes nothing."""
    network = replace(NETWORK, host_access=True, **change)
    assert overlay.network(network, TAKES_PART, HOST) == (
        *GROUND,
        *access_rules(closed=True),
        BRIDGE,
        IPV6,
        VXLAN,
        *access_pair(),
    )


def test_gateway_and_host_access():
    """With both pairs the host has one way to the pools, and answers for each once."""
    network = replace(OPEN, host_access=True)
    assert overlay.network(network, TAKES_PART, HOST) == (
        *GROUND,
        *GATEWAY_RULES,
        *access_rules(closed=False),
        BRIDGE,
        IPV6,
        VXLAN,
        *GATEWAY_PAIR,
        setting(f"pg-{X}", "ipv4/conf/{}/rp_filter", "2"),
        setting(f"pg-{X}", "ipv4/conf/{}/arp_ignore", "1"),
        Address(device=f"pg-{X}", interface=ip_interface("fe80::1/64")),
        Address(device=f"pg-{X}", interface=ip_interface("10.1.0.1/32")),
        Address(device=f"pg-{X}", interface=ip_interface("fd00::1/128")),
        *access_pair(setting(f"ph-{X}", "ipv4/conf/{}/route_localnet", "1")),
    )


@pytest.mark.parametrize(
    ("network", "member"),
    [
        (replace(NETWORK, host_access=True), MEMBER),
        (NETWORK, TAKES_PART),
        (
            replace(NETWORK, subnets=(FOUR,), host_access=True),
            replace(TAKES_PART, ipv4=None),
        ),
    ],
)
def test_no_place_of_its_own(network, member):
    """A host is a member by its address on a network that wants that, or not at all."""
    found = names(overlay.network(network, member, HOST))
    assert found == names(overlay.network(network, MEMBER, HOST))
    assert f"device ph-{X}" not in found


def test_host_access_of_one_family():
    """What the host has no address of keeps the gateway's own way to the pool."""
    network = replace(OPEN, host_access=True)
    plan = overlay.network(network, replace(TAKES_PART, ipv4=None), HOST)
    addresses = [str(op.interface) for op in plan if isinstance(op, Address)]
    own = devices.link_local(devices.mac(ip_address("fd00::9")))
    assert addresses == [
        "fe80::1/64", "10.1.0.1/24", "fd00::1/128", str(own), "fd00::9/128",
    ]  # fmt: skip
    routes = [op.destination for op in plan if isinstance(op, Route)]
    assert routes == [SIX.pool]
    assert not [name for name in names(plan) if "rp_filter" in name]


def test_host_access_to_several_pools():
    """Every pool of a family is reached by the host's one address of it."""
    second = replace(FOUR, pool=ip_network("10.2.0.0/16"), gateway=None)
    network = replace(NETWORK, subnets=(FOUR, second), host_access=True)
    plan = overlay.network(network, TAKES_PART, HOST)
    routes = {str(op.destination): op.source for op in plan if isinstance(op, Route)}
    own = IPv4Address("10.1.0.9")
    assert routes == {"10.1.0.0/24": own, "10.2.0.0/16": own}
    assert not [
        op for op in plan if isinstance(op, Address) and op.interface.version == 6
    ]


# Endpoints.

VETH = Veth(
    where="blue",
    name="pe-4b5e57f6eb",
    peer="pc-4b5e57f6eb",
    mac="02:42:0a:01:00:02",
    bridge=f"pn-{X}",
    mtu=1450,
    alias="pynet:01234567:endpoint:web",
)
OWN = antispoof.endpoint(NETWORK, ENDPOINT, "blue")
LEARNT = Fdb(where="blue", device="pe-4b5e57f6eb", mac="02:42:0a:01:00:02")


def test_endpoint():
    """An endpoint is what its port lets out, a pair, and its MAC there for good."""
    assert overlay.endpoint(NETWORK, MEMBER, ENDPOINT, HOST) == (*OWN, VETH, LEARNT)


def test_endpoint_without_icc():
    """Without traffic between containers each port is isolated."""
    found = overlay.endpoint(replace(NETWORK, icc=False), MEMBER, ENDPOINT, HOST)
    assert found == (*OWN, replace(VETH, isolated=True), LEARNT)


def test_endpoint_that_publishes():
    """Where pynet is the gateway it holds and translates ports; a bridge reflects none."""
    found = overlay.endpoint(OPEN, MEMBER, replace(ENDPOINT, published=(PORT,)), HOST)
    assert found == (
        *OWN,
        VETH,
        LEARNT,
        Hold(
            protocol=TCP,
            address=None,
            port=8080,
            target=ip_address("fd00::2"),
            target_port=80,
        ),
        Element(set="any4", item=("tcp", "8080"), value=("10.1.0.2", "80")),
        Element(set="any6", item=("tcp", "8080"), value=("fd00::2", "80")),
    )


@pytest.mark.parametrize("change", [{"gateway": "docker"}, {"internal": True}])
def test_closed_endpoint(change):
    """Where the host routes nothing no port is held or translated."""
    publishing = replace(ENDPOINT, published=(PORT,))
    found = overlay.endpoint(replace(OPEN, **change), MEMBER, publishing, HOST)
    assert found == (*OWN, VETH, LEARNT)


# Other hosts.


def fdb(**fields):
    """Return an entry of the tunnel."""
    return Fdb(where="blue", device=f"pv-{X}", **fields)


def neighbour(address):
    """Return an address of the remote endpoint."""
    return Neighbour(
        where="blue", device=f"pn-{X}", address=ip_address(address), mac=REMOTE.mac
    )


@pytest.mark.parametrize(
    ("subnets", "addresses"),
    [
        ((FOUR, SIX), ("10.1.0.3", "fd00::3")),
        ((FOUR,), ("10.1.0.3",)),
        ((SIX,), ("fd00::3",)),
        ((), ()),
    ],
)
def test_remote(subnets, addresses):
    """A remote endpoint is a host for its MAC, a port for it, and its addresses."""
    network = replace(NETWORK, subnets=subnets)
    assert overlay.remote(network, MEMBER, REMOTE, HOST) == (
        fdb(mac=REMOTE.mac, dst=REMOTE.vtep),
        fdb(mac=REMOTE.mac),
        *map(neighbour, addresses),
    )


def test_peer():
    """Another host costs nothing, unless what is for everybody goes there."""
    assert overlay.peer(NETWORK, MEMBER, REMOTE.vtep, HOST) == ()
    found = overlay.peer(replace(NETWORK, flood=True), MEMBER, REMOTE.vtep, HOST)
    assert found == (fdb(mac=FLOOD, dst=REMOTE.vtep),)


def test_hosts_of_two_families():
    """A host is never told of one that its tunnel cannot reach."""
    flooded = replace(NETWORK, flood=True)
    assert overlay.remote(NETWORK, MEMBER, REMOTE, HOST6) == ()
    assert overlay.peer(flooded, MEMBER, REMOTE.vtep, HOST6) == ()
    six = ip_address("2001:db8::2")
    assert overlay.remote(NETWORK, MEMBER, replace(REMOTE, vtep=six), HOST) == ()
    assert overlay.peer(flooded, MEMBER, six, HOST6) == (fdb(mac=FLOOD, dst=six),)


# What holds of all.

FACES = st.sampled_from([None, ip_interface("10.1.0.9/24")])
FACES6 = st.sampled_from([None, ip_interface("fd00::9/64")])
networks = st.builds(
    replace,
    st.just(NETWORK),
    subnets=st.sampled_from([(), (FOUR,), (SIX,), (FOUR, SIX), (SIX, FOUR)]),
    internal=st.booleans(),
    icc=st.booleans(),
    masquerade=st.booleans(),
    gateway=st.sampled_from(["docker", "pynet"]),
    vni=st.sampled_from([0, 10_000_001]),
    flood=st.booleans(),
    host_access=st.booleans(),
    spoof=st.booleans(),
    mtu=st.sampled_from([68, 1280, 1450]),
)
members = st.builds(replace, st.just(MEMBER), ipv4=FACES, ipv6=FACES6)
hosts = st.sampled_from([HOST, HOST6, replace(HOST, vtep=None)])
vteps = st.sampled_from([IPv4Address("192.0.2.2"), ip_address("2001:db8::2")])


@given(networks, members, hosts, vteps)
def test_whole(network, member, host, vtep):
    """Every operation stands on earlier ones, once, and says where it holds in full."""
    publishing = replace(ENDPOINT, published=(PORT,))
    plans = (
        overlay.network(network, member, host),
        overlay.endpoint(network, member, publishing, host),
        overlay.peer(network, member, vtep, host),
        overlay.peer(network, member, vtep + 1, host),
        overlay.remote(network, member, replace(REMOTE, vtep=vtep), host),
    )
    made = set()
    for op in (op for plan in plans for op in plan):
        assert op.key not in made
        assert set(op.stands_on()) <= made
        assert all(word for command in op.commands() for word in command)
        assert op.where in {"host", "blue"}
        made.add(op.key)


@given(networks, members, hosts)
def test_host_is_untouched(network, member, host):
    """But for the guard the host has a part only by its gateway or its own address."""
    part = not firewall.closed(network) or (
        network.host_access
        and any(network.has(address.version) for address in member.addresses)
    )
    plan = overlay.network(network, member, host)
    guard = overlay.guard(network, host)
    inside = [
        op
        for op in plan
        if op.where == "host" and not isinstance(op, Namespace) and op not in guard
    ]
    inside = [op for op in inside if op != firewall.table()]
    assert bool(inside) is part
