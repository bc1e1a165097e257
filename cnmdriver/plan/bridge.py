"""
Mode `bridge`: a network is a bridge in the host's namespace, the host its router.

    container            host
    ┌──────────┐         ┌──────────────────────────────────────────┐
    │     eth0 ├── veth ─┤ pe-…  pn-… (bridge, gateway)    eth0 ────┼── outside
    └──────────┘         │         nftables table inet pynet        │
                         └──────────────────────────────────────────┘

The rules come before the device, so that no packet ever finds the bridge unguarded.
"""

from cnmdriver.model import Endpoint, Host, IPAddress, Member, Network, Remote
from cnmdriver.plan import antispoof, devices, router, seats
from cnmdriver.plan.ops import HOST, Bridge, Plan, Veth


def mtu(host: Host) -> int:
    """Return Ethernet's MTU: what leaves the host is routed."""
    del host
    return 1500


def network(network: Network, member: Member, host: Host) -> Plan:
    """List what a network needs on a host, whatever is attached to it."""
    del host
    return (
        *(() if network.spoof else (antispoof.table(HOST),)),
        *router.rules(network, member.bridge),
        Bridge(
            name=member.bridge,
            # It must not change with the ports.
            mac=router.mac(network),
            mtu=network.mtu,
            alias=devices.alias(member.host, "network", network.id),
        ),
        *router.settings(network, member.bridge),
        *router.addresses(network, member.bridge),
    )


def endpoint(network: Network, member: Member, endpoint: Endpoint, host: Host) -> Plan:
    """List what an endpoint adds to its network's plan on its own host."""
    del host
    return (
        *antispoof.endpoint(network, endpoint, HOST),
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
            seat=seats.seat(endpoint),
        ),
        *router.published(endpoint),
    )


def remote(network: Network, member: Member, remote: Remote, host: Host) -> Plan:
    """Return nothing: the network ends at the host."""
    del network, member, remote, host
    return ()


def peer(network: Network, member: Member, vtep: IPAddress, host: Host) -> Plan:
    """Return nothing: the network ends at the host."""
    del network, member, vtep, host
    return ()
