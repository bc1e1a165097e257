"""The ruleset's text, and which elements networks and ports add to it."""

import hashlib
import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.model import SCTP, TCP, UDP, Endpoint, Network, Published, Subnet
from cnmdriver.plan import firewall
from cnmdriver.plan.ops import Element, Table

FOUR = Subnet(space="local", pool=ip_network("10.1.0.0/24"))
SIX = Subnet(space="local", pool=ip_network("fd00::/64"))
NETWORK = Network(id="n", mode="bridge", subnets=(FOUR,), mtu=1500)
ENDPOINT = Endpoint(
    network="n", id="e", host="h", boot="b", mac="m", ipv4=ip_interface("10.1.0.2/24")
)
DUAL = replace(ENDPOINT, ipv6=ip_interface("fd00::2/64"))


def texts(plan):
    """Write elements short."""
    return [f"{op.set}: {op.text}" for op in plan]


def port(number, host_port, ip=None, protocol=TCP):
    """Publish a port."""
    address = None if ip is None else ip_address(ip)
    return Published(
        protocol=protocol, port=number, host_ip=address, host_port=host_port
    )


# The table.


def test_table():
    """The table's mark is a digest of its text, and stands in it as an empty chain."""
    table = firewall.table()
    digest = hashlib.sha256(firewall.TEXT.encode()).hexdigest()[:8]
    assert (table.family, table.name) == ("inet", "pynet")
    mark = f"text_{digest}_11_39"
    assert table.mark == mark
    assert table.text == f"{firewall.TEXT}\tchain {mark} {{\n\t}}\n}}\n"
    assert table.text.count("{") == table.text.count("}")


def chain(name):
    """Return the lines of a chain."""
    found = re.search(rf"\tchain {name} {{\n(.*?)\n\t}}", firewall.TEXT, re.DOTALL)
    return [line.strip() for line in found[1].splitlines()]


def test_guard_comes_first():
    """What comes from outside for loopback is dropped before it is translated."""
    assert chain("guard") == [
        "type filter hook prerouting priority raw; policy accept;",
        'ip daddr 127.0.0.0/8 iifname != "lo" counter drop',
        'ip6 daddr ::1 iifname != "lo" counter drop',
    ]


def test_publish_translates_the_exact_address_first():
    """A port bound to one address wins over the same port on all of them."""
    assert chain("publish") == [
        "fib daddr type != local return",
        "ip6 daddr ::1 return",
        "iifname @icc_off return",
        "dnat ip to ip daddr . meta l4proto . th dport map @bound4",
        "dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6",
        "dnat ip to meta l4proto . th dport map @any4",
        "dnat ip6 to meta l4proto . th dport map @any6",
    ]
    assert chain("prerouting")[1:] == chain("output")[1:] == ["jump publish"]


def test_known_drops_before_it_accepts():
    """Internal networks are closed before translated packets are let in."""
    assert chain("known") == [
        "ct state established,related accept",
        "iifname . oifname @self jump within",
        "iifname @internal counter drop",
        "oifname @internal counter drop",
        "ct status dnat accept",
        "iifname @hosts counter drop",
        "oifname @bridges counter drop",
        "oifname @docker counter drop",
    ]


def test_every_set_that_is_filled_is_there():
    """Elements only go to sets and maps that the text declares."""
    declared = set(re.findall(r"^\t(?:set|map) (\w+)", firewall.TEXT, re.MULTILINE))
    dual = replace(NETWORK, subnets=(FOUR, SIX))
    ports = (port(80, 80), port(81, 81, "10.9.9.9"), port(82, 82, "fd09::9"))
    filled = {
        op.set
        for plan in (
            firewall.network(replace(dual, icc=False), "b"),
            firewall.network(replace(dual, internal=True), "b"),
            firewall.published(replace(DUAL, published=ports)),
            firewall.docker(["docker0"]),
            firewall.access(NETWORK, "b"),
            firewall.tunnel(1, ip_address("192.0.2.1"), 4789),
            firewall.tunnel(1, ip_address("2001:db8::1"), 4789),
            map(firewall.vtep, map(ip_address, ("192.0.2.2", "2001:db8::2"))),
        )
        for op in plan
    }
    assert filled == declared


# Networks.


def test_network():
    """An open network is a bridge whose pool is hidden behind the host."""
    assert firewall.network(NETWORK, "pn-1") == (
        Element(set="bridges", item=('"pn-1"',)),
        Element(set="self", item=('"pn-1"', '"pn-1"')),
        Element(set="own4", item=("10.1.0.0/24", '"pn-1"')),
        Element(set="masq4", item=("10.1.0.0/24",)),
    )


@pytest.mark.parametrize(
    ("change", "elements"),
    [
        (
            {"subnets": (FOUR, SIX)},
            [
                'bridges: "b"',
                'self: "b" . "b"',
                'own4: 10.1.0.0/24 . "b"',
                "masq4: 10.1.0.0/24",
                'own6: fd00::/64 . "b"',
                "masq6: fd00::/64",
            ],
        ),
        ({"subnets": ()}, ['bridges: "b"', 'self: "b" . "b"']),
        (
            {"icc": False},
            [
                'bridges: "b"',
                'icc_off: "b"',
                'self: "b" . "b"',
                'own4: 10.1.0.0/24 . "b"',
                "masq4: 10.1.0.0/24",
            ],
        ),
        (
            {"masquerade": False},
            ['bridges: "b"', 'self: "b" . "b"', 'own4: 10.1.0.0/24 . "b"'],
        ),
        (
            {"internal": True},
            [
                'bridges: "b"',
                'internal: "b"',
                'self: "b" . "b"',
                'own4: 10.1.0.0/24 . "b"',
            ],
        ),
        (
            {"gateway": "docker"},
            [
                'bridges: "b"',
                'internal: "b"',
                'self: "b" . "b"',
                'own4: 10.1.0.0/24 . "b"',
            ],
        ),
    ],
)
def test_kinds_of_networks(change, elements):
    """Each setting adds or leaves out elements of its own and no others."""
    assert texts(firewall.network(replace(NETWORK, **change), "b")) == elements


@pytest.mark.parametrize(
    ("internal", "gateway", "closed"),
    [
        (False, "pynet", False),
        (True, "pynet", True),
        (False, "docker", True),
        (True, "docker", True),
    ],
)
def test_closed(internal, gateway, closed):
    """The host routes for a network unless it is internal or Docker is its router."""
    network = replace(NETWORK, internal=internal, gateway=gateway)
    assert firewall.closed(network) is closed


DUAL_NETWORK = replace(NETWORK, subnets=(FOUR, SIX))


@pytest.mark.parametrize(
    ("change", "elements"),
    [
        ({}, ['bridges: "b"', 'hosts: "b"']),
        ({"icc": False}, ['bridges: "b"', 'icc_off: "b"', 'hosts: "b"']),
        ({"masquerade": False}, ['bridges: "b"', 'hosts: "b"']),
        ({"internal": True}, ['bridges: "b"', 'internal: "b"']),
        ({"gateway": "docker"}, ['bridges: "b"', 'internal: "b"']),
    ],
)
def test_access(change, elements):
    """A host's own device is no way out; only what is open lets ports pass by it."""
    found = texts(firewall.access(replace(DUAL_NETWORK, **change), "b"))
    assert found == [*elements, 'own4: 10.1.0.0/24 . "b"', 'own6: fd00::/64 . "b"']


def test_marked():
    """A table of another family and place has a mark of its own text."""
    table = firewall.marked("bridge", "table bridge pynet {\n", where="blue")
    digest = hashlib.sha256(b"table bridge pynet {\n").hexdigest()[:8]
    assert table == Table(
        where="blue",
        family="bridge",
        name="pynet",
        mark=f"text_{digest}_0_0",
        text=f"table bridge pynet {{\n\tchain text_{digest}_0_0 {{\n\t}}\n}}\n",
    )


def test_docker_bridges():
    """Docker's bridges are named one by one."""
    assert firewall.docker(["docker0", "br-1"]) == (
        Element(set="docker", item=('"docker0"',)),
        Element(set="docker", item=('"br-1"',)),
    )
    assert firewall.docker([]) == ()


# Published ports.


@pytest.mark.parametrize(
    ("endpoint", "published", "elements"),
    [
        (ENDPOINT, port(80, 8080), ["any4: tcp . 8080 : 10.1.0.2 . 80"]),
        (
            DUAL,
            port(80, 8080),
            ["any4: tcp . 8080 : 10.1.0.2 . 80", "any6: tcp . 8080 : fd00::2 . 80"],
        ),
        (DUAL, port(53, 54, "0.0.0.0", UDP), ["any4: udp . 54 : 10.1.0.2 . 53"]),
        (DUAL, port(53, 54, "::", SCTP), ["any6: sctp . 54 : fd00::2 . 53"]),
        (
            DUAL,
            port(80, 8080, "192.0.2.1"),
            ["bound4: 192.0.2.1 . tcp . 8080 : 10.1.0.2 . 80"],
        ),
        (
            DUAL,
            port(80, 8080, "127.0.0.1"),
            ["bound4: 127.0.0.1 . tcp . 8080 : 10.1.0.2 . 80"],
        ),
        (
            DUAL,
            port(80, 8080, "fd09::9"),
            ["bound6: fd09::9 . tcp . 8080 : fd00::2 . 80"],
        ),
        (DUAL, port(80, 8080, "::1"), []),
        (ENDPOINT, port(80, 8080, "fd09::9"), []),
        (ENDPOINT, port(80, 8080, "::"), []),
        (replace(ENDPOINT, ipv4=None), port(80, 8080), []),
    ],
)
def test_published(endpoint, published, elements):
    """A port is translated to an address of its family; the rest is relayed."""
    found = firewall.published(replace(endpoint, published=(published,)))
    assert texts(found) == elements


def test_several_published():
    """Each port has elements of its own, in the order they were published."""
    ports = (port(80, 8080), port(53, 53, protocol=UDP))
    assert firewall.published(replace(ENDPOINT, published=ports)) == (
        Element(set="any4", item=("tcp", "8080"), value=("10.1.0.2", "80")),
        Element(set="any4", item=("udp", "53"), value=("10.1.0.2", "53")),
    )
    assert firewall.published(ENDPOINT) == ()


def test_unspecified():
    """The unspecified address is of the same family."""
    assert firewall.unspecified(IPv4Address("10.1.0.2")) == IPv4Address("0.0.0.0")
    assert firewall.unspecified(IPv6Address("::1")) == IPv6Address("::")
