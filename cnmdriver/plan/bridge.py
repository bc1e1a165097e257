"""
Mode `bridge`: a network is a bridge in the host's namespace, the host its router.

    container            host
    ┌──────────┐         ┌──────────────────────────────────────────┐
    │     eth0 ├── veth ─┤ pe-…  pn-… (bridge, gateway)    eth0 ────┼── outside
    └──────────┘         │         nftables table inet pynet        │
                         └──────────────────────────────────────────┘

The rules come before the device, so that no packet ever finds the bridge unguarded.
"""

from collections.abc import Iterator
from ipaddress import IPv6Interface

from cnmdriver.model import Endpoint, IPAddress, Member, Network, Published
from cnmdriver.plan import devices, firewall
from cnmdriver.plan.ops import Accept, Address, Bridge, Hold, Op, Plan, Sysctl, Veth

MTU = 1500
LINK_LOCAL = IPv6Interface("fe80::1/64")
"""The address of every bridge with IPv6; Docker gives its own bridges the same."""


def network(network: Network, member: Member) -> Plan:
    """List what a network needs on a host, whatever is attached to it."""
    versions = [v for v in (4, 6) if network.has(v)]
    open_ = not firewall.closed(network)
    return (
        firewall.table(),
        *firewall.network(network, member.bridge),
        *(Accept(version=version) for version in versions),
        *(forwarding(version) for version in versions if open_),
        Bridge(
            name=member.bridge,
            mac=bridge_mac(network),
            mtu=network.mtu,
            alias=devices.alias(member.host, "network", network.id),
        ),
        *settings(network, member.bridge),
        *addresses(network, member.bridge),
    )


def endpoint(network: Network, member: Member, endpoint: Endpoint) -> Plan:
    """List what an endpoint adds to its network's plan on its own host."""
    return (
        Veth(
            name=devices.port(endpoint.id),
            peer=devices.peer(endpoint.id),
            mac=endpoint.mac,
            bridge=member.bridge,
            mtu=network.mtu,
            # A container that reaches itself through a published port comes back by
            # the port it left; reflecting is only for those who publish.
            hairpin=bool(endpoint.published),
            isolated=not network.icc,
            alias=devices.alias(endpoint.host, "endpoint", endpoint.id),
        ),
        *(hold(port, endpoint) for port in endpoint.published),
        *firewall.published(endpoint),
    )


def forwarding(version: int) -> Sysctl:
    """Let the host route; this stays, as Docker and others may rely on it by now."""
    path = "ipv4/ip_forward" if version == 4 else "ipv6/conf/all/forwarding"
    return Sysctl(path=f"net/{path}", value="1", keep=True)


def bridge_mac(network: Network) -> str:
    """Derive the bridge's MAC, which must not change with its ports."""
    gateways = [s.gateway for s in network.subnets if s.gateway is not None]
    if gateways:
        return devices.mac(min(gateways, key=lambda a: (a.version, a)))
    return devices.colons("0242" + devices.digest(network.id, 8))


def settings(network: Network, bridge: str) -> Iterator[Op]:
    """Yield the settings of the bridge itself."""

    def setting(path: str, value: str) -> Sysctl:
        return Sysctl(path=f"net/{path.format(bridge)}", value=value, device=bridge)

    if network.has(4) and not firewall.closed(network):
        # Ports published on 127.0.0.1 come by here; the guard chain makes it safe.
        yield setting("ipv4/conf/{}/route_localnet", "1")
    if network.has(6):
        yield setting("ipv6/conf/{}/disable_ipv6", "0")
        # A container must not give the host a route.
        yield setting("ipv6/conf/{}/accept_ra", "0")
    else:
        yield setting("ipv6/conf/{}/disable_ipv6", "1")


def addresses(network: Network, bridge: str) -> Iterator[Address]:
    """Yield the gateway addresses; with Docker as the gateway the host has none."""
    if network.gateway != "pynet":
        return
    if network.has(6):
        # A router asks for its neighbours from a link-local address, and from no other.
        yield Address(device=bridge, interface=LINK_LOCAL)
    for subnet in network.subnets:
        gateway = subnet.gateway_interface
        if gateway is not None:
            yield Address(device=bridge, interface=gateway)


def hold(port: Published, endpoint: Endpoint) -> Hold:
    """Keep a published port, with where to relay what the kernel cannot translate."""
    return Hold(
        protocol=port.protocol,
        address=port.host_ip,
        port=port.host_port,
        target=relayed(port.host_ip, endpoint),
        target_port=port.port,
    )


def relayed(host_ip: IPAddress | None, endpoint: Endpoint) -> IPAddress | None:
    """Choose the endpoint's address for relayed traffic, of the host's own family."""
    version = 6 if host_ip is None else host_ip.version
    own = [a.ip for a in endpoint.addresses]
    return next((a for a in own if a.version == version), own[0] if own else None)
