"""
Mode `overlay`: one network on several hosts, its frames carried by VXLAN (RFC 7348).

    container      pynet's own namespace                   host
    ┌──────┐       ┌─────────────────────────────┐
    │ eth0 ├ veth ─┤ pe-…  pn-…  pv-… (VXLAN) ───┼── UDP ── other hosts
    └──────┘       │       (bridge)   pgp-… ─────┼── pg-… (gateway, to the outside)
                   │                  php-… ─────┼── ph-… (the host's own address)
                   └─────────────────────────────┘

No rule of the host's firewall sees a frame in that namespace, and no container reaches
the host through it. Nothing is learnt: each host is told every endpoint's MAC, address
and host, so it answers ARP and ND itself and sends a frame to the one host it is for.

With pynet as the gateway each host is the router of its own containers. Address and MAC
of the gateway are the same everywhere, so a container finds them wherever it starts; no
frame from or to that MAC may pass a tunnel. A host that takes part itself has an
address and a pair of its own, which other hosts know like any endpoint.

With both pairs the host has one way to the pool, by its own address, as only that one
reaches the containers of other hosts. What it routes comes in by the gateway and goes
back by the other pair.
"""

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_interface

from cnmdriver.model import (
    Endpoint,
    Host,
    IPAddress,
    IPInterface,
    Member,
    Network,
    Remote,
)
from cnmdriver.plan import antispoof, devices, firewall, router, seats
from cnmdriver.plan.ops import (
    FLOOD,
    Address,
    Bridge,
    Element,
    Fdb,
    Interface,
    Namespace,
    Neighbour,
    Op,
    Plan,
    Route,
    Sysctl,
    Table,
    Veth,
    Vxlan,
    union,
)

OVERHEAD = {4: 50, 6: 70}
"""The bytes a tunnel adds: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20 or IPv6 40."""
FILTERS = ("iptables", "ip6tables", "arptables")
# A chain may not be called fwd: that is a word of nft.
TEXT = f"""\
{antispoof.TEXT}
	set gateways {{ typeof iifname . ether saddr; }}

	chain forward {{
		type filter hook forward priority 0; policy accept;
		oifname . ether saddr @gateways counter drop
		iifname . ether daddr @gateways counter drop
	}}
"""


def mtu(host: Host) -> int:
    """Return what the underlay leaves of its MTU."""
    return host.mtu - OVERHEAD[4 if host.vtep is None else host.vtep.version]


def network(network: Network, member: Member, host: Host) -> Plan:
    """
    List what a network needs on a host, whatever is attached to it.

    On a host without a VTEP address it lacks the tunnel only: what containers of one
    host have of each other stays.
    """
    place = host.namespace
    routed = not firewall.closed(network)
    own = own_addresses(network, member)
    plan = (
        *ground(place, member),
        *guard(network, host),
        *(router.rules(network, devices.gateway(network.id)) if routed else ()),
        *((kept_local(network, place),) if routed else ()),
        *(access_rules(network) if own else ()),
        *switch(network, member, place),
        *tunnel(network, member, host),
        *(gateway(network, member, place) if routed else ()),
        *(access(network, member, place) if own else ()),
    )
    # Both of the host's devices want its table.
    return union((plan,))


def endpoint(network: Network, member: Member, endpoint: Endpoint, host: Host) -> Plan:
    """List what an endpoint adds on its own host."""
    del member
    port = devices.port(endpoint.id)
    return (
        *antispoof.endpoint(network, endpoint, host.namespace),
        Veth(
            where=host.namespace,
            name=port,
            peer=devices.peer(endpoint.id),
            mac=endpoint.mac,
            bridge=devices.bridge(network.id),
            mtu=network.mtu,
            isolated=not network.icc,
            alias=devices.alias(endpoint.host, "endpoint", endpoint.id),
            seat=seats.seat(endpoint),
        ),
        Fdb(where=host.namespace, device=port, mac=endpoint.mac),
        *(() if firewall.closed(network) else router.published(endpoint)),
    )


def remote(network: Network, member: Member, remote: Remote, host: Host) -> Plan:
    """List what lets a host reach an endpoint of another host, or that host itself."""
    del member
    if not reachable(network, remote.vtep, host):
        return ()
    place, device = host.namespace, devices.vxlan(network.id)
    return (
        Fdb(where=place, device=device, mac=remote.mac, dst=remote.vtep),
        Fdb(where=place, device=device, mac=remote.mac),
        *(
            Neighbour(
                where=place,
                device=devices.bridge(network.id),
                address=address,
                mac=remote.mac,
            )
            for address in remote.addresses
            if network.has(address.version)
        ),
    )


def peer(network: Network, member: Member, vtep: IPAddress, host: Host) -> Plan:
    """List what a host needs for another host that has a part in the network."""
    del member
    if not network.flood or not reachable(network, vtep, host):
        return ()
    device = devices.vxlan(network.id)
    return (Fdb(where=host.namespace, device=device, mac=FLOOD, dst=vtep),)


def reachable(network: Network, vtep: IPAddress, host: Host) -> bool:
    """Tell whether the host has a tunnel of the VTEP's family."""
    own = host.vtep
    return bool(network.vni) and own is not None and own.version == vtep.version


# What all networks share.


def ground(place: str, member: Member) -> Plan:
    """List what all overlays share: the namespace, where only our own table filters."""
    return (
        Namespace(name=place, alias=devices.alias(member.host, "namespace", place)),
        *(
            Sysctl(where=place, path=f"net/bridge/bridge-nf-call-{name}", value="0")
            for name in FILTERS
        ),
        table(place),
    )


def table(place: str) -> Table:
    """Return the table of pynet's namespace."""
    return firewall.marked("bridge", TEXT, where=place)


# The network itself.


def switch(network: Network, member: Member, place: str) -> Plan:
    """List the bridge; it has neighbours to answer for, and no address."""
    name = devices.bridge(network.id)
    # The kernel takes no IPv6 neighbour on a device that has IPv6 turned off.
    off = "0" if network.has(6) else "1"
    return (
        Bridge(
            where=place,
            name=name,
            mac=devices.bridge_mac(network.id),
            mtu=network.mtu,
            alias=devices.alias(member.host, "network", network.id),
        ),
        replace(router.setting(name, "ipv6/conf/{}/disable_ipv6", off), where=place),
    )


def guard(network: Network, host: Host) -> Plan:
    """List what keeps strangers out of the network's tunnels."""
    if not network.vni or host.vtep is None:
        return ()
    known = firewall.tunnel(network.vni, host.vtep, host.vxlan_port)
    return (firewall.table(), *known)


def tunnel(network: Network, member: Member, host: Host) -> Iterator[Vxlan]:
    """Yield the VXLAN device, if the host can have one."""
    if network.vni and host.vtep is not None:
        yield Vxlan(
            where=host.namespace,
            name=devices.vxlan(network.id),
            vni=network.vni,
            local=host.vtep,
            port=host.vxlan_port,
            bridge=devices.bridge(network.id),
            mtu=network.mtu,
            flood=network.flood,
            isolated=not network.icc,
            alias=devices.alias(member.host, "tunnel", network.id),
        )


# The host as a router.


def kept_local(network: Network, place: str) -> Element:
    """Keep frames from and to the gateway out of the network's tunnels."""
    return Element(
        where=place,
        family="bridge",
        set="gateways",
        item=(f'"{devices.vxlan(network.id)}"', router.mac(network)),
    )


def gateway(network: Network, member: Member, place: str) -> Iterator[Op]:
    """Yield the way out: a port of the bridge whose other end is the gateway."""
    device = devices.gateway(network.id)
    own = own_addresses(network, member)
    port = Veth(
        where=place,
        name=devices.gateway_port(network.id),
        peer=device,
        mac=router.mac(network),
        bridge=devices.bridge(network.id),
        mtu=network.mtu,
        alias=devices.alias(member.host, "gateway", network.id),
    )
    yield from pair(port, device)
    yield from router.settings(network, device)
    if 4 in own:
        # What comes in here goes back by the other pair, and has no address there.
        yield router.setting(device, "ipv4/conf/{}/rp_filter", "2")
        yield router.setting(device, "ipv4/conf/{}/arp_ignore", "1")
    for address in router.addresses(network, device):
        face = address.interface
        # The prefix would be a second way to the pool.
        only = face.version in own and not face.is_link_local
        yield replace(address, interface=alone(face)) if only else address


def pair(port: Veth, device: str) -> Iterator[Op]:
    """Yield a pair whose other end is the host's, with its MAC on its port for good."""
    yield port
    yield Interface(name=device, pair=port.key, alias=port.alias)
    yield Fdb(where=port.where, device=port.name, mac=port.mac or "")


# The host as a member.


def own_addresses(network: Network, member: Member) -> dict[int, IPInterface]:
    """Return the host's own addresses on the network, by IP version."""
    if not network.host_access:
        return {}
    return {a.version: a for a in member.addresses if network.has(a.version)}


def access_rules(network: Network) -> Plan:
    """List what keeps the host from routing by its own place in the network."""
    return (firewall.table(), *firewall.access(network, devices.access(network.id)))


def access(network: Network, member: Member, place: str) -> Iterator[Op]:
    """Yield the host's own place in the network, and its way to the pools."""
    device = devices.access(network.id)
    own = own_addresses(network, member)
    mac = devices.mac(member.addresses[0].ip)
    port = Veth(
        where=place,
        name=devices.access_port(network.id),
        peer=device,
        mac=mac,
        bridge=devices.bridge(network.id),
        mtu=network.mtu,
        alias=devices.alias(member.host, "access", network.id),
    )
    yield from pair(port, device)
    yield from router.settings(network, device)
    # Other addresses of the host, the gateway's above all, have no place here: neither
    # may this device answer for them, nor may they be what it asks from.
    yield router.setting(device, "ipv4/conf/{}/arp_ignore", "1")
    yield router.setting(device, "ipv4/conf/{}/arp_announce", "2")
    if 6 in own:
        yield Address(device=device, interface=devices.link_local(mac))
    for address in own.values():
        yield Address(device=device, interface=alone(address))
    for subnet in network.subnets:
        source = own.get(subnet.pool.version)
        if source is not None:
            yield Route(destination=subnet.pool, device=device, source=source.ip)


def alone(address: IPInterface) -> IPInterface:
    """Return the address without its subnet."""
    return ip_interface(address.ip)
