"""
Doctor: looks at this host and at the way to each other one.

What is measured with packets is measured with real ones: pings that nobody may fragment
from end to end of the tunnels, and a ping and a datagram from a container here to one
there. Nobody but the kernel listens on the tunnels' port, so whether frames arrive is
read off the counter of the other's tunnel device: it is asked for before and after.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from ipaddress import ip_address

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError, StoreError
from cnmdriver.insight import filters, findings, kernel
from cnmdriver.insight.filters import Packet, Stop
from cnmdriver.insight.findings import Peer, Seen
from cnmdriver.insight.pairs import Pair
from cnmdriver.insight.report import Json
from cnmdriver.insight.status import strings
from cnmdriver.insight.trace import CLOCK, arriving, host_hops
from cnmdriver.machine import Machine
from cnmdriver.machine import look as look_at_machine
from cnmdriver.model import Alive, Endpoint, Hop, Host, Member, Network, Question
from cnmdriver.plan import devices
from cnmdriver.plan.firewall import closed
from cnmdriver.plan.overlay import OVERHEAD
from cnmdriver.plan.sight import Echo, Way
from cnmdriver.privileges import lacking
from cnmdriver.redaction import USERINFO
from cnmdriver.store import records

CONNECTING = 1.0
"""Seconds for a connection to a member of the store."""
ASKED = 3
"""Answers of the store that are timed."""
AT_ONCE = 16
"""Other hosts that are looked at together, and at most."""
SIZES = (9000, 1500, 1492, 1450, 1400, 1380, 1280)
"""Bytes of packets that are tried, below those of the largest that are needed."""
OUTSIDE = ip_address("1.1.1.1")
"""An address that only a default route leads to; nothing is sent there."""


async def doctor(site: Site, info: Mapping[str, object]) -> Json:
    """
    Look at everything, and return the findings with the exit code.

    `info` is what `insight.status` describes, with the answer of `docker_version`.
    """
    seen = await look(site, info)
    found = findings.judge(seen)
    return {
        "findings": [asdict(one) for one in found],
        "code": findings.code(found),
    }


async def look(site: Site, info: Mapping[str, object]) -> Seen:
    """Look at this host and at the others."""
    machine = await asyncio.to_thread(look_at_machine)
    given = info.get("settings")
    url = str(given.get("store", "")) if isinstance(given, dict) else ""
    own, stopped, timed, peers, gone = await asyncio.gather(
        own_state(site, machine), stops(site), answers(site), others(site), absent(url)
    )
    number = len(reachable(site)) if site.host.vtep is not None else 0
    return replace(
        own,
        version=site.host.version,
        mtu=needed(site),
        lacking=lacking(),
        mends=bool(info.get("mends", True)),
        shared=site.state.store.shared,
        store=timed,
        absent=gone,
        away=USERINFO.sub("", site.state.away or ""),
        docker=str(info.get("docker_version") or ""),
        docker_error="" if info.get("docker") != "away" else "Docker does not answer",
        stops=stopped,
        orphans=tuple(strings(info.get("orphans"))),
        problems=tuple(strings(info.get("problems"))),
        peers=peers,
        unseen=max(0, number - AT_ONCE),
    )


# This host.


async def own_state(site: Site, machine: Machine) -> Seen:
    """Compare kernel, store and plans."""
    try:
        difference = await kernel.difference(site)
        foreign = await site.dataplane.foreign()
        way = await underlay(site)
    except DriverError as error:
        return Seen(machine=machine, problems=(str(error),))
    return Seen(
        machine=machine,
        underlay=way.device if way is not None else "",
        drift=tuple(replace(difference, surplus=()).lines()),
        surplus=tuple(
            line.removeprefix("- ")
            for line in replace(difference, lacking=(), changed=()).lines()
        ),
        foreign=foreign,
        malformed=tuple(sorted(site.view.malformed)),
    )


async def underlay(site: Site) -> Way | None:
    """Return the way to any other host's tunnels."""
    for host in reachable(site):
        if host.vtep is not None:
            return await site.dataplane.way(host.vtep)
    return None


def needed(site: Site) -> int:
    """Return the bytes of the largest packets that tunnels of this host send."""
    if site.host.vtep is None:
        return site.host.mtu
    overhead = OVERHEAD[site.host.vtep.version]
    networks = (
        site.view.get(Network, records.network(m.network)) for m in site.members()
    )
    sizes = [n.mtu + overhead for n in networks if n is not None and n.vni]
    return max(sizes, default=site.host.mtu)


async def answers(site: Site) -> tuple[float, ...]:
    """Time some answers of the store, in milliseconds."""
    timed: list[float] = []
    for _ in range(ASKED if site.state.away is None else 0):
        began = time.monotonic()
        try:
            await site.state.store.read(records.CLUSTER)
        except StoreError:
            return ()
        timed.append((time.monotonic() - began) * 1000)
    return tuple(timed)


async def absent(url: str) -> tuple[str, ...]:
    """Return the members of a store that take no connections."""
    scheme, _, rest = USERINFO.sub("", url).partition("://")
    members = rest.split(",") if scheme in {"etcd", "etcds"} else []
    taken = await asyncio.gather(*map(connects, members))
    return tuple(m for m, took in zip(members, taken, strict=True) if not took)


async def connects(member: str) -> bool:
    """Tell whether somebody takes connections at HOST:PORT."""
    host, _, port = member.rpartition(":")
    try:
        async with asyncio.timeout(CONNECTING):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError, ValueError):
        return False
    writer.close()
    return True


async def stops(site: Site) -> dict[str, Stop]:
    """Return what of the host's filters stops the traffic of networks here."""
    try:
        found = await site.dataplane.filters()
        way = await site.dataplane.way(OUTSIDE)
    except DriverError:
        return {}
    return {
        what: rule
        for what, packet in routed(site, way)
        if (rule := filters.stop(found, packet)) is not None
    }


def routed(site: Site, way: Way) -> Iterator[tuple[str, Packet]]:
    """Yield what networks need to pass the host's FORWARD, and what to call it."""
    for member in site.members():
        network = site.view.get(Network, records.network(member.network))
        if network is None or closed(network):
            continue
        name = site.name(member.docker_id)
        device = gateway(network, member)
        for version in (4, 6):
            if not network.has(version):
                continue
            packet = Packet(hook="forward", version=version, protocol="tcp")
            out = replace(packet, enters=device, leaves=way.device, ours=(True, False))
            back = replace(packet, enters=way.device, leaves=device, ours=(False, True))
            yield f"the way out of network {name} (IPv{version})", out
            yield f"the way to ports of network {name} (IPv{version})", back


def gateway(network: Network, member: Member) -> str:
    """Name the device by which the host routes for a network."""
    return devices.gateway(network.id) if network.vni else member.bridge


# The others.


def reachable(site: Site) -> list[Host]:
    """Return the other hosts that live and have tunnels."""
    return [
        host
        for host in site.view.all(Host, "hosts/")
        if host.id != site.host.id
        and host.vtep is not None
        and site.view.get(Alive, records.alive(host.id)) is not None
    ]


async def others(site: Site) -> tuple[Peer, ...]:
    """Look at the way to each other host; of very many, to the first of them."""
    if site.host.vtep is None or not site.state.store.shared:
        return ()
    hosts = reachable(site)[:AT_ONCE]
    return tuple(await asyncio.gather(*(other(site, host) for host in hosts)))


async def other(site: Site, host: Host) -> Peer:
    """Look at the way to one host."""
    peer = Peer(name=host.name, vtep=host.vtep, version=host.version)
    echoes, (hops, silent, skew), (inner, datagram, arrived) = await asyncio.gather(
        sizes(site, host), asked(site, host), tunnel(site, host)
    )
    own = await host_hops(site, host.id)
    return replace(
        peer,
        small=echoes[-1] if echoes else None,
        sizes=echoes[:-1],
        hops=(*labelled(site.host, own), *labelled(host, hops)),
        silent=silent,
        skew=skew,
        inner=inner,
        datagram=datagram,
        arrived=arrived,
    )


def labelled(host: Host, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
    """Name the host in each step."""
    return tuple(replace(hop, name=f"{host.name}, {hop.name}") for hop in hops)


async def sizes(site: Site, host: Host) -> tuple[Echo, ...]:
    """Ping an end of the tunnels with large packets, and last with an ordinary one."""
    if site.host.vtep is None or host.vtep is None:
        return ()
    need = needed(site)
    tried = {size for size in SIZES if size < need} | {need}
    ping, own, to = site.dataplane.ping, site.host.vtep, host.vtep
    large = (ping("", own, to, size) for size in sorted(tried, reverse=True))
    return tuple(await asyncio.gather(*large, ping("", own, to)))


async def asked(site: Site, host: Host) -> tuple[tuple[Hop, ...], str, float | None]:
    """Ask a host for its side: its steps, why there are none, how its clock differs."""
    if site.ask is None:
        return (), "", None
    began = time.time()
    try:
        hops = await site.ask(host.id, Question(id=""))
    except DriverError as error:
        return (), str(error), None
    middle = (began + time.time()) / 2
    said = [hop.found for hop in hops if hop.name == CLOCK]
    there = float(said[0]) if said and said[0].replace(".", "", 1).isdigit() else None
    steps = tuple(hop for hop in hops if hop.name != CLOCK)
    return steps, "", there - middle if there is not None else None


async def tunnel(site: Site, host: Host) -> tuple[Echo | None, Echo | None, int | None]:
    """Send a ping and a datagram from a container here to one there."""
    pair = couple(site, host)
    if pair is None:
        return None, None, None
    mine, target = next(
        (a.ip, b.ip) for a in pair.mine.addresses for b in pair.other.addresses
        if a.version == b.version
    )  # fmt: skip
    echo, datagram = await asyncio.gather(
        site.dataplane.ping(pair.mine.sandbox, mine, target),
        site.dataplane.datagram(pair.mine.sandbox, mine, target),
    )
    arrived = None if echo.answered else await arriving(site, pair)
    return echo, datagram, arrived


def couple(site: Site, host: Host) -> Pair | None:
    """Return two endpoints, here and there, that should reach each other."""
    for network in site.view.all(Network, "networks/"):
        if not network.vni or not network.icc:
            continue
        every = list(site.view.all(Endpoint, f"endpoints/{network.id}/"))
        there = [e for e in every if e.host == host.id and e.sandbox]
        for mine in site.endpoints(network.id):
            if not site.endpoint_plan(mine):
                continue
            for one in there:
                versions = {a.version for a in one.addresses}
                if versions & {a.version for a in mine.addresses}:
                    return Pair(network=network, mine=mine, other=one)
    return None


# Without a daemon.


def alone() -> Json:
    """Return what can be found without the daemon, which does not run."""
    seen = look_at_machine()
    found = [
        findings.Finding(
            check="daemon",
            severity=findings.ERROR,
            what="pynet does not run here: only the machine itself was looked at",
            why="networks that are there work on; nothing can be made or changed",
            remedy="systemctl start pynet, or pynet serve",
        ),
        *findings.machine(seen),
    ]
    return {
        "findings": [asdict(one) for one in found],
        "code": findings.code(found),
    }
