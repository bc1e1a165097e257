"""Arithmetic of pools and addresses: which are free, which overlap, which block."""

import ipaddress
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from cnmdriver.errors import InvalidParameter
from cnmdriver.model import IPAddress, IPNetwork

BLOCKS = {4: 26, 6: 122}
"""The prefix length of a block of addresses: 64 of them, as in Calico's IPAM."""
SMALLEST_SHARE = 3
"""A pool has at least two to this power blocks, so that several hosts get one each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A default pool: networks of prefix length `size` are cut from `base`."""

    base: IPNetwork
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolId:
    """What Docker calls a pool from its request to its release."""

    space: str
    pool: IPNetwork
    sub: IPNetwork | None = None

    def __str__(self) -> str:
        """Write it as Docker keeps it."""
        parts = (self.space, str(self.pool), *([str(self.sub)] if self.sub else []))
        return "/".join(parts)


def read(text: str) -> IPNetwork:
    """Read a network; raises ValueError, also for one with a scope (`%eth0`)."""
    if "%" in text:
        raise ValueError(f"{text!r} has a scope")
    return ipaddress.ip_network(text)


def parse_id(text: str) -> PoolId:
    """Read a pool id; raises InvalidParameter if it was never one of ours."""
    space, *rest = text.split("/")
    try:
        nets = [read("/".join(rest[i : i + 2])) for i in range(0, len(rest), 2)]
    except ValueError:
        nets = []
    if len(rest) not in (2, 4) or not nets:
        raise InvalidParameter(f"pool id {text[:80]!r} is not one that pynet gave out")
    return PoolId(space=space, pool=nets[0], sub=nets[1] if nets[1:] else None)


def parse_range(text: str) -> Range:
    """Read a default pool: `10.200.0.0/16/24` cuts /24s from 10.200.0.0/16."""
    base, size = text.strip(), ""
    if text.count("/") == 2:
        base, _, size = base.rpartition("/")
    try:
        net = read(base)
        length = int(size or net.prefixlen)
    except ValueError as error:
        raise InvalidParameter(f"default pool {text!r}: {error}") from None
    if not net.prefixlen <= length <= net.max_prefixlen:
        raise InvalidParameter(
            f"default pool {text!r}: networks of /{length} cannot be cut from {net}"
        )
    return Range(base=net, size=length)


def overlapping(pool: IPNetwork, others: Iterable[IPNetwork]) -> IPNetwork | None:
    """Return the first of the others that shares an address with the pool."""
    return next((o for o in others if overlap(pool, o)), None)


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Tell whether two networks of whatever families share an address."""
    return one.version == other.version and one.overlaps(other)


def free_pool(
    ranges: Iterable[Range], version: int, taken: Collection[IPNetwork]
) -> IPNetwork | None:
    """
    Return the first network of the ranges that overlaps none of the taken ones.

    A candidate inside a taken network jumps behind it, so a large one costs one step.
    """
    for ranged in ranges:
        if ranged.base.version != version:
            continue
        place = int(ranged.base.network_address)
        end = int(ranged.base.broadcast_address)
        step = 1 << (ranged.base.max_prefixlen - ranged.size)
        while place <= end:
            pool: IPNetwork = type(ranged.base)((place, ranged.size))
            blocker = overlapping(pool, taken)
            if blocker is None:
                return pool
            behind = max(place + 1, int(blocker.broadcast_address) + 1)
            place = -(-behind // step) * step
    return None


def bounds(pool: IPNetwork) -> tuple[int, int]:
    """
    Return the first and last number an endpoint may have.

    IPv4 keeps the network and broadcast address (but RFC 3021's /31 and a /32), IPv6
    the subnet-router anycast address (RFC 4291 2.6.1; but RFC 6164's /127 and a /128).
    """
    first, last = int(pool.network_address), int(pool.broadcast_address)
    if pool.max_prefixlen - pool.prefixlen < 2:
        return first, last
    return first + 1, last - (1 if pool.version == 4 else 0)


def window(pool: IPNetwork, sub: IPNetwork | None) -> tuple[int, int]:
    """Return the first and last number that is given out unasked."""
    first, last = bounds(pool)
    if sub is None:
        return first, last
    low, high = int(sub.network_address), int(sub.broadcast_address)
    return max(first, low), min(last, high)


def capacity(pool: IPNetwork, sub: IPNetwork | None = None) -> int:
    """Count the addresses that can be given out, the gateway's included."""
    first, last = window(pool, sub)
    return max(0, last - first + 1)


def candidates(
    pool: IPNetwork, sub: IPNetwork | None, taken: Collection[int]
) -> Iterator[IPAddress]:
    """Yield the free addresses of a pool, or of its sub-pool, lowest first."""
    first, last = window(pool, sub)
    kind = type(pool.network_address)
    for number in range(first, last + 1):
        if number not in taken:
            yield kind(number)


def check_address(pool: IPNetwork, address: IPAddress) -> None:
    """Raise InvalidParameter unless an endpoint of the pool may have the address."""
    if address.version != pool.version or address not in pool:
        raise InvalidParameter(f"address {address} is not in pool {pool}")
    first, last = bounds(pool)
    if not first <= int(address) <= last:
        raise InvalidParameter(
            f"address {address} is the network's own or its broadcast in pool {pool}"
        )


def block(pool: IPNetwork, address: IPAddress) -> IPNetwork:
    """Return the block of the pool that holds the address; small in small pools."""
    return ipaddress.ip_network((address, block_length(pool)), strict=False)


def block_length(pool: IPNetwork) -> int:
    """Return the prefix length of a pool's blocks."""
    length = max(BLOCKS[pool.version], pool.prefixlen + SMALLEST_SHARE)
    return min(length, pool.max_prefixlen)


def inside(part: IPNetwork, whole: IPNetwork) -> bool:
    """Tell whether a network is a part of another."""
    return (
        part.version == whole.version
        and part.prefixlen >= whole.prefixlen
        and part.network_address in whole
    )


def blocks(pool: IPNetwork, sub: IPNetwork | None = None) -> Iterator[IPNetwork]:
    """Yield the blocks of a pool, or those that its sub-pool is in, lowest first."""
    length = block_length(pool)
    if sub is None:
        yield from pool.subnets(new_prefix=length)
    elif sub.prefixlen >= length:
        yield sub.supernet(new_prefix=length)
    else:
        yield from sub.subnets(new_prefix=length)
