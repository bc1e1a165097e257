"""
Names, MACs and marks of devices: all follow from ids and addresses.

An interface name has 15 bytes at most, so it carries a hash of the id; the alias has
the id itself.
"""

import hashlib
from ipaddress import IPv4Address

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


def endpoint_mac(addresses: tuple[IPInterface, ...], endpoint: str) -> str:
    """Derive an endpoint's MAC from its first address, or without one from its id."""
    if addresses:
        return mac(addresses[0].ip)
    return colons("0242" + digest(endpoint, 8))


def colons(digits: str) -> str:
    """Write twelve hex digits as a MAC."""
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def endpoint_id(found_alias: str | None) -> str:
    """Read the endpoint's id back from the alias of its pair, "" if it has none."""
    match (found_alias or "").split(":"):
        case ["pynet", _, "endpoint", name]:
            return name
    return ""


def is_live(endpoint: Endpoint, boot: str) -> bool:
    """Tell whether the endpoint's sandbox can still be there: not after a reboot."""
    return bool(endpoint.sandbox) and endpoint.boot == boot
