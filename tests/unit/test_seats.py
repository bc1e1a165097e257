"""Which interfaces are built in their sandbox, and what becomes of them there."""

import asyncio

import pytest

from cnmdriver.model import Endpoint
from cnmdriver.plan import devices, seats
from cnmdriver.plan.ops import Veth
from tests.fakes import rig
from tests.unit.calls import Docker

BUSY = frozenset({"lo", "eth0"})


@pytest.fixture
async def docker(tmp_path):
    """Return a Docker on one host whose sandboxes have a first interface."""
    async with rig(tmp_path) as made:
        made.kernel.devices = BUSY
        yield Docker(made)


async def joined(docker: Docker, **options: str) -> Endpoint:
    """Start a container on a network of its own, and return its record."""
    said = {f"pynet.{key}": value for key, value in options.items()}
    await docker.create("n1", "10.1.0.0/24", "fd00:1::/64", options=said)
    await docker.start("c1", "n1")
    return record(docker)


def record(docker: Docker) -> Endpoint:
    """Return the only endpoint."""
    (found,) = docker.rig.site.view.all(Endpoint, "endpoints/")
    return found


def pair(docker: Docker) -> Veth:
    """Return the only pair."""
    (found,) = [op for op in docker.rig.kernel.ops.values() if isinstance(op, Veth)]
    return found


@pytest.mark.parametrize(
    ("attach", "present", "direct"),
    [
        ("auto", {"lo"}, False),
        ("auto", {"lo", "sit0", "tunl0"}, False),
        ("auto", {"lo", "eth0"}, True),
        ("direct", {"lo"}, True),
        ("moved", {"lo", "eth0"}, False),
    ],
)
def test_which_way(attach, present, direct):
    """By itself only a sandbox that has an interface gets the next one built in it."""
    assert seats.is_direct(attach, present) is direct


def test_names_begin_where_docker_does_not_count():
    """The first free name from ten on is taken."""
    assert seats.free_name("eth", {"lo", "eth0"}) == "eth10"
    assert seats.free_name("eth", {"eth10", "eth11"}) == "eth12"
    assert seats.free_name("lan", {"eth10"}) == "lan10"


async def test_built_in_place(docker):
    """The record has the name, the plan the seat, and Docker is to move nothing."""
    one = await joined(docker, prefix="lan")
    assert one.device == "lan10"
    seat = pair(docker).seat
    assert seat is not None
    assert (seat.sandbox, seat.name, seat.addresses) == (
        one.sandbox,
        "lan10",
        one.addresses,
    )
    docker.rig.kernel.devices = BUSY | {"lan10"}
    again = await docker.rig.networks.join("n1", "c1", one.sandbox)
    assert (again.device, again.prefix) == ("", "")
    assert str(again.gateway4) == "10.1.0.1"
    assert record(docker).device == "lan10"


@pytest.mark.parametrize("attach", ["auto", "moved"])
async def test_moved_by_docker(docker, attach):
    """The first interface, and any where the user says so, is Docker's to move."""
    if attach == "auto":
        docker.rig.kernel.devices = frozenset({"lo"})
    one = await joined(docker, attach=attach)
    assert one.device == ""
    assert pair(docker).seat is None
    again = await docker.rig.networks.join("n1", "c1", one.sandbox)
    assert (again.device, again.prefix) == (devices.peer("c1"), "eth")


@pytest.mark.parametrize(("attach", "direct"), [("auto", False), ("direct", True)])
async def test_docker_takes_back_what_it_moved(docker, attach, direct):
    """With live-restore all is moved, but where the user wants it otherwise."""
    docker.rig.site.outlived = True
    assert bool((await joined(docker, attach=attach)).device) is direct


async def test_a_sandbox_that_cannot_be_entered(docker, capsys):
    """Docker moves what cannot be built, and that is told once."""
    docker.rig.kernel.locked = True
    one = await joined(docker)
    await docker.rig.networks.join("n1", "c1", one.sandbox)
    assert one.device == ""
    assert capsys.readouterr().out.count("network.not_direct") == 1


async def test_what_the_kernel_refuses_to_build(docker, monkeypatch):
    """What cannot be built after all is made for Docker to move, in one call."""
    kernel = docker.rig.kernel
    usual = kernel.one

    def refusing(op):
        if isinstance(op, Veth) and op.seat is not None:
            kernel.refuse.add(op.key)
        try:
            usual(op)
        finally:
            kernel.refuse.discard(op.key)

    monkeypatch.setattr(kernel, "one", refusing)
    one = await joined(docker)
    assert one.device == ""
    assert pair(docker).seat is None


async def test_put_away_when_it_is_deleted(docker):
    """Its addresses and name are out of the way before the answer."""
    await joined(docker)
    await docker.stop("c1")
    assert docker.rig.kernel.vacated == [("eth10", devices.peer("c1"))]
    assert not [op for op in docker.rig.kernel.ops.values() if isinstance(op, Veth)]


async def test_an_audit_leaves_what_a_call_is_making(docker):
    """What an endpoint that joins just now lacks is no difference."""
    one = await joined(docker)
    sandboxes = docker.rig.networks.sandboxes
    with sandboxes.joining(one):
        assert pair(docker).key in sandboxes.made_now()
    assert sandboxes.made_now() == frozenset()


async def test_an_address_waits_for_its_device(docker):
    """Who follows at an address waits until the device before is gone."""
    one = await joined(docker)
    over = asyncio.get_running_loop().create_future()
    sandboxes = docker.rig.networks.sandboxes
    sandboxes.departs(one, over)
    waiting = asyncio.create_task(sandboxes.departed(one))
    await asyncio.sleep(0)
    assert not waiting.done()
    over.set_result(None)
    await waiting
    assert sandboxes.departing == {}


def test_the_commands_that_build_it():
    """A person types the pair with its far end in the sandbox, and sets that up."""
    seat = seats.seat(
        Endpoint(network="n", id="c", host="h", boot="b", mac="02:00:00:00:00:01",
                 sandbox="/run/docker/netns/abc", device="eth10")
    )  # fmt: skip
    assert seat is not None
    op = Veth(name="pe-1", peer="pc-1", mac="02:00:00:00:00:01", bridge="pn-1",
              mtu=1500, alias="x", seat=seat)  # fmt: skip
    lines = [" ".join(command) for command in op.commands()]
    assert "peer name eth10 netns abc mtu 1500" in lines[0]
    assert lines[-2:] == [
        "ip netns exec abc sysctl -qew net/ipv6/conf/eth10/disable_ipv6=1",
        "ip -n abc link set eth10 up",
    ]
