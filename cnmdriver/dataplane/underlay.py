"""The host's end of the tunnels: by which address and device other hosts reach it."""

from collections.abc import Iterable
from ipaddress import ip_address

from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.netlink import Netlink, Own
from cnmdriver.errors import InvalidParameter
from cnmdriver.model import IPAddress, Underlay

ELSEWHERE = (ip_address("1.1.1.1"), ip_address("2606:4700:4700::1111"))
"""Addresses that only a default route leads to; nothing is sent there."""
USUAL_MTU = 1500


async def underlay(
    netlink: Netlink, links: Links, wish: str, towards: Iterable[IPAddress]
) -> Underlay:
    """Find the address that is wished for, or the one that leads to other hosts."""
    mtus = {link.name: link.mtu for link in await links.outside()}
    every = await netlink.own()
    own = [a for a in every if a.device in mtus and _serves(a)]
    if wish:
        chosen = _wished(wish, own, mtus)
    else:
        here = {a.interface.ip for a in every}
        others = [a for a in towards if a not in here]
        chosen = await _chosen(netlink, own, (*others, *ELSEWHERE))
    mtu = USUAL_MTU if chosen.device == "lo" else mtus[chosen.device]
    return Underlay(address=chosen.interface.ip, device=chosen.device, mtu=mtu)


def _serves(own: Own) -> bool:
    address = own.interface.ip
    never = address.is_loopback or address.is_link_local or address.is_multicast
    return own.usable and not never


def _wished(wish: str, own: list[Own], devices: Iterable[str]) -> Own:
    try:
        address = ip_address(wish)
    except ValueError:
        return _of_device(wish, own, devices)
    for each in own:
        if each.interface.ip == address:
            return each
    raise InvalidParameter(
        f"tunnels cannot end at {address}: no device of this host has that address for "
        f"other machines; choose with --vtep ADDRESS one of {_listed(own)}"
    )


def _of_device(wish: str, own: list[Own], devices: Iterable[str]) -> Own:
    there = sorted(
        (each for each in own if each.device == wish),
        key=lambda each: each.interface.version,
    )
    if there:
        return there[0]
    stands = "it has no address for other machines"
    if wish not in devices:
        stands = "there is no such device or address"
    raise InvalidParameter(
        f"tunnels cannot end at {wish}: {stands}; choose with --vtep ADDRESS one of "
        f"{_listed(own)}"
    )


async def _chosen(
    netlink: Netlink, own: list[Own], towards: Iterable[IPAddress]
) -> Own:
    for address in towards:
        way = await netlink.towards(address)
        for each in own if way is not None else ():
            if way is not None and way.source == each.interface.ip:
                return each
    raise InvalidParameter(
        "no address for tunnels was found: there is no way to the store's servers on "
        "other machines, and no default route; choose with --vtep ADDRESS one of "
        f"{_listed(own)}"
    )


def _listed(own: list[Own]) -> str:
    return ", ".join(str(each.interface.ip) for each in own) or "none that is here now"
