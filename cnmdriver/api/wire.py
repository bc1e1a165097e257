"""
Docker's messages, field for field, and what they mean to pynet.

Docker's JSON is loose in ways that matter here: what is missing may be absent, "" or,
for maps and lists, null; an `Options` map mixes bools, lists and objects; and a call
that Docker repeats after a broken connection has an empty body. So a request is checked
in two steps, both before anything is changed: `decode` checks names, types and lengths,
and the methods of a request turn its text into model values. Whatever does not pass is
an InvalidParameter that names the field. Unknown fields pass: newer Dockers add some.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import (
    IPv4Interface,
    IPv6Interface,
    ip_address,
)
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, field

from cnmdriver.errors import InvalidParameter
from cnmdriver.model import (
    PROTOCOLS,
    Attachment,
    IPAddress,
    IPInterface,
    IPNetwork,
    PortRequest,
    Subnet,
)
from cnmdriver.plan.options import ATTACH

_WORDS = {"id": "ID", "ip": "IP", "ipv4": "IPv4", "ipv6": "IPv6"}
_MAC = re.compile(r"\A[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
_PREFIXED = re.compile(r"\A[0-9A-Fa-f:.]+/[0-9]{1,3}\Z")
_INTERFACES: dict[int, type[IPInterface]] = {4: IPv4Interface, 6: IPv6Interface}
_EXAMPLES: dict[type[object], str] = {
    IPv4Interface: "an IPv4 address with its prefix length such as 10.1.0.2/24",
    IPv6Interface: "an IPv6 address with its prefix length such as fd00::2/64",
}
_LONGEST = 4096
_SHOWN = 64
"""How much of a wrong value an error text repeats."""


def docker_name(name: str) -> str:
    """Return Docker's name of a field: `address_ipv6` is `AddressIPv6`."""
    return "".join(_WORDS.get(word, word.capitalize()) for word in name.split("_"))


class Message(msgspec.Struct, frozen=True, kw_only=True, rename=docker_name):
    """One JSON object of Docker's protocol."""


Id = Annotated[str, Meta(max_length=128, pattern=r"\A[A-Za-z0-9_.-]+\Z")]
PoolId = Annotated[str, Meta(max_length=256, pattern=r"\A[A-Za-z0-9_.:/-]+\Z")]
Space = Annotated[str, Meta(max_length=128, pattern=r"\A[A-Za-z0-9_.-]*\Z")]
Sandbox = Annotated[str, Meta(max_length=1024, pattern=r"\A/[^\x00-\x1f\x7f-\x9f]+\Z")]
Address = Annotated[str, Meta(max_length=64)]
Name = Annotated[str, Meta(max_length=255, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Word = Annotated[str, Meta(max_length=_LONGEST)]
ProtocolNumber = Annotated[int, Meta(ge=0, le=255)]
ContainerPort = Annotated[int, Meta(ge=1, le=65535)]
HostPort = Annotated[int, Meta(ge=0, le=65535)]
Mixed = Annotated[dict[Word, object], Meta(max_length=256)]

T = TypeVar("T")
A = TypeVar("A", bound=IPInterface)
M = TypeVar("M", bound=Message)


def decode(kind: type[M], body: bytes) -> M:
    """Read a request; an empty body is a repeated call whose content was lost."""
    if kind is NoArguments:
        return kind()
    if not body.strip():
        raise InvalidParameter(
            "cannot read the request: its body is empty, as Docker repeats a call"
            " whose connection broke; do the command again"
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        text = str(error)
        raise InvalidParameter(
            f"cannot read the request: {text[:1].lower()}{text[1:]}"
        ) from error


# What is common to several messages.


class NoArguments(Message, frozen=True, kw_only=True):
    """A call without arguments; whatever its body holds is not looked at."""


class Done(Message, frozen=True, kw_only=True):
    """The answer `{}`."""


class Refusal(Message, frozen=True, kw_only=True):
    """An error, under both keys: NetworkDriver calls read one, IpamDriver the other."""

    err: str
    error: str


class PortBinding(Message, frozen=True, kw_only=True):
    """An entry of the port map, as `-p` asked for it."""

    proto: ProtocolNumber
    port: ContainerPort
    host_ip: Address = ""
    host_port: HostPort = 0
    host_port_end: HostPort = 0

    def port_request(self) -> PortRequest:
        """Return the port to publish."""
        if self.proto not in PROTOCOLS:
            names = ", ".join(f"{n} ({name})" for n, name in PROTOCOLS.items())
            raise InvalidParameter(
                f"Proto of a port must be one of {names}, not {self.proto}"
            )
        end = self.host_port_end or self.host_port
        if end < self.host_port or (end and not self.host_port):
            raise InvalidParameter(
                f"HostPort to HostPortEnd must be a range, not {self.host_port}"
                f" to {self.host_port_end}"
            )
        return PortRequest(
            protocol=self.proto,
            port=self.port,
            host_ip=_address(self.host_ip, "HostIP") if self.host_ip else None,
            host_port=self.host_port,
            host_port_end=end,
        )


class SandboxOptions(Message, frozen=True, kw_only=True):
    """What pynet reads of the options of an endpoint in its sandbox."""

    portmap: Annotated[tuple[PortBinding, ...], Meta(max_length=8192)] | None = field(
        name="com.docker.network.portmap", default=None
    )
    no_proxy_6to4: bool = field(
        name="com.docker.network.driver.private.no_proxy_6to4", default=False
    )
    attach: str = field(name="pynet.attach", default="")
    sysctls: str = field(name="com.docker.network.endpoint.sysctls", default="")


class SandboxRequest(Message, frozen=True, kw_only=True):
    """A call about an endpoint that brings the sandbox's ports."""

    network_id: Id
    endpoint_id: Id
    options: SandboxOptions | None = None

    def ports(self) -> tuple[PortRequest, ...]:
        """Return the ports to publish."""
        portmap = (self.options and self.options.portmap) or ()
        return tuple(binding.port_request() for binding in portmap)

    @property
    def ipv6_ports(self) -> bool:
        """Tell whether IPv6 host ports are this endpoint's, not another one's."""
        return not (self.options and self.options.no_proxy_6to4)


class NetworkRequest(Message, frozen=True, kw_only=True):
    """A call that names a network and nothing else."""

    network_id: Id


class EndpointRequest(Message, frozen=True, kw_only=True):
    """A call that names an endpoint and nothing else."""

    network_id: Id
    endpoint_id: Id


# The handshake.


class Activation(Message, frozen=True, kw_only=True):
    """The answer to Plugin.Activate."""

    implements: tuple[str, ...] = ("NetworkDriver", "IpamDriver")


class NetworkCapabilities(Message, frozen=True, kw_only=True):
    """The answer to NetworkDriver.GetCapabilities."""

    scope: str
    connectivity_scope: str = "global"
    gw_alloc_checker: bool = True


class IpamCapabilities(Message, frozen=True, kw_only=True):
    """The answer to IpamDriver.GetCapabilities."""

    requires_mac: bool = field(name="RequiresMACAddress", default=False)
    requires_request_replay: bool = False


class AddressSpaces(Message, frozen=True, kw_only=True):
    """The answer to IpamDriver.GetDefaultAddressSpaces."""

    local_default_address_space: str = "pynet-local"
    global_default_address_space: str = "pynet-global"


# NetworkDriver.


class IpamData(Message, frozen=True, kw_only=True):
    """One subnet, as Docker gives it to the network driver."""

    pool: Address
    address_space: Space = ""
    gateway: Address = ""
    aux_addresses: Annotated[dict[Word, Address], Meta(max_length=256)] | None = None

    def subnet(self, version: int) -> Subnet:
        """Return the subnet; its addresses must carry the pool's prefix length."""
        pool = _network(self.pool, "Pool", version)
        extra = sorted((self.aux_addresses or {}).items())
        return Subnet(
            space=self.address_space,
            pool=pool,
            gateway=_member(self.gateway, "Gateway", pool) if self.gateway else None,
            reserved=tuple(
                _member(text, f"AuxAddresses[{_shown(name)}]", pool)
                for name, text in extra
            ),
        )


Subnets = Annotated[tuple[IpamData, ...], Meta(max_length=64)]


def _subnets(ipv4: Subnets | None, ipv6: Subnets | None) -> tuple[Subnet, ...]:
    """Return the subnets of a network, IPv4 first."""
    return tuple(
        data.subnet(version)
        for version, family in ((4, ipv4), (6, ipv6))
        for data in family or ()
    )


class NetworkOptions(Message, frozen=True, kw_only=True):
    """What pynet reads of the options of a network."""

    generic: Mixed | None = field(name="com.docker.network.generic", default=None)
    internal: bool = field(name="com.docker.network.internal", default=False)


class GwAllocCheck(Message, frozen=True, kw_only=True):
    """Does a network with these options want gateway addresses."""

    options: NetworkOptions | None = None

    def driver_options(self) -> Mapping[str, str]:
        """Return the user's `-o` options."""
        return _strings(self.options.generic if self.options else None, "-o")

    @property
    def internal(self) -> bool:
        """Tell whether the network is `--internal`."""
        return bool(self.options and self.options.internal)


class CreateNetwork(GwAllocCheck, frozen=True, kw_only=True):
    """Make a network on this host."""

    network_id: Id
    ipv4_data: Subnets | None = None
    ipv6_data: Subnets | None = None

    def subnets(self) -> tuple[Subnet, ...]:
        """Return the network's subnets, IPv4 first."""
        return _subnets(self.ipv4_data, self.ipv6_data)


class AllocateNetwork(Message, frozen=True, kw_only=True):
    """Settle what all nodes of a swarm must agree on; here the options are flat."""

    network_id: Id
    options: Mixed | None = None
    ipv4_data: Subnets | None = None
    ipv6_data: Subnets | None = None

    def driver_options(self) -> Mapping[str, str]:
        """Return the user's `-o` options."""
        return _strings(self.options, "-o")

    def subnets(self) -> tuple[Subnet, ...]:
        """Return the network's subnets, IPv4 first."""
        return _subnets(self.ipv4_data, self.ipv6_data)


class Interface(Message, frozen=True, kw_only=True, omit_defaults=True):
    """An endpoint's addresses; "" is none. An answer may only add what lacks."""

    address: Address = ""
    address_ipv6: Address = ""
    mac_address: Address = ""


class CreateEndpoint(SandboxRequest, frozen=True, kw_only=True):
    """Make an endpoint; it has no sandbox yet."""

    interface: Interface | None = None

    def ipv4(self) -> IPv4Interface | None:
        """Return the IPv4 address."""
        text = self.interface.address if self.interface else ""
        return _own(text, "Interface.Address", IPv4Interface) if text else None

    def ipv6(self) -> IPv6Interface | None:
        """Return the IPv6 address."""
        text = self.interface.address_ipv6 if self.interface else ""
        if not text:
            return None
        return _own(text, "Interface.AddressIPv6", IPv6Interface)

    def mac(self) -> str:
        """Return the MAC address the user wants, in lower case; "" is any."""
        mac = self.interface.mac_address.lower() if self.interface else ""
        if mac and (not _MAC.match(mac) or mac == "00:00:00:00:00:00"):
            raise InvalidParameter(
                "Interface.MacAddress must be an address such as 02:42:0a:01:00:02,"
                f" not {_shown(mac)}"
            )
        if mac and int(mac[:2], 16) & 1:
            raise InvalidParameter(
                f"Interface.MacAddress {mac} is a multicast address; use an even"
                " first byte, such as 02"
            )
        return mac

    def attach(self) -> str:
        """Return how its interface is to get into the sandbox, "" if nobody said."""
        options = self.options or SandboxOptions()
        if options.attach not in ("", *ATTACH):
            raise InvalidParameter(
                f"option pynet.attach={_shown(options.attach)}: give "
                f"{' or '.join(ATTACH)}"
            )
        # Docker gives its settings to what it moves itself.
        return options.attach or ("moved" if options.sysctls else "")


class EndpointCreated(Message, frozen=True, kw_only=True):
    """The answer to CreateEndpoint."""

    interface: Interface = Interface()


class OperInfo(Message, frozen=True, kw_only=True):
    """The answer to EndpointOperInfo; Docker shows nothing of it."""

    value: dict[str, str] = {}


class Join(SandboxRequest, frozen=True, kw_only=True):
    """Take an endpoint into a sandbox."""

    sandbox_key: Sandbox


class InterfaceName(Message, frozen=True, kw_only=True):
    """The device Docker moves, and the prefix of its name in the sandbox."""

    src_name: str
    dst_prefix: str


class StaticRoute(Message, frozen=True, kw_only=True):
    """A route in the sandbox; type 0 goes by the next hop, 1 is on the link."""

    destination: str
    route_type: int
    next_hop: str = ""


class Joined(Message, frozen=True, kw_only=True):
    """The answer to Join."""

    interface_name: InterfaceName
    gateway: str = ""
    gateway_ipv6: str = ""
    static_routes: tuple[StaticRoute, ...] = ()
    disable_gateway_service: bool = False

    @classmethod
    def of(cls, attachment: Attachment) -> "Joined":
        """Tell Docker about the attachment."""
        return cls(
            interface_name=InterfaceName(
                src_name=attachment.device, dst_prefix=attachment.prefix
            ),
            gateway=str(attachment.gateway4 or ""),
            gateway_ipv6=str(attachment.gateway6 or ""),
            disable_gateway_service=attachment.disable_gateway_service,
        )


class GatewaySkip(Message, frozen=True, kw_only=True):
    """The answer to GwAllocCheck."""

    skip_ipv4: bool
    skip_ipv6: bool


class Allocated(Message, frozen=True, kw_only=True):
    """The answer to AllocateNetwork; its options replace the user's everywhere."""

    options: dict[str, str]


class Node(Message, frozen=True, kw_only=True):
    """A host of the cluster."""

    address: Address
    own: bool = field(name="Self", default=False)

    def ip(self) -> str:
        """Return the host's address."""
        return str(_address(self.address, "DiscoveryData.Address"))


class Discover(Message, frozen=True, kw_only=True):
    """News about a host; only type 1 has a host as its data."""

    discovery_type: int
    discovery_data: object = None

    def node(self) -> Node | None:
        """Return the host, or None if the news is about something else."""
        if self.discovery_type != 1:
            return None
        return decode(Node, msgspec.json.encode(self.discovery_data))


# IpamDriver.


class RequestPool(Message, frozen=True, kw_only=True):
    """Hand out a pool; without a `Pool` any free one."""

    address_space: Space
    pool: Address = ""
    sub_pool: Address = ""
    options: Mixed | None = None
    v6: bool = False

    @property
    def version(self) -> int:
        """Return the IP version of the pool."""
        return 6 if self.v6 else 4

    def pools(self) -> tuple[IPNetwork | None, IPNetwork | None]:
        """Return the pool and its sub-pool (`--subnet` and `--ip-range`)."""
        version = self.version
        return (
            _network(self.pool, "Pool", version) if self.pool else None,
            _network(self.sub_pool, "SubPool", version) if self.sub_pool else None,
        )

    def ipam_options(self) -> Mapping[str, str]:
        """Return the user's `--ipam-opt` options."""
        return _strings(self.options, "--ipam-opt")


class PoolGiven(Message, frozen=True, kw_only=True):
    """The answer to RequestPool."""

    pool_id: str
    pool: str
    data: dict[str, str] = {}


class ReleasePool(Message, frozen=True, kw_only=True):
    """Take a pool back."""

    pool_id: PoolId


class AddressOptions(Message, frozen=True, kw_only=True):
    """What pynet reads of the options of an address."""

    kind: Word = field(name="RequestAddressType", default="")
    name: Name = field(name="com.docker.network.endpoint.name", default="")


class RequestAddress(Message, frozen=True, kw_only=True):
    """Hand out an address; without an `Address` any free one."""

    pool_id: PoolId
    address: Address = ""
    options: AddressOptions | None = None

    def ip(self) -> IPAddress | None:
        """Return the address that is wanted."""
        return _address(self.address, "Address") if self.address else None

    @property
    def gateway(self) -> bool:
        """Tell whether the address is for a gateway."""
        return bool(self.options and self.options.kind == "com.docker.network.gateway")

    @property
    def name(self) -> str:
        """Return the name of what the address is for, if Docker tells it."""
        return self.options.name if self.options else ""


class AddressGiven(Message, frozen=True, kw_only=True):
    """The answer to RequestAddress."""

    address: str
    data: dict[str, str] = {}


class ReleaseAddress(Message, frozen=True, kw_only=True):
    """Take an address back."""

    pool_id: PoolId
    address: Address

    def ip(self) -> IPAddress:
        """Return the address."""
        return _address(self.address, "Address")


# From text to values.


def _shown(text: str) -> str:
    """Return a value for an error text: quoted, and short."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _parsed(parse: Callable[[str], T], text: str, name: str, example: str) -> T:
    """Parse an address; a scope (`%eth0`) means nothing outside its own host."""
    try:
        if "%" not in text:
            return parse(text)
    except ValueError:
        pass
    raise InvalidParameter(f"{name} must be {example}, not {_shown(text)}")


def _address(text: str, name: str) -> IPAddress:
    return _parsed(ip_address, text, name, "an address such as 10.1.0.2 or fd00::2")


def _interface(text: str, name: str, kind: type[A]) -> A:
    """Read an address with its prefix length."""
    example = _EXAMPLES[kind]
    if not _PREFIXED.match(text):
        raise InvalidParameter(f"{name} must be {example}, not {_shown(text)}")
    return _parsed(kind, text, name, example)


def _own(text: str, name: str, kind: type[A]) -> A:
    """Read an address that a single host can have, with its prefix length."""
    found = _interface(text, name, kind)
    ip = found.ip
    if ip.is_multicast or ip.is_loopback or ip.is_unspecified:
        raise InvalidParameter(
            f"{name} {found} is no address for a container; choose another --subnet"
        )
    return found


def _network(text: str, name: str, version: int) -> IPNetwork:
    """Read a pool; bits right of the prefix must be zero."""
    found = _interface(text, name, _INTERFACES[version])
    if found.ip != found.network.network_address:
        raise InvalidParameter(
            f"{name} {found} has bits set right of its prefix; use {found.network}"
        )
    return found.network


def _member(text: str, name: str, pool: IPNetwork) -> IPAddress:
    """Read an address that must carry the prefix length of its pool."""
    found = _interface(text, name, _INTERFACES[pool.version])
    if found.network != pool:
        raise InvalidParameter(
            f"{name} {found} must be an address of the pool {pool}, with its prefix"
            " length"
        )
    return found.ip


def _strings(options: Mapping[str, object] | None, flag: str) -> Mapping[str, str]:
    """Return options that can only be text, as no command line gives other ones."""
    found: dict[str, str] = {}
    for name, value in (options or {}).items():
        if not isinstance(value, str):
            raise InvalidParameter(
                f"option {_shown(name)} must be text, not {type(value).__name__};"
                f" give it as {flag} name=value"
            )
        if len(value) > _LONGEST:
            raise InvalidParameter(
                f"option {_shown(name)} must have at most {_LONGEST} characters"
            )
        found[name] = value
    return found
