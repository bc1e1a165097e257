"""Remotes: this host's kernel knows the others' endpoints, where it has its own."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface

import pytest

from cnmdriver.driver import remotes as module
from cnmdriver.driver.site import Site
from cnmdriver.errors import KernelError, StoreError
from cnmdriver.model import Alive, Endpoint, Host, Member, Network, Watermark
from cnmdriver.plan import devices, firewall
from cnmdriver.plan.ops import FLOOD, Element, Fdb, Neighbour, Vxlan
from cnmdriver.store import records
from cnmdriver.store.sqlite import SqliteStore
from tests.fakes import FakeKernel, Shared, announce, cluster, ended, level, on_store
from tests.unit.calls import Docker

NET = "n" * 64
POOL, POOL6 = "10.1.0.0/16", "fd00:1::/64"
FAR, FURTHER = "far0" * 4, "far1" * 4
VTEPS = {FAR: "192.0.2.7", FURTHER: "192.0.2.8"}


class Watched(FakeKernel):
    """A kernel that notes what is asked of it, and can be made slow or unable."""

    def __init__(self):
        """Have been asked nothing."""
        super().__init__()
        self.asked = []
        self.open = asyncio.Event()
        self.open.set()
        self.stuck = False

    async def apply(self, plan, still=lambda plan: plan):
        """Note it, and wait as long as the test wants."""
        self.asked += [("apply", op) for op in plan]
        await self.open.wait()
        await super().apply(plan, still)

    async def clear(self, plan, still=lambda plan: plan):
        """Note it; go, unless the test forbids it."""
        self.asked += [("clear", op) for op in plan]
        if self.stuck:
            raise KernelError("cannot clear: refused by the test")
        await super().clear(plan, still)


@dataclass
class Here:
    """One host whose news of others the test makes up."""

    rig: object
    docker: Docker
    alarms: list[int] = field(default_factory=list)
    revision: int = 1000

    @property
    def remotes(self):
        """Return what is tested."""
        return self.rig.networks.remotes

    @property
    def kernel(self):
        """Return the kernel."""
        return self.rig.kernel

    @property
    def network(self):
        """Return the id of the one network."""
        (found,) = self.rig.state.view.all(Network, "networks/")
        return found.id

    def hear(self, *news):
        """Let records reach the view, in this order."""
        heard = []
        for key, record in news:
            self.revision += 1
            value = None if record is None else records.encode(record)
            heard.append((key, value, self.revision))
        self.rig.state.hear(heard)

    async def learn(self, *news):
        """Let records reach the view, and follow them."""
        self.hear(*news)
        await self.remotes.update()

    def endpoint(self, number, host=FAR, name="", **fields):
        """Return key and record of an endpoint elsewhere."""
        v4 = ip_interface(f"10.1.{128 + (number >> 8)}.{number & 255}/16")
        made = Endpoint(
            network=self.network,
            id=name or f"e{number}-{host}",
            host=host,
            boot="b",
            mac=devices.mac(v4.ip),
            ipv4=v4,
            ipv6=ip_interface(f"fd00:1::f:{number:x}/64"),
            sandbox="/s",
        )
        made = replace(made, **fields)
        return records.endpoint(made.network, made.id), made

    def gone(self, number, host=FAR, name=""):
        """Return the news that an endpoint is gone."""
        return self.endpoint(number, host, name)[0], None

    def member(self, host=FAR, **fields):
        """Return key and record of a host's part in the network."""
        made = Member(network=self.network, host=host, docker_id="d" * 64, **fields)
        return records.member(self.network, host), made

    def entries(self):
        """Return what the kernel has of others."""
        ours = {devices.vxlan(self.network), devices.bridge(self.network)}
        return {
            op
            for op in self.kernel.ops.values()
            if isinstance(op, Fdb | Neighbour) and op.device in ours
        }

    def of(self, *endpoints):
        """Return what the kernel should have of these."""
        tunnel = {"where": "pynet", "device": devices.vxlan(self.network)}
        bridge = {"where": "pynet", "device": devices.bridge(self.network)}
        found = set()
        for _, one in endpoints:
            found.add(Fdb(**tunnel, mac=one.mac, dst=ip_address(VTEPS[one.host])))
            found.add(Fdb(**tunnel, mac=one.mac))
            for face in one.addresses:
                found.add(Neighbour(**bridge, address=face.ip, mac=one.mac))
        return found

    def remembered(self):
        """Return all that is remembered, but of which hosts there are."""
        remotes = self.remotes
        own = [key for key in remotes.plans if not key.startswith("hosts/")]
        return own + [k for k in (*remotes.holders, *remotes.held) if "vteps4" not in k]

    def vteps(self):
        """Return the hosts whose tunnels the kernel lets in."""
        found = (op for op in self.kernel.ops.values() if isinstance(op, Element))
        return {op.item[0] for op in found if op.set.startswith("vteps")}

    def keys(self, verb):
        """Return the keys of what was asked of the kernel since the last time."""
        found = {op.key for said, op in self.kernel.asked if said == verb}
        self.kernel.asked = [each for each in self.kernel.asked if each[0] != verb]
        return found


def alive(host):
    """Return the news that a host is there."""
    made = Host(id=host, name=host, version="0", vtep=ip_address(VTEPS[host]))
    return (records.host(host), made), sign(host)


def sign(host):
    """Return a host's sign of life."""
    return records.alive(host), Alive(instance="i", boot="b")


def dead(host):
    """Return the news that a host is dead."""
    return records.alive(host), None


@asynccontextmanager
async def one_host(directory):
    """Build a host on a shared store, on which nobody else is."""
    async with AsyncExitStack() as stack:
        store = SqliteStore(directory / "store.db")
        await store.open()
        stack.push_async_callback(store.close)
        host = Host(id="", name="h1", version="0", vtep=ip_address("192.0.2.1"))
        path = directory / "h1.db"
        made = await on_store(stack, Shared(store, 0.0), path, host, kernel=Watched())
        await announce(made)
        yield made


@pytest.fixture
async def here(directory):
    """Build a host with a network and no container; two more hosts live."""
    async with one_host(directory) as made:
        found = Here(made, Docker(made))
        found.remotes.alarm = lambda: found.alarms.append(1)
        await found.docker.create(NET, POOL, POOL6)
        await found.learn(*alive(FAR), *alive(FURTHER))
        yield found


@pytest.fixture
async def carrying(here):
    """Give that host a container."""
    await here.docker.start("box", NET, ip="10.1.99.9")
    here.keys("apply")
    here.keys("clear")
    return here


# What is written.


@pytest.mark.parametrize("cidrs", [(POOL,), (POOL6,), (POOL, POOL6)])
async def test_an_endpoint_elsewhere(directory, cidrs):
    """A host knows where another one's endpoint is, by each family it has."""
    async with cluster(directory, 2) as rigs:
        one, two = map(Docker, rigs)
        await one.create("1" * 64, *cidrs)
        await level(*rigs)
        await two.create("2" * 64, *cidrs)
        await one.start("near", "1" * 64)
        box = await two.start("far", "2" * 64)
        await level(*rigs)
        (network,) = rigs[0].state.view.all(Network, "networks/")
        key = records.endpoint(network.id, "far")
        mac = rigs[0].state.view.get(Endpoint, key).mac
        tunnel = {"where": "pynet", "device": devices.vxlan(network.id)}
        bridge = {"where": "pynet", "device": devices.bridge(network.id)}
        found = [o for o in rigs[0].kernel.ops.values() if getattr(o, "mac", "") == mac]
        assert found == [
            Fdb(**tunnel, mac=mac, dst=ip_address("192.0.2.2")),
            Fdb(**tunnel, mac=mac),
            *(Neighbour(**bridge, address=a.ip, mac=mac) for a in box.addresses),
        ]
        await two.stop("far")
        await level(*rigs)
        left = [o for o in rigs[0].kernel.ops.values() if getattr(o, "mac", "") == mac]
        assert left == []


async def test_what_was_seen_is_not_written_again(carrying):
    """At the first update the kernel is told only what it was not seen to have."""
    first, second = carrying.endpoint(1), carrying.endpoint(2)
    carrying.remotes.begun = False
    carrying.remotes.seen(tuple(carrying.of(first)))
    await carrying.learn(first, second)
    written = {op for verb, op in carrying.kernel.asked if verb == "apply"}
    assert written >= carrying.of(second)
    assert not written & carrying.of(first)
    carrying.kernel.asked.clear()
    carrying.remotes.seen(())
    await carrying.learn(carrying.gone(1))
    cleared = {op for verb, op in carrying.kernel.asked if verb == "clear"}
    assert cleared == carrying.of(first)


async def test_nothing_without_an_endpoint_here(here):
    """A host without an endpoint on a network does no work for it, and writes nothing."""
    before, steps = here.kernel.asked.copy(), here.rig.steps.copy()
    await here.learn(here.member(), here.endpoint(2), here.endpoint(3, FURTHER))
    await here.learn(here.gone(3, FURTHER), here.endpoint(2, sandbox=""))
    assert (here.entries(), here.remembered()) == (set(), [])
    assert (here.kernel.asked, here.rig.steps) == (before, steps)
    assert not here.remotes.ahead.is_set()


async def test_the_first_and_the_last_endpoint_here(here):
    """The first endpoint here brings all entries, the last one's end takes all away."""
    far = here.endpoint(2), here.endpoint(3, FURTHER)
    await here.learn(*far)
    await here.docker.start("one", NET)
    assert here.entries() == here.of(*far)
    await here.docker.start("two", NET)
    await here.docker.stop("one")
    assert here.entries() == here.of(*far)
    await here.docker.stop("two")
    assert (here.entries(), here.remembered(), here.remotes.local) == (set(), [], {})


async def test_entries_are_there_before_the_container(here):
    """When the kernel makes the container's device it knows the others already."""
    await here.learn(here.endpoint(2))
    await here.docker.create_box("box", NET)
    here.hear(here.endpoint(3))
    await here.rig.networks.join(NET, "box", "/s")
    kinds = [type(op).__name__ for verb, op in here.kernel.asked if verb == "apply"]
    first = kinds.index("Fdb")
    port = ["Element"] * 7 + ["Veth", "Fdb"]
    assert kinds[first:] == ["Fdb", "Fdb", "Neighbour", "Neighbour"] * 2 + port


async def test_a_plan_is_made_once(carrying):
    """What a record calls for is made anew only when something that matters changes."""
    site = carrying.rig.site
    await carrying.learn(carrying.endpoint(2), carrying.endpoint(3))
    key, record = carrying.endpoint(2)
    plan = site.source_plan(key)
    assert plan == tuple(op for op in plan if op in carrying.of((key, record)))
    assert site.source_plan(key) is plan
    carrying.hear(carrying.endpoint(2, mac="02:42:00:00:00:09"))
    assert site.source_plan(key) != plan
    carrying.hear(carrying.endpoint(2))
    assert site.source_plan(key) == plan
    site.host = replace(site.host, namespace="elsewhere")
    assert {op.where for op in site.source_plan(key)} == {"elsewhere"}
    carrying.hear(carrying.gone(2))
    assert site.source_plan(key) == ()
    site.let_go()
    assert set(site.sourced) <= {carrying.endpoint(3)[0], carrying.member()[0]}


async def test_a_second_endpoint_here_costs_nothing(carrying):
    """Only the first endpoint here asks for what all others are."""
    await carrying.learn(*(carrying.endpoint(n) for n in range(2, 12)))
    counted = counting(carrying)
    await carrying.docker.create_box("more", NET)
    assert counted.calls == 1


async def test_an_endpoint_of_our_own_is_no_entry(carrying):
    """What this host writes of its own endpoints changes nothing in its tunnels."""
    await carrying.docker.start("more", NET)
    assert carrying.entries() == set()
    assert not carrying.remotes.ahead.is_set()


async def test_the_same_again_is_no_work(carrying):
    """A record that is written again, and says the same of the way, costs no work."""
    await carrying.learn(carrying.endpoint(2))
    carrying.keys("apply")
    await carrying.learn(carrying.endpoint(2, sandbox="/other"))
    assert carrying.kernel.asked == []


async def test_the_network_comes_last(here):
    """Records count in whichever order they are heard: the network's may be last."""
    far, key = here.endpoint(2), records.network(here.network)
    network = here.rig.state.view.get(Network, key)
    await here.docker.start("box", NET)
    await here.learn((key, replace(network, vni=0)), far)
    assert here.entries() == set()
    await here.learn((key, network))
    assert here.entries() == here.of(far)


async def test_a_network_that_is_left(carrying):
    """When this host leaves a network nothing of it is remembered."""
    await carrying.learn(carrying.member(), carrying.endpoint(2))
    network = carrying.network
    await carrying.docker.stop("box")
    await carrying.docker.remove(NET)
    remotes = carrying.remotes
    assert (remotes.plans, remotes.holders, remotes.held, remotes.local) == (
        {}, {}, {}, {},
    )  # fmt: skip
    assert carrying.kernel.left == []
    await carrying.learn(stray(network))
    assert carrying.remotes.plans == {}


def stray(network):
    """Return an endpoint on a network that this host is not on."""
    made = Endpoint(
        network=network, id="x", host=FAR, boot="b", mac="02:42:00:00:00:09"
    )
    return records.endpoint(network, made.id), made


async def test_a_network_left_with_a_container_on_it(carrying):
    """`network rm` by force takes containers and entries with it."""
    await carrying.learn(carrying.endpoint(2))
    await carrying.rig.networks.delete(NET)
    assert carrying.remembered() == []
    assert not [op for op in carrying.kernel.left if isinstance(op, Fdb | Neighbour)]


# Hosts themselves.


async def test_the_ends_of_others_tunnels(carrying):
    """Tunnels of all hosts there are, alive or not, are let in, until a host is gone."""
    both = {VTEPS[FAR], VTEPS[FURTHER]}
    assert carrying.vteps() == both
    await carrying.learn(dead(FAR))
    assert carrying.vteps() == both
    await carrying.learn((records.host(FAR), None))
    assert carrying.vteps() == {VTEPS[FURTHER]}
    await carrying.learn(*alive(FAR))
    assert carrying.vteps() == both


async def test_an_end_that_two_hosts_have(carrying):
    """The end of a machine that came back as another host stays without the first."""
    (key, host), _ = alive(FAR)
    other = replace(host, id="far2" * 4)
    await carrying.learn((records.host(other.id), other))
    await carrying.learn((key, None))
    assert carrying.vteps() == {VTEPS[FAR], VTEPS[FURTHER]}
    await carrying.learn((records.host(other.id), None))
    assert carrying.vteps() == {VTEPS[FURTHER]}
    await carrying.learn((key, host), (records.host(other.id), other))
    await carrying.learn((records.host(other.id), None))
    assert carrying.vteps() == {VTEPS[FAR], VTEPS[FURTHER]}


async def test_no_tunnels_no_ends(directory):
    """A host lets tunnels in from its first overlay on, and after its last no more."""
    async with one_host(directory) as made:
        here = Here(made, Docker(made))
        await here.learn(*alive(FAR))
        assert here.vteps() == set()
        await here.docker.create(NET, POOL)
        assert here.vteps() == {VTEPS[FAR]}
        await here.learn(*alive(FURTHER))
        assert here.vteps() == {VTEPS[FAR], VTEPS[FURTHER]}
        await here.docker.remove(NET)
        assert (here.vteps(), here.remotes.held) == (set(), {})


async def test_a_bridge_lets_no_tunnel_in(directory):
    """A network of one host needs to know of no other."""
    async with one_host(directory) as made:
        here = Here(made, Docker(made))
        await here.docker.create(NET, POOL, options={"pynet.mode": "bridge"})
        await here.learn(*alive(FAR))
        assert (here.vteps(), here.remotes.plans) == (set(), {})


async def test_hosts_before_the_table(here):
    """News of a host may come before the network's own plan, which makes the table."""
    here.kernel.ops.clear()
    (key, host), _ = alive(FAR)
    await here.learn((key, replace(host, vtep=ip_address("192.0.2.77"))))
    assert (here.vteps(), here.alarms) == ({"192.0.2.77"}, [])


async def test_an_end_that_was_refused(carrying):
    """An end the kernel refused is an alarm, and is let in when it is tried again."""
    (key, host), _ = alive(FAR)
    way = firewall.vtep(ip_address("192.0.2.77"))
    carrying.kernel.refuse = {way.key}
    await carrying.learn((key, replace(host, vtep=ip_address("192.0.2.77"))))
    assert (carrying.vteps(), carrying.alarms) == ({VTEPS[FURTHER]}, [1])
    carrying.kernel.refuse.clear()
    await carrying.remotes.update(again=True)
    assert carrying.vteps() == {"192.0.2.77", VTEPS[FURTHER]}


async def test_ends_are_part_of_what_should_be(carrying):
    """Audits know the ends, once, and a network's plan has them before its device."""
    site = carrying.rig.site
    known = [firewall.vtep(ip_address(VTEPS[host])) for host in (FAR, FURTHER)]
    (member,) = site.members()
    plan = site.network_plan(member)
    places = [plan.index(op) for op in (firewall.table(), *known)]
    assert places == list(range(places[0], places[0] + 3))
    (tunnel,) = [n for n, op in enumerate(plan) if isinstance(op, Vxlan)]
    assert places[-1] < tunnel
    desired = site.desired()
    assert [desired.count(op) for op in known] == [1, 1]
    assert site.unwanted(plan) == ()
    own = replace(site.host, vtep=None)
    site.host = own
    assert site.vtep_plan() == ()


async def test_a_host_with_an_address_of_its_own(carrying):
    """A host that takes part itself is known like an endpoint, as long as it does."""
    own = carrying.member(ipv4=ip_interface("10.1.7.7/16"))
    await carrying.learn(own)
    mac = devices.mac(ip_address("10.1.7.7"))
    assert {op.mac for op in carrying.entries()} == {mac}
    assert len(carrying.entries()) == 3
    await carrying.learn(carrying.member())
    assert carrying.entries() == set()


async def test_a_host_that_takes_part_itself_carries(directory):
    """A host with an address of its own needs no container to know the others."""
    async with one_host(directory) as made:
        here = Here(made, Docker(made))
        await here.docker.create(NET, POOL, options={"pynet.host_access": "true"})
        far = here.endpoint(2, ipv6=None)
        await here.learn(*alive(FAR), far)
        assert here.entries() >= here.of(far)
        await here.docker.start("box", NET)
        await here.docker.stop("box")
        assert here.entries() >= here.of(far)


async def test_flooding_goes_to_each_member(directory):
    """With flood each host that is on the network has an entry, until it leaves."""
    async with one_host(directory) as made:
        here = Here(made, Docker(made))
        await here.docker.create(NET, POOL, options={"pynet.flood": "true"})
        await here.docker.start("box", NET)
        await here.learn(*alive(FAR), *alive(FURTHER))
        await here.learn(here.member(), here.member(FURTHER))
        to = {op.dst for op in here.entries() if op.mac == FLOOD}
        assert {str(dst) for dst in to} == {*VTEPS.values()}
        await here.learn((here.member()[0], None))
        (left,) = [op for op in here.entries() if op.mac == FLOOD]
        assert str(left.dst) == VTEPS[FURTHER]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait only a little before a host is hidden."""
    monkeypatch.setattr(module, "GRACE", 0.1)


async def dies(carrying):
    """Let a host's lease run out, and wait until the others hide it."""
    await carrying.learn(dead(FAR))
    await asyncio.sleep(module.GRACE + 0.02)
    await carrying.learn()


async def test_a_host_that_is_back_at_once(carrying):
    """A host whose lease was lost for a moment is not hidden: nothing is touched."""
    await carrying.learn(carrying.endpoint(2))
    carrying.keys("apply")
    await carrying.learn(dead(FAR))
    assert carrying.entries() == carrying.of(carrying.endpoint(2))
    await carrying.learn(sign(FAR))
    await asyncio.sleep(module.GRACE + 0.02)
    await carrying.learn()
    assert carrying.entries() == carrying.of(carrying.endpoint(2))
    assert (carrying.keys("apply"), carrying.keys("clear")) == (set(), set())


async def test_a_host_that_dies_is_hidden_and_back(carrying):
    """A dead host's entries go, all others stay; when it lives again they are back."""
    gone = carrying.endpoint(2), carrying.endpoint(3)
    stays = carrying.endpoint(4, FURTHER)
    await carrying.learn(*gone, stays)
    await dies(carrying)
    assert carrying.entries() == carrying.of(stays)
    await carrying.learn(carrying.endpoint(5))
    assert carrying.entries() == carrying.of(stays)
    await carrying.learn(sign(FAR))
    assert carrying.entries() == carrying.of(*gone, stays, carrying.endpoint(5))


async def test_a_death_costs_only_the_dead(carrying):
    """When a host dies or comes back nobody else's records are looked at."""
    await carrying.learn(*(carrying.endpoint(n, FURTHER) for n in range(2, 300)))
    await carrying.learn(carrying.endpoint(300))
    counted = counting(carrying)
    await dies(carrying)
    await carrying.learn(sign(FAR))
    assert counted.calls == 2


async def test_a_host_that_is_heard_of_twice(carrying):
    """Record and sign of life in one batch, in either order, make a host known."""
    await carrying.learn(dead(FAR), (records.host(FAR), None), carrying.endpoint(2))
    assert carrying.entries() == set()
    await carrying.learn(*reversed(alive(FAR)))
    assert carrying.entries() == carrying.of(carrying.endpoint(2))


async def test_tunnels_that_move(carrying):
    """When a host's tunnels have another address its entries change in place."""
    far = carrying.endpoint(2)
    await carrying.learn(far)
    carrying.keys("apply")
    (key, host), _ = alive(FAR)
    await carrying.learn((key, replace(host, vtep=ip_address("192.0.2.77"))))
    (entry,) = [op for op in carrying.entries() if getattr(op, "dst", None)]
    assert str(entry.dst) == "192.0.2.77"
    ways = {
        address: ("element", "host", "inet", "pynet", "vteps4", address)
        for address in ("192.0.2.77", VTEPS[FAR])
    }
    table = firewall.table().key
    assert carrying.keys("apply") == {entry.key, table, ways["192.0.2.77"]}
    assert carrying.keys("clear") == {ways[VTEPS[FAR]]}


async def test_tunnels_of_another_family(carrying):
    """A host whose tunnels are of another family than ours cannot be reached."""
    await carrying.learn(carrying.endpoint(2))
    (key, host), _ = alive(FAR)
    await carrying.learn((key, replace(host, vtep=ip_address("2001:db8::7"))))
    assert carrying.entries() == set()


# What moves.


async def moved(here, *batches):
    """Let an address move to another host by these news; return what was cleared."""
    await here.learn(here.endpoint(2))
    here.keys("apply")
    here.keys("clear")
    for batch in batches:
        await here.learn(*batch)
    assert here.entries() == here.of(here.endpoint(2, FURTHER))
    return here.keys("clear")


async def test_moved_in_one_batch(carrying):
    """Of a record that moves only where it is changes; nothing is ever removed."""
    old, new = carrying.gone(2), carrying.endpoint(2, FURTHER)
    assert await moved(carrying, (old, new)) == set()
    (changed,) = carrying.keys("apply")
    assert changed[0] == "fdb"


async def test_moved_in_one_batch_heard_backwards(carrying):
    """In one batch it does not matter which half of a move is heard first."""
    old, new = carrying.gone(2), carrying.endpoint(2, FURTHER)
    assert await moved(carrying, (new, old)) == set()


async def test_moved_in_two_batches_heard_backwards(carrying):
    """The old record's late end takes nothing from the new one."""
    old, new = carrying.gone(2), carrying.endpoint(2, FURTHER)
    assert await moved(carrying, (new,), (old,)) == set()


async def test_moved_in_two_batches(carrying):
    """A move that is heard in two steps is an end and a beginning."""
    old, new = carrying.gone(2), carrying.endpoint(2, FURTHER)
    assert len(await moved(carrying, (old,), (new,))) == 4


async def test_two_claims_in_one_batch(carrying):
    """Of two records with one address the later in the store has it."""
    first, second = carrying.endpoint(2, FURTHER), carrying.endpoint(2)
    await carrying.learn(first, second)
    assert carrying.entries() == carrying.of(second)
    third = carrying.endpoint(2, FURTHER, sandbox="/later")
    await carrying.learn(dead(FAR), dead(FURTHER))
    await carrying.learn(third, sign(FURTHER), sign(FAR))
    assert carrying.entries() == carrying.of(third)


async def test_moved_here(carrying):
    """An address that moves to this host is no entry of a tunnel any more."""
    far = carrying.endpoint(2)
    await carrying.learn(far)
    await carrying.learn(carrying.gone(2))
    await carrying.docker.start("box2", NET, ip="10.1.128.2")
    assert carrying.entries() == set()
    await carrying.docker.stop("box2")
    await carrying.learn(far)
    assert carrying.entries() == carrying.of(far)


# What the kernel refuses.


def tunnel_key(here, number):
    """Return the key of an endpoint's entry in the tunnel."""
    mac = here.endpoint(number)[1].mac
    return Fdb(where="pynet", device=devices.vxlan(here.network), mac=mac).key


async def test_a_kernel_that_refuses(carrying):
    """What the kernel refuses is an alarm, and keeps no later news from it."""
    carrying.kernel.refuse = {tunnel_key(carrying, 2)}
    await carrying.learn(carrying.endpoint(2))
    assert (carrying.entries(), carrying.alarms) == (set(), [1])
    assert not carrying.remotes.ahead.is_set()
    await carrying.learn(carrying.endpoint(3))
    assert carrying.entries() == carrying.of(carrying.endpoint(3))
    assert carrying.alarms == [1]


async def test_refused_and_tried_again(carrying):
    """What was refused is written when it is tried again, and then it is told."""
    carrying.kernel.refuse = {tunnel_key(carrying, 2)}
    await carrying.learn(carrying.endpoint(2))
    carrying.hear(carrying.endpoint(3))
    await carrying.remotes.update(again=True)
    assert carrying.entries() == carrying.of(carrying.endpoint(3))
    carrying.kernel.refuse.clear()
    await carrying.remotes.update(again=True)
    both = carrying.endpoint(2), carrying.endpoint(3)
    assert carrying.entries() == carrying.of(*both)
    assert carrying.remotes.amiss == set()
    assert carrying.remotes.worked == carrying.rig.state.view.revision


async def test_a_refusal_is_tried_again_by_the_loop(carrying, monkeypatch):
    """The loop itself tries again what was refused, without news."""
    monkeypatch.setattr(module, "AGAIN", 0.01)
    carrying.kernel.refuse = {tunnel_key(carrying, 2)}
    async with running(carrying):
        carrying.hear(carrying.endpoint(2))
        carrying.remotes.wake()
        await until(lambda: len(carrying.alarms) > 1)
        carrying.kernel.refuse.clear()
        await until(lambda: carrying.entries() == carrying.of(carrying.endpoint(2)))


async def test_refused_and_back_as_it_was(carrying):
    """After a refused change the entry is written anew, even as it was before."""
    here, network = carrying.endpoint(2), devices.vxlan(carrying.network)
    await carrying.learn(here)
    (key, host), _ = alive(FAR)
    carrying.kernel.refuse = {tunnel_key(carrying, 3)}
    elsewhere = replace(host, vtep=ip_address("192.0.2.77"))
    await carrying.learn((key, elsewhere), carrying.endpoint(3))
    assert carrying.alarms == [1]
    carrying.kernel.refuse.clear()
    carrying.keys("apply")
    await carrying.learn((key, host))
    wanted = ("fdb", "pynet", network, here[1].mac, "self")
    assert wanted in carrying.keys("apply")
    assert carrying.entries() == carrying.of(here, carrying.endpoint(3))


async def test_an_endpoint_whose_others_are_refused(here):
    """Docker is told if the kernel does not take the others, and no endpoint stays."""
    await here.learn(here.endpoint(2))
    here.kernel.refuse = {tunnel_key(here, 2)}
    with pytest.raises(KernelError, match="refused by the test"):
        await here.docker.start("box", NET)
    assert here.rig.site.endpoints(here.network) == []
    assert (here.entries(), here.remembered()) == (set(), [])
    here.kernel.refuse.clear()
    await here.docker.start("box", NET)
    assert here.entries() == here.of(here.endpoint(2))


async def test_refused_before_the_call_looks(here):
    """What the loop could not write a call tries again, and tells."""
    await here.learn(here.endpoint(2))
    here.kernel.refuse = {tunnel_key(here, 2)}
    carry = here.remotes.carry

    async def late(network):
        await here.remotes.update()
        await carry(network)

    here.remotes.carry = late
    with pytest.raises(KernelError):
        await here.docker.start("box", NET)


async def test_a_kernel_that_does_not_let_go(carrying):
    """What cannot be removed is an alarm, and the rest of the news is written."""
    await carrying.learn(carrying.endpoint(2))
    carrying.kernel.stuck = True
    await carrying.learn(carrying.gone(2), carrying.endpoint(3))
    assert carrying.alarms == [1]
    assert carrying.entries() >= carrying.of(carrying.endpoint(3))


async def test_a_call_that_is_cancelled(carrying):
    """News that a cancelled call took with it is not lost: the audit is asked."""
    carrying.kernel.open.clear()
    carrying.hear(carrying.endpoint(2))
    call = asyncio.create_task(carrying.remotes.carry(carrying.network))
    await until(lambda: carrying.kernel.asked)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    assert carrying.alarms == [1]
    carrying.kernel.open.set()
    await carrying.remotes.update(again=True)
    assert carrying.entries() == carrying.of(carrying.endpoint(2))


# What it costs.


class Counting(Site):
    """A site that counts how many records' plans were asked for."""

    calls = 0

    def source_plan(self, key):
        """Count, and answer."""
        self.calls += 1
        return super().source_plan(key)


def counting(here):
    """Let the host count."""
    site = here.rig.site
    fields = {name: getattr(site, name) for name in ("host", "boot", "state")}
    here.remotes.site = Counting(dataplane=site.dataplane, **fields)
    return here.remotes.site


@pytest.mark.parametrize("others", [5, 5_000])
async def test_one_more_costs_the_same(carrying, others):
    """However many endpoints there are, one more or one less costs one plan."""
    await carrying.learn(*(carrying.endpoint(n) for n in range(2, others + 2)))
    counted = counting(carrying)
    carrying.keys("apply")
    for number in (20_000, 20_001):
        counted.calls = 0
        await carrying.learn(carrying.endpoint(number))
        assert counted.calls == 1
    assert len(carrying.keys("apply")) == 8
    await carrying.learn(carrying.gone(20_000))
    assert counted.calls == 2
    assert len(carrying.keys("clear")) == 4
    await carrying.learn(carrying.endpoint(20_001, sandbox="/s2"))
    assert carrying.kernel.asked == []


async def test_others_get_their_turn(carrying):
    """While thousands of records are read nobody waits for long."""
    carrying.hear(*(carrying.endpoint(n) for n in range(2, 2_002)))
    turns = 0
    work = asyncio.create_task(carrying.remotes.update())
    while not work.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 2_000 / module.BREATH
    assert len(carrying.entries()) == 8_000


# What the others are told.


def told(here):
    """Return what this host has written of how far it is."""
    key = records.watermark(here.rig.site.host.id)
    mark = here.rig.state.view.get(Watermark, key)
    return mark.revision if mark else 0


@asynccontextmanager
async def running(here):
    """Run the loop."""
    task = asyncio.create_task(here.remotes.run())
    try:
        yield
    finally:
        await ended(task)


async def until(true):
    """Wait until something is so."""
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


async def test_the_loop_follows_and_tells(carrying):
    """Woken, the loop writes what is new and tells the store's revision of it."""
    async with running(carrying):
        carrying.hear(carrying.endpoint(2))
        carrying.remotes.wake()
        await until(lambda: told(carrying) == carrying.revision)
    assert carrying.entries() == carrying.of(carrying.endpoint(2))


async def test_a_call_tells_too(here):
    """What a call of Docker brought into the kernel is told without any news."""
    await here.learn(here.endpoint(2))
    async with running(here):
        await here.docker.start("box", NET)
        await until(lambda: told(here) >= here.revision)


async def test_told_at_most_once_in_a_while(carrying, monkeypatch):
    """However much news there is, the store is told at a pace, and the last of it."""
    monkeypatch.setattr(module, "PACE", 0.2)
    before, begin = (
        carrying.rig.steps.count("commit.after"),
        asyncio.get_event_loop().time(),
    )
    async with running(carrying):
        for number in range(2, 52):
            carrying.hear(carrying.endpoint(number))
            carrying.remotes.wake()
            await asyncio.sleep(0.01)
        assert len(carrying.entries()) >= 4 * 49
        await until(lambda: told(carrying) == carrying.revision)
        taken = asyncio.get_event_loop().time() - begin
    written = carrying.rig.steps.count("commit.after") - before
    assert 2 <= written <= 1 + taken / 0.2


async def test_the_pace_is_a_second():
    """The store hears of a host's kernel once a second at most."""
    assert module.PACE == 1.0


async def test_nothing_to_tell(here, monkeypatch):
    """A host that carries nothing writes nothing, whatever others do."""
    monkeypatch.setattr(module, "PACE", 0.01)
    before = here.rig.steps.count("commit.after")
    async with running(here):
        for number in range(2, 12):
            here.hear(here.endpoint(number))
            here.remotes.wake()
            await asyncio.sleep(0.01)
    assert (here.rig.steps.count("commit.after"), told(here)) == (before, 0)


async def test_a_store_that_is_away(carrying, monkeypatch):
    """What could not be told is told when the store is back."""
    monkeypatch.setattr(module, "PACE", 0.01)
    commit, tries = carrying.rig.state.store.commit, []

    async def away(change, lease=None):
        tries.append(change)
        raise StoreError("the store is away")

    carrying.rig.state.store.commit = away
    async with running(carrying):
        carrying.hear(carrying.endpoint(2))
        carrying.remotes.wake()
        await until(lambda: len(tries) > 2)
        assert told(carrying) == 0
        carrying.rig.state.store.commit = commit
        await until(lambda: told(carrying) == carrying.revision)


async def test_what_was_refused_is_not_told(carrying):
    """The store is not told of a revision whose entries the kernel refused."""
    await carrying.learn(carrying.endpoint(3))
    before = carrying.remotes.worked
    carrying.kernel.refuse = {tunnel_key(carrying, 2)}
    await carrying.learn(carrying.endpoint(2))
    assert carrying.remotes.worked == before
