"""Arithmetic of pools: literals where the corner is, properties where there are many."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.errors import InvalidParameter
from cnmdriver.plan import pools
from cnmdriver.plan.pools import PoolId, Range


def net(text):
    return ip_network(text)


networks4 = st.builds(
    lambda number, length: ip_network((number, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(8, 32),
)
networks6 = st.builds(
    lambda number, length: ip_network((number, length), strict=False),
    st.integers(2**32, 2**128 - 1),
    st.integers(16, 128),
)
networks = networks4 | networks6


# Pool ids.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local/10.0.0.0/8", PoolId(space="local", pool=net("10.0.0.0/8"))),
        ("s/fd00::/64", PoolId(space="s", pool=net("fd00::/64"))),
        (
            "s/10.0.0.0/8/10.1.0.0/16",
            PoolId(space="s", pool=net("10.0.0.0/8"), sub=net("10.1.0.0/16")),
        ),
    ],
)
def test_a_pool_id_reads_as_it_was_written(text, expected):
    """A pool id is space, pool and sub-pool, and reads back the same."""
    assert pools.parse_id(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "x/", "x/10.0.0.0", "x/10.0.0.1/8", "x/10.0.0.0/33", "x/a/b",
        "x/10.0.0.0/8/10.0.0.0", "x/10.0.0.0/8/10.0.0.0/9/1", "x/10.0.0.0/8/y/9",
        "x/10.0.0.0/8/10.0.0.0/9/10.0.0.0/10", "x/10.0.0.0/8/",
    ],
)  # fmt: skip
def test_what_is_no_pool_id_is_refused(text):
    """Any other text is an InvalidParameter that quotes it."""
    with pytest.raises(InvalidParameter, match="is not one that pynet gave out"):
        pools.parse_id(text)


def test_a_long_pool_id_is_quoted_in_part():
    """A sentence does not grow with hostile input."""
    with pytest.raises(InvalidParameter) as refused:
        pools.parse_id("x" * 10_000)
    assert str(refused.value) == (
        f"pool id '{'x' * 80}' is not one that pynet gave out"
    )


@given(networks, st.none() | networks)
def test_every_pool_id_survives_writing(pool, sub):
    """Writing and reading a pool id gives the same."""
    identity = PoolId(space="a.b-c_1", pool=pool, sub=sub)
    assert pools.parse_id(str(identity)) == identity


# Default pools.


@pytest.mark.parametrize(
    ("text", "base", "size"),
    [
        ("10.200.0.0/16/24", "10.200.0.0/16", 24),
        (" 10.200.0.0/16/24 ", "10.200.0.0/16", 24),
        ("10.200.0.0/16", "10.200.0.0/16", 16),
        ("10.200.0.0/16/16", "10.200.0.0/16", 16),
        ("10.0.0.0/30/32", "10.0.0.0/30", 32),
        ("fd00::/48/64", "fd00::/48", 64),
        ("fd00::/48/128", "fd00::/48", 128),
        ("10.0.0.1", "10.0.0.1/32", 32),
    ],
)
def test_a_range_is_a_base_and_a_size(text, base, size):
    """A default pool reads as its base and the size of what is cut from it."""
    assert pools.parse_range(text) == Range(base=net(base), size=size)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.200.0.0/16/8", "networks of /8 cannot be cut from 10.200.0.0/16"),
        ("10.200.0.0/16/33", "networks of /33 cannot be cut from 10.200.0.0/16"),
        ("fd00::/48/129", "networks of /129 cannot be cut from fd00::/48"),
        ("10.200.0.1/16/24", "10.200.0.1/16 has host bits set"),
        ("10.200.0.0/16/x", "invalid literal for int"),
        ("nonsense", "'nonsense' does not appear to be"),
        ("", "'' does not appear to be"),
    ],
)
def test_a_bad_range_is_refused(text, reason):
    """A default pool that cannot be is refused with its text and the reason."""
    with pytest.raises(InvalidParameter) as refused:
        pools.parse_range(text)
    assert str(refused.value).startswith(f"default pool {text!r}: {reason}")


# Overlaps.


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("10.0.0.0/24", "10.0.0.0/24", True),
        ("10.0.0.0/24", "10.0.0.128/25", True),
        ("10.0.0.128/25", "10.0.0.0/24", True),
        ("10.0.0.0/24", "10.0.1.0/24", False),
        ("0.0.0.0/0", "::/0", False),
        ("fd00::/64", "fd00::1/128", True),
    ],
)
def test_overlap(one, other, expected):
    """Two networks overlap if they share an address, never across families."""
    assert pools.overlap(net(one), net(other)) is expected


def test_overlapping_names_the_first():
    """The first of the others that is in the way is named, None if none is."""
    others = [net("fd00::/8"), net("10.1.0.0/16"), net("10.0.0.0/8")]
    assert pools.overlapping(net("10.1.2.0/24"), others) == net("10.1.0.0/16")
    assert pools.overlapping(net("10.2.2.0/24"), others) == net("10.0.0.0/8")
    assert pools.overlapping(net("11.0.0.0/8"), others) is None
    assert pools.overlapping(net("11.0.0.0/8"), []) is None


# Free pools.

RANGES = (
    Range(base=net("10.0.0.0/22"), size=24),
    Range(base=net("fd00::/62"), size=64),
    Range(base=net("10.9.0.0/24"), size=24),
)


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], "10.0.0.0/24"),
        (["10.0.0.0/24"], "10.0.1.0/24"),
        (["10.0.0.255/32"], "10.0.1.0/24"),
        (["10.0.1.0/24"], "10.0.0.0/24"),
        (["10.0.0.0/24", "10.0.1.0/24", "10.0.3.0/24"], "10.0.2.0/24"),
        (["10.0.0.0/23", "10.0.2.0/24"], "10.0.3.0/24"),
        (["10.0.0.0/22"], "10.9.0.0/24"),
        (["10.0.0.0/8"], None),
        (["10.0.3.1/32", "10.0.2.0/32", "10.0.1.9/32"], "10.0.0.0/24"),
        (["fd00::/8"], "10.0.0.0/24"),
        (["0.0.0.0/0"], None),
    ],
)
def test_the_first_free_pool(taken, expected):
    """The lowest network that overlaps nothing is found, range after range."""
    found = pools.free_pool(RANGES, 4, [net(text) for text in taken])
    assert found == (net(expected) if expected else None)


def test_a_free_pool_of_the_other_family():
    """Only ranges of the wanted family count."""
    assert pools.free_pool(RANGES, 6, [net("fd00::/64")]) == net("fd00:0:0:1::/64")
    assert pools.free_pool(RANGES[::2], 6, []) is None


def test_a_large_taken_network_costs_one_step():
    """A range of billions of networks is no work when a large one is taken."""
    ranges = [Range(base=net("fd00::/8"), size=64)]
    taken = [net("fd00::/9"), net("fd80::/10")]
    assert pools.free_pool(ranges, 6, taken) == net("fdc0::/64")


def test_the_end_of_the_address_space():
    """A range at the very end of all addresses comes to an end."""
    ranges = [Range(base=net("255.255.255.0/24"), size=25)]
    assert pools.free_pool(ranges, 4, [net("255.255.255.0/25")]) == net(
        "255.255.255.128/25"
    )
    assert pools.free_pool(ranges, 4, [net("255.255.255.0/24")]) is None


@given(st.integers(20, 28), st.lists(networks4.filter(lambda n: n.prefixlen > 19)))
def test_a_free_pool_is_free_and_the_first(size, taken):
    """What is found overlaps nothing, and everything before it overlaps something."""
    ranged = Range(base=net("10.0.0.0/18"), size=size)
    near = [
        ip_network((int(ranged.base[0]) + int(n[0]) % 2**14, n.prefixlen), strict=False)
        for n in taken
    ]
    found = pools.free_pool([ranged], 4, near)
    clashes = [pools.overlapping(p, near) for p in ranged.base.subnets(new_prefix=size)]
    expected = [
        p
        for p, clash in zip(
            ranged.base.subnets(new_prefix=size), clashes, strict=True
        )
        if clash is None
    ]
    assert found == (expected[0] if expected else None)


# Addresses.


@pytest.mark.parametrize(
    ("pool", "first", "last", "count"),
    [
        ("10.0.0.0/24", "10.0.0.1", "10.0.0.254", 254),
        ("10.0.0.0/30", "10.0.0.1", "10.0.0.2", 2),
        ("10.0.0.0/31", "10.0.0.0", "10.0.0.1", 2),
        ("10.0.0.7/32", "10.0.0.7", "10.0.0.7", 1),
        ("10.0.0.8/29", "10.0.0.9", "10.0.0.14", 6),
        ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", 2**64 - 1),
        ("fd00::/126", "fd00::1", "fd00::3", 3),
        ("fd00::/127", "fd00::", "fd00::1", 2),
        ("fd00::5/128", "fd00::5", "fd00::5", 1),
    ],
)
def test_bounds_and_capacity(pool, first, last, count):
    """Network and broadcast are kept, but in pools of one or two addresses."""
    low, high = pools.bounds(net(pool))
    assert (low, high) == (int(ip_address(first)), int(ip_address(last)))
    assert pools.capacity(net(pool)) == count


@pytest.mark.parametrize(
    ("pool", "sub", "expected"),
    [
        ("10.0.0.0/29", None, [1, 2, 3, 4, 5, 6]),
        ("10.0.0.0/29", "10.0.0.4/30", [4, 5, 6]),
        ("10.0.0.0/29", "10.0.0.0/30", [1, 2, 3]),
        ("10.0.0.0/28", "10.0.0.4/30", [4, 5, 6, 7]),
        ("10.0.0.0/28", "10.0.0.5/32", [5]),
        ("10.0.0.0/28", "10.0.0.0/32", []),
        ("10.0.0.0/31", None, [0, 1]),
        ("fd00::/126", None, [1, 2, 3]),
    ],
)
def test_candidates(pool, sub, expected):
    """Free addresses come lowest first, a sub-pool's own ends included."""
    part = net(sub) if sub else None
    base = int(net(pool)[0])
    found = [int(a) - base for a in pools.candidates(net(pool), part, set())]
    assert found == expected
    assert pools.capacity(net(pool), part) == len(expected)


def test_candidates_leave_out_what_is_taken():
    """Taken numbers are passed over."""
    taken = {int(ip_address(f"10.0.0.{n}")) for n in (1, 2, 4, 200)}
    found = list(pools.candidates(net("10.0.0.0/29"), None, taken))
    assert found == [ip_address(f"10.0.0.{n}") for n in (3, 5, 6)]


@given(networks, networks)
def test_candidates_are_addresses_of_the_pool(pool, sub):
    """The first candidates lie in the pool, in the sub-pool, and within the bounds."""
    part = sub if sub.version == pool.version and sub.subnet_of(pool) else None
    low, high = pools.bounds(pool)
    for address, _ in zip(
        pools.candidates(pool, part, set()), range(5), strict=False
    ):
        assert address in pool
        assert part is None or address in part
        assert low <= int(address) <= high
        pools.check_address(pool, address)


@pytest.mark.parametrize(
    ("pool", "address"),
    [
        ("10.0.0.0/24", "10.0.0.1"), ("10.0.0.0/24", "10.0.0.254"),
        ("10.0.0.0/31", "10.0.0.0"), ("10.0.0.0/31", "10.0.0.1"),
        ("10.0.0.0/32", "10.0.0.0"), ("10.0.0.0/23", "10.0.0.255"),
        ("10.0.0.0/23", "10.0.1.0"), ("fd00::/64", "fd00::1"),
        ("fd00::/64", "fd00::ffff:ffff:ffff:ffff"),
    ],
)  # fmt: skip
def test_a_good_address(pool, address):
    """Any address between the bounds may be an endpoint's, also .0 and .255."""
    pools.check_address(net(pool), ip_address(address))


@pytest.mark.parametrize(
    ("pool", "address", "reason"),
    [
        ("10.0.0.0/24", "10.0.1.1", "address 10.0.1.1 is not in pool 10.0.0.0/24"),
        ("10.0.0.0/24", "fd00::1", "address fd00::1 is not in pool 10.0.0.0/24"),
        ("fd00::/64", "10.0.0.1", "address 10.0.0.1 is not in pool fd00::/64"),
        ("10.0.0.0/24", "10.0.0.0", "is the network's own or its broadcast"),
        ("10.0.0.0/24", "10.0.0.255", "is the network's own or its broadcast"),
        ("fd00::/64", "fd00::", "is the network's own or its broadcast"),
    ],
)
def test_a_bad_address(pool, address, reason):
    """An address outside, or one of the two ends, is refused by name."""
    with pytest.raises(InvalidParameter, match=reason):
        pools.check_address(net(pool), ip_address(address))


# Blocks.


@pytest.mark.parametrize(
    ("pool", "address", "expected"),
    [
        ("10.0.0.0/16", "10.0.5.77", "10.0.5.64/26"),
        ("10.0.0.0/23", "10.0.1.255", "10.0.1.192/26"),
        ("10.0.0.0/24", "10.0.0.33", "10.0.0.32/27"),
        ("10.0.0.0/26", "10.0.0.33", "10.0.0.32/29"),
        ("10.0.0.0/29", "10.0.0.3", "10.0.0.3/32"),
        ("10.0.0.0/30", "10.0.0.3", "10.0.0.3/32"),
        ("10.0.0.0/32", "10.0.0.0", "10.0.0.0/32"),
        ("fd00::/64", "fd00::47", "fd00::40/122"),
        ("fd00::/126", "fd00::2", "fd00::2/128"),
    ],
)
def test_blocks(pool, address, expected):
    """A block has 64 addresses, fewer where the pool would have less than eight."""
    assert pools.block(net(pool), ip_address(address)) == net(expected)


@given(networks, st.integers(0))
def test_a_block_is_in_its_pool(pool, number):
    """Every address of a pool is in one block, which is a part of the pool."""
    address = pool[number % pool.num_addresses]
    block = pools.block(pool, address)
    assert address in block
    assert block.subnet_of(pool)
