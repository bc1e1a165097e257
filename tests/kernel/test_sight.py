"""What is seen of a host beside its own objects: sandboxes, ways, real packets."""

from collections.abc import Iterator
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from cnmdriver.dataplane import probe, sandbox
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import HOST, Veth
from cnmdriver.plan.sight import PERMANENT, Near
from tests.kernel.conftest import Namespace, kernel, namespace, run  # noqa: F401

pytestmark = pytest.mark.root

NEAR4, FAR4 = ip_address("10.7.0.1"), ip_address("10.7.0.2")
NEAR6, FAR6 = ip_address("fd07::1"), ip_address("fd07::2")
GONE = ip_address("10.7.0.77")
MAC = "02:42:0a:07:00:02"
BOTH = [(NEAR4, FAR4), (NEAR6, FAR6)]
PAIR = Veth(where=HOST, name="near", peer=None, mac=None, bridge="", mtu=1500, alias="")


@pytest.fixture
def box(host: Namespace) -> Iterator[Namespace]:
    """Return another namespace, joined to the test's own by a pair."""
    assert host
    with namespace() as other:
        add = ("ip", "link", "add", "near", "group", "28782", "type", "veth")
        peer = ("peer", "name", "far", "address", MAC, "netns", str(other.path))
        run(*add, *peer)
        run("ip", "link", "set", "near", "alias", "pynet:01234567:endpoint:e", "up")
        run("ip", "addr", "add", f"{NEAR4}/24", "dev", "near")
        run("ip", "addr", "add", f"{NEAR6}/64", "dev", "near", "nodad")
        other.run("ip", "link", "set", "far", "up")
        other.run("ip", "addr", "add", f"{FAR4}/24", "dev", "far")
        other.run("ip", "addr", "add", f"{FAR6}/64", "dev", "far", "nodad")
        yield other


@pytest.mark.parametrize(("near", "far"), BOTH)
@pytest.mark.parametrize("size", [84, 1500])
async def test_an_echo(box, near, far, size):
    """An address is pinged from a sandbox, with packets of just the size."""
    found = await probe.ping(box.path, far, near, size)
    assert (found.answered, found.error, found.size) == (True, "", size)
    assert 0 < found.milliseconds < 1800


@pytest.mark.parametrize(("near", "far"), BOTH)
async def test_from_the_host(box, near, far):
    """Without a sandbox the packets are the host's own."""
    assert (await probe.ping("", near, far)).answered


@pytest.mark.parametrize(("near", "far"), BOTH)
async def test_what_is_too_large(box, near, far):
    """What is larger than the MTU is not sent in parts."""
    found = await probe.ping(box.path, far, near, 1501)
    assert not found.answered
    assert "larger than the MTU" in found.error


async def test_a_small_mtu_on_the_way(box):
    """A packet that the other end has no room for dies, and a smaller one does not."""
    run("ip", "link", "set", "near", "mtu", "1300")
    assert (await probe.ping(box.path, FAR4, NEAR4, 1300)).answered
    assert not (await probe.ping(box.path, FAR4, NEAR4, 1400)).answered


@pytest.mark.parametrize(("near", "far"), BOTH)
async def test_a_datagram(box, near, far):
    """A datagram is refused by the far kernel, and that is an answer."""
    assert (await probe.datagram(box.path, far, near)).answered


async def test_nobody_answers(box):
    """An address that nobody has, and one that drops all, do not answer; both end."""
    found = await probe.ping(box.path, FAR4, GONE)
    assert not found.answered
    run("nft", "add table inet wall; add chain inet wall in "
        "{ type filter hook input priority 0; policy drop; }")  # fmt: skip
    found = await probe.ping(box.path, FAR4, NEAR4)
    assert (found.answered, found.error) == (False, "")
    found = await probe.datagram(box.path, FAR4, NEAR4)
    assert (found.answered, found.error) == (False, "")


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("/run/netns/none-of-that-name", FAR4, "no such file"),
        ("", GONE, "cannot assign requested address"),
    ],
)
async def test_what_cannot_be_sent(box, path, source, said):
    """A sandbox that is gone, and a source that is not there, are told in words."""
    found = await probe.ping(path, source, NEAR4)
    assert not found.answered
    assert said in found.error


async def test_the_prober_stays_where_it_is(box):
    """Nobody but the probe's own thread goes into a sandbox."""
    before = (
        Path("/proc/self/ns/net").readlink(),
        Path("/proc/thread-self/ns/net").readlink(),
    )
    await probe.ping(box.path, FAR4, NEAR4)
    assert before == (
        Path("/proc/self/ns/net").readlink(),
        Path("/proc/thread-self/ns/net").readlink(),
    )


async def test_a_look_into_a_sandbox(box, kernel):  # noqa: F811
    """The far end of a pair is read, whatever its name and MAC are by now."""
    box.run("ip", "neigh", "replace", str(NEAR4), "lladdr", "02:00:00:00:00:09",
            "dev", "far", "nud", "permanent")  # fmt: skip
    box.run("ip", "route", "add", "blackhole", "10.9.0.0/16")
    away = ip_address("10.9.0.1")
    found = await kernel.inner(box.path, PAIR, MAC, (NEAR4, NEAR6, away))
    assert found.face.name == "far"
    assert (found.face.mac, found.face.up, found.face.carrier) == (MAC, True, True)
    assert {ip_interface("10.7.0.2/24"), ip_interface("fd07::2/64")} <= set(
        found.face.addresses
    )
    assert [(way.to, way.device) for way in found.ways] == [
        (NEAR4, "far"),
        (NEAR6, "far"),
        (away, ""),
    ]
    wrong = Near(address=NEAR4, mac="02:00:00:00:00:09", state=PERMANENT)
    assert wrong in found.neighbours
    box.run("ip", "link", "set", "far", "down")
    box.run("ip", "link", "set", "far", "name", "eth9", "address", "02:00:00:00:00:08")
    found = await kernel.inner(box.path, PAIR, MAC, ())
    assert (found.face.name, found.face.up) == ("eth9", False)


async def test_a_sandbox_without_the_device(box, kernel):  # noqa: F811
    """A device that is gone is none; a sandbox that is gone is an error."""
    box.run("ip", "link", "del", "far")
    assert (await kernel.inner(box.path, PAIR, MAC, ())).face is None
    with pytest.raises(KernelError, match="entering sandbox /run/none"):
        await sandbox.look("/run/none", None, MAC, ())


async def test_the_hosts_ways(box, kernel):  # noqa: F811
    """A way says device, state and MTU; what is rejected has none."""
    found = await kernel.way(FAR4)
    assert (found.device, found.source, found.up, found.carrier, found.mtu) == (
        "near",
        NEAR4,
        True,
        True,
        1500,
    )
    box.run("ip", "link", "set", "far", "down")
    assert not (await kernel.way(FAR4)).carrier
    run("ip", "route", "add", "unreachable", f"{FAR4}/32")
    assert (await kernel.way(FAR4)).device == ""


async def test_frames_are_counted(box, kernel):  # noqa: F811
    """The frames that a device took are counted, of one that is not there none."""
    before = await kernel.received(HOST, "near")
    await probe.ping(box.path, FAR4, NEAR4)
    assert await kernel.received(HOST, "near") > before
    assert await kernel.received(HOST, "none") is None
    assert await kernel.received("no-such-place", "near") is None


async def test_filters_are_read(box, kernel):  # noqa: F811
    """Both kinds of rules are there, as the tools print them."""
    run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "4789", "-j", "DROP")
    run("nft", "add table inet wall; add chain inet wall in "
        "{ type filter hook input priority 0; }")  # fmt: skip
    found = await kernel.filters()
    listings = dict(found.listings)
    assert "-A INPUT -p udp -m udp --dport 4789 -j DROP" in listings["iptables"]
    assert '"wall"' in found.ruleset
