"""
Names, MACs and marks of devices: all follow from ids and addresses.

An interface name has 15 bytes at most, so it carries a hash of the id; the alias has
the id itself.
"""

import hashlib
from ipaddress import IPv4Address, IPv6Interface

from cnmdriver.model import Endpoint, IPAddress, IPInterface


def digest(text: str, digits: int = 10) -> str:
    """Return that many hex digits of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def bridge(network: str) -> str:
    """Name a network's bridge, unless the user named it."""
    return f"pn-{digest(network)}"


def port(endpoint: str) -> str:
    """Name the host's end of an endpoint's pair."""
    return f"pe-{digest(endpoint)}"


def peer(endpoint: str) -> str:
    """Name the end Docker moves into the sandbox."""
    return f"pc-{digest(endpoint)}"


def vxlan(network: str) -> str:
    """Name an overlay's VXLAN device."""
    return f"pv-{digest(network)}"


def gateway_port(network: str) -> str:
    """Name the bridge's end of the pair through which an overlay has its gateway."""
    return f"pgp-{digest(network)}"


def gateway(network: str) -> str:
    """Name the host's end of that pair."""
    return f"pg-{digest(network)}"


def access_port(network: str) -> str:
    """Name the bridge's end of the pair through which a host is on an overlay."""
    return f"php-{digest(network)}"


def access(network: str) -> str:
    """Name the host's end of that pair."""
    return f"ph-{digest(network)}"


def alias(host: str, kind: str, name: str) -> str:
    """Return the mark that tells people, and us, whose device it is."""
    return f"pynet:{host[:8]}:{kind}:{name}"


def mac(address: IPAddress) -> str:
    """
    Derive a locally administered unicast MAC from an address.

    A reused address then comes with the same MAC, so that no neighbour cache is stale.
    """
    if isinstance(address, IPv4Address):
        return colons("0242" + address.packed.hex())
    return colons("0242" + digest(str(address), 8))


def link_local(mac: str) -> IPv6Interface:
    """Derive the link-local address of a device with this MAC (RFC 4291, 2.5.6)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    eui = bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return IPv6Interface((bytes.fromhex("fe80") + bytes(6) + eui, 64))


def bridge_mac(network: str) -> str:
    """
    Derive the MAC of an overlay's bridge, which nobody sends to.

    It begins as no address's MAC does, so that it is never one of a container.
    """
    return colons("0e" + digest(network))


def endpoint_mac(addresses: tuple[IPInterface, ...], endpoint: str) -> str:
    """Derive an endpoint's MAC from its first address, or without one from its id."""
    if addresses:
        return mac(addresses[0].ip)
    return colons("0242" + digest(endpoint, 8))


def colons(digits: str) -> str:
    """Write twelve hex digits as a MAC."""
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def kind(found_alias: str | None) -> str:
    """Read the kind back from an alias of ours, "" if it is none."""
    match (found_alias or "").split(":"):
        case ["pynet", _, name, _]:
            return name
    return ""


def endpoint_id(found_alias: str | None) -> str:
    """Read the endpoint's id back from the alias of its pair, "" if it has none."""
    match (found_alias or "").split(":"):
        case ["pynet", _, "endpoint", name]:
            return name
    return ""


def is_live(endpoint: Endpoint, boot: str) -> bool:
    """Tell whether the endpoint's sandbox can still be there: not after a reboot."""
    return bool(endpoint.sandbox) and endpoint.boot == boot
