"""Published ports: who gets which, who is refused, and what is left after that."""

import asyncio
from ipaddress import ip_address

import pytest

from cnmdriver.driver import publishing
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import Conflict, Exhausted, KernelError, StoreError
from cnmdriver.model import Endpoint, Published
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import Element, Hold
from tests.unit.calls import TCP, UDP, port

RED, BLUE = "red" * 20, "blue" * 16


@pytest.fixture
async def red(docker):
    """Have a network of both families with a container that publishes nothing."""
    await docker.create(RED, "10.1.0.0/24", "fd00::/64")
    await docker.start("box", RED)
    return docker


async def publish(docker, *ports, box="box", net=RED, ipv6=True):
    """ProgramExternalConnectivity; returns what is published then."""
    await docker.rig.networks.program(net, box, ports=ports, ipv6=ipv6)
    return published(docker, box)


def published(docker, box="box"):
    """Return what an endpoint's record says it publishes, short."""
    (record,) = [
        e for e in docker.rig.state.view.all(Endpoint, "endpoints/") if e.id == box
    ]
    return [f"{p.host_ip or '*'}:{p.host_port}:{p.port}" for p in record.published]


def holds(docker):
    """Return which ports sockets hold."""
    held = [op for op in docker.rig.kernel.ops.values() if isinstance(op, Hold)]
    return sorted(f"{op.address or '*'}:{op.port}" for op in held)


def translated(docker):
    """Return what the kernel translates."""
    items = docker.rig.kernel.ops.values()
    elements = [op for op in items if isinstance(op, Element) and op.value]
    return sorted(f"{op.set} {op.text}" for op in elements)


def everything(docker):
    """Return all that a failed call must leave as it was."""
    listed = list(docker.rig.state.view.all(Endpoint, "endpoints/"))
    return docker.rig.records, listed, docker.rig.kernel.left


def differences(docker):
    """Compare the kernel with the plans."""
    held = tuple(docker.rig.kernel.ops.values())
    return list(ops.compare(docker.rig.site.desired(), held).lines())


# Publishing.


async def test_a_port(red):
    """A port is held, recorded and translated, in both families; the pair reflects."""
    assert await publish(red, port(80, 8080)) == ["*:8080:80"]
    assert holds(red) == ["*:8080"]
    assert translated(red) == [
        "any4 tcp . 8080 : 10.1.0.2 . 80",
        "any6 tcp . 8080 : fd00::2 . 80",
    ]
    assert red.rig.kernel.ops["device", "host", devices.port("box")].hairpin
    assert differences(red) == []


async def test_many_ports(red):
    """All ports of a container are published together."""
    asked = (
        port(80, 8080), port(53, 53, protocol=UDP), port(81, 8080, protocol=UDP),
        port(80, 8081, ip="127.0.0.1"), port(80, 8081, ip="::1"),
    )  # fmt: skip
    assert sorted(await publish(red, *asked)) == [
        "*:53:53", "*:8080:80", "*:8080:81", "127.0.0.1:8081:80", "::1:8081:80",
    ]  # fmt: skip
    assert holds(red) == ["*:53", "*:8080", "*:8080", "127.0.0.1:8081", "::1:8081"]
    assert differences(red) == []


async def test_no_port_is_compared_with_all_others(red, monkeypatch):
    """Many ports, published beside many and then once more, meet only their like."""
    compared = []

    def clashing(one, other):
        compared.append((one.host_port, other.host_port))
        return clash(one, other)

    clash = publishing.clashing
    monkeypatch.setattr(publishing, "clashing", clashing)
    first = tuple(port(80, 7000 + n, ip="127.0.0.1") for n in range(100))
    second = tuple(port(80, 7000 + n, ip="127.0.0.2") for n in range(100))
    await publish(red, *first)
    await red.start("two", RED, ports=second)
    assert await publish(red, *first) == [
        f"127.0.0.1:{7000 + n}:80" for n in range(100)
    ]
    assert len(published(red, "two")) == 100
    assert {one == other for one, other in compared} == {True}
    assert len(compared) <= 400


async def test_the_order_of_work(red):
    """The port is held before the record says so, and translated after that."""
    order = []

    class Watched(type(red.rig.kernel)):
        def one(self, op):
            if isinstance(op, Hold | Element) and op.key[2] != "bridge":
                order.append(type(op))
            super().one(op)

    red.rig.kernel.__class__ = Watched

    async def step(name):
        order.append(name)

    red.rig.state.step = step
    await publish(red, port(80, 8080))
    assert order == [
        Hold, "commit.before", "commit.after", Hold, Element, Element,
    ]  # fmt: skip


async def test_chosen_ports(red):
    """A port that is left to us is one of IANA's dynamic ports, another each time."""
    first = await publish(red, port(80), port(81), port(80, protocol=UDP))
    await red.start("two", RED, ports=(port(80), port(81)))
    numbers = [int(text.split(":")[1]) for text in (*first, *published(red, "two"))]
    assert all(49153 <= n <= 65535 for n in numbers)
    names = [(t.rsplit(":", 1)[0]) for t in (*first, *published(red, "two"))]
    assert len(set(names)) >= 4
    assert differences(red) == []
    tcp = [p.host_port for e in red.rig.state.view.all(Endpoint, "endpoints/")
           for p in e.published if p.protocol == TCP]  # fmt: skip
    assert len(set(tcp)) == 4


async def test_a_range(red):
    """Of a range the first free port is taken; another program's is passed by."""
    red.rig.kernel.busy = {(TCP, 7000)}
    assert await publish(red, port(80, 7000, 7002)) == ["*:7001:80"]
    await red.start("two", RED, ports=(port(80, 7000, 7002),))
    assert published(red, "two") == ["*:7002:80"]


async def test_a_range_without_end_is_one_port(red):
    """A host port without an end is that port and no other."""
    assert await publish(red, port(80, 7000, 0)) == ["*:7000:80"]
    with pytest.raises(Conflict, match="host port 7000 is published by box"):
        await red.start("two", RED, ports=(port(80, 7000, 0),))


async def test_who_wants_one_port_only_comes_first(red):
    """In whatever order Docker asks, a fixed port is not given away to a range."""
    asked = (port(80), port(81, 7000, 7001), port(82, 7000))
    for order in (asked, asked[::-1]):
        given = await publish(red, *order)
        assert "*:7000:82" in given
        assert "*:7001:81" in given
        await red.rig.networks.revoke(RED, "box")


async def test_nothing_to_publish(red):
    """Docker programs containers without ports, too."""
    assert await publish(red) == []
    assert holds(red) == []


# Addresses of the host.


async def test_host_binding(docker):
    """A port without an address is bound to the network's; one with keeps its own."""
    await docker.create(RED, "10.1.0.0/24", options={"pynet.host_binding": "127.0.0.1"})
    await docker.start("box", RED)
    asked = (port(80, 8080), port(81, 8081, ip="192.0.2.1"))
    assert await publish(docker, *asked) == ["127.0.0.1:8080:80", "192.0.2.1:8081:81"]
    assert await publish(docker, *asked, ipv6=False) == [
        "127.0.0.1:8080:80",
        "192.0.2.1:8081:81",
    ]


async def test_ipv6_ports_are_anothers(red):
    """With no_proxy_6to4 a port without an address is IPv4's alone."""
    assert await publish(red, port(80, 8080), ipv6=False) == ["0.0.0.0:8080:80"]
    assert holds(red) == ["0.0.0.0:8080"]
    assert translated(red) == ["any4 tcp . 8080 : 10.1.0.2 . 80"]
    await red.start("two", RED, ports=(port(80, 8080, ip="::"),))
    assert published(red, "two") == [":::8080:80"]


@pytest.mark.parametrize("how", ["internal", "docker"])
async def test_closed_networks_publish_nothing(docker, how):
    """An internal network, or one whose gateway is Docker, publishes nothing."""
    options = {"pynet.gateway": "docker"} if how == "docker" else {}
    await docker.create(RED, "10.1.0.0/24", internal=how == "internal", options=options)
    await docker.start("box", RED, ports=(port(80, 8080),))
    assert published(docker) == []
    assert holds(docker) == []


# Conflicts.


@pytest.mark.parametrize(
    ("first", "second", "free"),
    [
        ((None, 8080, TCP), (None, 8080, TCP), False),
        ((None, 8080, TCP), (None, 8080, UDP), True),
        ((None, 8080, TCP), (None, 8081, TCP), True),
        ((None, 8080, TCP), ("127.0.0.1", 8080, TCP), False),
        (("127.0.0.1", 8080, TCP), (None, 8080, TCP), False),
        ((None, 8080, TCP), ("::1", 8080, TCP), False),
        (("0.0.0.0", 8080, TCP), ("127.0.0.1", 8080, TCP), False),
        (("127.0.0.1", 8080, TCP), ("0.0.0.0", 8080, TCP), False),
        (("127.0.0.1", 8080, TCP), ("127.0.0.1", 8080, TCP), False),
        (("127.0.0.1", 8080, TCP), ("192.0.2.1", 8080, TCP), True),
        (("127.0.0.1", 8080, TCP), ("::1", 8080, TCP), True),
        (("0.0.0.0", 8080, TCP), ("::", 8080, TCP), True),
        (("::", 8080, TCP), ("::1", 8080, TCP), False),
        (("2001:db8::1", 8080, TCP), ("::", 8080, TCP), False),
    ],
)
async def test_who_is_in_whose_way(red, first, second, free):
    """Two ports clash if one packet could be for both."""
    (ip1, host1, protocol1), (ip2, host2, protocol2) = first, second
    await publish(red, port(80, host1, ip=ip1, protocol=protocol1))
    asked = port(80, host2, ip=ip2, protocol=protocol2)
    if free:
        await red.start("two", RED, ports=(asked,))
        assert differences(red) == []
    else:
        before = everything(red)
        with pytest.raises(Conflict) as refused:
            await red.start("two", RED, ports=(asked,))
        assert str(refused.value) == (
            "host port 8080 is published by box; choose another host port"
        )
        assert everything(red) == before


async def test_a_conflict_names_the_container(red):
    """The sentence has Docker's name of the container that has the port."""
    await publish(red, port(80, 8080))
    await red.create(BLUE, "10.2.0.0/24")
    red.rig.site.names = {"box": "web"}
    with pytest.raises(Conflict, match="host port 8080 is published by web; choose"):
        await red.start("two", BLUE, ports=(port(80, 8080),))


async def test_another_programs_port(red):
    """A port that another program has is refused with the kernel's sentence."""
    red.rig.kernel.busy = {(TCP, 8080)}
    before = everything(red)
    with pytest.raises(Conflict, match="port 8080 is taken by another program"):
        await publish(red, port(81, 8081), port(80, 8080))
    assert everything(red) == before


async def test_a_range_without_a_free_port(red):
    """When no port of a range is free the sentence has its ends and the last reason."""
    red.rig.kernel.busy = {(TCP, 7000), (TCP, 7001)}
    before = everything(red)
    with pytest.raises(Exhausted) as refused:
        await publish(red, port(80, 7000, 7001))
    assert str(refused.value) == (
        "no free host port for container port 80: tried 7000 to 7001, the last: "
        "port 7001 is taken by another program"
    )
    assert everything(red) == before


async def test_no_chosen_port_is_free(red):
    """When no dynamic port is free that is told, and the trying has an end."""
    red.rig.kernel.busy = {(TCP, number) for number in range(49153, 65536)}
    with pytest.raises(Exhausted) as refused:
        await publish(red, port(80))
    assert str(refused.value).startswith(
        "no free host port for container port 80: tried 49153 to 65535, the last: port"
    )


@pytest.mark.parametrize("ip", [None, "127.0.0.1"])
async def test_one_container_asks_twice_for_a_port(red, ip):
    """A container cannot have a host port for two of its own, nor twice."""
    before = everything(red)
    for other in (80, 81):
        with pytest.raises(Conflict, match="host port 8080 is published by box"):
            await publish(red, port(80, 8080), port(other, 8080, ip=ip))
        assert everything(red) == before


# Publishing again.


async def test_republishing_keeps_the_ports(red):
    """Ports asked again are the same ports, chosen ones too; nothing is touched."""
    asked = (port(80), port(81, 7000, 7005), port(82, 8080))
    first = await publish(red, *asked)
    red.rig.kernel.applied = 0
    assert sorted(await publish(red, *asked[::-1])) == sorted(first)
    assert red.rig.kernel.applied == 0


async def test_republishing_less_and_more(red):
    """What is not asked any more goes, what is new comes."""
    await publish(red, port(80, 8080), port(81, 8081))
    assert await publish(red, port(81, 8081), port(82, 8082)) == [
        "*:8081:81",
        "*:8082:82",
    ]
    assert holds(red) == ["*:8081", "*:8082"]
    assert differences(red) == []


async def test_republishing_with_another_container_port(red):
    """The same host port for another container port is translated anew."""
    await publish(red, port(80, 8080))
    assert await publish(red, port(81, 8080)) == ["*:8080:81"]
    assert translated(red) == [
        "any4 tcp . 8080 : 10.1.0.2 . 81",
        "any6 tcp . 8080 : fd00::2 . 81",
    ]
    assert differences(red) == []


async def test_a_kept_port_is_not_given_twice(red):
    """A port that another wish of the same call has taken is not kept for the first."""
    await publish(red, port(80, 8080))
    before = everything(red)
    with pytest.raises(Conflict):
        await publish(red, port(81, 8080), port(80, 8080))
    assert everything(red) == before
    assert differences(red) == []


async def test_a_failed_republish_keeps_what_was(red):
    """If one port is refused, those published before stay as they were."""
    await publish(red, port(80, 8080), port(81))
    before = everything(red)
    red.rig.kernel.busy = {(TCP, 9000)}
    with pytest.raises(Conflict):
        await publish(red, port(80, 8081), port(83, 8083), port(82, 9000))
    assert everything(red) == before
    assert differences(red) == []


async def test_a_kernel_that_refuses_to_translate(red):
    """If the kernel refuses an element, no port is held or recorded."""
    before = everything(red)
    red.rig.kernel.refuse = {
        ("element", "host", "inet", "pynet", "any6", "tcp", "8081")
    }
    with pytest.raises(KernelError):
        await publish(red, port(80, 8080), port(81, 8081))
    assert everything(red) == before


async def test_a_store_that_goes_away(red):
    """If the record cannot be written, no port stays held."""
    before = everything(red)
    store = red.rig.state.store

    class Away:
        def __getattr__(self, name):
            return getattr(store, name)

        async def commit(self, change, lease=None):
            raise StoreError("the store is away")

    red.rig.state.store = Away()
    with pytest.raises(StoreError, match="the store is away"):
        await publish(red, port(80, 8080))
    red.rig.state.store = store
    assert everything(red) == before


async def test_a_failed_program_before_join(docker):
    """Even out of its place a failed Program leaves no port held."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create_box("box", RED)
    docker.rig.kernel.busy = {(TCP, 9000)}
    with pytest.raises(Conflict):
        await publish(docker, port(80, 8080), port(81, 9000))
    assert (holds(docker), published(docker)) == ([], [])


async def test_a_program_before_join_is_made_good_by_it(docker):
    """Ports published before Join are held and translated with it."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create_box("box", RED)
    await publish(docker, port(80, 8080))
    await docker.rig.networks.join(RED, "box", "/s")
    assert differences(docker) == []


# Revoking.


async def test_revoking(red):
    """Revoke takes everything back, and the pair no longer reflects; twice is fine."""
    before = everything(red)
    await publish(red, port(80, 8080), port(81))
    await red.rig.networks.revoke(RED, "box")
    assert everything(red) == before
    await red.rig.networks.revoke(RED, "box")
    assert differences(red) == []


async def test_a_revoked_port_is_free(red):
    """A port is another's as soon as it was taken back."""
    await publish(red, port(80, 8080))
    await red.start("two", RED)
    await red.rig.networks.revoke(RED, "box")
    assert await publish(red, port(80, 8080), box="two") == ["*:8080:80"]
    assert differences(red) == []


async def test_the_gateway_moves(red):
    """Program of one endpoint right after Revoke of another, in one breath."""
    await red.create(BLUE, "10.2.0.0/24")
    await red.start("two", BLUE)
    await publish(red, port(80, 8080))
    await asyncio.gather(
        red.rig.networks.revoke(RED, "box"),
        asyncio.sleep(0),
    )
    await publish(red, port(80, 8080), box="two", net=BLUE)
    assert differences(red) == []


async def test_revoking_goes_on_when_the_kernel_refuses(red):
    """Revoke never fails: what the kernel refuses is the next audit's."""
    await publish(red, port(80, 8080))
    red.rig.kernel.refuse = {("device", "host", devices.port("box"))}
    await red.rig.networks.revoke(RED, "box")
    assert published(red) == []
    red.rig.kernel.refuse = set()
    r = red.rig
    await Sync(r.site, r.networks, r.ipam, None, grace=60, audit=60).turn()
    assert differences(red) == []


async def test_ports_at_once(docker):
    """Many containers that ask for one port at the same time: one gets it."""
    await docker.create(RED, "10.1.0.0/24")
    for n in range(10):
        await docker.start(f"box{n}", RED)
    answers = await asyncio.gather(
        *(publish(docker, port(80, 8080), box=f"box{n}") for n in range(10)),
        return_exceptions=True,
    )
    assert len([a for a in answers if a == ["*:8080:80"]]) == 1
    assert len([a for a in answers if isinstance(a, Conflict)]) == 9
    assert differences(docker) == []


# The arithmetic of it.


def test_candidates():
    """Fixed ports and ranges in order; chosen ones from a place of their own."""
    assert list(publishing.candidates(port(80, 8080))) == [8080]
    assert list(publishing.candidates(port(80, 7000, 7002))) == [7000, 7001, 7002]
    assert list(publishing.candidates(port(80, 65535))) == [65535]
    chosen = list(publishing.candidates(port(80)))
    assert chosen == list(range(59319, 59319 + 128))
    assert next(publishing.candidates(port(80, protocol=UDP))) == 59330
    wrapped = list(publishing.candidates(port(128, protocol=126)))
    assert wrapped[:3] == [65535, 49153, 49154]
    assert len(wrapped) == 128


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (port(80, 8080), True),
        (port(80), False),
        (port(80, 8000, 8080), True),
        (port(80, 8080, 8090), True),
        (port(80, 8081, 8090), False),
        (port(80, 8000, 8079), False),
        (port(81, 8080), False),
        (port(80, 8080, protocol=UDP), False),
        (port(80, 8080, ip="0.0.0.0"), False),
    ],
)
def test_what_a_port_fits(wish, expected):
    """A published port fits a wish for the same thing whose host ports hold it."""
    given = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)
    assert publishing.fits(given, wish) is expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(49152, False), (49153, True), (65535, True)],
)
def test_what_a_chosen_port_fits(number, expected):
    """Any dynamic port fits a wish that leaves the choice to us."""
    given = Published(protocol=TCP, port=80, host_ip=None, host_port=number)
    assert publishing.fits(given, port(80)) is expected


@pytest.mark.parametrize(
    ("binding", "own", "ipv6", "expected"),
    [
        (None, None, True, None),
        (None, None, False, "0.0.0.0"),
        ("127.0.0.1", None, True, "127.0.0.1"),
        ("127.0.0.1", "::1", False, "::1"),
        (None, "::1", False, "::1"),
    ],
)
def test_which_address_a_port_is_bound_to(binding, own, ipv6, expected):
    """The user's address wins over the network's, that over all addresses."""
    found = publishing.bound_to(
        ip_address(binding) if binding else None, port(80, ip=own), ipv6=ipv6
    )
    assert found == port(80, ip=expected)
