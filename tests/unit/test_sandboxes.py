"""Sandboxes: which endpoints can still have one."""

import time
from dataclasses import replace
from ipaddress import ip_interface

import pytest

from cnmdriver.driver import sandboxes
from cnmdriver.driver.sandboxes import Sandboxes
from cnmdriver.errors import KernelError
from cnmdriver.model import Endpoint
from cnmdriver.plan import devices
from cnmdriver.plan.ops import Veth
from tests.fakes import rig
from tests.unit.calls import Docker

ID, KEY = "e" * 64, "/run/netns/box"
JOINED = Endpoint(
    network="n",
    id=ID,
    host="h",
    boot="boot1",
    mac="02:42:0a:01:00:02",
    ipv4=ip_interface("10.1.0.2/24"),
    sandbox=KEY,
)
PAIR = Veth(
    name=devices.port(ID),
    peer=devices.peer(ID),
    mac=JOINED.mac,
    bridge="pn-1",
    mtu=1500,
    alias=devices.alias("h", "endpoint", ID),
)


@pytest.fixture
async def parts(tmp_path):
    """Build a driver whose sandbox is dead."""
    async with rig(tmp_path) as built:
        built.kernel.dead.add(KEY)
        yield built


@pytest.fixture
async def docker(tmp_path):
    """Build a driver, with Docker's side of it."""
    async with rig(tmp_path) as built:
        yield Docker(built)


@pytest.fixture
def known(parts) -> Sandboxes:
    """Know of no endpoint yet."""
    return Sandboxes(parts.site)


async def test_no_pair(known):
    """An endpoint without sandbox and without pair is gone."""
    assert await known.is_gone(JOINED)


async def test_not_joined(known):
    """An endpoint that has no sandbox yet cannot have lost it."""
    assert not await known.is_gone(replace(JOINED, sandbox=""))


async def test_sandbox_there(known, parts):
    """An endpoint whose sandbox is there is not gone, whatever the kernel holds."""
    parts.kernel.dead.clear()
    assert not await known.is_gone(JOINED)


async def test_pair_reaches_away(known, parts):
    """A pair whose far end is in a sandbox says that there is one."""
    parts.kernel.ops[PAIR.key] = replace(PAIR, peer=None, mac=None)
    assert not await known.is_gone(JOINED)


async def test_pair_is_back(known, parts):
    """A pair with both ends on the host is in no sandbox."""
    parts.kernel.ops[PAIR.key] = PAIR
    assert await known.is_gone(JOINED)


async def test_pair_of_another(known, parts):
    """Another endpoint's pair says nothing of this one."""
    other = replace(PAIR, name=devices.port("f" * 64), peer=None, mac=None)
    parts.kernel.ops[other.key] = other
    assert await known.is_gone(JOINED)


async def test_just_joined(known):
    """Right after the Join Docker has not made the sandbox yet."""
    known.joined(JOINED)
    assert not await known.is_gone(JOINED)
    assert await known.is_gone(replace(JOINED, id="f" * 64))


async def test_joined_long_ago(known, monkeypatch):
    """Some seconds after the Join the sandbox must be there."""
    known.joined(JOINED)
    now = time.monotonic() + sandboxes.STARTING
    monkeypatch.setattr(sandboxes.time, "monotonic", lambda: now - 1)
    assert not await known.is_gone(JOINED)
    monkeypatch.setattr(sandboxes.time, "monotonic", lambda: now + 1)
    assert await known.is_gone(JOINED)


async def test_left(known):
    """An endpoint that left is as one that never joined in this daemon's life."""
    known.joined(JOINED)
    known.left(JOINED)
    known.left(JOINED)
    assert await known.is_gone(JOINED)


async def test_a_device_that_was_refused_is_given_later(docker, monkeypatch):
    """A sandbox that could not get its new device gets it another time."""
    networks, kernel = docker.rig.networks, docker.rig.kernel
    monkeypatch.setattr(sandboxes, "STARTING", 0.0)
    await docker.create("n" * 64, "10.1.0.0/24")
    await docker.start(ID, "n" * 64)
    (pair,) = (key for key, op in kernel.ops.items() if isinstance(op, Veth))
    reattach = kernel.reattach

    async def refused(*_):
        raise KernelError("the kernel did not answer within 2 s")

    kernel.reattach = refused
    (said,) = await networks.reattach(frozenset({pair}))
    assert "has lost its device and got none: the kernel did not answer" in said
    kernel.reattach = reattach
    assert await networks.reattach(frozenset()) == []
    assert len(kernel.reattached) == 1
    assert networks.owed == set()
