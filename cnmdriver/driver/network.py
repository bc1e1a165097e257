"""
NetworkDriver: Docker's calls about networks, endpoints and published ports.

Each call decides on the view, commits, and then makes this host's kernel hold the plan
of that one object. If the kernel refuses, the commit is taken back before the error is
answered, as Docker forgets what failed. Removing goes the other way round: the record
first, then the kernel, and whatever is left there is the next audit's.

Docker repeats calls: the same again gets the same answer, the same with other content
is a Conflict, and removing what is gone is a success.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from weakref import WeakValueDictionary

import structlog

from cnmdriver.driver import claims, publishing
from cnmdriver.driver.publishing import Publisher
from cnmdriver.driver.sandboxes import Sandboxes
from cnmdriver.driver.site import Site
from cnmdriver.errors import (
    Conflict,
    DriverError,
    InvalidParameter,
    NotFound,
)
from cnmdriver.model import (
    Attachment,
    Endpoint,
    IPInterface,
    Member,
    Network,
    Pool,
    PortRequest,
    Reservation,
    Subnet,
)
from cnmdriver.plan import devices, firewall, options, pools
from cnmdriver.plan.modes import MODES
from cnmdriver.store import records
from cnmdriver.store.view import Draft

log = structlog.get_logger()


class NetworkDriver:
    """Creates networks and endpoints on this host."""

    def __init__(self, site: Site, *, mode: str = "bridge") -> None:
        """Take the site, and the mode of networks that do not say theirs."""
        self.site = site
        self.mode = mode
        self.publisher = Publisher(site)
        self.sandboxes = Sandboxes(site)
        self.locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.creating = asyncio.Lock()
        self.told: set[str] = set()

    @asynccontextmanager
    async def locked(self, docker_id: str) -> AsyncIterator[None]:
        """Let one call at a time work on a network."""
        lock = self.locks.setdefault(docker_id, asyncio.Lock())
        async with lock:
            yield

    # Networks.

    async def create(
        self,
        docker_id: str,
        *,
        subnets: tuple[Subnet, ...],
        options: Mapping[str, str],
        internal: bool,
    ) -> None:
        """
        Create a network here.

        Raises InvalidParameter for its options, Conflict if a subnet, a bridge name or
        the id is in use, KernelError if the kernel cannot hold it.
        """
        wanted = self.read(docker_id, subnets, options, internal=internal)
        async with self.locked(docker_id):
            before = self.part(docker_id)
            try:
                # Of two with one subnet or bridge, the second must see the first.
                async with self.creating:
                    member = await self.site.state.commit(
                        lambda draft: self.join_network(draft, *wanted)
                    )
                await self.site.dataplane.apply(self.site.network_plan(member))
            except (DriverError, asyncio.CancelledError):
                made = self.part(docker_id)
                if before is None and made is not None:
                    await self.site.state.remove(
                        lambda draft: self.leave_network(draft, made)
                    )
                raise

    def part(self, docker_id: str) -> Member | None:
        """Return this host's part in the network Docker means, if there is one."""
        members = self.site.members()
        return next((m for m in members if m.docker_id == docker_id), None)

    def read(
        self,
        docker_id: str,
        subnets: tuple[Subnet, ...],
        given: Mapping[str, str],
        *,
        internal: bool,
    ) -> tuple[Network, Member]:
        """Turn a request into records; raises InvalidParameter."""
        chosen = options.parse(given)
        for key in chosen.unknown:
            if key not in self.told:
                self.told.add(key)
                log.info("network.option_unused", option=key)
        real = tuple(s for s in subnets if s.pool.prefixlen)
        mtu = chosen.mtu or MODES[chosen.mode or self.mode].MTU
        if mtu < 1280 and any(s.pool.version == 6 for s in real):
            raise InvalidParameter(f"MTU {mtu} is below IPv6's least, 1280 (RFC 8200)")
        network = Network(
            id=docker_id,
            mode=chosen.mode or self.mode,
            subnets=real,
            mtu=mtu,
            internal=internal,
            icc=chosen.icc,
            masquerade=chosen.masquerade,
            gateway=chosen.gateway,
        )
        member = Member(
            network=docker_id,
            host=self.site.host.id,
            docker_id=docker_id,
            bridge=chosen.bridge or devices.bridge(docker_id),
            host_binding=chosen.host_binding,
            prefix=chosen.prefix,
            options=tuple(sorted(given.items())),
        )
        return network, member

    def join_network(self, draft: Draft, network: Network, member: Member) -> Member:
        """Write a network and this host's part, or find them as they should be."""
        known = self.part(member.docker_id)
        if known is not None:
            network, member = self.renamed(network, member, known.network)
            before = draft.get(Network, records.network(network.id))
            if before != network or replace(known, claims=()) != member:
                raise Conflict(
                    f"network {self.site.name(member.docker_id)} exists here with "
                    "other settings; remove it first"
                )
            return known
        identity = self.identity(draft, network)
        network, member = self.renamed(network, member, identity)
        self.check_room(draft, network, member)
        member = self.bind_pools(draft, network, member)
        draft.put(records.network(network.id), network)
        draft.put(records.member(network.id, member.host), member)
        return member

    def renamed(
        self, network: Network, member: Member, identity: str
    ) -> tuple[Network, Member]:
        """Give a network and its member the id that all hosts know it by."""
        named = member.bridge != devices.bridge(member.docker_id)
        bridge_name = member.bridge if named else devices.bridge(identity)
        return (
            replace(network, id=identity),
            replace(member, network=identity, bridge=bridge_name),
        )

    def own_pools(self, draft: Draft, network: Network) -> Iterator[Pool]:
        """Yield the pools Docker has from us for a network, lowest IPv4 pool first."""
        for subnet in sorted(
            network.subnets, key=lambda s: (s.pool.version, s.pool.network_address)
        ):
            for pool in draft.all(Pool, "pools/"):
                key = records.member(pool.network, self.site.host.id)
                member = draft.view.get(Member, key)
                free = member is not None and not member.docker_id
                if pool.cidr == subnet.pool and free:
                    yield pool

    def identity(self, draft: Draft, network: Network) -> str:
        """Return the id minted with the network's pool, or Docker's if it has none."""
        pool = next(self.own_pools(draft, network), None)
        return network.id if pool is None else pool.network

    def check_room(self, draft: Draft, network: Network, member: Member) -> None:
        """Raise Conflict if a subnet or the bridge's name is another network's."""
        mine = {pool.network for pool in self.own_pools(draft, network)}
        for other in self.site.members():
            theirs = self.site.view.get(Network, records.network(other.network))
            name = self.site.name(other.docker_id)
            if other.bridge == member.bridge:
                raise Conflict(
                    f"bridge name {member.bridge} is network {name}'s; choose another"
                )
            for subnet in network.subnets:
                nets = [s.pool for s in theirs.subnets] if theirs else []
                clash = pools.overlapping(subnet.pool, nets)
                if clash is not None and other.network not in mine:
                    raise Conflict(
                        f"subnet {subnet.pool} overlaps {clash} of network {name}; "
                        "choose another --subnet or remove that network"
                    )

    def bind_pools(self, draft: Draft, network: Network, member: Member) -> Member:
        """Claim the network's pools for it, bind its addresses, gather the claims."""
        held: list[str] = []
        for pool in list(self.own_pools(draft, network)):
            key = records.member(pool.network, member.host)
            claimer = draft.get(Member, key)
            if claimer is not None:
                held += [c for c in claimer.claims if claims.covers(c, pool)]
                self.hand_over(draft, claimer, pool, network)
            bound = replace(pool, network=network.id, claimed=True)
            draft.put(records.pool(pool.space, pool.cidr), bound)
            for taken in claims.reservation(draft, pool):
                if taken.host == member.host:
                    place = records.address(pool.space, pool.cidr, taken.ip)
                    draft.put(place, replace(taken, bound=True))
        known = draft.get(Member, records.member(network.id, member.host))
        rest = known.claims if known is not None else ()
        return replace(member, claims=tuple(dict.fromkeys((*held, *rest))))

    def hand_over(
        self, draft: Draft, claimer: Member, pool: Pool, network: Network
    ) -> None:
        """Take a pool's claims from the provisional network they were made for."""
        if claimer.network == network.id:
            return
        left = tuple(c for c in claimer.claims if not claims.covers(c, pool))
        key = records.member(claimer.network, claimer.host)
        if left:
            draft.put(key, replace(claimer, claims=left))
        else:
            draft.delete(key)

    async def delete(self, docker_id: str) -> None:
        """Remove a network from this host, with whatever is still attached."""
        async with self.locked(docker_id):
            member = self.part(docker_id)
            if member is None:
                return
            for endpoint in self.site.endpoints(member.network):
                await self.erase(endpoint)
            plan = self.site.network_plan(member)
            await self.site.state.remove(
                lambda draft: self.leave_network(draft, member)
            )
            await self.site.clear(plan)

    def leave_network(self, draft: Draft, member: Member) -> None:
        """Delete this host's part in a network, and the network with its last part."""
        draft.delete(records.member(member.network, member.host))
        claims.prune(draft, member.network)

    # Endpoints.

    async def create_endpoint(
        self,
        docker_id: str,
        endpoint_id: str,
        *,
        ipv4: IPv4Interface | None,
        ipv6: IPv6Interface | None,
        mac: str,
    ) -> str:
        """
        Take a place in a network; the kernel hears of it when the sandbox joins.

        Returns the MAC Docker shall set, "" if Docker chose it. Raises Conflict if an
        address or the MAC is another endpoint's.
        """
        async with self.locked(docker_id):
            member = self.site.member(docker_id)
            network = self.site.network(member)
            given = tuple(a for a in (ipv4, ipv6) if a is not None)
            endpoint = Endpoint(
                network=network.id,
                id=endpoint_id,
                host=self.site.host.id,
                boot=self.site.boot,
                mac=mac.lower() or devices.endpoint_mac(given, endpoint_id),
                user_mac=bool(mac),
                ipv4=ipv4,
                ipv6=ipv6,
            )
            before = self.find(docker_id, endpoint_id)
            await self.remove_forgotten(network, endpoint)
            try:
                await self.site.state.commit(
                    lambda draft: self.take_place(draft, network, endpoint)
                )
            except asyncio.CancelledError:
                made = self.find(docker_id, endpoint_id)
                if before is None and made is not None:
                    await self.erase(made)
                raise
            return "" if mac else endpoint.mac

    async def remove_forgotten(self, network: Network, endpoint: Endpoint) -> None:
        """
        Remove endpoints that a new one shows to be forgotten by Docker.

        Where Docker gives out the addresses itself, giving one again says so; else the
        sandbox must be gone.
        """
        ours = {p.cidr for p in claims.pools_of(self.site.view, network.id)}
        for other in self.site.endpoints(network.id):
            shared = [a for a in endpoint.addresses if a in other.addresses]
            rival = bool(shared) or other.mac == endpoint.mac
            if other.id == endpoint.id or not rival:
                continue
            given_again = any(a.network not in ours for a in shared)
            if given_again or await self.sandboxes.is_gone(other):
                log.warning("network.endpoint_forgotten", endpoint=other.id[:12])
                await self.erase(other)

    async def remove_unreached(self, endpoint: Endpoint) -> bool:
        """Remove an endpoint unless it is in use in a sandbox; tell whether it went."""
        async with self.locked(self.docker_id(endpoint)):
            if await self.sandboxes.is_reached(endpoint):
                return False
            await self.erase(endpoint)
            return True

    async def reap(self, endpoint: Endpoint) -> None:
        """Remove an endpoint whose sandbox is gone; leave any other as it is."""
        async with self.locked(self.docker_id(endpoint)):
            if await self.sandboxes.is_gone(endpoint):
                log.warning("network.endpoint_forgotten", endpoint=endpoint.id[:12])
                await self.erase(endpoint)

    def take_place(self, draft: Draft, network: Network, endpoint: Endpoint) -> None:
        """Write an endpoint and bind its addresses."""
        key = records.endpoint(network.id, endpoint.id)
        known = draft.get(Endpoint, key)
        if known is not None:
            same = replace(known, sandbox="", published=(), boot=endpoint.boot)
            if same != endpoint:
                raise Conflict(
                    f"endpoint {endpoint.id[:12]} exists with other addresses"
                )
            return
        for other in draft.all(Endpoint, f"endpoints/{network.id}/"):
            self.check_distinct(endpoint, other)
        for address in endpoint.addresses:
            self.bind_address(draft, network, endpoint, address)
        draft.put(key, endpoint)

    def check_distinct(self, endpoint: Endpoint, other: Endpoint) -> None:
        """Raise Conflict if two endpoints of a network share an address or MAC."""
        for mine in endpoint.addresses:
            if mine.ip in [theirs.ip for theirs in other.addresses]:
                raise Conflict(
                    f"address {mine.ip} is taken by {self.site.name(other.id)}; "
                    "choose another"
                )
        if endpoint.mac == other.mac:
            raise Conflict(
                f"MAC {endpoint.mac} is taken by {self.site.name(other.id)}; "
                "choose another --mac-address"
            )

    def bind_address(
        self,
        draft: Draft,
        network: Network,
        endpoint: Endpoint,
        address: IPInterface,
    ) -> None:
        """Check an address, and bind its reservation where the pool is ours."""
        subnet = network.subnet_of(address.ip)
        if subnet is None or subnet.pool.prefixlen != address.network.prefixlen:
            raise InvalidParameter(f"address {address} is in no subnet of the network")
        if address.ip == subnet.gateway:
            raise Conflict(f"address {address.ip} is the network's gateway")
        # By network: Docker's word for a space need not be the one the user chose.
        pools_ = claims.pools_of(draft, network.id)
        pool = next((p for p in pools_ if p.cidr == subnet.pool), None)
        if pool is None:
            return
        draft.get(Pool, records.pool(pool.space, pool.cidr))
        key = records.address(pool.space, pool.cidr, address.ip)
        held = draft.get(Reservation, key)
        if held is not None and held.endpoint not in ("", endpoint.id):
            raise Conflict(
                f"address {address.ip} is taken by "
                f"{held.name or self.site.name(held.endpoint)}; choose another"
            )
        fresh = held or Reservation(
            space=pool.space, cidr=pool.cidr, ip=address.ip, host=endpoint.host
        )
        draft.put(key, replace(fresh, bound=True, endpoint=endpoint.id))

    async def delete_endpoint(self, docker_id: str, endpoint_id: str) -> None:
        """Remove an endpoint; Docker may skip Leave and Revoke before."""
        async with self.locked(docker_id):
            endpoint = self.find(docker_id, endpoint_id)
            if endpoint is not None:
                await self.erase(endpoint)

    async def remove(self, endpoint: Endpoint) -> None:
        """Remove an endpoint that nobody asked Docker to remove."""
        async with self.locked(self.docker_id(endpoint)):
            await self.erase(endpoint)

    def docker_id(self, endpoint: Endpoint) -> str:
        """Return what Docker calls the network of an endpoint."""
        key = records.member(endpoint.network, endpoint.host)
        member = self.site.view.get(Member, key)
        return member.docker_id if member is not None else endpoint.network

    async def erase(self, endpoint: Endpoint) -> None:
        """Delete an endpoint's record, then what the kernel has of it."""
        if endpoint.published:
            await self.publisher.withdraw(endpoint)
            endpoint = replace(endpoint, published=())
        plan = self.site.endpoint_plan(endpoint)
        self.sandboxes.left(endpoint)

        def decide(draft: Draft) -> None:
            draft.delete(records.endpoint(endpoint.network, endpoint.id))
            for pool in claims.pools_of(draft, endpoint.network):
                for address in endpoint.addresses:
                    key = records.address(pool.space, pool.cidr, address.ip)
                    held = draft.get(Reservation, key)
                    if held is not None and held.endpoint == endpoint.id:
                        loose = replace(held, bound=False, endpoint="")
                        draft.put(key, loose)

        await self.site.state.remove(decide)
        await self.site.clear(plan)

    def find(self, docker_id: str, endpoint_id: str) -> Endpoint | None:
        """Return an endpoint of this host, None if there is none."""
        for member in self.site.members():
            if member.docker_id == docker_id:
                key = records.endpoint(member.network, endpoint_id)
                found = self.site.view.get(Endpoint, key)
                return found if found and found.host == self.site.host.id else None
        return None

    def known(self, docker_id: str, endpoint_id: str) -> Endpoint:
        """Return an endpoint of this host; raises NotFound."""
        endpoint = self.find(docker_id, endpoint_id)
        if endpoint is None:
            raise NotFound(
                f"endpoint {endpoint_id[:12]} is not known on network "
                f"{self.site.name(docker_id)}; disconnect the container and connect it"
            )
        return endpoint

    # Sandboxes.

    async def join(self, docker_id: str, endpoint_id: str, sandbox: str) -> Attachment:
        """Make the device that Docker moves into the sandbox."""
        async with self.locked(docker_id):
            before = self.known(docker_id, endpoint_id)
            member = self.site.member(docker_id)
            network = self.site.network(member)
            endpoint = replace(before, sandbox=sandbox, boot=self.site.boot)
            self.sandboxes.joined(endpoint)
            try:
                await self.put(endpoint)
                await self.site.dataplane.apply(self.site.endpoint_plan(endpoint))
            except (DriverError, asyncio.CancelledError):
                await self.site.state.remove(lambda draft: self.write(draft, before))
                raise
            return attachment(network, member, endpoint)

    async def put(self, endpoint: Endpoint) -> None:
        """Write this host's own endpoint."""
        await self.site.state.commit(lambda draft: self.write(draft, endpoint))

    def write(self, draft: Draft, endpoint: Endpoint) -> None:
        """Write an endpoint into a draft."""
        draft.put(records.endpoint(endpoint.network, endpoint.id), endpoint)

    async def leave(self, docker_id: str, endpoint_id: str) -> None:
        """
        Let a sandbox go.

        Its device stays until the endpoint is deleted: Docker still moves it back.
        """
        await self.revoke(docker_id, endpoint_id)

    async def info(self, docker_id: str, endpoint_id: str) -> None:
        """Raise NotFound for an unknown endpoint; Docker shows nothing of the rest."""
        self.known(docker_id, endpoint_id)

    # Published ports.

    async def program(
        self,
        docker_id: str,
        endpoint_id: str,
        *,
        ports: tuple[PortRequest, ...],
        ipv6: bool,
    ) -> None:
        """
        Publish ports, all or none; what was published before and is not asked goes.

        Raises Conflict with the program that has a port, Exhausted if none of a range
        is free.
        """
        async with self.locked(docker_id):
            endpoint = self.known(docker_id, endpoint_id)
            member = self.site.member(docker_id)
            if not firewall.closed(self.site.network(member)):
                binding = member.host_binding
                wishes = [publishing.bound_to(binding, w, ipv6=ipv6) for w in ports]
                await self.publisher.publish(endpoint, wishes)

    async def revoke(self, docker_id: str, endpoint_id: str) -> None:
        """Take back what is published; unknown endpoints publish nothing."""
        async with self.locked(docker_id):
            endpoint = self.find(docker_id, endpoint_id)
            if endpoint is not None and endpoint.published:
                await self.publisher.withdraw(endpoint)

    # Swarm's manager, and Docker's news of other nodes.

    async def allocate(
        self,
        docker_id: str,
        *,
        subnets: tuple[Subnet, ...],
        options: Mapping[str, str],
    ) -> Mapping[str, str]:
        """Check a network's options for all nodes, and answer them as they are."""
        self.read(docker_id, subnets, options, internal=False)
        return dict(options)

    async def free(self, docker_id: str) -> None:
        """Forget what `allocate` gave: nothing is kept for it."""

    async def discover(self, address: str, *, gone: bool, own: bool) -> None:
        """Hear of another node; hosts know each other by the store."""
        log.debug("docker.node", address=address, gone=gone, own=own)

    def skips_gateway(self, given: Mapping[str, str], *, internal: bool) -> bool:
        """Tell whether a network needs no gateway address; checks its options."""
        del internal  # The host has an address on an internal network too.
        return options.parse(given).gateway != "pynet"


def attachment(network: Network, member: Member, endpoint: Endpoint) -> Attachment:
    """Return what Docker needs to know of an endpoint's device and gateway."""
    closed = firewall.closed(network)
    gateways = [] if closed else [
        subnet.gateway
        for address in endpoint.addresses
        if (subnet := network.subnet_of(address.ip)) is not None
    ]  # fmt: skip
    return Attachment(
        device=devices.peer(endpoint.id),
        prefix=member.prefix,
        gateway4=next((g for g in gateways if isinstance(g, IPv4Address)), None),
        gateway6=next((g for g in gateways if isinstance(g, IPv6Address)), None),
        disable_gateway_service=network.gateway == "pynet",
    )
