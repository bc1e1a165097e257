"""
What a CreateNetwork comes to: a new network, or this host's part in one that exists.

The pool is the identity of a network: named on two hosts it is one network. What a
joining host says of it must be equal, and what it leaves out is the network's: mode,
MTU, gateway, options, further pools. A refusal has the command line that works.

In a swarm the manager allocates the network before any node creates it, under the id
that Docker has for it on all nodes, and gives out its addresses. So there the id is
the identity, and no pool is ours.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface
from itertools import combinations

import structlog

from cnmdriver.driver import blocks, claims
from cnmdriver.driver.claims import Picker
from cnmdriver.driver.site import Site
from cnmdriver.errors import Conflict, Exhausted, InvalidParameter
from cnmdriver.model import (
    IPNetwork,
    Member,
    Network,
    Pool,
    Reservation,
    Subnet,
    Vni,
    interface,
)
from cnmdriver.plan import devices, options, pools
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.options import Options
from cnmdriver.store import records
from cnmdriver.store.view import Draft

VNIS = range(10_000_000, 1 << 24)
"""VXLAN network identifiers pynet uses (24 bits, RFC 7348); Docker has lower ones."""
SHARED = (
    *("mode", "mtu", "gateway", "icc", "masquerade"),
    *("flood", "host_access", "spoof"),
)
"""Options that all hosts of a network have in common."""
LEAST_MTU6 = 1280
"""RFC 8200, section 5."""

TOLD = 100
"""Options of other drivers that are named in the log; more are somebody's joke."""

log = structlog.get_logger()

Found = tuple[tuple[Subnet, Pool], ...]
"""The subnets of a network whose addresses come from us, each with its pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A CreateNetwork, read."""

    docker_id: str
    subnets: tuple[Subnet, ...]
    options: Options
    given: Mapping[str, str]
    internal: bool
    swarm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What this host has beside pynet's."""

    vnis: frozenset[int]
    routes: tuple[tuple[IPNetwork, str], ...]


class Joining:
    """Decides about this host's parts in networks."""

    def __init__(self, site: Site, mode: str) -> None:
        """Take the site, and the mode of networks that do not say theirs."""
        self.site = site
        self.mode = mode
        self.told: set[str] = {options.VNIS}

    def read(
        self,
        docker_id: str,
        subnets: tuple[Subnet, ...],
        given: Mapping[str, str],
        *,
        internal: bool,
    ) -> Wish:
        """Read a request; raises InvalidParameter."""
        chosen = options.parse(given)
        for key in chosen.unknown:
            if key not in self.told and len(self.told) < TOLD:
                self.told.add(key)
                log.info("network.option_unused", option=key)
        # Docker's null IPAM has 0.0.0.0/0, which is no subnet.
        real = tuple(s for s in subnets if s.pool.prefixlen)
        check_apart(real)
        if chosen.mtu is not None:
            check_mtu(chosen.mtu, real)
        return Wish(
            docker_id=docker_id,
            subnets=real,
            options=chosen,
            given=dict(given),
            internal=internal,
        )

    async def around(self) -> Around:
        """Look at what a decision has to go round."""
        dataplane, host = self.site.dataplane, self.site.host
        return Around(
            vnis=frozenset() if host.vtep is None else await dataplane.vnis(),
            routes=await dataplane.routes(),
        )

    def part(self, docker_id: str) -> Member | None:
        """Return this host's part in the network Docker means, if there is one."""
        members = self.site.members()
        return next((m for m in members if m.docker_id == docker_id), None)

    def decide(
        self, draft: Draft, wish: Wish, around: Around, pickers: Mapping[int, Picker]
    ) -> Member:
        """Write a network and this host's part, or find them as they should be."""
        known = self.part(wish.docker_id)
        if known is not None:
            return self.again(draft, wish, known)
        found = tuple(self.own_pools(draft, wish))
        network = self.of_swarm(draft, wish) or self.existing(draft, wish, found)
        if network is not None:
            self.check_join(wish, network)
        else:
            network = self.new(draft, wish, found, around)
        member = self.member(wish, network)
        self.check_room(network, member, found)
        if found and routed(network):
            check_routes(network, around.routes)
        draft.put(records.network(network.id), network)
        member = self.bind_pools(draft, network, member, found)
        draft.put(records.member(network.id, member.host), member)
        if self.site.state.store.shared:
            self.take_blocks(draft, member, found)
        if network.host_access:
            member = self.take_addresses(draft, member, found, pickers)
        draft.put(records.member(network.id, member.host), member)
        claims.touch(draft, (pool.space for _, pool in found))
        return member

    def again(self, draft: Draft, wish: Wish, known: Member) -> Member:
        """Find a network that Docker creates a second time as it was the first."""
        network = draft.get(Network, records.network(known.network))
        if network is not None:
            held = {pools.parse_id(claim).pool for claim in known.claims}
            same = (
                known.options == tuple(sorted(wish.given.items()))
                and {s.pool for s in wish.subnets}
                == (held or {s.pool for s in network.subnets})
                and next(differences(network, wish), None) is None
            )
            if same:
                return known
        raise Conflict(
            f"network {self.site.name(wish.docker_id)} exists here with other "
            "settings; remove it first"
        )

    # Which network it is.

    def of_swarm(self, draft: Draft, wish: Wish) -> Network | None:
        """
        Return the network that a swarm's manager allocated, None if it is none.

        Only its nodes hear whether it is `--internal`, all of them the same.
        """
        network = draft.get(Network, records.network(wish.docker_id))
        if network is None or not network.swarm:
            return None
        return replace(network, internal=wish.internal)

    def own_pools(self, draft: Draft, wish: Wish) -> Iterator[tuple[Subnet, Pool]]:
        """Yield the pools Docker has from us for a network, lowest IPv4 pool first."""
        for subnet in sorted(
            wish.subnets, key=lambda s: (s.pool.version, s.pool.network_address)
        ):
            for pool in draft.all(Pool, "pools/"):
                if pool.cidr != subnet.pool:
                    continue
                member = claims.part(draft, self.site.host.id, pool)
                if member is not None and not member.docker_id:
                    yield subnet, pool
                    break

    def existing(self, draft: Draft, wish: Wish, found: Found) -> Network | None:
        """
        Return the network that the pools belong to, None if it is yet to be created.

        Raises Conflict if it lacks one of the pools.
        """
        for name in dict.fromkeys(pool.network for _, pool in found):
            network = draft.get(Network, records.network(name))
            members = draft.all(Member, f"members/{name}/")
            if network is None or not any(m.docker_id for m in members):
                continue
            own = {s.pool for s in network.subnets}
            other = next((s.pool for s in wish.subnets if s.pool not in own), None)
            if other is not None:
                raise Conflict(
                    f"network {name} has no pool {other}; join it with: "
                    f"{self.command(network, wish)}"
                )
            return network
        return None

    def check_join(self, wish: Wish, network: Network) -> None:
        """Raise Conflict if a host says something else than the network is."""
        if network.mode not in MODES:
            raise Conflict(
                f"network {network.id} has mode {network.mode}, which this pynet does "
                "not know; update pynet on this host"
            )
        self.check_mode(wish, network.mode)
        for name, theirs, own in differences(network, wish):
            first = wish.subnets[0].pool
            raise Conflict(
                f"network {network.id} on pool {first} has {name} {theirs}, not {own}; "
                f"join it with: {self.command(network, wish)}"
            )
        room = self.room(network.mode)
        if room is not None and network.mtu > room:
            raise Conflict(
                f"network {network.id} has MTU {network.mtu}, and this host's tunnels "
                f"have room for {room}; create it on all hosts with -o pynet.mtu={room}"
            )

    def check_mode(self, wish: Wish, mode: str) -> None:
        """Raise InvalidParameter if a mode cannot be on this host, or as it is said."""
        if mode == "overlay" and self.site.host.vtep is None:
            raise InvalidParameter(
                "mode overlay needs a store that hosts share: start pynet serve with "
                "--store etcd://…, or create the network with -o pynet.mode=bridge"
            )
        options.check_mode(wish.options, mode)

    def room(self, mode: str) -> int | None:
        """Return the largest MTU that this host has room for, None if any will do."""
        return MODES[mode].mtu(self.site.host) if mode == "overlay" else None

    # New networks.

    def allocate(self, draft: Draft, wish: Wish, around: Around) -> Network:
        """
        Write the network of a swarm, or find it as it was allocated before.

        Raises InvalidParameter for what cannot be in a swarm.
        """
        known = draft.get(Network, records.network(wish.docker_id))
        if known is not None:
            return known
        if any(self.own_pools(draft, wish)):
            raise InvalidParameter(
                "the manager of a swarm gives out addresses itself; remove the network "
                "and create it without --ipam-driver"
            )
        if wish.options.host_access:
            raise InvalidParameter(
                "pynet.host_access needs addresses for the hosts, and the manager of a "
                "swarm gives out none; remove the network and create it without"
            )
        network = self.new(draft, replace(wish, swarm=True), (), around)
        draft.put(records.network(network.id), network)
        return network

    def free(self, draft: Draft, docker_id: str) -> None:
        """Delete the network of a swarm; while a node has a part, leave it to that."""
        key = records.network(docker_id)
        network = draft.get(Network, key)
        if network is None or not network.swarm:
            return
        members = draft.all(Member, f"members/{docker_id}/")
        if any(m.docker_id for m in members):
            draft.put(key, replace(network, swarm=False))
        else:
            claims.forget(draft, docker_id)

    def new(self, draft: Draft, wish: Wish, found: Found, around: Around) -> Network:
        """Make a network's record; raises InvalidParameter, or Conflict."""
        chosen = wish.options
        mode = chosen.mode or self.mode
        self.check_mode(wish, mode)
        if mode == "overlay" and not wish.swarm:
            self.check_pools(wish, found)
        if chosen.host_access and chosen.icc is False:
            raise InvalidParameter(
                "pynet.host_access and pynet.icc=false exclude each other: what keeps "
                "containers apart keeps other hosts from them too; leave one out"
            )
        pool_of = dict(found)
        network = Network(
            id=found[0][1].network if found else wish.docker_id,
            mode=mode,
            # Docker's word for a space need not be the one the user chose.
            subnets=tuple(
                replace(s, space=pool_of[s].space) if s in pool_of else s
                for s in wish.subnets
            ),
            mtu=self.mtu(wish, mode),
            internal=wish.internal,
            icc=chosen.icc is not False,
            masquerade=chosen.masquerade is not False,
            gateway=options.gateway_of(chosen, mode),
            flood=bool(chosen.flood),
            host_access=bool(chosen.host_access),
            spoof=bool(chosen.spoof),
            swarm=wish.swarm,
        )
        # A record whose last member could not delete it, as the store was away.
        claims.forget(draft, network.id)
        if mode == "overlay":
            network = replace(network, vni=take_vni(draft, network.id, around.vnis))
        return network

    def mtu(self, wish: Wish, mode: str) -> int:
        """Choose a new network's MTU; raises InvalidParameter if there is no room."""
        room = self.room(mode)
        wished = wish.options.mtu
        if room is not None and wished is not None and wished > room:
            raise InvalidParameter(
                f"MTU {wished} is more than this host's tunnels have room for, {room}; "
                f"give at most -o pynet.mtu={room}"
            )
        chosen = wished or MODES[mode].mtu(self.site.host)
        check_mtu(chosen, wish.subnets)
        return chosen

    def check_pools(self, wish: Wish, found: Found) -> None:
        """Raise InvalidParameter if not all of an overlay's addresses come from us."""
        if found and len(found) == len(wish.subnets):
            return
        # Two creates of one network at once share their pools until one has them.
        self.check_overlap(wish.subnets, apart=False)
        raise InvalidParameter(
            "an overlay network needs addresses that no two hosts give out, and these "
            f"are Docker's own; create it with: {self.command(None, wish)}"
        )

    def member(self, wish: Wish, network: Network) -> Member:
        """Make the record of this host's part in a network."""
        return Member(
            network=network.id,
            host=self.site.host.id,
            docker_id=wish.docker_id,
            bridge=wish.options.bridge or devices.bridge(network.id),
            host_binding=wish.options.host_binding,
            prefix=wish.options.prefix,
            attach=wish.options.attach,
            options=tuple(sorted(wish.given.items())),
        )

    def command(self, network: Network | None, wish: Wish) -> str:
        """Write the command line that creates or joins a network on this host."""
        driver = self.site.driver
        subnets = wish.subnets if network is None else network.subnets
        given = dict(wish.given)
        if network is not None:
            given = {k: v for k, v in given.items() if short(k) not in SHARED} | {
                f"pynet.{name}": word(getattr(network, name))
                for name in SHARED
                if getattr(wish.options, name) is not None
            }
        # The space that Docker says if the user says none.
        spoken = {s.space for s in wish.subnets}
        spaces = {s.space for s in subnets} - spoken
        internal = wish.internal if network is None else network.internal
        return " ".join([
            f"docker network create -d {driver} --ipam-driver {driver}",
            *(f"--ipam-opt pynet.space={name}" for name in sorted(spaces)),
            *(["--internal"] if internal else []),
            *(["--ipv6"] if any(s.pool.version == 6 for s in subnets) else []),
            *(f"--subnet {s.pool}" for s in subnets),
            *(f"-o {shlex.quote(f'{k}={v}')}" for k, v in sorted(given.items())),
            "NAME",
        ])  # fmt: skip

    # What of the host it takes.

    def check_room(self, network: Network, member: Member, found: Found) -> None:
        """Raise Conflict if a subnet or the bridge's name is another network's."""
        for other in self.site.members():
            if other.bridge == member.bridge:
                raise Conflict(
                    f"bridge name {member.bridge} is network "
                    f"{self.site.name(other.docker_id)}'s; choose another"
                )
        apart = bool(found) and not routed(network)
        self.check_overlap(network.subnets, apart=apart, ours=bool(found))

    def check_overlap(
        self, subnets: Iterable[Subnet], *, apart: bool, ours: bool = False
    ) -> None:
        """
        Raise Conflict if a network of this host overlaps one of the subnets.

        Overlays that the host has no route to may overlap, each `apart` from the other
        in an address space of its own.
        """
        for other in self.site.members():
            theirs = self.site.view.get(Network, records.network(other.network))
            if theirs is None or apart or (ours and not routed(theirs)):
                continue
            nets = [s.pool for s in theirs.subnets]
            for subnet in subnets:
                clash = pools.overlapping(subnet.pool, nets)
                if clash is not None:
                    raise Conflict(
                        f"subnet {subnet.pool} overlaps {clash} of network "
                        f"{self.site.name(other.docker_id)}; choose another --subnet "
                        "or remove that network"
                    )

    def bind_pools(
        self, draft: Draft, network: Network, member: Member, found: Found
    ) -> Member:
        """Claim the network's pools for it, bind its addresses, gather the claims."""
        held: list[str] = []
        for _, pool in found:
            claimer = claims.part(draft, member.host, pool)
            if claimer is not None:
                held += [c for c in claimer.claims if claims.covers(c, pool)]
                hand_over(draft, claimer, pool, network)
            bound = replace(pool, network=network.id, claimed=True)
            draft.put(records.pool(pool.space, pool.cidr), bound)
            bind_addresses(draft, bound, member.host)
        known = draft.get(Member, records.member(network.id, member.host))
        rest = known.claims if known is not None else ()
        return replace(member, claims=tuple(dict.fromkeys((*held, *rest))))

    def take_blocks(self, draft: Draft, member: Member, found: Found) -> None:
        """Take this host's first blocks: addresses given out later come from them."""
        for _, pool in found:
            bound = replace(pool, network=member.network, claimed=True)
            for part in blocks.parts(member, bound):
                blocks.take(draft, member.host, bound, part)

    def take_addresses(
        self, draft: Draft, member: Member, found: Found, pickers: Mapping[int, Picker]
    ) -> Member:
        """Take an address of each family for the host itself."""
        for version, picker in pickers.items():
            own = [p for _, p in found if p.cidr.version == version]
            if not own:
                continue
            pool = replace(own[0], network=member.network)
            claim = next(c for c in member.claims if claims.covers(c, pool))
            wish = Reservation(
                space=pool.space,
                cidr=pool.cidr,
                ip=claims.choose(
                    draft, pool, pools.parse_id(claim).sub, member.host, picker
                ),
                host=member.host,
                bound=True,
                name=f"host {self.site.host.name}",
            )
            claims.check_block(draft, pool, wish)
            draft.put(records.address(pool.space, pool.cidr, wish.ip), wish)
            face = interface(wish.ip, pool.cidr)
            if isinstance(face, IPv4Interface):
                member = replace(member, ipv4=face)
            elif isinstance(face, IPv6Interface):
                member = replace(member, ipv6=face)
        return member

    def leave(self, draft: Draft, member: Member) -> None:
        """Delete this host's part in a network, and the network with its last part."""
        draft.delete(records.member(member.network, member.host))
        for pool in claims.pools_of(draft, member.network):
            claims.vacate(draft, member.host, pool)
        claims.prune(draft, member.network)


def differences(network: Network, wish: Wish) -> Iterator[tuple[str, str, str]]:
    """Yield what a wish says otherwise than a network is: name, theirs, own."""
    for name in SHARED:
        said = getattr(wish.options, name)
        is_ = getattr(network, name)
        if said not in (None, is_):
            label = {"mtu": "MTU", "mode": "mode"}.get(name, f"pynet.{name}")
            yield label, word(is_), word(said)
    if wish.internal != network.internal:
        yield "--internal", word(network.internal), word(wish.internal)
    known = {s.pool: s for s in network.subnets}
    for subnet in wish.subnets:
        if subnet.pool in known:
            yield from other_addresses(known[subnet.pool], subnet)


def other_addresses(known: Subnet, said: Subnet) -> Iterator[tuple[str, str, str]]:
    """Yield where a subnet's gateway and reserved addresses are said otherwise."""
    # A network whose gateway is Docker's may have none, yet an older Docker asks for
    # one: it is held and not used.
    if None not in (known.gateway, said.gateway) and known.gateway != said.gateway:
        yield "gateway", str(known.gateway), str(said.gateway)
    if said.reserved and set(said.reserved) != set(known.reserved):
        yield "reserved", several(known.reserved), several(said.reserved)


def several(addresses: Iterable[object]) -> str:
    """List addresses in a sentence."""
    return " and ".join(str(a) for a in addresses) or "no addresses"


def word(value: object) -> str:
    """Write a value as a user would give it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def short(key: str) -> str:
    """Return the name of an option of ours, however it is spelt."""
    return options.ALIASES.get(key, key).removeprefix("pynet.")


def check_apart(subnets: Iterable[Subnet]) -> None:
    """Raise InvalidParameter if one subnet of a network overlaps another."""
    for one, other in combinations([subnet.pool for subnet in subnets], 2):
        if pools.overlap(one, other):
            raise InvalidParameter(
                f"subnet {other} overlaps {one} of the same network; choose another"
            )


def check_mtu(mtu: int, subnets: Iterable[Subnet]) -> None:
    """Raise InvalidParameter if an MTU is too small for IPv6."""
    if mtu < LEAST_MTU6 and any(s.pool.version == 6 for s in subnets):
        raise InvalidParameter(
            f"MTU {mtu} is below IPv6's least, {LEAST_MTU6} (RFC 8200)"
        )


def routed(network: Network) -> bool:
    """Tell whether a host that has the network gets a route to its pools."""
    unrouted = network.mode == "overlay" and network.gateway != "pynet"
    return network.host_access or not unrouted


def check_routes(network: Network, routes: Iterable[tuple[IPNetwork, str]]) -> None:
    """Raise Conflict if the host has another way to a network's pools."""
    for route, device in routes:
        clash = pools.overlapping(route, (s.pool for s in network.subnets))
        if clash is not None:
            raise Conflict(
                f"pool {clash} overlaps this host's route {route} dev {device}; "
                "choose another --subnet"
            )


def hand_over(draft: Draft, claimer: Member, pool: Pool, network: Network) -> None:
    """Take a pool's claims from the network id that was minted with it."""
    if claimer.network == network.id:
        return
    left = tuple(c for c in claimer.claims if not claims.covers(c, pool))
    key = records.member(claimer.network, claimer.host)
    if left:
        draft.put(key, replace(claimer, claims=left))
    else:
        draft.delete(key)


def bind_addresses(draft: Draft, pool: Pool, host: str) -> None:
    """
    Bind what a host took from a pool for its network, and what the network keeps.

    Raises Conflict if a container has one of these addresses.
    """
    for taken in claims.reservation(draft, pool):
        if taken.host == host:
            key = records.address(pool.space, pool.cidr, taken.ip)
            draft.put(key, replace(taken, bound=True))
    for ip, gateway in claims.fixed(draft, pool).items():
        key = records.address(pool.space, pool.cidr, ip)
        held = draft.get(Reservation, key)
        if held is not None and held.endpoint:
            raise Conflict(
                f"address {ip} of pool {pool.cidr} cannot be reserved: it is taken by "
                f"{held.name or held.endpoint[:12]}; choose another or remove that "
                "container"
            )
        fresh = held or Reservation(
            space=pool.space, cidr=pool.cidr, ip=ip, host=host, gateway=gateway
        )
        draft.put(key, replace(fresh, bound=True))


def take_vni(draft: Draft, network: str, foreign: frozenset[int]) -> int:
    """Take a VNI that no network of the cluster and no other device here has."""
    start = int(devices.digest(network), 16)
    for turn in range(len(VNIS)):
        number = VNIS[(start + turn) % len(VNIS)]
        key = records.vni(number)
        if number not in foreign and draft.get(Vni, key) is None:
            draft.put(key, Vni(network=network))
            return number
    raise Exhausted(
        f"no VXLAN network identifier is free from {VNIS.start} to {VNIS.stop - 1}; "
        "remove a network"
    )
