"""
The whole cluster in one value for JSON: hosts, networks, endpoints, and their health.

Each thing has an `id` that no other has, a `label` for people, and a `health`: `well`,
`away` for what rests or is out of sight, `amiss` for what somebody must look at, with
the sentences of `why`.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from cnmdriver.driver.hosts import watermarks
from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.insight import report, status
from cnmdriver.insight.report import Json, text
from cnmdriver.model import Endpoint, Host, Member, Network, Reservation
from cnmdriver.plan import devices
from cnmdriver.redaction import USERINFO
from cnmdriver.store import records
from cnmdriver.store.view import View

SHORTLY = 0.4
"""Seconds that a picture of the whole waits for the store."""
WELL, AWAY, AMISS = "well", "away", "amiss"

Info = Mapping[str, object]
ReadInfo = Callable[[], dict[str, object]]
"""Tells what only the daemon knows of itself."""


async def marks(site: Site, patience: float = 5.0) -> Mapping[str, int] | None:
    """
    Return how far each host's kernel is.

    None if the store does not say so within `patience` seconds.
    """
    if site.state.away is not None:
        return None
    try:
        async with asyncio.timeout(patience):
            listing = await site.state.store.read(records.WATERMARKS)
    except (DriverError, TimeoutError):
        return None
    listed = View()
    listed.replace(listing.items.items(), listing.revision)
    return watermarks(listed)


def topology(site: Site, info: Info, known: Mapping[str, int] | None) -> Json:
    """
    Return everything; `known` is how far each host's kernel is, if that is known.

    `info` is what `insight.status` describes, with `conflicted`: sentences by network
    or endpoint.
    """
    conflicts = sentences(info.get("conflicted"))
    attention = [*status.reached(site, info), *status.stored(site, info)]
    attention += [f"{n} is in use and in no record" for n in names(info, "orphans")]
    attention += names(info, "problems")
    return {
        "here": site.host.id,
        "name": site.host.name,
        "version": site.host.version,
        "at": time.time(),
        "uptime": info.get("uptime"),
        "shared": site.state.store.shared,
        "store": USERINFO.sub("", str(info.get("store", ""))),
        "revision": site.view.revision,
        "away": site.state.away is not None,
        "docker": info.get("docker"),
        "attention": attention,
        "counts": info.get("counts", {}),
        "hosts": hosts(site, info, known),
        "networks": networks(site, conflicts),
        "endpoints": endpoints(site, conflicts),
    }


def names(info: Info, what: str) -> list[str]:
    """Return the texts that the daemon tells of something."""
    return status.strings(info.get(what))


def sentences(value: object) -> dict[str, str]:
    """Return the conflicts by what they are about."""
    if not isinstance(value, Mapping):
        return {}
    return {str(k): str(v) for k, v in value.items()}


def hosts(site: Site, info: Info, known: Mapping[str, int] | None) -> list[Json]:
    """Return the hosts of the cluster, by name."""
    found = []
    for host in report.hosts(site, known or {}):
        if host["id"] == site.host.id:
            # A host that is alone has no lease that says so.
            host["state"] = "alive"
        health, why = host_health(site, info, host)
        behind = host["behind"] if known is not None else None
        more = {"behind": behind, "health": health, "why": why, "label": host["name"]}
        found.append({**host, **more})
    return found


def host_health(site: Site, info: Info, host: Json) -> tuple[str, list[str]]:
    """Say how a host is, and why."""
    if host["id"] == site.host.id:
        if site.state.away is not None:
            return AMISS, list(status.reached(site, info))
        if info.get("hidden"):
            return AMISS, ["it has no lease in the store: the others do not see it"]
        return WELL, []
    if host["state"] == "resting":
        return AWAY, ["its daemon was stopped; its containers are still reached"]
    if host["state"] == "gone":
        return AMISS, ["its lease ran out: its containers are hidden until it is back"]
    return WELL, []


def networks(site: Site, conflicts: Mapping[str, str]) -> list[Json]:
    """Return the networks of all hosts, by label."""
    found = []
    parts = defaultdict(list)
    for member in site.view.all(Member, "members/"):
        parts[member.network].append(member)
    count = Counter(e.network for e in site.view.all(Endpoint, "endpoints/"))
    for network in site.view.all(Network, "networks/"):
        own = [m for m in parts[network.id] if m.host == site.host.id and m.docker_id]
        conflict = conflicts.get(network.id)
        found.append(
            {
                "id": network.id,
                "label": label(site, network, own),
                "mode": network.mode,
                "vni": network.vni,
                "mtu": network.mtu,
                "internal": network.internal,
                "gateway": network.gateway,
                "subnets": [str(s.pool) for s in network.subnets],
                "gateways": [text(s.gateway) for s in network.subnets if s.gateway],
                "bridge": own[0].bridge if own else "",
                "docker_id": own[0].docker_id if own else "",
                "hosts": sorted({m.host for m in parts[network.id] if m.docker_id}),
                "endpoints": count[network.id],
                "health": AMISS if conflict else WELL,
                "why": [conflict] if conflict else [],
            }
        )
    return sorted(found, key=lambda n: (str(n["label"]), str(n["id"])))


def label(site: Site, network: Network, own: Iterable[Member]) -> str:
    """Return Docker's name of a network, or else its pool: only here it has a name."""
    for member in own:
        return site.name(member.docker_id)
    return next((str(s.pool) for s in network.subnets), network.id[:12])


def endpoints(site: Site, conflicts: Mapping[str, str]) -> list[Json]:
    """Return the endpoints of all hosts, by network and label."""
    said = {
        held.endpoint: held.name
        for held in site.view.all(Reservation, "addresses/")
        if held.endpoint and held.name
    }
    found = []
    for one in site.view.all(Endpoint, "endpoints/"):
        health, why = endpoint_health(site, one, conflicts.get(one.id))
        named = site.names.get(one.id) or said.get(one.id) or one.id[:12]
        found.append(
            {
                "id": one.id,
                "label": named,
                "network": one.network,
                "host": one.host,
                "addresses": [str(address) for address in one.addresses],
                "mac": one.mac,
                "joined": bool(one.sandbox),
                "device": devices.port(one.id) if one.host == site.host.id else "",
                "published": [report.port(p, one) for p in one.published],
                "health": health,
                "why": why,
            }
        )
    return sorted(found, key=lambda e: (str(e["network"]), str(e["label"])))


def endpoint_health(
    site: Site, one: Endpoint, conflict: str | None
) -> tuple[str, list[str]]:
    """Say how an endpoint is, and why."""
    if conflict:
        return AMISS, [conflict]
    if one.host != site.host.id and not site.sees(one.host):
        host = site.view.get(Host, records.host(one.host))
        name = host.name if host is not None else one.host[:12]
        return AWAY, [f"hidden: host {name} has no lease"]
    if not one.sandbox:
        return AWAY, ["it has not joined a sandbox"]
    return WELL, []
