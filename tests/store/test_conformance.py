"""What every backend must do: one suite, run over the table at its head."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnmdriver.errors import StoreError
from cnmdriver.store.base import (
    Change,
    CompactedError,
    Event,
    Item,
    Lease,
    Listing,
    RaceLostError,
    Store,
)
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.sqlite import SqliteStore
from tests.store import etcd_server
from tests.store.etcd_server import Cluster

Clusters = Callable[[int], Cluster]
"""Gives the cluster of so many members."""


@dataclass
class Doors:
    """Two doors to one store's content, and what makes it forget its history."""

    store: Store
    other: Store
    compact: Callable[[], Awaitable[None]]


class Reopening:
    """A store that is closed and opened again before each reading and writing."""

    shared = False

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.path = path
        self.now = SqliteStore(path)
        self.keep = False
        self.turn = asyncio.Lock()

    async def open(self) -> None:
        await self.now.open()

    async def close(self) -> None:
        await self.now.close()

    async def again(self) -> None:
        """Open anew, unless a watch or a lease would end with it."""
        if not self.keep:
            await self.now.close()
            self.now = SqliteStore(self.path)
            await self.now.open()

    async def read(self, prefix: str) -> Listing:
        async with self.turn:
            await self.again()
            return await self.now.read(prefix)

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        async with self.turn:
            await self.again()
            return await self.now.commit(change, lease)

    def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        self.keep = True
        return self.now.watch(prefix, start, end=end)

    async def trouble(self) -> str:
        return await self.now.trouble()

    async def lease(self, ttl: float) -> Lease:
        self.keep = True
        return await self.now.lease(ttl)


@asynccontextmanager
async def sqlite(directory: Path, _: Clusters) -> AsyncIterator[Doors]:
    """Open the embedded store."""
    store = SqliteStore(directory / "store.db")
    await store.open()
    try:
        yield Doors(store, store, lambda: forget(store))
    finally:
        await store.close()


@asynccontextmanager
async def reopened(directory: Path, _: Clusters) -> AsyncIterator[Doors]:
    """Open the embedded store, anew for each call."""
    store = Reopening(directory / "store.db")
    await store.open()
    try:
        yield Doors(store, store, lambda: forget(store.now))
    finally:
        await store.close()


async def forget(store: SqliteStore) -> None:
    """Make the embedded store forget its history up to now."""
    newest = (await store.read("")).revision
    await store.call("write", lambda: store._compact(newest))


@asynccontextmanager
async def etcd(cluster: Cluster) -> AsyncIterator[Doors]:
    """Open an empty prefix of a cluster, by the first member and by the last."""
    prefix = f"/test/{secrets.token_hex(4)}/"
    first, last = cluster.servers[0], cluster.servers[-1]
    store = EtcdStore(cluster.options(first, prefix=prefix))
    other = EtcdStore(cluster.options(last, prefix=prefix))
    await store.open()
    await other.open()

    async def compact() -> None:
        cluster.compact()

    try:
        yield Doors(store, other, compact)
    finally:
        await store.close()
        # A lease that runs out later must move no revision in another test.
        await other.commit(Change(deletes=frozenset((await other.read("")).items)))
        await other.close()


@asynccontextmanager
async def etcd_1(_: Path, clusters: Clusters) -> AsyncIterator[Doors]:
    """Open etcd of one member."""
    async with etcd(clusters(1)) as doors:
        yield doors


@asynccontextmanager
async def etcd_3(_: Path, clusters: Clusters) -> AsyncIterator[Doors]:
    """Open etcd of three members."""
    async with etcd(clusters(3)) as doors:
        yield doors


BACKENDS = {
    "sqlite": sqlite,
    "sqlite-reopened": reopened,
    "etcd-1": etcd_1,
    "etcd-3": etcd_3,
}


@pytest.fixture(scope="module")
def clusters(tmp_path_factory) -> Iterator[Clusters]:
    """Start a cluster when it is first asked for, and keep it for all tests."""
    started: dict[int, Cluster] = {}
    with ExitStack() as stack:

        def cluster(count: int) -> Cluster:
            if count not in started:
                directory = tmp_path_factory.mktemp(f"etcd-{count}")
                running = etcd_server.running(directory, count)
                started[count] = stack.enter_context(running)
            return started[count]

        yield cluster


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Return what a backend needs."""
    return (pytest.mark.etcd,) if name.startswith("etcd") else ()


@pytest.fixture(
    params=[pytest.param(b, id=n, marks=marks(n)) for n, b in BACKENDS.items()]
)
async def doors(request, tmp_path, clusters) -> AsyncIterator[Doors]:
    """Open each backend in turn, empty."""
    async with request.param(tmp_path, clusters) as opened:
        yield opened


@pytest.fixture
def store(doors: Doors) -> Store:
    """Return the first door."""
    return doors.store


async def put(store: Store, **values: str) -> int:
    """Write some keys without looking."""
    return await store.commit(Change(puts={k: v.encode() for k, v in values.items()}))


async def values(store: Store, prefix: str = "") -> dict[str, bytes]:
    """Read keys and their values."""
    return {k: i.value for k, i in (await store.read(prefix)).items.items()}


async def take(
    watch: AsyncIterator[tuple[Event, ...]], count: int
) -> list[tuple[Event, ...]]:
    """Wait for that many batches."""
    async with asyncio.timeout(5):
        return [await anext(watch) for _ in range(count)]


# Reading and writing.


async def test_an_empty_store_has_nothing(store):
    """An empty store lists nothing, at a revision that is a number."""
    assert (await store.read("")).items == {}
    assert (await store.read("a/")).revision >= 0


async def test_what_was_written_is_read(store):
    """A committed value is read back, with the revision the commit returned."""
    revision = await put(store, a="1")
    listing = await store.read("")
    assert listing.items == {"a": Item(value=b"1", revision=revision)}
    assert listing.revision == revision


async def test_values_are_any_bytes(store):
    """Values are bytes: empty ones and every byte come back as they were."""
    every = bytes(range(256))
    await store.commit(Change(puts={"all": every, "none": b""}))
    assert await values(store) == {"all": every, "none": b""}


async def test_keys_are_any_text(store):
    """Keys may have slashes, colons, percent signs and characters beyond ASCII."""
    keys = ["a/b:c/10.0.0.0/8/10.0.0.1", "a/%_*?[x]", "a/grün", "a/🐍"]
    await store.commit(Change(puts=dict.fromkeys(keys, b"x")))
    assert sorted(await values(store, "a/")) == sorted(keys)


async def test_a_prefix_is_literal(store):
    """Only keys that start with the prefix are listed, letter for letter."""
    keys = ["a/1", "a/2", "ab/1", "A/1", "a", "b/1", "a_/1", "a%/1"]
    await store.commit(Change(puts=dict.fromkeys(keys, b"x")))
    assert sorted(await values(store, "a/")) == ["a/1", "a/2"]
    assert sorted(await values(store, "a%")) == ["a%/1"]
    assert sorted(await values(store, "a_")) == ["a_/1"]


async def test_a_write_replaces(store):
    """A second write of a key replaces the value and moves the revision on."""
    first = await put(store, a="1")
    second = await put(store, a="2")
    assert second > first
    assert (await store.read("")).items == {"a": Item(value=b"2", revision=second)}


async def test_other_keys_keep_their_revision(store):
    """A write moves no other key's revision."""
    first = await put(store, a="1")
    await put(store, b="1")
    assert (await store.read("")).items["a"].revision == first


async def test_revisions_only_grow(store):
    """Every writing commit has a greater revision than all before it."""
    revisions = []
    for turn in range(5):
        revisions.append(await put(store, a=str(turn)))
        revisions.append(await store.commit(Change(deletes=frozenset({"a"}))))
    assert revisions == sorted(set(revisions))
    assert (await store.read("")).revision >= revisions[-1]


async def test_deletes_remove(store):
    """A deleted key is gone, others stay."""
    await put(store, a="1", b="2")
    await store.commit(Change(deletes=frozenset({"a"})))
    assert await values(store) == {"b": b"2"}


async def test_deleting_what_is_not_there_is_fine(store):
    """Deletes of absent keys succeed, alone and beside others."""
    await put(store, a="1")
    await store.commit(Change(deletes=frozenset({"nothing"})))
    await store.commit(Change(deletes=frozenset({"nothing", "a"})))
    assert await values(store) == {}


async def test_one_commit_puts_and_deletes(store):
    """Puts and deletes of one commit come together, at one revision."""
    await put(store, a="1")
    revision = await store.commit(
        Change(puts={"b": b"2", "c": b"3"}, deletes=frozenset({"a"}))
    )
    assert (await store.read("")).items == {
        "b": Item(value=b"2", revision=revision),
        "c": Item(value=b"3", revision=revision),
    }


async def test_a_write_of_the_same_value_counts(store):
    """Writing the value that is there already moves the key's revision on."""
    first = await put(store, a="1")
    second = await put(store, a="1")
    assert second > first
    assert (await store.read("")).items["a"].revision == second


async def test_deleting_wins(store):
    """A key that one commit puts and deletes is gone."""
    await put(store, a="1")
    await store.commit(Change(puts={"a": b"2"}, deletes=frozenset({"a"})))
    assert await values(store) == {}


async def test_five_hundred_deletes(store):
    """One commit deletes more keys than fit into a transaction of any store."""
    keys = [f"addresses/{number:03}" for number in range(500)]
    for at in range(0, 500, 100):
        await store.commit(Change(puts=dict.fromkeys(keys[at : at + 100], b"x")))
    seen = await put(store, pool="1")
    revision = await store.commit(
        Change(
            expect={"pool": seen},
            puts={"pool": b"2"},
            deletes=frozenset([*keys, "nothing"]),
        )
    )
    assert (await store.read("")).items == {"pool": Item(value=b"2", revision=revision)}


async def test_five_hundred_deletes_can_lose(store):
    """If their expectation fails, none of many deletes is made."""
    keys = [f"addresses/{number:03}" for number in range(200)]
    for at in range(0, 200, 100):
        await store.commit(Change(puts=dict.fromkeys(keys[at : at + 100], b"x")))
    with pytest.raises(RaceLostError):
        await store.commit(Change(expect={"pool": 7}, deletes=frozenset(keys)))
    assert sorted(await values(store)) == keys


# Expectations.


async def test_expecting_an_absent_key(store):
    """Revision 0 expects a key to be absent: the first creates, the second loses."""
    change = Change(expect={"a": 0}, puts={"a": b"1"})
    revision = await store.commit(change)
    with pytest.raises(RaceLostError) as lost:
        await store.commit(Change(expect={"a": 0}, puts={"a": b"2"}))
    assert lost.value.current == {"a": Item(value=b"1", revision=revision)}
    assert await values(store) == {"a": b"1"}


async def test_expecting_a_present_key(store):
    """The revision a key was seen at lets its next write through."""
    seen = await put(store, a="1")
    await store.commit(Change(expect={"a": seen}, puts={"a": b"2"}))
    assert await values(store) == {"a": b"2"}


async def test_a_stale_expectation_loses(store):
    """A key that moved on refuses, and the refusal tells how it is now."""
    seen = await put(store, a="1", b="1")
    newer = await put(store, a="2")
    with pytest.raises(RaceLostError) as lost:
        await store.commit(
            Change(expect={"a": seen, "b": seen, "c": 0}, puts={"b": b"2"})
        )
    assert lost.value.current == {
        "a": Item(value=b"2", revision=newer),
        "b": Item(value=b"1", revision=seen),
        "c": None,
    }
    assert lost.value.revision >= newer


async def test_a_deleted_key_refuses_its_old_revision(store):
    """Who saw a key that was deleted since loses; the refusal says it is gone."""
    seen = await put(store, a="1")
    gone = await store.commit(Change(deletes=frozenset({"a"})))
    with pytest.raises(RaceLostError) as lost:
        await store.commit(Change(expect={"a": seen}, puts={"a": b"2"}))
    assert lost.value.current == {"a": None}
    assert lost.value.revision >= gone


async def test_a_key_made_again_is_another(store):
    """Deleting and creating a key does not bring its old revision back."""
    seen = await put(store, a="1")
    await store.commit(Change(deletes=frozenset({"a"})))
    await put(store, a="1")
    with pytest.raises(RaceLostError):
        await store.commit(Change(expect={"a": seen}, puts={"a": b"2"}))


async def test_expectations_guard_deletes(store):
    """A commit of deletes can expect too, and deletes nothing if it loses."""
    seen = await put(store, a="1")
    await put(store, a="2")
    with pytest.raises(RaceLostError):
        await store.commit(Change(expect={"a": seen}, deletes=frozenset({"a"})))
    assert await values(store) == {"a": b"2"}


async def test_a_commit_may_only_expect(store):
    """A commit without a write tells whether its expectations hold, and the revision."""
    seen = await put(store, a="1")
    revision = await put(store, b="1")
    assert await store.commit(Change(expect={"a": seen, "c": 0})) == revision
    with pytest.raises(RaceLostError):
        await store.commit(Change(expect={"a": seen, "c": 1}))
    assert (await store.read("")).revision == revision


async def test_expected_keys_need_not_be_written(store):
    """A commit may expect keys that it does not change."""
    seen = await put(store, guard="1")
    await store.commit(Change(expect={"guard": seen}, puts={"a": b"1"}))
    assert (await store.read("guard")).items["guard"].revision == seen


async def test_all_or_nothing(store):
    """If one of many expectations fails, none of the changes is made."""
    await put(store, old="1")
    before = await store.read("")
    with pytest.raises(RaceLostError):
        await store.commit(
            Change(
                expect={"old": before.items["old"].revision + 1, "new": 0},
                puts={"new": b"1", "third": b"1"},
                deletes=frozenset({"old"}),
            )
        )
    assert await store.read("") == before


async def test_a_lost_race_is_a_store_error(store):
    """Who does not know of races sees a StoreError whose text is a sentence."""
    await put(store, a="1")
    with pytest.raises(StoreError, match="somebody else changed the same record"):
        await store.commit(Change(expect={"a": 0}, puts={"a": b"2"}))


async def test_a_thousand_keys(store):
    """One commit writes a thousand keys, and one reading has them all."""
    puts = {f"addresses/{number:04}": str(number).encode() for number in range(1000)}
    first = {k: v for k, v in puts.items() if k < "addresses/0100"}
    rest = [list(puts.items())[at : at + 100] for at in range(100, 1000, 100)]
    await store.commit(Change(puts=first))
    for part in rest:
        await store.commit(Change(puts=dict(part)))
    assert await values(store, "addresses/") == puts
    assert len(await values(store, "addresses/09")) == 100


async def test_a_hundred_racers(store):
    """Of a hundred who expect the same, exactly one wins, round after round."""
    seen = 0
    for _ in range(5):
        outcomes = await asyncio.gather(
            *(
                store.commit(
                    Change(expect={"a": seen}, puts={"a": str(racer).encode()})
                )
                for racer in range(100)
            ),
            return_exceptions=True,
        )
        winners = [(n, o) for n, o in enumerate(outcomes) if isinstance(o, int)]
        losers = [o for o in outcomes if isinstance(o, RaceLostError)]
        assert (len(winners), len(losers)) == (1, 99)
        ((racer, seen),) = winners
        item = (await store.read("a")).items["a"]
        assert item == Item(value=str(racer).encode(), revision=seen)


async def test_counting_loses_nothing(doors):
    """Many who read, add one and write with an expectation count to their number."""
    await put(doors.store, n="0")
    doors.store.keep = True  # one connection: what is tested is the counting

    async def add(store: Store) -> None:
        while True:
            item = (await store.read("n")).items["n"]
            number = str(int(item.value) + 1).encode()
            try:
                await store.commit(
                    Change(expect={"n": item.revision}, puts={"n": number})
                )
            except RaceLostError:
                continue
            return

    await asyncio.gather(*(add(d) for d in (doors.store, doors.other) * 10))
    assert await values(doors.store) == {"n": b"20"}


# Watches.


async def test_a_watch_begins_where_it_is_told(store):
    """A watch yields everything from its revision on, older writes not."""
    # What was written before it was opened, the embedded store may have forgotten.
    store.keep = True
    await put(store, a="1")
    start = await put(store, a="2") + 1
    await put(store, a="3")
    last = await put(store, a="4")
    watch = store.watch("", start)
    assert await take(watch, 2) == [
        (Event(key="a", value=b"3", revision=last - 1),),
        (Event(key="a", value=b"4", revision=last),),
    ]


async def test_a_commit_is_one_batch(store):
    """The events of one commit come together; a deletion has no value."""
    start = await put(store, a="1") + 1
    revision = await store.commit(
        Change(puts={"b": b"2", "c": b"3"}, deletes=frozenset({"a"}))
    )
    (batch,) = await take(store.watch("", start), 1)
    assert sorted(batch, key=lambda e: e.key) == [
        Event(key="a", value=None, revision=revision),
        Event(key="b", value=b"2", revision=revision),
        Event(key="c", value=b"3", revision=revision),
    ]


async def test_a_watch_sees_its_prefix_only(store):
    """Writes elsewhere neither appear nor disturb."""
    start = await put(store, first="1") + 1
    watch = store.watch("a/", start)
    await store.commit(Change(puts={"b/1": b"x"}))
    revision = await store.commit(Change(puts={"a/1": b"1", "b/2": b"x"}))
    assert await take(watch, 1) == [(Event(key="a/1", value=b"1", revision=revision),)]


async def test_a_watch_can_end_before_some_keys(store):
    """Keys from `end` on are left out of a watch, alone and in commits with others."""
    start = (await store.read("")).revision + 1
    everything, some = (
        store.watch("", start, end="w/"),
        store.watch("h/", start, end="i"),
    )
    await put(store, **{"w/1": "x"})
    first = await put(store, **{"h/1": "1", "w/1": "x", "z": "x", "v": "1"})
    second = await put(store, **{"h/2": "1"})
    batches = await take(everything, 2)
    assert [sorted(e.key for e in b) for b in batches] == [["h/1", "v"], ["h/2"]]
    assert [b[0].revision for b in await take(some, 2)] == [first, second]


async def test_batches_come_in_order(doors):
    """A watch that is open while others write has every commit once, in order."""
    start = (await doors.store.read("")).revision + 1
    watch = doors.store.watch("", start)
    waiting = asyncio.create_task(take(watch, 60))
    await asyncio.sleep(0)
    revisions = []
    for turn in range(30):
        for door in (doors.other, doors.store):
            revisions.append(await put(door, a=str(turn)))
    assert [batch[0].revision for batch in await waiting] == revisions


async def test_a_waiting_watch_is_woken(doors):
    """A watch with nothing to tell waits, and another's write wakes it at once."""
    start = await put(doors.store, a="1") + 1
    waiting = asyncio.create_task(take(doors.store.watch("", start), 1))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    revision = await put(doors.other, a="2")
    async with asyncio.timeout(1):
        assert await waiting == [(Event(key="a", value=b"2", revision=revision),)]


async def test_many_watches_see_the_same(doors):
    """Every one of several watches sees each write."""
    start = (await doors.store.read("")).revision + 1
    watches = [doors.store.watch("", start) for _ in range(5)]
    waiting = [asyncio.create_task(take(w, 3)) for w in watches]
    await asyncio.sleep(0)
    for turn in range(3):
        await put(doors.other, a=str(turn))
    for task in waiting:
        assert [b[0].value for b in await task] == [b"0", b"1", b"2"]


async def test_a_watch_of_the_future_waits(store):
    """A watch from a revision that is not yet leaves out what comes before it."""
    revision = await put(store, a="1")
    watch = store.watch("", revision + 3)
    waiting = asyncio.create_task(take(watch, 1))
    await asyncio.sleep(0.05)
    for text in ("2", "3", "4"):
        revision = await put(store, a=text)
    assert await waiting == [(Event(key="a", value=b"4", revision=revision),)]


async def test_a_watch_can_be_given_up(store):
    """A watch that is cancelled while it waits harms no other call."""
    start = await put(store, a="1") + 1
    waiting = asyncio.create_task(take(store.watch("", start), 1))
    await asyncio.sleep(0.05)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    await put(store, a="2")
    assert await values(store) == {"a": b"2"}


async def test_forgotten_history_is_said(doors):
    """A watch from a forgotten revision ends with CompactedError; a newer one runs."""
    first = await put(doors.store, a="1")
    last = await put(doors.store, a="2")
    await doors.compact()
    with pytest.raises(CompactedError):
        await take(doors.store.watch("", first), 1)
    watch = doors.store.watch("", last + 1)
    newest = await put(doors.store, a="3")
    assert await take(watch, 1) == [(Event(key="a", value=b"3", revision=newest),)]
    assert await values(doors.store) == {"a": b"3"}


async def test_closing_ends_watches(store):
    """When the store is closed, a watch that waits ends; it does not hang."""
    start = await put(store, a="1") + 1

    async def follow() -> list[Event]:
        try:
            return [event async for batch in store.watch("", start) for event in batch]
        except StoreError:
            return []

    waiting = asyncio.create_task(follow())
    await asyncio.sleep(0.05)
    await store.close()
    async with asyncio.timeout(1):
        assert await waiting == []


async def test_a_closed_store_refuses(store):
    """After its end every call says so with a StoreError."""
    store.keep = True
    await store.close()
    with pytest.raises(StoreError):
        await store.read("")
    with pytest.raises(StoreError):
        await store.commit(Change(puts={"a": b"1"}))


# Leases.


async def test_a_lease_that_runs_out_takes_its_keys(store):
    """Without being kept a lease ends after its time, and its keys with it."""
    lease = await store.lease(1)
    start = await put(store, stays="1") + 1
    await store.commit(Change(puts={"alive": b"1"}), lease)
    assert await values(store) == {"alive": b"1", "stays": b"1"}
    made, ended = await take(store.watch("alive", start), 2)
    assert [e.value for e in (*made, *ended)] == [b"1", None]
    assert await values(store) == {"stays": b"1"}


async def test_a_kept_lease_stays(store):
    """A lease that is kept outlives its time."""
    lease = await store.lease(1)
    await store.commit(Change(puts={"alive": b"1"}), lease)
    for _ in range(4):
        await asyncio.sleep(0.4)
        await lease.keep()
    assert await values(store) == {"alive": b"1"}


async def test_a_revoked_lease_ends_at_once(store):
    """Revoking deletes the keys now; twice is fine."""
    lease = await store.lease(60)
    await store.commit(Change(puts={"alive": b"1", "too": b"1"}), lease)
    await lease.revoke()
    assert await values(store) == {}
    await lease.revoke()


async def test_a_lease_that_is_over_cannot_be_used(store):
    """Keeping a lease that is over, or writing under it, is refused."""
    lease = await store.lease(60)
    await lease.revoke()
    with pytest.raises(StoreError):
        await lease.keep()
    with pytest.raises(StoreError):
        await store.commit(Change(puts={"alive": b"1"}), lease)
    assert await values(store) == {}


async def test_a_key_leaves_its_lease_with_its_next_write(store):
    """A key that is written again without the lease no longer ends with it."""
    lease = await store.lease(60)
    await store.commit(Change(puts={"a": b"1", "b": b"1"}), lease)
    await put(store, a="2")
    await lease.revoke()
    assert await values(store) == {"a": b"2"}


async def test_leases_are_apart(store):
    """The end of one lease takes nothing of another's."""
    one, two = await store.lease(60), await store.lease(60)
    await store.commit(Change(puts={"one": b"1"}), one)
    await store.commit(Change(puts={"two": b"1"}), two)
    await one.revoke()
    assert await values(store) == {"two": b"1"}
