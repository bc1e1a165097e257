"""
Trace: the way between two endpoints, on both hosts, and where it ends.

What is planned and found is compared step by step, the other host is asked for its part
(`driver/questions.py`), and real packets are sent from the sandbox. A trace looks, and
changes nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.insight.hops import (
    BACK,
    IN,
    OUT,
    RECEIVED,
    Look,
    hops,
    ordered,
    underlay,
    walls,
)
from cnmdriver.insight.pairs import (
    Pair,
    called,
    choose,
    described,
    host_name,
    network_name,
)
from cnmdriver.insight.report import Json
from cnmdriver.insight.verdict import FAR_SIDE, SMALL, Below, Seen, is_reached, judge
from cnmdriver.model import (
    Endpoint,
    Hop,
    Host,
    IPAddress,
    IPInterface,
    Member,
    Network,
    Question,
)
from cnmdriver.plan import devices
from cnmdriver.plan.ops import Plan, Veth
from cnmdriver.plan.sight import Echo, Filters, Inner, Way
from cnmdriver.store import records

CLOCK = "clock"
"""The step that says a host's time, in seconds of Unix time; nothing goes by it."""
COUNTING = 5.0
"""Seconds to find out whether frames arrive."""


async def trace(site: Site, source: str, target: str, *, repairs: bool) -> Json:
    """
    Trace the way between two endpoints, by name, id or address, one of them here.

    Raises NotFound if there are no such two, Conflict if several are meant.
    """
    pair = await choose(site, source, target)
    near, far, probes, base = await asyncio.gather(
        look(site, pair, repairs=repairs),
        distant(site, pair, repairs=repairs),
        probe(site, pair),
        below(site, pair),
    )
    arrived = None
    if isinstance(far, tuple) and base is not None and not is_reached(probes):
        arrived = await arriving(site, pair)
    path = list(walked(site, pair, hops(near), far))
    there = host_name(site, pair.other.host)
    verdict = judge(path, probes, below=Below(base, arrived), there=there)
    return {
        "network": network_name(site, pair.network),
        "mode": pair.network.mode,
        "from": described(site, pair.mine),
        "to": described(site, pair.other, pair.called),
        "hops": [{"host": s.host, **asdict(s.hop)} for s in path],
        "probes": [echoed(e) for e in (*probes, *([base] if base else ()))],
        "reachable": is_reached(probes),
        "verdict": verdict.line,
        "at": {"host": verdict.at.host, "hop": verdict.at.hop.name}
        if verdict.at
        else None,
        "remedy": verdict.remedy,
    }


# What this host has.


async def look(site: Site, pair: Pair, *, repairs: bool) -> Look:
    """Look at all that this host has of the way."""
    mine, other = pair.mine, pair.other
    member = site.view.get(Member, records.member(pair.network.id, site.host.id))
    peer = None
    if other.host != site.host.id:
        peer = site.view.get(Host, records.host(other.host)) or unknown(other.host)
    own = site.endpoint_plan(mine)
    found = await site.dataplane.found(site.desired())
    inner, lost = await into(site, mine, other, found)
    key = records.endpoint(other.network, other.id)
    return Look(
        network=pair.network,
        host=site.host,
        mine=mine,
        other=other,
        peer=peer,
        hidden=hidden(site, other),
        taken=taken(site, mine),
        own=own,
        shared=site.network_plan(member) if member is not None else (),
        remote=site.source_plan(key) if peer is not None else (),
        found=found,
        inner=inner,
        lost=lost,
        way=await way(site, peer),
        received=await received(site, pair.network) if peer is not None else None,
        filters=await site.dataplane.filters() if peer is not None else Filters(),
        repairs=repairs,
    )


def unknown(host: str) -> Host:
    """Return a host of which the store has no record."""
    return Host(id=host, name=host[:8], version="")


def hidden(site: Site, other: Endpoint) -> str:
    """Say why this host does not know where another's endpoint is, if it does not."""
    if other.host == site.host.id or site.sees(other.host):
        return ""
    return "its lease ran out: what it has is hidden here"


def taken(site: Site, mine: Endpoint) -> tuple[IPAddress, ...]:
    """Return addresses of an endpoint that another one of its network has too."""
    others: set[IPInterface] = set()
    for one in site.view.all(Endpoint, f"endpoints/{mine.network}/"):
        if one.id != mine.id:
            others.update(one.addresses)
    return tuple(a.ip for a in mine.addresses if a in others)


async def into(
    site: Site, mine: Endpoint, other: Endpoint, found: Plan
) -> tuple[Inner | None, str]:
    """Look into the sandbox, and say what stood in the way."""
    pairs = [op for op in site.endpoint_plan(mine) if isinstance(op, Veth)]
    if not pairs:
        return None, ""
    if not site.dataplane.has_sandbox(mine.sandbox):
        ports = [op for op in found if isinstance(op, Veth) and op.key == pairs[0].key]
        if ports and ports[0].peer is None:
            # The pair does reach into one.
            return None, f"this daemon does not see {mine.sandbox}"
        return Inner(face=None), "its sandbox is gone"
    families = {a.version for a in mine.addresses}
    towards = [a.ip for a in other.addresses if a.version in families]
    try:
        inner = await site.dataplane.inner(mine.sandbox, pairs[0], mine.mac, towards)
    except DriverError as error:
        return None, str(error)
    return inner, ""


async def way(site: Site, peer: Host | None) -> Way | None:
    """Look for the way to another host's tunnels."""
    if peer is None or peer.vtep is None:
        return None
    return await site.dataplane.way(peer.vtep)


async def received(site: Site, network: Network) -> int | None:
    """Count what a network's tunnel has taken here."""
    return await site.dataplane.received(site.host.namespace, devices.vxlan(network.id))


# What the other host has.


async def distant(
    site: Site, pair: Pair, *, repairs: bool
) -> tuple[Hop, ...] | str | None:
    """Ask for the other's part: None if it is here too, else why it is not known."""
    mine, other = pair.mine, pair.other
    if other.host == site.host.id:
        swapped = Pair(network=pair.network, mine=other, other=mine)
        return hops(await look(site, swapped, repairs=repairs))
    if site.ask is None:
        return "this host has a store of its own"
    question = Question(id="", network=mine.network, endpoint=other.id, other=mine.id)
    try:
        return await site.ask(other.host, question)
    except DriverError as error:
        return str(error)


async def answer(
    site: Site, asking: str, question: Question, *, repairs: bool
) -> tuple[Hop, ...]:
    """Look at what another host asks: an endpoint here and one there, or the hosts."""
    if question.name:
        return called(site, question.name)
    if not question.endpoint:
        return await host_hops(site, asking)
    mine, other = (
        site.view.get(Endpoint, records.endpoint(question.network, name))
        for name in (question.endpoint, question.other)
    )
    network = site.view.get(Network, records.network(question.network))
    if mine is None or other is None or network is None:
        return (Hop(name="endpoint", found="there is no such endpoint", well=False),)
    if (mine.host, other.host) != (site.host.id, asking):
        return (Hop(name="endpoint", found="it is not on this host", well=False),)
    pair = Pair(network=network, mine=mine, other=other)
    return hops(await look(site, pair, repairs=repairs))


async def host_hops(site: Site, asking: str) -> tuple[Hop, ...]:
    """Look at the way to another host alone."""
    peer = site.view.get(Host, records.host(asking))
    if peer is None or peer.vtep is None or site.host.vtep is None:
        return ()
    there = await site.dataplane.way(peer.vtep)
    found = await site.dataplane.filters()
    return (
        Hop(name=CLOCK, found=f"{time.time():.2f}"),
        *underlay(site.host, peer, there),
        *walls(site.host, peer, there, found),
    )


# Real packets.


async def probe(site: Site, pair: Pair) -> tuple[Echo, ...]:
    """Ping the other from the sandbox, in each family both have; then with all room."""
    mine, other = pair.mine, pair.other
    if not site.endpoint_plan(mine):
        return ()
    ways = [
        (a.ip, b.ip) for a in mine.addresses for b in other.addresses
        if a.version == b.version
    ]  # fmt: skip
    ping = site.dataplane.ping
    small = await asyncio.gather(*(ping(mine.sandbox, a, b, SMALL) for a, b in ways))
    passing = [way for way, echo in zip(ways, small, strict=True) if echo.answered]
    room = pair.network.mtu
    full = await asyncio.gather(*(ping(mine.sandbox, a, b, room) for a, b in passing))
    return (*small, *full)


async def below(site: Site, pair: Pair) -> Echo | None:
    """Ping the other's host from this one's end of the tunnels."""
    peer = site.view.get(Host, records.host(pair.other.host))
    if pair.other.host == site.host.id or peer is None or peer.vtep is None:
        return None
    if site.host.vtep is None:
        return None
    return await site.dataplane.ping("", site.host.vtep, peer.vtep, SMALL)


async def arriving(site: Site, pair: Pair) -> int | None:
    """
    Count the frames that the other's tunnel takes while packets are sent there.

    None if that is not known soon.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(COUNTING):
            before = await counted(site, pair)
            if before is not None:
                await probe(site, pair)
                after = await counted(site, pair)
                return None if after is None else after - before
    return None


async def counted(site: Site, pair: Pair) -> int | None:
    """Ask the other host what its tunnel has taken so far."""
    far = await distant(site, pair, repairs=True)
    said = [hop for hop in far or () if isinstance(hop, Hop) and hop.name == RECEIVED]
    number = said[0].found.partition(" ")[0] if said else ""
    return int(number) if number.isdigit() else None


def echoed(echo: Echo) -> Json:
    """Return a probe."""
    return {
        "to": str(echo.to),
        "bytes": echo.size,
        "milliseconds": echo.milliseconds,
        "error": echo.error,
    }


# What follows.


def walked(
    site: Site, pair: Pair, near: tuple[Hop, ...], far: tuple[Hop, ...] | str | None
) -> Iterator[Seen]:
    """Yield all steps in the order in which a packet and its answer meet them."""
    here, there = site.host.name, host_name(site, pair.other.host)
    out = [hop for hop in near if hop.name not in BACK]
    back = [hop for hop in near if hop.name in BACK]
    yield from (Seen(host=here, hop=hop) for hop in ordered(out, OUT))
    if here == there and isinstance(far, tuple):
        # What both stand on has been seen.
        far = tuple(hop for hop in far if hop not in near)
    if isinstance(far, str):
        unasked = Hop(name=FAR_SIDE, found=f"not looked at: {far}", well=None)
        yield Seen(host=there, hop=unasked)
    elif far is not None:
        yield from (Seen(host=there, hop=hop) for hop in ordered(far, IN))
    yield from (Seen(host=here, hop=hop) for hop in back)
