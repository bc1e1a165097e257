"""
Devices out of a dump, read by hand: pyroute2 takes milliseconds for each.

A message is as `link.read` knows it from pyroute2: a mapping with the kernel's names,
of which only those are here that it asks for.
"""

import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

from cnmdriver.dataplane.rtnetlink import ATTRIBUTE, LINK

TYPE = 0x3FFF
"""The bits of an attribute's type that are no flags."""


def number(data: bytes) -> int:
    """Read a number in the machine's own order."""
    return int.from_bytes(data, "little" if LITTLE else "big")


def port(data: bytes) -> int:
    """Read a number in network order."""
    return int.from_bytes(data, "big")


def text(data: bytes) -> str:
    """Read a text, as the kernel ends it."""
    return data.rstrip(b"\0").decode(errors="replace")


def mac(data: bytes) -> str:
    """Read a hardware address."""
    return data.hex(":")


def four(data: bytes) -> str:
    """Read an IPv4 address."""
    return socket.inet_ntop(socket.AF_INET, data)


def six(data: bytes) -> str:
    """Read an IPv6 address."""
    return socket.inet_ntop(socket.AF_INET6, data)


LITTLE = struct.pack("=H", 1)[0] == 1
Read = Callable[[bytes], Any]

FIELDS: Mapping[str, tuple[int, Read]] = {
    "IFLA_ADDRESS": (1, mac),
    "IFLA_IFNAME": (3, text),
    "IFLA_MTU": (4, number),
    "IFLA_LINK": (5, number),
    "IFLA_MASTER": (10, number),
    "IFLA_IFALIAS": (20, text),
    "IFLA_GROUP": (27, number),
    "IFLA_LINK_NETNSID": (37, number),
}
NESTS = {
    "IFLA_LINKINFO": 18,
    "IFLA_AF_SPEC": 26,
    "AF_INET6": int(socket.AF_INET6),
    "IFLA_INFO_DATA": 2,
    "IFLA_INFO_SLAVE_DATA": 5,
}
INNER: Mapping[str, tuple[int, Read]] = {
    "IFLA_INFO_KIND": (1, text),
    "IFLA_INET6_ADDR_GEN_MODE": (8, number),
    "IFLA_BR_MCAST_SNOOPING": (23, number),
    "IFLA_BRPORT_MODE": (4, number),
    "IFLA_BRPORT_LEARNING": (8, number),
    "IFLA_BRPORT_UNICAST_FLOOD": (9, number),
    "IFLA_BRPORT_MCAST_FLOOD": (27, number),
    "IFLA_BRPORT_BCAST_FLOOD": (30, number),
    "IFLA_BRPORT_NEIGH_SUPPRESS": (32, number),
    "IFLA_BRPORT_ISOLATED": (33, number),
    "IFLA_VXLAN_ID": (1, number),
    "IFLA_VXLAN_LOCAL": (4, four),
    "IFLA_VXLAN_LEARNING": (7, number),
    "IFLA_VXLAN_PORT": (15, port),
    "IFLA_VXLAN_LOCAL6": (17, six),
}


class Packed:
    """One device's description, as it came."""

    def __init__(self, data: bytes) -> None:
        """Take what follows the message's head."""
        _, _, index, flags, _ = LINK.unpack_from(data)
        self.head: dict[str, int] = {"index": index, "flags": flags}
        self.attributes = attributes(data[LINK.size :])
        self.nests: dict[tuple[str, ...], Mapping[int, bytes]] = {(): self.attributes}
        """What was found inside others, by their names: it is asked for often."""

    def __getitem__(self, name: str) -> int:
        """Return index or flags."""
        return self.head[name]

    def get(self, name: str) -> Any:
        """Return an attribute, None if there is none."""
        kind, read = FIELDS[name]
        data = self.attributes.get(kind)
        return None if data is None else read(data)

    def get_nested(self, *names: str) -> Any:
        """Return an attribute inside others, None if there is none."""
        *outer, last = names
        inside = self._inside(tuple(outer))
        kind, read = INNER[last]
        found = inside.get(kind)
        return None if found is None else read(found)

    def _inside(self, names: tuple[str, ...]) -> Mapping[int, bytes]:
        if names not in self.nests:
            data = self._inside(names[:-1]).get(NESTS[names[-1]])
            self.nests[names] = {} if data is None else attributes(data)
        return self.nests[names]


def attributes(data: bytes) -> dict[int, bytes]:
    """Return attributes by type."""
    found = {}
    at = 0
    while at + 4 <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        found[kind & TYPE] = data[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)
    return found
