"""Overlays on the real kernel: hosts that are joined by VXLAN."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from cnmdriver.errors import Conflict, InvalidParameter, KernelError
from cnmdriver.plan import devices
from cnmdriver.plan.ops import (
    FLOOD,
    Address,
    Bridge,
    Fdb,
    Namespace,
    Neighbour,
    Veth,
    Vxlan,
    compare,
    union,
)

from .conftest import namespace as bare
from .conftest import run
from .sides import V4, V6, alone, elsewhere, net, other_kernel, pair

pytestmark = pytest.mark.root

NETS = {
    "docker": net(),
    "v4": net("10.210.2.0/24"),
    "v6": net("fd00:210:2::/64"),
    "gateway": net(gateway="pynet"),
    "access": net(host_access=True),
    "both": net(gateway="pynet", host_access=True),
    "flood": net(flood=True),
    "icc_off": net(icc=False),
    "internal": net(internal=True),
    "small": net("10.210.3.0/24", mtu=1200),
}
NET = NETS["both"]
BRIDGE, VXLAN = devices.bridge(NET.id), devices.vxlan(NET.id)
GATEWAY, ACCESS = devices.gateway(NET.id), devices.access(NET.id)
BAD = Address(device="pn-nowhere", interface=ip_interface("10.9.9.9/24"))


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def network(request):
    """Give each kind of overlay in turn."""
    return request.param


@pytest.fixture
async def one(tmp_path):
    """Make a host that has nobody to talk to."""
    async with alone(tmp_path) as made:
        yield made


def whole(host, network, remotes=3):
    """Return the plan of an overlay with an endpoint here and some elsewhere."""
    own = host.endpoint(network, 2)
    others = host.remote(network, *elsewhere(remotes))
    flood = [
        Fdb(
            where=host.host.namespace,
            device=devices.vxlan(network.id),
            mac=FLOOD,
            dst=ip_address(f"192.0.2.{n}"),
        )
        for n in ((7, 8) if network.flood else ())
    ]
    return union((host.plan(network, own, others=others), tuple(flood)))


async def test_found_is_what_was_applied(one, network):
    """After apply nothing lacks, differs or is too much; clear leaves nothing."""
    plan = whole(one, network)
    await one.apply(plan)
    assert await one.lines(plan) == []
    before = indexes(one)
    await one.apply(plan)
    assert await one.lines(plan) == []
    assert indexes(one) == before
    await one.clear(plan)
    await one.clear(plan)
    assert await one.rest() == ()
    assert one.left() == []


def indexes(host):
    """Return the index of each device on a host and in pynet's namespace."""
    texts = (host.space.run("ip", "-j", "link"), host.own("ip", "-j", "link"))
    return [{x["ifname"]: x["ifindex"] for x in json.loads(t)} for t in texts]


async def test_clear_of_what_never_was(one, network):
    """Clearing a plan that was never applied succeeds."""
    await one.clear(whole(one, network))
    assert one.left() == []


async def test_apply_after_a_crash(one, tmp_path):
    """Another life of the daemon adopts what there is, and takes it back whole."""
    plan = whole(one, NET)
    await one.apply(plan)
    before = indexes(one)
    await one.kernel.close()
    again = other_kernel(one, tmp_path)
    with one.entered():
        await again.open()
        assert list(compare(plan, await again.found(plan)).lines()) == []
        await again.apply(plan)
        assert indexes(one) == before
        await again.clear(plan)
        await again.close()
    assert one.left() == []


class Stop(Exception):
    """Raised by a step hook."""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["both", "flood"])
async def test_undo_at_each_step(one, tmp_path, name):
    """Wherever apply is stopped, nothing of the plan is left; then it can be applied."""
    plan = whole(one, NETS[name])
    for at in range(len(plan)):
        steps = []

        async def stop(step, at=at, steps=steps):
            steps.append(step)
            if len(steps) > at:
                raise Stop

        kernel = other_kernel(one, tmp_path, stop)
        with one.entered():
            await kernel.open()
            with pytest.raises(Stop):
                await kernel.apply(plan)
            await kernel.close()
        assert one.left() == [], steps[-1]
    await one.apply(plan)
    assert await one.lines(plan) == []


async def test_undo_leaves_what_was_there(one):
    """A plan that fails takes back its own entries, and no other's."""
    first, second = one.remote(NET, elsewhere(2)[0]), one.remote(NET, elsewhere(2)[1])
    plan = one.plan(NET, others=first)
    await one.apply(plan)
    with pytest.raises(KernelError, match="pn-nowhere"):
        await one.apply((*first, *second, BAD))
    assert await one.lines(plan) == []


def changes():
    """Return what a stranger may do to an overlay, by name."""
    bridge, link = ("bridge", "fdb"), ("ip", "link", "set")
    remote = elsewhere(1)[0]
    port, v4 = devices.gateway_port(NET.id), str(remote.addresses[0])
    pe = devices.port(f"ep-{NET.id}-2")
    inside = {
        "bridge mac": (*link, BRIDGE, "address", "02:00:00:00:00:99"),
        "bridge down": (*link, BRIDGE, "down"),
        "bridge gone": ("ip", "link", "del", BRIDGE),
        "tunnel down": (*link, VXLAN, "down"),
        "tunnel gone": ("ip", "link", "del", VXLAN),
        "tunnel loose": (*link, VXLAN, "nomaster"),
        "tunnel mtu": (*link, VXLAN, "mtu", "1300"),
        "learning": ("bridge", "link", "set", "dev", VXLAN, "learning", "on"),
        "flood": ("bridge", "link", "set", "dev", VXLAN, "mcast_flood", "on"),
        "suppress": ("bridge", "link", "set", "dev", VXLAN, "neigh_suppress", "off"),
        "isolated": ("bridge", "link", "set", "dev", VXLAN, "isolated", "on"),
        "fdb self": (*bridge, "del", remote.mac, "dev", VXLAN, "self"),
        "fdb master": (*bridge, "del", remote.mac, "dev", VXLAN, "master"),
        "fdb moved": (*bridge, "replace", remote.mac, "dev", pe, "master", "static"),
        "fdb other": (*bridge, "replace", remote.mac, "dev", VXLAN, "dst", "192.0.2.99"),
        "fdb surplus": (*bridge, "add", "02:00:00:00:00:88", "dev", VXLAN, "dst", "192.0.2.9"),
        "neighbour": ("ip", "neigh", "del", v4, "dev", BRIDGE),
        "neighbour other": ("ip", "neigh", "replace", v4, "lladdr", "02:00:00:00:00:77", "dev", BRIDGE, "nud", "permanent"),
        "pair gone": ("ip", "link", "del", port),
        "table": ("nft", "delete", "table", "bridge", "pynet"),
        "element": ("nft", "flush", "set", "bridge", "pynet", "gateways"),
        "no ipv6": ("sysctl", "-qw", f"net/ipv6/conf/{BRIDGE}/disable_ipv6=1"),
    }  # fmt: skip
    outside = {
        "gateway down": (*link, GATEWAY, "down"),
        "gateway alias": (*link, GATEWAY, "alias", ""),
        "gateway gone": ("ip", "link", "del", GATEWAY),
        "gateway renamed": (*link, GATEWAY, "name", "eth7"),
        "gateway address": ("ip", "addr", "flush", "dev", GATEWAY),
        "access down": (*link, ACCESS, "down"),
        "route": ("ip", "route", "del", V4, "dev", ACCESS),
        "route v6": ("ip", "-6", "route", "del", V6, "dev", ACCESS),
        "filter": ("sysctl", "-qw", f"net/ipv4/conf/{GATEWAY}/rp_filter=0"),
    }
    return {n: (True, w) for n, w in inside.items()} | {
        n: (False, w) for n, w in outside.items()
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
async def test_mended(one, change):
    """What a stranger changed is seen, and mended in at most two audits."""
    plan = whole(one, NET)
    await one.apply(plan)
    inside, words = change
    (one.own if inside else one.space.run)(*words)
    assert await one.lines(plan) != []
    for _ in range(2):
        difference = compare(plan, await one.found(plan))
        await one.apply(plan)
        await one.clear(difference.surplus)
    assert await one.lines(plan) == []


async def test_far_end_out_of_sight(one):
    """A pair whose far end is away stays for a container, and is remade for the host."""
    plan = whole(one, NET)
    await one.apply(plan)
    before = indexes(one)[1]
    peer, port = devices.peer(f"ep-{NET.id}-2"), devices.port(f"ep-{NET.id}-2")
    with bare() as box:
        one.space.run("ip", "link", "set", peer, "netns", box.path)
        assert await one.lines(plan) == []
        one.space.run("ip", "link", "set", GATEWAY, "netns", box.path)
        assert len(await one.lines(plan)) > 1
        await one.apply(plan)
        assert await one.lines(plan) == []
        after = indexes(one)[1]
        assert after[port] == before[port]
        assert GATEWAY not in box.run("ip", "link")
        box.run("ip", "link", "set", peer, "netns", one.space.path)
        found = [o for o in await one.found() if getattr(o, "name", "") == port]
        assert found == [o for o in plan if getattr(o, "name", "") == port]


@pytest.mark.parametrize("version", [4, 6])
async def test_containers_of_two_hosts(tmp_path, version):
    """
    Containers on two hosts reach each other, over IPv4 and IPv6 tunnels.

    1. Both containers start: the first packet of each family arrives.
    2. They ask for an address that nobody has.

    Result: not one broadcast or multicast frame came through the tunnel.
    """
    async with pair(tmp_path, version) as (left, right):
        network = net(mtu=1430)
        a, b = left.endpoint(network, 2), right.endpoint(network, 3)
        for here, own, there, far in ((left, a, right, b), (right, b, left, a)):
            others = here.remote(network, there.as_remote(far))
            await here.apply(here.plan(network, own, others=others))
        with closing(listening(right)) as seen:
            boxes = left.start(a), right.start(b)
            assert len(boxes) == 2
            for face in b.addresses:
                said = boxes[0].run("ping", "-c1", "-W2", "-s1200", str(face.ip))
                assert " 0% packet loss" in said
            boxes[0].run("ping", "-c1", "-W1", "10.210.1.77", check=False)
            inner = frames(seen)
        assert len(inner) >= 2
        assert [f for f in inner if f[0] & 1] == []


def listening(host):
    """Hear what comes to a host's underlay."""
    with host.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind(("eth0", 3))
    sock.setblocking(False)
    return sock


def frames(sock):
    """Return the frames that came in tunnels."""
    found = []
    while True:
        try:
            frame = sock.recv(65_536)
        except BlockingIOError:
            return found
        start = 14 + (20 if frame[12:14] == b"\x08\x00" else 40)
        if frame[start + 2 : start + 4] == (4789).to_bytes(2):
            found.append(frame[start + 16 :])


async def test_gateway_and_host(tmp_path):
    """
    Hosts that are gateways and members reach, and are reached by, every container.

    It holds for strict and loose checks of the way back (rp_filter).
    """
    async with pair(tmp_path) as (left, right):
        a, b = left.endpoint(NET, 2), right.endpoint(NET, 3)
        for here, own, there, far in ((left, a, right, b), (right, b, left, a)):
            member = there.member(NET)
            itself = replace(
                there.as_remote(far),
                mac=devices.mac(member.addresses[0].ip),
                addresses=tuple(x.ip for x in member.addresses),
            )
            others = here.remote(NET, there.as_remote(far), itself)
            await here.apply(here.plan(NET, own, others=others))
        gateway = ip_address("10.210.1.1")
        box = left.start(a, gateway)
        right.start(b, gateway)
        other = right.member(NET).addresses
        for filters in ("1", "2"):
            for name in ("all", "default"):
                left.space.run(
                    "sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter={filters}"
                )
            reached = (
                *((box, x.ip) for x in (*b.addresses, *other)),
                (box, gateway),
                (box, "192.0.2.1"),
                *((left.space, x.ip) for x in (*a.addresses, *b.addresses, *other)),
            )
            lost = [
                (filters, str(to))
                for space, to in reached
                if " 0% packet loss" not in space.run("ping", "-c1", "-W2", str(to), check=False)
            ]  # fmt: skip
            assert lost == []


async def test_moved_endpoint(tmp_path):
    """An endpoint that moves to another host is reached there at once."""
    async with pair(tmp_path) as (left, right):
        network = net()
        a, b = left.endpoint(network, 2), right.endpoint(network, 3)
        wrong = replace(right.as_remote(b), vtep=ip_address("192.0.2.77"))
        await left.apply(left.plan(network, a, others=left.remote(network, wrong)))
        await right.apply(
            right.plan(network, b, others=right.remote(network, left.as_remote(a)))
        )
        box = left.start(a)
        right.start(b)
        await left.apply(left.remote(network, right.as_remote(b)))
        # What is late to be cleared does not take the new entry along.
        late = [op for op in left.remote(network, wrong) if getattr(op, "dst", None)]
        await left.clear(tuple(late))
        assert " 0% packet loss" in box.run("ping", "-c1", "-W2", "10.210.1.3")


async def test_namespace_deleted_under_us(one):
    """A namespace that somebody deleted is made again, with all that was in it."""
    plan = whole(one, NET)
    await one.apply(plan)
    run("ip", "netns", "del", one.host.namespace)
    found = await one.found(plan)
    assert not any(isinstance(op, Namespace | Bridge | Vxlan | Veth) for op in found)
    await one.apply(plan)
    assert await one.lines(plan) == []
    run("ip", "netns", "del", one.host.namespace)
    await one.apply(plan)
    assert await one.lines(plan) == []
    run("ip", "netns", "del", one.host.namespace)
    await one.clear(plan)
    assert await one.rest() == ()


async def test_namespace_goes_while_it_is_looked_at(one, monkeypatch):
    """A look that finds a namespace gone half way through has seen nothing in it."""
    plan = whole(one, NET)
    await one.apply(plan)
    name = one.host.namespace
    first = one.kernel._crews[name].others[0]
    real = first.found

    async def last(wanted, devices):
        found = await real(wanted, devices)
        run("ip", "netns", "del", name)
        return found

    monkeypatch.setattr(first, "found", last)
    found = await one.found(plan)
    assert not any(op.where == name and isinstance(op, Bridge) for op in found)
    assert await one.lines(plan) != []
    await one.apply(plan)
    assert await one.lines(plan) == []
    await one.clear(plan)


async def test_nothing_to_do_without_the_namespace(one):
    """An entry in a namespace that is not there is an error that names both."""
    plan = one.remote(NET, *elsewhere(1))
    with pytest.raises(KernelError, match=f"no network namespace {one.host.namespace}"):
        await one.apply(plan)
    await one.clear(plan)


async def test_entry_without_its_device(one):
    """An entry of a device that is not there is an error; its removal is not."""
    await one.apply((Namespace(name=one.host.namespace),))
    plan = one.remote(NET, *elsewhere(1))
    with pytest.raises(KernelError, match=f"pynet has no device {VXLAN}"):
        await one.apply(plan)
    await one.clear(plan)


async def test_refused_entry_is_named(one):
    """Of many entries the one that the kernel refuses is named, and all go."""
    network = net("10.210.1.0/24")
    plan = one.plan(network)
    await one.apply(plan)
    # Without IPv6 on the bridge the kernel takes no IPv6 neighbour.
    remotes = elsewhere(300)
    bad = Neighbour(
        where=one.host.namespace,
        device=devices.bridge(network.id),
        address=ip_address("fd00::9"),
        mac="02:00:00:00:00:09",
    )
    with pytest.raises(KernelError, match=r"neighbour pn-\w+ fd00::9 failed: .*\(E"):
        await one.apply((*one.remote(network, *remotes), bad))
    assert await one.lines(plan) == []


async def test_vni_of_another(one):
    """A VNI that a foreign device has is a Conflict that names the device."""
    one.space.run(
        *("ip", "link", "add", "vx0", "type", "vxlan", "id", str(NET.vni)),
        *("local", "192.0.2.1", "dstport", "4789"),
    )
    assert await vnis(one) == {NET.vni}
    with pytest.raises(Conflict, match=r"identifier 10000001, but device vx0 has that"):
        await one.apply(whole(one, NET))
    assert one.left() == []
    one.space.run("ip", "link", "del", "vx0")
    await one.apply(whole(one, NET))
    assert await vnis(one) == set()


async def vnis(host):
    """Return the VNIs of others."""
    with host.entered():
        return await host.kernel.vnis()


async def test_vni_out_of_sight(one):
    """A VNI in a namespace that we do not look into is a Conflict after a while."""
    with bare() as other:
        one.space.run(
            *("ip", "link", "add", "vx0", "netns", other.path, "type", "vxlan"),
            *("id", str(NET.vni), "local", "192.0.2.1", "dstport", "4789"),
        )
        with pytest.raises(Conflict, match=r"one in another namespace has that"):
            await one.apply(whole(one, NET))
    assert one.left() == []


async def test_changed_tunnel(one):
    """A tunnel of another VNI, address or port is made anew, and that is undone."""
    plan = whole(one, NET)
    one.space.run("ip", "addr", "add", "192.0.2.5/24", "dev", "eth0")
    for change in ({"vni": 77}, {"local": ip_address("192.0.2.5")}, {"port": 8472}):
        await one.apply(plan)
        new = tuple(replace(o, **change) if isinstance(o, Vxlan) else o for o in plan)
        assert [line for line in await one.lines(new) if line.startswith("~")] != []
        with pytest.raises(KernelError, match="pn-nowhere"):
            await one.apply((*new, BAD))
        found = [o for o in await one.found() if isinstance(o, Vxlan)]
        assert found == [o for o in plan if isinstance(o, Vxlan)]
        await one.apply(new)
        assert await one.lines(new) == []


async def test_tunnel_from_a_strange_address(one):
    """A tunnel cannot end at an address that the host does not have."""
    plan = tuple(
        replace(op, local=ip_address("198.51.100.1")) if isinstance(op, Vxlan) else op
        for op in whole(one, NET)
    )
    with pytest.raises(KernelError, match=r"198.51.100.1 is no address .* --vtep ADD"):
        await one.apply(plan)


async def test_port_of_the_tunnels_is_taken(one):
    """A program that has the tunnels' port is named."""
    with one.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        sock.bind(("0.0.0.0", 4789))
        with one.entered(), pytest.raises(KernelError) as caught:
            await one.kernel.apply(whole(one, NET))
    assert "udp port 4789 is taken by " in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert one.left() == []


async def test_namespace_of_another(one):
    """A foreign namespace with a device, a mark or a process in it is left."""
    name = one.host.namespace
    run("ip", "netns", "add", name)
    plan = whole(one, NET)
    ip = ("ip", "-n", name, "link")
    run(*ip, "add", "br0", "type", "bridge")
    with pytest.raises(
        Conflict, match=rf"{name} is .* device br0; .* --namespace NAME"
    ):
        await one.apply(plan)
    run(*ip, "del", "br0")
    run(*ip, "set", "lo", "alias", "pynet:99999999:namespace:x")
    with pytest.raises(Conflict, match="mark pynet:99999999:namespace:x"):
        await one.apply(plan)
    run(*ip, "set", "lo", "alias", "")
    with subprocess.Popen(["ip", "netns", "exec", name, "sleep", "60"]) as sleeper:
        while not running_in(name, sleeper.pid):
            await asyncio.sleep(0.01)
        with pytest.raises(Conflict, match="a process is in it"):
            await one.apply(plan)
        sleeper.terminate()
    assert await one.rest() == ()
    await one.clear(plan)
    assert name in run("ip", "netns", "list")


def running_in(name, pid):
    """Tell whether a process has come to a namespace."""
    return (
        Path(f"/proc/{pid}/ns/net").stat().st_ino
        == Path("/run/netns", name).stat().st_ino
    )


async def test_empty_namespace_is_adopted(one):
    """A namespace that was made by hand is used, and given back if the plan fails."""
    name = one.host.namespace
    run("ip", "netns", "add", name)
    plan = whole(one, NET)
    with pytest.raises(KernelError, match="pn-nowhere"):
        await one.apply((*plan, BAD))
    assert "pynet:" not in run("ip", "-n", name, "link")
    await one.apply(plan)
    assert await one.lines(plan) == []
    await one.clear(plan)
    assert one.left() == []


async def test_namespace_with_a_guest_stays(one):
    """A namespace of ours that has a stranger's device in it is not removed."""
    plan = whole(one, NET)
    await one.apply(plan)
    one.own("ip", "link", "add", "br0", "type", "bridge")
    await one.clear(plan)
    assert await one.rest() == (Namespace(name=one.host.namespace),)
    one.own("ip", "link", "del", "br0")
    await one.clear(plan)
    assert one.left() == []


async def test_file_without_a_mount(one):
    """A name that was left without its mount is used."""
    path = Path("/run/netns", one.host.namespace)
    path.touch()
    await one.apply(whole(one, NET))
    assert await one.lines(whole(one, NET)) == []


async def test_route_of_another(one):
    """A foreign route to the same network is a Conflict that names its device."""
    one.space.run("ip", "route", "add", V4, "dev", "eth0")
    with pytest.raises(Conflict, match=f"route to {V4} .* one by eth0; remove that"):
        await one.apply(whole(one, NET))
    assert f"{V4} dev eth0" in one.space.run("ip", "route")


async def test_host_without_overlays_is_not_slowed(one):
    """Without the namespace nothing is opened, and found reads one file's state."""
    await one.found()
    assert one.kernel._places._open == {}


async def test_descriptors_are_given_back(one, tmp_path):
    """Closing gives back the namespace: nothing keeps it but its name."""
    plan = whole(one, NET)
    await one.apply(plan)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        again = other_kernel(one, tmp_path)
        with one.entered():
            await again.open()
            await again.apply(plan)
            await again.found(plan)
            await again.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.timeout(120)
async def test_ten_thousand_remote_endpoints(one):
    """Many entries take a moment, and meanwhile others get their turn."""
    network = net("10.0.0.0/8", "fd00:10::/64")
    plan = one.plan(network)
    await one.apply(plan)
    remotes = one.remote(network, *elsewhere(10_000))
    assert len(remotes) == 40_000
    took, longest = {}, {}
    for name, work in {
        "apply": lambda: one.kernel.apply(remotes),
        "apply again": lambda: one.kernel.apply(remotes),
        "found": lambda: one.kernel.found((*plan, *remotes)),
        "clear": lambda: one.kernel.clear(remotes),
    }.items():
        with one.entered():
            took[name], longest[name], result = await timed(work())
        if name == "found":
            assert list(compare((*plan, *remotes), result).lines()) == []
    print({k: round(v, 3) for k, v in took.items()})
    print({k: round(v, 3) for k, v in longest.items()})
    assert await one.lines(plan) == []


async def timed(work):
    """Return how long work took, how long it held up others, and its result."""
    held, last = 0.0, time.perf_counter()
    task = asyncio.ensure_future(work)
    started = last
    while not task.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        held, last = max(held, now - last), now
    return time.perf_counter() - started, held, await task


async def underlay(host, wish="", *towards):
    """Ask a host for its end of the tunnels."""
    with host.entered():
        found = await host.kernel.underlay(wish, [ip_address(a) for a in towards])
    return str(found.address), found.device, found.mtu


async def test_underlay(tmp_path):
    """The tunnels' address is what is wished for, or leads to other hosts."""
    async with pair(tmp_path) as (left, _):
        left.space.run("ip", "link", "set", "eth0", "mtu", "1400")
        left.space.run("ip", "addr", "add", "203.0.113.1/32", "dev", "lo")
        v4, v6 = ("192.0.2.1", "eth0", 1400), ("fd00:99::1", "eth0", 1400)
        assert await underlay(left, "192.0.2.1") == v4
        assert await underlay(left, "fd00:99::1") == v6
        assert await underlay(left, "eth0") == v4
        assert await underlay(left, "203.0.113.1") == ("203.0.113.1", "lo", 1500)
        assert await underlay(left, "", "192.0.2.1", "fd00:99::2", "192.0.2.2") == v6
        assert await underlay(left, "", "192.0.2.2") == v4
        with pytest.raises(
            InvalidParameter, match=r"no address for tunnels .* --vtep A"
        ):
            await underlay(left)
        left.space.run("ip", "-6", "route", "add", "default", "via", "fd00:99::2")
        assert await underlay(left, "", "192.0.2.1") == v6
        left.space.run("ip", "route", "add", "default", "via", "192.0.2.2")
        assert await underlay(left) == v4


@pytest.mark.parametrize(
    "wish", ["127.0.0.1", "::1", "eth7", "198.51.100.7", "fe80::1", "224.0.0.1", "pg"]
)
async def test_underlay_that_cannot_be(one, wish):
    """A wish that leads to no other machine is refused, with what there is."""
    await one.apply(whole(one, NET))
    wish = GATEWAY if wish == "pg" else wish
    with pytest.raises(
        InvalidParameter, match=r"--vtep ADDRESS one of 192.0.2.1, fd00"
    ):
        await underlay(one, wish)


async def test_own_addresses_are_no_underlay(one):
    """An address of a network of ours is no end of tunnels."""
    await one.apply(whole(one, NET))
    for address in one.member(NET).addresses:
        with pytest.raises(InvalidParameter, match="cannot end at"):
            await underlay(one, str(address.ip))


CHILD = """
import asyncio, sys
from pathlib import Path
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import Namespace

async def main(name, directory):
    kernel = Kernel(host="9" * 16, run_dir=Path(directory), namespace=name)
    await kernel.open()
    try:
        await kernel.apply((Namespace(name=name),))
    except KernelError as error:
        print(error)
    await kernel.close()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("propagation", ["slave", "shared"])
async def test_daemon_in_a_mount_namespace(tmp_path, propagation):
    """A namespace outlives a daemon with mounts of its own, or is not made at all."""
    name = f"pynet-mount-{os.getpid()}"
    run("mkdir", "-p", "/run/netns")
    run("ip", "netns", "add", f"{name}-x")
    try:
        said = run(
            *("unshare", "--net", "--mount", f"--propagation={propagation}"),
            *(sys.executable, "-c", CHILD, name, str(tmp_path)),
        )
        there = name in run("ip", "netns", "list").replace(f"{name}-x", "").split()
        if propagation == "shared":
            assert (said, there) == ("", True)
            assert f"pynet:99999999:namespace:{name}" in run("ip", "-n", name, "link")
        else:
            assert "the host does not see what this daemon mounts" in said
            assert not there
    finally:
        run("ip", "netns", "del", name, check=False)
        run("ip", "netns", "del", f"{name}-x")
