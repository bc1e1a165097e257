"""The table and its elements: what is read back is spelled as it was written."""

import asyncio
import socket
import time
from dataclasses import replace
from ipaddress import IPv6Address, ip_address

import pytest

from cnmdriver.dataplane import conntrack
from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.nft import Firewall, Nft
from cnmdriver.errors import KernelError
from cnmdriver.model import SCTP, TCP, UDP
from cnmdriver.plan import antispoof, firewall
from cnmdriver.plan.ops import HOST, Element, Table, compare

from .conftest import V4, V6, endpoint, network, published, run, whole

pytestmark = pytest.mark.root

TABLE = firewall.table()
BRIDGES = antispoof.table(HOST)
TABLES = {"inet": TABLE, "bridge": BRIDGES}
PORT = '"pe-0123456789"'
ANY = Element(set="any4", item=("tcp", "8080"), value=("10.200.1.2", "80"))

MAPPED = str(IPv6Address("::ffff:a00:1"))
"""Python 3.13 and nft spell it with dots, 3.11 without; a plan has Python's."""

SPELLINGS = [
    *(Element(set=name, item=('"pn-0123456789"',)) for name in ("bridges", "icc_off")),
    *(Element(set=name, item=('"br-lan.7"',)) for name in ("internal", "docker")),
    Element(set="docker", item=('"a_b"',)),
    Element(set="docker", item=('"tcp"',)),
    Element(set="docker", item=('"10"',)),
    Element(set="self", item=('"pn-0123456789"', '"pn-0123456789"')),
    Element(set="own4", item=("10.200.1.0/24", '"pn-0123456789"')),
    Element(set="own4", item=("10.200.1.7/32", '"pn-0123456789"')),
    Element(set="own4", item=("0.0.0.0/0", '"pn-0123456789"')),
    Element(set="own6", item=("fd00::/64", '"pn-0123456789"')),
    Element(set="own6", item=("fd00::7/128", '"pn-0123456789"')),
    Element(set="masq4", item=("10.200.1.0/24",)),
    Element(set="masq4", item=("10.200.1.7/32",)),
    Element(set="masq4", item=("255.255.255.0/24",)),
    Element(set="masq6", item=("fd00::/64",)),
    Element(set="masq6", item=("fd00::7/128",)),
    Element(set="masq6", item=("2001:db8:0:1::/64",)),
    *(
        Element(set="any4", item=(protocol, port), value=("10.200.1.2", "65535"))
        for protocol in ("tcp", "udp", "sctp")
        for port in ("1", "22", "65535")
    ),
    *(
        Element(set="any6", item=(protocol, "80"), value=("fd00::2", "80"))
        for protocol in ("tcp", "udp", "sctp")
    ),
    Element(set="any6", item=("tcp", "80"), value=(MAPPED, "80")),
    *(
        Element(set="bound4", item=(ip, "sctp", "80"), value=("10.200.1.2", "80"))
        for ip in ("127.0.0.1", "192.0.2.1", "255.255.255.255")
    ),
    *(
        Element(set="bound6", item=(ip, "udp", "80"), value=("fd00::2", "80"))
        for ip in ("2001:db8::1", "fe80::1", "1:0:1::", MAPPED)
    ),
    *(
        Element(set="tunnels", item=(port, vni))
        for port in ("1", "4789", "65535")
        for vni in ("0x1", "0x989680", "0xffffff")
    ),
    *(
        Element(set=f"{name}{address.version}", item=(str(address),))
        for name in ("ends", "vteps")
        for address in map(ip_address, ("192.0.2.1", "2001:db8::1", MAPPED))
    ),
    *(
        Element(family="bridge", set=name, item=(PORT, *item))
        for name, *item in (
            ("ports",),
            ("assigned",),
            ("macs", "02:42:0a:01:00:02"),
            ("macs", "00:00:00:00:00:0a"),
            ("ips4", "10.200.1.2"),
            ("ips6", "fd00::2"),
            ("ips6", MAPPED),
            ("targets", "0x2"),
            ("targets", "0xfe8000000000000000420afffe010002"),
            ("targets", "0xffffffffffffffffffffffffffffffff"),
        )
    ),
]


@pytest.mark.parametrize("element", SPELLINGS, ids=lambda e: f"{e.set} {e.text}")
async def test_round_trip(kernel, element):
    """An element is found exactly as it was added, twice makes no difference."""
    table = TABLES[element.family]
    plan = (table, element)
    await kernel.apply(plan)
    assert await kernel.found(plan) == (replace(table, text=None), element)
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))
    await kernel.clear((element,))
    assert await kernel.found() == (replace(table, text=None),)


async def test_round_trip_of_all(kernel):
    """Neighbouring prefixes and ports stay elements of their own."""
    networks = [f"10.200.{n}.0/24" for n in range(4)]
    sets = (Element(set="masq4", item=(cidr,)) for cidr in networks)
    ports = (
        Element(set="any4", item=("udp", str(n)), value=("10.200.1.2", str(n)))
        for n in range(1000, 1200)
    )
    plan = (TABLE, *sets, *ports)
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))


async def test_many_are_one_transaction(kernel, monkeypatch):
    """Table and elements that follow each other are loaded in one run of nft."""
    texts = []
    start = Nft.start

    def noted(self, text, *, flags=0):
        if "element" in text:
            texts.append(text)
        return start(self, text, flags=flags)

    monkeypatch.setattr(Nft, "start", noted)
    net = network(V4, V6)
    elements = firewall.network(net, "pn-0123456789")
    await kernel.apply((TABLE, *elements))
    assert len(texts) == 1
    await kernel.clear(elements)
    assert len(texts) == 2


async def test_a_port_costs_the_same_among_many(kernel):
    """A port is published in milliseconds whether ten or a thousand are there."""
    ports = tuple(
        Element(set="any4", item=("tcp", str(n)), value=("10.200.1.2", "80"))
        for n in range(10000, 11000)
    )
    await kernel.apply((TABLE, *ports))
    started = time.perf_counter()
    for _ in range(10):
        await kernel.apply((ANY,))
        await kernel.clear((ANY,))
    assert (time.perf_counter() - started) / 20 < 0.05


async def test_the_same_again_is_cheap(kernel, monkeypatch):
    """What is there already is asked for by name: the table is not read for it."""
    elements = antispoof.endpoint(network(V4, V6), endpoint(network(V4, V6), 2), HOST)
    await kernel.apply((TABLE, BRIDGES, *elements, ANY))
    texts = []
    start = Nft.start

    def noted(self, text, *, flags=0):
        texts.append(text)
        return start(self, text, flags=flags)

    monkeypatch.setattr(Nft, "start", noted)
    for plan in (elements, (*elements, ANY)):
        texts.clear()
        await kernel.apply(plan)
        assert not [text for text in texts if "list" in text]
    moved = replace(ANY, value=("10.200.1.3", "81"))
    await kernel.apply((*elements, moved))
    assert set(await kernel.found()) >= {*elements, moved}
    await kernel.clear((*elements[:1], ANY))
    await kernel.apply(elements)
    assert set(await kernel.found()) >= set(elements)


async def test_a_part_of_an_interval_is_not_there(kernel):
    """An element inside another's interval is not taken for one that is there."""
    await kernel.apply((TABLE, Element(set="masq4", item=("10.200.0.0/16",))))
    with pytest.raises(KernelError, match="interval"):
        await kernel.apply((Element(set="masq4", item=("10.200.1.0/24",)),))


async def test_another_value_is_exchanged(kernel):
    """A port that moves is exchanged in one transaction, and undone by the old value."""
    moved = replace(ANY, value=("10.200.1.3", "81"))
    await kernel.apply((TABLE, ANY))
    assert compare((moved,), await kernel.found()).changed == ((moved, ANY),)
    await kernel.apply((moved,))
    assert moved in await kernel.found()
    bad = Element(set="nowhere", item=("1",))
    with pytest.raises(KernelError):
        await kernel.apply((ANY, bad))
    assert moved in await kernel.found()


async def test_undo_keeps_what_was_there(kernel):
    """Elements that were there before a failed apply are there after it."""
    await kernel.apply((TABLE, ANY))
    new = Element(set="any4", item=("tcp", "8081"), value=("10.200.1.2", "80"))
    moved = replace(ANY, value=("10.200.1.3", "81"))
    before = run("nft", "-s", "list", "ruleset")

    class Stop(Exception):
        pass

    async def stop(step):
        if step == "apply.sysctl":
            raise Stop

    kernel._step = stop
    net = network(V4)
    setting = next(op for op in whole(net) if op.key[0] == "sysctl")
    for elements in ((ANY, new), (moved, new), (new,)):
        with pytest.raises(Stop):
            await kernel.apply((TABLE, *elements, setting))
        assert run("nft", "-s", "list", "ruleset") == before


async def test_an_older_text_is_replaced(kernel):
    """Another version's table gets the new text, and keeps its elements."""
    old = old_table()
    net = network(V4, V6)
    elements = (*firewall.network(net, "pn-0123456789"), ANY)
    await kernel.apply((old, *elements))
    found = await kernel.found()
    assert found[0].mark.startswith("text_00000000_0_0")
    assert compare((TABLE, *elements), found).changed == ((TABLE, found[0]),)
    moved = replace(ANY, value=("10.200.1.3", "81"))
    await kernel.apply((TABLE, moved))
    plan = (TABLE, *elements[:-1], moved)
    assert not compare(plan, await kernel.found(plan))
    assert "guard" in run("nft", "list", "ruleset")


async def test_both_tables_are_replaced(kernel):
    """With both texts older, each table keeps its own elements."""
    left_out = {"own4", "own6", "masq4", "masq6", "any6"}
    elements = (*(e for e in SPELLINGS if e.set not in left_out), ANY)
    elements = tuple({e.key: e for e in elements}.values())
    old = replace(
        BRIDGES,
        mark="text_00000000_0_0",
        text=BRIDGES.text.replace(BRIDGES.mark, "text_00000000_0_0"),
    )
    await kernel.apply((old_table(), old, *elements))
    await kernel.apply((TABLE, BRIDGES, ANY))
    plan = (TABLE, BRIDGES, *elements)
    assert not compare(plan, await kernel.found(plan))


async def test_a_replaced_text_comes_back(kernel):
    """If the plan fails after the text was replaced, the old text is back."""
    await kernel.apply((old_table(), *SPELLINGS[-40:], ANY, BRIDGES))
    before = run("nft", "-s", "list", "ruleset")
    sysctl = next(op for op in whole(network(V4)) if op.key[0] == "sysctl")
    bad = replace(sysctl, path="net/no/such/thing")
    new = replace(BRIDGES, mark="text_1", text=BRIDGES.text.replace("text_", "text_1"))
    with pytest.raises(KernelError, match="net/no/such/thing"):
        await kernel.apply((TABLE, new, bad))
    assert run("nft", "-s", "list", "ruleset") == before


def old_table() -> Table:
    """Return the table of an imagined older version, which had a set more."""
    text = TABLE.text.replace(TABLE.mark, "text_00000000_0_0")
    text = text.replace("\tchain guard {", "\tset more { type mark; }\n\tchain gone {")
    return replace(TABLE, mark="text_00000000_0_0", text=text)


async def test_refused_elements_name_the_reason(kernel):
    """What nftables says of a wrong element is in the error, and nothing is left."""
    before = run("nft", "list", "ruleset")
    overlap = (
        Element(set="masq4", item=("10.200.0.0/16",)),
        Element(set="masq4", item=("10.200.1.0/24",)),
    )
    with pytest.raises(KernelError, match=r"changing the firewall failed: .*interval"):
        await kernel.apply((TABLE, *overlap))
    assert run("nft", "list", "ruleset") == before


@pytest.mark.parametrize("name", ['"a };"', '"a b"', '"{"', '"\n"', "x y", ""])
async def test_no_word_escapes(kernel, name):
    """The name of a device cannot say anything else to nftables."""
    with pytest.raises(KernelError, match="no such word"):
        await kernel.apply((TABLE, Element(set="docker", item=(name,))))
    assert "pynet" not in run("nft", "list", "ruleset")


async def test_clear_what_is_half_there(kernel):
    """Clearing takes what is there of several elements, also without the table."""
    bridge = Element(set="bridges", item=('"pn-0123456789"',))
    await kernel.apply((TABLE, ANY))
    await kernel.clear((TABLE, bridge, ANY))
    assert await kernel.found() == ()
    await kernel.clear((bridge, ANY))


async def test_tables_of_others_stay(kernel):
    """Tables of other programs, and their elements, are neither found nor touched."""
    run("nft", "table inet other { set bridges { type ifname; elements = { x }; }; }")
    before = run("nft", "list", "ruleset")
    plan = (TABLE, ANY)
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))
    await kernel.clear(plan)
    assert run("nft", "list", "ruleset") == before


async def test_flushed_ruleset_is_mended(kernel):
    """After `nft flush ruleset` everything lacks, and one apply brings it back."""
    plan = whole(network(V4, V6))
    await kernel.apply(plan)
    run("nft", "flush", "ruleset")
    assert compare(plan, await kernel.found(plan)).lacking
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))


async def test_connections_are_forgotten(kernel):
    """
    A udp flow follows its port: to the new container, and away when it is taken back.

    1. Port 9000 leads to one local address, a client's flow is in the kernel's memory.
    2. The port moves; the same client socket reaches the other one.
    3. The port is taken back; the client reaches neither.

    Result: no client is stuck with an old container.
    """
    for address in ("10.99.0.1", "10.99.0.2", "10.99.0.3"):
        run("ip", "addr", "add", f"{address}/32", "dev", "lo")
    servers = [udp("10.99.0.1", 80), udp("10.99.0.2", 80)]
    client = udp("10.99.0.3", 5000)
    first = Element(set="any4", item=("udp", "9000"), value=("10.99.0.1", "80"))
    await kernel.apply((TABLE, first))
    assert await reached(client, servers) == [True, False]
    await kernel.apply((replace(first, value=("10.99.0.2", "80")),))
    assert await reached(client, servers) == [False, True]
    await kernel.clear((first,))
    assert await reached(client, servers) == [False, False]
    for sock in (*servers, client):
        sock.close()


def udp(address, port):
    """Bind a socket that does not block."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((address, port))
    return sock


async def reached(client, servers):
    """Send to the published port, and tell which servers got it."""
    client.sendto(b"x", ("10.99.0.3", 9000))
    await asyncio.sleep(0.02)
    got = []
    for server in servers:
        try:
            server.recv(10)
            got.append(True)
        except BlockingIOError:
            got.append(False)
    return got


async def test_forget_is_told_what_changed(kernel, monkeypatch):
    """The connections of new, moved and removed elements are looked at, no others."""
    calls = []

    async def forget(elements, *, spare=False):
        calls.extend((e, spare) for e in elements if e.set in conntrack.MAPS)

    monkeypatch.setattr(conntrack, "forget", forget)
    other = replace(ANY, item=("tcp", "8081"))
    await kernel.apply((TABLE, ANY))
    await kernel.apply((ANY, other))
    await kernel.clear((ANY,))
    assert calls == [(ANY, True), (other, True), (ANY, False)]


async def test_every_published_port_loads(kernel):
    """Each protocol, family and binding makes elements that nftables takes."""
    net = network(V4, V6)
    ports = [
        published(protocol, 8080, address)
        for protocol in (TCP, UDP, SCTP)
        for address in (None, "192.0.2.1", "2001:db8::1", "0.0.0.0", "::", "127.0.0.1")
    ]
    elements = {e.key: e for e in firewall.published(endpoint(net, 2, *ports))}
    plan = (TABLE, *elements.values())
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))
    assert len(plan) == 16


async def test_elements_of_two_tables_are_undone(kernel):
    """A failed plan takes back what it added to one table, and no more of the other."""
    port = Element(family="bridge", set="ports", item=(PORT,))
    await kernel.apply((TABLE, BRIDGES, port, ANY))
    before = run("nft", "-s", "list", "ruleset")
    sysctl = next(op for op in whole(network(V4)) if op.key[0] == "sysctl")
    bad = replace(sysctl, path="net/no/such/thing")
    new = replace(ANY, item=("tcp", "8081"))
    for plan in ((port, sysctl, ANY, new), (sysctl, port, ANY), (new, sysctl, port)):
        with pytest.raises(KernelError, match="net/no/such/thing"):
            await kernel.apply((*plan, bad))
        assert run("nft", "-s", "list", "ruleset") == before


async def test_drops_are_counted(kernel):
    """What our tables drop is counted by kind, whatever other tables count."""
    await kernel.apply((TABLE, BRIDGES))
    run("nft", "table inet other { counter mine { packets 7 bytes 7; }; }")
    elements = "inet pynet tunnels { 9 . 0x303030 }"
    run("nft", "add", "element", *elements.split())
    with udp("127.0.0.1", 0) as client:
        for _ in range(3):
            client.sendto(b"0" * 16, ("127.0.0.1", 9))
    inside = Inside("test")
    await inside.open()
    nft = Nft(inside)
    await nft.open()
    counts = await Firewall(nft).drops()
    await nft.close()
    inside.close()
    assert {kind: n for kind, n in counts.items() if n} == {"unknown_vtep": 3}
    assert set(counts) >= {"wrong_way", "spoofed_mac", "spoofed_arp", "spoofed_dhcp"}
    assert "mine" not in counts


async def test_closing_amid_work(host):
    """What comes while the library is let go of is refused; what was begun ends."""
    inside = Inside("test")
    await inside.open()
    nft = Nft(inside)
    await nft.open()
    begun = nft.start("list ruleset")
    closing = asyncio.create_task(nft.close())
    await asyncio.sleep(0)
    with pytest.raises(KernelError, match="before it was opened"):
        nft.start("list ruleset")
    await closing
    assert (await begun)[0]
    inside.close()
