"""Several hosts on one store: who is in which network, and who has which address."""

import asyncio
import random
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.driver import ipam
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import Conflict, DriverError, Exhausted, InvalidParameter
from cnmdriver.model import (
    Block,
    Endpoint,
    Member,
    Network,
    Pool,
    Reservation,
    Subnet,
    Vni,
)
from cnmdriver.plan import devices
from cnmdriver.store import records
from tests.fakes import cluster, level
from tests.unit.calls import Docker, families

POOL, POOL6 = "10.1.0.0/24", "fd00:1::/64"
CREATE = "docker network create -d pynet --ipam-driver pynet"
ROUTED = {"pynet.gateway": "pynet"}


@pytest.fixture
async def hosts(directory):
    """Play three dockerds, on three hosts with one store."""
    async with cluster(directory, 3) as rigs:
        yield [Docker(one) for one in rigs]


@pytest.fixture
async def slow_hosts(directory):
    """Play three dockerds whose store is some milliseconds away."""
    async with cluster(directory, 3, delay=0.002) as rigs:
        yield [Docker(one) for one in rigs]


def docker_id(host):
    """Return what a host's Docker calls its part of the network."""
    return host.rig.site.host.name * 32


async def join(*hosts, cidrs=(POOL,), **said):
    """Create the network on hosts, one after the other."""
    for host in hosts:
        await level(host.rig)
        await host.create(docker_id(host), *cidrs, **said)
    await level(*(host.rig for host in hosts))


async def everything(hosts):
    """Return all records of the store as every host must see them."""
    await level(*(host.rig for host in hosts))
    seen = [host.rig.records for host in hosts]
    assert all(keys == seen[0] for keys in seen)
    return seen[0]


def but_blocks(keys):
    """Return keys without those of blocks, which come and go."""
    return [key for key in keys if not key.startswith("blocks/")]


def only(host, kind, prefix):
    """Return the one record of a kind."""
    (found,) = host.rig.state.view.all(kind, prefix)
    return found


def network(host):
    """Return the one network there is."""
    return only(host, Network, "networks/")


def reservation(host, ip, cidr=POOL):
    """Return who has an address."""
    key = records.address("local", ip_network(cidr), ip_address(ip))
    return host.rig.state.view.get(Reservation, key)


def refusal(error):
    """Return the sentence."""
    return str(error.value)


# One network.


async def test_one_pool_is_one_network(hosts):
    """The same subnet on three hosts is one network with three members."""
    await join(*hosts)
    found = network(hosts[0])
    assert (found.mode, found.gateway, found.mtu) == ("overlay", "docker", 1450)
    members = list(hosts[0].rig.state.view.all(Member, f"members/{found.id}/"))
    assert sorted(m.docker_id for m in members) == [docker_id(h) for h in hosts]
    assert only(hosts[0], Pool, "pools/").network == found.id
    assert {m.bridge for m in members} == {devices.bridge(found.id)}
    for host in hosts:
        assert ("device", "pynet", devices.vxlan(found.id)) in host.rig.kernel.ops


async def test_a_network_by_its_id(hosts):
    """With the network's id both of its pools are given to an empty request."""
    one, two, _ = hosts
    await join(one, cidrs=(POOL, POOL6))
    await level(two.rig)
    await two.create("x" * 64, None, "ipv6", pynet_network=network(one).id)
    assert [pool for _, pool in two.nets["x" * 64].pools] == [POOL, POOL6]
    await level(one.rig)
    assert len(list(one.rig.state.view.all(Member, "members/"))) == 2


async def test_a_pool_that_is_not_the_named_networks(hosts):
    """A subnet and a network's id that do not belong together are refused."""
    one, two, _ = hosts
    await join(one)
    await level(two.rig)
    with pytest.raises(Conflict) as refused:
        await two.pool("10.2.0.0/24", pynet_network=network(one).id)
    assert refusal(refused) == (
        f"pool 10.2.0.0/24 is not one of network {network(one).id}; leave --subnet or "
        "--ipam-opt pynet.network out"
    )


async def test_left_out_options_are_the_networks(hosts):
    """A host that says nothing gets mode, MTU, gateway and all else as they are."""
    one, two, _ = hosts
    said = {
        "pynet.mtu": "1400",
        "pynet.gateway": "pynet",
        "pynet.flood": "true",
        "pynet.icc": "false",
        "pynet.masquerade": "false",
    }
    await join(one, options=said)
    before = network(one)
    await join(two)
    assert network(two) == before
    assert (before.mtu, before.gateway, before.flood) == (1400, "pynet", True)
    assert (before.icc, before.masquerade) == (False, False)


async def test_a_bridge_network_is_joined_as_one(hosts):
    """A network of mode bridge on a shared store is of that mode on every host."""
    one, two, _ = hosts
    await join(one, options={"pynet.mode": "bridge"})
    await join(two)
    assert network(two).mode == "bridge"
    assert (network(two).vni, network(two).mtu) == (0, 1500)
    name = devices.bridge(network(two).id)
    assert ("device", "host", name) in two.rig.kernel.ops


async def test_saying_the_same_again(hosts):
    """A host that says what the network is, joins it, with options of its own."""
    one, two, _ = hosts
    said = {"pynet.mtu": "1400", "pynet.gateway": "pynet", "pynet.mode": "overlay"}
    await join(one, options=said)
    await join(two, options={**said, "pynet.prefix": "net"}, gateway="10.1.0.1")
    key = records.member(network(one).id, two.rig.site.host.id)
    await level(one.rig)
    assert one.rig.state.view.get(Member, key).prefix == "net"


SUBNET = f"join it with: {CREATE} --subnet {POOL}"
OTHERS = (
    (
        {"pynet.mtu": "1400"},
        {"pynet.mtu": "1300"},
        f"MTU 1400, not 1300; {SUBNET} -o pynet.mtu=1400 NAME",
    ),
    (
        {},
        {"com.docker.network.driver.mtu": "1300", "org.example": "a b"},
        f"MTU 1450, not 1300; {SUBNET} -o 'org.example=a b' -o pynet.mtu=1450 NAME",
    ),
    (
        {},
        {"pynet.mode": "bridge"},
        f"mode overlay, not bridge; {SUBNET} -o pynet.mode=overlay NAME",
    ),
    (
        {},
        {"pynet.gateway": "pynet"},
        f"pynet.gateway docker, not pynet; {SUBNET} -o pynet.gateway=docker NAME",
    ),
    (
        {},
        {"pynet.icc": "false", "pynet.flood": "true"},
        f"pynet.icc true, not false; {SUBNET} -o pynet.flood=false -o pynet.icc=true NAME",
    ),
    (
        {"pynet.host_access": "true"},
        {"pynet.host_access": "no"},
        f"pynet.host_access true, not false; {SUBNET} -o pynet.host_access=true NAME",
    ),
)


@pytest.mark.parametrize(("first", "second", "text"), OTHERS)
async def test_other_options_are_refused(hosts, first, second, text):
    """What a joining host says otherwise is refused with both values and the remedy."""
    one, two, _ = hosts
    await join(one, options=first)
    before = await everything(hosts)
    with pytest.raises(Conflict) as refused:
        await join(two, options=second)
    assert refusal(refused) == f"network {network(one).id} on pool {POOL} has {text}"
    assert await everything(hosts) == before
    assert two.rig.kernel.left == []


@pytest.mark.parametrize("internal", [True, False])
async def test_an_internal_network_is_internal_everywhere(hosts, internal):
    """`--internal` is not an option that can be left out."""
    one, two, _ = hosts
    await join(one, internal=internal)
    flag = " --internal" if internal else ""
    with pytest.raises(Conflict) as refused:
        await join(two, internal=not internal)
    words = ("true", "false") if internal else ("false", "true")
    assert refusal(refused) == (
        f"network {network(one).id} on pool {POOL} has --internal {words[0]}, not "
        f"{words[1]}; join it with: {CREATE}{flag} --subnet {POOL} NAME"
    )


async def test_other_reserved_addresses_are_refused(hosts):
    """Auxiliary addresses are the network's: the same or none."""
    one, two, three = hosts
    await join(one, aux=("10.1.0.9",))
    before = await everything(hosts)
    with pytest.raises(Conflict) as refused:
        await join(two, aux=("10.1.0.8",))
    assert "has reserved 10.1.0.9, not 10.1.0.8; join it with:" in refusal(refused)
    assert await everything(hosts) == before
    await join(two)
    await join(three, aux=("10.1.0.9",))
    assert reservation(three, "10.1.0.9").host == one.rig.site.host.id


async def test_another_gateway_is_refused(hosts):
    """A gateway that is not the network's is refused with both."""
    one, two, _ = hosts
    await join(one, options=ROUTED)
    before = await everything(hosts)
    with pytest.raises(Conflict) as refused:
        await join(two, gateway="10.1.0.254")
    assert refusal(refused) == (
        f"network {network(one).id} on pool {POOL} has gateway 10.1.0.1, not "
        "10.1.0.254; leave --gateway out or give that one"
    )
    assert await everything(hosts) == before


async def test_a_pool_the_network_lacks(hosts):
    """A host cannot join with one pool more; fewer are its own choice."""
    one, two, three = hosts
    await join(one, cidrs=(POOL, POOL6))
    with pytest.raises(Conflict) as refused:
        await join(two, cidrs=(POOL, "10.2.0.0/24"))
    assert refusal(refused) == (
        f"network {network(one).id} has no pool 10.2.0.0/24; join it with: {CREATE} "
        f"--ipv6 --subnet {POOL} --subnet {POOL6} NAME"
    )
    await join(three)
    box = await three.start("box", docker_id(three))
    assert box.addresses == [ip_interface("10.1.0.32/24")]
    assert network(three).subnets == network(one).subnets


async def test_pools_of_two_networks(hosts):
    """The pools of two networks make no third one."""
    one, two, three = hosts
    await join(one)
    await join(two, cidrs=("10.2.0.0/24",))
    with pytest.raises(Conflict, match=r"has no pool 10\.2\.0\.0/24; join it with"):
        await join(three, cidrs=(POOL, "10.2.0.0/24"))


async def test_a_dockerd_joins_once(hosts):
    """A second network with the same pool on one host is refused."""
    one, two, _ = hosts
    await join(one, two)
    with pytest.raises(Conflict, match=r"pool 10\.1\.0\.0/24 is in use on this host"):
        await two.create("y" * 64, POOL)


async def test_the_same_join_again(hosts):
    """A repeated CreateNetwork of a joining host changes nothing."""
    one, two, _ = hosts
    await join(one, cidrs=(POOL, POOL6), options={"pynet.mtu": "1400"})
    await join(two, options={"pynet.mtu": "1400"})
    before = await everything(hosts)
    net = two.nets[docker_id(two)]
    for options, error in (({"pynet.mtu": "1400"}, None), ({}, Conflict)):
        call = two.rig.networks.create(
            net.id, subnets=tuple(net.subnets), options=options, internal=False
        )
        if error is None:
            await call
            continue
        with pytest.raises(error, match="exists here with other settings"):
            await call
    assert await everything(hosts) == before


async def test_another_create_in_the_middle_of_a_create(hosts):
    """
    Two hosts claim the pools before either network is created.

    1. h1 and h2 both request the IPv4 pool, then the IPv6 pool.
    2. h1 creates its network, and h2 after it.
    Result: one network of two pools, each with both claims, that nobody else keeps.
    """
    one, two, _ = hosts
    for cidr in (POOL, POOL6):
        for host in (one, two):
            await level(host.rig)
            await host.pool(cidr)
    await join(one, two, cidrs=(POOL, POOL6))
    found = network(two)
    pools = list(two.rig.state.view.all(Pool, "pools/"))
    assert [p.network for p in pools] == [found.id] * 2
    members = list(two.rig.state.view.all(Member, "members/"))
    assert [m.network for m in members] == [found.id] * 2
    claims = (f"local/{POOL}", f"local/{POOL6}")
    assert all(m.claims == claims for m in members)
    await two.start("box", docker_id(two))
    await two.stop("box")
    for host in (one, two):
        await level(host.rig)
        await host.remove(docker_id(host))
    assert await everything(hosts) == []


async def test_a_claim_keeps_a_pool_that_got_another_network(hosts):
    """
    A claim counts though its pool went over to another network's id.

    1. Both hosts claim both pools; h1 creates its network and removes it again.
    2. h2 creates its own.
    Result: h2 has both pools.
    """
    one, two, _ = hosts
    for cidr in (POOL, POOL6):
        await one.pool(cidr)
        await level(two.rig)
        await two.pool(cidr)
        await level(one.rig)
    await join(one, cidrs=(POOL, POOL6))
    await one.remove(docker_id(one))
    await level(two.rig)
    assert not any(p.claimed for p in two.rig.state.view.all(Pool, "pools/"))
    before = two.rig.state.view.revision
    r = two.rig
    await Sync(r.site, r.networks, r.ipam, None, grace=0, audit=60).forget_unused()
    assert two.rig.state.view.revision == before
    await join(two, cidrs=(POOL, POOL6))
    box = await two.start("box", docker_id(two))
    assert [a.version for a in box.addresses] == [4, 6]
    await two.stop("box")
    await two.remove(docker_id(two))
    assert await everything(hosts) == []


@pytest.mark.parametrize("turn", range(20))
async def test_creates_at_once(slow_hosts, turn):
    """Three dockerds that create the network at once make one with three members."""
    await asyncio.gather(
        *(h.create(docker_id(h), POOL, POOL6, options=ROUTED) for h in slow_hosts)
    )
    await everything(slow_hosts)
    first = slow_hosts[0]
    found = network(first)
    assert len(list(first.rig.state.view.all(Member, "members/"))) == 3
    assert [s.gateway for s in found.subnets] == [
        ip_address("10.1.0.1"),
        ip_address("fd00:1::1"),
    ]
    assert only(first, Vni, "vnis/").network == found.id
    await asyncio.gather(*(h.remove(docker_id(h)) for h in slow_hosts))
    assert await everything(slow_hosts) == []


@pytest.mark.parametrize("turn", range(10))
async def test_coming_and_going_at_once(slow_hosts, turn):
    """Hosts that leave while others join leave a whole network, or nothing."""
    random.seed(turn)

    async def live(host):
        for _ in range(5):
            await asyncio.sleep(random.uniform(0, 0.01))
            await host.create(docker_id(host), POOL)
            box = f"box-{host.rig.site.host.name}"
            await host.start(box, docker_id(host))
            await host.stop(box)
            await host.remove(docker_id(host))

    await asyncio.gather(*(live(host) for host in slow_hosts))
    assert await everything(slow_hosts) == []
    for host in slow_hosts:
        assert host.rig.kernel.left == []


async def test_networks_drawn_at_once(slow_hosts):
    """Networks without a subnet get pools of their own, and VNIs of their own."""
    await asyncio.gather(
        *(h.create(f"{n}{docker_id(h)}") for h in slow_hosts for n in range(5))
    )
    await everything(slow_hosts)
    view = slow_hosts[0].rig.state.view
    networks = list(view.all(Network, "networks/"))
    assert len({n.subnets[0].pool for n in networks}) == 15
    assert len({n.vni for n in networks}) == 15
    assert {n.vni for n in networks} <= set(range(10_000_000, 1 << 24))
    assert len(list(view.all(Vni, "vnis/"))) == 15


# Leaving.


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
async def test_leaving_in_any_order(hosts, order):
    """The last host to leave takes the network with it, with all that was its own."""
    said = {**ROUTED, "pynet.host_access": "true"}
    await join(*hosts, cidrs=(POOL, POOL6), options=said, aux=())
    for number in order:
        host = hosts[number]
        await host.start("box", docker_id(host))
        await host.stop("box")
        assert network(host)
        await host.remove(docker_id(host))
        assert host.rig.kernel.left == []
        await level(*(h.rig for h in hosts))
    assert await everything(hosts) == []


async def test_leaving_keeps_the_others(hosts):
    """What other hosts have on the network outlives the host that created it."""
    one, two, three = hosts
    await join(*hosts, options=ROUTED, aux=("10.1.0.9",))
    await two.start("box", docker_id(two))
    await level(one.rig)
    await one.address(f"local/{POOL}")
    await one.remove(docker_id(one))
    await everything(hosts)
    assert only(three, Endpoint, "endpoints/").id == "box"
    kept = three.rig.state.view.all(Reservation, "addresses/")
    assert sorted(int(r.ip) & 255 for r in kept) == [1, 9, 32]
    for host in (two, three):
        address = await host.address(f"local/{POOL}")
        assert address.ip not in map(ip_address, ("10.1.0.1", "10.1.0.9", "10.1.0.32"))
        for text, owner in (
            ("10.1.0.1", "the network's gateway"),
            ("10.1.0.9", "a reservation of docker network create"),
        ):
            with pytest.raises(Conflict, match=f"is taken by {owner}; choose"):
                await host.address(f"local/{POOL}", text)


async def test_what_the_network_keeps_needs_no_record(hosts):
    """Gateway and reserved addresses are nobody's, though their records were lost."""
    one, two, _ = hosts
    await join(one, two, options=ROUTED, aux=("10.1.0.2",))

    def lose(draft):
        for text in ("10.1.0.1", "10.1.0.2"):
            draft.delete(records.address("local", ip_network(POOL), ip_address(text)))

    await one.rig.state.commit(lose)
    await level(two.rig)
    assert await two.address(f"local/{POOL}") == ip_interface("10.1.0.32/24")
    for text in ("10.1.0.1", "10.1.0.2"):
        with pytest.raises(Conflict):
            await two.address(f"local/{POOL}", text)
        face = ip_interface(f"{text}/24")
        with pytest.raises(Conflict):
            await two.rig.networks.create_endpoint(
                docker_id(two), "box", **families([face]), mac=""
            )


async def test_coming_back(hosts):
    """A host that has left joins again, with the same gateway."""
    one, two, _ = hosts
    await join(one, two, options=ROUTED)
    await one.remove(docker_id(one))
    await join(one)
    assert one.nets[docker_id(one)].subnets[0].gateway == ip_address("10.1.0.1")
    await two.remove(docker_id(two))
    await level(one.rig)
    await one.remove(docker_id(one))
    assert await everything(hosts) == []


async def test_leaving_while_another_joins_unheard(hosts):
    """
    A host that has not heard of another's joining does not take its network away.

    1. h1 has the network; news does not reach it any more.
    2. h2 joins, and h1 leaves.
    Result: the network is h2's, with pool and gateway.
    """
    one, two, _ = hosts
    await join(one, options=ROUTED)
    one.rig.state.store.deaf.clear()
    await join(two)
    await one.remove(docker_id(one))
    await level(two.rig)
    found = network(two)
    assert only(two, Pool, "pools/").network == found.id
    assert only(two, Member, "members/").host == two.rig.site.host.id
    one.rig.state.store.deaf.set()


async def test_a_failed_join_leaves_the_network(hosts):
    """If the kernel of a joining host refuses, only its own part goes."""
    one, two, _ = hosts
    await join(one, options={"pynet.host_access": "true"})
    before = await everything(hosts)
    name = devices.vxlan(network(one).id)
    two.rig.kernel.refuse = {("device", "pynet", name)}
    with pytest.raises(DriverError):
        await join(two)
    assert await everything(hosts) == before
    assert two.rig.kernel.left == []


# Gateways.


async def test_every_host_has_the_same_gateway(hosts):
    """The gateway is the network's: asked for on each host, taken once."""
    await join(*hosts, cidrs=(POOL, POOL6), options=ROUTED, gateway=None)
    for host in hosts:
        gateways = [s.gateway for s in host.nets[docker_id(host)].subnets]
        assert gateways == [ip_address("10.1.0.1"), ip_address("fd00:1::1")]
    held = list(hosts[0].rig.state.view.all(Reservation, "addresses/"))
    assert [(r.gateway, r.bound) for r in held] == [(True, True)] * 2
    assert {r.host for r in held} == {hosts[0].rig.site.host.id}


async def test_a_gateway_of_old_and_new_dockers(hosts):
    """Where Docker is the gateway, an old one asks for an address that is not used."""
    new, old, third = hosts
    new.checks = True
    await join(new)
    assert network(new).subnets[0].gateway is None
    await join(old, third)
    assert network(old).subnets[0].gateway is None
    held = only(old, Reservation, "addresses/")
    assert (held.gateway, held.bound, held.host) == (True, True, old.rig.site.host.id)
    assert [h.nets[docker_id(h)].subnets[0].gateway for h in (old, third)] == [
        held.ip
    ] * 2
    await old.remove(docker_id(old))
    await level(third.rig)
    assert (await third.address(f"local/{POOL}")).ip != held.ip
    assert (await third.rig.networks.joining.around()).routes == ()


async def test_only_routed_networks_need_a_gateway(hosts):
    """Docker need not ask for a gateway of an overlay, unless it is pynet's."""
    networks = hosts[0].rig.networks
    assert networks.skips_gateway({}, internal=False)
    assert networks.skips_gateway({"pynet.host_access": "true"}, internal=True)
    assert not networks.skips_gateway(ROUTED, internal=False)
    assert not networks.skips_gateway({"pynet.mode": "bridge"}, internal=False)
    with pytest.raises(InvalidParameter, match="is for mode overlay"):
        networks.skips_gateway(
            {"pynet.mode": "bridge", "pynet.flood": "true"}, internal=False
        )


async def test_gateways_wished_at_once(hosts):
    """Of two hosts that wish two gateways before the create, the second is refused."""
    one, two, _ = hosts
    pool = await one.pool(POOL)
    assert (await one.address(pool, gateway=True)).ip == ip_address("10.1.0.1")
    await level(two.rig)
    await two.pool(POOL)
    assert await two.address(pool, gateway=True) == ip_interface("10.1.0.1/24")
    await two.address(pool, "10.1.0.254", gateway=True)
    await two.rig.ipam.release_address(pool, ip_address("10.1.0.254"))
    await level(one.rig)
    await one.rig.ipam.release_address(pool, ip_address("10.1.0.1"))
    await one.rig.ipam.release_pool(pool)
    await level(two.rig)
    assert (await two.address(pool)).ip == ip_address("10.1.0.2")
    await two.rig.ipam.release_pool(pool)
    assert await everything(hosts) == []


# Overlays.


async def test_an_overlay_with_dockers_addresses(hosts):
    """Docker's own addresses are not unique in the cluster: the remedy is told."""
    one = hosts[0]
    subnet = Subnet(space="LocalDefault", pool=ip_network("172.18.0.0/16"))
    with pytest.raises(InvalidParameter) as refused:
        await one.rig.networks.create(
            "n" * 64, subnets=(subnet,), options={"pynet.mtu": "1400"}, internal=True
        )
    assert refusal(refused) == (
        "an overlay network needs addresses that no two hosts give out, and these are "
        f"Docker's own; create it with: {CREATE} --internal --subnet 172.18.0.0/16 "
        "-o pynet.mtu=1400 NAME"
    )
    with pytest.raises(InvalidParameter, match=f"create it with: {CREATE} NAME"):
        await one.rig.networks.create("n" * 64, subnets=(), options={}, internal=False)
    assert await everything(hosts) == []


async def test_a_bridge_with_dockers_addresses(hosts):
    """On a shared store too, a bridge of one host can have Docker's addresses."""
    subnet = Subnet(space="LocalDefault", pool=ip_network("172.18.0.0/16"))
    for host in hosts[:2]:
        await host.rig.networks.create(
            docker_id(host),
            subnets=(subnet,),
            options={"pynet.mode": "bridge"},
            internal=False,
        )
    assert len([k for k in await everything(hosts) if k.startswith("netw")]) == 2


async def test_an_overlay_needs_a_shared_store(docker):
    """Without a tunnel address there is no overlay; what to do is told."""
    with pytest.raises(InvalidParameter) as refused:
        await docker.create("n" * 64, POOL, options={"pynet.mode": "overlay"})
    assert refusal(refused) == (
        "mode overlay needs a store that hosts share: start pynet serve with --store "
        "etcd://…, or create the network with -o pynet.mode=bridge"
    )
    assert docker.rig.records == []


async def test_options_of_overlays_on_a_bridge(docker):
    """What only an overlay has is refused on a bridge."""
    with pytest.raises(InvalidParameter, match=r"option pynet\.flood is for mode ove"):
        await docker.create("n" * 64, POOL, options={"pynet.flood": "false"})


async def test_the_mtu_is_the_underlays(hosts):
    """An overlay's MTU fits the creating host, and every host that joins."""
    one, two, _ = hosts
    with pytest.raises(InvalidParameter) as refused:
        await join(one, options={"pynet.mtu": "1451"})
    assert refusal(refused) == (
        "MTU 1451 is more than this host's tunnels have room for, 1450; give at most "
        "-o pynet.mtu=1450"
    )
    await join(one)
    two.rig.site.host = replace(two.rig.site.host, mtu=1400)
    with pytest.raises(Conflict) as refused:
        await join(two)
    assert refusal(refused) == (
        f"network {network(one).id} has MTU 1450, and this host's tunnels have room "
        "for 1350; create it on all hosts with -o pynet.mtu=1350"
    )
    one.rig.site.host = replace(one.rig.site.host, mtu=1300)
    with pytest.raises(InvalidParameter, match=r"MTU 1250 is below IPv6's least, 1280"):
        await one.create("six", "fd00:2::/64")


async def test_a_mode_of_a_newer_pynet(hosts):
    """A network of a mode that is not known here cannot be joined."""
    one, two, _ = hosts
    await join(one)
    newer = replace(network(one), mode="magic")
    await one.rig.state.commit(lambda d: d.put(records.network(newer.id), newer))
    with pytest.raises(Conflict, match="has mode magic, which this pynet does not"):
        await join(two)


async def test_vnis_go_round_what_is_taken(hosts):
    """A VNI is passed by if a network or a foreign device of this host has it."""
    one = hosts[0]
    await one.create("one", POOL)
    first = network(one)
    start = 10_000_000 + int(devices.digest(first.id), 16) % (2**24 - 10_000_000)
    assert first.vni == start
    await one.remove("one")
    taken = records.vni(start)
    pool = await one.pool(POOL)
    minted = only(one, Pool, "pools/").network
    start = 10_000_000 + int(devices.digest(minted), 16) % (2**24 - 10_000_000)
    taken = Vni(network="other")
    await one.rig.state.commit(lambda d: d.put(records.vni(start), taken))
    one.rig.kernel.foreign_vnis = frozenset({start + 1})
    await one.create("two", POOL)
    assert network(one).vni == start + 2
    assert pool
    await one.remove("two")
    assert await everything(hosts) == [records.vni(start)]


async def test_a_networks_record_without_members(hosts):
    """What a host could not delete, as the store was away, is replaced."""
    one, two, _ = hosts
    await one.pool(POOL)
    minted = only(one, Pool, "pools/").network
    ghost = Network(
        id=minted, mode="overlay", subnets=(), mtu=1400, vni=10_000_007, flood=True
    )

    def leave_it(draft):
        draft.put(records.network(minted), ghost)
        draft.put(records.vni(ghost.vni), Vni(network=minted))

    await one.rig.state.commit(leave_it)
    await join(one, two)
    assert (network(one).flood, network(one).mtu) == (False, 1450)
    assert only(one, Vni, "vnis/").network == minted


async def test_overlays_of_one_subnet_in_two_spaces(hosts):
    """Pools of two address spaces may overlap where the host has no route to them."""
    one, two, _ = hosts
    for host in (one, two):
        for space in ("red", "blue"):
            await level(host.rig)
            await host.create(f"{space}-{docker_id(host)}", POOL, pynet_space=space)
    await level(one.rig, two.rig)
    found = list(one.rig.state.view.all(Network, "networks/"))
    assert len(found) == 2
    assert {s.space for n in found for s in n.subnets} == {"red", "blue"}
    boxes = [await one.start(f"{n}", f"{s}-{docker_id(one)}")
             for n, s in enumerate(("red", "blue"))]  # fmt: skip
    assert boxes[0].addresses == boxes[1].addresses
    for host in (one, two):
        for box in list(host.boxes):
            await host.stop(box)
        for space in ("red", "blue"):
            await level(host.rig)
            await host.remove(f"{space}-{docker_id(host)}")
    assert await everything(hosts) == []


@pytest.mark.parametrize(
    "options", [ROUTED, {"pynet.host_access": "true"}, {"pynet.mode": "bridge"}]
)
async def test_routes_to_one_subnet_twice(hosts, options):
    """Two networks of one subnet cannot both be reached from one host."""
    one = hosts[0]
    await one.create("red", POOL, pynet_space="red", options=options)
    one.rig.site.names = {"red": "lab"}
    before = await everything(hosts)
    with pytest.raises(Conflict) as refused:
        await one.create("blue", POOL, pynet_space="blue", options=options)
    assert refusal(refused) == (
        f"subnet {POOL} overlaps {POOL} of network lab; choose another --subnet or "
        "remove that network"
    )
    assert await everything(hosts) == before
    await one.create("green", POOL, pynet_space="green")


async def test_the_drivers_name_is_part_of_the_command(hosts):
    """The command line that works has Docker's name for the driver, here a plugin's."""
    one, two, _ = hosts
    two.rig.site.driver = "pynet:latest"
    await join(one)
    with pytest.raises(Conflict) as error:
        await join(two, options={"pynet.mtu": "1300"})
    wanted = "docker network create -d pynet:latest --ipam-driver pynet:latest"
    assert wanted in refusal(error)


async def test_the_space_is_part_of_the_command(hosts):
    """The command line that joins a network names the space it is in."""
    one, two, _ = hosts
    await one.create("red", POOL, pynet_space="red")
    await level(two.rig)
    with pytest.raises(Conflict) as refused:
        await two.create("red", POOL, pynet_space="red", internal=True)
    assert refusal(refused).endswith(
        f"{CREATE} --ipam-opt pynet.space=red --subnet {POOL} NAME"
    )


async def test_a_route_of_the_joining_host(hosts):
    """A route is in the way of a network that the host routes to, and of no other."""
    one, two, three = hosts
    for host in (two, three):
        host.rig.kernel.route("10.1.0.128/25", "eth1")
    await join(one, two)
    with pytest.raises(Conflict, match="overlaps this host's route"):
        await three.pool("10.1.0.0/16", pynet_space="x")
    await one.create("routed", "10.1.0.128/26", options=ROUTED, pynet_space="y")
    await level(three.rig)
    with pytest.raises(Conflict) as refused:
        await three.create("routed", "10.1.0.128/26", pynet_space="y")
    assert refusal(refused) == (
        "pool 10.1.0.128/26 overlaps this host's route 10.1.0.128/25 dev eth1; choose "
        "another --subnet"
    )


# Hosts on their networks.


async def test_host_access_takes_an_address_on_each_host(hosts):
    """Each host has an address of each family, its own, until it leaves."""
    said = {"pynet.host_access": "true"}
    for host in hosts:
        host.checks = True
    await join(*hosts, cidrs=(POOL, POOL6), options=said)
    members = list(hosts[0].rig.state.view.all(Member, "members/"))
    addresses = [str(a) for m in members for a in m.addresses]
    assert len(set(addresses)) == 6
    own = next(m for m in members if m.host == hosts[0].rig.site.host.id)
    assert [str(a) for a in own.addresses] == ["10.1.0.1/24", "fd00:1::1/64"]
    held = reservation(hosts[1], "10.1.0.1")
    assert (held.bound, held.name, held.host) == (True, "host h1", own.host)
    with pytest.raises(Conflict, match="is taken by host h1; choose"):
        await hosts[1].address(f"local/{POOL}", "10.1.0.1")
    await hosts[0].remove(docker_id(hosts[0]))
    await level(hosts[1].rig)
    assert await hosts[1].address(f"local/{POOL}", "10.1.0.1")


async def test_host_access_in_a_sub_pool(hosts):
    """A host takes its own address from its own --ip-range."""
    one, two, _ = hosts
    said = {"pynet.host_access": "true"}
    await join(one, options=said, sub="10.1.0.64/26")
    await join(two, sub="10.1.0.128/26")
    found = list(two.rig.state.view.all(Member, "members/"))
    own = {m.host: m.ipv4.ip for m in found}
    assert own[one.rig.site.host.id] in ip_network("10.1.0.64/26")
    assert own[two.rig.site.host.id] in ip_network("10.1.0.128/26")


# MACs.


async def test_a_mac_of_another_host(hosts):
    """A MAC that a container of another host has is refused, with who has it."""
    one, two, _ = hosts
    await join(one, two)
    mac = "02:42:00:00:00:07"
    await one.start("web", docker_id(one), mac=mac)
    await level(two.rig)
    with pytest.raises(Conflict) as refused:
        await two.start("db", docker_id(two), mac=mac)
    assert refusal(refused) == (
        f"MAC {mac} is taken by web on host h1; choose another --mac-address"
    )


async def test_a_mac_wished_at_once(slow_hosts):
    """Of containers that start at once with one MAC, one gets it."""
    await join(*slow_hosts)
    mac = "02:42:00:00:00:07"
    answers = await asyncio.gather(
        *(h.start(h.rig.site.host.name, docker_id(h), mac=mac) for h in slow_hosts),
        return_exceptions=True,
    )
    assert sorted(type(a).__name__ for a in answers) == ["Box", "Conflict", "Conflict"]


async def test_macs_of_gateway_and_hosts(hosts):
    """A container cannot have the MAC of the gateway, or of a host on the network."""
    one, two, _ = hosts
    await join(one, two, options={**ROUTED, "pynet.host_access": "true"})
    members = list(two.rig.state.view.all(Member, "members/"))
    own = next(m for m in members if m.host == one.rig.site.host.id)
    for mac, owner in (
        (devices.mac(ip_address("10.1.0.1")), "the network's gateway"),
        (devices.mac(own.ipv4.ip), "host h1"),
    ):
        with pytest.raises(Conflict) as refused:
            await two.start("box", docker_id(two), mac=mac)
        assert refusal(refused) == (
            f"MAC {mac} is taken by {owner}; choose another --mac-address"
        )


async def test_no_address_whose_mac_is_taken(hosts):
    """An address whose MAC a container has chosen for itself is passed by."""
    one, two, _ = hosts
    one.checks = two.checks = True
    await join(one, two)
    await one.start("web", docker_id(one), mac=devices.mac(ip_address("10.1.0.32")))
    await level(two.rig)
    box = await two.start("db", docker_id(two))
    assert box.addresses == [ip_interface("10.1.0.33/24")]


# Addresses.


async def test_an_address_of_another_host(hosts):
    """An address that another host has is refused with container and host."""
    one, two, _ = hosts
    await join(one, two)
    await one.start("web", docker_id(one), ip="10.1.0.7")
    with pytest.raises(Conflict) as refused:
        await two.start("db", docker_id(two), ip="10.1.0.7")
    assert refusal(refused) == (
        f"address 10.1.0.7 of pool {POOL} is taken by web on host h1; choose another "
        "or remove that container"
    )
    with pytest.raises(Conflict, match=r"address 10\.1\.0\.7 is taken by web on host"):
        await two.rig.networks.create_endpoint(
            docker_id(two), "db", **families([ip_interface("10.1.0.7/24")]), mac=""
        )


async def test_an_address_without_a_name(hosts):
    """An older Docker tells no name: the short id of the endpoint stands for it."""
    one, two, _ = hosts
    await join(one, two)
    face = await one.address(f"local/{POOL}", "10.1.0.7")
    await one.rig.networks.create_endpoint(
        docker_id(one), "e" * 64, **families([face]), mac=""
    )
    with pytest.raises(Conflict, match="is taken by eeeeeeeeeeee on host h1; choose"):
        await two.address(f"local/{POOL}", "10.1.0.7")


async def test_an_address_that_another_host_gives_back_is_waited_for(hosts):
    """Who wants an address while its owner is giving it back has it a moment later."""
    one, two, _ = hosts
    await join(one, two)
    pool = f"local/{POOL}"
    await one.address(pool, "10.1.0.200")
    asking = asyncio.create_task(two.address(pool, "10.1.0.200"))
    await asyncio.sleep(0.05)
    assert not asking.done()
    await one.rig.ipam.release_address(pool, ip_address("10.1.0.200"))
    assert await asking == ip_interface("10.1.0.200/24")


async def test_an_address_goes_to_one_of_three(slow_hosts, monkeypatch):
    """An address wanted by three hosts at once goes to one, and the others are told."""
    monkeypatch.setattr(ipam, "PASSING", 0.0)
    await join(*slow_hosts)
    wins = Counter()
    for turn in range(200):
        answers = await asyncio.gather(
            *(h.address(f"local/{POOL}", "10.1.0.200", name=f"c{turn}")
              for h in slow_hosts), return_exceptions=True,
        )  # fmt: skip
        winners = [h for h, a in zip(slow_hosts, answers, strict=True)
                   if not isinstance(a, Exception)]  # fmt: skip
        assert len(winners) == 1, answers
        name = winners[0].rig.site.host.name
        for answer in answers:
            if isinstance(answer, Exception):
                assert isinstance(answer, Conflict)
                assert f"is taken by c{turn} on host {name}; choose" in str(answer)
        wins[name] += 1
        await winners[0].rig.ipam.release_address(
            f"local/{POOL}", ip_address("10.1.0.200")
        )
    assert len(wins) == 3


async def test_addresses_drawn_at_once(slow_hosts):
    """Hosts that draw addresses at once get all of a small pool, each address once."""
    await join(*slow_hosts, cidrs=("10.1.0.0/26",))
    answers = await asyncio.gather(
        *(h.address("local/10.1.0.0/26") for h in slow_hosts for _ in range(20))
    )
    assert len(set(answers)) == 60


async def test_blocks_of_other_hosts(hosts):
    """Nobody takes an address from another host's block, by whichever call."""
    one, two, _ = hosts
    await join(one, two)
    part = ip_network("10.1.0.0/27")
    key = records.block("local", ip_network(POOL), part)
    block = Block(host=one.rig.site.host.id)
    await one.rig.state.commit(lambda draft: draft.put(key, block))
    await level(two.rig)
    assert await two.address(f"local/{POOL}") == ip_interface("10.1.0.32/24")
    with pytest.raises(Conflict, match="whose addresses host h1 gives out"):
        await two.rig.networks.create_endpoint(
            docker_id(two), "db", **families([ip_interface("10.1.0.7/24")]), mac=""
        )


# A history, in small.


async def test_no_address_has_two_owners(slow_hosts):
    """
    Three hosts take and release addresses at random; every moment is checked.

    1. On each host three dockerd's threads start and stop containers on a /27, with a
       static address or one that is drawn; Docker makes the first two calls in turn.
    2. An address is somebody's from the answer to the request until the release.
    Result: no address was ever two containers', and none is lost at the end.
    """
    await join(*slow_hosts, cidrs=("10.1.0.0/27",))
    before = await everything(slow_hosts)
    owned, counts = Counter(), Counter()

    async def live(host, number, turns):
        chance = random.Random(number)
        name, boxes = docker_id(host), []
        for turn in range(57):
            if boxes and chance.random() < len(boxes) / 8:
                box = boxes.pop(chance.randrange(len(boxes)))
                owned[box.addresses[0]] -= 1
                await host.stop(box.id)
                continue
            static = chance.random() < 0.5
            ip = f"10.1.0.{chance.randrange(2, 31)}" if static else None
            try:
                async with turns:
                    box = await host.create_box(f"{number}-{turn}", name, ip=ip)
            except DriverError as error:
                counts[type(error)] += 1
                continue
            owned[box.addresses[0]] += 1
            assert owned[box.addresses[0]] == 1, box
            counts["taken"] += 1
            boxes.append(box)
        for box in boxes:
            owned[box.addresses[0]] -= 1
            await host.stop(box.id)

    turns = [asyncio.Lock() for _ in slow_hosts]
    await asyncio.gather(
        *(
            live(h, 3 * n + k, turns[n])
            for n, h in enumerate(slow_hosts)
            for k in range(3)
        )
    )
    assert counts["taken"] > 150
    assert counts[Conflict] > 20
    assert all(k == "taken" or issubclass(k, Conflict | Exhausted) for k in counts)
    assert but_blocks(await everything(slow_hosts)) == but_blocks(before)
    drawn = [await slow_hosts[0].address("local/10.1.0.0/27") for _ in range(29)]
    assert len(set(drawn)) == 29
