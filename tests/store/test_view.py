"""The view: which news it takes in, what it shows, and what a draft makes of it."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnmdriver.model import (
    Alive,
    Cluster,
    Fence,
    Host,
    Kept,
    Member,
    Network,
    Pool,
    Reservation,
    Watermark,
)
from cnmdriver.store import records
from cnmdriver.store.base import Change, Item
from cnmdriver.store.view import Draft, View

NET = ip_network("10.1.0.0/24")


def host(name: str, version: str = "1") -> Host:
    """Make a record."""
    return Host(id=name, name=name, version=version)


def member(network: str, name: str) -> Member:
    """Make a record of a group of its own."""
    return Member(network=network, host=name)


def item(record: object, revision: int) -> Item:
    """Make an item as the store lists it."""
    return Item(value=records.encode(record), revision=revision)


def write(view: View, key: str, record: object | None, revision: int) -> bool:
    """Tell a view what the store says of a key."""
    value = None if record is None else records.encode(record)
    return view.write(key, value, revision)


@pytest.fixture
def view() -> View:
    """Know two hosts, at revisions 3 and 5."""
    view = View()
    write(view, "hosts/a", host("a"), 3)
    write(view, "hosts/b", host("b"), 5)
    return view


# News.


def test_an_empty_view():
    """Who knows nothing has no records, and every key is absent."""
    view = View()
    assert view.get(Host, "hosts/a") is None
    assert view.seen("hosts/a") == 0
    assert list(view.all(Host, "hosts/")) == []
    assert view.revision == 0


def test_newer_news(view):
    """A later write replaces the record and its revision."""
    assert write(view, "hosts/a", host("a", "2"), 6)
    assert view.get(Host, "hosts/a") == host("a", "2")
    assert view.seen("hosts/a") == 6
    assert view.revision == 6


@pytest.mark.parametrize("revision", [1, 2, 3])
@pytest.mark.parametrize("record", [None, host("a", "old")])
def test_older_news_changes_nothing(view, revision, record):
    """What was written before, or is known already, is no news, deletions too."""
    assert not write(view, "hosts/a", record, revision)
    assert view.get(Host, "hosts/a") == host("a")
    assert view.seen("hosts/a") == 3
    assert view.revision == 5


def test_a_deletion(view):
    """A deleted key is absent, and an older write does not bring it back."""
    assert write(view, "hosts/a", None, 6)
    assert view.get(Host, "hosts/a") is None
    assert view.seen("hosts/a") == 0
    assert not write(view, "hosts/a", host("a"), 6)
    assert view.get(Host, "hosts/a") is None
    assert write(view, "hosts/a", host("a", "new"), 7)
    assert view.get(Host, "hosts/a") == host("a", "new")


def test_the_last_of_a_group(view):
    """A group without keys is forgotten, and can come again."""
    write(view, "hosts/a", None, 6)
    write(view, "hosts/b", None, 6)
    assert view.groups == {}
    assert write(view, "hosts/b", host("b"), 7)
    assert list(view.all(Host, "hosts/")) == [host("b")]


def test_deleting_what_was_never_there(view):
    """The deletion of an unknown key leaves nothing behind but its revision."""
    assert write(view, "members/n/a", None, 6)
    assert list(view.groups) == ["hosts/"]
    assert not write(view, "members/n/a", member("n", "a"), 6)


# Malformed values.


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hosts/a", b"", "value of hosts/a in the store"),
        ("hosts/a", b"\xff\xfe", "value of hosts/a in the store"),
        ("hosts/a", b'{"schema": 1}', "value of hosts/a in the store"),
        ("hosts/a", b'{"schema": 1, "record": {"id": 5}}', "value of hosts/a"),
        ("ships/a", b"{}", "key ships/a in the store is none of pynet's"),
    ],
)
def test_malformed_values(view, key, value, reason):
    """What is not a record is noted and left out; the others stay."""
    assert view.write(key, value, 7)
    assert reason in view.malformed[key]
    assert view.get(Host, key) is None
    assert view.get(Host, "hosts/b") == host("b")
    assert host("b") in list(view.all(Host, "hosts/"))


def test_a_malformed_value_is_mended(view):
    """A good value takes the note away, and so does a deletion."""
    view.write("hosts/a", b"?", 7)
    assert write(view, "hosts/a", host("a"), 8)
    assert view.malformed == {}
    assert view.get(Host, "hosts/a") == host("a")
    view.write("hosts/a", b"?", 9)
    assert write(view, "hosts/a", None, 10)
    assert view.malformed == {}


def test_a_malformed_value_that_a_listing_lacks(view):
    """A malformed key that is gone from the store is noted no more."""
    view.write("hosts/a", b"?", 7)
    view.replace([("hosts/b", item(host("b"), 5))], 8)
    assert view.malformed == {}


# Whole listings.


def test_a_listing_removes_what_it_lacks(view):
    """What a listing lacks is gone, and that is news."""
    assert view.replace([("hosts/b", item(host("b"), 5))], 7)
    assert view.get(Host, "hosts/a") is None
    assert view.get(Host, "hosts/b") == host("b")
    assert view.revision == 7


def test_the_same_listing_is_no_news(view):
    """A listing of what is known already tells nothing new."""
    listing = [("hosts/a", item(host("a"), 3)), ("hosts/b", item(host("b"), 5))]
    assert not view.replace(listing, 5)
    assert not view.replace(listing, 9)
    assert view.revision == 9


def test_a_listing_of_nothing(view):
    """An empty store empties the view."""
    assert view.replace([], 9)
    assert view.groups == {}
    assert view.revision == 9


def test_a_listing_keeps_what_was_written_after_it(view):
    """A listing that was overtaken takes away nothing that is younger than itself."""
    write(view, "hosts/c", host("c"), 8)
    write(view, "hosts/b", host("b", "2"), 9)
    write(view, "hosts/a", None, 10)
    listing = [("hosts/a", item(host("a"), 3)), ("hosts/b", item(host("b"), 5))]
    assert not view.replace(listing, 7)
    assert list(view.all(Host, "hosts/")) == [host("b", "2"), host("c")]
    assert view.revision == 10


def test_a_listing_forgets_deletions(view):
    """A deletion need not be remembered once a later listing lacks the key."""
    write(view, "hosts/a", None, 6)
    listing = [("hosts/b", item(host("b"), 5))]
    view.replace(listing, 5)
    assert "hosts/a" in view.written
    view.replace(listing, 6)
    assert view.written == {"hosts/b": 5}


def test_what_a_listing_ended_can_come_back(view):
    """A record that a listing lacks is gone as of then: the next news counts."""
    view.replace([("hosts/a", item(host("a"), 3))], 5)
    assert view.get(Host, "hosts/b") is None
    assert write(view, "hosts/b", host("b", "new"), 6)
    assert view.get(Host, "hosts/b") == host("b", "new")


def test_the_last_word(view):
    """News of a key counts again when the store has answered to the last word on it."""
    view.foresee("hosts/a", records.encode(host("a", "old")))
    first = view.ahead["hosts/a"]
    view.foresee("hosts/a", records.encode(host("a", "mine")))
    last = view.ahead["hosts/a"]
    assert not write(view, "hosts/a", host("a", "theirs"), 9)
    view.replace([("hosts/b", item(host("b"), 5))], 10)
    assert view.get(Host, "hosts/a") == host("a", "mine")
    assert not view.confirm("hosts/a", first, first.value, 11)
    assert not write(view, "hosts/a", None, 12)
    assert view.confirm("hosts/a", last, last.value, 13)
    assert view.seen("hosts/a") == 13
    assert write(view, "hosts/a", None, 14)
    assert view.get(Host, "hosts/a") is None


def test_where_a_watch_starts(view):
    """Own writes do not move the place behind which news of others is missing."""
    assert view.listed == 0
    view.replace([("hosts/b", item(host("b"), 5))], 7)
    write(view, "hosts/a", host("a"), 20)
    assert (view.listed, view.revision) == (7, 20)
    view.replace([], 6)
    assert view.listed == 7


# Looking.


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("cluster", "cluster/"),
        ("hosts/h", "hosts/"),
        ("networks/n", "networks/"),
        ("members/n/h", "members/n/"),
        ("spaces/s", "spaces/"),
        ("pools/s/10.1.0.0/24", "pools/s/"),
        ("addresses/s/10.1.0.0/24/10.1.0.2", "addresses/s/10.1.0.0/24/"),
        ("blocks/s/10.1.0.0/24/10.1.0.0/28", "blocks/s/10.1.0.0/24/"),
        ("endpoints/n/e", "endpoints/n/"),
    ],
)
def test_groups(key, group):
    """Keys that are listed together have one group."""
    assert records.group(key) == group


def test_only_the_wanted_type(view):
    """A record of another type than was asked for is not shown."""
    assert view.get(Network, "hosts/a") is None
    assert list(view.all(Network, "hosts/")) == []


def test_one_group_or_many(view):
    """A prefix may be a group, or the beginning of several, but of no other's name."""
    for network, name in (("n", "b"), ("n", "a"), ("nn", "c")):
        write(view, f"members/{network}/{name}", member(network, name), 9)
    assert list(view.all(Member, "members/n/")) == [member("n", "a"), member("n", "b")]
    assert [m.host for m in view.all(Member, "members/")] == ["a", "b", "c"]
    assert list(view.all(Member, "members/m/")) == []


def test_addresses_of_one_pool(view):
    """A pool's addresses are not mixed with those of a pool that begins alike."""
    found = []
    for cidr, ip in (("10.1.0.0/24", "10.1.0.2"), ("10.1.0.0/25", "10.1.0.3")):
        pool, address = ip_network(cidr), ip_address(ip)
        taken = Reservation(space="s", cidr=pool, ip=address, host="a")
        write(view, records.address("s", pool, address), taken, 9)
        found.append(taken)
    assert list(view.all(Reservation, records.addresses("s", NET))) == found[:1]
    assert list(view.all(Reservation, "addresses/")) == found


# Drafts.


def test_a_draft_remembers_what_it_saw(view):
    """A look is expected again at commit, absence too; looking writes nothing."""
    draft = Draft(view)
    assert draft.get(Host, "hosts/a") == host("a")
    assert draft.get(Host, "hosts/c") is None
    assert draft.change() == Change(expect={"hosts/a": 3, "hosts/c": 0})
    assert not draft.change()


def test_a_draft_keeps_the_first_look(view):
    """What changes between two looks of one draft makes its commit fail."""
    draft = Draft(view)
    draft.get(Host, "hosts/a")
    write(view, "hosts/a", host("a", "2"), 6)
    draft.put("hosts/a", host("a", "3"))
    assert draft.change().expect == {"hosts/a": 3}


def test_a_draft_sees_its_own_writes(view):
    """Puts and deletes of a draft show in it, and not in the view."""
    draft = Draft(view)
    draft.put("hosts/a", host("a", "2"))
    draft.put("hosts/c", host("c"))
    draft.delete("hosts/b")
    assert draft.get(Host, "hosts/a") == host("a", "2")
    assert draft.get(Host, "hosts/b") is None
    assert draft.get(Network, "hosts/c") is None
    assert draft.all(Host, "hosts/") == [host("a", "2"), host("c")]
    assert draft.keys("hosts/") == ["hosts/a", "hosts/c"]
    assert list(view.all(Host, "hosts/")) == [host("a"), host("b")]


def test_a_draft_that_wrote_elsewhere(view):
    """Writes under one prefix do not disturb another, nor a prefix of types."""
    draft = Draft(view)
    draft.put("members/n/a", member("n", "a"))
    assert draft.all(Host, "hosts/") == [host("a"), host("b")]
    assert draft.all(Host, "members/") == []
    assert draft.all(Member, "members/") == [member("n", "a")]
    assert draft.keys("members/m/") == []


def test_the_transaction(view):
    """A change has all puts as bytes, all deletes, and the revisions that were seen."""
    draft = Draft(view)
    draft.put("hosts/a", host("a", "2"))
    draft.put("hosts/c", host("c"))
    draft.delete("hosts/b")
    assert draft.change() == Change(
        expect={"hosts/a": 3, "hosts/c": 0},
        puts={
            "hosts/a": records.encode(host("a", "2")),
            "hosts/c": records.encode(host("c")),
        },
        deletes=frozenset({"hosts/b"}),
    )
    assert draft.change().written() == {"hosts/a", "hosts/b", "hosts/c"}


def test_putting_the_same_is_nothing(view):
    """A record that is there already is not written, but expected to stay."""
    draft = Draft(view)
    draft.put("hosts/a", host("a"))
    assert not draft.change()
    assert draft.change().expect == {"hosts/a": 3}


def test_the_last_put_counts(view):
    """Of several puts of one key the last is written, even if it is what was there."""
    draft = Draft(view)
    draft.put("hosts/a", host("a", "2"))
    draft.put("hosts/a", host("a"))
    assert draft.get(Host, "hosts/a") == host("a")
    assert draft.change().puts == {"hosts/a": records.encode(host("a"))}


def test_put_after_delete(view):
    """A key that is deleted and put again is put, even if it was the same."""
    draft = Draft(view)
    draft.delete("hosts/a")
    draft.put("hosts/a", host("a"))
    assert draft.change() == Change(
        expect={"hosts/a": 3}, puts={"hosts/a": records.encode(host("a"))}
    )
    assert draft.keys("hosts/") == ["hosts/a", "hosts/b"]


def test_delete_after_put(view):
    """A key that is put and deleted is deleted."""
    draft = Draft(view)
    draft.put("hosts/c", host("c"))
    draft.delete("hosts/c")
    assert draft.change().puts == {}
    assert draft.change().deletes == {"hosts/c"}
    assert draft.keys("hosts/") == ["hosts/a", "hosts/b"]


def test_a_pool_in_a_draft(view):
    """Addresses in a record are values after the way through bytes, not text."""
    draft = Draft(view)
    draft.put(records.pool("s", NET), Pool(space="s", cidr=NET, network="n"))
    ((key, value),) = draft.change().puts.items()
    view.write(key, value, 9)
    assert view.get(Pool, "pools/s/10.1.0.0/24") == Pool(
        space="s", cidr=NET, network="n"
    )


# What changed.


def test_the_first_look_at_changes(view):
    """Who asks for the first time gets every key there is, and nothing that is gone."""
    feed = view.feed()
    write(view, "hosts/a", None, 6)
    write(view, "members/n/a", member("n", "a"), 7)
    write(view, "watermarks/a", Watermark(revision=1), 8)
    assert feed.drain() == {"hosts/b", "members/n/a"}
    assert feed.drain() == frozenset()


def test_changes_since_the_last_look(view):
    """Puts and deletions count once each, whichever way they came; old news does not."""
    feed = view.feed()
    feed.drain()
    write(view, "hosts/a", host("a", "2"), 6)
    write(view, "hosts/a", host("a", "3"), 7)
    write(view, "hosts/b", host("b", "old"), 4)
    write(view, "members/n/a", None, 8)
    write(view, "watermarks/a", Watermark(revision=1), 8)
    assert feed.drain() == {"hosts/a", "members/n/a"}
    assert feed.drain() == frozenset()
    view.replace([("hosts/a", item(host("a", "4"), 9))], 9)
    assert feed.drain() == {"hosts/a", "hosts/b"}


def test_nobody_looks_for_changes(view):
    """Changes nobody has ever asked for are not remembered."""
    feed = view.feed()
    for number in range(1000):
        write(view, f"hosts/{number}", host("x"), 10 + number)
        write(view, f"hosts/{number}", None, 2000 + number)
    assert feed.fresh is None


def test_a_malformed_value_is_a_change(view):
    """A key whose value cannot be read any more has changed."""
    feed = view.feed()
    feed.drain()
    view.write("hosts/a", b"?", 7)
    assert feed.drain() == {"hosts/a"}


def test_watermarks_are_no_news(view):
    """A listing whose only news is how far other hosts are wakes nobody."""
    listing = [("hosts/a", item(host("a"), 3)), ("hosts/b", item(host("b"), 5))]
    mark = ("watermarks/a", item(Watermark(revision=1), 8))
    assert not view.replace([*listing, mark], 9)
    assert view.get(Watermark, "watermarks/a") == Watermark(revision=1)
    assert not view.replace(listing, 10)
    assert view.get(Watermark, "watermarks/a") is None


# Order.


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=60))
def test_order_is_kept(steps):
    """Whatever came and went, in whichever order, records are shown by their keys."""
    view, known = View(), set()
    for revision, (number, put) in enumerate(steps, 1):
        name = f"{number:x}"
        write(view, f"members/n/{name}", member("n", name) if put else None, revision)
        known = known | {name} if put else known - {name}
    assert [m.host for m in view.all(Member, "members/n/")] == sorted(known)
    assert [m.host for m in view.all(Member, "members/")] == sorted(known)
    assert Draft(view).keys("members/n/") == [f"members/n/{k}" for k in sorted(known)]
    draft = Draft(view)
    draft.put("members/n/55", member("n", "55"))
    draft.delete("members/n/5")
    wanted = sorted((known | {"55"}) - {"5"})
    assert [m.host for m in draft.all(Member, "members/n/")] == wanted
    assert draft.keys("members/n/") == [f"members/n/{k}" for k in wanted]
    assert view.order.keys() == view.groups.keys()


def test_a_look_while_it_changes(view):
    """A look shows what was there when it began, whatever changes meanwhile."""
    found = []
    for record in view.all(Host, "hosts/"):
        found.append(record)
        write(view, "hosts/b", None, 9)
        write(view, "hosts/c", host("c"), 9)
    assert found == [host("a"), host("b")]


# A store that went back.


def test_a_rewound_store_is_believed_in_what_it_has(view):
    """What a restored store has counts, though its revisions are lower than known."""
    old = [("hosts/a", item(host("a", "old"), 2))]
    assert not view.replace(old, 2)
    assert view.replace(old, 2, rewound=True)
    assert view.get(Host, "hosts/a") == host("a", "old")
    assert view.seen("hosts/a") == 2
    assert (view.revision, view.listed) == (2, 2)
    assert write(view, "hosts/a", host("a", "new"), 3)
    assert view.get(Host, "hosts/a") == host("a", "new")


def test_what_a_rewound_store_lacks_stays(view):
    """Nothing is removed because a wiped store lacks it, also later; it is named."""
    view.replace([], 1, rewound=True)
    assert list(view.all(Host, "hosts/")) == [host("a"), host("b")]
    assert view.missing == {"hosts/a", "hosts/b"}
    assert view.seen("hosts/a") == 0
    assert not view.replace([], 7)
    assert list(view.all(Host, "hosts/")) == [host("a"), host("b")]


def test_what_was_missing_is_published_again(view):
    """A missing record can be put or deleted, and is as any other then."""
    view.replace([], 1, rewound=True)
    draft = Draft(view)
    draft.put("hosts/a", host("a", "2"))
    assert draft.change().expect == {"hosts/a": 0}
    write(view, "hosts/a", host("a", "2"), 2)
    write(view, "hosts/b", None, 2)
    assert view.missing == set()
    assert list(view.all(Host, "hosts/")) == [host("a", "2")]
    assert view.replace([], 3)
    assert view.groups == {}


def test_the_same_record_is_published_again():
    """A draft writes a missing record even if it is the same as the view shows."""
    view = View()
    write(view, "hosts/a", host("a"), 3)
    view.replace([], 1, rewound=True)
    draft = Draft(view)
    draft.put("hosts/a", host("a"))
    assert draft.change() == Change(
        expect={"hosts/a": 0}, puts={"hosts/a": records.encode(host("a"))}
    )


def test_what_ends_with_the_store(view):
    """Fences are lost with the store; who was alive there is so for the time being."""
    write(view, "alive/a", Alive(instance="i", boot="b"), 6)
    write(view, "fence/a", Fence(instance="i"), 6)
    write(view, "kept/a", Kept(), 6)
    write(view, "cluster", Cluster(id="c", schema=1), 6)
    view.replace([], 1, rewound=True)
    assert sorted(view.groups) == ["alive/", "hosts/"]
    assert view.missing == {"alive/a", "hosts/a", "hosts/b"}


# Indexes.


def traits(record: object) -> tuple[str, ...]:
    """Return what a host is found by in these tests: its letters, and its version."""
    if not isinstance(record, Host):
        return ()
    return tuple({*record.name, record.version})


WRITES = st.lists(
    st.tuples(
        st.sampled_from(["ab", "bc", "ca", "d"]),
        st.sampled_from(["1", "2", None]),
    ),
    max_size=40,
)


@given(before=WRITES, after=WRITES)
def test_an_index_follows_the_view(before, after):
    """Whatever is written and deleted, also until nothing is left."""
    view = View()
    for revision, (name, version) in enumerate([*before, *after], 1):
        if revision == len(before):
            view.index("hosts/", traits)
        write(view, f"hosts/{name}", version and host(name, version=version), revision)
    index = view.index("hosts/", traits)
    there = dict(view.pairs("hosts/"))
    every = {value for record in there.values() for value in traits(record)}
    assert set(index) == every
    for value in (*every, "x"):
        assert index.find(value) == {k for k, r in there.items() if value in traits(r)}


@given(before=WRITES, after=WRITES)
def test_values_of_a_draft(before, after):
    """They are of what is there and of what the draft writes, and of nothing else."""
    view = View()
    for revision, (name, version) in enumerate(before, 1):
        key = f"hosts/{name}"
        write(view, key, version and host(name, version=version), revision)
    draft = Draft(view)
    for name, version in after:
        if version is None:
            draft.delete(f"hosts/{name}")
        else:
            draft.put(f"hosts/{name}", host(name, version=version))
    there = draft.all(Host, "hosts/")
    assert draft.values("hosts/", traits) == {v for r in there for v in traits(r)}


def test_an_index_ends_with_its_group(view):
    """Nothing is kept of groups that are gone, nor of those that never were."""
    view.index("hosts/", traits)
    view.index("members/n1/", traits)
    assert list(view.indexes) == ["hosts/"]
    write(view, "hosts/a", None, 6)
    write(view, "hosts/b", None, 7)
    assert view.indexes == {}
