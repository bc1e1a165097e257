"""Hosts: which hosts can be in one cluster, and how one tells the others where it is."""

import asyncio
import logging
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network

import pytest
import structlog

from cnmdriver.driver import hosts as module
from cnmdriver.driver.hosts import Hosts, is_dead, refuse, watermarks
from cnmdriver.errors import Conflict, InvalidParameter, StoreError
from cnmdriver.model import (
    Alive,
    Host,
    Member,
    Network,
    Pool,
    Reservation,
    Subnet,
    Underlay,
    Vni,
    Watermark,
)
from cnmdriver.store import records
from cnmdriver.store.etcd.store import divide
from tests.fakes import cluster, ended, level

OTHER = Host(
    id="b" * 16, name="h3", version="0", vtep=ip_address("192.0.2.3"), vxlan_port=4789
)


@pytest.fixture
async def rigs(directory):
    """Build two hosts on one store."""
    async with cluster(directory, 2) as made:
        yield made


@pytest.fixture
def one(rigs):
    """Take what publishes the first host, at an address of its own."""
    return publisher(rigs[0], "192.0.2.1")


def publisher(rig, vtep):
    """Return what publishes a host, whose user wants an address."""
    return Hosts(rig.site, vtep)


def published(rig, host):
    """Return what a host sees of another, or of itself."""
    return rig.state.view.get(Host, records.host(host.site.host.id))


async def write(rig, *news):
    """Write records as another host would."""

    def decide(draft):
        for key, record in news:
            if record is None:
                draft.delete(key)
            else:
                draft.put(key, record)

    await rig.state.commit(decide)


def alive(host):
    """Return the news that a host is there."""
    return (records.host(host.id), host), (
        records.alive(host.id),
        Alive(instance="i", boot="b"),
    )


# Two that cannot be.


NAME = (
    "another host of this cluster is called 'h3' (id bbbbbbbbbbbbbbbb); give this one "
    "another name with --host-name"
)
ADDRESS = (
    "host h3 has the tunnel address 192.0.2.3 too; name an address of this host that "
    "the others reach with --vtep (VirtualBox gives each machine 10.0.2.15 on its "
    "first device)"
)
FAMILY = (
    "the tunnel address 2001:db8::1 is IPv6, and host h3 has 192.0.2.3; name an IPv4 "
    "address with --vtep"
)
PORT = (
    "host h3 has its tunnels on UDP port 4789, not 8472; use --vxlan-port 4789 on all "
    "hosts"
)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "h3"}, NAME),
        ({"vtep": ip_address("192.0.2.3")}, ADDRESS),
        ({"vtep": ip_address("2001:db8::1")}, FAMILY),
        ({"vxlan_port": 8472}, PORT),
    ],
)
def test_refusals(fields, text):
    """What two hosts of a cluster cannot have is refused with the remedy."""
    own = Host(id="a" * 16, name="h1", version="0", vtep=ip_address("192.0.2.1"))
    refuse(own, OTHER)
    with pytest.raises(Conflict) as refused:
        refuse(replace(own, **fields), OTHER)
    assert str(refused.value) == text


@pytest.mark.parametrize("vteps", [("192.0.2.1", None), (None, "192.0.2.1")])
def test_a_host_without_tunnels(vteps):
    """A host without tunnels stands in nobody's way, but by its name."""
    mine, theirs = (ip_address(v) if v else None for v in vteps)
    own = Host(id="a" * 16, name="h1", version="0", vtep=mine, vxlan_port=1)
    other = replace(OTHER, vtep=theirs)
    refuse(own, other)
    with pytest.raises(Conflict, match="--host-name"):
        refuse(replace(own, name="h3"), other)


# Publishing.


async def test_publishing(rigs, one):
    """A host tells its address and what its tunnels can carry, once."""
    await write(rigs[0], (records.host(one.site.host.id), None))
    assert await one.publish()
    await level(*rigs)
    seen = published(rigs[1], one)
    assert seen == rigs[0].site.host
    assert (str(seen.vtep), seen.mtu, seen.name) == ("192.0.2.1", 1500, "h1")
    steps = rigs[0].steps.copy()
    assert not await one.publish()
    assert rigs[0].steps == steps


async def test_a_live_host_in_the_way(rigs):
    """A second host of one address is refused, and the others hear nothing of it."""
    second = publisher(rigs[0], "192.0.2.2")
    before = published(rigs[0], second)
    with pytest.raises(Conflict, match=r"^host h2 has the tunnel address "):
        await second.publish()
    await level(*rigs)
    assert published(rigs[1], second) == before == rigs[0].site.host


async def test_a_host_nobody_has_heard_of_yet(rigs, one):
    """What another host has just published counts, though the news is not here yet."""
    await level(*rigs)
    store = rigs[0].state.store.store
    twin = replace(OTHER, name="h1")
    change = {key: records.encode(record) for key, record in alive(twin)}
    own = records.host(one.site.host.id)
    await write(rigs[0], (own, None))
    commit = store.commit

    async def just_before(wanted, lease=None):
        if own in wanted.puts:
            store.commit = commit
            await commit(replace(wanted, expect={}, puts=change, deletes=frozenset()))
        return await commit(wanted, lease)

    store.commit = just_before
    with pytest.raises(Conflict, match="another host of this cluster is called 'h1'"):
        await one.publish()


async def test_the_first_of_two_stays(rigs, one):
    """A host that was published first is not refused because of the second."""
    await one.publish()
    twin = replace(OTHER, name="h1")
    await write(rigs[1], *alive(twin))
    await level(*rigs)
    await one.look_again(rigs[0].site.host)
    with pytest.raises(Conflict):
        await one.publish()


@pytest.mark.parametrize("fields", [{"name": "h1"}, {"vtep": ip_address("192.0.2.1")}])
async def test_the_dead_stand_in_nobodys_way(rigs, one, fields):
    """Name and address of a dead host are free, and taken from it in silence."""
    dead = replace(OTHER, **fields)
    await write(rigs[1], *alive(dead))
    await level(*rigs)
    with pytest.raises(Conflict):
        await one.publish()
    await write(rigs[1], (records.alive(dead.id), None))
    await level(*rigs)
    await one.publish()


async def test_a_resting_host_is_in_the_way(rigs, one):
    """A host whose daemon was stopped still serves: its address is taken."""
    rests = Alive(instance="i", boot="b", resting=True)
    taken = replace(OTHER, vtep=ip_address("192.0.2.1"))
    await write(rigs[1], alive(taken)[0], (records.alive(taken.id), rests))
    await level(*rigs)
    with pytest.raises(Conflict, match="tunnel address"):
        await one.publish()


async def test_no_such_address(rigs):
    """What the dataplane says of the wish is what the user hears."""

    async def none(wish, towards):
        raise InvalidParameter(f"no {wish} towards {towards}")

    rigs[0].kernel.underlay = none

    async def towards():
        return (ip_address("192.0.2.9"),)

    with pytest.raises(InvalidParameter, match=r"^no  towards .*192\.0\.2\.9"):
        await Hosts(rigs[0].site, "", towards).publish()
    with pytest.raises(InvalidParameter, match=r"^no eth9 towards"):
        await Hosts(rigs[0].site, "eth9", towards).publish()


# Keeping it true.


class Road:
    """The way to the others, which the test moves or closes."""

    def __init__(self, rig, monkeypatch):
        """Begin where the host is."""
        monkeypatch.setattr(module, "EVERY", 0.01)
        rig.kernel.underlay = self.underlay
        self.address, self.mtu = rig.site.host.vtep, 1500
        self.error = None
        self.looks = 0

    async def underlay(self, wish, towards):
        """Answer."""
        self.looks += 1
        if self.error is not None:
            raise self.error
        return Underlay(address=self.address, device="eth0", mtu=self.mtu)

    async def look(self, times=3):
        """Wait until it was asked some times more."""
        wanted = self.looks + times
        async with asyncio.timeout(5):
            while self.looks < wanted:
                await asyncio.sleep(0.005)


@pytest.fixture
def road(rigs, one, monkeypatch):
    """Give the first host a way that can change."""
    return Road(rigs[0], monkeypatch)


@pytest.fixture
async def following(one, road):
    """Run the loop; return how often the tunnels moved."""
    moves = []
    one.moved = lambda: moves.append(one.site.host)
    task = asyncio.create_task(one.run())
    yield moves
    assert not task.done()
    await ended(task)


async def test_an_address_that_changes(rigs, one, road, following):
    """A new address is published, and only then are the tunnels made anew."""
    await road.look()
    assert following == []
    road.address = ip_address("192.0.2.101")
    await road.look()
    (host,) = following
    assert host.vtep == road.address
    await level(*rigs)
    assert published(rigs[1], one) == host


async def test_an_mtu_that_changes(rigs, road, following):
    """A new MTU of the way is published too."""
    road.mtu = 9000
    await road.look()
    (host,) = following
    assert host.mtu == 9000


@pytest.fixture
def said(monkeypatch):
    """Collect what is logged."""
    lines = []
    structlog.configure(
        processors=[lambda _, level, event: lines.append((level, event))
                    or (_ for _ in ()).throw(structlog.DropEvent)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )  # fmt: skip
    monkeypatch.setattr(module, "log", structlog.get_logger())
    yield lines
    structlog.reset_defaults()


async def test_an_address_of_anothers(rigs, one, road, said, following):
    """An address that another live host has is told once, and not published."""
    before = rigs[0].site.host
    road.address = ip_address("192.0.2.2")
    await road.look(5)
    assert (following, one.site.host) == ([], before)
    warned = [e for level, e in said if level == "warning"]
    (line,) = warned
    assert "host h2 has the tunnel address 192.0.2.2 too" in line["error"]
    road.address = before.vtep
    await road.look()
    road.address = ip_address("192.0.2.2")
    await road.look()
    assert len([1 for level, _ in said if level == "warning"]) == 2


@pytest.mark.parametrize(
    "error", [InvalidParameter("no address"), StoreError("the store is away")]
)
async def test_failures_are_not_fatal(rigs, road, following, said, error):
    """What fails is logged, and the next look finds what changed meanwhile."""
    road.error = error
    await road.look()
    assert [e["error"] for level, e in said if level == "warning"] == [str(error)]
    road.error = None
    road.address = ip_address("192.0.2.101")
    await road.look()
    assert len(following) == 1


async def test_looks_are_often_enough():
    """A new address is seen in less than the five seconds others have to follow."""
    assert module.EVERY <= 2.5


async def test_watermarks(rigs):
    """Each host's watermark is read by the host's id."""
    view = rigs[0].state.view
    await write(
        rigs[0],
        *((records.watermark(h), Watermark(revision=n)) for n, h in enumerate("ab", 5)),
    )
    assert watermarks(view) == {"a": 5, "b": 6}


# Hosts that are gone.


def estate(host, count):
    """Return what a dead host had in networks of its own."""
    yield records.host(host.id), host
    for number in range(count):
        net, cidr = f"{number:012x}", ip_network(f"10.1.{number}.0/24")
        gateway, ip = cidr[1], cidr[2]
        subnet = Subnet(space="local", pool=cidr, gateway=gateway)
        vni = 10_000_000 + number
        yield (
            records.network(net),
            Network(id=net, mode="overlay", subnets=(subnet,), mtu=1450, vni=vni),
        )
        yield records.vni(vni), Vni(network=net)
        yield (
            records.pool("local", cidr),
            Pool(space="local", cidr=cidr, network=net, claimed=True),
        )
        held = Reservation(
            space="local", cidr=cidr, ip=ip, host=host.id, bound=True, endpoint="e"
        )
        yield records.address("local", cidr, ip), held
        yield (
            records.address("local", cidr, gateway),
            replace(held, ip=gateway, endpoint="", gateway=True),
        )
        member = Member(
            network=net,
            host=host.id,
            docker_id=f"{number:064x}",
            bridge="b",
            claims=(f"local/{cidr}",),
        )
        yield records.member(net, host.id), member


def after(rig, act):
    """Do something when a host has committed once; return all that it commits."""
    commit, sent = rig.state.store.commit, []

    async def noted(change, lease=None):
        revision = await commit(change, lease)
        sent.append(change)
        if len(sent) == 1:
            await act()
        return revision

    rig.state.store.commit = noted
    return sent


async def test_a_dead_host_of_many_networks(rigs, one):
    """What a host had in seventy networks goes in transactions that etcd takes."""
    await level(*rigs)
    before = dict(rigs[1].records)
    await write(rigs[1], *estate(OTHER, 70))
    sent = after(rigs[0], noop)
    assert await one.remove("h3", force=False) == "its blocks of addresses are free"
    assert len(sent) == 71
    assert [divide(change)[1] for change in sent] == [[]] * 71
    await level(*rigs)
    assert dict(rigs[1].records) == before


async def noop():
    """Do nothing."""


@pytest.mark.parametrize("by", ["hand", "age"])
async def test_a_host_that_comes_back_is_not_buried(rigs, one, by):
    """A host that is there again in the middle of its removal keeps the rest."""
    await write(rigs[1], *estate(OTHER, 3))
    await level(*rigs)
    after(rigs[0], lambda: write(rigs[1], *alive(OTHER)))
    if by == "hand":
        with pytest.raises(Conflict, match="host h3 came back while it was removed"):
            await one.remove("h3", force=False)
    else:
        gone = partial(is_dead, host=OTHER.id)
        assert not await one.bury(OTHER.id, gone=gone, blocks=True)
    await level(*rigs)
    view = rigs[1].state.view
    assert view.get(Host, records.host(OTHER.id)) == OTHER
    members = view.all(Member, "members/")
    assert sum(member.host == OTHER.id for member in members) == 2
