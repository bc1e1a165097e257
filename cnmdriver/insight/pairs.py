"""Which two endpoints a person means, by name, id or address, here or elsewhere."""

import asyncio
from dataclasses import dataclass

from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, NotFound
from cnmdriver.insight.report import Json
from cnmdriver.model import Endpoint, Hop, Host, Member, Network, Question
from cnmdriver.store import records

NAMED = "name"
"""The step that says which endpoint has the name that was asked for."""
NAME = 255
"""Characters of a name."""
AT_ONCE = 16
"""Hosts that are asked for a name, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two endpoints of one network; the first is this host's."""

    network: Network
    mine: Endpoint
    other: Endpoint
    called: str = ""
    """What another host calls the other."""


async def choose(site: Site, source: str, target: str) -> Pair:
    """Find two endpoints of one network, one of them here."""
    first, second = await meant(site, source), await meant(site, target)
    pairs = [
        (one, two) for one in first for two in second
        if one.network == two.network and one.id != two.id
    ]  # fmt: skip
    own = [(a, b) for a, b in pairs if site.host.id in {a.host, b.host}]
    if not own:
        raise NotFound(apart(site, (source, target), (first, second), pairs))
    networks = {a.network for a, _ in own}
    if len(own) > len(networks):
        ids = ", ".join(sorted({e.id[:12] for pair in own for e in pair}))
        raise Conflict(f"several endpoints are meant: say which two of {ids}")
    one, two = min(own, key=lambda pair: pair[0].network)
    words = {one.id: source, two.id: target}
    mine, other = (one, two) if one.host == site.host.id else (two, one)
    network = site.view.get(Network, records.network(mine.network))
    if network is None:
        raise NotFound(f"network {mine.network[:12]} has no record in the store")
    called = words[other.id]
    if other.id.startswith(called) or called in {str(a.ip) for a in other.addresses}:
        called = ""
    return Pair(network=network, mine=mine, other=other, called=called)


async def meant(site: Site, wanted: str) -> list[Endpoint]:
    """Return the endpoints that a word means, here or on other hosts."""
    found = named(site, wanted) or await elsewhere(site, wanted)
    if not found:
        raise NotFound(
            f"no endpoint is called {wanted[:80]!r}, here or on a host that answers; "
            "pynet endpoint ls lists this host's"
        )
    return found


async def elsewhere(site: Site, wanted: str) -> list[Endpoint]:
    """Ask the other hosts which of their endpoints has a name."""
    if site.ask is None or not wanted or not wanted.isprintable():
        return []
    question = Question(id="", name=wanted[:NAME])
    alive = [
        host.id
        for host in site.view.all(Host, "hosts/")
        if host.id != site.host.id and site.sees(host.id)
    ][:AT_ONCE]
    told = await asyncio.gather(
        *(site.ask(host, question) for host in alive), return_exceptions=True
    )
    found = []
    for host, hops_ in zip(alive, told, strict=True):
        for hop in hops_ if isinstance(hops_, tuple) else ():
            one = site.view.get(Endpoint, f"endpoints/{hop.found}")
            if hop.name == NAMED and one is not None and one.host == host:
                found.append(one)
    return found


def called(site: Site, name: str) -> tuple[Hop, ...]:
    """Return which endpoints of this host Docker calls so."""
    return tuple(
        Hop(name=NAMED, found=f"{one.network}/{one.id}")
        for one in site.view.all(Endpoint, "endpoints/")
        if one.host == site.host.id and site.names.get(one.id) == name
    )


def named(site: Site, wanted: str) -> list[Endpoint]:
    """Return the endpoints of a name (of this host's), an id's start or an address."""
    known = list(site.view.all(Endpoint, "endpoints/"))
    for found in (
        [e for e in known if wanted == e.id],
        [e for e in known if wanted in {str(a.ip) for a in e.addresses}],
        [e for e in known if wanted == site.names.get(e.id)],
        [e for e in known if len(wanted) > 2 and e.id.startswith(wanted)],
    ):
        if found:
            return found
    return []


def apart(
    site: Site,
    wanted: tuple[str, str],
    found: tuple[list[Endpoint], list[Endpoint]],
    pairs: list[tuple[Endpoint, Endpoint]],
) -> str:
    """Say why two endpoints cannot be traced from here."""
    if pairs:
        host = host_name(site, pairs[0][0].host)
        return f"neither {wanted[0]} nor {wanted[1]} is on this host: trace on {host}"
    networks = [
        " and ".join(sorted({network_label(site, e.network) for e in some}))
        for some in found
    ]
    if found[0] == found[1]:
        return f"{wanted[0]} and {wanted[1]} are one endpoint"
    return (
        f"{wanted[0]} is on network {networks[0]} and {wanted[1]} on {networks[1]}: "
        "they reach each other by published ports only, or when you connect one to the "
        "other's network"
    )


def network_label(site: Site, network: str) -> str:
    """Name a network by its id."""
    member = site.view.get(Member, records.member(network, site.host.id))
    return site.name(member.docker_id) if member is not None else network[:12]


def network_name(site: Site, network: Network) -> str:
    """Name a network."""
    return network_label(site, network.id)


def host_name(site: Site, host: str) -> str:
    """Name a host."""
    if host == site.host.id:
        return site.host.name
    found = site.view.get(Host, records.host(host))
    return found.name if found is not None else host[:8]


def described(site: Site, one: Endpoint, called: str = "") -> Json:
    """Return who an endpoint is."""
    return {
        "name": called or site.name(one.id),
        "id": one.id,
        "addresses": [str(a.ip) for a in one.addresses],
        "mac": one.mac,
        "host": host_name(site, one.host),
    }
