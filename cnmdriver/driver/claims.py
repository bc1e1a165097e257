"""
Claims on pools: who keeps a pool alive, which of its addresses are free, what goes.

A pool lives while a host has claimed it (RequestPool) or has created its network. All
decisions about claims in one space change that space's record, so that of two at the
same moment one is made again: a pool cannot be dropped while another host joins it.

Some addresses are the pool's for as long as it lives, whichever host asked for them:
the gateway, and what a created network reserves.
"""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_network
from itertools import islice

from cnmdriver.errors import Conflict, Exhausted, StoreError
from cnmdriver.model import (
    Block,
    Endpoint,
    Host,
    IPAddress,
    IPNetwork,
    Member,
    Network,
    Pool,
    Reservation,
    Vni,
)
from cnmdriver.plan import pools
from cnmdriver.store import records
from cnmdriver.store.records import Space
from cnmdriver.store.view import Draft, View

FEW = 8
"""Of how many free addresses one is drawn after a lost race; twice that after two."""
MOST = 1024


def touch(draft: Draft, spaces: Iterable[str]) -> None:
    """
    Let no other decision about claims in these spaces be made meanwhile.

    The record of a space without pools goes: to whoever saw none, nothing happened.
    """
    for name in sorted(set(spaces)):
        key = records.space(name)
        space = draft.get(Space, key) or Space()
        if draft.keys(f"pools/{name}/"):
            draft.put(key, replace(space, claims=space.claims + 1))
        else:
            draft.delete(key)


def covers(claim: str, pool: Pool) -> bool:
    """Tell whether a pool id stands for a pool or a sub-pool of it."""
    name = f"{pool.space}/{pool.cidr}"
    return claim == name or claim.startswith(name + "/")


def pools_of(view: Draft | View, network: str) -> list[Pool]:
    """Return the pools of a network."""
    return [p for p in view.all(Pool, "pools/") if p.network == network]


def part(draft: Draft, host: str, pool: Pool) -> Member | None:
    """
    Return the record by which a host has a part in a pool.

    It is the one of the pool's network; but of several pools claimed for one network
    each had minted an id until the first host created it.
    """
    own = draft.get(Member, records.member(pool.network, host))
    if own is not None and (own.docker_id or claimed(own, pool)):
        return own
    for member in draft.all(Member, "members/"):
        if member.host == host and claimed(member, pool):
            return draft.get(Member, records.member(member.network, host))
    return None


def claimed(member: Member, pool: Pool) -> bool:
    """Tell whether a host's record has a claim on a pool."""
    return any(covers(claim, pool) for claim in member.claims)


def claimants(draft: Draft, pool: Pool) -> set[str]:
    """Return the hosts that have a claim on a pool."""
    members = draft.all(Member, "members/")
    return {member.host for member in members if claimed(member, pool)}


def prune(draft: Draft, network: str) -> None:
    """
    Delete what nobody has a part in any more.

    To be called by every decision that took a claim or a member away. A network of a
    swarm is the manager's to free, nodes or not.
    """
    known = draft.get(Network, records.network(network))
    if known is not None and known.swarm:
        return
    owned = pools_of(draft, network)
    if not any(m.docker_id for m in draft.all(Member, f"members/{network}/")):
        forget(draft, network)
        for pool in owned:
            hosts = claimants(draft, pool)
            if hosts:
                open_again(draft, pool, hosts)
            else:
                drop(draft, pool)
    if draft.puts or draft.deletes:
        touch(draft, (p.space for p in owned))


def forget(draft: Draft, network: str) -> None:
    """Delete a network's record if there is one, and give its VNI back."""
    known = draft.get(Network, records.network(network))
    if known is None:
        return
    draft.delete(records.network(network))
    key = records.vni(known.vni)
    if known.vni and draft.get(Vni, key) == Vni(network=network):
        draft.delete(key)


def open_again(draft: Draft, pool: Pool, hosts: set[str]) -> None:
    """Leave a pool to those who have claimed it for a network yet to be created."""
    draft.put(records.pool(pool.space, pool.cidr), replace(pool, claimed=False))
    for held in reservation(draft, pool):
        if held.host not in hosts and not held.gateway:
            draft.delete(records.address(pool.space, pool.cidr, held.ip))


def drop(draft: Draft, pool: Pool) -> None:
    """Delete a pool with its addresses and blocks."""
    draft.delete(records.pool(pool.space, pool.cidr))
    for prefix in (
        records.addresses(pool.space, pool.cidr),
        records.blocks(pool.space, pool.cidr),
    ):
        for key in draft.keys(prefix):
            draft.delete(key)


def vacate(draft: Draft, host: str, pool: Pool, *, blocks: bool = True) -> None:
    """
    Give back what a host still has of a pool, but for the pool's own addresses.

    Without `blocks` its blocks stay its own.
    """
    for held in reservation(draft, pool):
        if held.host == host and not held.gateway and not is_fixed(draft, pool, held):
            draft.delete(records.address(pool.space, pool.cidr, held.ip))
    for span, block in blocks_of(draft, pool) if blocks else ():
        if block.host == host:
            draft.delete(records.block(pool.space, pool.cidr, span))


def taken(view: Draft | View, space: str | None = None) -> dict[IPNetwork, str]:
    """
    Return every pool in use with the network that has it.

    Pools of one space only, or of all; the subnets of networks whose addresses Docker
    gives out itself count in every space, as their devices are on this host.
    """
    found = view.all(Pool, f"pools/{space}/" if space else "pools/")
    networks = {p.cidr: p.network for p in found}
    ours = {(p.space, p.cidr) for p in view.all(Pool, "pools/")}
    for network in view.all(Network, "networks/"):
        for subnet in network.subnets:
            if (subnet.space, subnet.pool) not in ours:
                networks.setdefault(subnet.pool, network.id)
    return networks


# Addresses.


def reservation(view: Draft | View, pool: Pool) -> list[Reservation]:
    """Return the addresses of a pool that are taken."""
    return list(view.all(Reservation, records.addresses(pool.space, pool.cidr)))


def fixed(draft: Draft, pool: Pool) -> dict[IPAddress, bool]:
    """
    Return what a created network keeps for itself, and which of it is the gateway.

    It is held too, but its record can be lost: the host that asked for it may be
    removed from the cluster, and Docker creates networks in parallel, so that a create
    that failed gives back what it shared with one that did not.
    """
    network = draft.get(Network, records.network(pool.network))
    found = {}
    for subnet in network.subnets if network is not None else ():
        if subnet.pool == pool.cidr:
            found.update(dict.fromkeys(subnet.reserved, False))
            if subnet.gateway is not None:
                found[subnet.gateway] = True
    return found


def is_fixed(draft: Draft, pool: Pool, held: Reservation) -> bool:
    """Tell whether an address is the pool's own while its network exists."""
    return held.ip in fixed(draft, pool)


class Picker:
    """
    Chooses among free addresses: the lowest, as Docker's users expect.

    Hosts that ask at the same time would all choose that one, and go on meeting at the
    next; so whoever has lost a race draws one of the next few.
    """

    def __init__(self) -> None:
        """Have lost no race yet."""
        self.turns = 0

    def pick(self, free: Iterator[IPAddress]) -> IPAddress | None:
        """Choose one, None if there is none; each further call is after a lost race."""
        many = min(FEW << (self.turns - 1), MOST) if self.turns else 1
        self.turns += 1
        few = list(islice(free, many))
        return secrets.choice(few) if few else None


def choose(
    draft: Draft, pool: Pool, sub: IPNetwork | None, host: str, picker: Picker
) -> IPAddress:
    """
    Find a free address in a block that no other host has.

    Raises Exhausted with the pool's name and counts.
    """
    held = records.addresses(pool.space, pool.cidr)
    numbers = draft.values(held, number)
    numbers |= {int(ip) for ip in fixed(draft, pool)}
    if pool.cidr.version == 4:
        numbers |= draft.values(f"endpoints/{pool.network}/", spoken_for)
    if draft.alone:
        chosen = picker.pick(in_own_blocks(draft, pool, sub, host, numbers))
        if chosen is None:
            raise StoreError(
                f"no address of pool {sub or pool.cidr} is free in the blocks that "
                f"this host gives out by itself; {draft.alone}"
            )
        return chosen
    theirs = closed(draft, pool, host)
    every = pools.candidates(pool.cidr, sub, numbers)
    chosen = picker.pick(ip for ip in every if theirs.open(ip))
    if chosen is None:
        first, last = pools.window(pool.cidr, sub)
        raise NoneFree(
            f"pool {sub or pool.cidr} has no free address: "
            f"{sum(first <= n <= last for n in numbers)} taken of {last - first + 1}"
            f"{theirs.count(first, last)}; remove containers, or use a larger --subnet",
            wanted=any_of(pools.candidates(pool.cidr, sub, numbers)),
        )
    return chosen


def any_of(free: Iterator[IPAddress]) -> IPAddress | None:
    """Choose one of some addresses: their owner takes the lowest itself."""
    some = list(islice(free, MOST))
    return secrets.choice(some) if some else None


class NoneFree(Exhausted):
    """A pool has no address for this host; `wanted` is one that another may give."""

    def __init__(self, text: str, *, wanted: IPAddress | None) -> None:
        """Keep the address."""
        super().__init__(text)
        self.wanted = wanted


class Elsewhere(Conflict):
    """An address lies in another host's block, which must be asked for it."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The blocks of other hosts in a pool."""

    bits: int
    """How many bits of an address tell its place in a block."""
    numbers: frozenset[int]
    lent: frozenset[IPAddress]

    def open(self, ip: IPAddress) -> bool:
        """Tell whether an address is for all."""
        return int(ip) >> self.bits not in self.numbers or ip in self.lent

    def count(self, first: int, last: int) -> str:
        """Say how much of a pool they are."""
        here = [n for n in self.numbers if first >> self.bits <= n <= last >> self.bits]
        return f", {len(here) << self.bits} in blocks of other hosts" if here else ""


def closed(draft: Draft, pool: Pool, host: str) -> Closed:
    """Find the blocks of other hosts."""
    theirs = {span: b for span, b in blocks_of(draft, pool) if b.host != host}
    length = pools.block_length(pool.cidr)
    bits = pool.cidr.max_prefixlen - length
    return Closed(
        bits=bits,
        numbers=frozenset(int(span.network_address) >> bits for span in theirs),
        lent=frozenset(ip for block in theirs.values() for ip in block.lent),
    )


def blocks_of(view: Draft | View, pool: Pool) -> list[tuple[IPNetwork, Block]]:
    """Return the blocks of a pool that have owners, lowest first."""
    prefix = records.blocks(pool.space, pool.cidr)
    found = [
        (ip_network(key.removeprefix(prefix)), record)
        for key, record in view.pairs(prefix)
        if isinstance(record, Block)
    ]
    return sorted(found, key=lambda pair: int(pair[0].network_address))


def in_own_blocks(
    draft: Draft, pool: Pool, sub: IPNetwork | None, host: str, numbers: set[int]
) -> Iterator[IPAddress]:
    """Yield what is free of the blocks that a host surely has, lowest first."""
    for span, block in blocks_of(draft, pool):
        if block.host == host and certain(draft.view, pool, span):
            for ip in pools.candidates(pool.cidr, span, numbers):
                if ip not in block.lent and (sub is None or ip in sub):
                    yield ip


def certain(view: View, pool: Pool, span: IPNetwork) -> bool:
    """
    Tell whether all that others took of a block before it had its owner is known.

    That is so once everything was read after it was taken.
    """
    key = records.block(pool.space, pool.cidr, span)
    return 0 < view.seen(key) <= view.listed


def number(record: object) -> tuple[int, ...]:
    """Return the address that a reservation is of, as a number."""
    return (int(record.ip),) if isinstance(record, Reservation) else ()


def spoken_for(record: object) -> tuple[int, ...]:
    """Return the IPv4 address, as a number, whose MAC a user chose for an endpoint."""
    if not isinstance(record, Endpoint) or not record.user_mac:
        return ()
    mac = record.mac.replace(":", "")
    return (int(mac[4:], 16),) if mac.startswith("0242") else ()


def check_block(draft: Draft, pool: Pool, wish: Reservation) -> None:
    """
    Raise Elsewhere if another host gives out an address's block, now or meanwhile.

    Without the store only what is surely this host's passes; else raises StoreError.
    """
    span = pools.block(pool.cidr, wish.ip)
    block = draft.get(Block, records.block(pool.space, pool.cidr, span))
    lent = block is not None and wish.ip in block.lent
    own = block is not None and block.host == wish.host and not lent
    if draft.alone and not (own and certain(draft.view, pool, span)):
        raise StoreError(
            f"address {wish.ip} is in no block that this host gives out by itself; "
            f"{draft.alone}"
        )
    if block is not None and not own and not lent:
        raise Elsewhere(
            f"address {wish.ip} lies in block {span}, whose addresses host "
            f"{host_name(draft, block.host)} gives out, which does not give this one; "
            "choose another address"
        )


def host_name(view: Draft | View, host: str) -> str:
    """Return what a host calls itself, or its short id."""
    # Not by `get`: whatever it calls itself, the decision is the same.
    known = (view.view if isinstance(view, Draft) else view).get(
        Host, records.host(host)
    )
    return known.name if known is not None else host[:8]


def endpoint_name(draft: Draft, endpoint: Endpoint) -> str:
    """Return the name that an endpoint's address was taken with, or its short id."""
    for pool in pools_of(draft, endpoint.network):
        for address in endpoint.addresses:
            key = records.address(pool.space, pool.cidr, address.ip)
            held = draft.view.get(Reservation, key)
            if held is not None and held.name:
                return held.name
    return endpoint.id[:12]
