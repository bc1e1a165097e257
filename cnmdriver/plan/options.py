"""
What a user may say with `docker network create -o key=value`.

Each option has a name of ours; some are also known by the name Docker gives them on its
own bridge driver, so that a working command line keeps working.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cnmdriver.errors import InvalidParameter
from cnmdriver.model import IPAddress

DOCKER = "com.docker.network."
VNIS = DOCKER + "driver.overlay.vxlanid_list"
"""Where Docker's own overlay shows its VNI; in a swarm pynet does so too."""
ALIASES = {
    DOCKER + "driver.mtu": "pynet.mtu",
    DOCKER + "bridge.name": "pynet.bridge",
    DOCKER + "bridge.enable_icc": "pynet.icc",
    DOCKER + "bridge.enable_ip_masquerade": "pynet.masquerade",
    DOCKER + "bridge.host_binding_ipv4": "pynet.host_binding",
    DOCKER + "container_iface_prefix": "pynet.prefix",
}
MTU = range(68, 65536)
"""RFC 791: an IPv4 link carries 68 bytes at least; IPv6 wants 1280 (RFC 8200)."""
TRUE = ("true", "1", "t", "yes", "on")
FALSE = ("false", "0", "f", "no", "off")
SPOOF = {"allow": True, "deny": False, "true": True, "false": False}


ATTACH = ("auto", "moved", "direct")
"""How interfaces get into sandboxes (`seats`)."""
GATEWAYS = {"bridge": "pynet", "overlay": "docker"}
"""The modes, each with who is the gateway if the user does not say."""
MODES = {"flood": "overlay", "host_access": "overlay", "bridge": "bridge"}
"""Options that only networks of one mode have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of one network; None where the user said nothing."""

    mode: str | None = None
    mtu: int | None = None
    icc: bool | None = None
    masquerade: bool | None = None
    gateway: str | None = None
    flood: bool | None = None
    host_access: bool | None = None
    spoof: bool | None = None
    bridge: str = ""
    host_binding: IPAddress | None = None
    prefix: str = "eth"
    attach: str = "auto"
    unknown: tuple[str, ...] = ()
    """Options of others (`com.docker.network.*`, `org.example.*`): accepted, unused."""


def check_mode(options: Options, mode: str) -> None:
    """Raise InvalidParameter if an option was given that a mode does not have."""
    for name, only in MODES.items():
        if mode != only and getattr(options, name) not in (None, ""):
            raise InvalidParameter(
                f"option pynet.{name} is for mode {only}, and the network's mode is "
                f"{mode}; leave it out or give -o pynet.mode={only}"
            )


def gateway_of(options: Options, mode: str) -> str:
    """Return who is to be the gateway of a network: the user's wish or the mode's."""
    return options.gateway or GATEWAYS[mode]


def parse(options: Mapping[str, str]) -> Options:
    """
    Read a network's options.

    Raises InvalidParameter for an unknown `pynet.*` option, a bare word or a bad value,
    with the list of what is known.
    """
    values: dict[str, object] = {}
    said: dict[str, str] = {}
    unknown = []
    for key, text in sorted(options.items()):
        name = ALIASES.get(key, key)
        if name in READERS:
            field = name.removeprefix("pynet.")
            value = READERS[name](key, text)
            first = said.setdefault(field, f"{key}={text}")
            if values.setdefault(field, value) != value:
                raise InvalidParameter(f"option {key}={text} contradicts {first}")
        elif "." not in name or name.startswith("pynet."):
            raise InvalidParameter(f"unknown option {key!r}: known are {known()}")
        else:
            unknown.append(key)
    return Options(**values, unknown=tuple(unknown))  # type: ignore[arg-type]


def known() -> str:
    """List the options for a message."""
    return ", ".join(sorted(READERS))


def boolean(key: str, text: str) -> bool:
    """Read yes or no; an option without a value is a yes."""
    if text.lower() in (*TRUE, ""):
        return True
    if text.lower() in FALSE:
        return False
    raise InvalidParameter(f"option {key}={text}: give true or false")


def mtu(key: str, text: str) -> int:
    """Read an MTU in bytes."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) not in MTU:
        raise InvalidParameter(f"option {key}={text}: give 68 to 65535 bytes")
    return int(text)


def device(key: str, text: str) -> str:
    """Read a device name (Linux `dev_valid_name`; 15 bytes)."""
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}", text) or text in {
        ".",
        "..",
    }:
        raise InvalidParameter(
            f"option {key}={text}: give a device name of 1 to 15 letters, digits, _ . -"
        )
    return text


def prefix(key: str, text: str) -> str:
    """Read the front part of an interface name, to which Docker adds a number."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,9}", text):
        raise InvalidParameter(
            f"option {key}={text}: give 1 to 10 letters, digits, _ or -"
        )
    return text


def address(key: str, text: str) -> IPAddress:
    """Read an address of the host; a scope (`%eth0`) is free text and no part of it."""
    try:
        if "%" not in text:
            return ipaddress.ip_address(text)
    except ValueError:
        pass
    raise InvalidParameter(f"option {key}={text}: give an IP address")


def spoof(key: str, text: str) -> bool:
    """Read whether containers may send from what is not theirs."""
    if text in SPOOF:
        return SPOOF[text]
    raise InvalidParameter(f"option {key}={text}: give allow or deny")


def choice(*words: str) -> Callable[[str, str], str]:
    """Make a reader that takes one of the words."""

    def read(key: str, text: str) -> str:
        if text not in words:
            raise InvalidParameter(f"option {key}={text}: give {' or '.join(words)}")
        return text

    return read


attach = choice(*ATTACH)


READERS: Mapping[str, Callable[[str, str], object]] = {
    "pynet.mode": choice(*GATEWAYS),
    "pynet.mtu": mtu,
    "pynet.bridge": device,
    "pynet.icc": boolean,
    "pynet.masquerade": boolean,
    "pynet.host_binding": address,
    "pynet.gateway": choice("pynet", "docker"),
    "pynet.flood": boolean,
    "pynet.host_access": boolean,
    "pynet.prefix": prefix,
    "pynet.attach": attach,
    "pynet.spoof": spoof,
}
