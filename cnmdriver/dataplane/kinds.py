"""What each kind of device is asked for with, and how it is read."""

import re
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from cnmdriver.dataplane.link import Link, Port, Tunnel
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import GROUP, Bridge, Interface, Veth, Vxlan, differing

ANY = IPv4Address(0)
GENMODE_NONE = 1
TTL = 64
DIGITS = "[0-9a-f]{10}"
NAMES = {
    "bridge": re.compile(f"pn-{DIGITS}"),
    "vxlan": re.compile(f"pv-{DIGITS}"),
    "veth": re.compile(f"(pe|pgp|php|pg|ph)-{DIGITS}"),
}
"""The names of devices whose alias may be missing."""
USED = re.compile("(pgp|php)-.*")
"""The names of near ends whose far ends the host itself uses."""
FAR_ENDS = re.compile("(pg|ph)-(.*)")
"""The names of those far ends."""

Device = Bridge | Veth | Vxlan | Interface


def request(op: Device, master: int) -> dict[str, Any]:
    """Return what to ask for a new device with."""
    match op:
        case Bridge():
            own = {"address": op.mac, "br_mcast_snooping": 0}
            return {"kind": "bridge", "group": GROUP, **own}
        case Vxlan():
            local = "vxlan_local" if op.local.version == 4 else "vxlan_local6"
            return {
                "kind": "vxlan",
                "mtu": op.mtu,
                "group": GROUP,
                "master": master,
                "vxlan_id": op.vni,
                local: str(op.local),
                "vxlan_port": op.port,
                "vxlan_learning": 0,
                "vxlan_ttl": TTL,
            }
        case _:
            raise KernelError(
                f"setting up device {op.name} failed: the pair it is an end of is "
                "not there"
            )


def wanted(op: Device, link: Link, master: int) -> Link:
    """Return the device as it should be, as far as that can be changed."""
    alias = link.alias if op.alias is None else op.alias
    mtu = link.mtu if isinstance(op, Interface) else op.mtu
    # A device that has no IPv6 has no such mode; a larger MTU can bring it.
    none = link.genmode is None and link.mtu == mtu
    mode = None if none else GENMODE_NONE
    common = replace(link, alias=alias, mtu=mtu, group=GROUP, genmode=mode, up=op.up)
    match op:
        case Bridge():
            return replace(common, mac=op.mac, snooping=False)
        case Veth():
            flags = {"hairpin": op.hairpin, "isolated": op.isolated}
            return replace(common, master=master, port=replace(link.port, **flags))
        case Vxlan():
            return replace(common, master=master, port=port(op))
        case Interface():
            return common


def port(op: Vxlan, *, flood: bool | None = None) -> Port:
    """Return how a bridge is to treat its way to the other hosts."""
    on = op.flood if flood is None else flood
    return Port(
        isolated=op.isolated,
        learning=False,
        suppress=True,
        unicast=on,
        multicast=on,
        broadcast=on,
    )


def fits(op: Device, link: Link, other: Link | None) -> bool:
    """Tell whether a device can be changed into what is wanted."""
    match op:
        case Bridge():
            return link.kind == "bridge"
        case Veth():
            found = veth(link, other, None)
            return link.kind == "veth" and not op.REMAKE.intersection(
                differing(op, found)
            )
        case Vxlan():
            return (
                link.tunnel is not None
                and not link.tunnel.learning
                and not op.REMAKE.intersection(differing(op, vxlan(link, None, op)))
            )
        case Interface():
            return link.kind == "veth"


def bridge(link: Link) -> Bridge:
    """Read a bridge."""
    return Bridge(
        name=link.name, mac=link.mac, mtu=link.mtu, up=link.up, alias=link.alias
    )


def veth(link: Link, other: Link | None, master: Link | None) -> Veth:
    """
    Read a pair by its end at a bridge; the far end may be out of sight.

    One that the host uses itself must not be: it is not there then, and differs.
    """
    missing = "" if USED.fullmatch(link.name) else None
    return Veth(
        name=link.name,
        peer=other.name if other else missing,
        mac=other.mac if other else missing,
        bridge=master.name if master else "",
        mtu=link.mtu,
        hairpin=link.port.hairpin,
        isolated=link.port.isolated,
        up=link.up,
        alias=link.alias,
    )


def vxlan(link: Link, master: Link | None, op: Vxlan | None) -> Vxlan:
    """
    Read a VXLAN device.

    A port with flags that no operation asks for shows as the contrary of what `op`
    wants of flooding: it is to be mended.
    """
    # One made without an address differs from any that is wanted.
    made = link.tunnel or Tunnel(vni=0, local=None, port=0, learning=True)
    found = Vxlan(
        name=link.name,
        vni=made.vni,
        local=made.local or ANY,
        port=made.port,
        bridge=master.name if master else "",
        mtu=link.mtu,
        flood=link.port.broadcast,
        isolated=link.port.isolated,
        up=link.up,
        alias=link.alias,
    )
    odd = op is not None and port(found) != link.port
    return replace(found, flood=not op.flood) if odd and op is not None else found


def interface(link: Link, namespace: str) -> Interface | None:
    """Read the far end of a pair, None if it is not one the host uses."""
    match = FAR_ENDS.fullmatch(link.name)
    if match is None:
        return None
    pair = ("device", namespace, f"{match[1]}p-{match[2]}")
    return Interface(name=link.name, pair=pair, up=link.up, alias=link.alias)
