"""Devices as the kernel shows them: small values instead of netlink messages."""

import ipaddress
from dataclasses import dataclass
from typing import Any

from cnmdriver.model import IPAddress

UP, CARRIER = 0x1, 0x10000
BRIDGE_FLAGS = {
    "hairpin": "mode",
    "isolated": "isolated",
    "learning": "learning",
    "suppress": "neigh_suppress",
    "unicast": "unicast_flood",
    "multicast": "mcast_flood",
    "broadcast": "bcast_flood",
}
"""Each flag of a port, with the kernel's own word for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """How a bridge treats its port."""

    hairpin: bool = False
    isolated: bool = False
    learning: bool = True
    suppress: bool = False
    """Whether the bridge answers ARP and ND itself instead of asking here."""
    unicast: bool = True
    multicast: bool = True
    broadcast: bool = True
    """These three: whether frames go here that have no known place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """What a VXLAN device is made with."""

    vni: int
    local: IPAddress | None
    port: int
    learning: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A device."""

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    group: int
    alias: str
    master: int
    other: int | None
    """The far end, if it is in the same namespace."""
    beyond: int | None
    """The index of the far end in the namespace where that is."""
    up: bool
    carrier: bool
    """Whether the kernel takes it that somebody is at the other end."""
    genmode: int | None
    """How it makes IPv6 addresses of its own; None for a device without IPv6."""
    snooping: bool
    port: Port
    tunnel: Tunnel | None


def read(message: Any) -> Link:
    """Read the kernel's description of a device."""
    elsewhere = message.get("IFLA_LINK_NETNSID") is not None
    data = ("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_BR_MCAST_SNOOPING")
    mode = ("IFLA_AF_SPEC", "AF_INET6", "IFLA_INET6_ADDR_GEN_MODE")
    kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""
    master = message.get("IFLA_MASTER") or 0
    return Link(
        index=message["index"],
        name=message.get("IFLA_IFNAME"),
        kind=kind,
        mac=message.get("IFLA_ADDRESS") or "",
        mtu=message.get("IFLA_MTU") or 0,
        group=message.get("IFLA_GROUP") or 0,
        alias=message.get("IFLA_IFALIAS") or "",
        master=master,
        other=None if elsewhere else message.get("IFLA_LINK"),
        beyond=message.get("IFLA_LINK") if elsewhere else None,
        up=bool(message["flags"] & UP),
        carrier=bool(message["flags"] & CARRIER),
        genmode=message.get_nested(*mode),
        snooping=bool(message.get_nested(*data)),
        port=port(message) if master else Port(),
        tunnel=tunnel(message) if kind == "vxlan" else None,
    )


def port(message: Any) -> Port:
    """Read how its bridge treats the device."""
    where = ("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA")
    flags = {
        name: message.get_nested(*where, f"IFLA_BRPORT_{word.upper()}")
        for name, word in BRIDGE_FLAGS.items()
    }
    return Port(**{name: bool(on) for name, on in flags.items() if on is not None})


def tunnel(message: Any) -> Tunnel:
    """Read what the VXLAN device was made with."""

    def data(name: str) -> Any:
        where = ("IFLA_LINKINFO", "IFLA_INFO_DATA", f"IFLA_VXLAN_{name}")
        return message.get_nested(*where)

    local = data("LOCAL") or data("LOCAL6")
    return Tunnel(
        vni=data("ID") or 0,
        local=ipaddress.ip_address(local) if local else None,
        port=data("PORT") or 0,
        learning=bool(data("LEARNING")),
    )
