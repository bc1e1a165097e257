"""Operations: their keys, what they stand on, their commands, and comparing them."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network

import pytest

from cnmdriver.model import TCP, UDP
from cnmdriver.plan import ops
from cnmdriver.plan.ops import (
    FLOOD,
    Accept,
    Address,
    Bridge,
    Difference,
    Element,
    Fdb,
    Hold,
    Interface,
    Namespace,
    Neighbour,
    Op,
    Route,
    Sysctl,
    Table,
    Veth,
    Vxlan,
)

BRIDGE = Bridge(name="pn-1", mac="02:42:0a:01:00:01", mtu=1450, alias="pynet:h:network")
VETH = Veth(
    name="pe-1",
    peer="pc-1",
    mac="02:42:0a:01:00:02",
    bridge="pn-1",
    mtu=1450,
    alias="pynet:h:endpoint",
)
ADDRESS = Address(device="pn-1", interface=ip_interface("10.1.0.1/24"))
FORWARD = Sysctl(path="net/ipv4/ip_forward", value="1", keep=True)
LOCAL = Sysctl(path="net/ipv4/conf/pn-1/route_localnet", value="1", device="pn-1")
TABLE = Table(family="inet", name="pynet", mark="text_1", text="table inet pynet {}")
IN_SET = Element(set="own4", item=("10.1.0.0/24", '"pn-1"'))
IN_MAP = Element(set="any4", item=("tcp", "8080"), value=("10.1.0.2", "80"))
SPACE = Namespace(name="blue", alias="pynet:h:namespace:blue")
FAR_END = Interface(name="pg-1", pair=("device", "blue", "pgp-1"), alias="pynet:h:g")
VXLAN = Vxlan(
    name="pv-1",
    vni=10_000_000,
    local=IPv4Address("192.0.2.1"),
    port=4789,
    bridge="pn-1",
    mtu=1450,
    alias="pynet:h:tunnel",
)
TUNNELLED = Fdb(device="pv-1", mac="02:42:0a:01:00:03", dst=IPv6Address("2001:db8::2"))
KNOWN = Fdb(device="pe-1", mac="02:42:0a:01:00:02")
EVERYBODY = Fdb(device="pv-1", mac=FLOOD, dst=IPv4Address("192.0.2.2"))
NEIGHBOUR = Neighbour(
    device="pn-1", address=IPv6Address("fd00::3"), mac="02:42:0a:01:00:03"
)
ROUTE = Route(
    destination=ip_network("10.1.0.0/24"),
    device="ph-1",
    source=IPv4Address("10.1.0.9"),
)
HOLD = Hold(
    protocol=TCP,
    address=IPv4Address("127.0.0.1"),
    port=8080,
    target=IPv4Address("10.1.0.2"),
    target_port=80,
)


@pytest.mark.parametrize(
    ("op", "key", "stands_on"),
    [
        (BRIDGE, ("device", "host", "pn-1"), ()),
        (VETH, ("device", "host", "pe-1"), (("device", "host", "pn-1"),)),
        (
            ADDRESS,
            ("address", "host", "pn-1", "10.1.0.1/24"),
            (("device", "host", "pn-1"),),
        ),
        (FORWARD, ("sysctl", "host", "net/ipv4/ip_forward"), ()),
        (
            LOCAL,
            ("sysctl", "host", "net/ipv4/conf/pn-1/route_localnet"),
            (("device", "host", "pn-1"),),
        ),
        (TABLE, ("table", "host", "inet", "pynet"), ()),
        (
            IN_SET,
            ("element", "host", "inet", "pynet", "own4", "10.1.0.0/24", '"pn-1"'),
            (("table", "host", "inet", "pynet"),),
        ),
        (
            IN_MAP,
            ("element", "host", "inet", "pynet", "any4", "tcp", "8080"),
            (("table", "host", "inet", "pynet"),),
        ),
        (Accept(version=6), ("accept", "host", "6"), ()),
        (HOLD, ("hold", "host", "tcp", "127.0.0.1", "8080"), ()),
        (
            replace(HOLD, address=None, protocol=UDP),
            ("hold", "host", "udp", "*", "8080"),
            (),
        ),
        (SPACE, ("namespace", "host", "blue"), ()),
        (FAR_END, ("device", "host", "pg-1"), (("device", "blue", "pgp-1"),)),
        (VXLAN, ("device", "host", "pv-1"), (("device", "host", "pn-1"),)),
        (
            TUNNELLED,
            ("fdb", "host", "pv-1", "02:42:0a:01:00:03", "self"),
            (("device", "host", "pv-1"),),
        ),
        (
            KNOWN,
            ("fdb", "host", "pe-1", "02:42:0a:01:00:02", "master"),
            (("device", "host", "pe-1"),),
        ),
        (
            EVERYBODY,
            ("fdb", "host", "pv-1", FLOOD, "self", "192.0.2.2"),
            (("device", "host", "pv-1"),),
        ),
        (
            NEIGHBOUR,
            ("neighbour", "host", "pn-1", "fd00::3"),
            (("device", "host", "pn-1"),),
        ),
        (ROUTE, ("route", "host", "10.1.0.0/24"), (("device", "host", "ph-1"),)),
        (
            Sysctl(where="blue", path="net/x", value="0"),
            ("sysctl", "blue", "net/x"),
            (("namespace", "host", "blue"),),
        ),
    ],
)
def test_keys(op, key, stands_on):
    """A key names an object whatever its content, and what it stands on is a key."""
    assert op.key == key
    assert op.stands_on() == stands_on


@pytest.mark.parametrize(
    "op",
    [BRIDGE, VETH, ADDRESS, LOCAL, TABLE, IN_SET, HOLD]
    + [VXLAN, KNOWN, TUNNELLED, NEIGHBOUR, ROUTE],
)
def test_another_place(op):
    """The same object in another namespace is another object, on other ground."""
    there = replace(op, where="pynet")
    assert there.key == (op.key[0], "pynet", *op.key[2:])
    ground = there.stands_on()
    if op.stands_on():
        assert [key[1] for key in ground] == ["pynet"] * len(op.stands_on())
    else:
        assert ground == (("namespace", "host", "pynet"),)


def test_bare_op():
    """An operation without a kind has neither key nor commands."""
    with pytest.raises(NotImplementedError):
        _ = Op().key
    with pytest.raises(NotImplementedError):
        Op().commands()
    assert Op().stands_on() == ()


def words(op):
    """Return the commands as lines."""
    return [" ".join(command) for command in op.commands()]


@pytest.mark.parametrize(
    ("op", "lines"),
    [
        (
            BRIDGE,
            [
                (
                    "ip link add pn-1 address 02:42:0a:01:00:01 group 28782"
                    " type bridge mcast_snooping 0"
                ),
                "ip link set pn-1 addrgenmode none",
                "ip link set pn-1 mtu 1450",
                "ip link set pn-1 alias pynet:h:network",
                "ip link set pn-1 up",
            ],
        ),
        (
            VETH,
            [
                (
                    "ip link add pe-1 mtu 1450 group 28782 type veth peer name pc-1"
                    " mtu 1450 group 28782 address 02:42:0a:01:00:02"
                ),
                "ip link set pe-1 addrgenmode none master pn-1",
                "ip link set pe-1 alias pynet:h:endpoint",
                "bridge link set dev pe-1 hairpin off isolated off",
                "ip link set pe-1 up",
            ],
        ),
        (
            replace(VETH, mtu=1279, hairpin=True, isolated=True),
            [
                (
                    "ip link add pe-1 mtu 1279 group 28782 type veth peer name pc-1"
                    " mtu 1279 group 28782 address 02:42:0a:01:00:02"
                ),
                "ip link set pe-1 master pn-1",
                "ip link set pe-1 alias pynet:h:endpoint",
                "bridge link set dev pe-1 hairpin on isolated on",
                "ip link set pe-1 up",
            ],
        ),
        (ADDRESS, ["ip addr add 10.1.0.1/24 dev pn-1"]),
        (
            replace(ADDRESS, interface=ip_interface("fd00::1/64")),
            ["ip addr add fd00::1/64 dev pn-1 nodad"],
        ),
        (FORWARD, ["sysctl -qew net/ipv4/ip_forward=1"]),
        (LOCAL, ["sysctl -qew net/ipv4/conf/pn-1/route_localnet=1"]),
        (TABLE, ["nft table inet pynet {}"]),
        (IN_SET, ['nft add element inet pynet own4 { 10.1.0.0/24 . "pn-1" }']),
        (IN_MAP, ["nft add element inet pynet any4 { tcp . 8080 : 10.1.0.2 . 80 }"]),
        (
            Accept(version=4),
            [
                (
                    "iptables -w 5 -I DOCKER-USER -m devgroup --src-group 0x706e"
                    " -m comment --comment pynet -j ACCEPT"
                ),
                (
                    "iptables -w 5 -I DOCKER-USER -m devgroup --dst-group 0x706e"
                    " -m comment --comment pynet -j ACCEPT"
                ),
            ],
        ),
        (HOLD, []),
        (
            SPACE,
            [
                "ip netns add blue",
                "ip -n blue link set lo alias pynet:h:namespace:blue",
                "ip -n blue link set lo up",
            ],
        ),
        (
            FAR_END,
            [
                "sysctl -qew net/ipv6/conf/pg-1/addr_gen_mode=1",
                "ip link set pg-1 alias pynet:h:g",
                "ip link set pg-1 up",
            ],
        ),
        (
            replace(VXLAN, where="blue"),
            [
                (
                    "ip link add pv-1 netns blue mtu 1450 group 28782 type vxlan"
                    " id 10000000 local 192.0.2.1 dstport 4789 nolearning ttl 64"
                ),
                "ip -n blue link set pv-1 addrgenmode none master pn-1",
                "ip -n blue link set pv-1 alias pynet:h:tunnel",
                (
                    "bridge -n blue link set dev pv-1 learning off neigh_suppress on"
                    " flood off mcast_flood off bcast_flood off isolated off"
                ),
                "ip -n blue link set pv-1 up",
            ],
        ),
        (
            replace(VXLAN, mtu=1279, flood=True, isolated=True, alias=None),
            [
                (
                    "ip link add pv-1 mtu 1279 group 28782 type vxlan"
                    " id 10000000 local 192.0.2.1 dstport 4789 nolearning ttl 64"
                ),
                "ip link set pv-1 master pn-1",
                "ip link set pv-1 alias ",
                (
                    "bridge link set dev pv-1 learning off neigh_suppress on"
                    " flood on mcast_flood on bcast_flood on isolated on"
                ),
                "ip link set pv-1 up",
            ],
        ),
        (
            replace(VETH, where="blue"),
            [
                (
                    "ip link add pe-1 netns blue mtu 1450 group 28782 type veth"
                    " peer name pc-1 mtu 1450 group 28782 address 02:42:0a:01:00:02"
                ),
                "ip -n blue link set pe-1 addrgenmode none master pn-1",
                "ip -n blue link set pe-1 alias pynet:h:endpoint",
                "bridge -n blue link set dev pe-1 hairpin off isolated off",
                "ip -n blue link set pe-1 up",
            ],
        ),
        (
            replace(TUNNELLED, where="blue"),
            [
                (
                    "bridge -n blue fdb replace 02:42:0a:01:00:03 dev pv-1"
                    " dst 2001:db8::2 self permanent"
                )
            ],
        ),
        (
            EVERYBODY,
            [
                (
                    "bridge fdb append 00:00:00:00:00:00 dev pv-1"
                    " dst 192.0.2.2 self permanent"
                )
            ],
        ),
        (KNOWN, ["bridge fdb replace 02:42:0a:01:00:02 dev pe-1 master static sticky"]),
        (
            replace(NEIGHBOUR, where="blue"),
            [
                (
                    "ip -n blue -6 neigh replace fd00::3 lladdr 02:42:0a:01:00:03"
                    " dev pn-1 nud permanent"
                )
            ],
        ),
        (ROUTE, ["ip -4 route replace 10.1.0.0/24 dev ph-1 src 10.1.0.9"]),
        (
            replace(IN_SET, where="blue", family="bridge"),
            [
                (
                    "ip netns exec blue nft add element bridge pynet own4"
                    ' { 10.1.0.0/24 . "pn-1" }'
                )
            ],
        ),
        (
            replace(TABLE, where="blue"),
            ["ip netns exec blue nft table inet pynet {}"],
        ),
        (
            Sysctl(where="blue", path="net/x", value="0"),
            ["ip netns exec blue sysctl -qew net/x=0"],
        ),
    ],
)
def test_commands(op, lines):
    """An operation reads as the commands a person would type."""
    assert words(op) == lines


def test_accept_of_ipv6():
    """IPv6 has a program of its own, and the same rules."""
    assert [c[0] for c in Accept(version=6).commands()] == ["ip6tables"] * 2
    assert [c[1:] for c in Accept(version=6).commands()] == [
        c[1:] for c in Accept(version=4).commands()
    ]


def test_edge_of_ipv6():
    """A pair of exactly 1280 bytes has IPv6 and the setting that goes with it."""
    assert "addrgenmode" in words(replace(VETH, mtu=1280))[1]


def test_commands_of_what_was_found():
    """What the kernel does not show is an empty word, and no failure."""
    found = replace(VETH, peer=None, mac=None, alias=None)
    assert found.commands()[0][10:13] == ("peer", "name", "")
    assert found.commands()[0][-1] == ""
    assert found.commands()[2][-1] == ""
    assert replace(BRIDGE, alias=None).commands()[3][-1] == ""
    assert replace(TABLE, text=None).commands() == (("nft", ""),)


def test_element_text():
    """An element is written as nft writes it between the braces."""
    assert IN_SET.text == '10.1.0.0/24 . "pn-1"'
    assert IN_MAP.text == "tcp . 8080 : 10.1.0.2 . 80"


def test_what_must_be_made_anew():
    """A pair's far end and a tunnel's own cannot be changed on the living object."""
    assert {"peer", "mac"} == Veth.REMAKE
    assert {"vni", "local", "port"} == Vxlan.REMAKE
    for kind in (Op, Bridge, Interface, Address, Sysctl, Table, Element, Accept, Fdb):
        assert frozenset() == kind.REMAKE


# Comparing.


def test_differing():
    """Fields differ by their content; None is what the kernel does not show."""
    assert ops.differing(BRIDGE, BRIDGE) == ()
    found = replace(BRIDGE, mtu=1400, up=False)
    assert ops.differing(BRIDGE, found) == ("mtu", "up")
    assert ops.differing(BRIDGE, replace(BRIDGE, alias=None)) == ()
    assert ops.differing(replace(BRIDGE, alias=None), BRIDGE) == ()
    hidden = replace(VETH, peer=None, mac=None, bridge="docker0")
    assert ops.differing(VETH, hidden) == ("bridge",)


def test_falsy_is_not_unknown():
    """No, nought and nothing are contents and differ from others."""
    assert ops.differing(replace(BRIDGE, up=False), BRIDGE) == ("up",)
    assert ops.differing(BRIDGE, replace(BRIDGE, alias="")) == ("alias",)
    assert ops.differing(IN_MAP, replace(IN_MAP, value=())) == ("value",)


def test_describe():
    """A difference reads as what is and what should be."""
    assert ops.describe(BRIDGE, BRIDGE) == ""
    assert ops.describe(BRIDGE, replace(BRIDGE, mtu=1400)) == (
        "mtu is 1400 and should be 1450"
    )
    assert ops.describe(BRIDGE, replace(BRIDGE, mtu=1400, up=False)) == (
        "mtu is 1400 and should be 1450, up is False and should be True"
    )


def test_union():
    """What several plans want appears once, at its first place, as the last says."""
    changed = replace(BRIDGE, mtu=9000)
    assert ops.union([]) == ()
    assert ops.union([(TABLE, BRIDGE), (VETH, TABLE), (changed, HOLD)]) == (
        TABLE,
        changed,
        VETH,
        HOLD,
    )


def test_without():
    """What others keep is taken out by key, whatever its content."""
    kept = (replace(BRIDGE, mtu=9000), TABLE)
    assert ops.without((TABLE, BRIDGE, VETH), kept) == (VETH,)
    assert ops.without((TABLE, BRIDGE), ()) == (TABLE, BRIDGE)


def test_compare():
    """Each object is lacking, changed, as it should be, or surplus."""
    changed = replace(BRIDGE, mtu=1400)
    found = (changed, TABLE, HOLD, LOCAL, FORWARD)
    difference = ops.compare((TABLE, BRIDGE, VETH), found)
    assert difference.lacking == (VETH,)
    assert difference.changed == ((BRIDGE, changed),)
    assert difference.surplus == (HOLD, LOCAL)
    assert bool(difference) is True


def test_compare_equal():
    """A kernel that holds the plan differs in nothing, in whatever order."""
    difference = ops.compare((TABLE, BRIDGE), (BRIDGE, TABLE, FORWARD))
    assert difference == Difference(lacking=(), changed=(), surplus=())
    assert bool(difference) is False


def test_lasting():
    """Of a difference that lasts, each object differed before, in whatever way."""
    none = Difference(lacking=(), changed=(), surplus=())
    changed = replace(BRIDGE, mtu=1400)
    before = Difference(
        lacking=(VETH,), changed=((BRIDGE, changed),), surplus=(HOLD, LOCAL)
    )
    now = Difference(
        lacking=(BRIDGE, TABLE), changed=((VETH, VETH),), surplus=(LOCAL, FORWARD)
    )
    left = ops.lasting(before, now)
    assert left.lacking == (BRIDGE,)
    assert left.changed == ((VETH, VETH),)
    assert left.surplus == (LOCAL,)
    assert not ops.lasting(none, now)
    assert not ops.lasting(before, none)


@pytest.mark.parametrize("part", ["lacking", "changed", "surplus"])
def test_any_part_is_a_difference(part):
    """One object of any kind is a difference."""
    none = Difference(lacking=(), changed=(), surplus=())
    one = ((BRIDGE, BRIDGE),) if part == "changed" else (BRIDGE,)
    assert bool(replace(none, **{part: one})) is True


def test_lines():
    """Each difference is a line that names the object, and what differs in it."""
    difference = Difference(
        lacking=(TABLE, ADDRESS),
        changed=((BRIDGE, replace(BRIDGE, mtu=1400)),),
        surplus=(replace(VETH, where="pynet"), HOLD),
    )
    lines = [
        "+ table inet pynet",
        "+ address pn-1 10.1.0.1/24",
        "~ device pn-1: mtu is 1400 and should be 1450",
        "- pynet: device pe-1",
        "- hold tcp 127.0.0.1 8080",
    ]
    assert list(difference.lines()) == lines
    assert list(difference.lines(surplus=False)) == lines[:3]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (FORWARD, "sysctl net/ipv4/ip_forward"),
        (IN_MAP, "element inet pynet any4 tcp 8080"),
        (replace(BRIDGE, where="blue"), "blue: device pn-1"),
        (Accept(version=4), "accept 4"),
        (replace(HOLD, address=IPv6Address("::1")), "hold tcp ::1 8080"),
    ],
)
def test_name(op, name):
    """People see kind and key, and the place where it is not the host's."""
    assert ops.name(op) == name
