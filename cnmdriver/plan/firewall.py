"""
The nftables table of a host: chains that never change, sets that say all.

A network adds one element to some sets, a published port one element to a map, so the
thousandth costs what the first did. How a packet goes:

- *guard* drops what comes from outside for 127.0.0.0/8 or ::1. It is what makes
  `route_localnet` safe, which a port published on 127.0.0.1 needs.
- *publish*, before routing and for the host's own programs, translates a published
  port. It stands one before Docker's priority; of all chains at a hook the first that
  translates wins. Two kinds of clients are left to the relay: of ::1, where no answer
  from another device has a way back to, and containers without inter-container traffic,
  as the bridge may have to pass what is translated from port to port.
- *forward* decides about everything that enters or leaves a bridge of ours. A drop here
  is final, whatever the host's own FORWARD chain says. Docker's bridges are known by
  exact name: our accept in DOCKER-USER comes before Docker's own drops, and would open
  its unpublished ports.
- What comes from an overlay by the device that makes the host a member of it (`hosts`)
  goes to the host itself or to a published port, and nowhere else.
- *vtep* stands before the kernel's VXLAN socket, which takes a frame from anybody. What
  comes for a tunnel of ours, by port and VNI, must come from a member's VTEP and be
  for our own; other users of the port have other VNIs and are left alone. It must also
  come by the device that has our VTEP's address, or else by one that the host's routes
  to the sender use. Asking for the way back alone would break hosts whose routes there
  and back differ; this tells only that no member is behind a container's bridge, a
  pair of ours or another network's device.
- *postrouting* hides the pools behind the host's address, and hides a client behind the
  gateway where the answer would otherwise not come back: from the same subnet, and from
  127.0.0.1.

Sets of pairs (`self`: "b . b") say "the same bridge", as nftables cannot compare two
fields of a packet.
"""

import hashlib
from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address

from cnmdriver.model import PROTOCOLS, Endpoint, IPAddress, Network, Published
from cnmdriver.plan.ops import HOST, Element, Plan, Table

# nft 1.0.6 wants the name of a hook's priority as a number in an output chain, and no
# statement on the line of a closing brace.
TEXT = """\
table inet pynet {
	counter unknown_vtep { }
	counter wrong_way    { }
	set bridges  { type ifname; }
	set self     { type ifname . ifname; }
	set icc_off  { type ifname; }
	set internal { type ifname; }
	set hosts    { type ifname; }
	set docker   { type ifname; }
	set own4     { type ipv4_addr . ifname; flags interval; }
	set own6     { type ipv6_addr . ifname; flags interval; }
	set masq4    { type ipv4_addr; flags interval; }
	set masq6    { type ipv6_addr; flags interval; }
	set tunnels  { typeof udp dport . @th,96,24; }
	set ends4    { type ipv4_addr; }
	set ends6    { type ipv6_addr; }
	set vteps4   { type ipv4_addr; }
	set vteps6   { type ipv6_addr; }
	map any4     { type inet_proto . inet_service : ipv4_addr . inet_service; }
	map any6     { type inet_proto . inet_service : ipv6_addr . inet_service; }
	map bound4   {
		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service;
	}
	map bound6   {
		type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service;
	}

	chain guard {
		type filter hook prerouting priority raw; policy accept;
		ip daddr 127.0.0.0/8 iifname != "lo" counter drop
		ip6 daddr ::1 iifname != "lo" counter drop
	}
	chain vtep {
		type filter hook input priority -150; policy accept;
		udp dport . @th,96,24 @tunnels jump tunnel
	}
	chain tunnel {
		ip saddr != @vteps4 counter name "unknown_vtep" drop
		ip6 saddr != @vteps6 counter name "unknown_vtep" drop
		ip daddr != @ends4 counter name "wrong_way" drop
		ip6 daddr != @ends6 counter name "wrong_way" drop
		iifname "lo" counter name "wrong_way" drop
		fib daddr . iif type local return
		fib saddr . iif oif missing counter name "wrong_way" drop
	}
	chain publish {
		fib daddr type != local return
		ip6 daddr ::1 return
		iifname @icc_off return
		dnat ip to ip daddr . meta l4proto . th dport map @bound4
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6
		dnat ip to meta l4proto . th dport map @any4
		dnat ip6 to meta l4proto . th dport map @any6
	}
	chain prerouting {
		type nat hook prerouting priority -101; policy accept;
		jump publish
	}
	chain output {
		type nat hook output priority -101; policy accept;
		jump publish
	}
	chain postrouting {
		type nat hook postrouting priority 99; policy accept;
		oifname @bridges ct status dnat jump to_published
		oifname @bridges return
		ip saddr @masq4 masquerade
		ip6 saddr @masq6 masquerade
	}
	chain to_published {
		ip saddr 127.0.0.0/8 masquerade
		ip saddr . oifname @own4 masquerade
		ip6 saddr . oifname @own6 masquerade
	}
	chain forward {
		type filter hook forward priority -1; policy accept;
		iifname @bridges jump known
		oifname @bridges jump known
	}
	chain known {
		ct state established,related accept
		iifname . oifname @self jump within
		iifname @internal counter drop
		oifname @internal counter drop
		ct status dnat accept
		iifname @hosts counter drop
		oifname @bridges counter drop
		oifname @docker counter drop
	}
	chain within {
		ct status dnat accept
		iifname @icc_off counter drop
		accept
	}
"""


def table() -> Table:
    """Return the host's table."""
    return marked("inet", TEXT)


def marked(family: str, content: str, *, where: str = HOST) -> Table:
    """
    Make a table of a text that lacks its last brace.

    Its mark changes with the text, and tells how many chains and rules there are, so
    that one that lacks can be missed.
    """
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    mark = f"text_{digest}_{'_'.join(map(str, counted(content)))}"
    text = f"{content}\tchain {mark} {{\n\t}}\n}}\n"
    return Table(where=where, family=family, name="pynet", mark=mark, text=text)


def counted(content: str) -> tuple[int, int]:
    """Count the chains and the rules of a table's text; a rule is a line."""
    chains = rules = 0
    inside = False
    for line in map(str.strip, content.splitlines()):
        if line.startswith("chain "):
            chains += 1
            inside = True
        elif line == "}":
            inside = False
        elif inside and line and not line.startswith(("type ", "#")):
            rules += 1
    return chains, rules


def network(network: Network, bridge: str) -> Plan:
    """List the elements that make a bridge a network of ours."""
    quoted = f'"{bridge}"'
    nat = network.masquerade and not closed(network)
    return (
        *yes(
            quoted,
            bridges=True,
            icc_off=not network.icc,
            internal=closed(network),
        ),
        Element(set="self", item=(quoted, quoted)),
        *(
            element
            for subnet in network.subnets
            for element in pool(str(subnet.pool), subnet.pool.version, quoted, nat=nat)
        ),
    )


def access(network: Network, device: str) -> Plan:
    """
    List the elements of the device by which the host is a member of an overlay.

    A container that publishes ports may answer by it, as the host's route to the pool
    does; so translated packets pass, unless the host routes nothing for the network.
    """
    quoted = f'"{device}"'
    return (
        *yes(
            quoted,
            bridges=True,
            icc_off=not network.icc,
            internal=closed(network),
            hosts=not closed(network),
        ),
        *(
            element
            for subnet in network.subnets
            for element in pool(
                str(subnet.pool), subnet.pool.version, quoted, nat=False
            )
        ),
    )


def yes(quoted: str, **sets: bool) -> Iterator[Element]:
    """Yield a device's element of each set it is to be in."""
    for name, wanted in sets.items():
        if wanted:
            yield Element(set=name, item=(quoted,))


def closed(network: Network) -> bool:
    """Tell whether the host routes nothing for the network."""
    return network.internal or network.gateway != "pynet"


def pool(cidr: str, version: int, quoted: str, *, nat: bool) -> Iterator[Element]:
    """Yield what the table knows of one pool."""
    yield Element(set=f"own{version}", item=(cidr, quoted))
    if nat:
        yield Element(set=f"masq{version}", item=(cidr,))


def tunnel(vni: int, end: IPAddress, port: int) -> Plan:
    """List what the guard of a tunnel must know before its device is there."""
    return (
        Element(set="tunnels", item=(str(port), hex(vni))),
        Element(set=f"ends{end.version}", item=(str(end),)),
    )


def vtep(address: IPAddress) -> Element:
    """Let another member's end of the tunnels in."""
    return Element(set=f"vteps{address.version}", item=(str(address),))


def docker(bridges: Iterable[str]) -> Plan:
    """List the bridges that are Docker's, so that nothing of ours enters them."""
    return tuple(Element(set="docker", item=(f'"{name}"',)) for name in bridges)


def published(endpoint: Endpoint) -> Plan:
    """List the map elements of the endpoint's published ports, a family each."""
    return tuple(
        element
        for version, text in [(a.version, str(a.ip)) for a in endpoint.addresses]
        for port in endpoint.published
        for element in translation(port, version, text)
    )


def translation(port: Published, version: int, address: str) -> Iterator[Element]:
    """Yield the element that sends a published port to an address of its family."""
    number = (PROTOCOLS[port.protocol], str(port.host_port))
    value = (address, str(port.port))
    if port.host_ip is None or port.host_ip == unspecified(port.host_ip):
        if port.host_ip is None or port.host_ip.version == version:
            yield Element(set=f"any{version}", item=number, value=value)
    elif port.host_ip.version == version and port.host_ip != IPv6Address("::1"):
        item = (str(port.host_ip), *number)
        yield Element(set=f"bound{version}", item=item, value=value)


def unspecified(address: IPAddress) -> IPAddress:
    """Return 0.0.0.0 or :: in the address's family."""
    return type(address)(0)
