"""
What one host has of the way between two endpoints, step by step, as values.

Each step compares what is planned with what was found. Most of it follows from the
plans, as everything does; the rest (sandbox, routes, the host's own packet filters) is
what plans stand on and do not state.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnmdriver.insight import filters
from cnmdriver.insight.filters import Packet
from cnmdriver.model import Endpoint, Hop, Host, IPAddress, Network
from cnmdriver.plan import firewall, ops
from cnmdriver.plan.ops import (
    Address,
    Bridge,
    Command,
    Element,
    Fdb,
    Interface,
    Namespace,
    Neighbour,
    Op,
    Plan,
    Sysctl,
    Table,
    Veth,
    Vxlan,
)
from cnmdriver.plan.overlay import OVERHEAD
from cnmdriver.plan.sight import FAILED, INCOMPLETE, Face, Filters, Inner, Way

GUARD = {"tunnels", "ends4", "ends6", "vteps4", "vteps6"}
"""The sets that say whose tunnels are let in."""
BY_ITSELF = "pynet does so by itself within seconds"
SHOWN = 3

OUT = (
    *("endpoint", "address", "interface", "container's route"),
    *("container's neighbour", "port", "anti-spoof", "bridge", "policy", "filter"),
    *("host", "neighbour", "bridge entry", "tunnel entry", "tunnel device"),
    *("tunnel received", "route", "underlay", "firewall out"),
)
"""The order of steps for what leaves a host's endpoint."""
IN = (
    *("kernel", "host", "underlay", "firewall in", "tunnel guard", "tunnel device"),
    *("tunnel received", "bridge", "policy", "filter", "port", "anti-spoof"),
    *("interface", "address"),
    *("endpoint", "container's route", "container's neighbour", "neighbour"),
    *("bridge entry", "tunnel entry", "route", "firewall out"),
)
"""The order for what comes to a host's endpoint, and for the way back."""
BACK = ("firewall in", "tunnel guard")
RECEIVED = "tunnel received"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """All that was seen, and what should be."""

    network: Network
    host: Host
    mine: Endpoint
    other: Endpoint
    peer: Host | None = None
    """The other's host, None if it is the same."""
    hidden: str = ""
    """Why this host has hidden what the other host has, if it has."""
    taken: tuple[IPAddress, ...] = ()
    """Addresses of the endpoint that another one has as well."""
    own: Plan = ()
    """What the endpoint calls for here, nothing before it joins."""
    shared: Plan = ()
    """What the network calls for here."""
    remote: Plan = ()
    """What the other's record calls for here."""
    found: Plan = ()
    inner: Inner | None = None
    lost: str = ""
    """Why the device was not found, or without `inner` could not be looked for."""
    way: Way | None = None
    filters: Filters = field(default_factory=Filters)
    received: int | None = None
    """Frames that the network's tunnel has taken so far."""
    repairs: bool = True


def hops(look: Look) -> tuple[Hop, ...]:
    """Return every step, in the order `OUT`, then what only the way back meets."""
    return (
        endpoint(look),
        address(look),
        *interface(look),
        *stated(look),
        *(between(look) if look.peer is not None else ()),
    )


def ordered(found: Iterable[Hop], names: tuple[str, ...]) -> list[Hop]:
    """Put steps in an order; those it does not name come last."""
    place = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda hop: place.get(hop.name, len(names)))


# The endpoint and its sandbox.


def endpoint(look: Look) -> Hop:
    """Tell whether the endpoint has joined a sandbox of this boot."""
    if look.own:
        return Hop(name="endpoint", wanted="joined", found="joined")
    return Hop(
        name="endpoint",
        wanted="joined",
        found="it has not joined a sandbox since the host was started",
        well=False,
        remedy="start its container",
    )


def address(look: Look) -> Hop:
    """Tell whether the endpoint alone has its addresses."""
    wanted = ", ".join(str(a) for a in look.mine.addresses) or "none"
    if not look.taken:
        return Hop(name="address", wanted=wanted, found=wanted)
    return Hop(
        name="address",
        wanted=wanted,
        found=f"another endpoint has {listed(look.taken)} too",
        well=False,
        remedy="remove one of the two containers; pynet ipam ls shows who has it",
    )


def interface(look: Look) -> Iterator[Hop]:
    """Yield what the sandbox has: device, addresses, route and neighbour."""
    if not look.own:
        return
    if look.inner is None or look.inner.face is None:
        yield Hop(
            name="interface",
            wanted="the far end of the pair, in the sandbox",
            found=look.lost or "it is not there",
            well=None if look.inner is None else False,
            remedy="docker network disconnect and connect the container, or restart it"
            if look.inner is not None
            else "pynet status tells what the daemon may not do",
        )
        return
    face = look.inner.face
    yield from device(look, face)
    yield from leading(look, face, look.inner)
    yield from meant(look, look.inner)


def device(look: Look, face: Face) -> Iterator[Hop]:
    """Yield the state of the sandbox's device."""
    amiss: list[str] = []
    fixes: list[Command] = []
    if not face.up:
        amiss.append("down")
        fixes.append(("ip", "link", "set", face.name, "up"))
    if face.mac != look.mine.mac:
        amiss.append(f"MAC {face.mac} instead of {look.mine.mac}")
        fixes.append(("ip", "link", "set", face.name, "address", look.mine.mac))
    for one in look.mine.addresses:
        if one not in face.addresses:
            amiss.append(f"without {one}")
            fixes.append(("ip", "addr", "add", str(one), "dev", face.name))
    yield Hop(
        name="interface",
        wanted=f"{face.name} up, with {listed(look.mine.addresses)}",
        found=f"{face.name} is {', '.join(amiss)}" if amiss else f"{face.name} is up",
        well=not amiss,
        remedy=within(look, fixes),
    )


def leading(look: Look, face: Face, inner: Inner) -> Iterator[Hop]:
    """Yield where the sandbox sends packets to the other."""
    wrong = [way for way in inner.ways if way.device != face.name]
    said = [
        f"{w.to} goes to {w.device}" if w.device else f"there is no way to {w.to}"
        for w in wrong
    ]
    yield Hop(
        name="container's route",
        wanted=f"by {face.name}",
        found=", ".join(said) or f"by {face.name}",
        well=not wrong,
        remedy=within(look, [("ip", "route", "show", "table", "all")]) if wrong else "",
    )


def meant(look: Look, inner: Inner) -> Iterator[Hop]:
    """Yield whose MAC the sandbox takes the other's to be."""
    theirs = {one.ip for one in look.other.addresses}
    wrong = [
        near
        for near in inner.neighbours
        if near.address in theirs
        and not near.state & (FAILED | INCOMPLETE)
        and near.mac != look.other.mac
    ]
    face = inner.face.name if inner.face is not None else ""
    fixes = [("ip", "neigh", "del", str(n.address), "dev", face) for n in wrong]
    yield Hop(
        name="container's neighbour",
        wanted=f"{look.other.mac}, or nothing yet",
        found=", ".join(f"{n.address} is {n.mac}" for n in wrong) or "nothing wrong",
        well=not wrong,
        remedy=within(look, fixes),
    )


def within(look: Look, commands: Iterable[Command]) -> str:
    """Return commands that are run in the sandbox."""
    enter = ("nsenter", f"--net={look.mine.sandbox}")
    return " && ".join(shlex.join((*enter, *command)) for command in commands)


# What plans state.


def stated(look: Look) -> Iterator[Hop]:
    """Yield what the plans call for on this host."""
    veths = [op for op in look.own if isinstance(op, Veth)]
    ports = {op.name for op in veths}
    spoof = [op for op in look.own if isinstance(op, Element) and op.family == "bridge"]
    yield planned(look, "port", veths + entries(look.own, ports))
    if spoof:
        yield planned(look, "anti-spoof", spoof)
    grounds = (Bridge, Namespace, Sysctl, Address)
    ground = [op for op in look.shared if isinstance(op, grounds)]
    yield planned(look, "bridge", sorted(ground, key=lambda op: type(op) is not Bridge))
    if not look.network.icc:
        yield Hop(
            name="policy",
            wanted="containers of the network may talk to each other",
            found="the network was made with pynet.icc=false",
            well=False,
            remedy="make the network without -o pynet.icc=false",
        )
    yield planned(look, "filter", filtering(look.shared))


def entries(plan: Plan, ports: set[str]) -> list[Op]:
    """Return the forwarding entries of some ports."""
    return [op for op in plan if isinstance(op, Fdb) and op.device in ports]


def filtering(plan: Plan) -> list[Op]:
    """Return our tables, and what they know of a network but for its tunnels."""
    return [
        op
        for op in plan
        if isinstance(op, Table)
        or (isinstance(op, Element) and op.set not in GUARD and not op.value)
    ]


def planned(look: Look, name: str, wanted: Sequence[Op]) -> Hop:
    """Compare some operations with what is found of them."""
    have = {op.key: op for op in look.found}
    amiss, fixes = [], []
    for op in wanted:
        there = have.get(op.key)
        if there is None:
            amiss.append(f"{kind(op)} is not there")
        elif ops.differing(op, there):
            amiss.append(f"{kind(op)}: {contrast(op, there)}")
        else:
            continue
        fixes.append(mend(op, there))
    remedy = "; ".join(dict.fromkeys(filter(None, fixes)))
    if amiss and look.repairs:
        remedy = f"{BY_ITSELF}; by hand: {remedy}" if remedy else BY_ITSELF
    shown = summed([kind(op) for op in wanted])
    return Hop(
        name=name,
        wanted=shown,
        found=", ".join(few(amiss)) if amiss else shown,
        well=not amiss,
        remedy=remedy,
    )


def contrast(wanted: Op, found: Op) -> str:
    """Say in words what differs."""
    return ", ".join(
        f"{field} is {said(getattr(found, field))} and should be "
        f"{said(getattr(wanted, field))}"
        for field in ops.differing(wanted, found)
    )


def said(value: object) -> str:
    """Write a field's value, also an empty one."""
    return str(value) if value != "" else "none"


def kind(op: Op) -> str:
    """Name an operation as short as it can be told from others of its step."""
    say = WORDS.get(type(op))
    return op.key[2] if say is None else say(op)


def entry(op: Fdb) -> str:
    """Name a forwarding entry."""
    return f"{op.mac} by {op.device}" + (f" to {op.dst}" if op.dst else "")


WORDS: Mapping[type[Op], Callable[[Any], str]] = {
    Element: lambda op: f"{op.set} {{ {op.text} }}",
    Table: lambda op: f"table {op.family} {op.name}",
    Fdb: entry,
    Neighbour: lambda op: f"{op.address} is {op.mac}",
    Sysctl: lambda op: f"{op.path}={op.value}",
    Address: lambda op: f"{op.interface} on {op.device}",
}
"""How operations are named that have more to them than a name."""


def mend(wanted: Op, found: Op | None) -> str:
    """Return the commands that make one operation hold, "" if a person cannot."""
    match wanted:
        case Table():
            return "systemctl restart pynet"
        case Veth() if found is None:
            return "restart the container"
        case Bridge() | Vxlan() | Veth() | Interface() if found is not None:
            lines = [
                line for f in ops.differing(wanted, found) for line in fix(wanted, f)
            ]
        case _:
            lines = list(wanted.commands())
    return " && ".join(map(shlex.join, lines))


def fix(op: Bridge | Vxlan | Veth | Interface, field: str) -> Iterator[Command]:
    """Yield the command that changes one field of a device."""
    link = op.tool("ip", "link", "set", op.name)
    value = getattr(op, field)
    match field:
        case "up":
            yield (*link, "up")
        case "bridge":
            yield (*link, "master", str(value))
        case "mtu":
            yield (*link, "mtu", str(value))
        case "mac" if isinstance(op, Bridge):
            yield (*link, "address", str(value))
        case "alias":
            yield (*link, "alias", str(value or ""))
        case "isolated" | "hairpin" | "flood":
            port = op.tool("bridge", "link", "set", "dev", op.name)
            yield (*port, field, "on" if value else "off")


# Between hosts.


def between(look: Look) -> Iterator[Hop]:
    """Yield what an overlay needs towards the other's host."""
    peer = look.peer
    if peer is None or peer.vtep is None or look.host.vtep is None:
        yield Hop(
            name="host",
            wanted="an address of the tunnels",
            found="one of the two hosts has none",
            well=False,
            remedy="pynet host ls; name one with --vtep",
        )
        return
    yield seen(look, peer)
    if look.remote:
        far = [op for op in look.remote if isinstance(op, Fdb)]
        near = [op for op in look.remote if isinstance(op, Neighbour)]
        yield planned(look, "neighbour", near)
        yield planned(look, "bridge entry", [op for op in far if op.dst is None])
        yield planned(look, "tunnel entry", [op for op in far if op.dst is not None])
    tunnels = [op for op in look.shared if isinstance(op, Vxlan)]
    yield planned(look, "tunnel device", tunnels)
    if look.received is not None:
        yield Hop(name=RECEIVED, found=f"{look.received} frames so far")
    yield from underlay(look.host, peer, look.way, look.network.mtu)
    yield from walls(look.host, peer, look.way, look.filters)
    yield guard(look, peer.vtep)


def seen(look: Look, peer: Host) -> Hop:
    """Tell whether the other's host is one of those that live."""
    return Hop(
        name="host",
        wanted=f"{peer.name} has a lease in the store",
        found=look.hidden or f"{peer.name} has a lease in the store",
        well=not look.hidden,
        remedy=f"on {peer.name}: start pynet, and see that it reaches etcd"
        if look.hidden
        else "",
    )


def guard(look: Look, vtep: IPAddress) -> Hop:
    """Compare what lets the other's tunnels in."""
    known = [op for op in look.shared if isinstance(op, Element) and op.set in GUARD]
    member = firewall.vtep(vtep)
    wanted = [op for op in known if not op.set.startswith("vteps")]
    table = [op for op in look.shared if isinstance(op, Table) and op.family == "inet"]
    return planned(look, "tunnel guard", [*table, *wanted, member])


def underlay(host: Host, peer: Host, way: Way | None, mtu: int = 0) -> Iterator[Hop]:
    """Yield the host's way to the other's tunnels, and what it is by."""
    version = 4 if peer.vtep is None else peer.vtep.version
    if way is None or not way.device:
        yield Hop(
            name="route",
            wanted=f"a way to {peer.vtep}",
            found="there is none",
            well=False,
            remedy=f"ip -{version} route show table all; remove what rejects "
            f"{peer.vtep}, or add a route to it",
        )
        return
    yield Hop(
        name="route",
        wanted=f"a way to {peer.vtep}",
        found=f"by {way.device}, from {way.source or host.vtep}",
    )
    yield carrying(way, mtu, OVERHEAD[version])


def carrying(way: Way, mtu: int, overhead: int) -> Hop:
    """Tell whether the underlay's device is up, and has room for a network's MTU."""
    room = mtu + overhead if mtu else 0
    wanted = f"{way.device} up" + (f", MTU {room} at least" if room else "")
    if not way.up:
        found, remedy = "it is down", f"ip link set {way.device} up"
    elif not way.carrier:
        found, remedy = "nobody is at its other end", "look at its cable, or its peer"
    elif way.mtu < room:
        found = f"MTU {way.mtu}"
        remedy = f"ip link set {way.device} mtu {room}, or make the network anew with "
        remedy += f"-o pynet.mtu={way.mtu - overhead}"
    else:
        return Hop(name="underlay", wanted=wanted, found=f"up, MTU {way.mtu}")
    return Hop(name="underlay", wanted=wanted, found=found, well=False, remedy=remedy)


def walls(host: Host, peer: Host, way: Way | None, found: Filters) -> Iterator[Hop]:
    """Yield what the host's own filters do with the tunnels of both directions."""
    device = way.device if way is not None else ""
    for name, packet in (
        ("firewall out", tunnelled("output", host, host, peer, leaves=device)),
        ("firewall in", tunnelled("input", host, peer, host, enters=device)),
    ):
        rule = filters.stop(found, packet)
        wanted = f"UDP {host.vxlan_port} passes"
        yield Hop(
            name=name,
            wanted=wanted,
            found=wanted if rule is None else f"{rule.tool}: {rule.rule}",
            well=rule is None,
            remedy="" if rule is None else rule.remedy,
        )


def tunnelled(
    hook: str,
    host: Host,
    source: Host,
    target: Host,
    enters: str = "",
    leaves: str = "",
) -> Packet:
    """Return what is known of a packet of a tunnel."""
    return Packet(
        hook=hook,
        version=4 if host.vtep is None else host.vtep.version,
        port=host.vxlan_port,
        source=source.vtep,
        target=target.vtep,
        enters=enters,
        leaves=leaves,
    )


# Words.


def listed(values: Iterable[object]) -> str:
    """Write values in a line."""
    return ", ".join(map(str, values)) or "none"


def summed(texts: list[str]) -> str:
    """Name the first of some things, and count the others."""
    more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
    return f"{texts[0]}{more}" if texts else "nothing"


def few(texts: list[str]) -> list[str]:
    """Shorten a list."""
    if len(texts) <= SHOWN:
        return texts
    return [*texts[:SHOWN], f"and {len(texts) - SHOWN} more"]
