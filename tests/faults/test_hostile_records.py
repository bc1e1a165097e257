"""Values in the store that are not pynet's, or mean harm: left out, counted, named."""

import asyncio
import json
import sqlite3
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from cnmdriver.insight.status import status
from cnmdriver.model import Endpoint, Host, Member, Network, Reservation
from cnmdriver.store import records
from cnmdriver.store.base import Change
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import pb
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.sqlite import SqliteStore
from tests.fakes import announce, cluster, ended, level, on_store
from tests.faults.hostile_daemon import Daemon
from tests.store import etcd_server
from tests.unit.calls import Docker

NET, POOL = "d" * 64, "10.1.0.0/24"
STRANGER = "203.0.113"
"""Addresses and MACs with this in them are in hostile records only."""
ODD_MAC = "02:66:66"
DEPTH = 100_000


def endpoint(network, **odd):
    """Return an endpoint of another host as JSON, with odd things in it."""
    sound = {
        "network": network,
        "id": "evil",
        "host": "h9",
        "boot": "b",
        "mac": f"{ODD_MAC}:00:00:01",
        "ipv4": "10.1.0.66/24",
    }
    return envelope({**sound, **odd})


def envelope(record, **odd):
    """Wrap a record as it is stored."""
    return json.dumps({"schema": 1, "record": record, **odd}).encode()


def hostile(net):
    """Return values by key that nobody should store, about a network that there is."""
    subnet = {"space": "s", "pool": "10.8.0.0/24", "gateway": "10.8.0.1"}
    network = {
        "id": "n8",
        "mode": "overlay",
        "subnets": [subnet],
        "mtu": 1450,
        "vni": 9,
    }
    member = {"network": net, "host": "h9", "docker_id": "x"}
    held = {"space": "local", "cidr": POOL, "ip": "10.1.0.70", "host": "h9"}
    host = {"id": "h9", "name": "evil", "version": "1", "vtep": f"{STRANGER}.9"}
    deep = b"[" * DEPTH + b"]" * DEPTH
    place = f"endpoints/{net}"
    return {
        # What is no record at all.
        "nonsense": b"{}",
        "endpoints": b"{}",
        "": b"x",
        "/": b"x",
        f"{place}/empty": b"",
        f"{place}/bytes": bytes(range(256)),
        f"{place}/null": b"null",
        f"{place}/nan": envelope({}).replace(b"{}", b"NaN"),
        f"{place}/large": envelope("x" * 1_000_000),
        f"{place}/deep": b'{"schema":1,"record":' + deep + b"}",
        f"{place}/deeper": b'{"schema":1,"record":{"id":' + deep + b"}}",
        f"{place}/unknown": b'{"schema":1,"x":' + deep + b',"record":{}}',
        f"{place}/digits": b'{"schema":' + b"9" * 100_000 + b',"record":{}}',
        f"{place}/twice": b'{"schema":1,"record":{},"record":[]}',
        f"{place}/schema": envelope({}, schema="1"),
        # Keys that are none of the record's, or of no known form.
        f"{place}/other": endpoint(net),
        f"{place}/evil/x": endpoint(net),
        "endpoints/evil": endpoint(net),
        "endpoints/n2/evil": endpoint(net),
        f"members/{net}/a/b": envelope(member),
        f"members/{net}/h8": envelope(member),
        "hosts/h8": envelope(host),
        "hosts/h9/x": envelope(host),
        "alive/h9/x": envelope({"instance": "i", "boot": "b"}),
        "fence/\x1b[2J": envelope({"instance": "i"}),
        "networks/n9": envelope(network),
        "pools/local/10.8.0.0/24/x": envelope(
            {"space": "local", "cidr": "10.8.0.0/24", "network": "n"}
        ),
        "pools/local/10.9.0.0/24": envelope(
            {"space": "local", "cidr": "10.8.0.0/24", "network": "n"}
        ),
        f"addresses/local/{POOL}/10.1.0.71": envelope(held),
        "blocks/local/10.1.0.0/24/10.9.0.0/26": envelope({"host": "h9"}),
        "blocks/local/x": envelope({"host": "h9"}),
        "vnis/16777216": envelope({"network": net}),
        "vnis/-1": envelope({"network": net}),
        "vnis/" + "9" * 5000: envelope({"network": net}),
        # Fields that are of the right type and mean harm.
        f"{place}/evil": endpoint(net, mac='"; flush ruleset; "'),
        "endpoints/n3/evil": endpoint("n3", mac="ff:ff:ff:ff:ff:ff"),
        "endpoints/n4/evil": endpoint("n4", ipv4="224.0.0.1/24"),
        "endpoints/n5/evil": endpoint("n5", ipv4="10.1.0.66/99"),
        "endpoints/n6/evil": endpoint("n6", ipv6=f"{STRANGER}.1/24"),
        "endpoints/n7/evil": endpoint("n7", sandbox="/\n"),
        f"{place}/$(reboot)": endpoint(net, id="$(reboot)"),
        f"members/{net}/h9": envelope({**member, "bridge": 'br"; reboot'}),
        "members/n8/h9": envelope({**member, "network": "n8", "prefix": "../eth"}),
        "hosts/h9": envelope({**host, "namespace": "../../etc"}),
        "hosts/h7": envelope({**host, "id": "h7", "vtep": "0.0.0.0"}),
        "hosts/h6": envelope({**host, "id": "h6", "mtu": 1 << 70}),
        "networks/n8": envelope({**network, "vni": 1 << 24}),
        "networks/n7": envelope({**network, "id": "n7", "mtu": 0}),
        "networks/n6": envelope({**network, "id": "n6", "subnets": [subnet] * 2}),
        "networks/n5": envelope(
            {**network, "id": "n5", "subnets": [{**subnet, "gateway": f"{STRANGER}.1"}]}
        ),
        f"addresses/local/{POOL}/{STRANGER}.1": envelope(
            {**held, "ip": f"{STRANGER}.1"}
        ),
    }


@pytest.fixture
async def hosts(tmp_path):
    """Play two dockerds whose hosts share a network, each with a container on it."""
    async with cluster(tmp_path, 2) as rigs:
        found = [Docker(one) for one in rigs]
        for number, one in enumerate(found, 1):
            await level(*rigs)
            await one.create(NET, POOL)
            await one.start(f"box{number}", NET)
        await level(*rigs)
        yield found


async def poison(store, values):
    """Write to the store what no pynet would."""
    await store.commit(Change(puts=dict(values)))


def network(one):
    """Return the id of the one network."""
    (found,) = one.rig.state.view.all(Network, "networks/")
    return found.id


def held(one):
    """Return what is in a host's kernel, in words."""
    return {key: repr(op) for key, op in one.rig.kernel.ops.items()}


async def told(one):
    """Return what `pynet status` says needs attention."""
    return (await status(one.rig.site, {}))["attention"]


async def well(one, number):
    """Tell that a host can do its work: start a container, and stop it again."""
    await one.start(f"new{number}", NET)
    await one.stop(f"new{number}")
    return True


# One by one.

NAMES = list(hostile("n"))


@pytest.mark.parametrize("number", range(len(NAMES)), ids=[n[:40] for n in NAMES])
async def test_each_is_left_out_and_named(hosts, number):
    """
    A value that cannot be used changes nothing but what `status` says.

    1. Two hosts serve a network; a hostile value is written to their store.
    2. Both hear of it, and start and stop another container each.
    Result: their kernels hold what they held, and both name the key.
    3. The value is deleted: nobody speaks of it any more.
    """
    key, value = list(hostile(network(hosts[0])).items())[number]
    rigs = [one.rig for one in hosts]
    before = [held(one) for one in hosts]
    await poison(rigs[0].state.store, {key: value})
    await level(*rigs)
    for one in hosts:
        assert list(one.rig.state.view.malformed) == [key]
        assert one.rig.state.view.get(object, key) is None
        assert await well(one, number)
        assert any(shown(key) in line for line in await told(one))
    await level(*rigs)
    assert [held(one) for one in hosts] == before
    await rigs[0].state.store.commit(Change(deletes=frozenset({key})))
    await level(*rigs)
    assert [one.rig.state.view.malformed for one in hosts] == [{}, {}]
    assert not [line for line in await told(hosts[0]) if "cannot be read" in line]


def shown(key):
    """Return the beginning of a key as it is shown."""
    return ascii(key[:60])[1:-1]


async def test_all_at_once(hosts):
    """Everything hostile together is left out, and the sentences can be printed."""
    values = hostile(network(hosts[0]))
    rigs = [one.rig for one in hosts]
    before = [held(one) for one in hosts]
    await poison(rigs[0].state.store, values)
    await level(*rigs)
    for number, one in enumerate(hosts):
        assert sorted(one.rig.state.view.malformed) == sorted(values)
        assert await well(one, number)
        for line in await told(one):
            assert line.isprintable()
            assert len(line) < 1000
    await level(*rigs)
    assert [held(one) for one in hosts] == before
    assert STRANGER not in str(before)
    assert ODD_MAC not in str(before)


async def test_very_many_are_counted(hosts):
    """Of a thousand values that cannot be read there is the number, and some names."""
    one = hosts[0]
    await poison(one.rig.state.store, {f"hosts/x{n}": b"?" for n in range(1000)})
    await level(one.rig)
    lines = [line for line in await told(one) if "cannot be read" in line]
    assert len(lines) < 20
    assert any("1000" in line for line in lines)
    assert any("hosts/x0" in line for line in lines)


# What is sound by itself and clashes with what there is.


async def test_sound_records_that_clash(hosts):
    """
    Records that agree with their keys and not with others harm nobody.

    An endpoint whose network is unknown, one outside its network's pools, two with one
    address, one on an unknown host, a member of nothing, a second network with a VNI.
    """
    net = network(hosts[0])
    one = hosts[0].rig
    known = one.state.view.get(Network, records.network(net))
    far = {"vtep": "192.0.2.9", "id": "h9", "name": "nine", "version": "1"}
    second = json.loads(records.encode(known))["record"] | {"id": "n8"}
    (mine,) = one.site.endpoints(net)
    await poison(
        one.state.store,
        {
            "hosts/h9": envelope(far),
            "alive/h9": envelope({"instance": "i", "boot": "b"}),
            f"members/{net}/h9": envelope(
                {"network": net, "host": "h9", "docker_id": "x"}
            ),
            f"endpoints/{net}/far": endpoint(net, id="far", ipv4=f"{STRANGER}.7/24"),
            f"endpoints/{net}/same": endpoint(net, id="same", ipv4=str(mine.ipv4)),
            f"endpoints/{net}/mac": endpoint(net, id="mac", mac=mine.mac),
            f"endpoints/{net}/lost": endpoint(net, id="lost", host="nowhere"),
            "endpoints/nothing/e": endpoint("nothing", id="e"),
            "members/nothing/h9": envelope({"network": "nothing", "host": "h9"}),
            "networks/n8": envelope(second),
            "vnis/7": envelope({"network": "nothing"}),
        },
    )
    await level(*(host.rig for host in hosts))
    for number, host in enumerate(hosts):
        assert host.rig.state.view.malformed == {}
        assert await well(host, number)
        assert await told(host) is not None
    assert [e.id for e in one.site.endpoints(net)] == [mine.id]


# What is this host's own.

OWN = ["endpoints/", "members/", "addresses/", "networks/", "pools/", "hosts/"]


@pytest.mark.parametrize("prefix", OWN)
async def test_nobody_ends_what_is_ours(tmp_path, prefix):
    """
    A record of what this host serves, made unreadable, is still this host's.

    1. A host serves a network with a container; its records are overwritten.
    2. It hears of that, and plans again.
    Result: its kernel keeps all, and the key is named until it is written anew.
    """
    async with cluster(tmp_path, 1) as (rig,):
        one = Docker(rig)
        await one.create(NET, POOL)
        await one.start("box", NET)
        before, wanted = held(one), set(map(repr, rig.site.desired()))
        keys = [k for g in rig.state.view.groups.values() for k in g]
        (key, *_) = sorted(k for k in keys if k.startswith(prefix))
        await poison(rig.state.store, {key: b"garbage"})
        await level(rig)
        assert set(map(repr, rig.site.desired())) == wanted
        assert held(one) == before
        assert rig.state.view.get(object, key) is not None
        assert await well(one, 1)


# Backends.


@asynccontextmanager
async def on_etcd(directory, endpoint, stack):
    """Run a host on etcd that follows the store and keeps its snapshot."""
    store = EtcdStore(Options(endpoints=(endpoint,)))
    await store.open()
    stack.push_async_callback(store.close)
    host = Host(id="", name="h1", version="t", vtep=ip_address("192.0.2.1"))
    rig = await on_store(stack, store, directory / "h1.db", host)
    await announce(rig)
    tasks = [asyncio.create_task(rig.state.follow())]
    for task in tasks:
        stack.push_async_callback(ended, task)
    yield rig, tasks


@pytest.mark.etcd
@pytest.mark.timeout(60)
async def test_bytes_in_etcd(tmp_path):
    """
    Keys and values in etcd that are not even text are left out and named.

    They are heard of in both ways, in a listing and as news; the host works on, and can
    keep what it knows for its next start.
    """
    with etcd_server.running(tmp_path) as servers:
        root = b"/pynet/v1/"
        odd = [
            b"hosts/\xff\xfe",
            b"h\xff",
            b"hosts/\0",
            b"endpoints/\xed\xa0\x80/x",
            b"/",
        ]

        def put(keys, value):
            for key in keys:
                servers.ask("KV", "Put", pb.PutRequest(key=root + key, value=value))

        put(odd, b"\xff\xfe")
        async with (
            AsyncExitStack() as stack,
            on_etcd(tmp_path, servers.servers[0].endpoint, stack) as (rig, tasks),
        ):
            one = Docker(rig)
            await one.create(NET, POOL)
            await one.start("box", NET)
            more = [key + b"2" for key in odd]
            put(more, b"[" * DEPTH)
            async with asyncio.timeout(20):
                while len(rig.state.view.malformed) < 2 * len(odd):
                    await asyncio.sleep(0.05)
            assert await well(one, 1)
            await rig.state.keep()
            assert not any(task.done() for task in tasks)
            lines = "\n".join(await told(one))
            lines.encode()
            assert lines.count("\n") >= 1


@pytest.mark.root
@pytest.mark.timeout(120)
def test_a_daemon_on_a_poisoned_store():
    """
    A daemon starts, serves and stops on a store full of what is not its own.

    1. A network with a container is made, and the daemon ends.
    2. Everything hostile is written to its store; the daemon starts again.
    Result: it has the network, says what it left out, and removes all when asked.
    """
    with tempfile.TemporaryDirectory(prefix="pynet-h") as name:
        directory = Path(name)
        ids = {"NetworkID": NET, "EndpointID": "e" * 64}
        pool = {"Pool": POOL, "Gateway": "10.1.0.1/24"}
        place = {"Address": "10.1.0.2/24"}
        with running(directory) as one:
            for method, content in (
                ("CreateNetwork", {"NetworkID": NET, "IPv4Data": [pool]}),
                ("CreateEndpoint", {**ids, "Interface": place}),
                ("Join", {**ids, "SandboxKey": "/var/run/docker/netns/1"}),
            ):
                assert one.call(f"NetworkDriver.{method}", **content)[0] == 200
            (known,) = one.ask("GET", "networks")
        asyncio.run(poison_file(directory / "state" / "store.db", known["network"]))
        with running(directory) as one:
            state = one.ask("GET", "status")
            assert not state["well"]
            assert any("cannot be read" in line for line in state["attention"])
            assert (state["networks"], state["endpoints"]) == (1, 1)
            for path in ("networks", "endpoints", "hosts", "pools", "explain", "diff"):
                assert "error" not in one.ask("GET", path)
            for method in ("Leave", "DeleteEndpoint"):
                assert one.call(f"NetworkDriver.{method}", **ids)[0] == 200
            assert one.call("NetworkDriver.DeleteNetwork", NetworkID=NET)[0] == 200
            assert one.ask("GET", "census")["owned"] == []


class running:  # noqa: N801 - used as a word
    """A daemon that must end well, with nothing odd in its log."""

    def __init__(self, directory):
        self.one = Daemon(directory, "--grace", "60")

    def __enter__(self):
        self.one.wait_ready()
        return self.one

    def __exit__(self, kind, *_):
        code = self.one.close()
        if kind is None:
            assert (code, self.one.troubles) == (0, [])


async def poison_file(path, net):
    """Write all that is hostile into the file of an embedded store."""
    store = SqliteStore(path)
    await store.open()
    await poison(store, hostile(net))
    await store.close()
    with sqlite3.connect(path) as db:
        (count,) = db.execute("SELECT count(*) FROM records").fetchone()
    db.close()
    assert count > len(NAMES)


def test_the_list_covers_every_kind():
    """Of each kind of record that hosts rely on there is a hostile one."""
    kinds = {key.partition("/")[0] for key in NAMES}
    wanted = {Endpoint, Member, Reservation, Network, Host}
    for kind, record in records.TYPES.items():
        if record in wanted:
            assert kind in kinds
