"""Blocks: what a host has of a pool in advance, lends to others, and gives up."""

import asyncio
from dataclasses import replace
from ipaddress import ip_address, ip_network
from types import SimpleNamespace

import pytest

from cnmdriver.driver import blocks as module
from cnmdriver.driver import claims
from cnmdriver.driver.blocks import lacking, parts, pool_key, size, take
from cnmdriver.model import Block, Member, Pool, Reservation
from cnmdriver.plan import pools
from cnmdriver.store import records
from cnmdriver.store.view import Draft, View
from tests.fakes import cluster, level
from tests.unit.calls import Docker

NET = "n" * 12
SMALL = ip_network("10.1.0.0/24")


class Idle(module.Blocks):
    """Blocks of a host that has none; it counts how often it looks for some."""

    def __init__(self):
        """Have a store, and nothing in it."""
        self.turns = self.looks = 0
        self.reason = None
        super().__init__(SimpleNamespace(state=self, view=View("a")))

    @property
    def away(self):
        """Tell why the store is away, and count who asks."""
        self.turns += 1
        return self.reason

    def asked(self, _):
        return ()

    async def fill(self):
        self.looks += 1


async def test_what_is_heard_is_looked_at_soon(monkeypatch):
    """News between two looks, however late, is looked at after the next; no news not."""
    monkeypatch.setattr(module, "PACE", 0.3)
    monkeypatch.setattr(module, "CALM", 0.1)
    for late in (0.0, 0.1, 0.2, 0.25, 0.29):
        idle = Idle()
        task = asyncio.create_task(idle.run())
        await asyncio.sleep(late)
        idle.wake()
        async with asyncio.timeout(10):
            while idle.looks < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        assert idle.looks == 2
        task.cancel()
        await asyncio.wait([task])


async def test_while_the_store_is_away_it_is_rarely_asked_for(monkeypatch):
    """What is owed while the store is away is tried at the usual pace, and done after."""
    monkeypatch.setattr(module, "PACE", 0.3)
    monkeypatch.setattr(module, "CALM", 0.01)
    idle = Idle()
    idle.reason = "etcd is full"
    task = asyncio.create_task(idle.run())
    await asyncio.sleep(1.0)
    assert idle.turns <= 4
    assert idle.looks == 0
    idle.reason = None
    async with asyncio.timeout(10):
        while not idle.looks:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])


class Known:
    """A view of one pool, whose news the test makes up."""

    def __init__(self, cidr=SMALL, hosts=("a",)):
        """Know a pool, and the hosts in its network."""
        self.view = View("a")
        self.pool = Pool(space="local", cidr=ip_network(cidr), network=NET)
        self.learn(records.pool("local", self.pool.cidr), self.pool)
        for host in hosts:
            member = Member(network=NET, host=host, docker_id="d" * 64)
            self.learn(records.member(NET, host), member)

    def learn(self, key, record):
        """Let a record reach the view."""
        revision = self.view.revision + 1
        assert self.view.write(key, records.encode(record), revision)

    def block(self, text, host="a", **fields):
        """Give a block to a host."""
        key = records.block("local", self.pool.cidr, ip_network(text))
        self.learn(key, Block(host=host, **fields))

    def address(self, text, host="a", **fields):
        """Give an address to a host."""
        ip, cidr = ip_address(text), self.pool.cidr
        held = Reservation(space="local", cidr=cidr, ip=ip, host=host, **fields)
        self.learn(records.address("local", cidr, ip), held)

    def lacks(self, sub=None, host="a"):
        """Return how much more a host should have."""
        return lacking(self.view, host, self.pool, sub and ip_network(sub))

    def taken(self, sub=None, but=()):
        """Return the blocks that host a takes."""
        draft = Draft(self.view)
        take(draft, "a", self.pool, sub and ip_network(sub), but)
        assert all(record == Block(host="a") for record in draft.puts.values())
        return ["/".join(key.split("/")[-2:]) for key in draft.puts]


# How much.


@pytest.mark.parametrize(
    ("cidr", "hosts", "count"),
    [
        (SMALL, "a", 15),
        (SMALL, "abc", 5),
        ("10.1.0.0/29", "abc", 1),
        ("10.1.0.0/16", "a", module.MOST),
        ("10.1.0.0/16", "a" + "bcdefghijklmnopqrst", 204),
        ("fd00::/64", "abc", module.MOST),
    ],
)
def test_how_much_in_advance(cidr, hosts, count):
    """The hosts of a network share a sixteenth of a pool, and each has a bound."""
    assert Known(cidr, hosts).lacks() == count


def test_what_is_used_is_not_in_advance():
    """What a host has taken, lent or the gateway of its blocks is not free for it."""
    known = Known()
    known.block("10.1.0.0/27")
    room = size(known.pool, None, ip_network("10.1.0.0/27"))
    assert known.lacks() == 15 - room
    known.address("10.1.0.1", "b", gateway=True)
    known.address("10.1.0.5")
    known.block("10.1.0.0/27", lent=(ip_address("10.1.0.9"),))
    assert known.lacks() == 15 - room + 3
    known.address("10.1.0.40")
    assert known.lacks() == 15 - room + 3


def test_others_blocks_are_not_ones_own():
    """A block of another host is nothing in advance."""
    known = Known(hosts="ab")
    known.block("10.1.0.0/27", "b")
    assert known.lacks() == 7
    assert known.lacks(host="b") < 0


# Which.


def test_the_lowest_block_is_taken():
    """A host takes no more blocks than it needs, the lowest first."""
    assert Known().taken() == ["10.1.0.0/27"]
    assert len(Known("10.1.0.0/16").taken()) * 256 >= module.MOST


def test_no_block_with_anothers_address():
    """A block that another host has an address of stays open to all, or has an owner."""
    known = Known(hosts="ab")
    known.block("10.1.0.0/27", "b")
    known.address("10.1.0.33", "b")
    known.address("10.1.0.65", "b", gateway=True)
    assert known.taken() == ["10.1.0.64/27"]


def test_enough_is_enough():
    """Nothing is taken while enough is free, and the next block when it is used."""
    known = Known()
    known.block("10.1.0.0/27")
    assert known.taken() == []
    for number in range(2, 25):
        known.address(f"10.1.0.{number}")
    assert known.taken() == ["10.1.0.32/27"]


def test_what_was_given_up_is_not_taken_again():
    """A block that another host asked for is left to it for a while."""
    first = records.block("local", SMALL, ip_network("10.1.0.0/27"))
    assert Known().taken(but={first}) == ["10.1.0.32/27"]


def test_a_part_of_a_pool():
    """Of a pool of which Docker gives out a part, blocks of that part are taken."""
    known = Known()
    assert known.taken("10.1.0.128/25") == ["10.1.0.128/27"]
    assert size(known.pool, ip_network("10.1.0.128/25"), ip_network("10.1.0.0/27")) == 0


def test_parts_are_the_claims():
    """A host's parts of a pool are its claims on it; without one it is all of it."""
    pool = Known().pool
    claimed = ("local/10.1.0.0/24/10.1.0.128/25", "local/10.2.0.0/24")
    member = Member(network=NET, host="a", claims=claimed)
    assert parts(member, pool) == {ip_network("10.1.0.128/25")}
    assert parts(replace(member, claims=()), pool) == {None}


@pytest.mark.parametrize("text", ["10.1.0.0/24", "fd00:1::/64"])
def test_the_pool_of_a_block(text):
    """A block's key names its pool."""
    pool = ip_network(text)
    span = pools.block(pool, pool[1])
    key = records.block("local", pool, span)
    assert pool_key(key) == records.pool("local", pool)


# Between hosts.


@pytest.fixture
async def two(directory):
    """Play two dockerds in one network, the second with no address yet."""
    async with cluster(directory, 2) as rigs:
        hosts = [Docker(rig) for rig in rigs]
        for host in hosts:
            await level(host.rig)
            await host.create(name(host), str(SMALL))
        for rig in rigs:
            await until(lambda rig=rig: own(rig))
        await level(*rigs)
        yield hosts


def name(host):
    """Return what a host's Docker calls the network."""
    return host.rig.site.host.name * 32


def own(rig):
    """Return the blocks of a host, as it sees them."""
    view = rig.state.view
    (pool,) = view.all(Pool, "pools/")
    return dict(module.own(view, rig.site.host.id, pool))


async def until(condition):
    """Wait for what others bring about."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_address_is_lent(two):
    """The owner of a block that is in use lends what it does not use itself."""
    one, other = two
    box = await one.create_box("one", name(one))
    (span,) = own(one.rig)
    wish = str(span[20])
    asked = await other.create_box("two", name(other), ip=wish)
    assert wish in str(asked.addresses[0])
    await level(one.rig, other.rig)
    assert own(one.rig)[span].lent == (span[20],)
    assert box.addresses[0].ip in span


async def test_an_unused_block_is_given_up(two):
    """A block that its owner uses nothing of is given up when it is asked for."""
    one, other = two
    (span,) = own(other.rig)
    await one.create_box("one", name(one), ip=str(span[20]))
    await until(lambda: span not in own(other.rig))
    assert list(other.rig.ipam.blocks.given) == [records.block("local", SMALL, span)]


async def test_what_is_used_is_not_lent(two):
    """An address that the owner has given to a container is refused, and not lent."""
    one, other = two
    box = await one.create_box("one", name(one))
    (span,) = own(one.rig)
    with pytest.raises(claims.Conflict, match="is taken by"):
        await other.create_box("two", name(other), ip=str(box.addresses[0].ip))
    await level(one.rig)
    assert own(one.rig)[span].lent == ()


async def test_an_owner_that_does_not_answer(two, monkeypatch):
    """An owner that is silent, or gone, keeps its block: the caller hears it soon."""
    one, other = two
    await one.create_box("one", name(one))
    (span,) = own(one.rig)
    monkeypatch.setattr(module, "ANSWER", 0.1)
    monkeypatch.setattr(one.rig.ipam.blocks, "asked", lambda _: ())
    with pytest.raises(claims.Elsewhere, match="which does not give this one"):
        await other.create_box("two", name(other), ip=str(span[20]))
    alive = records.alive(one.rig.site.host.id)
    await one.rig.state.commit(lambda draft: draft.delete(alive))
    await level(other.rig)
    before = other.rig.state.view.revision
    with pytest.raises(claims.Elsewhere):
        await other.create_box("two", name(other), ip=str(span[21]))
    block = other.rig.state.view.get(Block, records.block("local", SMALL, span))
    assert span[21] not in block.wanted
    assert other.rig.state.view.revision >= before


async def test_leaving_gives_the_blocks_back(two):
    """A host that leaves the network keeps no block of it."""
    one, other = two
    await one.remove(name(one))
    await until(lambda: not own(other.rig) or own(one.rig) == {})
    await level(one.rig, other.rig)
    assert own(one.rig) == {}
    assert own(other.rig)
