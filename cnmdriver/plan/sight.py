"""What is seen of a host beside its own objects: sandboxes, ways, filters, echoes."""

from dataclasses import dataclass

from cnmdriver.model import IPAddress, IPInterface

FAILED, INCOMPLETE, PERMANENT = 0x20, 0x01, 0x80
"""States of a neighbour, as the kernel numbers them (linux/neighbour.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A device in a sandbox."""

    name: str
    mac: str
    mtu: int
    up: bool
    carrier: bool = True
    """Whether the far end is there and up."""
    addresses: tuple[IPInterface, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """What a device takes an address's MAC to be."""

    address: IPAddress
    mac: str
    state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where packets to an address leave; no device is no way there."""

    to: IPAddress
    device: str = ""
    source: IPAddress | None = None
    up: bool = False
    carrier: bool = False
    mtu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """What a sandbox has of an endpoint: its device, None if there is none."""

    face: Face | None
    ways: tuple[Way, ...] = ()
    neighbours: tuple[Near, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The host's own packet filters, as the tools list them."""

    listings: tuple[tuple[str, str], ...] = ()
    """Each iptables program whose table is there, with what its `-S` prints."""
    ruleset: str = ""
    """All nftables tables as JSON, without the content of sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """What became of probes to an address."""

    to: IPAddress
    size: int
    """Bytes of the IP packet."""
    milliseconds: float | None = None
    """Until the first answer, None if there was none."""
    error: str = ""
    """Why it could not be sent."""

    @property
    def answered(self) -> bool:
        """Tell whether anything came back."""
        return self.milliseconds is not None
