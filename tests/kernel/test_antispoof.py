"""What a container with raw sockets can send, in both modes, by the kernel's word."""

import json
import socket
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count

import pytest

from cnmdriver.model import Endpoint, Member, Network
from cnmdriver.plan import bridge, devices, router
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.ops import Plan, union
from tests import frames
from tests.frames import ARP, EVERYBODY, IP4, IP6, VLAN

from .conftest import network
from .sides import Side, pair
from .wires import plug

pytestmark = pytest.mark.root

V4, V6 = "10.210.1.0/24", "fd00:210:1::/64"
MAC, MAC_B, MAC_C = (f"02:42:00:00:00:{n:02x}" for n in (2, 3, 4))
OWN4, B4, GATEWAY4 = "10.210.1.2", "10.210.1.3", "10.210.1.1"
OWN6, B6, GATEWAY6 = "fd00:210:1::2", "fd00:210:1::3", "fd00:210:1::1"
LINK, LINK_B = (str(devices.link_local(mac).ip) for mac in (MAC, MAC_B))
FOREIGN = "02:42:00:00:00:99"
NODES, ROUTERS = "ff02::1", "ff02::16"
PORT = 7777
BRIDGE = "pn-test"
MARKS = count(1)


@dataclass(kw_only=True)
class Scene:
    """A container that sends, and who may hear it."""

    side: Side
    mode: str
    mouth: socket.socket
    ears: dict[str, socket.socket]
    """By the MAC that reaches it."""

    def drops(self) -> dict[str, int]:
        """Return what was dropped, by kind, as nft says it."""
        place = self.side.space.run if self.mode == "bridge" else self.side.own
        listed = json.loads(place("nft", "-j", "list", "counters"))["nftables"]
        found = [item["counter"] for item in listed if "counter" in item]
        return {
            c["name"]: c["packets"]
            for c in found
            if c["family"] == "bridge" and c["packets"]
        }

    def send(self, *sent: bytes) -> dict[str, list[bytes]]:
        """Send frames, and return what each of those who listen has heard of them."""
        heard = {}
        for frame in sent:
            self.mouth.send(frame)
        for mac, ear in self.ears.items():
            last = mark(mac)
            self.mouth.send(last)
            known = {frames.untagged(frame): frame for frame in sent}
            heard[mac] = [known[f] for f in frames.hear(ear, last) if f in known]
        return heard

    def to_all(self, kind: int, payload: bytes, mac: str = MAC) -> list[bytes]:
        """Return frames with a payload for each who listens, and for everybody."""
        to = (*self.ears, EVERYBODY)
        return [frames.ethernet(t, mac, kind, payload) for t in to]


def mark(mac: str) -> bytes:
    """Return a frame to a MAC that is like no other."""
    text = f"mark {next(MARKS)}".encode()
    packet = frames.datagram(OWN6, B6, PORT, PORT, text)
    return frames.ethernet(mac, MAC, IP6, packet)


def plan(side: Side, made: Network, ends: list[Endpoint], others: Plan = ()) -> Plan:
    """Return what a host holds."""
    if made.mode == "overlay":
        return side.plan(made, *ends, others=others)
    own = Member(network=made.id, host=side.host.id, bridge=BRIDGE)
    parts = (bridge.endpoint(made, own, end, side.host) for end in ends)
    return union((bridge.network(made, own, side.host), *parts))


@asynccontextmanager
async def scene(tmp_path, mode: str, four: str = V4, **fields):
    """
    Make a network with two containers on one host, one of which sends.

    The other listens, and so do the gateway and, with an overlay, one on another host.
    """
    made = network(four, V6, mode=mode, vni=10_000_001, **fields)
    async with pair(tmp_path) as (left, right):
        ends = [left.endpoint(made, n) for n in (2, 3)]
        far = right.endpoint(made, 4)
        others = left.remote(made, right.as_remote(far)) if mode == "overlay" else ()
        await left.apply(plan(left, made, ends, others))
        sender, listener = [left.start(end) for end in ends]
        gateway = BRIDGE if mode == "bridge" else devices.gateway(made.id)
        places = {MAC_B: (listener, "eth0"), router.mac(made): (left.space, gateway)}
        if mode == "overlay":
            await right.apply(right.plan(made, far))
            places[MAC_C] = (right.start(far), "eth0")
        with ExitStack() as stack:
            mouth = stack.enter_context(plug(sender, "eth0"))
            ears = {m: stack.enter_context(plug(*p)) for m, p in places.items()}
            for mac, ear in ears.items():
                first = mark(mac)
                frames.awaken(mouth, first, ear, first)
            yield Scene(side=left, mode=mode, mouth=mouth, ears=ears)


ADVERT = bytes(8)
OPTIONS = bytes((58, 0, 1, 4, 0, 0, 0, 0))
"""An empty header of IPv6's destination options, with ICMPv6 next."""

FORGED = {
    "mac": ("mac", IP4, frames.datagram(OWN4, B4, PORT, PORT, b"f"), FOREIGN),
    "mac of b": ("mac", IP6, frames.datagram(OWN6, B6, PORT, PORT, b"f"), MAC_B),
    "mac and arp": ("mac", ARP, frames.arp(1, MAC, OWN4, B4), FOREIGN),
    "ipv4": ("ipv4", IP4, frames.datagram("10.210.1.9", B4, PORT, PORT)),
    "ipv4 of b": ("ipv4", IP4, frames.datagram(B4, B4, PORT, PORT)),
    "ipv4 gateway": ("ipv4", IP4, frames.datagram(GATEWAY4, B4, PORT, PORT)),
    "ipv4 nobody": ("ipv4", IP4, frames.datagram("0.0.0.0", B4, PORT, PORT)),
    "ipv4 outside": ("ipv4", IP4, frames.datagram("192.0.2.2", B4, PORT, PORT)),
    "link-local ipv4": ("ipv4", IP4, frames.datagram("169.254.1.1", B4, 5, 5)),
    "metadata": (
        "ipv4", IP4, frames.datagram("169.254.169.254", "169.254.1.1", 80, 5),
    ),
    "ipv6": ("ipv6", IP6, frames.datagram("fd00:210:1::9", B6, PORT, PORT)),
    "ipv6 gateway": ("ipv6", IP6, frames.datagram(GATEWAY6, B6, PORT, PORT)),
    "link-local of b": ("ipv6", IP6, frames.datagram(LINK_B, LINK, PORT, PORT)),
    "link-local gateway": ("ipv6", IP6, frames.datagram("fe80::1", LINK_B, 5, 5)),
    "link-local of no link": ("ipv6", IP6, frames.datagram("fe81::7", LINK_B, 5, 5)),
    "ipv6 nobody": ("ipv6", IP6, frames.datagram("::", B6, PORT, PORT)),
    "arp ip": ("arp", ARP, frames.arp(2, MAC, B4, OWN4)),
    "arp request ip": ("arp", ARP, frames.arp(1, MAC, GATEWAY4, B4)),
    "arp mac": ("arp", ARP, frames.arp(2, FOREIGN, OWN4, B4)),
    "arp probe mac": ("arp", ARP, frames.arp(1, FOREIGN, "0.0.0.0", B4)),
    "arp answer of nobody": ("arp", ARP, frames.arp(2, MAC, "0.0.0.0", B4)),
    "gratuitous arp": ("arp", ARP, frames.arp(1, MAC, B4, B4)),
    "arp link-local": ("arp", ARP, frames.arp(1, MAC, "169.254.1.1", B4)),
    "arp metadata": (
        "arp", ARP, frames.arp(2, MAC, "169.254.169.254", "169.254.1.1"),
    ),
    "advertisement": (
        "nd", IP6, frames.discovery(OWN6, NODES, frames.NA, frames.about(B6, MAC, 2)),
    ),
    "advertisement of a link-local": (
        "nd", IP6, frames.discovery(LINK, NODES, frames.NA, frames.about(LINK_B, MAC, 2)),
    ),
    "advertisement of the gateway": (
        "nd", IP6,
        frames.discovery(OWN6, NODES, frames.NA, frames.about("fe80::1", MAC, 2)),
    ),
    "advertisement without a target": (
        "nd", IP6, frames.discovery(OWN6, NODES, frames.NA, b""),
    ),
    "advertisement behind options": (
        "nd", IP6,
        frames.ip(
            OWN6, NODES, 60,
            OPTIONS + frames.icmp6(OWN6, NODES, frames.NA, frames.about(B6, MAC, 2)),
        ),
    ),
    "solicitation": (
        "ipv6", IP6, frames.discovery(B6, NODES, frames.NS, frames.about(OWN6, MAC, 1)),
    ),
    "detection of b": (
        "nd", IP6,
        frames.discovery("::", NODES, frames.NS, frames.about(LINK_B, MAC, 1)[:16]),
    ),
    "router advertisement": ("router", IP6, frames.discovery(LINK, NODES, frames.RA, ADVERT)),
    "router behind options": (
        "router", IP6,
        frames.ip(
            LINK, NODES, 60, OPTIONS + frames.icmp6(LINK, NODES, frames.RA, ADVERT),
        ),
    ),
    "redirect": (
        "router", IP6, frames.discovery(LINK, B6, frames.REDIRECT, bytes(32)),
    ),
    "dhcp": ("dhcp", IP4, frames.datagram(OWN4, B4, 67, 68)),
    "dhcp to all": ("dhcp", IP4, frames.datagram(OWN4, "255.255.255.255", 67, 68)),
    "dhcpv6": ("dhcp", IP6, frames.datagram(LINK, LINK_B, 547, 546)),
    "vlan": (
        "other", VLAN, b"\0\5\x08\0" + frames.datagram(OWN4, B4, PORT, PORT, b"v"),
    ),
    "ethertype": ("other", 0x88B5, b"experiment"),
    "length": ("other", 60, b"\xaa\xaa\x03\0\0\0\x08\0" + bytes(52)),
}  # fmt: skip

OWN = {
    "ipv4": (IP4, frames.datagram(OWN4, B4, PORT, PORT)),
    "ipv4 group": (IP4, frames.datagram(OWN4, "224.0.0.251", 5353, 5353)),
    "ipv4 all": (IP4, frames.datagram(OWN4, "255.255.255.255", PORT, PORT)),
    "ipv4 server": (IP4, frames.datagram(OWN4, B4, 67, 69)),
    "ipv4 outside": (IP4, frames.datagram(OWN4, "198.51.100.7", PORT, PORT)),
    "dhcp client": (IP4, frames.datagram("0.0.0.0", "255.255.255.255", 68, 67)),
    "ipv6": (IP6, frames.datagram(OWN6, B6, PORT, PORT)),
    "ipv6 group": (IP6, frames.datagram(OWN6, "ff02::fb", 5353, 5353)),
    "link-local": (IP6, frames.datagram(LINK, LINK_B, PORT, PORT)),
    "arp": (ARP, frames.arp(1, MAC, OWN4, B4)),
    "arp answer": (ARP, frames.arp(2, MAC, OWN4, B4)),
    "gratuitous arp": (ARP, frames.arp(1, MAC, OWN4, OWN4)),
    "arp probe": (ARP, frames.arp(1, MAC, "0.0.0.0", OWN4)),
    "advertisement": (
        IP6, frames.discovery(OWN6, NODES, frames.NA, frames.about(OWN6, MAC, 2)),
    ),
    "advertisement of the link-local": (
        IP6, frames.discovery(LINK, NODES, frames.NA, frames.about(LINK, MAC, 2)),
    ),
    "solicitation": (
        IP6, frames.discovery(OWN6, B6, frames.NS, frames.about(B6, MAC, 1)),
    ),
    "detection": (
        IP6, frames.discovery("::", NODES, frames.NS, frames.about(OWN6, MAC, 1)[:16]),
    ),
    "detection of the link-local": (
        IP6, frames.discovery("::", NODES, frames.NS, frames.about(LINK, MAC, 1)[:16]),
    ),
    "groups of nobody": (IP6, frames.discovery("::", ROUTERS, frames.MLD2, b"")),
    "groups": (IP6, frames.discovery(LINK, ROUTERS, frames.MLD2, b"")),
    "router solicitation": (IP6, frames.discovery(LINK, "ff02::2", frames.RS, b"")),
    "dhcpv6 client": (IP6, frames.datagram(LINK, "ff02::1:2", 546, 547)),
    "chosen link-local ipv4": (
        IP4, frames.datagram("169.254.7.1", "169.254.7.2", PORT, PORT),
    ),
    "chosen link-local arp": (ARP, frames.arp(1, MAC, "169.254.7.1", "169.254.7.2")),
    "chosen link-local": (IP6, frames.datagram("fe80::77", LINK_B, PORT, PORT)),
    "chosen link-local to another": (IP6, frames.datagram("fe80::77", B6, PORT, PORT)),
    "advertisement of a chosen one": (
        IP6, frames.discovery("fe80::77", NODES, frames.NA, frames.about("fe80::77", MAC, 2)),
    ),
    "detection of a chosen one": (
        IP6,
        frames.discovery("::", NODES, frames.NS, frames.about("fe80::77", MAC, 1)[:16]),
    ),
}  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
async def test_nothing_forged_passes(tmp_path, mode):
    """What is not the container's own reaches no port, and is counted by its kind."""
    async with scene(tmp_path, mode) as made:
        for name, (kind, protocol, payload, *mac) in FORGED.items():
            before = made.drops()
            sent = made.to_all(protocol, payload, *mac)
            heard = made.send(*sent)
            assert not any(heard.values()), name
            key = f"spoofed_{kind}"
            after = before | {key: before.get(key, 0) + len(sent)}
            assert made.drops() == after, name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
async def test_what_is_its_own_passes(tmp_path, mode):
    """What a container needs to send reaches whom it is for, and nothing is counted."""
    async with scene(tmp_path, mode) as made:
        for name, (protocol, payload) in OWN.items():
            sent = made.to_all(protocol, payload)
            heard = made.send(*sent)
            for mac in made.ears:
                frame = frames.ethernet(mac, MAC, protocol, payload)
                assert frame in heard[mac], (name, mac)
            assert sent[-1] in heard[MAC_B], name
        assert made.drops() == {}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
async def test_spoofing_that_is_allowed(tmp_path, mode):
    """On a network that allows it, all of that passes."""
    async with scene(tmp_path, mode, spoof=True) as made:
        for name, (_, protocol, payload, *mac) in FORGED.items():
            if MAC_B not in mac:
                sent = made.to_all(protocol, payload, *mac)
                assert sent[0] in made.send(*sent)[MAC_B], name
        assert made.drops() == {}


LINK_POOL = "169.254.9.0/24"
ASSIGNED = {
    "ipv4": ("ipv4", IP4, frames.datagram("169.254.9.3", "169.254.9.4", PORT, PORT)),
    "arp": ("arp", ARP, frames.arp(2, MAC, "169.254.9.3", "169.254.9.4")),
    "ipv6": ("ipv6", IP6, frames.datagram("fe80::77", LINK_B, PORT, PORT)),
    "advertisement": (
        "nd", IP6, frames.discovery(OWN6, NODES, frames.NA, frames.about("fe80::77", MAC, 2)),
    ),
}  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", MODES)
async def test_link_local_addresses_that_are_given(tmp_path, mode):
    """Where the pool is link-local, its addresses are looked at as any others."""
    async with scene(tmp_path, mode, LINK_POOL) as made:
        packet = frames.datagram("169.254.9.2", "169.254.9.3", PORT, PORT)
        own = frames.ethernet(MAC_B, MAC, IP4, packet)
        assert made.send(own)[MAC_B] == [own]
        for name, (kind, protocol, payload) in ASSIGNED.items():
            before = made.drops().get(f"spoofed_{kind}", 0)
            sent = made.to_all(protocol, payload)
            assert not any(made.send(*sent).values()), name
            assert made.drops()[f"spoofed_{kind}"] == before + len(sent), name
