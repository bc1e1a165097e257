"""Pools and addresses: what is free, what overlaps, what may be given to whom."""

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.errors import InvalidParameter
from cnmdriver.plan import pools
from cnmdriver.plan.pools import PoolId, Range


def v4(shortest=8, longest=32):
    """Return a strategy of IPv4 networks."""
    return st.builds(
        lambda number, length: IPv4Network((number, length), strict=False),
        st.integers(0, 2**32 - 1),
        st.integers(shortest, longest),
    )


def v6(shortest=8, longest=128):
    """Return a strategy of IPv6 networks."""
    return st.builds(
        lambda number, length: IPv6Network((number, length), strict=False),
        st.integers(0, 2**128 - 1),
        st.integers(shortest, longest),
    )


NETWORKS = v4() | v6()
SMALL = v4(24) | v6(120)


def part(net, number, length):
    """Return the sub-network of a network that holds its n-th address."""
    length = max(net.prefixlen, min(length, net.max_prefixlen))
    at = int(net.network_address) + number % net.num_addresses
    return type(net)((at, length), strict=False)


# Pool ids.


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (PoolId(space="local", pool=ip_network("10.1.0.0/24")), "local/10.1.0.0/24"),
        (
            PoolId(
                space="s.1_-",
                pool=ip_network("10.1.0.0/16"),
                sub=ip_network("10.1.5.0/24"),
            ),
            "s.1_-/10.1.0.0/16/10.1.5.0/24",
        ),
        (PoolId(space="local", pool=ip_network("fd00::/64")), "local/fd00::/64"),
        (
            PoolId(
                space="g",
                pool=ip_network("fd00::/64"),
                sub=ip_network("fd00::8000/113"),
            ),
            "g/fd00::/64/fd00::8000/113",
        ),
    ],
)
def test_pool_id_is_written_and_read(identity, text):
    """A pool id is space, pool and sub-pool, and is read as it was written."""
    assert str(identity) == text
    assert pools.parse_id(text) == identity


@given(
    st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
    NETWORKS,
    st.none() | NETWORKS,
)
def test_pool_id_round_trip(space, pool, sub):
    """Whatever pool was given out, its id is read back as the same."""
    identity = PoolId(space=space, pool=pool, sub=sub)
    assert pools.parse_id(str(identity)) == identity


@pytest.mark.parametrize(
    "text",
    [
        "",
        "local",
        "local/",
        "local/10.1.0.0",
        "local/10.1.0.0/24/",
        "local/10.1.0.0/24/10.1.0.1",
        "local/10.1.0.0/24/10.1.0.0/25/10.1.0.0/26",
        "local/10.1.0.0/24/10.1.0.0/25/10.1.0.0",
        "local/10.1.0.1/24",
        "local/10.1.0.0/33",
        "local/10.1.0/24",
        "local/10.1.0.0/24/10.1.0.1/25",
        "local/fe80::%eth0/64",
        "local/fe80::%}; flush ruleset/64",
        "10.1.0.0/24",
        "local//24",
    ],
)
def test_pool_id_of_others(text):
    """What pynet never gave out is refused, and the text says which id it was."""
    with pytest.raises(InvalidParameter) as refused:
        pools.parse_id(text)
    assert str(refused.value) == f"pool id {text!r} is not one that pynet gave out"


def test_long_pool_id_is_cut():
    """An id of any length makes an error text of a bounded one."""
    with pytest.raises(InvalidParameter) as refused:
        pools.parse_id("x" * 1000)
    assert str(refused.value) == (
        f"pool id '{'x' * 80}' is not one that pynet gave out"
    )


# Default pools.


@pytest.mark.parametrize(
    ("text", "base", "size"),
    [
        ("10.200.0.0/16/24", "10.200.0.0/16", 24),
        (" 10.200.0.0/16/24 ", "10.200.0.0/16", 24),
        ("10.200.0.0/16", "10.200.0.0/16", 16),
        ("10.200.0.0/16/16", "10.200.0.0/16", 16),
        ("10.200.0.0/16/32", "10.200.0.0/16", 32),
        ("fd70:796e:6574::/48/64", "fd70:796e:6574::/48", 64),
        ("fd00::/64/128", "fd00::/64", 128),
        ("10.200.0.5", "10.200.0.5/32", 32),
    ],
)
def test_range_is_read(text, base, size):
    """A default pool is a base and the length of what is cut from it."""
    assert pools.parse_range(text) == Range(base=ip_network(base), size=size)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "does not appear to be"),
        ("ten", "does not appear to be"),
        ("10.200.0.0/16/24/28", "does not appear to be"),
        ("10.200.0.1/16/24", "has host bits set"),
        ("10.200.0.0/16/x", "invalid literal"),
        ("10.200.0.0/16/15", "networks of /15 cannot be cut from 10.200.0.0/16"),
        ("10.200.0.0/16/33", "networks of /33 cannot be cut from 10.200.0.0/16"),
        ("10.200.0.0/16/-1", "networks of /-1 cannot be cut from 10.200.0.0/16"),
        ("fd00::/64/129", "networks of /129 cannot be cut from fd00::/64"),
        ("fe80::%eth0/64", "'fe80::%eth0/64' has a scope"),
    ],
)
def test_range_is_refused(text, why):
    """A wrong default pool is refused with its text and what is wrong with it."""
    with pytest.raises(InvalidParameter) as refused:
        pools.parse_range(text)
    assert str(refused.value).startswith(f"default pool {text!r}: ")
    assert why in str(refused.value)


# Overlap.


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("10.1.0.0/24", "10.1.0.0/24", True),
        ("10.1.0.0/24", "10.1.0.128/25", True),
        ("10.1.0.0/24", "10.0.0.0/8", True),
        ("10.1.0.0/24", "10.1.1.0/24", False),
        ("10.1.0.0/24", "::/0", False),
        ("fd00::/64", "0.0.0.0/0", False),
        ("fd00::/64", "fd00::/48", True),
        ("fd00::/64", "fd00:0:0:1::/64", False),
    ],
)
def test_overlap(one, other, shared):
    """Networks overlap when they share an address; families never do."""
    assert pools.overlap(ip_network(one), ip_network(other)) is shared
    assert pools.overlap(ip_network(other), ip_network(one)) is shared


def test_overlapping_names_the_first():
    """Of several networks in the way the first is returned, None if there is none."""
    others = [
        ip_network(t) for t in ("::/0", "10.2.0.0/16", "10.1.0.0/16", "10.0.0.0/8")
    ]
    assert pools.overlapping(ip_network("10.1.2.0/24"), others) == others[2]
    assert pools.overlapping(ip_network("10.9.0.0/24"), others) == others[3]
    assert pools.overlapping(ip_network("11.0.0.0/24"), others) is None
    assert pools.overlapping(ip_network("11.0.0.0/24"), []) is None


# Free pools.


def free(ranges, version, *taken):
    """Return the free pool as text."""
    found = pools.free_pool(
        [pools.parse_range(r) for r in ranges.split(",")],
        version,
        [ip_network(t) for t in taken],
    )
    return None if found is None else str(found)


@pytest.mark.parametrize(
    ("ranges", "version", "taken", "found"),
    [
        ("10.200.0.0/16/24", 4, (), "10.200.0.0/24"),
        ("10.200.0.0/16/24", 6, (), None),
        ("10.200.0.0/16/24", 4, ("10.200.0.0/24",), "10.200.1.0/24"),
        ("10.200.0.0/16/24", 4, ("10.200.1.0/24",), "10.200.0.0/24"),
        ("10.200.0.0/16/24", 4, ("10.200.0.255/32",), "10.200.1.0/24"),
        ("10.200.0.0/16/24", 4, ("10.200.0.0/17",), "10.200.128.0/24"),
        ("10.200.0.0/16/24", 4, ("10.0.0.0/8",), None),
        ("10.200.0.0/16/24", 4, ("10.200.0.0/16",), None),
        ("10.200.0.0/16/24", 4, ("::/0",), "10.200.0.0/24"),
        ("10.200.0.0/16/24", 4, ("10.200.0.0/24", "10.200.1.0/25"), "10.200.2.0/24"),
        ("10.200.0.0/23/24", 4, ("10.200.0.0/24",), "10.200.1.0/24"),
        ("10.200.0.0/23/24", 4, ("10.200.0.0/24", "10.200.1.9/32"), None),
        ("10.200.0.0/30/32", 4, ("10.200.0.0/31", "10.200.0.2"), "10.200.0.3/32"),
        ("10.200.0.0/24", 4, ("10.200.0.0/24",), None),
        ("10.1.0.0/24,10.2.0.0/23/24", 4, ("10.1.0.7/32",), "10.2.0.0/24"),
        ("fd00::/48/64,10.1.0.0/24", 4, (), "10.1.0.0/24"),
        ("10.1.0.0/24,fd00::/48/64", 6, ("fd00::/64",), "fd00:0:0:1::/64"),
        ("255.255.255.0/24/25", 4, ("255.255.255.0/25",), "255.255.255.128/25"),
        ("255.255.255.0/24/25", 4, ("255.255.255.0/24",), None),
        ("::/0/1", 6, ("::/1",), "8000::/1"),
        ("::/0/1", 6, ("::/1", "ffff::/128"), None),
    ],
)
def test_free_pool(ranges, version, taken, found):
    """The lowest free network of the first range that has one is chosen."""
    assert free(ranges, version, *taken) == found


def test_free_pool_jumps_over_what_is_large():
    """A taken network of 2^63 candidates costs one step and not that many."""
    assert free("fd00::/32/128", 6, "fd00::/33") == "fd00:0:8000::/128"
    assert free("fd00::/8/64", 6, "fd00::/9", "fd80::/10") == "fdc0::/64"


@given(v4(20, 24), st.integers(0, 6), st.lists(v4(20), max_size=4), st.data())
def test_free_pool_is_free(base, deeper, others, data):
    """What is found lies in the range and overlaps nothing; nothing lower is free."""
    size = base.prefixlen + deeper
    inside = st.builds(part, st.just(base), st.integers(0, 4096), st.integers(20, 32))
    taken = [*others, *data.draw(st.lists(inside, max_size=8))]
    found = pools.free_pool([Range(base=base, size=size)], 4, taken)
    clear = [
        net
        for net in base.subnets(new_prefix=size)
        if not any(net.overlaps(other) for other in taken)
    ]
    assert found == (clear[0] if clear else None)


@given(st.lists(st.integers(0, 15), max_size=20))
def test_free_pools_are_distinct(released):
    """Pools taken one after the other, some given back between, never overlap."""
    ranges = [pools.parse_range("10.0.0.0/24/28")]
    taken = []
    for place in released:
        found = pools.free_pool(ranges, 4, taken)
        if found is not None:
            taken.append(found)
        if place < len(taken) - 1:
            del taken[place]
    assert all(
        not one.overlaps(other) for one in taken for other in taken if one is not other
    )


# Addresses of a pool.


@pytest.mark.parametrize(
    ("pool", "first", "last"),
    [
        ("10.1.0.0/24", "10.1.0.1", "10.1.0.254"),
        ("10.1.0.0/30", "10.1.0.1", "10.1.0.2"),
        ("10.1.0.8/29", "10.1.0.9", "10.1.0.14"),
        ("10.1.0.0/31", "10.1.0.0", "10.1.0.1"),
        ("10.1.0.0/32", "10.1.0.0", "10.1.0.0"),
        ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff"),
        ("fd00::/126", "fd00::1", "fd00::3"),
        ("fd00::/127", "fd00::", "fd00::1"),
        ("fd00::/128", "fd00::", "fd00::"),
    ],
)
def test_bounds(pool, first, last):
    """Endpoints get neither network nor broadcast address, but for tiny pools."""
    numbers = int(ip_address(first)), int(ip_address(last))
    assert pools.bounds(ip_network(pool)) == numbers
    assert pools.window(ip_network(pool), None) == numbers


@pytest.mark.parametrize(
    ("pool", "sub", "first", "last", "count"),
    [
        ("10.1.0.0/24", "10.1.0.0/25", "10.1.0.1", "10.1.0.127", 127),
        ("10.1.0.0/24", "10.1.0.128/25", "10.1.0.128", "10.1.0.254", 127),
        ("10.1.0.0/24", "10.1.0.64/26", "10.1.0.64", "10.1.0.127", 64),
        ("10.1.0.0/24", "10.1.0.0/24", "10.1.0.1", "10.1.0.254", 254),
        ("10.1.0.0/24", "10.1.0.7/32", "10.1.0.7", "10.1.0.7", 1),
        ("10.1.0.0/24", "10.1.0.0/32", "10.1.0.1", "10.1.0.0", 0),
        ("10.1.0.0/24", "10.1.0.255/32", "10.1.0.255", "10.1.0.254", 0),
        ("fd00::/64", "fd00::/120", "fd00::1", "fd00::ff", 255),
    ],
)
def test_window(pool, sub, first, last, count):
    """A sub-pool limits what is given out; the pool's own addresses stay its own."""
    pool, sub = ip_network(pool), ip_network(sub)
    assert pools.window(pool, sub) == (int(ip_address(first)), int(ip_address(last)))
    assert pools.capacity(pool, sub) == count
    assert len(list(pools.candidates(pool, sub, ()))) == count


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        ("10.1.0.0/24", 254),
        ("10.1.0.0/31", 2),
        ("10.1.0.0/32", 1),
        ("fd00::/64", 2**64 - 1),
    ],
)
def test_capacity(pool, count):
    """The count of a pool is of what endpoints and the gateway can have."""
    assert pools.capacity(ip_network(pool)) == count


def test_capacity_is_never_negative():
    """A sub-pool of another place has no addresses, and not less than none."""
    pool, sub = ip_network("10.1.0.0/24"), ip_network("10.9.0.0/24")
    assert pools.capacity(pool, sub) == 0
    assert list(pools.candidates(pool, sub, ())) == []


def test_candidates_skip_what_is_taken():
    """Addresses come lowest first, in their own family, without the taken ones."""
    found = pools.candidates(
        ip_network("10.1.0.0/29"), None, {int(ip_address("10.1.0.2"))}
    )
    assert list(found) == [IPv4Address(f"10.1.0.{n}") for n in (1, 3, 4, 5, 6)]
    found = pools.candidates(ip_network("fd00::/64"), ip_network("fd00::10/124"), set())
    assert list(islice(found, 2)) == [IPv6Address("fd00::10"), IPv6Address("fd00::11")]


@given(SMALL, st.none() | st.tuples(st.integers(0, 255), st.integers(0, 8)), st.data())
def test_candidates_are_all_there_is(pool, inner, data):
    """Candidates are the addresses of window and bounds that are not taken."""
    sub = None
    if inner is not None:
        sub = part(pool, inner[0], pool.prefixlen + inner[1])
    start = int(pool.network_address)
    taken = {start + n for n in data.draw(st.sets(st.integers(0, 255), max_size=20))}
    found = list(pools.candidates(pool, sub, taken))
    wanted = []
    for address in pool if sub is None else sub:
        try:
            pools.check_address(pool, address)
        except InvalidParameter:
            continue
        if int(address) not in taken:
            wanted.append(address)
    assert found == wanted


@pytest.mark.parametrize(
    ("pool", "address"),
    [
        ("10.1.0.0/24", "10.1.0.1"),
        ("10.1.0.0/24", "10.1.0.254"),
        ("10.1.0.0/31", "10.1.0.0"),
        ("10.1.0.0/32", "10.1.0.0"),
        ("10.0.0.0/23", "10.0.0.255"),
        ("10.0.0.0/23", "10.0.1.0"),
        ("fd00::/64", "fd00::1"),
        ("fd00::/64", "fd00::ffff:ffff:ffff:ffff"),
        ("fd00::/127", "fd00::"),
    ],
)
def test_address_is_good(pool, address):
    """An endpoint may have any address within the bounds."""
    pools.check_address(ip_network(pool), ip_address(address))


@pytest.mark.parametrize(
    ("pool", "address", "why"),
    [
        ("10.1.0.0/24", "10.1.1.0", "address 10.1.1.0 is not in pool 10.1.0.0/24"),
        ("10.1.0.0/24", "::1", "address ::1 is not in pool 10.1.0.0/24"),
        ("::/0", "10.1.0.1", "address 10.1.0.1 is not in pool ::/0"),
        ("fd00::/64", "10.1.0.1", "address 10.1.0.1 is not in pool fd00::/64"),
        (
            "10.1.0.0/24",
            "10.1.0.0",
            "address 10.1.0.0 is the network's own or its broadcast in pool 10.1.0.0/24",
        ),
        (
            "10.1.0.0/24",
            "10.1.0.255",
            "address 10.1.0.255 is the network's own or its broadcast in pool 10.1.0.0/24",
        ),
        (
            "fd00::/64",
            "fd00::",
            "address fd00:: is the network's own or its broadcast in pool fd00::/64",
        ),
    ],
)
def test_address_is_refused(pool, address, why):
    """An address that no endpoint of the pool may have is named with its pool."""
    with pytest.raises(InvalidParameter) as refused:
        pools.check_address(ip_network(pool), ip_address(address))
    assert str(refused.value) == why


# Blocks.


@pytest.mark.parametrize(
    ("pool", "address", "block"),
    [
        ("10.1.0.0/16", "10.1.2.77", "10.1.2.64/26"),
        ("10.1.0.0/23", "10.1.1.255", "10.1.1.192/26"),
        ("10.1.0.0/24", "10.1.0.77", "10.1.0.64/27"),
        ("10.1.0.0/26", "10.1.0.33", "10.1.0.32/29"),
        ("10.1.0.0/29", "10.1.0.5", "10.1.0.5/32"),
        ("10.1.0.0/30", "10.1.0.3", "10.1.0.3/32"),
        ("10.1.0.0/31", "10.1.0.1", "10.1.0.1/32"),
        ("fd00::/64", "fd00::41", "fd00::40/122"),
        ("fd00::/120", "fd00::41", "fd00::40/123"),
        ("fd00::/127", "fd00::1", "fd00::1/128"),
    ],
)
def test_block(pool, address, block):
    """Blocks have 64 addresses, or an eighth of a small pool."""
    assert pools.block(ip_network(pool), ip_address(address)) == ip_network(block)


@given(NETWORKS, st.integers(0, 2**128 - 1))
def test_block_is_a_part(pool, number):
    """A block has its address, lies in its pool, and is the same for all it has."""
    address = pool.network_address + number % pool.num_addresses
    block = pools.block(pool, address)
    assert address in block
    assert block.subnet_of(pool)
    assert block.num_addresses <= 64
    assert pools.block(pool, block.network_address) == block
    assert pools.block(pool, block.broadcast_address) == block
