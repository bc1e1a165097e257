"""Ethernet frames made by hand, and what a raw socket hears of them."""

import socket
import struct
import time
from ipaddress import IPv4Address, IPv6Address, ip_address

EVERYBODY = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "33:33:00:00:00:01"
IP4, ARP, IP6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100
UDP, ICMP6 = 17, 58
RS, RA, NS, NA, REDIRECT, MLD2 = 133, 134, 135, 136, 137, 143
ALL = 3
"""ETH_P_ALL: a socket of this protocol hears everything."""


def octets(mac: str) -> bytes:
    """Return a MAC's six bytes."""
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(to: str, by: str, kind: int, payload: bytes) -> bytes:
    """Return a frame."""
    return octets(to) + octets(by) + struct.pack("!H", kind) + payload


def untagged(frame: bytes) -> bytes:
    """Return a frame as a socket hears it: a tag is kept beside it."""
    tag = frame[12:14] == struct.pack("!H", VLAN)
    return frame[:12] + frame[16:] if tag else frame


def checksum(data: bytes) -> int:
    """Return the internet's checksum (RFC 1071)."""
    total = sum(
        struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    )
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def pseudo(by: str, to: str, protocol: int, length: int) -> bytes:
    """Return what UDP and ICMPv6 add to what is summed up."""
    packed = ip_address(by).packed + ip_address(to).packed
    if ip_address(by).version == 4:
        return packed + struct.pack("!BBH", 0, protocol, length)
    return packed + struct.pack("!II", length, protocol)


def udp(by: str, to: str, sport: int, dport: int, payload: bytes) -> bytes:
    """Return a datagram between two addresses."""
    head = struct.pack("!HHHH", sport, dport, 8 + len(payload), 0)
    body = head + payload
    total = checksum(pseudo(by, to, UDP, len(body)) + body) or 0xFFFF
    return body[:6] + struct.pack("!H", total) + payload


def ip(
    by: str, to: str, protocol: int, payload: bytes, *, hops: int = 255, piece: int = 0
) -> bytes:
    """Return a packet of the addresses' family; `piece` is IPv4's fragment field."""
    source, target = ip_address(by), ip_address(to)
    if isinstance(source, IPv6Address):
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops)
        return head + source.packed + target.packed + payload
    assert isinstance(source, IPv4Address)
    words = (0x45, 0, 20 + len(payload), 7, piece, hops, protocol)
    head = struct.pack("!BBHHHBB", *words)
    tail = source.packed + target.packed
    total = struct.pack("!H", checksum(head + b"\0\0" + tail))
    return head + total + tail + payload


def datagram(by: str, to: str, sport: int, dport: int, payload: bytes = b"x") -> bytes:
    """Return a packet with a datagram."""
    return ip(by, to, UDP, udp(by, to, sport, dport, payload))


def icmp6(by: str, to: str, kind: int, body: bytes, flags: int = 0) -> bytes:
    """Return an ICMPv6 message: type, four bytes, and what comes after."""
    plain = struct.pack("!BBHI", kind, 0, 0, flags) + body
    total = checksum(pseudo(by, to, ICMP6, len(plain)) + plain)
    return plain[:2] + struct.pack("!H", total) + plain[4:]


def discovery(by: str, to: str, kind: int, body: bytes, flags: int = 0) -> bytes:
    """Return a packet with an ICMPv6 message."""
    return ip(by, to, ICMP6, icmp6(by, to, kind, body, flags))


def about(target: str, mac: str, option: int) -> bytes:
    """Return a neighbour message's target, with a MAC in an option (1 or 2)."""
    return ip_address(target).packed + bytes((option, 1)) + octets(mac)


def arp(operation: int, mac: str, sender: str, target: str) -> bytes:
    """Return an ARP message; the target's MAC is unknown."""
    head = struct.pack("!HHBBH", 1, IP4, 6, 4, operation)
    addresses = [ip_address(a).packed for a in (sender, target)]
    return head + octets(mac) + addresses[0] + bytes(6) + addresses[1]


def vxlan(vni: int, frame: bytes) -> bytes:
    """Return what a tunnel's datagram carries (RFC 7348)."""
    return struct.pack("!II", 0x08 << 24, vni << 8) + frame


def pieces(by: str, to: str, protocol: int, payload: bytes, first: int) -> list[bytes]:
    """Return a packet in two fragments, the first with that many bytes."""
    front, back = payload[:first], payload[first:]
    if ip_address(by).version == 4:
        more = ip(by, to, protocol, front, piece=0x2000)
        return [more, ip(by, to, protocol, back, piece=first // 8)]
    heads = [struct.pack("!BBHI", protocol, 0, at, 77) for at in (1, first)]
    return [ip(by, to, 44, heads[0] + front), ip(by, to, 44, heads[1] + back)]


def awaken(mouth: socket.socket, sent: bytes, ear: socket.socket, heard: bytes) -> None:
    """Send a frame until it arrives: devices that are new lose some at first."""
    for seconds in (0.3, 0.3, 1, 1, 3, 3, 10):
        mouth.send(sent)
        try:
            hear(ear, heard, seconds)
        except AssertionError:
            continue
        return
    hear(ear, heard, 0)


def hear(ear: socket.socket, last: bytes, seconds: float = 10) -> list[bytes]:
    """Return all frames that arrive up to the last one, which must come."""
    heard: list[bytes] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            frame, (_, _, kind, *_) = ear.recvfrom(65536)
        except TimeoutError:
            continue
        if kind == socket.PACKET_OUTGOING:
            continue
        heard.append(frame)
        if frame == last:
            return heard
    raise AssertionError(f"nothing like {last.hex()} came in {seconds} s")
