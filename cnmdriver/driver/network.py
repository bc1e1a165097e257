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
from collections.abc import Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

import structlog

from cnmdriver.driver import claims, publishing
from cnmdriver.driver.claims import Picker
from cnmdriver.driver.doubts import Doubts
from cnmdriver.driver.joining import Joining
from cnmdriver.driver.publishing import Publisher
from cnmdriver.driver.remotes import Remotes
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
    IPAddress,
    IPInterface,
    Member,
    Network,
    Pool,
    PortRequest,
    Reservation,
    Subnet,
)
from cnmdriver.plan import devices, firewall, ops, options, router, seats
from cnmdriver.plan.ops import Accept, Key
from cnmdriver.plan.options import VNIS
from cnmdriver.store import records
from cnmdriver.store.records import Space
from cnmdriver.store.view import Draft, View

log = structlog.get_logger()


class NetworkDriver:
    """Creates networks and endpoints on this host."""

    def __init__(self, site: Site, *, mode: str = "bridge") -> None:
        """Take the site, and the mode of networks that do not say theirs."""
        self.site = site
        self.joining = Joining(site, mode)
        self.remotes = Remotes(site)
        self.publisher = Publisher(site)
        self.sandboxes = Sandboxes(site)
        self.doubts = Doubts(site)
        self.locks = site.locks
        self.creating = asyncio.Lock()
        self.owed: set[str] = set()
        """Endpoints whose interfaces were built anew while Docker was at work."""

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
        Create a network here, or join it if another host has created it.

        Raises InvalidParameter for its options, Conflict if a subnet, a bridge name or
        the id is in use or a network that is joined is another than the one described,
        KernelError if the kernel cannot hold it.
        """
        wish = self.joining.read(docker_id, subnets, options, internal=internal)
        pickers = {4: Picker(), 6: Picker()}
        self.doubts.end([docker_id])
        async with self.locks.network(docker_id):
            before = self.part(docker_id)
            try:
                around = await self.joining.around()
                # Of two with one subnet or bridge, the second must see the first.
                async with self.creating:
                    member = await self.site.state.commit(
                        lambda draft: self.joining.decide(draft, wish, around, pickers)
                    )
                await self.site.dataplane.apply(self.site.network_plan(member))
                if member.addresses:
                    await self.remotes.carry(member.network)
            except (DriverError, asyncio.CancelledError):
                made = self.part(docker_id)
                if before is None and made is not None:
                    await self.leave_network(made)
                raise

    def part(self, docker_id: str) -> Member | None:
        """Return this host's part in the network Docker means, if there is one."""
        return self.joining.part(docker_id)

    async def leave_network(self, member: Member) -> None:
        """
        Give this host's part in a network back, in the store and in the kernel.

        The host's own rules go after that: they tell of no network, and take the time
        of two programs.
        """
        plan = self.site.network_plan(member)
        rules = tuple(op for op in plan if isinstance(op, Accept))
        await self.site.state.remove(lambda draft: self.joining.leave(draft, member))
        await self.site.clear(ops.without(plan, rules))
        if rules:
            self.site.dataplane.dismiss(rules, self.site.unwanted)
        await self.remotes.update()

    async def delete(self, docker_id: str) -> None:
        """Remove a network from this host, with whatever is still attached."""
        async with self.locks.network(docker_id):
            member = self.part(docker_id)
            if member is None:
                return
            for endpoint in self.site.endpoints(member.network):
                await self.erase(endpoint)
            await self.sandboxes.all_departed(member.network)
            await self.leave_network(member)

    # Endpoints.

    async def create_endpoint(
        self,
        docker_id: str,
        endpoint_id: str,
        *,
        ipv4: IPv4Interface | None,
        ipv6: IPv6Interface | None,
        mac: str,
        attach: str = "",
    ) -> str:
        """
        Take a place in a network; its device is made when the sandbox joins.

        `attach` is how, if that is not as the network says. Returns the MAC Docker
        shall set, "" if Docker chose it. Raises Conflict if an address or the MAC is
        another endpoint's on whichever host, KernelError if the kernel cannot know of
        the other hosts' endpoints.
        """
        async with self.locks.endpoint(docker_id, endpoint_id):
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
                attach=attach,
            )
            before = self.find(docker_id, endpoint_id)
            await self.remove_forgotten(network, endpoint)
            await self.sandboxes.departed(endpoint)
            try:
                await self.site.state.commit_own(
                    lambda draft: self.take_place(draft, network, endpoint)
                )
                await self.remotes.carry(network.id)
            except (DriverError, asyncio.CancelledError):
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
        for other in rivals(self.site.view, endpoint):
            if other.host != endpoint.host:
                continue
            shared = [a for a in endpoint.addresses if a in other.addresses]
            given_again = any(a.network not in ours for a in shared)
            # That one waits for none: it has its place, and so no rival.
            async with self.locks.also(other.id):
                key = records.endpoint(network.id, other.id)
                now = self.site.view.get(Endpoint, key)
                if now and (given_again or await self.sandboxes.is_gone(now)):
                    log.warning("network.endpoint_forgotten", endpoint=now.id[:12])
                    await self.erase(now)

    async def remove_unreached(self, endpoint: Endpoint) -> bool:
        """Remove an endpoint unless it is in use in a sandbox; tell whether it went."""
        async with self.locked(endpoint):
            if await self.sandboxes.is_reached(endpoint):
                return False
            await self.erase(endpoint)
            return True

    def doubt(self, docker_id: str) -> None:
        """Have it looked up whether Docker has a network."""
        self.doubts.add(docker_id)

    def departure(self, network: str, ip: IPAddress) -> asyncio.Future[None] | None:
        """Return what is done when an address's device is gone, None if it is."""
        return self.sandboxes.departure(network, ip)

    def released(self, network: str, ip: IPAddress) -> None:
        """Hear that Docker has released an address."""
        self.sandboxes.released(network, ip)

    def is_leaving(self, network: str, ip: IPAddress) -> bool:
        """Tell whether Docker has deleted an address's endpoint and not released it."""
        return self.sandboxes.is_leaving(network, ip)

    async def reap(self, endpoint: Endpoint) -> None:
        """Remove an endpoint whose sandbox is gone; leave any other as it is."""
        async with self.locked(endpoint):
            if await self.sandboxes.is_gone(endpoint):
                log.warning("network.endpoint_forgotten", endpoint=endpoint.id[:12])
                await self.erase(endpoint)

    def take_place(self, draft: Draft, network: Network, endpoint: Endpoint) -> None:
        """Write an endpoint and bind its addresses."""
        key = records.endpoint(network.id, endpoint.id)
        known = draft.get(Endpoint, key)
        if known is not None:
            same = replace(known, sandbox="", device="", published=())
            same = replace(same, boot=endpoint.boot)
            if same != endpoint:
                raise Conflict(
                    f"endpoint {endpoint.id[:12]} exists with other addresses"
                )
            return
        for other in rivals(draft.view, endpoint):
            self.check_distinct(draft, endpoint, other)
        for address in endpoint.addresses:
            self.bind_address(draft, network, endpoint, address)
        self.watch_macs(draft, network, endpoint)
        self.check_mac(draft, network, endpoint)
        draft.put(key, endpoint)

    def watch_macs(self, draft: Draft, network: Network, endpoint: Endpoint) -> None:
        """
        Let no other host take the same MAC meanwhile.

        A MAC that follows from an address is as unique as that; only one of the user's
        can meet another, so that only it is news to all that take one.
        """
        spaces = sorted(p.space for p in claims.pools_of(draft, network.id))[:1]
        if endpoint.user_mac and not draft.alone:
            claims.touch(draft, spaces)
        for space in spaces:
            draft.get(Space, records.space(space))

    def check_mac(self, draft: Draft, network: Network, endpoint: Endpoint) -> None:
        """Raise Conflict if the gateway or a host itself has an endpoint's MAC."""
        owners = {
            devices.mac(member.addresses[0].ip): "host "
            + claims.host_name(draft, member.host)
            for member in draft.all(Member, f"members/{network.id}/")
            if member.addresses
        }
        if network.gateway == "pynet":
            owners[router.mac(network)] = "the network's gateway"
        if endpoint.mac in owners:
            raise mac_taken(endpoint, owners[endpoint.mac])

    def check_distinct(self, draft: Draft, endpoint: Endpoint, other: Endpoint) -> None:
        """Raise Conflict if two endpoints of a network share an address or MAC."""
        theirs = [a.ip for a in other.addresses]
        for mine in endpoint.addresses:
            if mine.ip in theirs:
                raise Conflict(
                    f"address {mine.ip} is taken by {self.owner(draft, other)}; "
                    "choose another"
                )
        if endpoint.mac == other.mac:
            raise mac_taken(endpoint, self.owner(draft, other))

    def owner(self, draft: Draft, other: Endpoint) -> str:
        """Name an endpoint, and its host if that is another one."""
        if other.host == self.site.host.id:
            return self.site.name(other.id)
        host = claims.host_name(draft, other.host)
        return f"{claims.endpoint_name(draft, other)} on host {host}"

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
        if address.ip in subnet.reserved:
            raise Conflict(f"address {address.ip} is reserved by the network")
        # By network: Docker's word for a space need not be the one the user chose.
        pools_ = claims.pools_of(draft, network.id)
        pool = next((p for p in pools_ if p.cidr == subnet.pool), None)
        if pool is None:
            return
        draft.get(Pool, records.pool(pool.space, pool.cidr))
        key = records.address(pool.space, pool.cidr, address.ip)
        held = draft.get(Reservation, key)
        fresh = held or Reservation(
            space=pool.space, cidr=pool.cidr, ip=address.ip, host=endpoint.host
        )
        if held is None:
            claims.check_block(draft, pool, fresh)
        elif held.host != endpoint.host or held.endpoint not in ("", endpoint.id):
            raise Conflict(
                f"address {address.ip} is taken by {self.holder(draft, held)}; "
                "choose another"
            )
        draft.put(key, replace(fresh, bound=True, endpoint=endpoint.id))

    def holder(self, draft: Draft, held: Reservation) -> str:
        """Name who has an address, and the host if it is another."""
        name = held.name or self.site.name(held.endpoint) or "a request of Docker's"
        if held.host == self.site.host.id:
            return name
        return f"{name} on host {claims.host_name(draft, held.host)}"

    async def delete_endpoint(self, docker_id: str, endpoint_id: str) -> None:
        """Remove an endpoint; Docker may skip Leave and Revoke before."""
        async with self.locks.endpoint(docker_id, endpoint_id):
            endpoint = self.find(docker_id, endpoint_id)
            if endpoint is not None:
                self.sandboxes.deleted(endpoint)
                await self.erase(endpoint)

    async def remove(self, endpoint: Endpoint) -> None:
        """Remove an endpoint that nobody asked Docker to remove."""
        async with self.locked(endpoint):
            await self.erase(endpoint)

    def locked(self, endpoint: Endpoint) -> AbstractAsyncContextManager[None]:
        """Let nobody else work on an endpoint."""
        return self.locks.endpoint(self.docker_id(endpoint), endpoint.id)

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
        await self.sandboxes.vacate(endpoint)
        if plan:
            over = self.site.dataplane.dismiss(plan, self.site.unwanted)
            self.sandboxes.departs(endpoint, over)
        await self.remotes.update()

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
        """
        Make an endpoint's device: in the sandbox, or for Docker to move it there.

        What cannot be built in the sandbox is left to Docker, for whatever reason.
        """
        async with self.locks.endpoint(docker_id, endpoint_id):
            before = self.known(docker_id, endpoint_id)
            member = self.site.member(docker_id)
            network = self.site.network(member)
            endpoint = replace(before, sandbox=sandbox, boot=self.site.boot)
            direct = await self.sandboxes.seated(endpoint, member)
            with self.sandboxes.joining(endpoint):
                try:
                    await self.attach(before, direct)
                except DriverError as error:
                    if not direct.device:
                        raise
                    self.sandboxes.refused(str(error))
                    direct = replace(endpoint, device="")
                    await self.attach(before, direct)
            return attachment(network, member, direct)

    async def attach(self, before: Endpoint, endpoint: Endpoint) -> None:
        """Write that an endpoint has joined, and make its device."""
        self.sandboxes.joined(endpoint)
        try:
            await self.put(endpoint)
            # What others were given up to now is known before its first packet.
            await self.remotes.update()
            await self.site.dataplane.apply(self.site.endpoint_plan(endpoint))
        except (DriverError, asyncio.CancelledError):
            await self.site.state.remove(lambda draft: self.write(draft, before))
            raise

    async def reattach(self, lost: frozenset[Key]) -> list[str]:
        """
        Give sandboxes that have lost their devices the new ones; return what failed.

        A device of an endpoint that joins just now is Docker's to move; one that was
        built anew then gets its way out when Docker is done.
        """
        problems = []
        owed, self.owed = self.owed, set()
        for member in list(self.site.members()):
            for endpoint in self.site.endpoints(member.network):
                keys = {op.key for op in self.site.endpoint_plan(endpoint)}
                if not keys & lost and endpoint.id not in owed:
                    continue
                if not self.sandboxes.has_settled(endpoint):
                    if endpoint.device:
                        self.owed.add(endpoint.id)
                    continue
                try:
                    await self.give(member, endpoint)
                except DriverError as error:
                    # Another time, if there still is what is to have it.
                    if self.site.dataplane.has_sandbox(endpoint.sandbox):
                        self.owed.add(endpoint.id)
                    problems.append(
                        f"container {self.site.name(endpoint.id)} has lost its device "
                        f"and got none: {error}; disconnect it from the network and "
                        "connect it again"
                    )
        return problems

    async def give(self, member: Member, endpoint: Endpoint) -> None:
        """Give a sandbox a device that it has lost; raises DriverError."""
        given = attachment(self.site.network(member), member, endpoint)
        name = await self.site.dataplane.reattach(
            endpoint.sandbox,
            replace(given, device=devices.peer(endpoint.id)),
            endpoint.addresses,
            endpoint.mac,
            seats.seat(endpoint),
        )
        log.warning("network.reattached", endpoint=endpoint.id[:12], device=name)

    async def put(self, endpoint: Endpoint) -> None:
        """Write this host's own endpoint."""
        await self.site.state.commit_own(lambda draft: self.write(draft, endpoint))

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
        async with self.locks.endpoint(docker_id, endpoint_id):
            endpoint = self.known(docker_id, endpoint_id)
            member = self.site.member(docker_id)
            if not firewall.closed(self.site.network(member)):
                binding = member.host_binding
                wishes = [publishing.bound_to(binding, w, ipv6=ipv6) for w in ports]
                await self.publisher.publish(endpoint, wishes)

    async def revoke(self, docker_id: str, endpoint_id: str) -> None:
        """Take back what is published; unknown endpoints publish nothing."""
        async with self.locks.endpoint(docker_id, endpoint_id):
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
        """
        Settle a network for all nodes of a swarm; a second time changes nothing.

        Returns the options with the VNI, as Docker's own overlay does. Where nodes
        share no store each has a network of its own, and nothing is kept. Raises
        InvalidParameter for what cannot be in a swarm, Exhausted if no VNI is free.
        """
        wish = self.joining.read(docker_id, subnets, options, internal=False)
        if not self.site.state.store.shared:
            return dict(options)
        async with self.locks.network(docker_id):
            around = await self.joining.around()
            network = await self.site.state.commit(
                lambda draft: self.joining.allocate(draft, wish, around)
            )
        vni = {VNIS: str(network.vni)} if network.vni else {}
        return {**options, **vni}

    async def free(self, docker_id: str) -> None:
        """Forget what `allocate` settled."""
        async with self.locks.network(docker_id):
            await self.site.state.remove(
                lambda draft: self.joining.free(draft, docker_id)
            )

    async def discover(self, address: str, *, gone: bool, own: bool) -> None:
        """Hear of another node; hosts know each other by the store."""
        log.debug("docker.node", address=address, gone=gone, own=own)

    def skips_gateway(self, given: Mapping[str, str], *, internal: bool) -> bool:
        """
        Tell whether a network needs no gateway address; checks its options.

        Docker asks before it tells the pools, so that a network that is joined is not
        known yet: its gateway is the network's, requested or not.
        """
        del internal  # The host has an address on an internal network too.
        chosen = options.parse(given)
        mode = chosen.mode or self.joining.mode
        options.check_mode(chosen, mode)
        return options.gateway_of(chosen, mode) != "pynet"


def rivals(view: View, one: Endpoint) -> list[Endpoint]:
    """Return a network's other endpoints that have an address or MAC of one's."""
    index = view.index(f"endpoints/{one.network}/", faces)
    keys = frozenset().union(*map(index.find, faces(one)))
    others = (view.get(Endpoint, key) for key in sorted(keys))
    return [other for other in others if other is not None and other.id != one.id]


def faces(record: object) -> tuple[Hashable, ...]:
    """Return what no two endpoints of a network share: MAC and addresses."""
    if not isinstance(record, Endpoint):
        return ()
    return (record.mac, *((a.version, int(a)) for a in record.addresses))


def mac_taken(endpoint: Endpoint, owner: str) -> Conflict:
    """Make the refusal of a MAC that has an owner."""
    return Conflict(
        f"MAC {endpoint.mac} is taken by {owner}; choose another --mac-address"
    )


def attachment(network: Network, member: Member, endpoint: Endpoint) -> Attachment:
    """Return what Docker needs to know of an endpoint's device and gateway."""
    closed = firewall.closed(network)
    gateways = [] if closed else [
        subnet.gateway
        for address in endpoint.addresses
        if (subnet := network.subnet_of(address.ip)) is not None
    ]  # fmt: skip
    return Attachment(
        device="" if endpoint.device else devices.peer(endpoint.id),
        prefix="" if endpoint.device else member.prefix,
        gateway4=next((g for g in gateways if isinstance(g, IPv4Address)), None),
        gateway6=next((g for g in gateways if isinstance(g, IPv6Address)), None),
        disable_gateway_service=network.gateway == "pynet",
    )
