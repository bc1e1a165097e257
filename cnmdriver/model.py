"""
The records pynet keeps: container network model nouns, nothing of their storage.

All are immutable; a change is a new value (`dataclasses.replace`). Addresses are
`ipaddress` values and never text, so that two spellings of one address are equal.
"""

from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    IPAddress = IPv4Address | IPv6Address
    IPNetwork = IPv4Network | IPv6Network
else:
    # A decoder takes one class per field, not a union: the two families' common base.
    IPAddress = IPv4Address.__mro__[2]
    IPNetwork = IPv4Network.__mro__[2]
IPInterface = IPv4Interface | IPv6Interface

TCP, UDP, SCTP = 6, 17, 132
PROTOCOLS = {TCP: "tcp", UDP: "udp", SCTP: "sctp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """One pool of a network, with the addresses that are not for containers."""

    space: str
    pool: IPNetwork
    gateway: IPAddress | None = None
    reserved: tuple[IPAddress, ...] = ()

    @property
    def gateway_interface(self) -> IPInterface | None:
        """Return the gateway with the pool's prefix length."""
        return None if self.gateway is None else interface(self.gateway, self.pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What all hosts of a network agree on."""

    id: str
    mode: str
    subnets: tuple[Subnet, ...]
    mtu: int
    internal: bool = False
    icc: bool = True
    masquerade: bool = True
    gateway: str = "pynet"
    """Who gives the default route: `pynet`, or `docker` for docker_gwbridge."""
    vni: int = 0
    """The VXLAN network identifier of an overlay (RFC 7348), 0 for other modes."""
    flood: bool = False
    """Whether broadcast and multicast go to all hosts of an overlay."""
    host_access: bool = False
    """Whether each host has an address of its own on an overlay."""
    spoof: bool = False
    """Whether containers may send from MACs and addresses that are not theirs."""
    swarm: bool = False
    """
    Whether the manager of a swarm allocated it.

    Then it has Docker's own id, which is the same on all nodes, the manager gives out
    its addresses, and it lives until the manager frees it.
    """

    def subnet_of(self, address: IPAddress) -> Subnet | None:
        """Return the subnet that holds the address."""
        return next((s for s in self.subnets if address in s.pool), None)

    def has(self, version: int) -> bool:
        """Tell whether the network has a subnet of this IP version."""
        return any(s.pool.version == version for s in self.subnets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """
    A host's part in a network.

    A member whose `docker_id` is empty holds pools for a network that Docker is
    about to create here, or that belongs to another driver.
    """

    network: str
    host: str
    docker_id: str = ""
    bridge: str = ""
    host_binding: IPAddress | None = None
    prefix: str = "eth"
    attach: str = "auto"
    """How interfaces get into sandboxes: `moved`, `direct` or `auto`."""
    options: tuple[tuple[str, str], ...] = ()
    claims: tuple[str, ...] = ()
    """The pool ids Docker holds here."""
    ipv4: IPv4Interface | None = None
    """The host's own address on the network, where it has `host_access`."""
    ipv6: IPv6Interface | None = None

    @property
    def addresses(self) -> tuple[IPInterface, ...]:
        """Return the host's own addresses on the network, IPv4 first."""
        return tuple(a for a in (self.ipv4, self.ipv6) if a is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pool that is handed out; its network may not exist yet."""

    space: str
    cidr: IPNetwork
    network: str
    claimed: bool = False
    """Whether a CreateNetwork of ours took it: only then idle addresses lapse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """One address that is taken. Provisional until a call of Docker binds it."""

    space: str
    cidr: IPNetwork
    ip: IPAddress
    host: str
    bound: bool = False
    endpoint: str = ""
    name: str = ""
    gateway: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """
    A part of a pool whose addresses only one host gives out, also without the store.

    Others ask it for what is `wanted`; what is `lent` is given out as if it lay in no
    block. The block ends with its owner's part in the network, or when one asks and the
    owner uses nothing of it.
    """

    host: str
    wanted: tuple[IPAddress, ...] = ()
    lent: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PortRequest:
    """A port to publish, as the user asked for it; host port 0 leaves it to us."""

    protocol: int
    port: int
    host_ip: IPAddress | None = None
    host_port: int = 0
    host_port_end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published port. `host_ip` None stands for every address of the host."""

    protocol: int
    port: int
    host_ip: IPAddress | None
    host_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A sandbox's place in a network, on the host that has the sandbox."""

    network: str
    id: str
    host: str
    boot: str
    mac: str
    ipv4: IPv4Interface | None = None
    ipv6: IPv6Interface | None = None
    user_mac: bool = False
    sandbox: str = ""
    """Docker's key of the sandbox; empty until it has joined."""
    attach: str = ""
    """How its interface is to get there; empty leaves it to the network."""
    device: str = ""
    """The interface's name if it is built in the sandbox; empty if Docker moves it."""
    published: tuple[Published, ...] = ()

    @property
    def addresses(self) -> tuple[IPInterface, ...]:
        """Return what it has of both families, IPv4 first."""
        return tuple(a for a in (self.ipv4, self.ipv6) if a is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that runs pynet."""

    id: str
    name: str
    version: str
    vtep: IPAddress | None = None
    """The address of its end of the VXLAN tunnels; None on a host without overlays."""
    vxlan_port: int = 4789
    """RFC 7348's UDP port, or another that all hosts of a cluster use."""
    mtu: int = 1500
    """Of the device that has the VTEP address."""
    namespace: str = "pynet"
    """The network namespace that its overlays' devices are in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Underlay:
    """The device that a host's tunnels go by, and the address they come from."""

    address: IPAddress
    device: str
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What a host must know to reach another host's endpoint, or that host itself."""

    mac: str
    addresses: tuple[IPAddress, ...]
    vtep: IPAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """
    Says, on a host's lease, that its daemon runs.

    A daemon that stops cleanly leaves it on a long lease with `resting`: its
    containers are served by the kernel meanwhile.
    """

    instance: str
    """A random value of the process."""
    boot: str
    resting: bool = False
    since: float = 0.0
    """Seconds of Unix time, by the host's own clock: for people, decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """
    What every commit of a host expects, on its lease.

    Counted up to settle a commit whose answer was lost: what was not written before
    then never will be.
    """

    instance: str
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Knock:
    """Asks, in a host's name, whether another machine is alive as that host."""

    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """
    Asks another host what its kernel has of the way between two endpoints.

    With a name instead it asks which of its endpoints Docker calls so there, and with
    neither it is about the way between the two hosts alone.
    """

    id: str
    """A random value; the answer has it too."""
    network: str = ""
    endpoint: str = ""
    """Of the host that is asked."""
    other: str = ""
    """Of the host that asks."""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One thing that a packet's way depends on: how it should be, and how it is."""

    name: str
    wanted: str = ""
    found: str = ""
    well: bool | None = True
    """None where it could not be looked at, or proves nothing."""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a host that was asked has found."""

    id: str
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Says, on a long lease, that a host that is not alive may come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vni:
    """A VXLAN network identifier that is taken."""

    network: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    """The store's revision up to which a host's kernel holds what it should."""

    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The random id of a store's content, and the schema of its records."""

    id: str
    schema: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What Docker needs to know of an endpoint's device and gateway."""

    device: str
    """What it is to move into the sandbox; empty if it is there already."""
    prefix: str
    gateway4: IPv4Address | None = None
    gateway6: IPv6Address | None = None
    disable_gateway_service: bool = False


def interface(address: IPAddress, pool: IPNetwork) -> IPInterface:
    """Join an address and the prefix length of its pool."""
    if isinstance(address, IPv4Address):
        return IPv4Interface((address, pool.prefixlen))
    return IPv6Interface((address, pool.prefixlen))
