"""Mode `bridge`: whole plans of networks and endpoints."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.model import TCP, UDP, Endpoint, Member, Network, Published, Subnet
from cnmdriver.plan import bridge, firewall, ops
from cnmdriver.plan.ops import Accept, Address, Bridge, Element, Hold, Sysctl, Veth

FOUR = Subnet(
    space="local",
    pool=ip_network("10.1.0.0/24"),
    gateway=IPv4Address("10.1.0.1"),
    reserved=(IPv4Address("10.1.0.9"),),
)
SIX = Subnet(
    space="local", pool=ip_network("fd00::/64"), gateway=ip_address("fd00::ffff")
)
NETWORK = Network(id="red", mode="bridge", subnets=(FOUR,), mtu=1450)
DUAL = replace(NETWORK, subnets=(FOUR, SIX))
MEMBER = Member(network="red", host="0123456789", docker_id="d" * 64, bridge="pn-1")
ENDPOINT = Endpoint(
    network="red",
    id="web",
    host="0123456789",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
)
PORT = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)


def names(plan):
    """Name the operations of a plan."""
    return [ops.name(op) for op in plan]


def test_mtu():
    """Ethernet's is the MTU when nobody says."""
    assert bridge.MTU == 1500


def test_network():
    """An IPv4 network: rules, the way through the host's firewall, bridge, gateway."""
    assert bridge.network(NETWORK, MEMBER) == (
        firewall.table(),
        Element(set="bridges", item=('"pn-1"',)),
        Element(set="self", item=('"pn-1"', '"pn-1"')),
        Element(set="own4", item=("10.1.0.0/24", '"pn-1"')),
        Element(set="masq4", item=("10.1.0.0/24",)),
        Accept(version=4),
        Sysctl(path="net/ipv4/ip_forward", value="1", keep=True),
        Bridge(
            name="pn-1",
            mac="02:42:0a:01:00:01",
            mtu=1450,
            alias="pynet:01234567:network:red",
        ),
        Sysctl(path="net/ipv4/conf/pn-1/route_localnet", value="1", device="pn-1"),
        Sysctl(path="net/ipv6/conf/pn-1/disable_ipv6", value="1", device="pn-1"),
        Address(device="pn-1", interface=ip_interface("10.1.0.1/24")),
    )


def test_dual_network():
    """Both families: each has its accept and forwarding, and IPv6 a link-local router."""
    plan = bridge.network(DUAL, MEMBER)
    assert names(plan)[7:] == [
        "accept 4",
        "accept 6",
        "sysctl net/ipv4/ip_forward",
        "sysctl net/ipv6/conf/all/forwarding",
        "device pn-1",
        "sysctl net/ipv4/conf/pn-1/route_localnet",
        "sysctl net/ipv6/conf/pn-1/disable_ipv6",
        "sysctl net/ipv6/conf/pn-1/accept_ra",
        "address pn-1 fe80::1/64",
        "address pn-1 10.1.0.1/24",
        "address pn-1 fd00::ffff/64",
    ]
    values = {op.path: (op.value, op.keep) for op in plan if isinstance(op, Sysctl)}
    assert values == {
        "net/ipv4/ip_forward": ("1", True),
        "net/ipv6/conf/all/forwarding": ("1", True),
        "net/ipv4/conf/pn-1/route_localnet": ("1", False),
        "net/ipv6/conf/pn-1/disable_ipv6": ("0", False),
        "net/ipv6/conf/pn-1/accept_ra": ("0", False),
    }


def test_ipv6_network():
    """Without IPv4 there is nothing of it: no accept, no forwarding, no setting."""
    plan = bridge.network(replace(NETWORK, subnets=(SIX,)), MEMBER)
    assert names(plan)[1:] == [
        'element inet pynet bridges "pn-1"',
        'element inet pynet self "pn-1" "pn-1"',
        'element inet pynet own6 fd00::/64 "pn-1"',
        "element inet pynet masq6 fd00::/64",
        "accept 6",
        "sysctl net/ipv6/conf/all/forwarding",
        "device pn-1",
        "sysctl net/ipv6/conf/pn-1/disable_ipv6",
        "sysctl net/ipv6/conf/pn-1/accept_ra",
        "address pn-1 fe80::1/64",
        "address pn-1 fd00::ffff/64",
    ]


def test_internal_network():
    """The host keeps its address on an internal network, and routes nothing for it."""
    plan = bridge.network(replace(DUAL, internal=True), MEMBER)
    assert names(plan)[1:] == [
        'element inet pynet bridges "pn-1"',
        'element inet pynet internal "pn-1"',
        'element inet pynet self "pn-1" "pn-1"',
        'element inet pynet own4 10.1.0.0/24 "pn-1"',
        'element inet pynet own6 fd00::/64 "pn-1"',
        "accept 4",
        "accept 6",
        "device pn-1",
        "sysctl net/ipv6/conf/pn-1/disable_ipv6",
        "sysctl net/ipv6/conf/pn-1/accept_ra",
        "address pn-1 fe80::1/64",
        "address pn-1 10.1.0.1/24",
        "address pn-1 fd00::ffff/64",
    ]


def test_gateway_of_docker():
    """With Docker's gateway the host has no address on the bridge at all."""
    plan = bridge.network(replace(DUAL, gateway="docker"), MEMBER)
    assert not [op for op in plan if isinstance(op, Address)]
    assert "sysctl net/ipv4/ip_forward" not in names(plan)


def test_network_without_subnets():
    """A network that Docker gives no addresses is a bridge and its rules."""
    plan = bridge.network(replace(NETWORK, subnets=()), MEMBER)
    assert names(plan) == [
        "table inet pynet",
        'element inet pynet bridges "pn-1"',
        'element inet pynet self "pn-1" "pn-1"',
        "device pn-1",
        "sysctl net/ipv6/conf/pn-1/disable_ipv6",
    ]


def test_subnet_without_gateway():
    """A subnet that has no gateway adds no address."""
    bare = replace(FOUR, gateway=None)
    plan = bridge.network(replace(NETWORK, subnets=(bare, SIX)), MEMBER)
    assert names(plan)[-2:] == ["address pn-1 fe80::1/64", "address pn-1 fd00::ffff/64"]


@pytest.mark.parametrize(
    ("gateways", "mac"),
    [
        (("10.1.0.1",), "02:42:0a:01:00:01"),
        (("10.2.0.1", "10.1.0.1"), "02:42:0a:01:00:01"),
        (("fd00::1", "10.1.0.1"), "02:42:0a:01:00:01"),
        (("fd00::1", None), "02:42:cb:2a:2b:4d"),
        ((None,), "02:42:b1:f5:1a:51"),
        ((), "02:42:b1:f5:1a:51"),
    ],
)
def test_bridge_mac(gateways, mac):
    """The MAC follows the lowest gateway, IPv4 before IPv6, or the network's id."""
    subnets = tuple(
        Subnet(
            space="s",
            pool=ip_network("10.0.0.0/8"),
            gateway=None if gateway is None else ip_address(gateway),
        )
        for gateway in gateways
    )
    assert bridge.bridge_mac(replace(NETWORK, subnets=subnets)) == mac


def test_endpoint():
    """An endpoint that publishes nothing is one pair."""
    assert bridge.endpoint(NETWORK, MEMBER, ENDPOINT) == (
        Veth(
            name="pe-4b5e57f6eb",
            peer="pc-4b5e57f6eb",
            mac="02:42:0a:01:00:02",
            bridge="pn-1",
            mtu=1450,
            hairpin=False,
            isolated=False,
            alias="pynet:01234567:endpoint:web",
        ),
    )


def test_endpoint_without_icc():
    """Without traffic between containers each port is isolated."""
    (veth,) = bridge.endpoint(replace(NETWORK, icc=False), MEMBER, ENDPOINT)
    assert veth.isolated is True


def test_endpoint_that_publishes():
    """Published ports are held before they are translated, and turn hairpin on."""
    veth, *rest = bridge.endpoint(
        NETWORK,
        MEMBER,
        replace(ENDPOINT, published=(PORT, replace(PORT, protocol=UDP))),
    )
    target = IPv4Address("10.1.0.2")
    assert veth.hairpin is True
    assert rest == [
        Hold(protocol=TCP, address=None, port=8080, target=target, target_port=80),
        Hold(protocol=UDP, address=None, port=8080, target=target, target_port=80),
        Element(set="any4", item=("tcp", "8080"), value=("10.1.0.2", "80")),
        Element(set="any4", item=("udp", "8080"), value=("10.1.0.2", "80")),
    ]


@pytest.mark.parametrize(
    ("host_ip", "own", "target"),
    [
        (None, ("10.1.0.2/24", "fd00::2/64"), "fd00::2"),
        (None, ("10.1.0.2/24", None), "10.1.0.2"),
        ("127.0.0.1", ("10.1.0.2/24", "fd00::2/64"), "10.1.0.2"),
        ("127.0.0.1", (None, "fd00::2/64"), "fd00::2"),
        ("::1", ("10.1.0.2/24", "fd00::2/64"), "fd00::2"),
        ("::1", ("10.1.0.2/24", None), "10.1.0.2"),
        ("::1", (None, None), None),
    ],
)
def test_relayed(host_ip, own, target):
    """What is relayed goes to the host address's own family where it can."""
    four, six = (None if a is None else ip_interface(a) for a in own)
    endpoint = replace(ENDPOINT, ipv4=four, ipv6=six)
    address = None if host_ip is None else ip_address(host_ip)
    found = bridge.relayed(address, endpoint)
    assert found == (None if target is None else ip_address(target))
    port = replace(PORT, host_ip=address)
    assert bridge.hold(port, endpoint) == Hold(
        protocol=TCP, address=address, port=8080, target=found, target_port=80
    )
