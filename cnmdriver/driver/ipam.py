"""
IpamDriver: pools and addresses, each taken by compare-and-swap in the store.

What a request gives is *provisional* until a call that uses it binds it. In pools that
a network of ours has claimed, provisional addresses lapse after a grace time; under
another driver nothing ever binds them, so they are held until they are released.

Requests can come again. One that names what it wants gets the same answer for as long
as nothing was built on the first answer; after that it is a second wish for the same
thing, and refused.

Hosts that name the same pool mean the same network, and its gateway is the same for
all: whoever asks first decides it, the others are told. Locks here only spare this
host's own calls lost races; that no two hosts take one thing is the store's doing, as
each decision expects the keys it relies on.
"""

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from cnmdriver.driver import claims
from cnmdriver.driver.blocks import Blocks
from cnmdriver.driver.claims import Elsewhere, NoneFree, Picker
from cnmdriver.driver.site import Site
from cnmdriver.errors import (
    Conflict,
    DriverError,
    Exhausted,
    InvalidParameter,
    NotFound,
)
from cnmdriver.model import (
    Endpoint,
    IPAddress,
    IPInterface,
    IPNetwork,
    Member,
    Network,
    Pool,
    Reservation,
    Subnet,
    interface,
)
from cnmdriver.plan import pools
from cnmdriver.plan.pools import PoolId, Range
from cnmdriver.store import records
from cnmdriver.store.view import Draft

OPTIONS = ("pynet.network", "pynet.space")
RESERVED = "a reservation of docker network create"
WAITING = "a container that is gone or yet to come"
log = structlog.get_logger()

PATIENCE = 5.0
"""Seconds to wait for an address that is being given back."""
PASSING = 0.5
"""Seconds in which another host is done with an address that it gives back."""
TICK = 0.01
"""Seconds between two looks whether it is."""
ASKS = 3
"""How often other hosts are asked for an address: what they lend may be taken again."""

SPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """A RequestPool, read."""

    space: str
    pool: IPNetwork | None
    sub: IPNetwork | None
    network: str
    version: int


class Endpoints(Protocol):
    """What the driver of networks does for the driver of addresses."""

    async def remove_unreached(self, endpoint: Endpoint) -> bool:
        """Remove an endpoint whose own removal was lost, unless a sandbox has it."""

    async def reap(self, endpoint: Endpoint) -> None:
        """Remove an endpoint if its sandbox is gone."""

    def is_leaving(self, network: str, ip: IPAddress) -> bool:
        """Tell whether an address's endpoint is deleted and its release to come."""

    def departure(self, network: str, ip: IPAddress) -> asyncio.Future[None] | None:
        """Return what is done when an address's device is gone, None if it is."""

    def released(self, network: str, ip: IPAddress) -> None:
        """Hear of the release."""

    def doubt(self, docker_id: str) -> None:
        """Have it looked up whether Docker has a network: it releases its pool."""


class IpamDriver:
    """Gives out pools and addresses."""

    def __init__(
        self,
        site: Site,
        ranges: Iterable[Range],
        endpoints: Endpoints,
    ) -> None:
        """Take the default pools, and what removes endpoints that have addresses."""
        self.site = site
        self.ranges = tuple(ranges)
        self.endpoints = endpoints
        self.blocks = Blocks(site)
        self.lock = asyncio.Lock()
        self.releases: dict[str, asyncio.Task[None]] = {}
        """Addresses that are given back when their devices are gone, by key."""

    async def request_pool(
        self,
        *,
        space: str,
        pool: IPNetwork | None,
        sub_pool: IPNetwork | None,
        options: Mapping[str, str],
        version: int,
    ) -> tuple[str, IPNetwork]:
        """
        Claim a pool, the one named or a free one of the defaults.

        Raises Conflict if it overlaps what exists, Exhausted if no default is free.
        """
        request = read_request(space, pool, sub_pool, options, version)
        routes = await self.site.dataplane.routes()
        fresh = secrets.token_hex(6)

        def decide(draft: Draft) -> PoolId:
            if request.network:
                found = self.of_network(draft, request)
            elif request.pool is not None:
                found = self.named(draft, request.space, request.pool, routes, fresh)
            else:
                found = self.automatic(draft, request, routes, fresh)
            identity = PoolId(space=found.space, pool=found.cidr, sub=request.sub)
            self.claim(draft, found, str(identity))
            return identity

        async with self.lock:
            identity = await self.site.state.commit(decide)
        return str(identity), identity.pool

    def of_network(self, draft: Draft, request: PoolRequest) -> Pool:
        """Find the pool of a network the user named, in the wanted family."""
        for pool in claims.pools_of(draft, request.network):
            wanted = pool.cidr.version == request.version
            if wanted and request.pool in (None, pool.cidr):
                self.check_repeat(draft, pool)
                return pool
        if request.pool is not None:
            raise Conflict(
                f"pool {request.pool} is not one of network {request.network}; leave "
                "--subnet or --ipam-opt pynet.network out"
            )
        raise NotFound(
            f"network {request.network} has no IPv{request.version} pool; "
            "pynet network ls shows the networks there are"
        )

    def named(
        self,
        draft: Draft,
        space: str,
        cidr: IPNetwork,
        routes: Iterable[tuple[IPNetwork, str]],
        fresh: str,
    ) -> Pool:
        """Find or make the pool a user named."""
        pool = draft.get(Pool, records.pool(space, cidr))
        if pool is not None:
            # Routes are not looked at: the way to a pool that another host has claimed
            # may lie in this host's network, and whether this host gets a route of its
            # own is not known before CreateNetwork, which looks at them then.
            self.check_repeat(draft, pool)
            return pool
        others = claims.taken(draft, space)
        blocker = pools.overlapping(cidr, others)
        if blocker is not None:
            name = self.site.name(self.docker_id(draft, others[blocker]))
            raise Conflict(
                f"pool {cidr} overlaps {blocker} of network {name}; choose another "
                "--subnet or remove that network"
            )
        for route, device in routes:
            if pools.overlap(cidr, route):
                raise Conflict(
                    f"pool {cidr} overlaps this host's route {route} dev {device}; "
                    "choose another --subnet"
                )
        return self.make(draft, space, cidr, fresh)

    def docker_id(self, draft: Draft, network: str) -> str:
        """Return what Docker calls a network here, or its own id."""
        member = draft.get(Member, records.member(network, self.site.host.id))
        return member.docker_id if member and member.docker_id else network

    def check_repeat(self, draft: Draft, pool: Pool) -> None:
        """Raise Conflict if this host built on the pool already."""
        host = self.site.host.id
        member = claims.part(draft, host, pool)
        if member is None:
            return
        used = any(r.host == host for r in claims.reservation(draft, pool))
        if member.docker_id or used:
            name = self.site.name(member.docker_id or member.network)
            raise Conflict(
                f"pool {pool.cidr} is in use on this host by network {name}; "
                "choose another --subnet or remove that network"
            )

    def automatic(
        self,
        draft: Draft,
        request: PoolRequest,
        routes: Iterable[tuple[IPNetwork, str]],
        fresh: str,
    ) -> Pool:
        """Make a pool from the defaults."""
        taken = [*claims.taken(draft), *(route for route, _ in routes)]
        cidr = pools.free_pool(self.ranges, request.version, taken)
        if cidr is None:
            version = request.version
            ranges = [str(r.base) for r in self.ranges if r.base.version == version]
            raise Exhausted(
                f"no IPv{version} pool is free in {', '.join(ranges) or 'none'}; "
                "remove a network, name one with --subnet, or set default_pools"
            )
        return self.make(draft, request.space, cidr, fresh)

    def make(self, draft: Draft, space: str, cidr: IPNetwork, network: str) -> Pool:
        """Write a new pool, which mints its network's id."""
        pool = Pool(space=space, cidr=cidr, network=network)
        draft.put(records.pool(space, cidr), pool)
        return pool

    def claim(self, draft: Draft, pool: Pool, identity: str) -> None:
        """Write this host's claim; a repeated one counts once."""
        host = self.site.host.id
        member = (
            claims.part(draft, host, pool)
            or draft.get(Member, records.member(pool.network, host))
            or Member(network=pool.network, host=host)
        )
        if identity not in member.claims:
            claims.touch(draft, [pool.space])
            key = records.member(member.network, host)
            draft.put(key, replace(member, claims=(*member.claims, identity)))

    async def release_pool(self, pool_id: str) -> None:
        """Give a claim back; what is not claimed is given back already."""
        pool = pools.parse_id(pool_id)
        for member in self.site.members():
            if pool_id in member.claims:
                self.endpoints.doubt(member.docker_id)
        await self.settled_down(records.addresses(pool.space, pool.pool))

        def decide(draft: Draft) -> None:
            for member in draft.all(Member, "members/"):
                if member.host == self.site.host.id and pool_id in member.claims:
                    self.unclaim(draft, member, pool_id)

        async with self.lock:
            await self.site.state.remove(decide)

    def unclaim(self, draft: Draft, member: Member, pool_id: str) -> None:
        """Take a claim from a member, and drop what nobody claims any more."""
        left = tuple(c for c in member.claims if c != pool_id)
        key = records.member(member.network, member.host)
        if left or member.docker_id:
            draft.put(key, replace(member, claims=left))
        else:
            draft.delete(key)
        identity = pools.parse_id(pool_id)
        pool = draft.get(Pool, records.pool(identity.space, identity.pool))
        if pool is not None:
            if claims.part(draft, member.host, pool) is None:
                claims.vacate(draft, member.host, pool)
            # Of several pools one network was made, perhaps by another host.
            claims.prune(draft, pool.network)
        if pool is None or pool.network != member.network:
            claims.prune(draft, member.network)

    async def request_address(
        self, pool_id: str, *, address: IPAddress | None, gateway: bool, name: str
    ) -> IPInterface:
        """
        Take an address, the one named or the lowest free one.

        Raises NotFound for a pool that is not claimed here, Conflict with the owner's
        name, Exhausted with the pool's name and counts.
        """
        identity = pools.parse_id(pool_id)
        if address is not None:
            pools.check_address(identity.pool, address)
            await self.freed(identity, address)
            await self.reap_holder(identity, address)

        picker = Picker()

        def decide(draft: Draft) -> IPAddress:
            pool = self.claimed_pool(draft, identity, pool_id)
            wish = Reservation(
                space=pool.space,
                cidr=pool.cidr,
                ip=address or identity.pool.network_address,
                host=self.site.host.id,
                name=name,
                gateway=gateway,
            )
            settled = self.settled(draft, pool, wish, named=address is not None)
            if settled is not None:
                return settled
            if address is None:
                wish = self.choose(draft, pool, identity, wish, picker)
            self.take(draft, pool, wish)
            return wish.ip

        try:
            chosen = await self.drawn(identity, address, decide)
        except (Conflict, Exhausted):
            if not await self.comes_free(identity, address):
                raise
            chosen = await self.drawn(identity, address, decide)
        return interface(chosen, identity.pool)

    async def comes_free(self, identity: PoolId, address: IPAddress | None) -> bool:
        """Wait for what is just being given back; tell whether to look again."""
        if address is not None:
            return await self.has_passed(identity, address)
        pool = records.addresses(identity.space, identity.pool)
        if not any(key.startswith(pool) for key in self.releases):
            return False
        await self.settled_down(pool)
        return True

    async def has_passed(self, identity: PoolId, address: IPAddress) -> bool:
        """
        Wait for an address that another host has just now, and no endpoint of it.

        It gives it back, or binds it in a moment: tells whether it is free then.
        """
        key = records.address(identity.space, identity.pool, address)
        end = time.monotonic() + PASSING
        while True:
            held = self.site.view.get(Reservation, key)
            if held is None or held.bound or held.host == self.site.host.id:
                return held is None
            if time.monotonic() > end:
                return False
            await asyncio.sleep(TICK)

    async def drawn(
        self,
        identity: PoolId,
        address: IPAddress | None,
        decide: Callable[[Draft], IPAddress],
    ) -> IPAddress:
        """Decide on an address; ask for what lies in another host's block."""
        for _ in range(ASKS):
            try:
                async with self.lock:
                    return await self.site.state.commit_own(decide)
            except (Elsewhere, NoneFree) as refusal:
                wanted = refusal.wanted if isinstance(refusal, NoneFree) else address
                if wanted is None or not await self.ask(identity, wanted):
                    raise
        async with self.lock:
            return await self.site.state.commit_own(decide)

    async def ask(self, identity: PoolId, wanted: IPAddress) -> bool:
        """Ask another host for an address of its block; tell if it may be had now."""
        key = records.pool(identity.space, identity.pool)
        pool = self.site.view.get(Pool, key)
        return pool is not None and await self.blocks.ask(pool, wanted)

    def settled(
        self, draft: Draft, pool: Pool, wish: Reservation, *, named: bool
    ) -> IPAddress | None:
        """
        Answer what the pool's network has decided already, None if it has not.

        Its gateway is the gateway on every host. What it reserves is granted to a
        host that is creating it too, and is refused as a container's address.
        """
        network = draft.get(Network, records.network(pool.network))
        subnets = network.subnets if network is not None else ()
        subnet = next((s for s in subnets if s.pool == pool.cidr), None)
        if subnet is None:
            return None
        if wish.gateway:
            return known_gateway(pool, subnet, wish.ip if named else None)
        if not named or wish.ip not in claims.fixed(draft, pool):
            return None
        member = draft.get(Member, records.member(pool.network, wish.host))
        if wish.ip in subnet.reserved and not (member and member.docker_id):
            return wish.ip
        of = "the network's gateway" if wish.ip == subnet.gateway else RESERVED
        raise self.taken(wish, of)

    async def reap_holder(self, identity: PoolId, address: IPAddress) -> None:
        """Free a wanted address of an endpoint that Docker forgot when it died."""
        key = records.address(identity.space, identity.pool, address)
        held = self.site.view.get(Reservation, key)
        endpoint = self.holder(held) if held is not None else None
        if endpoint is not None and endpoint.host == self.site.host.id:
            await self.endpoints.reap(endpoint)

    def claimed_pool(self, draft: Draft, identity: PoolId, pool_id: str) -> Pool:
        """Return the pool, if this host has claimed it."""
        pool = draft.get(Pool, records.pool(identity.space, identity.pool))
        if pool is not None:
            member = claims.part(draft, self.site.host.id, pool)
            # A created network has its pools, whoever gave the claim back: of two
            # creates at once both claim, and the one that failed releases.
            if member and (member.docker_id or pool_id in member.claims):
                return pool
        raise NotFound(
            f"pool {pool_id} is not in use on this host; remove its network with "
            "docker network rm and create it again"
        )

    def choose(
        self,
        draft: Draft,
        pool: Pool,
        identity: PoolId,
        wish: Reservation,
        picker: Picker,
    ) -> Reservation:
        """Find a free address; all that ask for a gateway get the same."""
        if wish.gateway:
            held = claims.reservation(draft, pool)
            again = next((r for r in held if r.gateway), None)
            if again is not None:
                return replace(wish, ip=again.ip)
        ip = claims.choose(draft, pool, identity.sub, wish.host, picker)
        return replace(wish, ip=ip)

    def take(self, draft: Draft, pool: Pool, wish: Reservation) -> None:
        """Write a reservation; it must not be another's, nor its block."""
        key = records.address(pool.space, pool.cidr, wish.ip)
        held = draft.get(Reservation, key)
        if held is None:
            claims.check_block(draft, pool, wish)
            draft.put(key, wish)
        elif not same_wish(held, wish, pool):
            raise self.taken(wish, self.who(draft, held))
        elif self.endpoints.is_leaving(pool.network, wish.ip):
            # The release that is under way would free it again.
            raise self.taken(wish, "a container that Docker is removing")

    def taken(self, wish: Reservation, owner: str) -> Conflict:
        """Make the refusal of an address that has an owner."""
        return Conflict(
            f"address {wish.ip} of pool {wish.cidr} is taken by {owner}; choose "
            "another or remove that container"
        )

    def who(self, draft: Draft, held: Reservation) -> str:
        """Name the owner of an address, and the host if it is another."""
        if held.gateway:
            return "the network's gateway"
        if held.bound and held.name and not held.endpoint:
            return held.name  # A host's own, which is called after it.
        own = held.host == self.site.host.id
        host = "" if own else f" on host {claims.host_name(draft, held.host)}"
        if held.endpoint:
            return f"{held.name or self.site.name(held.endpoint)}{host}"
        return f"{held.name or (RESERVED if held.bound else WAITING)}{host}"

    async def release_address(self, pool_id: str, address: IPAddress) -> None:
        """
        Give an address back; another host's or a free one is left as it is.

        While its device is on its way out, that is done when it is gone, and this call
        does not wait for it.
        """
        identity = pools.parse_id(pool_id)
        pool = self.site.view.get(Pool, records.pool(identity.space, identity.pool))
        over = self.endpoints.departure(pool.network, address) if pool else None
        if over is None:
            await self.release(identity, pool, address)
            return
        key = records.address(identity.space, identity.pool, address)
        task = asyncio.create_task(self.release_after(over, identity, pool, address))
        self.releases[key] = task
        task.add_done_callback(lambda _: self.releases.pop(key, None))

    async def settled_down(self, prefix: str = "") -> None:
        """Wait until all addresses are given back that are about to be."""
        tasks = {t for key, t in self.releases.items() if key.startswith(prefix)}
        if tasks:
            self.site.dataplane.hurry()
            await asyncio.wait(tasks, timeout=PATIENCE)

    async def freed(self, identity: PoolId, address: IPAddress) -> None:
        """Wait for an address that is being given back."""
        key = records.address(identity.space, identity.pool, address)
        task = self.releases.get(key)
        if task is not None:
            self.site.dataplane.hurry()
            await asyncio.wait({task}, timeout=PATIENCE)

    async def release_after(
        self,
        over: asyncio.Future[None],
        identity: PoolId,
        pool: Pool | None,
        address: IPAddress,
    ) -> None:
        """Give an address back when its device is gone."""
        await asyncio.wait({over})
        try:
            await self.release(identity, pool, address)
        except DriverError as error:
            log.warning("ipam.not_released", address=str(address), error=str(error))

    async def release(
        self, identity: PoolId, pool: Pool | None, address: IPAddress
    ) -> None:
        """Give an address back now."""
        key = records.address(identity.space, identity.pool, address)
        held = self.site.view.get(Reservation, key)
        try:
            await self.free(key, held)
        finally:
            if pool is not None:
                self.endpoints.released(pool.network, address)

    async def free(self, key: str, held: Reservation | None) -> None:
        """Delete a reservation of this host, unless it is the pool's for good."""
        if held is None or held.host != self.site.host.id:
            return
        holder = self.holder(held)
        if holder and not await self.endpoints.remove_unreached(holder):
            # Released late: the address has gone to another container since.
            log.warning("ipam.still_in_use", address=str(held.ip))
            return

        def decide(draft: Draft) -> None:
            again = draft.get(Reservation, key)
            if again is None or again.host != self.site.host.id:
                return
            pool = draft.get(Pool, records.pool(again.space, again.cidr))
            if pool is None or not is_kept(draft, pool, again):
                draft.delete(key)

        await self.site.state.remove(decide)

    def holder(self, held: Reservation) -> Endpoint | None:
        """Return the endpoint that still has the address."""
        if not held.endpoint:
            return None
        pool = self.site.view.get(Pool, records.pool(held.space, held.cidr))
        if pool is None:
            return None
        key = records.endpoint(pool.network, held.endpoint)
        return self.site.view.get(Endpoint, key)


def known_gateway(
    pool: Pool, subnet: Subnet, wished: IPAddress | None
) -> IPAddress | None:
    """
    Return the gateway a network has, None if it has none yet.

    Raises Conflict if another one is wished.
    """
    if subnet.gateway is None or wished in (None, subnet.gateway):
        return subnet.gateway
    raise Conflict(
        f"network {pool.network} on pool {pool.cidr} has gateway {subnet.gateway}, not "
        f"{wished}; leave --gateway out or give that one"
    )


def is_kept(draft: Draft, pool: Pool, held: Reservation) -> bool:
    """
    Tell whether an address stays the pool's when the host that asked gives it back.

    What the network reserves does, and so does the gateway: others may have been told
    it, as long as no network says otherwise.
    """
    if claims.is_fixed(draft, pool, held):
        return True
    if not held.gateway or held.bound:
        return held.gateway
    network = draft.get(Network, records.network(pool.network))
    return network is None and bool(claims.claimants(draft, pool) - {held.host})


def same_wish(held: Reservation, wish: Reservation, pool: Pool) -> bool:
    """
    Tell whether a wish for a held address is the one that took it, come again.

    Under another driver nothing is ever bound; there only Docker's name for the
    container can show that it is the same. The gateway is the same for all hosts.
    """
    if held.gateway and wish.gateway:
        return True
    if held.host != wish.host or held.bound or held.gateway != wish.gateway:
        return False
    same_name = bool(held.name) and held.name == wish.name
    return same_name or pool.claimed


def read_request(
    space: str,
    pool: IPNetwork | None,
    sub: IPNetwork | None,
    options: Mapping[str, str],
    version: int,
) -> PoolRequest:
    """Check a RequestPool and its `--ipam-opt`; raises InvalidParameter."""
    for key in options:
        if key not in OPTIONS and (key.startswith("pynet.") or "." not in key):
            raise InvalidParameter(
                f"unknown --ipam-opt {key!r}: known are {', '.join(OPTIONS)}"
            )
    if pool is None and sub is not None:
        raise InvalidParameter(f"--ip-range {sub} needs a --subnet that holds it")
    if pool is not None and sub is not None and not pools.inside(sub, pool):
        raise InvalidParameter(f"--ip-range {sub} is not inside --subnet {pool}")
    name = options.get("pynet.space", space)
    if not SPACE.fullmatch(name):
        raise InvalidParameter(
            f"address space {name[:80]!r}: give 1 to 64 letters, digits, _ . or -"
        )
    return PoolRequest(
        space=name,
        pool=pool,
        sub=sub,
        network=options.get("pynet.network", ""),
        version=version,
    )
