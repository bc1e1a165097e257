"""Mode `bridge`: whole plans of networks and endpoints."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

from cnmdriver.model import (
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
from cnmdriver.plan import antispoof, bridge, firewall, ops
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
HOST = Host(
    id="0123456789",
    name="h1",
    version="1",
    vtep=IPv4Address("192.0.2.1"),
    mtu=9000,
)
ENDPOINT = Endpoint(
    network="red",
    id="web",
    host="0123456789",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
)
OWN = antispoof.endpoint(NETWORK, ENDPOINT, ops.HOST)
PORT = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)


def names(plan):
    """Name the operations of a plan."""
    return [ops.name(op) for op in plan]


def test_mtu():
    """Ethernet's is the MTU when nobody says."""
    assert bridge.mtu(HOST) == 1500


def test_network():
    """An IPv4 network: rules, the way through the host's firewall, bridge, gateway."""
    assert bridge.network(NETWORK, MEMBER, HOST) == (
        antispoof.table(ops.HOST),
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
    plan = bridge.network(DUAL, MEMBER, HOST)
    assert names(plan)[8:] == [
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
    plan = bridge.network(replace(NETWORK, subnets=(SIX,)), MEMBER, HOST)
    assert names(plan)[2:] == [
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
    plan = bridge.network(replace(DUAL, internal=True), MEMBER, HOST)
    assert names(plan)[2:] == [
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
    plan = bridge.network(replace(DUAL, gateway="docker"), MEMBER, HOST)
    assert not [op for op in plan if isinstance(op, Address)]
    assert "sysctl net/ipv4/ip_forward" not in names(plan)


def test_network_without_subnets():
    """A network that Docker gives no addresses is a bridge and its rules."""
    plan = bridge.network(replace(NETWORK, subnets=()), MEMBER, HOST)
    assert names(plan) == [
        "table bridge pynet",
        "table inet pynet",
        'element inet pynet bridges "pn-1"',
        'element inet pynet self "pn-1" "pn-1"',
        "device pn-1",
        "sysctl net/ipv6/conf/pn-1/disable_ipv6",
    ]


def test_subnet_without_gateway():
    """A subnet that has no gateway adds no address."""
    bare = replace(FOUR, gateway=None)
    plan = bridge.network(replace(NETWORK, subnets=(bare, SIX)), MEMBER, HOST)
    assert names(plan)[-2:] == ["address pn-1 fe80::1/64", "address pn-1 fd00::ffff/64"]


def test_endpoint():
    """An endpoint that publishes nothing is what its port lets out, and one pair."""
    assert bridge.endpoint(NETWORK, MEMBER, ENDPOINT, HOST) == (
        *OWN,
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
    network = replace(NETWORK, icc=False)
    *own, veth = bridge.endpoint(network, MEMBER, ENDPOINT, HOST)
    assert tuple(own) == OWN
    assert veth.isolated is True


def test_endpoint_that_publishes():
    """Published ports are held before they are translated, and turn hairpin on."""
    plan = bridge.endpoint(
        NETWORK,
        MEMBER,
        replace(ENDPOINT, published=(PORT, replace(PORT, protocol=UDP))),
        HOST,
    )
    veth, *rest = plan[len(OWN) :]
    assert plan[: len(OWN)] == OWN
    target = IPv4Address("10.1.0.2")
    assert veth.hairpin is True
    assert rest == [
        Hold(protocol=TCP, address=None, port=8080, target=target, target_port=80),
        Hold(protocol=UDP, address=None, port=8080, target=target, target_port=80),
        Element(set="any4", item=("tcp", "8080"), value=("10.1.0.2", "80")),
        Element(set="any4", item=("udp", "8080"), value=("10.1.0.2", "80")),
    ]


def test_network_that_allows_spoofing():
    """Where containers may spoof nothing of that is there."""
    network = replace(NETWORK, spoof=True)
    assert "table bridge pynet" not in names(bridge.network(network, MEMBER, HOST))
    (veth,) = bridge.endpoint(network, MEMBER, ENDPOINT, HOST)
    assert isinstance(veth, Veth)


def test_other_hosts():
    """A bridge ends at its host: nothing is known of others."""
    vtep = IPv4Address("192.0.2.2")
    remote = Remote(mac=ENDPOINT.mac, addresses=(IPv4Address("10.1.0.9"),), vtep=vtep)
    assert bridge.remote(NETWORK, MEMBER, remote, HOST) == ()
    assert bridge.peer(NETWORK, MEMBER, vtep, HOST) == ()
