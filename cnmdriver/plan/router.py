"""What makes the host a network's router, on whatever device it meets the network."""

from collections.abc import Iterator
from ipaddress import IPv6Interface

from cnmdriver.model import Endpoint, IPAddress, Network, Published
from cnmdriver.plan import devices, firewall
from cnmdriver.plan.ops import Accept, Address, Hold, Op, Plan, Sysctl

LINK_LOCAL = IPv6Interface("fe80::1/64")
"""The address of every gateway with IPv6; Docker gives its own bridges the same."""


def rules(network: Network, device: str) -> Plan:
    """List what must hold before the device is there, so that it is never unguarded."""
    versions = [v for v in (4, 6) if network.has(v)]
    open_ = not firewall.closed(network)
    return (
        firewall.table(),
        *firewall.network(network, device),
        *(Accept(version=version) for version in versions),
        *(forwarding(version) for version in versions if open_),
    )


def forwarding(version: int) -> Sysctl:
    """Let the host route; this stays, as Docker and others may rely on it by now."""
    path = "ipv4/ip_forward" if version == 4 else "ipv6/conf/all/forwarding"
    return Sysctl(path=f"net/{path}", value="1", keep=True)


def mac(network: Network) -> str:
    """Derive the gateway's MAC from its lowest address, the same on all hosts."""
    gateways = [s.gateway for s in network.subnets if s.gateway is not None]
    if gateways:
        return devices.mac(min(gateways, key=lambda a: (a.version, a)))
    return devices.colons("0242" + devices.digest(network.id, 8))


def settings(network: Network, device: str) -> Iterator[Op]:
    """Yield the settings of the device itself."""
    if network.has(4) and not firewall.closed(network):
        # Ports published on 127.0.0.1 come by here; the guard chain makes it safe.
        yield setting(device, "ipv4/conf/{}/route_localnet", "1")
    if network.has(6):
        yield setting(device, "ipv6/conf/{}/disable_ipv6", "0")
        # A container must not give the host a route.
        yield setting(device, "ipv6/conf/{}/accept_ra", "0")
    else:
        yield setting(device, "ipv6/conf/{}/disable_ipv6", "1")


def setting(device: str, path: str, value: str) -> Sysctl:
    """Return a setting of a device; `{}` in the path stands for its name."""
    return Sysctl(path=f"net/{path.format(device)}", value=value, device=device)


def addresses(network: Network, device: str) -> Iterator[Address]:
    """Yield the gateway addresses; with Docker as the gateway the host has none."""
    if network.gateway != "pynet":
        return
    if network.has(6):
        # A router asks for its neighbours from a link-local address, and from no other.
        yield Address(device=device, interface=LINK_LOCAL)
    for subnet in network.subnets:
        gateway = subnet.gateway_interface
        if gateway is not None:
            yield Address(device=device, interface=gateway)


def published(endpoint: Endpoint) -> Plan:
    """List the sockets that hold an endpoint's ports, and what translates them."""
    return (
        *(hold(port, endpoint) for port in endpoint.published),
        *firewall.published(endpoint),
    )


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
