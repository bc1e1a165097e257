"""What pynet knows, as values for JSON: networks, endpoints, ports and pools."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from cnmdriver.driver import claims
from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, NotFound
from cnmdriver.model import (
    PROTOCOLS,
    Alive,
    Endpoint,
    Host,
    IPAddress,
    Member,
    Network,
    Pool,
    Published,
    Reservation,
)
from cnmdriver.plan import devices
from cnmdriver.plan import pools as arithmetic
from cnmdriver.plan.router import relayed
from cnmdriver.store import records

Json = dict[str, object]
T = TypeVar("T", Member, Endpoint, Pool)


def networks(site: Site) -> list[Json]:
    """Return the networks Docker has created here, by name."""
    found = [network(site, member) for member in site.members()]
    return sorted(found, key=lambda n: (str(n["name"]), str(n["id"])))


def network(site: Site, member: Member) -> Json:
    """Return what all hosts know of a network, and this host's part in it."""
    shared = site.view.get(Network, records.network(member.network))
    hosts = list(site.view.all(Member, f"members/{member.network}/"))
    return {
        "name": site.name(member.docker_id),
        "id": member.docker_id,
        "network": member.network,
        "mode": shared.mode if shared else "",
        "bridge": member.bridge,
        "mtu": shared.mtu if shared else 0,
        "internal": bool(shared and shared.internal),
        "icc": bool(shared and shared.icc),
        "masquerade": bool(shared and shared.masquerade),
        "gateway": shared.gateway if shared else "",
        "subnets": [
            {
                "pool": str(subnet.pool),
                "space": subnet.space,
                "gateway": text(subnet.gateway),
                "reserved": [str(ip) for ip in subnet.reserved],
            }
            for subnet in (shared.subnets if shared else ())
        ],
        "endpoints": len(site.endpoints(member.network)),
        "hosts": len(hosts),
    }


def inspect(site: Site, member: Member) -> Json:
    """Return all there is to say about one network."""
    own = [e for e in endpoints(site) if e["network_id"] == member.docker_id]
    return {
        **network(site, member),
        "options": dict(member.options),
        "prefix": member.prefix,
        "attach": member.attach,
        "host_binding": text(member.host_binding),
        "claims": list(member.claims),
        "members": own,
    }


def endpoints(site: Site) -> list[Json]:
    """Return this host's endpoints, by network and name."""
    found = [
        endpoint(site, member, one)
        for member in site.members()
        for one in site.endpoints(member.network)
    ]
    return sorted(
        found, key=lambda e: (str(e["network"]), str(e["name"]), str(e["id"]))
    )


def endpoint(site: Site, member: Member, one: Endpoint) -> Json:
    """Return one endpoint."""
    return {
        "name": site.name(one.id),
        "id": one.id,
        "network": site.name(member.docker_id),
        "network_id": member.docker_id,
        "addresses": [str(address) for address in one.addresses],
        "mac": one.mac,
        "sandbox": one.sandbox,
        "joined": devices.is_live(one, site.boot),
        "device": devices.port(one.id),
        "interface": one.device,
        "attached": "direct" if one.device else "moved",
        "published": [port(published, one) for published in one.published],
    }


def hosts(site: Site, marks: Mapping[str, int]) -> list[Json]:
    """
    Return the hosts of the cluster, by name; `marks` is how far each one's kernel is.

    `behind` counts the endpoints of others, on the networks that the host takes part
    in, that are newer than what its kernel holds. `since` is by the host's own clock.
    """
    view = site.view
    count = Counter(e.host for e in view.all(Endpoint, "endpoints/"))
    shared = reached_by_others(site)
    found = []
    for host in view.all(Host, "hosts/"):
        alive = view.get(Alive, records.alive(host.id))
        mark = marks.get(host.id, 0)
        found.append(
            {
                "name": host.name,
                "id": host.id,
                "here": host.id == site.host.id,
                "vtep": text(host.vtep),
                "vxlan_port": host.vxlan_port,
                "version": host.version,
                "state": life(alive),
                "since": alive.since if alive is not None else None,
                "endpoints": count[host.id],
                "behind": sum(
                    revision > mark and owner != host.id
                    for network in carried_by(site, host.id)
                    for owner, revision in shared.get(network, ())
                ),
            }
        )
    return sorted(found, key=lambda h: (str(h["name"]), str(h["id"])))


def reached_by_others(site: Site) -> dict[str, list[tuple[str, int]]]:
    """Return host and revision of the endpoints that tunnels lead to, by network."""
    view = site.view
    alive = {
        host.id
        for host in view.all(Host, "hosts/")
        if host.vtep is not None and view.get(Alive, records.alive(host.id)) is not None
    }
    return {
        network.id: [
            (known.record.host, known.revision)
            for group in view.matching(f"endpoints/{network.id}/")
            for known in group.values()
            if isinstance(known.record, Endpoint) and known.record.host in alive
        ]
        for network in view.all(Network, "networks/")
        if network.vni
    }


def carried_by(site: Site, host: str) -> set[str]:
    """Return the networks on which a host has a container, or an address itself."""
    found = {e.network for e in site.view.all(Endpoint, "endpoints/") if e.host == host}
    for member in site.view.all(Member, "members/"):
        if member.host == host and member.addresses:
            found.add(member.network)
    return found


def life(alive: Alive | None) -> str:
    """Say whether a host is there."""
    if alive is None:
        return "gone"
    return "resting" if alive.resting else "alive"


def ports(site: Site) -> list[Json]:
    """Return the published ports of this host, by number."""
    found = [
        {
            **port(published, one),
            "endpoint": site.name(one.id),
            "endpoint_id": one.id,
            "network": site.name(member.docker_id),
        }
        for member in site.members()
        for one in site.endpoints(member.network)
        for published in one.published
    ]
    order = ("protocol", "host_ip", "endpoint_id")
    found.sort(key=lambda p: [str(p[name]) for name in order])
    return sorted(found, key=lambda p: str(p["host_port"]).zfill(5))


def port(published: Published, one: Endpoint) -> Json:
    """Return a published port; `host_ip` null stands for every address."""
    return {
        "protocol": PROTOCOLS[published.protocol],
        "host_ip": text(published.host_ip),
        "host_port": published.host_port,
        "addresses": [str(ip) for ip in targets(published.host_ip, one)],
        "port": published.port,
    }


def targets(host_ip: IPAddress | None, one: Endpoint) -> list[IPAddress]:
    """Return where a published port leads: each family to its own address."""
    own = [a.ip for a in one.addresses]
    same = [ip for ip in own if host_ip is None or ip.version == host_ip.version]
    return same or [ip for ip in (relayed(host_ip, one),) if ip is not None]


def pools(site: Site) -> list[Json]:
    """Return the pools that are handed out, with every address taken of them."""
    found = []
    for pool in site.view.all(Pool, "pools/"):
        taken = sorted(claims.reservation(site.view, pool), key=lambda r: int(r.ip))
        found.append(
            {
                "id": f"{pool.space}/{pool.cidr}",
                "space": pool.space,
                "pool": str(pool.cidr),
                "network": pool_network(site, pool),
                "claimed": pool.claimed,
                "size": arithmetic.capacity(pool.cidr),
                "taken": len(taken),
                "addresses": [address(site, held) for held in taken],
            }
        )
    return found


def pool_network(site: Site, pool: Pool) -> str:
    """Name the network a pool was handed out for, "" while it has none."""
    key = records.member(pool.network, site.host.id)
    member = site.view.get(Member, key)
    if member is not None and member.docker_id:
        return site.name(member.docker_id)
    known = site.view.get(Network, records.network(pool.network))
    return pool.network if known is not None else ""


def address(site: Site, held: Reservation) -> Json:
    """Return an address that is taken."""
    return {
        "address": str(held.ip),
        "owner": owner(site, held),
        "endpoint_id": held.endpoint,
        "gateway": held.gateway,
        "bound": held.bound,
        "host": held.host,
        "host_name": claims.host_name(site.view, held.host),
        "here": held.host == site.host.id,
    }


def owner(site: Site, held: Reservation) -> str:
    """Say who has an address."""
    if held.gateway:
        return "gateway"
    return held.name or (site.name(held.endpoint) if held.endpoint else "")


def text(address: IPAddress | None) -> str | None:
    """Write an address, null for none."""
    return None if address is None else str(address)


# From what a person typed to what is meant.


def find_network(site: Site, wanted: str) -> Member:
    """Return the network of a name or the start of an id, as `choose` does."""
    members = list(site.members())
    labels = [(m, site.name(m.docker_id), (m.docker_id, m.network)) for m in members]
    return choose("network", wanted, labels, "pynet network ls")


def find_endpoint(site: Site, wanted: str) -> Endpoint:
    """Return this host's endpoint of a name or the start of an id."""
    labels = [
        (one, site.name(one.id), (one.id,))
        for member in site.members()
        for one in site.endpoints(member.network)
    ]
    return choose("endpoint", wanted, labels, "pynet endpoint ls")


def find_pool(site: Site, wanted: str) -> Pool:
    """Return the pool of a CIDR, or of a pool id where two spaces have the CIDR."""
    labels = [
        (pool, str(pool.cidr), (f"{pool.space}/{pool.cidr}",))
        for pool in site.view.all(Pool, "pools/")
    ]
    exact = [label for label in labels if wanted in (label[1], *label[2])]
    return choose("pool", wanted, exact, "pynet ipam ls")


def choose(
    kind: str,
    wanted: str,
    labels: Iterable[tuple[T, str, tuple[str, ...]]],
    where: str,
) -> T:
    """
    Return the one thing that is meant: by its id, its name, or the start of its id.

    Raises NotFound, and Conflict with the ids to choose from.
    """
    known = list(labels)
    for matches in (
        [k for k in known if wanted in k[2]],
        [k for k in known if wanted == k[1]],
        [k for k in known if wanted and any(i.startswith(wanted) for i in k[2])],
    ):
        if len(matches) == 1:
            return matches[0][0]
        if matches:
            ids = ", ".join(sorted(short(k[2][0]) for k in matches))
            raise Conflict(
                f"{wanted!r} can be {len(matches)} {kind}s: say which of {ids}"
            )
    raise NotFound(f"no {kind} here is called {wanted!r}; {where} lists them")


def short(identity: str) -> str:
    """Shorten Docker's ids as Docker does; a pool's is text and stays whole."""
    return identity[:12] if identity.isalnum() else identity
