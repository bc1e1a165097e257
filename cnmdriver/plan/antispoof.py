"""
What keeps a container to its own name: the table of the bridges, one for all ports.

A frame is looked at where it enters a bridge, before the bridge, NAT or the host sees
it. `ports` are the endpoints' devices; what else is on a bridge (gateway, host, tunnel)
is not in it. A port lets out only its endpoint's MAC and addresses, also inside ARP and
neighbour discovery, and nothing that tells others how to reach anybody else: no router
advertisement, redirect or DHCP answer. Ethernet types but IPv4, IPv6 and ARP, tagged
frames included, are no part of the network.

What an endpoint has that no record tells:

- the link-local address that the kernel derives from the MAC (RFC 4291), and what asks
  whether an address is free, from `::` and 0.0.0.0 (RFC 4862, RFC 5227);
- link-local addresses of the user's choice (`--link-local-ip`), which Docker does not
  tell its drivers. Those of IPv4 pass among themselves, where they mean something to
  those who have one; those of IPv6 unless they look derived from a MAC or are the
  gateway's. So only containers with chosen ones can be taken for each other. The
  address of cloud machines' metadata, which is believed unasked, is nobody's. Where the
  pool itself is link-local (`assigned`), no chosen ones pass: addresses are known.

Raw expressions (`@th,64,128`) are the target of neighbour discovery, and `@…,152,16`
the two octets that mark an address as derived, as offset and length in bits.
"""

from cnmdriver.model import Endpoint, Network
from cnmdriver.plan import devices, firewall
from cnmdriver.plan.ops import Element, Plan, Table

TEXT = """\
table bridge pynet {
	counter spoofed_mac    { }
	counter spoofed_ipv4   { }
	counter spoofed_ipv6   { }
	counter spoofed_arp    { }
	counter spoofed_nd     { }
	counter spoofed_router { }
	counter spoofed_dhcp   { }
	counter spoofed_other  { }
	set ports    { type ifname; }
	set assigned { type ifname; }
	set macs     { typeof iifname . ether saddr; }
	set ips4     { typeof iifname . ip saddr; }
	set ips6     { typeof iifname . ip6 saddr; }
	set targets  { typeof iifname . @th,64,128; }

	chain spoof {
		type filter hook prerouting priority -300; policy accept;
		iifname @ports goto port
	}
	chain port {
		iifname . ether saddr != @macs counter name "spoofed_mac" drop
		ether type vmap { ip : goto port4, ip6 : goto port6, arp : goto port_arp }
		counter name "spoofed_other" drop
	}
	chain port4 {
		udp sport 67 udp dport 68 counter name "spoofed_dhcp" drop
		iifname . ip saddr @ips4 accept
		ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
		iifname != @assigned ip saddr 169.254.0.0/16 goto chosen4
		counter name "spoofed_ipv4" drop
	}
	chain chosen4 {
		ip saddr != 169.254.169.254 ip daddr 169.254.0.0/16 accept
		counter name "spoofed_ipv4" drop
	}
	chain port_arp {
		iifname . arp saddr ether != @macs counter name "spoofed_arp" drop
		iifname . arp saddr ip @ips4 accept
		arp operation request arp saddr ip 0.0.0.0 accept
		iifname != @assigned arp saddr ip 169.254.0.0/16 goto chosen_arp
		counter name "spoofed_arp" drop
	}
	chain chosen_arp {
		arp saddr ip != 169.254.169.254 arp daddr ip 169.254.0.0/16 accept
		counter name "spoofed_arp" drop
	}
	chain port6 {
		icmpv6 type { nd-router-advert, nd-redirect } counter name "spoofed_router" drop
		udp sport 547 udp dport 546 counter name "spoofed_dhcp" drop
		icmpv6 type nd-neighbor-advert jump target
		iifname . ip6 saddr @ips6 accept
		ip6 saddr :: goto nobody
		iifname != @assigned ip6 saddr fe80::/64 goto chosen6
		counter name "spoofed_ipv6" drop
	}
	chain nobody {
		icmpv6 type nd-neighbor-solicit jump target
		icmpv6 type nd-neighbor-solicit accept
		icmpv6 type { mld-listener-report, mld2-listener-report } accept
		counter name "spoofed_ipv6" drop
	}
	chain target {
		iifname . @th,64,128 @targets return
		iifname != @assigned @th,64,64 0xfe80000000000000 goto chosen_target
		counter name "spoofed_nd" drop
	}
	chain chosen_target {
		@th,152,16 != 0xfffe @th,128,64 != 0x1 return
		counter name "spoofed_nd" drop
	}
	chain chosen6 {
		@nh,152,16 0xfffe counter name "spoofed_ipv6" drop
		ip6 saddr fe80::1 counter name "spoofed_ipv6" drop
		accept
	}
"""


def table(place: str) -> Table:
    """Return the table for the bridges of a namespace in which there is no other."""
    return firewall.marked("bridge", TEXT, where=place)


def endpoint(network: Network, endpoint: Endpoint, place: str) -> Plan:
    """List what an endpoint's port lets out, and last the port, unless it may spoof."""
    if network.spoof:
        return ()
    port = f'"{devices.port(endpoint.id)}"'
    own = [address.ip for address in endpoint.addresses]
    own.append(devices.link_local(endpoint.mac).ip)
    six = [address for address in own if address.version == 6]
    items = (
        ("macs", (port, endpoint.mac)),
        *((f"ips{address.version}", (port, str(address))) for address in own),
        *(("targets", (port, hex(int(address)))) for address in six),
        *((("assigned", (port,)),) if is_link_local(network) else ()),
        ("ports", (port,)),
    )
    return tuple(
        Element(where=place, family="bridge", set=name, item=item)
        for name, item in items
    )


def is_link_local(network: Network) -> bool:
    """Tell whether link-local addresses are what the network's pools are made of."""
    return any(subnet.pool.is_link_local for subnet in network.subnets)
