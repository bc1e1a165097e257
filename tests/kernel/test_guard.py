"""What reaches an overlay's tunnels from the underlay, by the kernel's word."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count

import pytest

from cnmdriver.plan import devices
from tests import frames
from tests.frames import IP4, IP6

from .conftest import Namespace, namespace, run
from .sides import Side, net, pair
from .wires import plug

pytestmark = pytest.mark.root

VNI, PORT = 10_000_001, 4789
HERE = {4: "192.0.2.1", 6: "fd00:99::1"}
MEMBER = {4: "192.0.2.2", 6: "fd00:99::2"}
STRANGER = {4: "192.0.2.66", 6: "fd00:99::66"}
BOX, FAR = "02:42:00:00:00:02", "02:42:00:00:00:03"
NEAR = {4: "172.17.0.1", 6: "fd00:17::1"}
KINDS = {4: IP4, 6: IP6}
NUMBERS = count(1)


def mac_of(space: Namespace, device: str) -> str:
    """Return a device's MAC."""
    return json.loads(space.run("ip", "-j", "link", "show", device))[0]["address"]


def inner() -> bytes:
    """Return a frame for the container, unlike all others."""
    text = f"number {next(NUMBERS)}".encode()
    packet = frames.datagram("10.210.1.3", "10.210.1.2", 7, 7, text)
    return frames.ethernet(BOX, FAR, IP4, packet)


def framed(mac: str, packet: bytes) -> bytes:
    """Return a frame that brings a packet to a device of the host's."""
    return frames.ethernet(mac, "02:00:00:00:00:aa", KINDS[packet[0] >> 4], packet)


@dataclass(kw_only=True)
class Scene:
    """A host with a container, and who sends frames to it."""

    side: Side
    box: socket.socket
    """Hears what reaches the container."""
    wire: socket.socket
    """Speaks on the underlay."""
    mac: str

    def outer(
        self, by: str, carried: bytes, *, to: str = "", vni: int = VNI, port: int = PORT
    ) -> bytes:
        """Return a tunnel's packet from an address to this host's end."""
        to = to or HERE[ip_address(by).version]
        return frames.datagram(by, to, 4000, port, frames.vxlan(vni, carried))

    def speak(self, wire: socket.socket, mac: str, *packets: bytes) -> None:
        """Send packets to a device of the host's."""
        for packet in packets:
            wire.send(framed(mac, packet))

    def gets(self, *packets: bytes, frame: bytes) -> bool:
        """Tell whether the container gets a frame by packets on the underlay."""
        self.speak(self.wire, self.mac, *packets)
        return self.heard(frame)

    def heard(self, frame: bytes) -> bool:
        """Tell whether the container has got a frame, by what came before a member's."""
        last = inner()
        by = MEMBER[self.side.host.vtep.version]
        self.speak(self.wire, self.mac, self.outer(by, last))
        return frame in frames.hear(self.box, last)

    def drops(self) -> dict[str, int]:
        """Return what was dropped, by kind, as nft says it."""
        text = self.side.space.run("nft", "-j", "list", "counters")
        found = [x["counter"] for x in json.loads(text)["nftables"] if "counter" in x]
        return {c["name"]: c["packets"] for c in found if c["packets"]}

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Take the guard out for a while."""
        nft = ("nft", "delete", "rule", "inet", "pynet", "vtep", "handle")
        shown = self.side.space.run(
            "nft", "-a", "list", "chain", "inet", "pynet", "vtep"
        )
        (line,) = [x for x in shown.splitlines() if "jump tunnel" in x]
        rule, _, handle = line.strip().partition(" # handle ")
        self.side.space.run(*nft, handle)
        yield
        self.side.space.run("nft", f"add rule inet pynet vtep {rule}")


@asynccontextmanager
async def built(tmp_path, version: int = 4, **fields):
    """Make a host with a container on an overlay, and a wire to it."""
    made = net("10.210.1.0/24", **fields)
    async with pair(tmp_path, version) as (left, right):
        end = left.endpoint(made, 2)
        for name in ("all", "default", "eth0"):
            # The kernel's own answer to forged sources is no part of this.
            left.space.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
        await left.apply(left.plan(made, end))
        with ExitStack() as stack:
            box = left.start(end)
            scene = Scene(
                side=left,
                box=stack.enter_context(plug(box, "eth0")),
                wire=stack.enter_context(plug(right.space, "eth0")),
                mac=mac_of(left.space, "eth0"),
            )
            frame = inner()
            packet = scene.outer(MEMBER[version], frame)
            frames.awaken(scene.wire, framed(scene.mac, packet), scene.box, frame)
            yield scene


@pytest.mark.parametrize("version", [4, 6])
async def test_strangers_are_kept_out(tmp_path, version):
    """Frames of our network come in from a member only, and what is dropped is counted."""
    async with built(tmp_path, version) as made:
        frame = inner()
        member, stranger = (made.outer(by[version], frame) for by in (MEMBER, STRANGER))
        assert made.gets(member, frame=frame)
        assert made.drops() == {}
        assert not made.gets(stranger, frame=frame)
        assert made.drops() == {"unknown_vtep": 1}
        own = made.outer(HERE[version], frame)
        assert not made.gets(own, frame=frame)
        with made.unguarded():
            assert made.gets(stranger, frame=frame)
        assert not made.gets(stranger, frame=frame)


@pytest.mark.parametrize("first", [8, 16])
@pytest.mark.parametrize("version", [4, 6])
async def test_fragments_are_no_way_in(tmp_path, version, first):
    """A stranger's packet in fragments is known by its network all the same."""
    async with built(tmp_path, version) as made:
        frame = inner()
        for by, passes in ((MEMBER, True), (STRANGER, False)):
            way = (by[version], HERE[version])
            body = frames.udp(*way, 4000, PORT, frames.vxlan(VNI, frame))
            parts = frames.pieces(*way, frames.UDP, body, first)
            assert made.gets(*parts, frame=frame) == passes
        assert made.drops() == {"unknown_vtep": 1}


@pytest.mark.parametrize(("vni", "port"), [(4097, PORT), (VNI, 8472)])
async def test_other_users_are_left_alone(tmp_path, vni, port):
    """Another's device gets its own network's frames on our port, from whomever."""
    async with built(tmp_path) as made:
        space = made.side.space
        kind = ("type", "vxlan", "id", str(vni), "local", HERE[4], "dstport", str(port))
        space.run("ip", "link", "add", "other", *kind)
        space.run("ip", "link", "set", "other", "up")
        frame = inner()
        packet = made.outer(STRANGER[4], frame, vni=vni, port=port)
        with plug(space, "other") as ear:
            made.speak(made.wire, made.mac, packet)
            assert frame in frames.hear(ear, frame)
        assert not made.heard(frame)
        assert made.drops() == {}


@contextmanager
def neighbour(made: Scene, kind: str) -> Iterator[tuple[socket.socket, str]]:
    """Give the host another device, and return a wire to it and its MAC."""
    space = made.side.space
    with namespace() as other:
        ends = ("type", "veth", "peer", "name", "eth0", "netns", other.path)
        run("nsenter", f"--net={space.path}", "ip", "link", "add", "near0", *ends)
        other.run("ip", "link", "set", "eth0", "up")
        space.run("ip", "link", "set", "near0", "up")
        device = "near0"
        if kind == "bridge":
            device = "near1"
            space.run("ip", "link", "add", device, "type", "bridge")
            space.run("ip", "link", "set", device, "up")
            space.run("ip", "link", "set", "near0", "master", device)
        for address in NEAR.values():
            nodad = ("nodad",) if ":" in address else ()
            face = f"{address}/{64 if nodad else 16}"
            space.run("ip", "addr", "add", face, "dev", device, *nodad)
        for name in ("near0", device):
            space.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
        mac = mac_of(space, device)
        with plug(other, "eth0") as wire, plug(space, device) as ear:
            first = framed(mac, frames.datagram("172.17.0.9", NEAR[4], 7, 7))
            frames.awaken(wire, first, ear, first)
            yield wire, mac


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["veth", "bridge"])
async def test_a_member_behind_a_containers_bridge(tmp_path, kind, version):
    """A member's address that comes from where containers are is not believed."""
    async with built(tmp_path, version) as made:
        with neighbour(made, kind) as (wire, mac):
            for number, to in enumerate((HERE[version], NEAR[version]), 1):
                frame = inner()
                packet = made.outer(MEMBER[version], frame, to=to)
                made.speak(wire, mac, packet)
                assert not made.heard(frame)
                assert made.drops() == {"wrong_way": number}
                with made.unguarded():
                    made.speak(wire, mac, packet)
                    assert made.heard(frame)


async def test_a_member_on_this_host(tmp_path):
    """A member's address is not believed on the loopback device, whatever is there."""
    async with built(tmp_path) as made:
        space = made.side.space
        space.run("ip", "addr", "del", f"{HERE[4]}/24", "dev", "eth0")
        space.run("ip", "addr", "add", f"{HERE[4]}/32", "dev", "lo")
        space.run("ip", "route", "add", "192.0.2.0/24", "dev", "eth0")
        frame = inner()
        with plug(space, "lo") as wire:
            made.speak(wire, "00:00:00:00:00:00", made.outer(MEMBER[4], frame))
            assert not made.heard(frame)
            assert made.drops() == {"wrong_way": 1}
            with made.unguarded():
                made.speak(wire, "00:00:00:00:00:00", made.outer(MEMBER[4], frame))
                assert made.heard(frame)


async def test_a_member_in_a_container(tmp_path):
    """A container that may spoof does not get into tunnels through its gateway."""
    async with built(tmp_path, gateway="pynet", spoof=True) as made:
        box, side = next(iter(made.side.boxes.values())), made.side
        mac = mac_of(side.space, devices.gateway(net("10.210.1.0/24").id))
        with plug(box, "eth0") as wire:
            for number, to in enumerate((HERE[4], "10.210.1.1"), 1):
                frame = inner()
                made.speak(wire, mac, made.outer(MEMBER[4], frame, to=to))
                assert not made.heard(frame)
                assert made.drops() == {"wrong_way": number}


async def test_a_way_back_by_another_device(tmp_path):
    """A member that is answered by another device than it comes by is let in."""
    async with built(tmp_path) as made:
        with neighbour(made, "veth"):
            made.side.space.run("ip", "route", "add", f"{MEMBER[4]}/32", "dev", "near0")
            frame = inner()
            assert made.gets(made.outer(MEMBER[4], frame), frame=frame)
        assert made.drops() == {}


async def test_an_address_of_no_device(tmp_path):
    """With the tunnel's address on another device, the way to the member counts."""
    async with built(tmp_path) as made:
        space = made.side.space
        space.run("ip", "addr", "del", f"{HERE[4]}/24", "dev", "eth0")
        space.run("ip", "addr", "add", f"{HERE[4]}/32", "dev", "lo")
        space.run("ip", "route", "add", f"{MEMBER[4]}/32", "dev", "eth0")
        frame, other = inner(), inner()
        assert made.gets(made.outer(MEMBER[4], frame), frame=frame)
        assert made.drops() == {}
        with neighbour(made, "veth") as (wire, mac):
            made.speak(wire, mac, made.outer(MEMBER[4], other))
            assert not made.heard(other)
        assert made.drops() == {"wrong_way": 1}
