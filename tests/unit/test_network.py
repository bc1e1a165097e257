"""Networks, endpoints and sandboxes, as Docker's calls make and end them."""

import asyncio
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.errors import (
    Conflict,
    Exhausted,
    InvalidParameter,
    KernelError,
    NotFound,
    StoreError,
)
from cnmdriver.model import (
    Attachment,
    Endpoint,
    Member,
    Network,
    Pool,
    Reservation,
    Subnet,
)
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import Address, Bridge, Element, Sysctl, Veth
from cnmdriver.store import records
from cnmdriver.store.view import View
from tests.fakes import FakeKernel, rig
from tests.unit.calls import Docker, families, port

RED, BLUE = "red" * 20, "blue" * 16
PLAIN = Subnet(
    space="other", pool=ip_network("10.9.0.0/24"), gateway=ip_address("10.9.0.1")
)


async def plain(docker, name=RED, subnets=(PLAIN,), options=None, *, internal=False):
    """`docker network create -d pynet` with Docker's own IPAM."""
    await docker.rig.networks.create(
        name, subnets=subnets, options=options or {}, internal=internal
    )


async def endpoint(docker, name, box, *addresses, mac=""):
    """CreateEndpoint."""
    return await docker.rig.networks.create_endpoint(
        name, box, **families(addresses), mac=mac
    )


def found(docker, kind):
    """Return the records of a kind, in order of their keys."""
    places = {Network: "networks/", Member: "members/", Endpoint: "endpoints/"}
    return list(docker.rig.state.view.all(kind, places[kind]))


def differences(docker):
    """Compare the kernel with the plans."""
    held = tuple(docker.rig.kernel.ops.values())
    return list(ops.compare(docker.rig.site.desired(), held).lines())


def everything(docker):
    """Return all records and what the kernel holds."""
    return docker.rig.records, docker.rig.kernel.left


# Creating networks.


async def test_a_network_with_dockers_ipam(docker):
    """Without our IPAM the network has Docker's id, and the kernel holds its plan."""
    await plain(docker)
    (network,), (member,) = found(docker, Network), found(docker, Member)
    assert network == Network(id=RED, mode="bridge", subnets=(PLAIN,), mtu=1500)
    assert member == Member(
        network=RED, host=docker.rig.site.host.id, docker_id=RED,
        bridge=devices.bridge(RED),
    )  # fmt: skip
    assert docker.rig.kernel.ops.keys() >= {("device", "host", devices.bridge(RED))}
    assert differences(docker) == []


async def test_a_network_with_our_ipam(docker):
    """With our IPAM the network has the id minted with its pool, and holds the claim."""
    await docker.create(RED, "10.1.0.0/24")
    (network,), (member,) = found(docker, Network), found(docker, Member)
    pool = docker.rig.state.view.get(Pool, "pools/local/10.1.0.0/24")
    assert network.id == member.network == pool.network != RED
    assert member.docker_id == RED
    assert member.bridge == devices.bridge(network.id)
    assert member.claims == ("local/10.1.0.0/24",)
    assert pool.claimed
    assert differences(docker) == []


async def test_the_lowest_ipv4_pool_gives_the_id(docker):
    """Of several pools the lowest IPv4 one counts, in whatever order Docker asks."""
    cidrs = ("fd00::/64", "10.2.0.0/24", "10.1.0.0/24")
    ids = {}
    for cidr in cidrs:
        await docker.pool(cidr)
        pool = docker.rig.state.view.get(Pool, f"pools/local/{cidr}")
        ids[cidr] = pool.network
    await docker.create(RED, *cidrs)
    (network,), (member,) = found(docker, Network), found(docker, Member)
    assert network.id == ids["10.1.0.0/24"]
    assert sorted(member.claims) == sorted(f"local/{c}" for c in cidrs)
    for cidr in cidrs:
        pool = docker.rig.state.view.get(Pool, f"pools/local/{cidr}")
        assert (pool.network, pool.claimed) == (network.id, True)
    await docker.remove(RED)
    assert everything(docker) == ([], [])


async def test_an_ipv6_network_has_the_id_of_its_pool(docker):
    """Without an IPv4 pool the IPv6 pool's id counts."""
    await docker.pool("fd00::/64")
    pool = docker.rig.state.view.get(Pool, "pools/local/fd00::/64")
    await docker.create(RED, "fd00::/64")
    assert [n.id for n in found(docker, Network)] == [pool.network]


async def test_options_become_records(docker):
    """What the user said of the network is in the records, and in the plan."""
    said = {
        "com.docker.network.driver.mtu": "1400",
        "pynet.bridge": "br-lab",
        "pynet.icc": "false",
        "pynet.masquerade": "no",
        "pynet.host_binding": "127.0.0.1",
        "pynet.prefix": "net",
        "org.example": "x",
    }
    await plain(docker, options=said, internal=True)
    (network,), (member,) = found(docker, Network), found(docker, Member)
    assert network == Network(
        id=RED, mode="bridge", subnets=(PLAIN,), mtu=1400, internal=True,
        icc=False, masquerade=False, gateway="pynet",
    )  # fmt: skip
    assert member == Member(
        network=RED, host=docker.rig.site.host.id, docker_id=RED, bridge="br-lab",
        host_binding=ip_address("127.0.0.1"), prefix="net",
        options=tuple(sorted(said.items())),
    )  # fmt: skip
    assert docker.rig.kernel.ops["device", "host", "br-lab"].mtu == 1400


async def test_a_null_ipam(docker):
    """Docker's null IPAM gives 0.0.0.0/0, which is no subnet."""
    await plain(docker, subnets=(Subnet(space="null", pool=ip_network("0.0.0.0/0")),))
    assert found(docker, Network)[0].subnets == ()
    assert await endpoint(docker, RED, "box") == devices.endpoint_mac((), "box")
    await docker.rig.networks.join(RED, "box", "/s")
    assert differences(docker) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pynet.mtu": "9"}, "option pynet.mtu=9: give 68 to 65535 bytes"),
        ({"pynet.nonsense": "1"}, "unknown option 'pynet.nonsense'"),
        ({"pynet.mode": "magic"}, "option pynet.mode=magic: give bridge"),
    ],
)
async def test_bad_options_leave_nothing(docker, options, message):
    """A network with a bad option is refused before anything is made."""
    with pytest.raises(InvalidParameter, match=message):
        await plain(docker, options=options)
    assert everything(docker) == ([], [])


async def test_ipv6_needs_1280_bytes(docker):
    """An IPv6 network of less than 1280 bytes is refused, an IPv4 one is not."""
    six = Subnet(space="x", pool=ip_network("fd00::/64"))
    for mtu in ("1279", "68"):
        with pytest.raises(InvalidParameter) as refused:
            await plain(docker, subnets=(PLAIN, six), options={"pynet.mtu": mtu})
        assert str(refused.value) == (
            f"MTU {mtu} is below IPv6's least, 1280 (RFC 8200)"
        )
    await plain(docker, options={"pynet.mtu": "68"})
    await plain(docker, BLUE, (six,), {"pynet.mtu": "1280"})


async def test_the_same_create_again(docker):
    """The same create twice is one network; what the kernel lost is made again."""
    await plain(docker)
    before = everything(docker)
    docker.rig.kernel.ops.clear()
    await plain(docker)
    assert everything(docker) == before


async def test_the_same_create_again_with_our_ipam(docker):
    """A repeated create of a network with our pools is the same network."""
    net = await docker.create(RED, "10.1.0.0/24", options={"pynet.bridge": "br-lab"})
    before = everything(docker)
    await plain(docker, RED, tuple(net.subnets), {"pynet.bridge": "br-lab"})
    assert everything(docker) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"subnets": ()},
        {"subnets": (replace(PLAIN, gateway=ip_address("10.9.0.2")),)},
        {"options": {"pynet.mtu": "1400"}},
        {"options": {"org.example": "x"}},
        {"internal": True},
    ],
)
async def test_another_create_under_the_same_id(docker, changes):
    """The same id with other content is a Conflict, and changes nothing."""
    await plain(docker)
    before = everything(docker)
    docker.rig.site.names = {RED: "lab"}
    with pytest.raises(Conflict) as refused:
        await plain(docker, **changes)
    assert str(refused.value) == (
        "network lab exists here with other settings; remove it first"
    )
    assert everything(docker) == before


async def test_a_bridge_name_in_use(docker):
    """Two networks cannot have one bridge; the first is named."""
    await plain(docker, options={"pynet.bridge": "br-lab"})
    before = everything(docker)
    docker.rig.site.names = {RED: "lab"}
    with pytest.raises(Conflict) as refused:
        await docker.create(BLUE, "10.1.0.0/24", options={"pynet.bridge": "br-lab"})
    assert str(refused.value) == ("bridge name br-lab is network lab's; choose another")
    assert everything(docker) == before


@pytest.mark.parametrize("cidr", ["10.9.0.0/24", "10.9.0.128/25", "10.0.0.0/8"])
async def test_a_subnet_in_use(docker, cidr):
    """Two networks of Docker's IPAM cannot overlap; the first is named."""
    await plain(docker)
    before = everything(docker)
    subnet = Subnet(space="another", pool=ip_network(cidr))
    with pytest.raises(Conflict) as refused:
        await plain(docker, BLUE, (subnet,))
    assert str(refused.value) == (
        f"subnet {cidr} overlaps 10.9.0.0/24 of network redredredred; choose another "
        "--subnet or remove that network"
    )
    assert everything(docker) == before


async def test_networks_side_by_side(docker):
    """Networks that do not overlap share the table and nothing else."""
    await plain(docker)
    await docker.create(BLUE, "10.8.0.0/24")
    assert differences(docker) == []
    await docker.rig.networks.delete(RED)
    assert differences(docker) == []
    assert ("table", "host", "inet", "pynet") in docker.rig.kernel.ops


async def test_creates_of_one_subnet_at_once(docker):
    """Of two networks with one subnet or one bridge only one is created."""
    for options in ({}, {"pynet.bridge": "br-lab"}):
        answers = await asyncio.gather(
            *(plain(docker, name, options=options) for name in (RED, BLUE)),
            return_exceptions=True,
        )
        assert sorted(type(a) for a in answers if a) == [Conflict]
        assert len(found(docker, Network)) == 1
        for name in (RED, BLUE):
            await docker.rig.networks.delete(name)


def of(kind, name):
    """Return the key of an object of a plan."""
    return {
        "table": ("table", "host", "inet", "pynet"),
        "bridge": ("device", "host", name),
        "gateway": ("address", "host", name, "10.1.0.1/24"),
        "accept": ("accept", "host", "4"),
    }[kind]


@pytest.mark.parametrize("kind", ["table", "bridge", "gateway", "accept"])
async def test_a_kernel_that_refuses_a_network(docker, kind):
    """If the kernel refuses, nothing is left of the network, its pools included."""
    docker.rig.kernel.refuse = {of(kind, "br-lab")}
    with pytest.raises(KernelError):
        await docker.create(RED, "10.1.0.0/24", options={"pynet.bridge": "br-lab"})
    assert everything(docker) == ([], [])
    assert list(docker.rig.kernel.ops) == []
    docker.rig.kernel.refuse = set()
    await docker.create(RED, "10.1.0.0/24")


async def test_a_refused_repeat_keeps_the_network(docker):
    """If the kernel refuses a repeated create, the network stays as it was."""
    await plain(docker)
    before = docker.rig.records
    docker.rig.kernel.refuse = {("table", "host", "inet", "pynet")}
    with pytest.raises(KernelError):
        await plain(docker)
    assert docker.rig.records == before


# Removing networks.


async def test_removing_a_network(docker):
    """In Docker's order, addresses and pools first, nothing is left."""
    await docker.create(RED, "10.1.0.0/24", "fd00::/64", aux=())
    await docker.remove(RED)
    assert everything(docker) == ([], [])
    stays = [op for op in docker.rig.kernel.ops.values() if isinstance(op, Sysctl)]
    assert [op.path for op in stays] == [
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
    ]


async def test_removing_what_is_not_there(docker):
    """A removal of an unknown network succeeds, and a second one too."""
    await docker.rig.networks.delete(RED)
    await plain(docker)
    await docker.rig.networks.delete(RED)
    await docker.rig.networks.delete(RED)
    assert everything(docker) == ([], [])


async def test_removing_a_network_first(docker):
    """If the network goes before its pool, releasing what is gone succeeds."""
    net = await docker.create(RED, "10.1.0.0/24")
    await docker.rig.networks.delete(RED)
    assert everything(docker) == ([], [])
    await docker.give_back(net)
    assert everything(docker) == ([], [])


async def test_removing_a_network_in_use(docker):
    """A network goes with whatever is still attached."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED, ports=(port(80, 8080),))
    await docker.create_box("two", RED)
    await docker.rig.networks.delete(RED)
    assert everything(docker) == ([], [])


async def test_other_hosts_keep_a_network(docker):
    """What another host is a member of outlives this host's part."""
    await docker.create(RED, "10.1.0.0/24")
    (network,) = found(docker, Network)
    other = Member(network=network.id, host="other", docker_id=BLUE)
    await docker.rig.state.commit(
        lambda draft: draft.put(records.member(network.id, "other"), other)
    )
    await docker.remove(RED)
    assert found(docker, Network) == [network]
    assert found(docker, Member) == [other]
    assert docker.rig.kernel.left == []


# Creating endpoints.


async def test_the_mac_follows_the_address(docker):
    """Docker is told a MAC made of the address, IPv4's before IPv6's."""
    six = Subnet(space="x", pool=ip_network("fd00::/64"))
    await plain(docker, subnets=(PLAIN, six))
    both = ("10.9.0.2/24", "fd00::2/64")
    assert await endpoint(docker, RED, "one", *both) == "02:42:0a:09:00:02"
    only = devices.mac(ip_address("fd00::3"))
    assert await endpoint(docker, RED, "two", "fd00::3/64") == only


async def test_a_mac_of_the_user(docker):
    """A MAC that Docker chose is kept, in lower case, and not answered again."""
    await plain(docker)
    mac = "02:42:AA:BB:CC:DD"
    assert await endpoint(docker, RED, "box", "10.9.0.2/24", mac=mac) == ""
    (record,) = found(docker, Endpoint)
    assert (record.mac, record.user_mac) == ("02:42:aa:bb:cc:dd", True)
    await docker.rig.networks.join(RED, "box", "/s")
    pair = docker.rig.kernel.ops["device", "host", devices.port("box")]
    assert pair.mac == "02:42:aa:bb:cc:dd"


async def test_an_endpoint_is_a_record_first(docker):
    """CreateEndpoint touches no kernel; the record says host and boot."""
    await plain(docker)
    before = docker.rig.kernel.left
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    assert docker.rig.kernel.left == before
    assert found(docker, Endpoint) == [
        Endpoint(
            network=RED, id="box", host=docker.rig.site.host.id, boot="boot1",
            mac="02:42:0a:09:00:02", ipv4=ip_interface("10.9.0.2/24"),
        )
    ]  # fmt: skip


async def test_the_same_endpoint_again(docker):
    """The same request twice has the same answer, also after it joined."""
    await docker.create(RED, "10.1.0.0/24")
    box = await docker.start("box", RED, ports=(port(80, 8080),))
    before = everything(docker)
    assert await endpoint(docker, RED, "box", *box.addresses) == "02:42:0a:01:00:02"
    assert everything(docker) == before


@pytest.mark.parametrize(
    ("address", "mac"),
    [("10.9.0.3/24", ""), ("10.9.0.2/24", "02:42:00:00:00:01"), (None, "")],
)
async def test_another_endpoint_under_the_same_id(docker, address, mac):
    """The same id with other content is a Conflict, and changes nothing."""
    await plain(docker)
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    before = found(docker, Endpoint)
    with pytest.raises(Conflict, match="endpoint box exists with other addresses"):
        await endpoint(docker, RED, "box", *([address] if address else []), mac=mac)
    assert found(docker, Endpoint) == before


async def test_an_address_twice(docker):
    """With our IPAM an address of a living endpoint is refused with its name."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED)
    before = everything(docker)
    docker.rig.site.names = {"box": "web"}
    with pytest.raises(Conflict, match=r"^address 10\.1\.0\.2 is taken by web; choo"):
        await endpoint(docker, RED, "two", "10.1.0.2/24")
    assert everything(docker) == before


async def test_an_address_docker_gave_again(docker):
    """Docker's own IPAM gives no address twice: the first endpoint was forgotten."""
    await plain(docker)
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    await docker.rig.networks.join(RED, "box", "/s")
    await endpoint(docker, RED, "two", "10.9.0.2/24")
    assert [e.id for e in found(docker, Endpoint)] == ["two"]
    assert differences(docker) == []


async def test_a_mac_twice(docker):
    """Two endpoints of a network cannot have one MAC; on two networks they can."""
    await plain(docker)
    await docker.create(BLUE, "10.1.0.0/24")
    mac = "02:42:00:00:00:01"
    await endpoint(docker, RED, "box", "10.9.0.2/24", mac=mac)
    with pytest.raises(Conflict) as refused:
        await endpoint(docker, RED, "two", "10.9.0.3/24", mac=mac)
    assert str(refused.value) == (
        "MAC 02:42:00:00:00:01 is taken by box; choose another --mac-address"
    )
    await endpoint(docker, BLUE, "two", "10.1.0.3/24", mac=mac)


@pytest.mark.parametrize("address", ["10.8.0.2/24", "10.9.0.2/16", "fd00::2/64"])
async def test_an_address_of_no_subnet(docker, address):
    """An address that lies in no subnet, or has another prefix, is refused."""
    await plain(docker)
    with pytest.raises(InvalidParameter) as refused:
        await endpoint(docker, RED, "box", address)
    assert str(refused.value) == f"address {address} is in no subnet of the network"
    assert found(docker, Endpoint) == []


async def test_subnets_that_overlap(docker):
    """A network cannot have a subnet twice, as no record of it could be read."""
    with pytest.raises(InvalidParameter) as refused:
        await docker.rig.networks.create(
            RED, subnets=(PLAIN, PLAIN), options={}, internal=False
        )
    text = f"subnet {PLAIN.pool} overlaps {PLAIN.pool} of the same network"
    assert str(refused.value) == f"{text}; choose another"
    assert everything(docker) == ([], [])


async def test_the_gateways_address(docker):
    """An endpoint cannot have the gateway's address."""
    await plain(docker)
    with pytest.raises(Conflict, match=r"^address 10\.9\.0\.1 is the network's gatew"):
        await endpoint(docker, RED, "box", "10.9.0.1/24")


async def test_an_endpoint_on_an_unknown_network(docker):
    """Attaching to a network that is not known says what to do."""
    with pytest.raises(NotFound) as refused:
        await endpoint(docker, RED, "box", "10.9.0.2/24")
    assert str(refused.value) == (
        "network redredredred is not known here; create it again with docker network "
        "rm and docker network create"
    )


async def test_a_member_without_its_network(docker):
    """A member whose network's record is lost says so."""
    await plain(docker)
    await docker.rig.state.commit(lambda draft: draft.delete(records.network(RED)))
    with pytest.raises(NotFound, match="network redredredred has no record in the st"):
        await endpoint(docker, RED, "box", "10.9.0.2/24")


async def test_an_address_that_was_never_requested(docker):
    """An address of our pool that Docker did not request is taken with the endpoint."""
    await docker.create(RED, "10.1.0.0/24")
    await endpoint(docker, RED, "box", "10.1.0.77/24")
    key = records.address("local", ip_network("10.1.0.0/24"), ip_address("10.1.0.77"))
    held = docker.rig.state.view.get(Reservation, key)
    assert (held.bound, held.endpoint, held.host) == (
        True, "box", docker.rig.site.host.id,
    )  # fmt: skip
    with pytest.raises(Conflict):
        await docker.address("local/10.1.0.0/24", "10.1.0.77")


# Joining and leaving.


async def test_join_makes_the_pair(docker):
    """Join makes the pair and answers device, prefix and gateways."""
    await docker.create(RED, "10.1.0.0/24", "fd00::/64")
    await docker.create_box("box", RED)
    answer = await docker.rig.networks.join(RED, "box", "/run/docker/netns/1")
    assert answer == Attachment(
        device=devices.peer("box"), prefix="eth",
        gateway4=IPv4Address("10.1.0.1"), gateway6=IPv6Address("fd00::1"),
        disable_gateway_service=True,
    )  # fmt: skip
    assert ("device", "host", devices.port("box")) in docker.rig.kernel.ops
    assert differences(docker) == []


@pytest.mark.parametrize(
    ("options", "internal", "disabled"),
    [({}, True, True), ({"pynet.gateway": "docker"}, False, False)],
)
async def test_join_without_a_gateway(docker, options, internal, disabled):
    """Internal networks have no gateway; where Docker is gateway it may serve."""
    await plain(docker, options={**options, "pynet.prefix": "net"}, internal=internal)
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    answer = await docker.rig.networks.join(RED, "box", "/s")
    assert answer == Attachment(
        device=devices.peer("box"), prefix="net", disable_gateway_service=disabled
    )


async def test_only_families_the_endpoint_has(docker):
    """A gateway is answered only for a family the endpoint has an address of."""
    await docker.create(RED, "10.1.0.0/24", "fd00::/64")
    await endpoint(docker, RED, "box", "fd00::9/64")
    answer = await docker.rig.networks.join(RED, "box", "/s")
    assert (answer.gateway4, answer.gateway6) == (None, IPv6Address("fd00::1"))


async def test_the_gateway_of_the_addresss_own_subnet(docker):
    """Of several subnets the one that holds the address has the gateway."""
    await docker.create(RED, "10.1.0.0/24", "10.2.0.0/24")
    await endpoint(docker, RED, "box", "10.2.0.9/24")
    answer = await docker.rig.networks.join(RED, "box", "/s")
    assert answer.gateway4 == IPv4Address("10.2.0.1")


async def test_the_same_join_again(docker):
    """The same Join twice has the same answer, and changes nothing."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create_box("box", RED)
    first = await docker.rig.networks.join(RED, "box", "/s")
    before = everything(docker)
    assert await docker.rig.networks.join(RED, "box", "/s") == first
    assert everything(docker) == before


async def test_joining_what_is_not_known(docker):
    """Join and EndpointOperInfo of an unknown endpoint say what to do."""
    await plain(docker)
    docker.rig.site.names = {RED: "lab"}
    for call in (
        docker.rig.networks.join(RED, "b" * 64, "/s"),
        docker.rig.networks.info(RED, "b" * 64),
        docker.rig.networks.program(RED, "b" * 64, ports=(), ipv6=True),
    ):
        with pytest.raises(NotFound) as refused:
            await call
        assert str(refused.value) == (
            "endpoint bbbbbbbbbbbb is not known on network lab; disconnect the "
            "container and connect it"
        )


async def test_a_kernel_that_refuses_a_join(docker):
    """If the kernel refuses the pair, the endpoint is as before Join."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.create_box("box", RED)
    before = everything(docker)
    was = found(docker, Endpoint)
    docker.rig.kernel.refuse = {("device", "host", devices.port("box"))}
    with pytest.raises(KernelError):
        await docker.rig.networks.join(RED, "box", "/s")
    assert everything(docker) == before
    assert found(docker, Endpoint) == was
    docker.rig.kernel.refuse = set()
    await docker.rig.networks.join(RED, "box", "/s")
    assert differences(docker) == []


@pytest.mark.parametrize("calls", [["delete"], ["leave", "leave", "delete", "delete"]])
async def test_roll_backs_of_a_failed_start(docker, calls):
    """After a failed Join Docker deletes with or without Leave, once or twice."""
    net = await docker.create(RED, "10.1.0.0/24")
    before = everything(docker)
    box = await docker.create_box("box", RED)
    docker.rig.kernel.refuse = {("device", "host", devices.port("box"))}
    with pytest.raises(KernelError):
        await docker.rig.networks.join(net.id, "box", "/s")
    for call in calls:
        if call == "leave":
            await docker.rig.networks.leave(net.id, "box")
        else:
            await docker.rig.networks.delete_endpoint(net.id, "box")
    await docker.release(box)
    assert everything(docker) == before


async def test_deleting_implies_leaving_implies_revoking(docker):
    """DeleteEndpoint alone takes back ports, pair and record."""
    await docker.create(RED, "10.1.0.0/24")
    before = everything(docker)
    box = await docker.start("box", RED, ports=(port(80, 8080), port(53)))
    await docker.rig.networks.delete_endpoint(RED, "box")
    await docker.release(box)
    assert everything(docker) == before


async def test_leaving_revokes_and_keeps_the_pair(docker):
    """After Leave nothing is published, but Docker still moves the device back."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED)
    plainly = everything(docker)
    await docker.rig.networks.program(RED, "box", ports=(port(80, 8080),), ipv6=True)
    await docker.rig.networks.leave(RED, "box")
    assert everything(docker) == plainly
    assert differences(docker) == []


async def test_removing_calls_succeed_on_unknown_ids(docker):
    """Revoke, Leave and DeleteEndpoint succeed on what is not there."""
    drivers = docker.rig.networks
    for call in (drivers.revoke, drivers.leave, drivers.delete_endpoint):
        await call(RED, "box")
    await plain(docker)
    before = everything(docker)
    for call in (drivers.revoke, drivers.leave, drivers.delete_endpoint):
        await call(RED, "box")
    assert everything(docker) == before


async def test_leave_without_join(docker):
    """Docker sends Leave for a Join that it could not finish."""
    await docker.create(RED, "10.1.0.0/24")
    before = everything(docker)
    box = await docker.create_box("box", RED)
    await docker.rig.networks.leave(RED, "box")
    await docker.rig.networks.leave(RED, "box")
    await docker.rig.networks.delete_endpoint(RED, "box")
    await docker.release(box)
    assert everything(docker) == before


async def test_the_endpoint_of_another_network(docker):
    """An endpoint is only found on its own network."""
    await plain(docker)
    await docker.create(BLUE, "10.1.0.0/24")
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    before = everything(docker)
    await docker.rig.networks.delete_endpoint(BLUE, "box")
    assert everything(docker) == before
    with pytest.raises(NotFound):
        await docker.rig.networks.info(BLUE, "box")
    await docker.rig.networks.info(RED, "box")


async def test_another_hosts_endpoint(docker):
    """Another host's endpoint is neither joined nor removed here."""
    await plain(docker)
    other = Endpoint(
        network=RED, id="box", host="other", boot="b", mac="02:42:0a:00:00:63"
    )
    await docker.rig.state.commit(
        lambda draft: draft.put(records.endpoint(RED, "box"), other)
    )
    await docker.rig.networks.delete_endpoint(RED, "box")
    assert found(docker, Endpoint) == [other]
    with pytest.raises(NotFound):
        await docker.rig.networks.join(RED, "box", "/s")


async def test_containers_without_traffic_among_them(docker):
    """With icc off each pair is isolated."""
    await plain(docker, options={"pynet.icc": "false"})
    await endpoint(docker, RED, "box", "10.9.0.2/24")
    await docker.rig.networks.join(RED, "box", "/s")
    pair = docker.rig.kernel.ops["device", "host", devices.port("box")]
    assert isinstance(pair, Veth)
    assert pair.isolated


async def test_tear_down_in_parallel(docker):
    """Twenty containers end at the same time, each with all its calls."""
    await docker.create(RED, "10.1.0.0/24")
    before = everything(docker)
    names = [f"box{n}" for n in range(20)]
    for name in names:
        await docker.start(name, RED, ports=(port(80),))
    await asyncio.gather(*(docker.stop(name) for name in names))
    assert everything(docker) == before


# Cancels: a call's time limit ends it, and Docker takes it for failed.


class Slow(FakeKernel):
    """A kernel that takes its time, until a test lets it go on."""

    def __init__(self):
        super().__init__()
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def apply(self, plan, still=lambda plan: plan):
        self.begun.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        await super().apply(plan, still)


async def cancelled(work, kernel):
    """Cancel a call when it has reached the kernel."""
    kernel.begun.clear()
    kernel.gate.clear()
    task = asyncio.create_task(work)
    await kernel.begun.wait()
    task.cancel()
    await asyncio.wait({task})
    kernel.gate.set()
    assert task.cancelled()


@pytest.fixture
async def slow(directory):
    """Play Docker's calls against a slow kernel."""
    async with rig(directory, Slow()) as built:
        yield Docker(built)


async def test_a_cancelled_create_leaves_nothing(slow):
    """A create that ran into its time limit is taken back: Docker forgets it."""
    kernel = slow.rig.kernel
    await cancelled(plain(slow), kernel)
    assert everything(slow) == ([], [])
    await plain(slow)
    await cancelled(plain(slow), kernel)
    assert [n.id for n in found(slow, Network)] == [RED]


async def test_a_cancelled_join_leaves_the_endpoint_as_it_was(slow):
    """A Join that ran into its time limit is taken back."""
    await slow.create(RED, "10.1.0.0/24")
    await slow.create_box("box", RED)
    was, before = found(slow, Endpoint), everything(slow)
    await cancelled(slow.rig.networks.join(RED, "box", "/s"), slow.rig.kernel)
    assert found(slow, Endpoint) == was
    assert everything(slow) == before


async def at_commit(docker, work, step):
    """Cancel a call at a step of its commit."""
    task = asyncio.create_task(work)

    async def hook(name):
        if name == step:
            docker.rig.state.step = quiet
            task.cancel()

    async def quiet(name):
        pass

    docker.rig.state.step = hook
    await asyncio.wait({task})
    return task


@pytest.mark.parametrize("step", ["commit.before", "commit.after"])
async def test_a_create_cancelled_at_its_commit(slow, step):
    """Whether or not the record was written, nothing of it stays."""
    task = await at_commit(slow, plain(slow), step)
    assert task.cancelled()
    assert everything(slow) == ([], [])


async def test_an_endpoint_cancelled_at_its_commit(docker):
    """A CreateEndpoint that ran into its time limit leaves no endpoint."""
    await plain(docker)
    work = endpoint(docker, RED, "box", "10.9.0.2/24")
    task = await at_commit(docker, work, "commit.before")
    assert task.cancelled()
    assert found(docker, Endpoint) == []


# Races with a slow kernel.


async def test_networks_come_and_go_at_once(slow):
    """A network that goes takes nothing that another one came to stand on."""
    subnets = [
        Subnet(space="x", pool=ip_network(f"10.{n}.0.0/24")) for n in range(1, 5)
    ]

    async def live(number):
        for _ in range(4):
            await plain(slow, f"net{number}", (subnets[number],))
            await asyncio.sleep(0)
            await slow.rig.networks.delete(f"net{number}")
        await plain(slow, f"net{number}", (subnets[number],))

    await asyncio.gather(*(live(number) for number in range(4)))
    assert differences(slow) == []


# When the store is away.


class Away:
    """A store that can go away."""

    def __init__(self, store):
        self.store = store
        self.gone = False

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def commit(self, change, lease=None):
        if self.gone:
            raise StoreError("the store is away")
        return await self.store.commit(change, lease)


async def test_removing_without_the_store(docker):
    """
    Detaching needs no store; what it could not write is written when it is back.

    1. A container runs; the store goes away; the container stops, the network goes.
    2. The store comes back, and the next call finds everything in order.
    Result: nothing is left in the kernel at once, and none of our records later.
    """
    store = docker.rig.state.store = Away(docker.rig.state.store)
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED, ports=(port(80, 8080),))
    store.gone = True
    await docker.stop("box")
    await docker.remove(RED)
    assert docker.rig.kernel.left == []
    assert found(docker, Endpoint) == found(docker, Member) == []
    store.gone = False
    await docker.rig.state.catch_up()
    left = (await store.read("")).items
    assert not [k for k in left if k.startswith(("endpoints/", "members/"))]
    await docker.create(RED, "10.2.0.0/24")


async def test_attaching_without_the_store(docker):
    """Attaching needs the store: it fails with a sentence and leaves nothing."""
    store = docker.rig.state.store = Away(docker.rig.state.store)
    await docker.create(RED, "10.1.0.0/24")
    before = everything(docker)
    store.gone = True
    with pytest.raises(StoreError, match="the store is away"):
        await docker.start("box", RED)
    store.gone = False
    assert everything(docker) == before


async def test_what_is_made_again_outlives_what_was_deferred(docker):
    """
    A removal that waits for the store must not undo what came after it.

    1. The store goes away for the time of one removal, though it did hear of it.
    2. The same address is taken again by another container.
    3. The waiting removals are replayed.
    Result: the second container keeps its address.
    """
    store = docker.rig.state.store
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED)

    class Deaf(Away):
        async def commit(self, change, lease=None):
            revision = await self.store.commit(change, lease)
            if self.gone:
                raise StoreError("no answer")
            return revision

    deaf = docker.rig.state.store = Deaf(store)
    deaf.gone = True
    await docker.stop("box")
    deaf.gone = False
    box = await docker.start("two", RED)
    assert [str(a) for a in box.addresses] == ["10.1.0.2/24"]
    await docker.rig.state.catch_up()
    key = records.address("local", ip_network("10.1.0.0/24"), ip_address("10.1.0.2"))
    assert docker.rig.state.view.get(Reservation, key).endpoint == "two"
    assert key in (await store.read("")).items


# The rest.


async def test_swarms_manager(docker):
    """AllocateNetwork checks the options and answers them; FreeNetwork forgets."""
    networks = docker.rig.networks
    said = {"pynet.mtu": "1400", "org.example": "x"}
    assert await networks.allocate(RED, subnets=(PLAIN,), options=said) == said
    with pytest.raises(InvalidParameter):
        await networks.allocate(RED, subnets=(), options={"pynet.mtu": "1"})
    await networks.free(RED)
    await networks.discover("192.0.2.1", gone=False, own=True)
    assert everything(docker) == ([], [])


def test_gateway_checks(docker):
    """Docker need not request a gateway only where it is the gateway itself."""
    networks = docker.rig.networks
    assert networks.skips_gateway({"pynet.gateway": "docker"}, internal=False)
    assert not networks.skips_gateway({}, internal=False)
    assert not networks.skips_gateway({}, internal=True)
    with pytest.raises(InvalidParameter):
        networks.skips_gateway({"pynet.gateway": "x"}, internal=False)


async def test_the_plan_of_what_is_gone(docker):
    """A member without its network, or an endpoint of a dead boot, has no plan."""
    await docker.create(RED, "10.1.0.0/24")
    await docker.start("box", RED)
    site = docker.rig.site
    (member,), (box,) = found(docker, Member), found(docker, Endpoint)
    assert site.network_plan(replace(member, network="x")) == ()
    assert site.endpoint_plan(replace(box, network="x")) == ()
    assert site.endpoint_plan(replace(box, boot="old")) == ()
    assert site.endpoint_plan(replace(box, sandbox="")) == ()
    assert {type(op) for op in site.endpoint_plan(box)} == {Element, Veth}
    kinds = {type(op) for op in site.network_plan(member)}
    assert kinds >= {Bridge, Address}


async def test_exhausted_networks_leave_nothing(docker):
    """A container that gets no address leaves nothing behind."""
    await docker.create(RED, "10.1.0.0/30")
    await docker.start("box", RED)
    before = everything(docker)
    with pytest.raises(Exhausted):
        await docker.start("two", RED)
    assert everything(docker) == before


async def test_a_container_costs_no_more_beside_many(docker, monkeypatch):
    """What is looked at for one that comes and goes does not grow with the others."""
    await docker.create(RED, "10.1.0.0/16")
    looked = []
    in_order = View.in_order

    def counted(view, name):
        found = in_order(view, name)
        looked.extend(found)
        return found

    monkeypatch.setattr(View, "in_order", counted)
    took = []
    for many in (3, 60):
        for number in range(len(docker.boxes), many):
            await docker.start(f"{number:064}", RED)
        await docker.start("last" * 16, RED)
        await docker.stop("last" * 16)
        looked.clear()
        await docker.start("next" * 16, RED)
        await docker.stop("next" * 16)
        took.append(len(looked))
    assert took[0] == took[1]
