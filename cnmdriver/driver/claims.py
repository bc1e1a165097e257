"""
Claims on pools: who keeps a pool alive, and what goes when the last one leaves.

A pool lives while a host has claimed it (RequestPool) or has created its network. All
decisions about claims in one space change that space's record, so that of two at the
same moment one is made again: a pool cannot be dropped while another host joins it.
"""

from collections.abc import Iterable
from dataclasses import replace

from cnmdriver.model import IPNetwork, Member, Network, Pool, Reservation
from cnmdriver.store import records
from cnmdriver.store.records import Space
from cnmdriver.store.view import Draft, View


def touch(draft: Draft, spaces: Iterable[str]) -> None:
    """Let no other decision about claims in these spaces be made meanwhile."""
    for name in sorted(set(spaces)):
        space = draft.get(Space, records.space(name)) or Space()
        draft.put(records.space(name), replace(space, claims=space.claims + 1))


def covers(claim: str, pool: Pool) -> bool:
    """Tell whether a pool id stands for a pool or a sub-pool of it."""
    name = f"{pool.space}/{pool.cidr}"
    return claim == name or claim.startswith(name + "/")


def pools_of(view: Draft | View, network: str) -> list[Pool]:
    """Return the pools of a network."""
    return [p for p in view.all(Pool, "pools/") if p.network == network]


def prune(draft: Draft, network: str) -> None:
    """
    Delete what nobody has a part in any more.

    To be called by every decision that took a claim or a member away.
    """
    members = draft.all(Member, f"members/{network}/")
    created = any(m.docker_id for m in members)
    claims = [claim for m in members for claim in m.claims]
    pools = pools_of(draft, network)
    touch(draft, (p.space for p in pools))
    for pool in pools:
        if not created and not any(covers(claim, pool) for claim in claims):
            drop(draft, pool)
    if not created:
        draft.delete(records.network(network))


def drop(draft: Draft, pool: Pool) -> None:
    """Delete a pool with its addresses and blocks."""
    draft.delete(records.pool(pool.space, pool.cidr))
    for prefix in (
        records.addresses(pool.space, pool.cidr),
        records.blocks(pool.space, pool.cidr),
    ):
        for key in draft.keys(prefix):
            draft.delete(key)


def taken(view: Draft | View, space: str | None = None) -> dict[IPNetwork, str]:
    """
    Return every pool in use with the network that has it.

    Pools of one space only, or of all; the subnets of networks whose addresses Docker
    gives out itself count in every space, as their devices are on this host.
    """
    pools = view.all(Pool, f"pools/{space}/" if space else "pools/")
    found = {p.cidr: p.network for p in pools}
    ours = {(p.space, p.cidr) for p in view.all(Pool, "pools/")}
    for network in view.all(Network, "networks/"):
        for subnet in network.subnets:
            if (subnet.space, subnet.pool) not in ours:
                found.setdefault(subnet.pool, network.id)
    return found


def reservation(view: Draft | View, pool: Pool) -> list[Reservation]:
    """Return the addresses of a pool that are taken."""
    return list(view.all(Reservation, records.addresses(pool.space, pool.cidr)))
