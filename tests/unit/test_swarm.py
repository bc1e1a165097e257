"""Swarm: the manager allocates a network, nodes create it, and the manager frees it."""

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cnmdriver.driver.sync import Sync
from cnmdriver.errors import Conflict, InvalidParameter
from cnmdriver.model import Endpoint, Network, Subnet
from cnmdriver.plan import devices
from cnmdriver.plan.options import VNIS
from tests.fakes import cluster, level
from tests.unit.calls import Docker

BLUE = "pshc0g59b755s4u5cuoahfqta"
POOL = ip_network("10.140.0.0/24")
SUBNET = Subnet(space="", pool=POOL, gateway=ip_address("10.140.0.1"))


@pytest.fixture
async def nodes(directory):
    """Play the dockerds of a manager and two workers, on one store."""
    async with cluster(directory, 3) as rigs:
        yield [Docker(one) for one in rigs]


async def allocate(node, **said):
    """AllocateNetwork, as the manager's dockerd asks for it."""
    await level(node.rig)
    return await node.rig.networks.allocate(BLUE, subnets=(SUBNET,), options=said)


async def create(node, options, *, internal=False):
    """CreateNetwork, as a node asks for it when its first container comes."""
    await level(node.rig)
    local = Subnet(space="LocalDefault", pool=POOL, gateway=SUBNET.gateway)
    await node.rig.networks.create(
        BLUE, subnets=(local,), options=options, internal=internal
    )


async def place(node, name, ip):
    """CreateEndpoint with an address that the manager has chosen."""
    await node.rig.networks.create_endpoint(
        BLUE, name * 64, ipv4=ip_interface(f"{ip}/24"), ipv6=None, mac=""
    )


def network(node):
    """Return the record of the network, None if there is none."""
    return node.rig.state.view.get(Network, f"networks/{BLUE}")


async def test_a_network_from_the_manager_to_the_nodes_and_back(nodes):
    """All nodes have the manager's VNI; the network is there until it is freed."""
    manager, one, two = nodes
    given = await allocate(manager, **{"pynet.mtu": "1400"})
    found = network(manager)
    assert given == {"pynet.mtu": "1400", VNIS: str(found.vni)}
    assert (found.mode, found.mtu, found.swarm) == ("overlay", 1400, True)
    for node in (one, two):
        await create(node, given)
        assert ("device", "pynet", devices.vxlan(BLUE)) in node.rig.kernel.ops
    assert {network(node).vni for node in (one, two)} == {found.vni}
    for node in (one, two):
        await node.rig.networks.delete(BLUE)
        assert node.rig.kernel.ops == {}
    await level(manager.rig)
    assert network(manager) == found
    await manager.rig.networks.free(BLUE)
    keys = manager.rig.records
    assert [k for k in keys if k.startswith(("networks/", "vnis/", "members/"))] == []


async def test_a_second_manager_allocates_the_same(nodes):
    """AllocateNetwork again, on whichever manager, answers as before."""
    manager, other, _ = nodes
    given = await allocate(manager)
    assert await allocate(manager, **given) == given
    assert await allocate(other, **given) == given


async def test_a_network_freed_while_a_node_has_it(nodes):
    """It goes with the last node's part."""
    manager, one, _ = nodes
    await create(one, await allocate(manager))
    await level(manager.rig)
    await manager.rig.networks.free(BLUE)
    await level(one.rig)
    assert network(one) is not None
    await one.rig.networks.delete(BLUE)
    assert network(one) is None
    await manager.rig.networks.free(BLUE)


async def test_audits_leave_a_network_without_nodes(nodes):
    """What the manager has allocated is not taken for forgotten."""
    manager, *_ = nodes
    await allocate(manager)
    r = manager.rig
    await Sync(r.site, r.networks, r.ipam, None, grace=0, audit=60).forget_unused()
    assert network(manager) is not None


async def test_endpoints_have_the_addresses_of_the_manager(nodes):
    """Nodes take what the manager gave them; one address twice is refused."""
    manager, one, two = nodes
    given = await allocate(manager)
    await create(one, given)
    await create(two, given)
    await place(one, "a", "10.140.0.2")
    await place(two, "b", "10.140.0.3")
    await level(one.rig)
    held = one.rig.state.view.all(Endpoint, f"endpoints/{BLUE}/")
    assert sorted(str(e.ipv4) for e in held) == ["10.140.0.2/24", "10.140.0.3/24"]
    with pytest.raises(Conflict, match=r"10\.140\.0\.3 is taken"):
        await place(one, "c", "10.140.0.3")


async def test_internal_is_heard_by_nodes_alone(nodes):
    """AllocateNetwork does not say `--internal`; the nodes' CreateNetwork does."""
    manager, one, two = nodes
    given = await allocate(manager)
    await create(one, given, internal=True)
    await create(two, given, internal=True)
    assert network(two).internal


async def test_what_a_swarm_cannot_have(nodes):
    """Addresses of pynet's own are refused, and such of the hosts."""
    manager, *_ = nodes
    with pytest.raises(InvalidParameter, match="without"):
        await allocate(manager, **{"pynet.host_access": "true"})
    await manager.pool(str(POOL))
    with pytest.raises(InvalidParameter, match="without --ipam-driver"):
        await allocate(manager)
    assert network(manager) is None
