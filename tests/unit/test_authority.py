"""Authority: what this host has is published again, in order, and nothing of others."""

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface, ip_address, ip_network

import pytest
import structlog

from cnmdriver.driver import authority as module
from cnmdriver.driver.authority import Authority
from cnmdriver.model import Block, Endpoint, Host, Member, Network, Pool, Reservation
from cnmdriver.plan import devices
from cnmdriver.store import records
from cnmdriver.store.base import Change
from cnmdriver.store.etcd.store import EtcdStore, divide
from cnmdriver.store.sqlite import SqliteStore
from tests.fakes import Rig, Shared, announce, on_store
from tests.store import etcd_server
from tests.unit.calls import Docker

POOL = "10.1.0.0/16"
CIDR = ip_network(POOL)
MANY = 300
FAR = "far0" * 4
OF_ITS_OWN = ("alive/", "hosts/", "cluster", "spaces/")


class Noted(Shared):
    """A way to a store that notes what is written, and can do something before."""

    def __init__(self, store):
        """Have noted nothing."""
        super().__init__(store, 0.0)
        self.changes: list[Change] = []
        self.before = []
        """What happens before the next commits, one each."""

    async def commit(self, change, lease=None):
        """Note what is written; as strict as etcd."""
        if self.before:
            await self.before.pop(0)()
        divide(change)
        revision = await super().commit(change, lease)
        self.changes.append(change)
        return revision

    @property
    def order(self):
        """Return the kinds of what was written, as they came."""
        puts = [sorted({k.split("/")[0] for k in c.puts}) for c in self.changes]
        return [kinds for kinds in puts if kinds]


@dataclass
class Site:
    """A host on a store that can be exchanged for an empty one."""

    rig: Rig
    docker: Docker
    published: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.authority = Authority(self.rig.site, self.publish)

    async def publish(self):
        """Publish the host itself."""
        self.published.append(self.id)
        await announce(self.rig)
        return True

    @property
    def id(self):
        """Return the host's id."""
        return self.rig.site.host.id

    @property
    def view(self):
        """Return what it knows."""
        return self.rig.site.view

    @property
    def network(self):
        """Return the one network."""
        (found,) = self.view.all(Network, "networks/")
        return found

    async def move(self, store):
        """Find another content in the store."""
        self.rig.state.store = store
        self.rig.state.rewound = True
        await self.rig.state.relist()

    async def write(self, puts):
        """Have records as if its calls had written them."""
        keys = list(puts)
        for at in range(0, len(keys), 60):
            some = keys[at : at + 60]
            await self.rig.state.commit(
                lambda draft, some=some: [draft.put(k, puts[k]) for k in some]
            )

    def endpoints(self, count, first=1000):
        """Return records of so many endpoints, each with its address."""
        puts = {}
        for number in range(first, first + count):
            ip, name = CIDR[number], f"e{number}" * 8
            puts[records.address("local", CIDR, ip)] = self.held(ip, endpoint=name)
            puts[records.endpoint(self.network.id, name)] = Endpoint(
                network=self.network.id,
                id=name,
                host=self.id,
                boot="boot1",
                mac=devices.mac(ip),
                ipv4=IPv4Interface((ip, 16)),
            )
        return puts

    def held(self, ip, **fields):
        """Return an address that it has."""
        return Reservation(
            space="local", cidr=CIDR, ip=ip, host=self.id, bound=True, **fields
        )


async def host(stack, store, path, name):
    """Build a host on a store, with Docker's side of it."""
    number = int(name[1:])
    vtep = ip_address(f"192.0.2.{number}")
    described = Host(id="", name=name, version="test", vtep=vtep)
    rig = await on_store(stack, store, path / f"{name}.db", described)
    await announce(rig)
    return Site(rig, Docker(rig))


@asynccontextmanager
async def hosts(path, count=1):
    """Build hosts on one store; return them, and what makes an empty store."""
    async with AsyncExitStack() as stack:

        async def store():
            made = SqliteStore(path / f"store{len(list(path.iterdir()))}" / "store.db")
            await made.open()
            stack.push_async_callback(made.close)
            return made

        first = await store()
        names = [f"h{number}" for number in range(1, count + 1)]
        yield [await host(stack, Noted(first), path, n) for n in names], store


async def wiped(store, *sites):
    """Exchange the store of all hosts for an empty one; return its content's reader."""
    empty = await store()
    for site in sites:
        await site.move(Noted(empty))
    return empty


async def content(store):
    """Return the records in a store, but for what hosts say of themselves."""
    items = (await store.read("")).items
    return {
        key: records.decode(key, item.value)
        for key, item in items.items()
        if not key.startswith(OF_ITS_OWN)
    }


async def joined(*sites, name="blue", cidr=POOL):
    """Create a network on hosts."""
    for number, site in enumerate(sites):
        await site.rig.state.relist()
        await site.docker.create(f"{name}{number}" * 8, cidr)
    for site in sites:
        await site.rig.state.relist()


async def test_nothing_is_missing(tmp_path):
    """Where the store lacks nothing, nothing is written."""
    async with hosts(tmp_path) as ((one,), _):
        await joined(one)
        one.rig.state.store.changes.clear()
        await one.authority.turn()
        assert one.rig.state.store.changes == []
        assert one.published == []


@pytest.mark.timeout(120)
async def test_all_is_published_again_in_order(tmp_path):
    """
    What a wiped store lacks comes back: the host, networks, addresses, endpoints last.

    Result: with 300 endpoints and as many addresses without one, no transaction is more
    than etcd takes; all that was there is there again, and nothing is missing.
    """
    async with hosts(tmp_path) as ((one,), store):
        await joined(one)
        ips = [CIDR[n] for n in range(2000, 2000 + MANY)]
        loose = {records.address("local", CIDR, ip): one.held(ip) for ip in ips}
        spans = [ip_network(f"10.1.{n}.0/24") for n in range(100, 240)]
        blocks = {records.block("local", CIDR, s): Block(host=one.id) for s in spans}
        await one.write({**one.endpoints(MANY), **loose, **blocks})
        before = await content(one.rig.state.store.store)
        empty = await wiped(store, one)
        assert len(one.view.missing) >= 3 * MANY
        with structlog.testing.capture_logs() as logs:
            await one.authority.turn()
        assert await content(empty) == before
        assert not one.view.missing
        assert one.published == [one.id]
        assert [entry["event"] for entry in logs].count("authority.published") == 1
        # The cluster and the host; then the network; its pools' content; endpoints.
        order = one.rig.state.store.order
        kinds = [kind for kind in order if {"addresses", "blocks"} & set(kind)]
        first = next(at for at, kind in enumerate(order) if "networks" in kind)
        assert {"members", "pools", "vnis"} <= set(order[first])
        assert all("endpoints" not in kind for kind in order[: first + 1])
        lasts = [at for at, kind in enumerate(order) if "endpoints" in kind]
        assert lasts == list(range(lasts[0], len(order)))
        assert len(kinds) > 5
        changes = one.rig.state.store.changes
        assert max(len(c.puts) for c in changes) <= 128
        # Who looks meanwhile finds no address of an endpoint without the endpoint.
        for change in changes:
            told = [r for r in change.puts if r.startswith("endpoints/")]
            held = [decoded(change, k) for k in change.puts if k.startswith("addr")]
            assert {r.endpoint for r in held if r.endpoint} == {
                k.split("/")[-1] for k in told
            }


def decoded(change, key):
    """Read what a transaction writes."""
    return records.decode(key, change.puts[key])


async def test_it_goes_on_where_it_was_broken_off(tmp_path):
    """A store that goes away between two transactions gets the rest at the next turn."""
    async with hosts(tmp_path) as ((one,), store):
        await joined(one)
        ips = [CIDR[n] for n in range(2000, 2200)]
        loose = {records.address("local", CIDR, ip): one.held(ip) for ip in ips}
        await one.write({**one.endpoints(20), **loose})
        before = await content(one.rig.state.store.store)
        for broken in range(1, 8):
            empty = await wiped(store, one)
            door = one.rig.state.store

            async def fail():
                raise module.DriverError("the store is away")

            async def nothing():
                pass

            door.before = [*[nothing] * broken, fail]
            with pytest.raises(module.DriverError):
                await one.authority.turn()
            assert await content(empty) != before
            await one.authority.turn()
            assert await content(empty) == before
            assert not one.view.missing


async def test_nothing_of_others(tmp_path):
    """Of another host nothing is published, and after a while it is forgotten."""
    async with hosts(tmp_path, 2) as ((one, two), store):
        await joined(one, two)
        await one.write(one.endpoints(3))
        await two.write(two.endpoints(3, first=3000))
        await one.rig.state.relist()
        empty = await wiped(store, one)
        await one.authority.turn()
        found = await content(empty)
        theirs = [key for key, r in found.items() if getattr(r, "host", "") == two.id]
        assert theirs == []
        assert len([key for key in found if key.startswith("endpoints/")]) == 3
        # It is still known here: the other may publish it yet.
        left = {k for k in one.view.missing if not k.startswith(OF_ITS_OWN)}
        assert {k.split("/")[0] for k in left} >= {"endpoints", "members"}
        one.authority.gone.grace = 0.0
        await one.authority.turn()
        assert not one.view.missing
        assert one.view.get(Member, records.member(one.network.id, two.id)) is None


@pytest.mark.timeout(60)
async def test_two_hosts_at_once(tmp_path):
    """
    Of hosts that publish one network at once none loses anything, at whichever step.

    1. The store is wiped under two hosts; before the n-th transaction of the one the
       other publishes all it has.
    Result: each time all is there that was, once.
    """
    async with hosts(tmp_path, 2) as ((one, two), store):
        await joined(one, two)
        ips = [CIDR[n] for n in range(2000, 2100)]
        loose = {records.address("local", CIDR, ip): one.held(ip) for ip in ips}
        await one.write({**one.endpoints(20), **loose})
        await two.write(two.endpoints(20, first=3000))
        for site in (one, two):
            await site.rig.state.relist()
        before = await content(one.rig.state.store.store)
        assert {r.host for r in before.values() if isinstance(r, Block)} == {
            one.id,
            two.id,
        }
        for step in range(8):
            empty = await wiped(store, one, two)

            async def nothing():
                pass

            async def meanwhile():
                await two.authority.turn()

            one.rig.state.store.before = [*[nothing] * step, meanwhile]
            await one.authority.turn()
            for site in (two, one, two):
                await site.rig.state.relist()
                await site.authority.turn()
            assert await content(empty) == before, step
            assert not one.view.missing
            assert not two.view.missing
            assert not one.authority.conflicts
            assert not two.authority.conflicts


async def test_what_is_anothers_by_now(tmp_path):
    """
    A VNI, a pool or an address that another has by now is left to it, and said once.

    Result: the other endpoints are published; when the conflict is over it is said no
    more.
    """
    async with hosts(tmp_path) as ((one,), store):
        await joined(one)
        network = one.network
        await one.write(one.endpoints(3))
        ip = CIDR[1001]
        key = records.address("local", CIDR, ip)
        rival = Reservation(
            space="local", cidr=CIDR, ip=ip, host=FAR, bound=True, endpoint="x" * 8
        )
        empty = await store()
        await empty.commit(Change(puts={key: records.encode(rival)}))
        await one.move(Noted(empty))
        with structlog.testing.capture_logs() as logs:
            await one.authority.turn()
            await one.authority.turn()
        (text,) = one.authority.conflicts.values()
        assert text == (
            f"address {ip} of container {one.rig.site.name('e1001' * 8)} was given to "
            f"another one on host {FAR[:8]} meanwhile; disconnect one of the two from "
            "the network and connect it again"
        )
        assert [e["event"] for e in logs].count("authority.conflict") == 1
        found = await content(empty)
        assert found[key] == rival
        assert records.endpoint(network.id, "e1001" * 8) not in found
        assert len([k for k in found if k.startswith("endpoints/")]) == 2
        await one.rig.state.commit(lambda draft: draft.delete(key))
        await one.rig.networks.delete_endpoint(
            one.docker.nets["blue0" * 8].id, "e1001" * 8
        )
        await one.authority.turn()
        assert one.authority.conflicts == {}


@pytest.mark.parametrize("kind", ["vni", "pool"])
async def test_another_network_is_in_the_way(tmp_path, kind):
    """A network whose VNI or pool is another's by now is not published, and named."""
    async with hosts(tmp_path) as ((one,), store):
        await joined(one)
        network = one.network
        await one.write(one.endpoints(3))
        pool = Pool(space="local", cidr=CIDR, network="other")
        record = {
            "vni": (records.vni(network.vni), replace_vni(one, "other")),
            "pool": (records.pool("local", CIDR), pool),
        }[kind]
        empty = await store()
        key, value = record
        await empty.commit(Change(puts={key: records.encode(value)}))
        await one.move(Noted(empty))
        await one.authority.turn()
        thing = f"VNI {network.vni}" if kind == "vni" else f"pool {POOL}"
        assert one.authority.conflicts == {
            network.id: (
                f"{thing} of network {network.id} is network other's by now; remove one "
                "of the two networks with all its containers and create it again"
            )
        }
        assert set(await content(empty)) == {key}


def replace_vni(site, network):
    """Return the network's VNI as another's."""
    known = site.view.get(object, records.vni(site.network.vni))
    return replace(known, network=network)


async def test_what_is_gone_meanwhile(tmp_path):
    """What Docker removes between two transactions is not published after that."""
    async with hosts(tmp_path) as ((one,), store):
        await joined(one)
        ips = [CIDR[n] for n in range(2000, 2200)]
        loose = {records.address("local", CIDR, ip): one.held(ip) for ip in ips}
        await one.write({**one.endpoints(2), **loose})
        empty = await wiped(store, one)
        door = one.rig.state.store

        async def nothing():
            pass

        async def remove():
            door.before.clear()
            for name in ("e1000" * 8, "e1001" * 8):
                await one.rig.networks.delete_endpoint("blue0" * 8, name)
            await one.docker.remove("blue0" * 8)

        # The cluster's record, the host's and the network come before.
        door.before = [nothing, nothing, nothing, remove]
        await one.authority.turn()
        await one.authority.turn()
        assert {kind for kinds in door.order for kind in kinds} >= {"networks", "hosts"}
        assert await content(empty) == {}


@pytest.mark.etcd
@pytest.mark.timeout(120)
async def test_on_a_real_etcd(tmp_path):
    """Etcd takes a network of 300 endpoints and as many other addresses and blocks."""
    with etcd_server.running(tmp_path) as cluster:
        async with AsyncExitStack() as stack:

            async def door(prefix):
                made = EtcdStore(cluster.options(prefix=prefix))
                await made.open()
                stack.push_async_callback(made.close)
                return made

            first = await door("/a/")
            one = await host(stack, first, tmp_path, "h1")
            await joined(one)
            ips = [CIDR[n] for n in range(2000, 2000 + MANY)]
            loose = {records.address("local", CIDR, ip): one.held(ip) for ip in ips}
            await one.write({**one.endpoints(MANY), **loose})
            before = await content(first)
            empty = await door("/b/")
            await one.move(empty)
            await one.authority.turn()
            assert await content(empty) == before
            assert not one.view.missing
