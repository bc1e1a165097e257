"""The driver's small decisions, each by itself: ports, claims, sandboxes, repairs."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.driver import claims, ipam, publishing, sandboxes, sync
from cnmdriver.driver.network import attachment
from cnmdriver.driver.sandboxes import Sandboxes
from cnmdriver.errors import Conflict, Exhausted, InvalidParameter, NotFound
from cnmdriver.model import (
    TCP,
    UDP,
    Attachment,
    Block,
    Endpoint,
    Member,
    Network,
    Pool,
    PortRequest,
    Published,
    Reservation,
    Subnet,
)
from cnmdriver.plan import devices, pools
from cnmdriver.plan.ops import Address, Bridge, Element, Table, Veth
from cnmdriver.store import records
from cnmdriver.store.records import Space
from tests.fakes import rig
from tests.unit.calls import Docker, port

RED = "red" * 20
WEB, DB = "web0" * 16, "db00" * 16


@pytest.fixture
async def docker(tmp_path):
    """Have a network and two containers of it, without ports."""
    async with rig(tmp_path) as built:
        made = Docker(built)
        await made.create(RED, "10.1.0.0/24")
        await made.start(WEB, RED)
        await made.start(DB, RED)
        yield made


def wish(host_port=0, end=0, *, ip=None, number=80, protocol=TCP):
    """Word a wish for a port."""
    return PortRequest(
        protocol=protocol,
        port=number,
        host_ip=None if ip is None else ip_address(ip),
        host_port=host_port,
        host_port_end=end,
    )


def published(host_port, *, ip=None, number=80, protocol=TCP):
    """Word a published port."""
    return Published(
        protocol=protocol,
        port=number,
        host_ip=None if ip is None else ip_address(ip),
        host_port=host_port,
    )


# Which host ports a wish can be given.


@pytest.mark.parametrize(
    ("given", "low", "high", "count"),
    [
        (wish(8080), 8080, 8080, 1),
        (wish(8080, 8080), 8080, 8080, 1),
        (wish(8080, 8090), 8080, 8090, 11),
        (wish(8080, 80), 8080, 8080, 1),
        (wish(), 49153, 65535, 16383),
    ],
)
def test_limits(given, low, high, count):
    """A wish names a port, a range, or leaves it to the dynamic ports."""
    assert publishing.limits(given) == (low, high)
    assert publishing.choices(given) == count


def test_candidates_of_a_range():
    """A range is tried from its lowest port to its highest."""
    assert list(publishing.candidates(wish(8080, 8083))) == [8080, 8081, 8082, 8083]
    assert list(publishing.candidates(wish(8080))) == [8080]


def test_candidates_of_no_wish():
    """Dynamic ports are tried from a place that differs for each container port."""
    found = list(publishing.candidates(wish()))
    assert found[:3] == [59319, 59320, 59321]
    assert len(found) == len(set(found)) == 128
    assert all(49153 <= number <= 65535 for number in found)
    assert next(publishing.candidates(wish(number=81))) == 59446
    assert next(publishing.candidates(wish(protocol=UDP))) == 59330


def test_candidates_go_round():
    """Behind the last dynamic port comes the first."""
    found = list(publishing.candidates(wish(number=128)))
    assert found[119:122] == [65534, 65535, 49153]


@pytest.mark.parametrize(
    ("have", "given", "fits"),
    [
        (published(8080), wish(8080), True),
        (published(8080), wish(8081), False),
        (published(8080), wish(8079), False),
        (published(8080), wish(8079, 8080), True),
        (published(8080), wish(8080, 8090), True),
        (published(8080), wish(8081, 8090), False),
        (published(8080), wish(8070, 8079), False),
        (published(50000), wish(), True),
        (published(8080), wish(), False),
        (published(8080, number=81), wish(8080), False),
        (published(8080, protocol=UDP), wish(8080), False),
        (published(8080, ip="127.0.0.1"), wish(8080), False),
        (published(8080), wish(8080, ip="127.0.0.1"), False),
        (published(8080, ip="127.0.0.1"), wish(8080, ip="127.0.0.1"), True),
    ],
)
def test_fits(have, given, fits):
    """A port that is published already serves a wish that it is in every part."""
    assert publishing.fits(have, given) is fits


@pytest.mark.parametrize(
    ("binding", "ip", "ipv6", "bound"),
    [
        (None, None, True, None),
        (None, None, False, "0.0.0.0"),
        (None, "10.0.0.1", True, "10.0.0.1"),
        ("192.0.2.1", None, True, "192.0.2.1"),
        ("192.0.2.1", None, False, "192.0.2.1"),
        ("192.0.2.1", "10.0.0.1", False, "10.0.0.1"),
        ("192.0.2.1", "0.0.0.0", False, "0.0.0.0"),
    ],
)
def test_bound_to(binding, ip, ipv6, bound):
    """The user's address wins over the network's, that over every address."""
    found = publishing.bound_to(
        None if binding is None else ip_address(binding), wish(80, ip=ip), ipv6=ipv6
    )
    assert found == wish(80, ip=bound)


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        (published(80), published(80), True),
        (published(80), published(81), False),
        (published(80), published(80, protocol=UDP), False),
        (published(80), published(80, number=81), True),
        (published(80), published(80, ip="127.0.0.1"), True),
        (published(80), published(80, ip="::1"), True),
        (published(80, ip="127.0.0.1"), published(80, ip="127.0.0.1"), True),
        (published(80, ip="127.0.0.1"), published(80, ip="10.0.0.1"), False),
        (published(80, ip="127.0.0.1"), published(80, ip="0.0.0.0"), True),
        (published(80, ip="127.0.0.1"), published(80, ip="::"), False),
        (published(80, ip="::1"), published(80, ip="::"), True),
        (published(80, ip="::1"), published(80, ip="::2"), False),
        (published(80, ip="::"), published(80, ip="0.0.0.0"), False),
    ],
)
def test_clashing(one, other, clash):
    """Two ports clash where one packet could be meant for both."""
    assert publishing.clashing(one, other) is clash
    assert publishing.clashing(other, one) is clash


async def ports_of(docker, box):
    """Return what an endpoint publishes."""
    endpoint = docker.rig.networks.known(RED, box)
    return endpoint.published


async def program(docker, box, *ports):
    """Publish ports of a container, as Docker asks for it."""
    await docker.rig.networks.program(RED, box, ports=ports, ipv6=True)


async def test_narrow_wishes_come_first(docker):
    """Who wants one port gets it before a range takes it."""
    await program(docker, WEB, port(81, 8080, 8081), port(80, 8080))
    assert await ports_of(docker, WEB) == (
        published(8080),
        published(8081, number=81),
    )


async def test_a_kept_port_stays(docker):
    """A port that fits is kept, though a lower one has become free."""
    await program(docker, WEB, port(80, 8080))
    await program(docker, DB, port(80, 8080, 8082))
    await program(docker, WEB)
    await program(docker, DB, port(80, 8080, 8082), port(81, 9000))
    assert await ports_of(docker, DB) == (
        published(9000, number=81),
        published(8081),
    )


async def test_the_same_wish_twice(docker):
    """Two wishes for one container port get two host ports of the range."""
    await program(docker, WEB, port(80, 8080, 8081), port(80, 8080, 8081))
    assert await ports_of(docker, WEB) == (published(8080), published(8081))


async def test_a_port_of_another_container(docker):
    """A single port that another has is a Conflict that names the other."""
    docker.rig.site.names[WEB] = "web"
    await program(docker, WEB, port(80, 8080))
    with pytest.raises(Conflict) as refused:
        await program(docker, DB, port(80, 8080))
    assert str(refused.value) == (
        "host port 8080 is published by web; choose another host port"
    )
    assert await ports_of(docker, DB) == ()


async def test_a_full_range(docker):
    """A range of which nothing is free is Exhausted, with the last reason."""
    docker.rig.kernel.busy |= {(TCP, 8080), (TCP, 8081)}
    with pytest.raises(Exhausted) as refused:
        await program(docker, WEB, port(80, 8080, 8081))
    assert str(refused.value) == (
        "no free host port for container port 80: tried 8080 to 8081, the last: "
        "port 8081 is taken by another program"
    )


# Claims on pools.

POOL = Pool(space="local", cidr=ip_network("10.1.0.0/24"), network=RED)


@pytest.mark.parametrize(
    ("claim", "covers"),
    [
        ("local/10.1.0.0/24", True),
        ("local/10.1.0.0/24/10.1.0.0/25", True),
        ("local/10.1.0.0/2", False),
        ("local/10.1.0.0/245", False),
        ("other/10.1.0.0/24", False),
        ("", False),
    ],
)
def test_covers(claim, covers):
    """A claim is on a pool or on a sub-pool of it, and on no other."""
    assert claims.covers(claim, POOL) is covers


async def test_touch_counts(docker):
    """Each decision about claims in a space changes that space's record."""
    state = docker.rig.state
    before = state.view.get(Space, records.space("local")).claims
    await state.commit(lambda draft: claims.touch(draft, ["local", "new", "local"]))
    assert state.view.get(Space, records.space("local")) == Space(claims=before + 1)
    assert state.view.get(Space, records.space("new")) is None


async def test_taken(docker):
    """Pools of one space or of all are taken, and subnets that Docker gives out."""
    await docker.pool("10.2.0.0/24", pynet_space="blue")
    docker_ipam = Subnet(space="docker", pool=ip_network("172.30.0.0/16"))
    await docker.rig.networks.create(
        "ext", subnets=(docker_ipam,), options={}, internal=False
    )
    view = docker.rig.state.view
    red, blue, ext = map(ip_network, ("10.1.0.0/24", "10.2.0.0/24", "172.30.0.0/16"))
    assert set(claims.taken(view)) == {red, blue, ext}
    assert set(claims.taken(view, "blue")) == {blue, ext}
    assert set(claims.taken(view, "local")) == {red, ext}
    assert claims.taken(view)[ext] == "ext"
    assert claims.taken(view)[red] == view.get(Pool, f"pools/local/{red}").network


async def test_a_dropped_pool_leaves_nothing(docker):
    """With a pool go its addresses and its blocks, and no other's."""
    state = docker.rig.state
    await docker.pool("10.1.0.0/16", pynet_space="blue")
    part = ip_network("10.1.0.0/26")
    keys = [records.block(s, ip_network(c), part) for s, c in (
        ("local", "10.1.0.0/24"), ("blue", "10.1.0.0/16"))]  # fmt: skip
    await state.commit(lambda draft: [draft.put(k, Block(host="h")) for k in keys])
    pool = state.view.get(Pool, "pools/local/10.1.0.0/24")
    assert claims.reservation(state.view, pool)
    await state.commit(lambda draft: claims.drop(draft, pool))
    assert claims.reservation(state.view, pool) == []
    assert state.view.get(Pool, "pools/local/10.1.0.0/24") is None
    assert state.view.get(Block, keys[0]) is None
    assert state.view.get(Block, keys[1]) == Block(host="h")
    assert state.view.get(Pool, "pools/blue/10.1.0.0/16") is not None


# Addresses.

RESERVED = Reservation(
    space="local", cidr=POOL.cidr, ip=IPv4Address("10.1.0.9"), host="h1"
)


@pytest.mark.parametrize(
    ("held", "wanted", "claimed", "same"),
    [
        ({}, {}, True, True),
        ({}, {}, False, False),
        ({"bound": True}, {}, True, False),
        ({"host": "h2"}, {}, True, False),
        ({"gateway": True}, {}, True, False),
        ({}, {"gateway": True}, True, False),
        ({"gateway": True}, {"gateway": True}, False, True),
        ({"name": "web"}, {"name": "web"}, False, True),
        ({"name": "web"}, {"name": "db"}, False, False),
        ({"name": ""}, {"name": "db"}, False, False),
    ],
)
def test_same_wish(held, wanted, claimed, same):
    """A wish that comes again is known by its pool, its role or its name."""
    found = ipam.same_wish(
        replace(RESERVED, **held),
        replace(RESERVED, **wanted),
        replace(POOL, claimed=claimed),
    )
    assert found is same


@pytest.mark.parametrize(
    ("part", "whole", "inside"),
    [
        ("10.1.0.0/25", "10.1.0.0/24", True),
        ("10.1.0.0/24", "10.1.0.0/24", True),
        ("10.1.0.0/23", "10.1.0.0/24", False),
        ("10.1.1.0/25", "10.1.0.0/24", False),
        ("fd00::/64", "0.0.0.0/0", False),
    ],
)
def test_inside(part, whole, inside):
    """A part has all its addresses in the whole, of the same family."""
    assert pools.inside(ip_network(part), ip_network(whole)) is inside


def request(space="local", pool=None, sub=None, options=None):
    """Read a RequestPool."""
    return ipam.read_request(
        space,
        ip_network(pool) if pool else None,
        ip_network(sub) if sub else None,
        options or {},
        4,
    )


def test_read_request():
    """The space and the network come from options."""
    said = {"pynet.space": "blue", "pynet.network": "n1", "org.example.x": "y"}
    found = request(options=said)
    assert (found.space, found.network, found.pool, found.sub, found.version) == (
        "blue",
        "n1",
        None,
        None,
        4,
    )
    found = request(pool="10.1.0.0/24", sub="10.1.0.0/25", options=said)
    assert (found.network, found.sub) == ("n1", ip_network("10.1.0.0/25"))
    assert request().space == "local"


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            {"options": {"pynet.spcae": "x"}},
            "unknown --ipam-opt 'pynet.spcae': known are pynet.network, pynet.space",
        ),
        (
            {"options": {"x": "y"}},
            "unknown --ipam-opt 'x': known are pynet.network, pynet.space",
        ),
        (
            {"sub": "10.1.0.0/25"},
            "--ip-range 10.1.0.0/25 needs a --subnet that holds it",
        ),
        (
            {"pool": "10.1.0.0/24", "sub": "10.2.0.0/25"},
            "--ip-range 10.2.0.0/25 is not inside --subnet 10.1.0.0/24",
        ),
        (
            {"space": "a/b"},
            "address space 'a/b': give 1 to 64 letters, digits, _ . or -",
        ),
        (
            {"options": {"pynet.space": ""}},
            "address space '': give 1 to 64 letters, digits, _ . or -",
        ),
        (
            {"space": "x" * 100},
            f"address space '{'x' * 80}': give 1 to 64 letters, digits, _ . or -",
        ),
    ],
)
def test_bad_requests(said, text):
    """A RequestPool that cannot be is refused with what stands in the way."""
    with pytest.raises(InvalidParameter) as refused:
        request(**said)
    assert str(refused.value) == text


# Sandboxes.


@pytest.fixture
def clock(monkeypatch):
    """Stand still until told."""
    now = [1000.0]
    monkeypatch.setattr(sandboxes.time, "monotonic", lambda: now[0])
    return now


async def test_sandboxes(docker, clock):
    """An endpoint's sandbox is gone when it is, its start is over and no pair is in it."""
    endpoint = docker.rig.networks.known(RED, WEB)
    known = Sandboxes(docker.rig.site)
    assert not await known.is_gone(endpoint)
    docker.rig.kernel.dead.add(endpoint.sandbox)
    assert await known.is_gone(endpoint)
    assert not await known.is_gone(replace(endpoint, sandbox=""))
    known.joined(endpoint)
    clock[0] += 14.9
    assert not await known.is_gone(endpoint)
    clock[0] += 0.1
    assert await known.is_gone(endpoint)
    known.joined(endpoint)
    known.left(endpoint)
    known.left(endpoint)
    assert await known.is_gone(endpoint)


async def test_a_pair_in_a_sandbox(docker, clock):
    """While the far end of its pair is somewhere, an endpoint is not gone."""
    kernel = docker.rig.kernel
    endpoint = docker.rig.networks.known(RED, WEB)
    kernel.dead.add(endpoint.sandbox)
    key = ("device", "host", devices.port(WEB))
    kernel.ops[key] = replace(kernel.ops[key], peer=None)
    known = Sandboxes(docker.rig.site)
    assert not await known.is_gone(endpoint)
    assert await known.is_gone(replace(endpoint, id=DB))


# Endpoints that Docker forgot when it died.


def forgotten(docker, box):
    """Let a container's sandbox be gone for long."""
    endpoint = docker.rig.networks.known(RED, box)
    docker.rig.networks.sandboxes.left(endpoint)
    docker.rig.kernel.dead.add(endpoint.sandbox)


async def test_a_wanted_address_of_a_forgotten_endpoint(docker):
    """An address asked for by name is freed when its endpoint's sandbox is gone."""
    pool_id, held = docker.boxes[WEB].held[0]
    with pytest.raises(Conflict):
        await docker.address(pool_id, str(held), name="new")
    forgotten(docker, WEB)
    assert (await docker.address(pool_id, str(held), name="new")).ip == held
    assert docker.rig.networks.find(RED, WEB) is None
    assert docker.rig.networks.find(RED, DB) is not None


@pytest.mark.parametrize("box", [WEB, DB])
async def test_a_wanted_mac_of_a_forgotten_endpoint(docker, box):
    """A MAC is freed as an address is, whichever of the endpoints has it."""
    networks = docker.rig.networks
    other = DB if box == WEB else WEB
    mac = networks.known(RED, box).mac
    with pytest.raises(Conflict) as refused:
        await docker.start("new0" * 16, RED, mac=mac)
    assert str(refused.value) == (
        f"MAC {mac} is taken by {box[:12]}; choose another --mac-address"
    )
    forgotten(docker, box)
    forgotten(docker, other)
    await docker.start("new0" * 16, RED, mac=mac)
    assert networks.find(RED, box) is None
    assert networks.find(RED, other) is not None
    assert networks.known(RED, "new0" * 16).mac == mac


async def test_a_bound_address(docker):
    """An address that is bound to another endpoint is named with its owner."""
    site = docker.rig.site
    ip = IPv4Address("10.1.0.99")
    held = Reservation(
        space="local", cidr=POOL.cidr, ip=ip, host=site.host.id, endpoint="x" * 64
    )
    key = records.address("local", POOL.cidr, ip)
    for name, owner in (("batch", "batch"), ("", "x" * 12)):
        record = replace(held, name=name)
        await site.state.commit(lambda draft, r=record: draft.put(key, r))
        with pytest.raises(Conflict) as refused:
            await docker.rig.networks.create_endpoint(
                RED, "new", ipv4=ip_interface("10.1.0.99/24"), ipv6=None, mac=""
            )
        assert str(refused.value) == f"address {ip} is taken by {owner}; choose another"


async def test_a_reboot(docker):
    """After a reboot an endpoint is created and joined again, and is of that boot."""
    networks = docker.rig.networks
    before = networks.known(RED, WEB)
    docker.rig.site.boot = "boot2"
    again = await networks.create_endpoint(
        RED, WEB, ipv4=before.ipv4, ipv6=None, mac=""
    )
    assert again == before.mac
    await networks.join(RED, WEB, before.sandbox)
    assert networks.known(RED, WEB) == replace(before, boot="boot2")


async def test_dockers_id(docker):
    """The id Docker knows a network by is not the one its pool minted."""
    networks = docker.rig.networks
    endpoint = networks.known(RED, WEB)
    assert endpoint.network != RED
    assert networks.docker_id(endpoint) == RED
    assert networks.docker_id(replace(endpoint, network="other")) == "other"


async def test_a_pool_without_a_network(docker):
    """A pool in the way whose network is not created yet is named by its own id."""
    pool_id = await docker.pool("10.7.0.0/24")
    own = docker.rig.state.view.get(Pool, "pools/local/10.7.0.0/24").network
    with pytest.raises(Conflict) as refused:
        await docker.pool("10.7.0.0/16")
    assert str(refused.value) == (
        f"pool 10.7.0.0/16 overlaps 10.7.0.0/24 of network {own[:12]}; choose another "
        "--subnet or remove that network"
    )
    await docker.rig.ipam.release_pool(pool_id)


async def test_what_lost_its_last_member(docker):
    """Networks and pools of which no host is a member go; all others stay."""
    state = docker.rig.state
    lost = Network(id="lost", mode="bridge", subnets=(), mtu=1500)
    alone = replace(POOL, cidr=ip_network("10.8.0.0/24"), network="alone")

    def lose(draft):
        draft.put(records.network("lost"), lost)
        draft.put(records.pool("local", alone.cidr), alone)

    before = docker.rig.records
    await state.commit(lose)
    assert docker.rig.records != before
    loop = sync.Sync(
        docker.rig.site, docker.rig.networks, docker.rig.ipam, None, grace=60, audit=60
    )
    await loop.forget_unused()
    assert docker.rig.records == before


# What a join answers.

FOUR = Subnet(
    space="local", pool=ip_network("10.1.0.0/24"), gateway=IPv4Address("10.1.0.1")
)
SIX = Subnet(
    space="local", pool=ip_network("fd00::/64"), gateway=IPv6Address("fd00::1")
)
NETWORK = Network(id="n", mode="bridge", subnets=(FOUR, SIX), mtu=1500)
MEMBER = Member(network="n", host="h1", docker_id="d", bridge="pn-1", prefix="lab")
ENDPOINT = Endpoint(
    network="n",
    id="web",
    host="h1",
    boot="b",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    ipv6=ip_interface("fd00::2/64"),
)
BOTH = Attachment(
    device="pc-4b5e57f6eb",
    prefix="lab",
    gateway4=IPv4Address("10.1.0.1"),
    gateway6=IPv6Address("fd00::1"),
    disable_gateway_service=True,
)


@pytest.mark.parametrize(
    ("network", "endpoint", "answer"),
    [
        ({}, {}, {}),
        ({}, {"ipv6": None}, {"gateway6": None}),
        ({}, {"ipv4": None}, {"gateway4": None}),
        ({"subnets": (replace(FOUR, gateway=None), SIX)}, {}, {"gateway4": None}),
        ({"subnets": (SIX,)}, {}, {"gateway4": None}),
        ({"internal": True}, {}, {"gateway4": None, "gateway6": None}),
        (
            {"gateway": "docker"},
            {},
            {"gateway4": None, "gateway6": None, "disable_gateway_service": False},
        ),
    ],
)
def test_attachment(network, endpoint, answer):
    """Docker is told the gateways of open networks, and whether it has to be one."""
    found = attachment(
        replace(NETWORK, **network), MEMBER, replace(ENDPOINT, **endpoint)
    )
    assert found == replace(BOTH, **answer)


# Repairs.

TABLE = Table(family="inet", name="pynet", mark="m", text="t")
BRIDGE = Bridge(name="pn-1", mac="m", mtu=1500, alias="pynet:h1:network:n")
VETH = Veth(
    name="pe-1",
    peer="pc-1",
    mac="m",
    bridge="pn-1",
    mtu=1500,
    alias="pynet:h1:endpoint:web",
)
INSIDE = replace(VETH, name="pe-2", peer=None, mac=None)
GATEWAY = Address(device="pn-1", interface=ip_interface("10.1.0.1/24"))
ELEMENT = Element(set="bridges", item=('"pn-1"',))


def test_affected():
    """What stands on something amiss is applied with it, over several plans."""
    amiss = {BRIDGE.key}
    plan = (TABLE, ELEMENT, BRIDGE, GATEWAY)
    assert sync.affected(plan, amiss) == (BRIDGE, GATEWAY)
    assert sync.affected((VETH,), amiss) == (VETH,)
    assert amiss == {BRIDGE.key, GATEWAY.key, VETH.key}
    assert sync.affected((TABLE, ELEMENT), amiss) == ()


@pytest.mark.parametrize(
    ("pair", "known", "used"),
    [
        (VETH, None, False),
        (VETH, frozenset({"web"}), False),
        (INSIDE, None, True),
        (INSIDE, frozenset({"web"}), True),
        (INSIDE, frozenset({"db"}), False),
        (replace(INSIDE, alias=None), frozenset(), True),
        (replace(INSIDE, alias=""), frozenset({"db"}), True),
    ],
)
def test_in_use(pair, known, used):
    """A pair reaches into a sandbox unless its end is here or Docker lacks it."""
    assert sync.in_use(pair, known) is used


@pytest.mark.parametrize(
    ("surplus", "known", "shared", "going", "staying"),
    [
        ((), None, False, (), ()),
        ((TABLE, VETH), None, False, (TABLE, VETH), ()),
        ((TABLE, BRIDGE, VETH), None, True, (VETH,), ()),
        ((TABLE, INSIDE, VETH), None, False, (VETH,), ("device pe-2",)),
        ((TABLE, INSIDE), frozenset(), False, (TABLE, INSIDE), ()),
        ((TABLE, INSIDE), frozenset({"web"}), False, (), ("device pe-2",)),
        ((TABLE, INSIDE, VETH), frozenset(), True, (INSIDE, VETH), ()),
    ],
)
def test_removable(surplus, known, shared, going, staying):
    """While a pair is in use, or others are here, only idle pairs go."""
    assert sync.removable(surplus, known, shared=shared) == (going, staying)


def test_patience(monkeypatch):
    """Only what is amiss without a break for the whole grace time has expired."""
    now = [50.0]
    monkeypatch.setattr(sync.time, "monotonic", lambda: now[0])
    patience = sync.Patience(10.0)
    assert patience.expired(["a", "b"]) == set()
    now[0] = 59.9
    assert patience.expired(["a", "c"]) == set()
    now[0] = 60.0
    assert patience.expired(["a", "b", "c"]) == {"a"}
    now[0] = 70.0
    assert patience.expired(["b", "c"]) == {"b", "c"}
    assert patience.since == {"b": 60.0, "c": 59.9}


# The site.


async def test_names(docker):
    """An id has Docker's name as far as it told, else its first twelve signs."""
    site = docker.rig.site
    assert site.name(WEB) == "web0web0web0"
    site.names[WEB] = "web"
    assert site.name(WEB) == "web"
    site.names[WEB] = ""
    assert site.name(WEB) == "web0web0web0"


async def test_unknown_things(docker):
    """What is not known here is named short, with what to do."""
    site = docker.rig.site
    with pytest.raises(NotFound) as refused:
        site.member("x" * 64)
    assert str(refused.value) == (
        "network xxxxxxxxxxxx is not known here; create it again with "
        "docker network rm and docker network create"
    )
    with pytest.raises(NotFound) as refused:
        site.network(replace(MEMBER, network="y" * 64))
    assert str(refused.value) == "network yyyyyyyyyyyy has no record in the store"
    with pytest.raises(NotFound) as refused:
        docker.rig.networks.known(RED, "z" * 64)
    assert str(refused.value) == (
        "endpoint zzzzzzzzzzzz is not known on network redredredred; "
        "disconnect the container and connect it"
    )


async def test_plans_of_what_is_not_there(docker):
    """Without its network, of an unknown mode or of another boot there is no plan."""
    site = docker.rig.site
    endpoint = docker.rig.networks.known(RED, WEB)
    assert site.endpoint_plan(endpoint)
    assert site.endpoint_plan(replace(endpoint, boot="boot0")) == ()
    assert site.endpoint_plan(replace(endpoint, sandbox="")) == ()
    assert site.endpoint_plan(replace(endpoint, network="other")) == ()
    assert site.network_plan(replace(MEMBER, network="other")) == ()
    member = site.member(RED)
    network = site.network(member)
    key = records.network(network.id)
    await site.state.commit(lambda d: d.put(key, replace(network, mode="newer")))
    assert site.network_plan(member) == ()
    assert site.endpoint_plan(endpoint) == ()


async def test_the_kernel_is_as_desired(docker):
    """All plans together are what the kernel holds; Docker's bridges are in order."""
    site = docker.rig.site
    assert set(site.desired()) == set(docker.rig.kernel.ops.values())
    found = [op.item for op in site.desired() if getattr(op, "set", "") == "docker"]
    assert found == [('"docker0"',), ('"docker_gwbridge"',)]
    assert site.unwanted(site.network_plan(site.member(RED))) == ()
