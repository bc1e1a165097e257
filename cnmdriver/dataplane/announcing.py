"""
Telling the containers of a network which MAC an address has by now.

The frames leave by the bridge itself, as if its neighbours had sent them, and reach its
ports but not its tunnels: each host tells its own. Who knew the address takes the new
MAC over; who did not learns nothing.
"""

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from cnmdriver.dataplane.probe import checksum
from cnmdriver.model import IPAddress

BROADCAST = b"\xff" * 6
ALL_NODES, ALL_NODES_MAC = IPv6Address("ff02::1"), bytes.fromhex("333300000001")
ARP, IPV6, ICMPV6 = 0x0806, 0x86DD, 58
ADVERTISEMENT, OVERRIDE, TARGET_MAC = 136, 0x20000000, 2
"""RFC 4861, sections 4.4 and 4.6.1."""


def send(device: str, bindings: Iterable[tuple[IPAddress, str]]) -> None:
    """Announce addresses with their MACs on a device of the thread's namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        for address, mac in bindings:
            raw.send(frame(address, bytes.fromhex(mac.replace(":", ""))))


def frame(address: IPAddress, mac: bytes) -> bytes:
    """Build an ARP announcement (RFC 5227, section 3), or a neighbour advertisement."""
    if isinstance(address, IPv4Address):
        head = BROADCAST + mac + struct.pack("!HHHBBH", ARP, 1, 0x0800, 6, 4, 1)
        return head + mac + address.packed + bytes(6) + address.packed
    body = address.packed + bytes([TARGET_MAC, 1]) + mac
    message = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, OVERRIDE) + body
    ends = address.packed + ALL_NODES.packed
    pseudo = ends + struct.pack("!IxxxB", len(message), ICMPV6)
    summed = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    head = ALL_NODES_MAC + mac + struct.pack("!H", IPV6)
    head += struct.pack("!IHBB", 6 << 28, len(summed), ICMPV6, 255)
    return head + ends + summed
