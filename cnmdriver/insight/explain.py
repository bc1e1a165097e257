"""
Plans as the commands a person would type: whole, in order, to be run by `bash -e`.

What Docker does itself is printed too, below a line that begins with `# Docker:`, so
that an empty network namespace ends as the host is. Names come from users: in a comment
they are stripped of everything that could end the line.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from cnmdriver.driver.network import attachment
from cnmdriver.driver.site import Site
from cnmdriver.model import Endpoint, IPAddress, Member, Network
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import (
    HOST,
    Accept,
    Address,
    Bridge,
    Command,
    Element,
    Fdb,
    Hold,
    Interface,
    Key,
    Namespace,
    Neighbour,
    Op,
    Plan,
    Route,
    Sysctl,
    Table,
    Veth,
    Vxlan,
)
from cnmdriver.store import records

WHO = "who is where, as nothing is learnt: MAC to host or port, address to MAC"
PURPOSES: dict[type[Op], str] = {
    Namespace: "a namespace for the overlays: the host's firewall sees nothing in it",
    Element: "what the sets know",
    Accept: "let our devices pass the host's own FORWARD chain",
    Bridge: "the bridge",
    Vxlan: "the tunnels: a port of the bridge that leads to the other hosts",
    Fdb: WHO,
    Neighbour: WHO,
    Sysctl: "settings of the device",
    Interface: "the host's end of that pair",
    Address: "the host's addresses there",
    Route: "the host's way to the pools, by its own address there",
    Hold: "the daemon keeps the published ports from other programs",
}
TABLES = {
    "inet": "the chains every packet of ours passes, and the sets they look into",
    "bridge": "what each port may send, and that no frame from or to a gateway of ours "
    "passes a tunnel",
}
SETTINGS = {True: "let the host route", False: "nor are iptables' rules asked there"}
PAIRS = {
    "gateway": "a pair: one end is a port of the bridge, the other is the gateway",
    "access": "a pair: one end is a port of the bridge, the other is the host's own",
    "endpoint": "a pair: one end is a port of the bridge, the other is for the sandbox",
    "seat": "a pair: one end is a port of the bridge, the other is in the sandbox",
}
"""By the kind in the alias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A network or an endpoint: what to call it, its plan, and what Docker adds."""

    title: str
    first: tuple[Command, ...] = ()
    """What Docker does before the plan."""
    plan: Plan = ()
    docker: tuple[Command, ...] = ()
    remark: str = ""


def explain(site: Site, members: Iterable[Member]) -> str:
    """Return the commands for these networks, with what is attached to them here."""
    return script(site.host.name, parts(site, list(members)))


def script(host: str, listed: Iterable[Part]) -> str:
    """Write parts in order; what several of them share comes once, at its first."""
    lines = [
        f"# What pynet holds on host {clean(host)}, as commands for root. To try them:",
        "#   unshare --net --mount sh -c 'mount -t tmpfs none /run; bash -e' <FILE",
        '# What stands below a line with "# Docker:" is done by Docker itself.',
    ]
    shown: set[Key] = set()
    for part in listed:
        fresh = tuple(op for op in ops.union((part.plan,)) if op.key not in shown)
        shown.update(op.key for op in fresh)
        lines += ["", f"# {'=' * 8} {clean(part.title)}"]
        lines += sandbox(part.first)
        for purpose, group in groupby(fresh, key=purpose_of):
            lines += block(purpose, tuple(group))
        lines += docker(part)
    return "\n".join(lines) + "\n"


def purpose_of(op: Op) -> str:
    """Say what an operation is for."""
    match op:
        case Sysctl(device=""):
            return SETTINGS[op.where == HOST]
        case Table():
            return TABLES[op.family]
        case Veth():
            kind = "seat" if op.seat is not None else devices.kind(op.alias)
            return PAIRS.get(kind, PAIRS["endpoint"])
        case Fdb(mac=ops.FLOOD):
            return "what is for everybody goes to every host"
    return PURPOSES[type(op)]


def block(purpose: str, group: Plan) -> Iterator[str]:
    """Yield the lines of operations that have one purpose."""
    chains = [c for op in group if isinstance(op, Accept) for c in chain(op.version)]
    if chains:
        yield from (
            "",
            "# Docker: the chain it leaves to others",
            *map(shlex.join, chains),
        )
    yield from ("", f"# {purpose}")
    for op in group:
        if isinstance(op, Hold):
            yield f"# - {held(op)}"
        yield from map(shlex.join, op.commands())


def chain(version: int) -> tuple[Command, ...]:
    """Return how Docker makes the chain our rules stand in."""
    tool = "iptables" if version == 4 else "ip6tables"
    return (
        (tool, "-w", "5", "-N", "DOCKER-USER"),
        (tool, "-w", "5", "-I", "FORWARD", "-j", "DOCKER-USER"),
    )


def held(op: Hold) -> str:
    """Name a port the daemon holds."""
    _, _, protocol, address, port = op.key
    where = "" if address == "*" else f" of {address}"
    return f"{port}/{protocol}{where}"


def docker(part: Part) -> Iterator[str]:
    """Yield what Docker adds to a part."""
    yield from sandbox(part.docker)
    if part.remark:
        yield from ("", f"# {part.remark}")


def sandbox(commands: tuple[Command, ...]) -> Iterator[str]:
    """Yield what Docker does to a sandbox."""
    if commands:
        yield from ("", "# Docker: the sandbox", *map(shlex.join, commands))


def clean(text: str) -> str:
    """Make a user's text safe for a comment: one line, nothing invisible."""
    return "".join(c if c.isprintable() else "?" for c in text)


def parts(site: Site, members: list[Member]) -> Iterator[Part]:
    """Yield each network, followed by what is attached to it here."""
    members.sort(key=lambda m: (site.name(m.docker_id), m.docker_id))
    seats = {s.endpoint.id: s for s in seated(site, members)}
    for member in members:
        name = site.name(member.docker_id)
        network = site.view.get(Network, records.network(member.network))
        if network is None:
            yield Part(title=f"network {name}", remark="it has no record in the store")
            continue
        pools = " ".join(str(s.pool) for s in network.subnets)
        yield Part(title=f"network {name} {pools}", plan=site.network_plan(member))
        for endpoint in site.endpoints(member.network):
            seat = seats.get(endpoint.id)
            yield Part(
                title=f"endpoint {site.name(endpoint.id)} on network {name}",
                first=seat.opening() if seat else (),
                plan=site.endpoint_plan(endpoint),
                docker=seat.commands() if seat else (),
                remark=remark(network, seat),
            )
        others = site.remote_plan(member)
        if others:
            yield Part(title=f"what other hosts have on network {name}", plan=others)


def remark(network: Network, seat: "Seat | None") -> str:
    """Say what a reader would miss."""
    if seat is None:
        return "it has not joined a sandbox: nothing holds for it yet"
    if network.gateway == "docker" and not network.internal:
        return "Docker: the way out is a device of its own, on docker_gwbridge"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A device in a sandbox, with what Docker does to put it there."""

    endpoint: Endpoint
    source: str
    """The device that Docker moves; empty if it is built in the sandbox."""
    device: str
    opens: bool
    gateways: tuple[IPAddress, ...]

    @property
    def inside(self) -> Command:
        """Return how a command begins that works in the sandbox."""
        return ("ip", "-n", self.sandbox)

    @property
    def sandbox(self) -> str:
        """Return what `ip netns` would call the sandbox."""
        return PurePosixPath(self.endpoint.sandbox).name

    def opening(self) -> tuple[Command, ...]:
        """Return what Docker does before Join, as commands."""
        return (("ip", "netns", "add", self.sandbox),) if self.opens else ()

    def commands(self) -> tuple[Command, ...]:
        """Return what Docker does after Join, as commands."""
        return (
            *(self.moving() if self.source else ()),
            *(
                (*self.inside, f"-{g.version}", "route", "add", "default")
                + ("via", str(g))
                for g in self.gateways
            ),
        )

    def moving(self) -> tuple[Command, ...]:
        """Return how Docker moves a device."""
        sandbox, inside = self.sandbox, self.inside
        return (
            ("ip", "link", "set", self.source, "netns", sandbox, "name", self.device),
            (*inside, "link", "set", self.device, "address", self.endpoint.mac),
            *(
                (*inside, "addr", "add", str(a), "dev", self.device)
                + (("nodad",) if a.version == 6 else ())
                for a in self.endpoint.addresses
            ),
            (*inside, "link", "set", self.device, "up"),
        )


def seated(site: Site, members: list[Member]) -> Iterator[Seat]:
    """Yield a seat for each endpoint that has joined; a sandbox has one way out."""
    joined = [
        (member, endpoint, gateways(site, member, endpoint))
        for member in members
        for endpoint in site.endpoints(member.network)
        if site.endpoint_plan(endpoint)
    ]
    most = sorted(joined, key=lambda j: -len(j[2]))
    way = {e.sandbox: e.id for _, e, _ in reversed(most)}
    numbers = Counter[tuple[str, str]]()
    opened: set[str] = set()
    for member, endpoint, offered in joined:
        number = numbers[endpoint.sandbox, member.prefix]
        numbers[endpoint.sandbox, member.prefix] += not endpoint.device
        yield Seat(
            endpoint=endpoint,
            source=attachment(site.network(member), member, endpoint).device,
            device=endpoint.device or f"{member.prefix}{number}",
            opens=endpoint.sandbox not in opened,
            gateways=offered if way[endpoint.sandbox] == endpoint.id else (),
        )
        opened.add(endpoint.sandbox)


def gateways(site: Site, member: Member, endpoint: Endpoint) -> tuple[IPAddress, ...]:
    """Return the gateways an endpoint offers its sandbox, IPv4 first."""
    given = attachment(site.network(member), member, endpoint)
    return tuple(g for g in (given.gateway4, given.gateway6) if g is not None)
