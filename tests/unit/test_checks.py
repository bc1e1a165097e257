"""Records that can be used, and those that stand under a wrong key or say odd things."""

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.errors import StoreError
from cnmdriver.model import (
    TCP,
    Alive,
    Answer,
    Block,
    Cluster,
    Endpoint,
    Fence,
    Hop,
    Host,
    Kept,
    Knock,
    Member,
    Network,
    Pool,
    Published,
    Question,
    Reservation,
    Subnet,
    Vni,
    Watermark,
)
from cnmdriver.store import checks, records
from cnmdriver.store.records import Space

V4, V6 = ip_network("10.1.0.0/24"), ip_network("fd00:1::/64")
IP4, IP6 = ip_address("10.1.0.2"), ip_address("fd00:1::2")
PORT = Published(protocol=TCP, port=80, host_ip=IP4, host_port=8080)
HOST = Host(id="h1", name="one (é)", version="1.0", vtep=ip_address("192.0.2.1"))
SUBNETS = (
    Subnet(space="s", pool=V4, gateway=ip_address("10.1.0.1"), reserved=(IP4,)),
    Subnet(space="", pool=V6, gateway=ip_address("fd00:1::1")),
)
NETWORK = Network(id="n1", mode="overlay", subnets=SUBNETS, mtu=1450, vni=10_000_000)
MEMBER = Member(
    network="n1",
    host="h1",
    docker_id="d" * 64,
    bridge="pn-0123456789",
    options=(("any thing", "\n"),),
    claims=("s/10.1.0.0/24/10.1.0.0/25",),
    ipv4=ip_interface("10.1.0.9/24"),
)
POOL = Pool(space="s", cidr=V4, network="n1")
HELD = Reservation(space="s", cidr=V4, ip=IP4, host="h1", endpoint="e1", name="a b (é)")
ENDPOINT = Endpoint(
    network="n1",
    id="e1",
    host="h1",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    ipv6=ip_interface("fd00:1::2/64"),
    sandbox="/run/docker/netns/0123",
    published=(PORT,),
)
BLOCK = Block(host="h1")

QUESTION = Question(id="q", network="n1", endpoint="e1", other="e2")
HOP = Hop(name="port", wanted="a b", found="c", well=None, remedy="ip link set x up")
ANSWER = Answer(id="q", hops=(HOP,) * 64)

SOUND = [
    ("cluster", Cluster(id="c", schema=1)),
    ("hosts/h1", HOST),
    ("hosts/h1", replace(HOST, vtep=None, mtu=65536)),
    ("alive/h1", Alive(instance="i", boot="b", since=1.5)),
    ("fence/h1", Fence(instance="i", count=3)),
    ("kept/h1", Kept()),
    ("knocks/h1", Knock(instance="i")),
    ("questions/h1/h2", QUESTION),
    ("questions/h1/h2", Question(id="q")),
    ("questions/h1/h2", Question(id="q", name="a b (é)")),
    ("answers/h1/h2", ANSWER),
    ("watermarks/h1", Watermark(revision=7)),
    ("networks/n1", NETWORK),
    ("networks/n1", replace(NETWORK, mode="magic", gateway="wand", vni=0)),
    ("members/n1/h1", MEMBER),
    ("members/n1/h1", Member(network="n1", host="h1")),
    ("spaces/s", Space(claims=9)),
    ("spaces/", Space()),
    (records.pool("s", V4), POOL),
    (records.pool("s", V6), replace(POOL, cidr=V6)),
    (records.address("s", V4, IP4), HELD),
    (records.address("s", V6, IP6), replace(HELD, cidr=V6, ip=IP6, endpoint="")),
    (records.block("s", V4, ip_network("10.1.0.64/26")), BLOCK),
    (records.block("s", V6, V6), replace(BLOCK, wanted=(IP6,), lent=(IP6,))),
    ("endpoints/n1/e1", ENDPOINT),
    ("endpoints/n1/e1", replace(ENDPOINT, ipv4=None, ipv6=None, published=())),
    ("vnis/16777215", Vni(network="n1")),
    ("shapes/of/the/future", object()),
]

LONG = "x" * 129
KEYS = [
    ("cluster/x", Cluster(id="c", schema=1)),
    ("hosts/h2", HOST),
    ("hosts", HOST),
    ("hosts/h1/x", HOST),
    ("hosts/h1/", HOST),
    ("alive/", Alive(instance="i", boot="b")),
    ("alive/a/b", Alive(instance="i", boot="b")),
    ("fence/h 1", Fence(instance="i")),
    ("kept/\x1b[2J", Kept()),
    ("watermarks/h/h", Watermark(revision=1)),
    ("questions/h1", QUESTION),
    ("questions/h1/h2/h3", QUESTION),
    ("questions/h1/h 2", QUESTION),
    ("answers/h1", ANSWER),
    ("answers//h1", ANSWER),
    ("networks/n2", NETWORK),
    ("members/n1", MEMBER),
    ("members/n2/h1", MEMBER),
    ("members/n1/h2", MEMBER),
    ("members/n1/h1/x", MEMBER),
    ("spaces/a/b", Space()),
    ("pools/s/10.2.0.0/24", POOL),
    ("pools/t/10.1.0.0/24", POOL),
    ("pools/s/10.1.0.0/255.255.255.0", POOL),
    ("pools/s/10.1.0.0", POOL),
    ("addresses/s/10.1.0.0/24/10.1.0.3", HELD),
    ("addresses/t/10.1.0.0/24/10.1.0.2", HELD),
    ("addresses/s/10.1.0.0/25/10.1.0.2", HELD),
    ("addresses/s/10.1.0.2", HELD),
    ("blocks/s/10.1.0.0/24", BLOCK),
    ("blocks/s/10.1.0.0/24/10.1.0.1/26", BLOCK),
    ("blocks/s/10.1.0.0/24/10.1.0.00/26", BLOCK),
    ("blocks/s/ten/24/10.1.0.0/26", BLOCK),
    ("endpoints/n2/e1", ENDPOINT),
    ("endpoints/n1/e2", ENDPOINT),
    ("endpoints/x", ENDPOINT),
    ("endpoints/n1/e1/x", ENDPOINT),
    ("vnis/1/2", Vni(network="n1")),
]

VALUES = [
    ("questions/h1/h2", replace(QUESTION, id=""), "id ''"),
    ("questions/h1/h2", replace(QUESTION, name="x" * 256), "name of"),
    ("questions/h1/h2", replace(QUESTION, endpoint="../e"), "endpoint '../e'"),
    ("answers/h1/h2", replace(ANSWER, hops=(HOP,) * 65), "number of hops"),
    ("answers/h1/h2", Answer(id="q", hops=(replace(HOP, found="\x1b["),)), "found"),
    ("answers/h1/h2", Answer(id="q", hops=(replace(HOP, name="x" * 65),)), "name of"),
    ("answers/h1/h2", Answer(id="q", hops=(replace(HOP, remedy="x" * 513),)), "remedy"),
    ("cluster", Cluster(id="a/b", schema=1), "id 'a/b'"),
    ("cluster", Cluster(id="c", schema=-1), "schema -1"),
    ("hosts/h1", replace(HOST, id="../x"), "id '../x'"),
    ("hosts/h1", replace(HOST, id="h1\n"), r"id 'h1\n'"),
    ("hosts/h1", replace(HOST, namespace="../x"), "namespace '../x'"),
    ("hosts/h1", replace(HOST, namespace=".."), "namespace '..'"),
    ("hosts/h1", replace(HOST, name="\x1b[2J"), r"name '\x1b[2J'"),
    ("hosts/h1", replace(HOST, name="x" * 256), "name of 256 characters"),
    ("hosts/h1", replace(HOST, version="\n"), r"version '\n'"),
    ("hosts/h1", replace(HOST, vtep=ip_address("224.0.0.1")), "vtep 224.0.0.1"),
    ("hosts/h1", replace(HOST, vtep=ip_address("::")), "vtep ::"),
    ("hosts/h1", replace(HOST, vtep=ip_address("127.0.0.1")), "vtep 127.0.0.1"),
    ("hosts/h1", replace(HOST, vtep=ip_address("fe80::1%x")), "vtep fe80::1%x"),
    ("hosts/h1", replace(HOST, vxlan_port=0), "vxlan_port 0"),
    ("hosts/h1", replace(HOST, vxlan_port=65536), "vxlan_port 65536"),
    ("hosts/h1", replace(HOST, mtu=67), "mtu 67"),
    ("alive/h1", Alive(instance="x" * 129, boot="b"), "instance of 129 characters"),
    ("alive/h1", Alive(instance="i", boot="\0"), r"boot '\x00'"),
    ("fence/h1", Fence(instance="i", count=1 << 63), f"count {1 << 63}"),
    ("fence/h1", Fence(instance="\n"), r"instance '\n'"),
    ("knocks/h1", Knock(instance="\n"), r"instance '\n'"),
    ("watermarks/h1", Watermark(revision=-1), "revision -1"),
    ("networks/n1", replace(NETWORK, id=LONG), f"id '{LONG[:80]}'"),
    ("networks/n1", replace(NETWORK, mode=""), "mode ''"),
    ("networks/n1", replace(NETWORK, gateway="a b"), "gateway 'a b'"),
    ("networks/n1", replace(NETWORK, mtu=1 << 31), f"mtu {1 << 31}"),
    ("networks/n1", replace(NETWORK, vni=1 << 24), f"vni {1 << 24}"),
    ("networks/n1", replace(NETWORK, vni=-1), "vni -1"),
    ("networks/n1", replace(NETWORK, subnets=SUBNETS[:1] * 65), "number of subnets"),
    (
        "networks/n1",
        replace(NETWORK, subnets=SUBNETS[:1] * 2),
        "subnet 10.1.0.0/24 beside 10.1.0.0/24",
    ),
    *(
        ("networks/n1", replace(NETWORK, subnets=(replace(SUBNETS[0], **odd),)), said)
        for odd, said in (
            ({"space": "a/b"}, "space 'a/b'"),
            ({"gateway": IP6}, "gateway fd00:1::2 outside 10.1.0.0/24"),
            ({"gateway": ip_address("10.1.1.1")}, "gateway 10.1.1.1 outside"),
            ({"reserved": (ip_address("10.1.1.1"),)}, "reserved 10.1.1.1 outside"),
            ({"reserved": (IP4,) * 8193}, "number of reserved addresses"),
        )
    ),
    ("members/n1/h1", replace(MEMBER, network="a b"), "network 'a b'"),
    ("members/n1/h1", replace(MEMBER, host=""), "host ''"),
    ("members/n1/h1", replace(MEMBER, docker_id="$(x)"), "docker_id '$(x)'"),
    ("members/n1/h1", replace(MEMBER, bridge='br"0'), "bridge 'br\"0'"),
    ("members/n1/h1", replace(MEMBER, bridge=".."), "bridge '..'"),
    ("members/n1/h1", replace(MEMBER, bridge="b" * 16), f"bridge '{'b' * 16}'"),
    ("members/n1/h1", replace(MEMBER, prefix="../e"), "prefix '../e'"),
    ("members/n1/h1", replace(MEMBER, claims=("a b",)), "claim 'a b'"),
    ("members/n1/h1", replace(MEMBER, claims=("a",) * 8193), "number of options"),
    (
        "members/n1/h1",
        replace(MEMBER, ipv4=ip_interface("255.0.0.1/0").__class__("0.0.0.0/0")),
        "address 0.0.0.0",
    ),
    ("spaces/s", Space(claims=-1), "claims -1"),
    (records.pool("s", V4), replace(POOL, network=""), "network ''"),
    (records.pool("s", V4), replace(POOL, space="a b"), "space 'a b'"),
    (records.address("s", V4, IP4), replace(HELD, host="a b"), "host 'a b'"),
    (records.address("s", V4, IP4), replace(HELD, space="a b"), "space 'a b'"),
    (records.address("s", V4, IP4), replace(HELD, endpoint="/"), "endpoint '/'"),
    (records.address("s", V4, IP4), replace(HELD, name="\n"), r"name '\n'"),
    (
        records.address("s", V4, IP6),
        replace(HELD, ip=IP6),
        "address fd00:1::2 outside 10.1.0.0/24",
    ),
    (records.block("s", V4, V4), replace(BLOCK, host="a b"), "host 'a b'"),
    (records.block("s s", V4, V4), BLOCK, "space 's s'"),
    (records.block("s", V4, V6), BLOCK, "block fd00:1:: outside 10.1.0.0/24"),
    (records.block("s", V4, ip_network("10.1.0.0/23")), BLOCK, "block 10.1.1.255"),
    (records.block("s", V4, V4), replace(BLOCK, lent=(IP6,)), "address fd00:1::2"),
    (records.block("s", V4, V4), replace(BLOCK, wanted=(IP6,)), "address fd00:1::2"),
    ("endpoints/n1/e1", replace(ENDPOINT, network="a b"), "network 'a b'"),
    ("endpoints/n1/e1", replace(ENDPOINT, id="x; reboot"), "id 'x; reboot'"),
    ("endpoints/n1/e1", replace(ENDPOINT, host="é"), r"host '\xe9'"),
    *(
        ("endpoints/n1/e1", replace(ENDPOINT, mac=mac), f"mac '{mac}'")
        for mac in (
            "",
            "m",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
            "02:42:0A:01:00:02",
            "02:42:0a:01:00",
            "02:42:0a:01:00:02 ",
        )
    ),
    ("endpoints/n1/e1", replace(ENDPOINT, boot="\n"), r"boot '\n'"),
    ("endpoints/n1/e1", replace(ENDPOINT, sandbox="/\x1b"), r"sandbox '/\x1b'"),
    ("endpoints/n1/e1", replace(ENDPOINT, sandbox="/" * 1025), "sandbox of 1025 char"),
    (
        "endpoints/n1/e1",
        replace(ENDPOINT, ipv4=ip_interface("224.0.0.9/24")),
        "address 224.0.0.9",
    ),
    (
        "endpoints/n1/e1",
        replace(ENDPOINT, ipv6=ip_interface("::1/128")),
        "address ::1",
    ),
    ("endpoints/n1/e1", replace(ENDPOINT, published=(PORT,) * 8193), "number of ports"),
    *(
        ("endpoints/n1/e1", replace(ENDPOINT, published=(replace(PORT, **odd),)), said)
        for odd, said in (
            ({"protocol": 1}, "protocol 1"),
            ({"port": 0}, "port 0"),
            ({"port": 65536}, "port 65536"),
            ({"host_port": 0}, "host_port 0"),
            ({"host_port": -1}, "host_port -1"),
        )
    ),
    ("vnis/0", Vni(network="n1"), "number '0'"),
    ("vnis/01", Vni(network="n1"), "number '01'"),
    ("vnis/16777216", Vni(network="n1"), "number 16777216"),
    ("vnis/" + "9" * 5000, Vni(network="n1"), f"number '{'9' * 80}'"),
    ("vnis/5", Vni(network="a b"), "network 'a b'"),
]


@pytest.mark.parametrize(("key", "record"), SOUND)
def test_what_can_be_used(key, record):
    """A sound record under its own key passes, and so does a kind that is not known."""
    checks.check(key, record)


@pytest.mark.parametrize(("key", "record"), KEYS)
def test_a_key_that_is_not_the_records(key, record):
    """A record stands under the key that its own fields give, and no other."""
    with pytest.raises(StoreError, match=r"the key cannot be used\Z") as refused:
        checks.check(key, record)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(("key", "record", "said"), VALUES)
def test_a_value_that_cannot_be_used(key, record, said):
    """What cannot be planned or shown is refused with the field and its value."""
    with pytest.raises(StoreError) as refused:
        checks.check(key, record)
    text = str(refused.value)
    assert text.startswith(f"value of {checks.shown(key)} in the store: {said}")
    assert text.isprintable()
    assert len(text) < 300


@pytest.mark.parametrize("kind", sorted(set(records.TYPES)))
def test_every_kind_has_a_rule(kind):
    """No kind of record is taken as it comes."""
    assert kind in checks.RULES


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("hosts/a", "hosts/a"),
        ("x" * 200, "x" * 80),
        ("a b", "'a b'"),
        ("a\x1b", r"'a\x1b'"),
        ("a\udcff", r"'a\udcff'"),
        ("é", r"'\xe9'"),
    ],
)
def test_a_key_is_printed_harmlessly(key, shown):
    """A key that could play tricks on a terminal is quoted."""
    assert checks.shown(key) == shown
