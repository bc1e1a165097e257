"""Pools and addresses, as Docker asks for them and gives them back."""

import asyncio
import time
from ipaddress import ip_address, ip_interface, ip_network
from itertools import islice

import pytest

from cnmdriver.driver import sandboxes
from cnmdriver.driver.sync import Sync
from cnmdriver.errors import Conflict, Exhausted, InvalidParameter, NotFound
from cnmdriver.model import Block, Member, Network, Pool, Reservation, Subnet
from cnmdriver.plan import pools as arithmetic
from cnmdriver.store import records
from cnmdriver.store.records import Space
from tests.fakes import rig
from tests.unit.calls import Docker, families


def sync(docker, grace):
    """Make the loop that audits."""
    r = docker.rig
    return Sync(r.site, r.networks, r.ipam, None, grace=grace, audit=60)


async def write(docker, *pairs):
    """Write records as another host or an earlier life would have."""

    def decide(draft):
        for key, record in pairs:
            draft.put(key, record)

    await docker.rig.state.commit(decide)


def get(docker, kind, key):
    """Return a record."""
    return docker.rig.state.view.get(kind, key)


def reservation(docker, ip, cidr="10.1.0.0/24"):
    """Return who has an address."""
    key = records.address("local", ip_network(cidr), ip_address(ip))
    return get(docker, Reservation, key)


# Pools that are named.


async def test_a_named_pool(docker):
    """A named pool is given as it is, under an id that tells space and pool."""
    answer = await docker.rig.ipam.request_pool(
        space="local", pool=ip_network("10.1.0.0/24"), sub_pool=None,
        options={}, version=4,
    )  # fmt: skip
    assert answer == ("local/10.1.0.0/24", ip_network("10.1.0.0/24"))


async def test_a_sub_pool_is_part_of_the_id(docker):
    """With --ip-range the id tells the sub-pool too, and the pool stays whole."""
    answer = await docker.rig.ipam.request_pool(
        space="local", pool=ip_network("10.1.0.0/24"),
        sub_pool=ip_network("10.1.0.128/25"), options={}, version=4,
    )  # fmt: skip
    assert answer == (
        "local/10.1.0.0/24/10.1.0.128/25",
        ip_network("10.1.0.0/24"),
    )


async def test_requesting_a_named_pool_again(docker):
    """The same request twice is one claim, given back by one release."""
    one, two = await docker.pool("10.1.0.0/24"), await docker.pool("10.1.0.0/24")
    assert one == two
    await docker.rig.ipam.release_pool(one)
    assert docker.rig.records == []


async def test_a_pool_in_use_by_a_network_is_refused(docker):
    """The pool of a network here cannot be requested again; its name is told."""
    await docker.create("n" * 64, "10.1.0.0/24")
    docker.rig.site.names = {"n" * 64: "blue"}
    with pytest.raises(Conflict) as refused:
        await docker.pool("10.1.0.0/24")
    assert str(refused.value) == (
        "pool 10.1.0.0/24 is in use on this host by network blue; choose another "
        "--subnet or remove that network"
    )


async def test_a_pool_with_an_address_in_use_is_refused(docker):
    """Once an address was taken from a pool, a second request is another wish."""
    pool_id = await docker.pool("10.1.0.0/24")
    await docker.address(pool_id, gateway=True)
    with pytest.raises(Conflict, match=r"pool 10\.1\.0\.0/24 is in use on this host"):
        await docker.pool("10.1.0.0/24")


@pytest.mark.parametrize("cidr", ["10.1.0.0/25", "10.0.0.0/8", "10.1.0.255/32"])
async def test_overlapping_pools_are_refused(docker, cidr):
    """A pool that overlaps another is refused with its network's name."""
    await docker.create("n" * 64, "10.1.0.0/24")
    docker.rig.site.names = {"n" * 64: "blue"}
    with pytest.raises(Conflict) as refused:
        await docker.pool(cidr)
    assert str(refused.value) == (
        f"pool {cidr} overlaps 10.1.0.0/24 of network blue; choose another --subnet "
        "or remove that network"
    )


async def test_a_network_without_a_name_is_told_by_its_id(docker):
    """Where Docker did not tell a name, the short id stands for it."""
    await docker.create("n" * 64, "10.1.0.0/24")
    with pytest.raises(Conflict, match="of network nnnnnnnnnnnn;"):
        await docker.pool("10.1.0.0/25")


async def test_pools_side_by_side(docker):
    """Pools that only touch each other are both given, and so are both families."""
    for cidr in ("10.1.0.0/25", "10.1.0.128/25", "fd00::/64", "fd00:0:0:1::/64"):
        assert await docker.pool(cidr) == f"local/{cidr}"


async def test_a_route_of_the_host_is_in_the_way(docker):
    """A pool that overlaps a route of this host is refused with route and device."""
    docker.rig.kernel.route("192.0.2.0/24", "eth0")
    with pytest.raises(Conflict) as refused:
        await docker.pool("192.0.2.128/25")
    assert str(refused.value) == (
        "pool 192.0.2.128/25 overlaps this host's route 192.0.2.0/24 dev eth0; "
        "choose another --subnet"
    )
    assert docker.rig.records == []


async def test_a_network_of_docker_is_in_the_way(docker):
    """The subnet of a network whose addresses Docker gives out is taken too."""
    await docker.rig.networks.create(
        "n" * 64,
        subnets=(Subnet(space="x", pool=ip_network("10.1.0.0/24")),),
        options={},
        internal=False,
    )
    with pytest.raises(Conflict, match=r"overlaps 10\.1\.0\.0/24 of network nnnn"):
        await docker.pool("10.1.0.0/25")


async def test_a_space_of_its_own(docker):
    """With --ipam-opt pynet.space pools may overlap those of another space."""
    await docker.pool("10.1.0.0/24")
    pool_id = await docker.pool("10.1.0.0/24", pynet_space="lab")
    assert pool_id == "lab/10.1.0.0/24"


# Pools that are chosen.


async def test_an_empty_request_never_gives_the_same_pool_twice(docker):
    """Docker asks again while it keeps the first: each answer is another pool."""
    asked = [await docker.pool(None) for _ in range(5)]
    assert asked == [f"local/10.200.{n}.0/24" for n in range(5)]
    six = [await docker.pool(None, version=6) for _ in range(2)]
    assert six == ["local/fd70:796e:6574::/64", "local/fd70:796e:6574:1::/64"]


async def test_empty_requests_at_once(docker):
    """Many requests at one time get as many pools."""
    answers = await asyncio.gather(*(docker.pool(None) for _ in range(20)))
    assert len(set(answers)) == 20


async def test_a_released_pool_is_given_again(docker):
    """A pool that was given back is the next to be given."""
    first, second = await docker.pool(None), await docker.pool(None)
    await docker.rig.ipam.release_pool(first)
    assert await docker.pool(None) == first != second


async def test_chosen_pools_pass_by_routes_and_other_spaces(docker):
    """A chosen pool overlaps neither a route of the host nor any pool at all."""
    docker.rig.kernel.route("10.200.0.128/25", "eth0")
    await docker.pool("10.200.1.7/32", pynet_space="lab")
    assert await docker.pool(None) == "local/10.200.2.0/24"


async def test_no_default_pool_left(docker):
    """When no default is free the sentence names the ranges and what to do."""
    docker.rig.kernel.route("10.200.0.0/16", "eth0")
    with pytest.raises(Exhausted) as refused:
        await docker.pool(None)
    assert str(refused.value) == (
        "no IPv4 pool is free in 10.200.0.0/16; remove a network, name one with "
        "--subnet, or set default_pools"
    )
    docker.rig.ipam.ranges = ()
    with pytest.raises(Exhausted, match="no IPv6 pool is free in none; remove"):
        await docker.pool(None, version=6)


# Requests that cannot be.


@pytest.mark.parametrize(
    ("pool", "sub", "options", "message"),
    [
        (None, "10.1.0.0/25", {}, "--ip-range 10.1.0.0/25 needs a --subnet"),
        ("10.1.0.0/24", "10.2.0.0/25", {}, "--ip-range 10.2.0.0/25 is not inside"),
        ("10.1.0.0/24", "10.0.0.0/8", {}, "is not inside --subnet 10.1.0.0/24"),
        ("10.1.0.0/24", "fd00::/64", {}, "--ip-range fd00::/64 is not inside"),
        (None, None, {"pynet.spcae": "x"}, "unknown --ipam-opt 'pynet.spcae': known"),
        (None, None, {"space": "x"}, "known are pynet.network, pynet.space"),
        (None, None, {"pynet.space": "a/b"}, "address space 'a/b': give 1 to 64"),
        (None, None, {"pynet.space": ""}, "address space '': give 1 to 64"),
        (None, None, {"pynet.space": "x" * 65}, "give 1 to 64 letters, digits"),
        (None, None, {"pynet.space": "x\n"}, "give 1 to 64 letters, digits"),
    ],
)
async def test_bad_pool_requests(docker, pool, sub, options, message):
    """What can never be given is an InvalidParameter with the reason."""
    with pytest.raises(InvalidParameter) as refused:
        await docker.rig.ipam.request_pool(
            space="local",
            pool=ip_network(pool) if pool else None,
            sub_pool=ip_network(sub) if sub else None,
            options=options,
            version=4,
        )
    assert message in str(refused.value)
    assert docker.rig.records == []


async def test_options_of_others_are_accepted(docker):
    """An --ipam-opt of somebody else's is no error."""
    assert await docker.pool(None, org_example_key="1") == ("local/10.200.0.0/24")


async def test_a_pool_id_that_was_never_ours(docker):
    """Calls with another driver's pool id are refused, releases too."""
    ipam = docker.rig.ipam
    with pytest.raises(InvalidParameter, match="is not one that pynet gave out"):
        await docker.address("GlobalDefault/x")
    with pytest.raises(InvalidParameter):
        await ipam.release_pool("GlobalDefault/x")
    with pytest.raises(InvalidParameter):
        await ipam.release_address("GlobalDefault/x", ip_address("10.1.0.1"))


# Joining a network by its id.


async def test_a_network_named_by_its_id_on_the_same_host(docker):
    """A host joins a network once: naming its own network again is refused."""
    await docker.create("n" * 64, "10.1.0.0/24")
    (network,) = docker.rig.state.view.all(Network, "networks/")
    with pytest.raises(Conflict, match=r"is in use on this host by network nnnn"):
        await docker.pool(None, pynet_network=network.id)


async def test_an_unknown_network(docker):
    """A network that has no pool of the family is not found, with its name."""
    with pytest.raises(NotFound) as refused:
        await docker.pool(None, version=6, pynet_network="blue")
    assert str(refused.value) == (
        "network blue has no IPv6 pool; pynet network ls shows the networks there are"
    )


async def other_hosts_network(docker, *cidrs):
    """Write a network of another host."""
    pools = [ip_network(text) for text in cidrs]
    await write(
        docker,
        *(
            (
                records.pool("local", pool),
                Pool(space="local", cidr=pool, network="abc", claimed=True),
            )
            for pool in pools
        ),
        (records.space("local"), Space(claims=1)),
        (records.network("abc"), Network(id="abc", mode="bridge", subnets=(), mtu=1)),
        (
            records.member("abc", "other"),
            Member(network="abc", host="other", docker_id="x" * 64),
        ),
    )


async def test_claims_of_two_networks_on_one_pool(docker):
    """A pool of another host can be claimed here, and outlives this host's claim."""
    await other_hosts_network(docker, "10.1.0.0/24", "fd00::/64")
    before = docker.rig.records
    named = await docker.pool("10.1.0.0/24")
    six = await docker.pool(None, version=6, pynet_network="abc")
    assert (named, six) == ("local/10.1.0.0/24", "local/fd00::/64")
    host = docker.rig.site.host.id
    member = get(docker, Member, records.member("abc", host))
    assert member == Member(network="abc", host=host, claims=(named, six))
    await docker.rig.ipam.release_pool(named)
    await docker.rig.ipam.release_pool(six)
    assert docker.rig.records == before


async def test_two_claims_keep_a_provisional_pool(docker):
    """A pool claimed with and without a sub-pool lives until both are given back."""
    whole = await docker.pool("10.1.0.0/24")
    part = await docker.pool("10.1.0.0/24", sub="10.1.0.0/25")
    await docker.rig.ipam.release_pool(whole)
    address = await docker.address(part)
    assert address == ip_interface("10.1.0.1/24")
    await docker.rig.ipam.release_pool(part)
    assert docker.rig.records == []


async def test_a_claim_changes_its_space(docker):
    """Every decision about claims moves the space's record, until it has no pool."""
    pool_id = await docker.pool("10.1.0.0/24")
    assert get(docker, Space, "spaces/local") == Space(claims=1)
    await docker.pool("10.1.0.0/24")
    assert get(docker, Space, "spaces/local") == Space(claims=1)
    other = await docker.pool("10.2.0.0/24")
    assert get(docker, Space, "spaces/local") == Space(claims=2)
    await docker.rig.ipam.release_pool(pool_id)
    assert get(docker, Space, "spaces/local") == Space(claims=3)
    await docker.rig.ipam.release_pool(other)
    assert get(docker, Space, "spaces/local") is None


# Releasing pools.


async def test_releasing_what_is_not_claimed(docker):
    """A release of an unknown pool succeeds, and a second one too."""
    ipam = docker.rig.ipam
    await ipam.release_pool("local/10.1.0.0/24")
    pool_id = await docker.pool("10.1.0.0/24")
    await ipam.release_pool(pool_id)
    await ipam.release_pool(pool_id)
    assert docker.rig.records == []


async def test_releasing_a_pool_gives_its_addresses_back(docker):
    """With the last claim a pool's addresses go, also those Docker lost sight of."""
    pool_id = await docker.pool("10.1.0.0/24")
    for _ in range(3):
        await docker.address(pool_id)
    await docker.rig.ipam.release_pool(pool_id)
    assert docker.rig.records == []


async def test_a_pool_outlives_its_release_while_its_network_is_here(docker):
    """Docker releases the pool before the network; only with that it goes."""
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.rig.ipam.release_address("local/10.1.0.0/24", ip_address("10.1.0.1"))
    await docker.rig.ipam.release_pool("local/10.1.0.0/24")
    assert get(docker, Pool, "pools/local/10.1.0.0/24") is not None
    await docker.rig.networks.delete("n" * 64)
    assert (docker.rig.records, docker.rig.kernel.left) == ([], [])


# Addresses.


async def test_addresses_come_lowest_first(docker):
    """The lowest free address is given, with the pool's prefix length."""
    pool_id = await docker.pool("10.1.0.0/24")
    gateway = await docker.address(pool_id, gateway=True)
    rest = [await docker.address(pool_id) for _ in range(3)]
    assert gateway == ip_interface("10.1.0.1/24")
    assert rest == [ip_interface(f"10.1.0.{n}/24") for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("cidr", "expected"),
    [
        ("10.1.0.0/30", ["10.1.0.1", "10.1.0.2"]),
        ("10.1.0.0/31", ["10.1.0.0", "10.1.0.1"]),
        ("10.1.0.7/32", ["10.1.0.7"]),
        ("10.1.0.8/29", [f"10.1.0.{n}" for n in range(9, 15)]),
        ("fd00::/126", ["fd00::1", "fd00::2", "fd00::3"]),
        ("fd00::/127", ["fd00::", "fd00::1"]),
        ("fd00::9/128", ["fd00::9"]),
    ],
)
async def test_a_small_pool_to_its_end(docker, cidr, expected):
    """Every address of a small pool is given once; then the pool's name is told."""
    pool_id = await docker.pool(cidr)
    given = [str((await docker.address(pool_id)).ip) for _ in expected]
    assert given == expected
    with pytest.raises(Exhausted) as refused:
        await docker.address(pool_id)
    assert str(refused.value) == (
        f"pool {cidr} has no free address: {len(expected)} taken of {len(expected)}; "
        "remove containers, or use a larger --subnet"
    )


async def test_a_large_pool_is_exhausted_quickly(docker):
    """A full /16 is told in less than a second, with its counts; so is the last."""
    pool_id = await docker.pool("10.1.0.0/16")
    cidr = ip_network("10.1.0.0/16")
    host = docker.rig.site.host.id
    left = ip_address("10.1.200.7")
    every = arithmetic.candidates(cidr, None, {int(left)})
    # In parts: a commit has only so many seconds.
    while part := list(islice(every, 4096)):
        await write(
            docker,
            *(
                (
                    records.address("local", cidr, ip),
                    Reservation(space="local", cidr=cidr, ip=ip, host=host),
                )
                for ip in part
            ),
        )
    begin = time.monotonic()
    assert (await docker.address(pool_id)).ip == left
    middle = time.monotonic()
    with pytest.raises(Exhausted, match=r"10.1.0.0/16 has .*: 65534 taken of 65534;"):
        await docker.address(pool_id)
    end = time.monotonic()
    assert middle - begin < 1
    assert end - middle < 1


async def test_addresses_of_a_sub_pool(docker):
    """Unasked addresses come from the sub-pool, the gateway's too; its ends count."""
    pool_id = await docker.pool("10.1.0.0/24", sub="10.1.0.128/30")
    gateway = await docker.address(pool_id, gateway=True)
    rest = [await docker.address(pool_id) for _ in range(3)]
    assert [str(a) for a in (gateway, *rest)] == [
        f"10.1.0.{n}/24" for n in (128, 129, 130, 131)
    ]
    with pytest.raises(Exhausted, match=r"pool 10.1.0.128/30 has no .*: 4 taken of 4;"):
        await docker.address(pool_id)


async def test_asked_addresses_outside_the_sub_pool(docker):
    """Gateway, auxiliary and static addresses may lie outside the --ip-range."""
    pool_id = await docker.pool("10.1.0.0/24", sub="10.1.0.128/25")
    for text, gateway in (("10.1.0.1", True), ("10.1.0.9", False), ("10.1.0.8", False)):
        address = await docker.address(pool_id, text, gateway=gateway)
        assert address == ip_interface(f"{text}/24")
    assert await docker.address(pool_id) == ip_interface("10.1.0.128/24")
    with pytest.raises(Conflict):
        await docker.address(pool_id, "10.1.0.9")


async def test_the_count_is_of_the_sub_pool(docker):
    """What is taken outside the sub-pool is not counted in it."""
    pool_id = await docker.pool("10.1.0.0/24", sub="10.1.0.4/31")
    await docker.address(pool_id, "10.1.0.200")
    for _ in range(2):
        await docker.address(pool_id)
    with pytest.raises(Exhausted, match="2 taken of 2;"):
        await docker.address(pool_id)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.2.0.1", "address 10.2.0.1 is not in pool 10.1.0.0/24"),
        ("fd00::1", "address fd00::1 is not in pool 10.1.0.0/24"),
        ("10.1.0.0", "is the network's own or its broadcast in pool 10.1.0.0/24"),
        ("10.1.0.255", "is the network's own or its broadcast in pool 10.1.0.0/24"),
    ],
)
async def test_addresses_no_container_can_have(docker, address, message):
    """An address outside the pool or one of its ends is refused."""
    pool_id = await docker.pool("10.1.0.0/24")
    with pytest.raises(InvalidParameter) as refused:
        await docker.address(pool_id, address)
    assert message in str(refused.value)


@pytest.mark.parametrize("pool_id", ["local/10.1.0.0/24", "local/10.2.0.0/24"])
async def test_addresses_of_a_pool_nobody_claimed(docker, pool_id):
    """Only the claimed pool id gives addresses: another one is not found."""
    await docker.pool("10.1.0.0/24", sub="10.1.0.0/25")
    with pytest.raises(NotFound) as refused:
        await docker.address(pool_id)
    assert str(refused.value) == (
        f"pool {pool_id} is not in use on this host; remove its network with "
        "docker network rm and create it again"
    )


async def test_another_hosts_pool_gives_nothing_here(docker):
    """A pool that only another host claimed is not found here."""
    await other_hosts_network(docker, "10.1.0.0/24")
    with pytest.raises(NotFound):
        await docker.address("local/10.1.0.0/24")


async def test_a_released_address_is_usable_again(docker):
    """An address that was given back is the next to be given."""
    pool_id = await docker.pool("10.1.0.0/24")
    one, _ = await docker.address(pool_id), await docker.address(pool_id)
    await docker.rig.ipam.release_address(pool_id, one.ip)
    assert await docker.address(pool_id) == one


async def test_releasing_what_is_not_taken(docker):
    """A release of a free address or of an unknown pool succeeds."""
    ipam = docker.rig.ipam
    await ipam.release_address("local/10.1.0.0/24", ip_address("10.1.0.5"))
    pool_id = await docker.pool("10.1.0.0/24")
    await ipam.release_address(pool_id, ip_address("10.1.0.5"))
    await ipam.release_address(pool_id, ip_address("10.99.0.5"))
    assert list(docker.rig.state.view.all(Reservation, "addresses/")) == []


async def test_releasing_another_hosts_address(docker):
    """Another host's address stays taken."""
    await other_hosts_network(docker, "10.1.0.0/24")
    cidr, ip = ip_network("10.1.0.0/24"), ip_address("10.1.0.5")
    held = Reservation(space="local", cidr=cidr, ip=ip, host="other")
    await write(docker, (records.address("local", cidr, ip), held))
    await docker.rig.ipam.release_address("local/10.1.0.0/24", ip)
    assert reservation(docker, "10.1.0.5") == held


async def test_addresses_at_once(docker):
    """Many requests at one time get as many addresses."""
    pool_id = await docker.pool("10.1.0.0/24")
    answers = await asyncio.gather(*(docker.address(pool_id) for _ in range(50)))
    assert len(set(answers)) == 50


# Who has a taken address.


async def test_an_address_of_a_container_is_refused_with_its_name(docker):
    """A static address that a container has is refused with the container's name."""
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.start("box", "n" * 64, ip="10.1.0.7")
    with pytest.raises(Conflict) as refused:
        await docker.start("two", "n" * 64, ip="10.1.0.7")
    assert str(refused.value) == (
        "address 10.1.0.7 of pool 10.1.0.0/24 is taken by box; choose another or "
        "remove that container"
    )


async def test_an_address_of_a_container_docker_named_later(docker):
    """Without a name in the request, Docker's list names who has an address."""
    net = await docker.create("n" * 64, "10.1.0.0/24")
    pool_id, _ = net.pools[0]
    address = await docker.address(pool_id, "10.1.0.7")
    await docker.rig.networks.create_endpoint(
        net.id, "e" * 64, **families([address]), mac=""
    )
    with pytest.raises(Conflict, match="is taken by eeeeeeeeeeee; choose"):
        await docker.address(pool_id, "10.1.0.7")
    docker.rig.site.names = {"e" * 64: "web"}
    with pytest.raises(Conflict, match="is taken by web; choose"):
        await docker.address(pool_id, "10.1.0.7")


async def test_the_gateways_address_is_refused_as_such(docker):
    """A static address that is the gateway's says so."""
    await docker.create("n" * 64, "10.1.0.0/24")
    with pytest.raises(Conflict, match=r"10\.1\.0\.1 .* is taken by the network's gat"):
        await docker.address("local/10.1.0.0/24", "10.1.0.1")


async def test_an_auxiliary_address_is_refused_as_such(docker):
    """A static address that `network create` reserved says so."""
    await docker.create("n" * 64, "10.1.0.0/24", aux=("10.1.0.9",))
    with pytest.raises(Conflict, match="by a reservation of docker network create;"):
        await docker.address("local/10.1.0.0/24", "10.1.0.9")


async def test_another_hosts_address_is_refused_with_the_host(docker):
    """An address that another host took is refused with the host's short id."""
    pool_id = await docker.pool("10.1.0.0/24")
    cidr, ip = ip_network("10.1.0.0/24"), ip_address("10.1.0.5")
    held = Reservation(
        space="local", cidr=cidr, ip=ip, host="0123456789abcdef", name="web"
    )
    await write(docker, (records.address("local", cidr, ip), held))
    with pytest.raises(Conflict, match="is taken by web on host 01234567; choose"):
        await docker.address(pool_id, "10.1.0.5")


# Repeated requests.


async def test_the_gateway_again(docker):
    """The gateway's request twice gets one address, named or not."""
    pool_id = await docker.pool("10.1.0.0/24")
    first = await docker.address(pool_id, gateway=True)
    assert await docker.address(pool_id, gateway=True) == first
    assert await docker.address(pool_id, "10.1.0.1", gateway=True) == first
    assert await docker.address(pool_id) == ip_interface("10.1.0.2/24")


async def test_the_gateway_is_no_container(docker):
    """A container's wish for the gateway's address is another wish."""
    pool_id = await docker.pool("10.1.0.0/24")
    await docker.address(pool_id, "10.1.0.9", gateway=True)
    with pytest.raises(Conflict):
        await docker.address(pool_id, "10.1.0.9")
    await docker.address(pool_id, "10.1.0.8")
    with pytest.raises(Conflict):
        await docker.address(pool_id, "10.1.0.8", gateway=True)


async def test_a_static_address_again(docker):
    """A static address asked again before its endpoint was made is the same wish."""
    await docker.create("n" * 64, "10.1.0.0/24")
    pool_id = "local/10.1.0.0/24"
    first = await docker.address(pool_id, "10.1.0.7")
    assert await docker.address(pool_id, "10.1.0.7") == first
    await docker.rig.networks.create_endpoint(
        "n" * 64, "box", **families([first]), mac=""
    )
    with pytest.raises(Conflict):
        await docker.address(pool_id, "10.1.0.7")


async def test_another_driver_shows_who_it_is_by_the_name(docker):
    """Under another driver only the container's name makes a wish the same."""
    pool_id = await docker.pool("10.1.0.0/24")
    await docker.address(pool_id, "10.1.0.7", name="web")
    await docker.address(pool_id, "10.1.0.7", name="web")
    for name in ("", "db"):
        with pytest.raises(Conflict, match="is taken by web;"):
            await docker.address(pool_id, "10.1.0.7", name=name)
    await docker.address(pool_id, "10.1.0.8")
    with pytest.raises(Conflict):
        await docker.address(pool_id, "10.1.0.8")


# Blocks.


async def test_a_block_of_another_host(docker):
    """Addresses in another host's block are passed by, and refused when named."""
    pool_id = await docker.pool("10.1.0.0/24")
    cidr = ip_network("10.1.0.0/24")
    first = ip_network("10.1.0.0/27")
    await write(
        docker, (records.block("local", cidr, first), Block(host="0123456789abcdef"))
    )
    assert await docker.address(pool_id) == ip_interface("10.1.0.32/24")
    with pytest.raises(Conflict) as refused:
        await docker.address(pool_id, "10.1.0.5")
    assert str(refused.value) == (
        "address 10.1.0.5 lies in block 10.1.0.0/27, whose addresses host 01234567 "
        "gives out, which does not give this one; choose another address"
    )


async def test_a_block_of_our_own(docker):
    """A block of this host gives its addresses."""
    pool_id = await docker.pool("10.1.0.0/24")
    cidr = ip_network("10.1.0.0/24")
    own = Block(host=docker.rig.site.host.id)
    await write(docker, (records.block("local", cidr, ip_network("10.1.0.0/27")), own))
    assert await docker.address(pool_id) == ip_interface("10.1.0.1/24")
    assert await docker.address(pool_id, "10.1.0.9") == ip_interface("10.1.0.9/24")


async def test_blocks_go_with_their_pool(docker):
    """With the pool its blocks are given up."""
    pool_id = await docker.pool("10.1.0.0/24")
    cidr = ip_network("10.1.0.0/24")
    own = Block(host=docker.rig.site.host.id)
    await write(docker, (records.block("local", cidr, ip_network("10.1.0.0/27")), own))
    await docker.rig.ipam.release_pool(pool_id)
    assert docker.rig.records == []


# What binds an address, and what lets go of it.


async def test_creating_a_network_binds_its_addresses(docker):
    """Gateway and auxiliary addresses stay for as long as the network does."""
    await docker.create("n" * 64, "10.1.0.0/24", aux=("10.1.0.9",))
    for ip in ("10.1.0.1", "10.1.0.9"):
        assert reservation(docker, ip).bound
    await sync(docker, grace=0).turn()
    assert reservation(docker, "10.1.0.1").gateway
    assert reservation(docker, "10.1.0.9") is not None
    assert get(docker, Pool, "pools/local/10.1.0.0/24").claimed


async def test_an_endpoint_binds_its_addresses(docker):
    """A container's addresses are bound to its endpoint, in both families."""
    await docker.create("n" * 64, "10.1.0.0/24", "fd00::/64")
    box = await docker.start("box", "n" * 64)
    assert [str(a) for a in box.addresses] == ["10.1.0.2/24", "fd00::2/64"]
    four = reservation(docker, "10.1.0.2")
    six = reservation(docker, "fd00::2", "fd00::/64")
    assert (four.bound, four.endpoint, four.name) == (True, "box", "box")
    assert (six.bound, six.endpoint) == (True, "box")


async def test_an_endpoint_binds_in_a_space_of_its_own(docker):
    """Docker's word for a space is not the user's: addresses are bound all the same."""
    await docker.create("n" * 64, "10.1.0.0/24", pynet_space="lab")
    await docker.start("box", "n" * 64)
    await sync(docker, grace=0).turn()
    key = records.address("lab", ip_network("10.1.0.0/24"), ip_address("10.1.0.2"))
    assert get(docker, Reservation, key).endpoint == "box"
    assert (await docker.start("two", "n" * 64)).held[0][1] == ip_address("10.1.0.3")


async def test_deleting_an_endpoint_loosens_its_addresses(docker):
    """Between DeleteEndpoint and ReleaseAddress the address is nobody's, yet taken."""
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.start("box", "n" * 64)
    await docker.rig.networks.delete_endpoint("n" * 64, "box")
    held = reservation(docker, "10.1.0.2")
    assert (held.bound, held.endpoint) == (False, "")
    with pytest.raises(Conflict):
        await docker.address("local/10.1.0.0/24", "10.1.0.2", gateway=True)


async def test_provisional_addresses_lapse_after_the_grace(docker):
    """In a network's pool an address nobody used is given back, but not at once."""
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.address("local/10.1.0.0/24", "10.1.0.7")
    loop = sync(docker, grace=0.1)
    await loop.turn()
    assert reservation(docker, "10.1.0.7") is not None
    await asyncio.sleep(0.12)
    await loop.turn()
    assert reservation(docker, "10.1.0.7") is None
    assert reservation(docker, "10.1.0.1") is not None


async def test_an_address_that_was_used_in_time_stays(docker):
    """An address whose endpoint came within the grace does not lapse later."""
    await docker.create("n" * 64, "10.1.0.0/24")
    loop = sync(docker, grace=0.1)
    address = await docker.address("local/10.1.0.0/24", "10.1.0.7")
    await loop.turn()
    await docker.rig.networks.create_endpoint(
        "n" * 64, "box", **families([address]), mac=""
    )
    await asyncio.sleep(0.12)
    await loop.turn()
    assert reservation(docker, "10.1.0.7").endpoint == "box"


async def test_another_hosts_address_does_not_lapse_here(docker):
    """What another host reserved is that host's to give back."""
    await docker.create("n" * 64, "10.1.0.0/24")
    cidr, ip = ip_network("10.1.0.0/24"), ip_address("10.1.0.5")
    held = Reservation(space="local", cidr=cidr, ip=ip, host="other")
    await write(docker, (records.address("local", cidr, ip), held))
    await sync(docker, grace=0).turn()
    assert reservation(docker, "10.1.0.5") == held


async def test_under_another_driver_no_address_is_given_twice(docker):
    """`-d bridge --ipam-driver pynet`: nothing binds, nothing lapses, ever."""
    pool_id = await docker.pool("10.1.0.0/24")
    gateway = await docker.address(pool_id, gateway=True)
    first = await docker.address(pool_id, name="one")
    await sync(docker, grace=0).turn()
    second = await docker.address(pool_id, name="one")
    assert len({gateway, first, second}) == 3
    for address in (gateway, first, second):
        await docker.rig.ipam.release_address(pool_id, address.ip)
    await docker.rig.ipam.release_pool(pool_id)
    assert docker.rig.records == []


async def test_releasing_an_address_its_endpoint_still_has(docker):
    """If DeleteEndpoint was lost, ReleaseAddress removes the endpoint first."""
    await docker.create("n" * 64, "10.1.0.0/24")
    before = (docker.rig.records, docker.rig.kernel.left)
    await docker.start("box", "n" * 64)
    await docker.rig.ipam.release_address("local/10.1.0.0/24", ip_address("10.1.0.2"))
    assert (docker.rig.records, docker.rig.kernel.left) == before


async def test_a_failed_create_does_not_free_anothers_gateway(docker):
    """
    Two creates of one subnet at the same time share pool and gateway until one wins.

    1. Both get the pool and the gateway's address.
    2. The first network is created, the second is refused and gives all back.
    Result: the gateway's address is given to no container of the first.
    """
    pool_id = await docker.pool("10.1.0.0/24")
    assert await docker.pool("10.1.0.0/24") == pool_id
    gateway = await docker.address(pool_id, gateway=True)
    assert await docker.address(pool_id, gateway=True) == gateway
    subnet = Subnet(space="local", pool=ip_network("10.1.0.0/24"), gateway=gateway.ip)
    create = docker.rig.networks.create
    await create("a" * 64, subnets=(subnet,), options={}, internal=False)
    with pytest.raises(Conflict, match=r"10\.1\.0\.0/24 overlaps"):
        await create("b" * 64, subnets=(subnet,), options={}, internal=False)
    await docker.rig.ipam.release_address(pool_id, gateway.ip)
    await docker.rig.ipam.release_pool(pool_id)
    assert await docker.address(pool_id) == ip_interface("10.1.0.2/24")


async def test_reserved_addresses_are_no_containers(docker):
    """An auxiliary address whose reservation was lost is still passed by."""
    await docker.create("n" * 64, "10.1.0.0/24", aux=("10.1.0.2",))
    await docker.rig.ipam.release_address("local/10.1.0.0/24", ip_address("10.1.0.2"))
    assert await docker.address("local/10.1.0.0/24") == ip_interface("10.1.0.3/24")


async def test_everything_is_there_after_a_restart(directory):
    """Pools, claims and addresses survive the daemon."""
    async with rig(directory) as built:
        docker = Docker(built)
        pool_id = await docker.pool("10.1.0.0/24")
        await docker.address(pool_id, gateway=True)
        before = built.records
    async with rig(directory) as built:
        assert built.records == before
        docker = Docker(built)
        assert await docker.address(pool_id) == ip_interface("10.1.0.2/24")


async def test_an_address_on_its_way_out(docker):
    """
    A static address is not given while Docker is about to release it.

    1. A container is removed: its endpoint is deleted, its address not released yet.
    2. Another container wants the address: it is refused, as the release that comes
       would take the address from it.
    3. The address is released.
    Result: only then the other container gets it.
    """
    await docker.create("n" * 64, "10.1.0.0/24")
    box = await docker.start("box", "n" * 64, ip="10.1.0.7")
    await docker.rig.networks.delete_endpoint("n" * 64, "box")
    with pytest.raises(Conflict) as refused:
        await docker.start("two", "n" * 64, ip="10.1.0.7")
    assert str(refused.value) == (
        "address 10.1.0.7 of pool 10.1.0.0/24 is taken by a container that Docker is "
        "removing; choose another or remove that container"
    )
    await docker.release(box)
    await docker.start("two", "n" * 64, ip="10.1.0.7")
    assert reservation(docker, "10.1.0.7").endpoint == "two"


async def test_an_address_whose_release_was_lost(docker, monkeypatch):
    """A release that does not come in time does not hold the address for ever."""
    now = [1000.0]
    monkeypatch.setattr(sandboxes.time, "monotonic", lambda: now[0])
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.start("box", "n" * 64, ip="10.1.0.7")
    await docker.rig.networks.delete_endpoint("n" * 64, "box")
    now[0] += 9.9
    with pytest.raises(Conflict):
        await docker.address("local/10.1.0.0/24", "10.1.0.7")
    now[0] += 0.2
    assert await docker.address("local/10.1.0.0/24", "10.1.0.7")
