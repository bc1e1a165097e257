"""
Findings: what a doctor makes of what was seen, as values.

Each says what is so, why that matters, and the command that mends it. Nothing here
looks at anything.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cnmdriver.insight.filters import Stop
from cnmdriver.machine import Machine
from cnmdriver.model import Hop, IPAddress
from cnmdriver.plan.sight import Echo

OK, INFO, WARNING, ERROR = "ok", "info", "warning", "error"
CODES = {OK: 0, INFO: 0, WARNING: 1, ERROR: 2}
"""What the exit code is of the worst finding."""
SLOW = 100.0
"""Milliseconds for an answer of the store that make creating networks tedious."""
SKEW = 5.0
"""Seconds by which the clocks of two hosts may differ before it is worth a word."""
OLDEST = (20, 10)
LIMITS = (
    ((27, 0), "no sysctls of a single interface (com.docker.network.endpoint.sysctls)"),
    ((28, 0), "no choice of the network that gives the way out (--gw-priority)"),
)
"""What Docker can do only from a version on, as far as a user of pynet meets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    severity: str
    what: str
    why: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What was seen of another host, and of the way there."""

    name: str
    vtep: IPAddress | None
    version: str = ""
    small: Echo | None = None
    """An ordinary ping from end to end of the tunnels."""
    sizes: tuple[Echo, ...] = ()
    """Pings that nobody may fragment, the largest first."""
    inner: Echo | None = None
    """A ping from container to container; None if there are no two to try."""
    datagram: Echo | None = None
    arrived: int | None = None
    """Frames that the other's tunnel took while we sent; None if that is not known."""
    hops: tuple[Hop, ...] = ()
    """What both hosts said of the way between them, each with its host's name."""
    silent: str = ""
    """Why it could not be asked."""
    skew: float | None = None
    """Seconds its clock is ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that was seen."""

    machine: Machine
    version: str = ""
    mtu: int = 1500
    """Bytes of the largest packets that tunnels send."""
    underlay: str = ""
    """The device of the tunnels."""
    lacking: tuple[str, ...] = ()
    """Sentences on capabilities."""
    mends: bool = True
    shared: bool = False
    """Whether the store is one that hosts share."""
    store: tuple[float, ...] = ()
    """Milliseconds of some answers of the store."""
    absent: tuple[str, ...] = ()
    """Its members that take no connections."""
    away: str = ""
    docker: str = ""
    """Its version; "" if it was not told."""
    docker_error: str = ""
    stops: Mapping[str, Stop] = field(default_factory=dict)
    """What of the host's filters stops a network's traffic, by what it stops."""
    surplus: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    foreign: tuple[tuple[str, str], ...] = ()
    malformed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    unseen: int = 0
    """Hosts beyond those."""


def judge(seen: Seen) -> list[Finding]:
    """Return all findings, those that are well too."""
    return [
        *machine(seen.machine),
        *daemon(seen),
        *docker(seen),
        *store(seen),
        *filters(seen),
        *leftovers(seen),
        *(one for peer in seen.peers for one in host(seen, peer)),
        *rest(seen),
    ]


def code(findings: Iterable[Finding]) -> int:
    """Return the exit code: 0 nothing, 1 warnings, 2 errors."""
    return max((CODES[one.severity] for one in findings), default=0)


# This machine.


def machine(found: Machine) -> Iterator[Finding]:
    """Judge kernel, programs and other managers of devices."""
    lacks = [name for name, there in found.features.items() if there is False]
    for name in lacks:
        yield Finding(
            check="kernel",
            severity=ERROR,
            what=f"kernel {found.kernel} has no {name}",
            why="networks of pynet are made of it",
            remedy=f"modprobe {name}, or install the distribution's full kernel",
        )
    if not lacks:
        yield well("kernel", f"{found.kernel} has all that is needed")
    for name in [name for name, there in found.programs.items() if not there]:
        yield Finding(
            check="programs",
            severity=WARNING,
            what=f"there is no {name}",
            why="where Docker's rules stop traffic, pynet's exception cannot be made",
            remedy="apt-get install iptables",
        )
    for manager in found.managers:
        if manager.running and not manager.told:
            yield Finding(
                check="devices",
                severity=WARNING,
                what=f"{manager.name} was not told to leave pynet's devices",
                why="it can give them addresses, or take them down",
                remedy=UNMANAGED[manager.name],
            )


UNMANAGED = {
    "systemd-networkd": "printf '[Match]\\nName=pn-* pe-* pv-* pg-* ph-* pc-*\\n"
    "[Link]\\nUnmanaged=yes\\n' > /etc/systemd/network/05-pynet.network && "
    "networkctl reload",
    "NetworkManager": "printf '[keyfile]\\nunmanaged-devices=interface-name:pn-*;"
    "interface-name:pe-*;interface-name:pg-*;interface-name:ph-*\\n' > "
    "/etc/NetworkManager/conf.d/05-pynet.conf && nmcli general reload",
    "dhcpcd": "echo 'denyinterfaces pn-* pe-* pg-* ph-* pc-*' >> /etc/dhcpcd.conf && "
    "dhcpcd --rebind",
}


def well(check: str, what: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check=check, severity=OK, what=what)


# The daemon and what it works with.


def daemon(seen: Seen) -> Iterator[Finding]:
    """Judge the daemon's means."""
    for sentence in seen.lacking:
        yield Finding(
            check="privileges",
            severity=WARNING,
            what=sentence,
            why="a part of pynet cannot work",
            remedy="systemctl edit pynet: CapabilityBoundingSet=",
        )
    if not seen.lacking:
        yield well("privileges", "the daemon has the capabilities it needs")
    if not seen.mends:
        yield Finding(
            check="daemon",
            severity=WARNING,
            what="repair=false: what others change in the kernel is left",
            why="what breaks stays broken",
            remedy="start pynet without --repair=false",
        )
    for problem in seen.problems:
        yield Finding(
            check="daemon",
            severity=ERROR,
            what=f"the last audit could not mend the kernel: {problem}",
            why="a network does not work as it should",
            remedy="pynet diff",
        )


def docker(seen: Seen) -> Iterator[Finding]:
    """Judge Docker's version."""
    if seen.docker_error:
        yield Finding(
            check="docker",
            severity=WARNING,
            what=seen.docker_error,
            why="names are not known, and what Docker forgot is not noticed",
            remedy="systemctl start docker, or name its socket with --docker",
        )
    if not seen.docker:
        return
    numbers = version(seen.docker)
    if numbers < OLDEST:
        yield Finding(
            check="docker",
            severity=ERROR,
            what=f"Docker {seen.docker} is older than 20.10",
            why="pynet was never tried with it",
            remedy="install a newer Docker",
        )
        return
    limits = [text for since, text in LIMITS if numbers < since]
    if limits:
        yield Finding(
            check="docker",
            severity=INFO,
            what=f"Docker {seen.docker}: {'; '.join(limits)}",
            why="options that a newer Docker has are not there",
        )
    else:
        yield well("docker", f"version {seen.docker}")


def version(text: str) -> tuple[int, int]:
    """Read the first two numbers of a version."""
    parts = [p for p in text.replace("-", ".").split(".") if p.isdigit()][:2]
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def store(seen: Seen) -> Iterator[Finding]:
    """Judge the store's answers, and who of it is there."""
    for member in seen.absent:
        yield Finding(
            check="store",
            severity=WARNING,
            what=f"{member} takes no connections",
            why="one member less can be lost before all wait for the store",
            remedy="start etcd there, or take it out of --store",
        )
    if seen.away:
        yield Finding(
            check="store",
            severity=ERROR,
            what=f"the store is away: {seen.away}",
            why="networks cannot be made, and other hosts' news does not come",
            remedy="etcdctl endpoint health; pynet serve --help: --store",
        )
        return
    if not seen.store:
        return
    middle = sorted(seen.store)[len(seen.store) // 2]
    if middle > SLOW:
        yield Finding(
            check="store",
            severity=WARNING,
            what=f"the store needs {middle:.0f} ms for an answer",
            why="every container that starts waits for some of them",
            remedy="etcdctl endpoint status -w table; give etcd a faster disk",
        )
    else:
        yield well("store", f"answers in {middle:.1f} ms")


def filters(seen: Seen) -> Iterator[Finding]:
    """Judge what the host's own filters do with networks."""
    for what, rule in seen.stops.items():
        yield Finding(
            check="filters",
            severity=ERROR,
            what=f"{what} is stopped by {rule.tool}: {rule.rule}",
            why="each chain at a hook can drop: pynet's own accept is not enough",
            remedy=rule.remedy,
        )
    if not seen.stops:
        yield well("filters", "no rule of the host stops a network's traffic")


def leftovers(seen: Seen) -> Iterator[Finding]:
    """Judge what is in the kernel and the store and should not be."""
    amiss = False
    for line in seen.drift:
        amiss = True
        yield Finding(
            check="kernel state",
            severity=WARNING,
            what=line,
            why="somebody changes what is pynet's",
            remedy="pynet diff; pynet explain prints how it should be",
        )
    for line in (*seen.surplus, *seen.orphans):
        amiss = True
        yield Finding(
            check="leftovers",
            severity=WARNING,
            what=f"{line} is in the kernel and in no plan",
            why="it was not removed, or its record was lost",
            remedy="pynet diff; docker network ls; restart pynet",
        )
    for name, alias in seen.foreign:
        amiss = True
        yield Finding(
            check="leftovers",
            severity=WARNING,
            what=f"device {name} is another pynet's ({alias})",
            why="two daemons on one kernel, or a state directory that was lost",
            remedy=f"if that daemon is gone for good: ip link del {name}",
        )
    for key in seen.malformed:
        amiss = True
        yield Finding(
            check="leftovers",
            severity=WARNING,
            what=f"record {key} in the store cannot be read",
            why="it is left out, and may be somebody's network or container",
            remedy=f"etcdctl get PREFIX{key}: mend it, or delete it",
        )
    if not amiss:
        yield well("leftovers", "kernel, store and plans agree")


# Other hosts.


def host(seen: Seen, peer: Peer) -> Iterator[Finding]:
    """Judge the way to another host."""
    check = f"host {peer.name}"
    if peer.silent:
        yield Finding(
            check=check,
            severity=WARNING,
            what=f"it could not be asked: {peer.silent}",
            why="what its kernel and firewall do is not known",
            remedy=f"on {peer.name}: pynet status",
        )
    yield from walls(check, peer)
    yield from room(check, seen, peer)
    yield from inner(check, seen, peer)
    yield from others(check, seen, peer)


def rest(seen: Seen) -> Iterator[Finding]:
    """Say that there are more hosts than were looked at."""
    if seen.unseen:
        yield Finding(
            check="hosts",
            severity=INFO,
            what=f"{seen.unseen} hosts more were not looked at",
            why="a doctor ends within ten seconds",
            remedy="pynet doctor on those hosts",
        )


def walls(check: str, peer: Peer) -> Iterator[Finding]:
    """Judge what each host said of routes, devices and filters between the two."""
    for hop in peer.hops:
        if hop.well is False:
            yield Finding(
                check=check,
                severity=ERROR,
                what=f"{hop.name}: {hop.found}",
                why="tunnels between the two hosts need that",
                remedy=hop.remedy,
            )


def room(check: str, seen: Seen, peer: Peer) -> Iterator[Finding]:
    """Judge how large a packet may be from end to end of the tunnels."""
    if peer.small is None:
        return
    if not peer.small.answered:
        passes = peer.inner is not None and peer.inner.answered
        doubt = ERROR if peer.small.error else WARNING
        yield Finding(
            check=check,
            severity=INFO if passes else doubt,
            what=f"{peer.small.to} answers no ping"
            + (f": {peer.small.error}" if peer.small.error else ""),
            why="it is out of reach, or drops pings: then its MTU cannot be measured",
            remedy=f"ping -I {seen.underlay} {peer.small.to}; ip route get "
            f"{peer.small.to}",
        )
        return
    passing = max((e.size for e in peer.sizes if e.answered), default=peer.small.size)
    if peer.sizes and passing < seen.mtu:
        yield Finding(
            check=check,
            severity=ERROR,
            what=f"packets of {passing} bytes pass, those of {seen.mtu} do not",
            why="large transfers between containers hang, while small ones work",
            remedy=f"ip link set {seen.underlay} mtu {passing}, and new networks; or "
            "let larger packets pass between the hosts",
        )
    elif peer.sizes:
        yield well(check, f"packets of {passing} bytes pass unfragmented")


def inner(check: str, seen: Seen, peer: Peer) -> Iterator[Finding]:
    """Judge what containers' own packets met in the tunnel."""
    if peer.inner is None:
        yield Finding(
            check=check,
            severity=INFO,
            what="no two containers on one network: the tunnel itself was not tried",
            why="the kernel opens the tunnels' port with the first shared network",
        )
        return
    if not peer.inner.answered:
        yield dead(check, peer)
        return
    yield well(check, f"tunnels pass both ways, {peer.inner.milliseconds:g} ms")
    if peer.datagram is not None and not peer.datagram.answered:
        yield Finding(
            check=check,
            severity=WARNING,
            what="pings pass the tunnel, UDP does not",
            why="checksums that a network card should compute come wrong, mostly, or "
            "a filter in the container drops them",
            remedy=f"ethtool -K {seen.underlay} tx-udp_tnl-segmentation off "
            "tx-udp_tnl-csum-segmentation off tx off",
        )
    elif peer.datagram is not None:
        yield well(check, "checksums of UDP in the tunnel are right")


def dead(check: str, peer: Peer) -> Finding:
    """Say in which direction tunnels do not pass, as far as it is known."""
    what = "tunnels do not pass"
    if peer.arrived is not None:
        what = (
            f"frames arrive at {peer.name}, and nothing comes back"
            if peer.arrived
            else f"frames do not arrive at {peer.name}"
        )
    return Finding(
        check=check,
        severity=ERROR,
        what=what,
        why="containers of the two hosts do not reach each other",
        remedy="let UDP of --vxlan-port pass between the hosts, both ways; pynet trace "
        "shows the way of one container",
    )


def others(check: str, seen: Seen, peer: Peer) -> Iterator[Finding]:
    """Judge what else is different there."""
    if peer.skew is not None and abs(peer.skew) > SKEW:
        yield Finding(
            check=check,
            severity=INFO,
            what=f"its clock is {abs(peer.skew):.0f} s "
            + ("ahead" if peer.skew > 0 else "behind"),
            why="nothing of pynet goes by it, but logs are hard to compare",
            remedy="timedatectl set-ntp true, on both",
        )
    if peer.version and seen.version and peer.version != seen.version:
        yield Finding(
            check=check,
            severity=INFO,
            what=f"it runs pynet {peer.version}, this host {seen.version}",
            why="neighbours of one version are tried with each other, others are not",
            remedy="upgrade the older one",
        )
