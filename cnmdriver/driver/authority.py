"""
Authority: what this host has itself is published again when the store lacks it.

Only a call of Docker or a person ends what a host serves, never its absence from the
store: that was wiped, restored from an old copy, is another one, or this host was given
up while it was away. What the store has for somebody else by now stands: the host goes
on with what it has, and says so.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import structlog

from cnmdriver.driver import claims
from cnmdriver.driver.site import Site
from cnmdriver.driver.sync import Patience
from cnmdriver.errors import DriverError
from cnmdriver.model import (
    Cluster,
    Endpoint,
    Member,
    Network,
    Pool,
    Reservation,
    Vni,
)
from cnmdriver.store import records
from cnmdriver.store.view import Draft

EVERY = 1.0
"""Seconds between two looks at what is missing."""
BATCH = 8
"""Endpoints published at once; a transaction has 128 operations at most."""
HELD = 64
"""Addresses and blocks published at once."""
GONE = 60.0
"""Seconds other hosts have to publish again what is theirs."""

log = structlog.get_logger()


class Authority:
    """Publishes what is missing."""

    def __init__(self, site: Site, publish_host: Callable[[], Awaitable[bool]]) -> None:
        """Take the site, and what publishes the host itself."""
        self.site = site
        self.publish_host = publish_host
        self.gone = Patience(GONE)
        self.conflicts: dict[str, str] = {}
        """What cannot be published, by network or endpoint, in a sentence."""

    async def run(self) -> None:
        """Publish what is missing, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            if self.site.state.away is None:
                try:
                    await self.turn()
                except DriverError as error:
                    log.warning("authority.not_published", error=str(error))

    async def turn(self) -> None:
        """Publish all that is missing now; raises DriverError if the store is away."""
        view, host = self.site.view, self.site.host.id
        if view.get(Cluster, records.CLUSTER) is None:
            await self.site.state.found()
        if not view.missing:
            self.conflicts.clear()
            return
        if records.host(host) in view.missing:
            await self.publish_host()
        conflicts: dict[str, str] = {}
        for member in list(self.site.members()):
            await self.publish(member, conflicts)
        for text in set(conflicts.values()) - set(self.conflicts.values()):
            log.error("authority.conflict", what=text)
        self.conflicts = conflicts
        self.let_go()

    async def publish(self, member: Member, conflicts: dict[str, str]) -> None:
        """
        Publish a network, this host's part, and its endpoints there.

        One transaction holds only so much. If this is broken off, what lacks is still
        missing, and what there is stands by itself: an address has its pool, and an
        endpoint its addresses.
        """
        commit = self.site.state.commit
        missing = len(self.site.view.missing)
        text = await commit(partial(self.network, member=member))
        if text:
            conflicts[member.network] = text
            return
        held = iter(list(self.held(member.network)))
        while some := list(islice(held, HELD)):
            await commit(partial(self.holdings, member=member, batch=some))
        endpoints = iter(self.site.endpoints(member.network))
        while batch := list(islice(endpoints, BATCH)):
            conflicts |= await commit(partial(self.endpoints, batch=batch))
        if len(self.site.view.missing) < missing:
            log.info("authority.published", network=member.network)

    def network(self, draft: Draft, member: Member) -> str:
        """Write what lacks of a network; return why that cannot be, "" if it can."""
        view = draft.view
        network = view.get(Network, records.network(member.network))
        if network is None:
            return ""
        pools = claims.pools_of(view, network.id)
        keys = [
            records.network(network.id),
            records.member(network.id, member.host),
            *(records.pool(pool.space, pool.cidr) for pool in pools),
        ]
        vni = records.vni(network.vni)
        if network.vni:
            taken = draft.get(Vni, vni)
            if taken is not None and taken.network != network.id:
                return (
                    f"VNI {network.vni} of network {network.id} {other(taken.network)}"
                )
            keys.append(vni)
        for subnet in network.subnets:
            found = draft.get(Pool, records.pool(subnet.space, subnet.pool))
            if found is not None and found.network != network.id:
                return (
                    f"pool {subnet.pool} of network {network.id} {other(found.network)}"
                )
        first = [key for _, key in islice(self.held(network.id), HELD)]
        again(draft, [*keys, *first])
        if draft.puts:
            claims.touch(draft, (pool.space for pool in pools))
        return ""

    def held(self, network: str) -> Iterator[tuple[str, str]]:
        """
        Yield what lacks of gateways, this host's blocks and addresses of no endpoint.

        Each comes with its pool's key; blocks first, as they keep others off.
        """
        view, host = self.site.view, self.site.host.id
        for pool in claims.pools_of(view, network):
            keys = [
                records.block(pool.space, pool.cidr, span)
                for span, block in claims.blocks_of(view, pool)
                if block.host == host
            ]
            keys += [
                records.address(pool.space, pool.cidr, held.ip)
                for held in claims.reservation(view, pool)
                if held.gateway or (held.host == host and not held.endpoint)
            ]
            place = records.pool(pool.space, pool.cidr)
            yield from ((place, key) for key in keys if key in view.missing)

    def holdings(
        self, draft: Draft, member: Member, batch: Iterable[tuple[str, str]]
    ) -> None:
        """Write addresses and blocks, while this host has a part in their pools."""
        own = draft.get(Member, records.member(member.network, member.host))
        for place, key in batch if own is not None else ():
            pool = draft.get(Pool, place)
            if pool is not None and pool.network == member.network:
                again(draft, [key])

    def endpoints(self, draft: Draft, batch: Iterable[Endpoint]) -> dict[str, str]:
        """Write endpoints with their addresses; return why some cannot be."""
        conflicts = {}
        for endpoint in batch:
            held = list(self.addresses(draft, endpoint))
            rival = next((r for _, r in held if is_anothers(r, endpoint)), None)
            if rival is None:
                key = records.endpoint(endpoint.network, endpoint.id)
                again(draft, [*(k for k, _ in held), key])
                continue
            conflicts[endpoint.id] = (
                f"address {rival.ip} of container {self.site.name(endpoint.id)} was "
                f"given to another one on host {claims.host_name(draft, rival.host)} "
                "meanwhile; disconnect one of the two from the network and connect it "
                "again"
            )
        return conflicts

    def addresses(
        self, draft: Draft, endpoint: Endpoint
    ) -> Iterator[tuple[str, Reservation]]:
        """Yield what the store, or else this host, knows of an endpoint's addresses."""
        for pool in claims.pools_of(draft.view, endpoint.network):
            for address in endpoint.addresses:
                if address.ip in pool.cidr:
                    key = records.address(pool.space, pool.cidr, address.ip)
                    held = draft.get(Reservation, key)
                    if held is not None:
                        yield key, held

    def let_go(self) -> None:
        """Forget what others did not publish again in time."""
        view = self.site.view
        theirs = [key for key in view.missing if not view.stays(key)]
        for key in self.gone.expired(theirs):
            view.forget(key)


def again(draft: Draft, keys: Iterable[str]) -> None:
    """Write records as they are known, where the store lacks them."""
    for key in keys:
        record = draft.view.get(object, key)
        if key in draft.view.missing and record is not None:
            draft.put(key, record)


def is_anothers(held: Reservation, endpoint: Endpoint) -> bool:
    """Tell whether an address is not an endpoint's own."""
    return held.host != endpoint.host or held.endpoint not in ("", endpoint.id)


def other(network: str) -> str:
    """Say that another network has something by now, and what to do."""
    return (
        f"is network {network}'s by now; remove one of the two networks with all its "
        "containers and create it again"
    )
