"""The state: races, the outbox while the store is away, and following others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

import pytest
import structlog

from cnmdriver.errors import Conflict, StoreError
from cnmdriver.model import Cluster, Host, Member, Network, Reservation, Watermark
from cnmdriver.store import records, state
from cnmdriver.store.base import Change, Event, Item, Lease, Listing, RewoundError
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State
from cnmdriver.store.view import Draft, Word
from tests.store.doors import Moody

NET = ip_network("10.1.0.0/24")
IP = ip_address("10.1.0.2")
ADDRESS = records.address("s", NET, IP)
RESERVED = Reservation(space="s", cidr=NET, ip=IP, host="h")
MEMBER = Member(network="n", host="h", claims=("one",))


@dataclass
class Seat:
    """One host's state, with its doors."""

    state: State
    store: Moody
    local: LocalDatabase
    wakes: list[None] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    async def items(self) -> dict[str, Item]:
        """Read what is in the store, whatever the host can see of it."""
        return dict((await self.store.store.read("")).items)

    async def keys(self) -> list[str]:
        """Read the keys in the store but the cluster's."""
        return [k for k in await self.items() if k != records.CLUSTER]


@asynccontextmanager
async def seat(directory, store: SqliteStore, name: str) -> AsyncIterator[Seat]:
    """Open one host's state over a store."""
    local = LocalDatabase(directory / f"{name}.db")
    await local.open()
    wakes: list[None] = []
    steps: list[str] = []

    async def step(name: str) -> None:
        steps.append(name)

    moody = Moody(store)
    opened = State(moody, local, step, lambda: wakes.append(None))
    try:
        await opened.open()
        yield Seat(opened, moody, local, wakes, steps)
    finally:
        await local.close()


@pytest.fixture
async def store(tmp_path):
    """Open an embedded store."""
    opened = SqliteStore(tmp_path / "store.db")
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def one(tmp_path, store):
    """Open the first host's state."""
    async with seat(tmp_path, store, "one") as opened:
        yield opened


@pytest.fixture
async def two(tmp_path, store, one):
    """Open a second host's state over the same store."""
    async with seat(tmp_path, store, "two") as opened:
        yield opened


@pytest.fixture
def quick(monkeypatch):
    """Let little time pass before the store is tried again."""
    monkeypatch.setattr(state, "PAUSE", 0.01)


@asynccontextmanager
async def following(*seats: Seat) -> AsyncIterator[None]:
    """Follow the store meanwhile."""
    tasks = [asyncio.create_task(s.state.follow()) for s in seats]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)


async def until(condition) -> None:
    """Wait for something that others bring about."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def putting(key: str, record: object):
    """Return a decision that puts one record."""

    def decide(draft: Draft) -> None:
        draft.put(key, record)

    return decide


def deleting(*keys: str):
    """Return a decision that deletes keys."""

    def decide(draft: Draft) -> None:
        for key in keys:
            draft.delete(key)

    return decide


def host(name: str, version: str = "1") -> Host:
    """Make a record."""
    return Host(id=name, name=name, version=version)


# Opening and committing.


async def test_opening_makes_the_cluster(one, two):
    """The first to open an empty store gives it an id; all others find it."""
    found = one.state.view.get(Cluster, "cluster")
    assert found is not None
    assert found.schema == records.SCHEMA
    assert two.state.view.get(Cluster, "cluster") == found
    assert two.store.commits == []


async def test_a_commit_is_seen_at_once(one):
    """What was committed is in the store and in the view, and steps were announced."""
    one.steps.clear()
    assert await one.state.commit(putting("hosts/h", host("h"))) is None
    assert one.state.view.get(Host, "hosts/h") == host("h")
    assert await one.keys() == ["hosts/h"]
    assert one.steps == ["commit.before", "commit.after"]


async def test_a_decision_returns_what_it_found(one):
    """The caller gets what the decision returned; one that writes nothing is free."""
    before = len(one.store.commits)
    found = await one.state.commit(lambda draft: draft.get(Host, "hosts/none"))
    assert found is None
    assert await one.state.commit(lambda draft: 42) == 42
    assert len(one.store.commits) == before


async def test_a_decision_may_refuse(one):
    """What a decision raises reaches the caller, and nothing is written."""

    def decide(draft: Draft) -> None:
        draft.put("hosts/h", host("h"))
        raise Conflict("no")

    with pytest.raises(Conflict, match=r"^no$"):
        await one.state.commit(decide)
    assert await one.keys() == []
    assert one.state.view.get(Host, "hosts/h") is None


async def test_the_store_is_away(one):
    """A commit without the store fails, and the view stays as it was."""
    one.store.away = True
    with pytest.raises(StoreError, match="away"):
        await one.state.commit(putting("hosts/h", host("h")))
    assert one.state.view.get(Host, "hosts/h") is None


# Races.


async def test_a_lost_race_is_decided_again(one, two):
    """Who was slower decides again, on what the other wrote."""
    await one.state.commit(putting("hosts/h", host("h", "one")))
    seen = []

    def decide(draft: Draft) -> str:
        found = draft.get(Host, "hosts/h")
        seen.append(found and found.version)
        draft.put("hosts/h", host("h", "two"))
        return str(found and found.version)

    assert await two.state.commit(decide) == "one"
    assert seen == [None, "one"]
    assert two.state.view.get(Host, "hosts/h") == host("h", "two")


async def test_a_race_lost_to_a_deletion(one, two):
    """A record that another deleted is absent when it is decided again."""
    await one.state.commit(putting("hosts/h", host("h")))
    await two.state.relist()
    await one.state.commit(deleting("hosts/h"))
    found = []

    def decide(draft: Draft) -> None:
        found.append(draft.get(Host, "hosts/h"))
        draft.put("hosts/i", host("i"))

    await two.state.commit(decide)
    assert found == [host("h"), None]
    assert await two.keys() == ["hosts/i"]


async def test_a_race_brings_only_what_was_looked_at(one, two):
    """A loss tells of the keys the decision saw; the others come by the watch."""
    await one.state.commit(putting("hosts/a", host("a")))
    await one.state.commit(putting("hosts/b", host("b")))

    def decide(draft: Draft) -> None:
        draft.get(Host, "hosts/a")
        draft.put("hosts/c", host("c"))

    await two.state.commit(decide)
    assert two.state.view.get(Host, "hosts/a") == host("a")
    assert two.state.view.get(Host, "hosts/b") is None


async def test_the_second_decides_otherwise(one, two):
    """Of two who want the same, the second sees the first and refuses."""

    def decide(draft: Draft) -> None:
        if draft.get(Reservation, ADDRESS) is not None:
            raise Conflict("taken")
        draft.put(ADDRESS, RESERVED)

    outcomes = await asyncio.gather(
        one.state.commit(decide), two.state.commit(decide), return_exceptions=True
    )
    assert sorted(map(repr, outcomes)) == ["Conflict('taken')", "None"]


async def test_counting_loses_nothing(one, two):
    """Many who count in one record count to their number."""

    def add(draft: Draft) -> None:
        found = draft.get(Host, "hosts/n") or host("n", "0")
        draft.put("hosts/n", replace(found, version=str(int(found.version) + 1)))

    await asyncio.gather(*(s.state.commit(add) for s in (one, two) * 10))
    await one.state.relist()
    assert one.state.view.get(Host, "hosts/n") == host("n", "20")


@pytest.mark.parametrize("losses", [1, 49])
async def test_losing_is_not_the_end(one, losses):
    """A decision may lose forty-nine times and still be written."""
    one.store.losing = losses
    await one.state.commit(putting("hosts/h", host("h")))
    assert await one.keys() == ["hosts/h"]


async def test_losing_for_ever(one):
    """After fifty losses the caller is told, and nothing was written."""
    one.store.losing = 1000
    with pytest.raises(StoreError, match=r"^lost 50 races for the same record"):
        await one.state.commit(putting("hosts/h", host("h")))
    assert one.store.losing == 950
    assert await one.keys() == []


@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_cancel_counts_when_the_write_ended(one, cancels):
    """Who is cancelled while writing, even twice, finds in the view what was written."""
    begun, go = asyncio.Event(), asyncio.Event()
    commit = one.store.commit

    async def slow(change: Change, lease: Lease | None = None) -> int:
        begun.set()
        await go.wait()
        return await commit(change, lease)

    one.store.commit = slow
    task = asyncio.create_task(one.state.commit(putting("hosts/h", host("h"))))
    await begun.wait()
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.state.view.get(Host, "hosts/h") == host("h")
    assert await one.keys() == ["hosts/h"]


# Removing, with and without the store.


async def test_removing_with_the_store(one):
    """A removal with the store there is a commit; the outbox stays empty."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    await one.state.remove(deleting(ADDRESS))
    assert await one.keys() == []
    assert await one.local.pending() == []
    assert not one.state.behind


async def test_removing_without_the_store(one):
    """A removal succeeds without the store: the view has it, and the outbox."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.store.away = True
    assert await one.state.remove(lambda d: (d.delete(ADDRESS), "done")[1]) == "done"
    assert one.state.view.get(Reservation, ADDRESS) is None
    assert [change for _, change in await one.local.pending()] == [
        Change(deletes=frozenset({ADDRESS}))
    ]
    assert await one.keys() == [ADDRESS]


async def test_a_store_known_to_be_away_is_not_asked(one):
    """While the store is away a removal waits for nothing; its return writes it."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.state.note("no member answers")
    asked = len(one.store.commits), len(one.store.reads)
    await one.state.remove(deleting(ADDRESS))
    assert (len(one.store.commits), len(one.store.reads)) == asked
    assert one.state.view.get(Reservation, ADDRESS) is None
    await one.state.catch_up()
    assert one.state.away is None
    assert await one.keys() == []


async def test_only_own_records_are_deferred(one):
    """What hosts share is not written behind their backs; own records are."""
    network = Network(id="n", mode="bridge", subnets=(), mtu=1500)
    await one.state.commit(putting("networks/n", network))
    await one.state.commit(putting("members/n/h", MEMBER))
    one.store.away = True

    def decide(draft: Draft) -> None:
        draft.delete("networks/n")
        draft.delete("pools/s/10.1.0.0/24")
        draft.delete("endpoints/n/e")
        draft.put("spaces/s", records.Space(claims=1))
        draft.put("members/n/h", replace(MEMBER, claims=()))

    await one.state.remove(decide)
    assert [change for _, change in await one.local.pending()] == [
        Change(
            puts={"members/n/h": records.encode(replace(MEMBER, claims=()))},
            deletes=frozenset({"endpoints/n/e"}),
        )
    ]
    assert one.state.view.get(Network, "networks/n") == network
    assert one.state.view.get(Member, "members/n/h") == replace(MEMBER, claims=())


async def test_nothing_of_its_own_to_defer(one):
    """A removal that changes only what hosts share leaves nothing in the outbox."""
    one.store.away = True
    await one.state.remove(deleting("networks/n"))
    assert await one.local.pending() == []


async def test_a_removal_may_be_refused(one):
    """What a decision raises for another reason reaches the caller of a removal."""

    def decide(draft: Draft) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        await one.state.remove(decide)


async def test_the_outbox_is_replayed_in_order(one):
    """The next commit first writes what was deferred, as it was last."""
    await one.state.commit(putting("members/n/h", MEMBER))
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.store.away = True
    for claims in (("two",), ("three",)):
        wanted = replace(MEMBER, claims=claims)
        await one.state.remove(putting("members/n/h", wanted))
    await one.state.remove(deleting(ADDRESS))
    one.store.away = False
    one.store.commits.clear()
    await one.state.commit(putting("hosts/h", host("h")))
    first, second = one.store.commits
    assert first.deletes == {ADDRESS}
    assert {k: records.decode(k, v) for k, v in first.puts.items()} == {
        "members/n/h": replace(MEMBER, claims=("three",))
    }
    assert sorted(second.written()) == ["hosts/h"]
    assert await one.local.pending() == []
    assert sorted(await one.keys()) == ["hosts/h", "members/n/h"]
    found = one.state.view.get(Member, "members/n/h")
    assert found == replace(MEMBER, claims=("three",))
    await one.state.relist()
    assert one.state.view.get(Member, "members/n/h") == found


async def test_a_replay_that_breaks_off(one):
    """What was not yet all written when the store went again stays in the outbox."""
    one.store.away = True
    names = [f"{number:03}" for number in range(state.BATCH + 1)]
    for name in names:
        await one.state.remove(putting(f"members/n/{name}", MEMBER))
    one.store.away = False
    commit = one.store.commit

    async def once(change: Change, lease: Lease | None = None) -> int:
        revision = await commit(change, lease)
        one.store.away = True
        return revision

    one.store.commit = once
    with pytest.raises(StoreError):
        await one.state.replay()
    assert one.state.behind
    assert len(await one.local.pending()) == len(names)
    one.store.away = False
    one.store.commit = commit
    await one.state.replay()
    assert not one.state.behind
    assert await one.keys() == [f"members/n/{name}" for name in names]
    assert await one.local.pending() == []


async def test_the_outbox_outlives_the_process(tmp_path, store):
    """What was deferred before the end is written when the state is opened again."""
    async with seat(tmp_path, store, "one") as one:
        await one.state.commit(putting(ADDRESS, RESERVED))
        one.store.away = True
        await one.state.remove(deleting(ADDRESS))
    async with seat(tmp_path, store, "one") as one:
        assert await one.keys() == []
        assert one.state.view.get(Reservation, ADDRESS) is None
        assert await one.local.pending() == []


async def test_a_deferred_deletion_and_a_new_record(one):
    """What is deleted and put again while the store is away shows in the view."""
    await one.state.commit(putting("members/n/h", MEMBER))
    one.store.away = True
    await one.state.remove(deleting("members/n/h"))
    wanted = replace(MEMBER, claims=("new",))
    await one.state.remove(putting("members/n/h", wanted))
    assert one.state.view.get(Member, "members/n/h") == wanted
    one.store.away = False
    await one.state.commit(putting("hosts/h", host("h")))
    await one.state.relist()
    assert one.state.view.get(Member, "members/n/h") == wanted


async def test_an_old_listing_does_not_undo_a_removal(one):
    """A listing from before the replay does not bring back what was removed."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    listing = await one.store.read("")
    one.store.away = True
    await one.state.remove(deleting(ADDRESS))
    one.state.view.replace(listing.items.items(), listing.revision)
    assert one.state.view.get(Reservation, ADDRESS) is None


async def test_neither_store_nor_disk(one):
    """A removal succeeds even if the outbox cannot be written, and is made later."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    remember = one.local.remember

    async def full(change: Change) -> int:
        raise StoreError("the disk is full")

    one.store.away = True
    one.local.remember = full
    await one.state.remove(deleting(ADDRESS))
    assert one.state.view.get(Reservation, ADDRESS) is None
    one.store.away = False
    one.local.remember = remember
    await one.state.commit(putting(ADDRESS, replace(RESERVED, name="next")))
    found = one.state.view.get(Reservation, ADDRESS)
    assert found == replace(RESERVED, name="next")
    assert await one.keys() == [ADDRESS]
    assert await one.local.pending() == []


async def test_a_removal_during_a_replay(one):
    """What is deferred while the outbox is emptied is replayed before the next write."""
    pending = one.local.pending

    async def looked() -> list[tuple[int, Change]]:
        """Let the store go away right after a look that found nothing."""
        found = await pending()
        one.local.pending = pending
        one.store.away = True
        deferring.append(asyncio.create_task(one.state.remove(deleting(ADDRESS))))
        while not one.state.unsaved:
            await asyncio.sleep(0)
        return found

    deferring: list[asyncio.Task[None]] = []
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.local.pending = looked
    one.state.behind = True
    with pytest.raises(StoreError):
        await one.state.replay()
    await deferring[0]
    assert one.state.behind
    one.store.away = False
    await one.state.commit(putting(ADDRESS, replace(RESERVED, name="next")))
    assert await one.local.pending() == []
    await one.state.relist()
    found = one.state.view.get(Reservation, ADDRESS)
    assert found == replace(RESERVED, name="next")


async def test_an_entry_made_during_a_replay(one):
    """What is remembered after the look at an empty outbox is written all the same."""
    pending = one.local.pending

    async def looked() -> list[tuple[int, Change]]:
        found = await pending()
        one.local.pending = pending
        change = Change(puts={"members/n/h": records.encode(MEMBER)})
        deferring.append(asyncio.create_task(one.state.defer(change, must=True)))
        await asyncio.sleep(0.05)
        return found

    deferring: list[asyncio.Task[None]] = []
    one.local.pending = looked
    one.state.behind = True
    await one.state.replay()
    await deferring[0]
    await one.state.remove(deleting("members/n/h"))
    await one.state.catch_up()
    assert await one.keys() == []
    assert one.state.view.get(Member, "members/n/h") is None
    assert await one.local.pending() == []


async def test_a_word_that_comes_during_the_replay(one):
    """What is deferred while an older word is being written is the last word."""
    one.store.away = True
    await one.state.remove(putting("members/n/h", MEMBER))
    one.store.away = False
    commit = one.store.commit

    async def once(change: Change, lease: Lease | None = None) -> int:
        one.store.commit = commit
        revision = await commit(change, lease)
        await one.state.defer(Change(deletes=frozenset({"members/n/h"})))
        return revision

    one.store.commit = once
    await one.state.replay()
    assert await one.keys() == []
    assert one.state.view.get(Member, "members/n/h") is None
    assert await one.local.pending() == []
    assert not one.state.behind


async def test_a_key_written_often_is_heard_of_again(one, two):
    """However often a key was written without the store, its news counts afterwards."""
    one.store.away = True
    for number in range(10):
        named = replace(RESERVED, name=str(number))
        await one.state.remove(putting(ADDRESS, named))
    assert one.state.view.get(Reservation, ADDRESS) == named
    one.store.away = False
    await one.state.catch_up()
    assert (await one.items())[ADDRESS].revision == one.state.view.seen(ADDRESS)
    await two.state.relist()
    await two.state.commit(deleting(ADDRESS))
    await one.state.relist()
    assert one.state.view.get(Reservation, ADDRESS) is None


async def test_the_last_word_stands_until_the_store_has_it(one, two):
    """Whatever others write meanwhile, the view has what this host will write."""
    await one.state.commit(putting("members/n/h", MEMBER))
    await two.state.relist()
    wanted = replace(MEMBER, claims=("mine",))
    one.store.away = True
    await one.state.remove(putting("members/n/h", wanted))
    one.store.away = False
    await two.state.commit(deleting("members/n/h"))
    await one.state.relist()
    assert one.state.view.get(Member, "members/n/h") == wanted
    await one.state.replay()
    await one.state.relist()
    assert one.state.view.get(Member, "members/n/h") == wanted
    assert await one.keys() == ["members/n/h"]


async def test_an_outbox_that_cannot_be_emptied(one):
    """What the disk does not forget is not written a second time over newer records."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.store.away = True
    await one.state.remove(deleting(ADDRESS))
    one.store.away = False
    done = one.local.done

    async def refused(number: int) -> None:
        one.local.done = done
        raise StoreError("the disk is full")

    one.local.done = refused
    with pytest.raises(StoreError, match="disk"):
        await one.state.replay()
    assert one.state.behind
    one.store.commits.clear()
    await one.state.commit(putting(ADDRESS, replace(RESERVED, name="next")))
    assert [sorted(c.deletes) for c in one.store.commits] == [[]]
    assert await one.keys() == [ADDRESS]
    assert await one.local.pending() == []


async def test_a_deferral_that_is_cancelled(one):
    """Who is cancelled while the outbox is written finds in the view what may be there."""
    remember, begun = one.local.remember, asyncio.Event()

    async def slow(change: Change, *, taking: bool) -> int:
        number = await remember(change, taking=taking)
        begun.set()
        await asyncio.sleep(60)
        return number

    one.local.remember = slow
    change = Change(puts={"members/n/h": records.encode(MEMBER)})
    task = asyncio.create_task(one.state.defer(change, must=True))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    one.local.remember = remember
    assert one.state.view.get(Member, "members/n/h") == MEMBER
    await one.state.remove(deleting("members/n/h"))
    assert await one.keys() == []
    assert await one.local.pending() == []


async def test_a_snapshot_that_is_cancelled(one):
    """What a cancelled writing of the snapshot was to write, the next one writes."""
    keep, kept = one.local.keep, []

    async def noted(changed, *rest):
        kept.append(set(changed))
        return await keep(changed, *rest)

    async def stuck(*_):
        await asyncio.sleep(60)

    one.store.shared = True
    one.local.keep = stuck
    one.state.view.write(ADDRESS, records.encode(RESERVED), 7)
    task = asyncio.create_task(one.state.keep())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    one.local.keep = noted
    assert one.state.unkept.is_set()
    await one.state.keep()
    assert ADDRESS in set().union(*kept)


async def test_a_snapshot_that_is_refused(one, quick):
    """What the disk refused is written when it takes writes, without further news."""
    keep, refusals = one.local.keep, [1]

    async def refused(changed, *rest):
        if refusals:
            refusals.pop()
            raise StoreError("the disk is full")
        return await keep(changed, *rest)

    one.store.shared = True
    one.local.keep = refused
    one.state.view.write(ADDRESS, records.encode(RESERVED), 7)
    await one.state.keep()
    task = asyncio.create_task(one.state.remember())
    async with asyncio.timeout(5):
        while ADDRESS not in (await one.local.snapshot()).items:
            await asyncio.sleep(0.01)
    task.cancel()


async def test_a_store_that_is_back_under_load(one, quick):
    """A store is back although something is put off during each of its replays."""
    keep = one.state.keep

    async def another() -> None:
        await keep()
        if one.state.away is not None:
            await one.state.defer(Change(deletes=frozenset({ADDRESS})))

    one.state.keep = another
    one.state.note("it is away")
    await one.state.defer(Change(puts={"members/n/h": records.encode(MEMBER)}))
    async with following(one):
        await until(lambda: one.state.away is None)
        await until(lambda: not one.state.behind)


async def test_a_deferral_that_lasts_longer_than_the_absence(one):
    """What goes to the outbox as the store is back already is written at once."""
    async with following(one):
        await until(lambda: one.store.starts)
        change = Change(puts={"members/n/h": records.encode(MEMBER)})
        await one.state.defer(change, must=True)
        assert one.state.away is None
        await until(lambda: not one.state.behind)
    assert await one.keys() == ["members/n/h"]
    assert await one.local.pending() == []


def test_endpoints_go_first_and_come_last():
    """Of many words, endpoints that go are told first, and those that come last."""
    ahead = {f"endpoints/n/new{n}": Word(b"x") for n in range(state.BATCH)}
    ahead |= {f"addresses/s/{n}": Word(b"x") for n in range(state.BATCH)}
    ahead |= {f"endpoints/n/old{n}": Word(None) for n in range(state.BATCH)}
    gone, others, come = state.parts(ahead)
    assert {key[:15] for key in gone} == {"endpoints/n/old"}
    assert {key[:10] for key in others} == {"addresses/"}
    assert {key[:15] for key in come} == {"endpoints/n/new"}


async def test_what_is_removed_does_not_come_back(one):
    """When a removal is over, so is it in the snapshot that a killed daemon leaves."""
    one.store.shared = True
    await one.state.commit(putting("members/n/h", MEMBER))
    await one.state.keep()
    assert "members/n/h" in (await one.local.snapshot()).items
    await one.state.commit(deleting("members/n/h"))
    assert "members/n/h" not in (await one.local.snapshot()).items


async def test_what_was_kept_is_not_written_again(one, monkeypatch):
    """After a restart only what has changed since is written to the snapshot."""
    one.store.shared = True
    await one.state.commit(putting("members/n/h", MEMBER))
    await one.state.keep()

    async def step(_: str) -> None:
        pass

    again, kept, keep = State(one.store, one.local, step, list), [], one.local.keep

    async def noted(changed, *rest):
        kept.append(set(changed))
        await keep(changed, *rest)

    monkeypatch.setattr(one.local, "keep", noted)
    await again.load()
    assert again.view.get(Member, "members/n/h") == MEMBER
    await again.keep()
    await one.state.commit(putting("hosts/h", host("h")))
    await again.relist()
    await again.keep()
    assert kept == [set(), {"hosts/h"}]


async def test_a_deferred_removal_is_logged(one):
    """A removal that had to wait is told once, with its keys and why."""
    one.store.away = True
    with structlog.testing.capture_logs() as logs:
        await one.state.remove(deleting(ADDRESS))
    assert logs == [
        {
            "event": "store.deferred",
            "log_level": "warning",
            "keys": [ADDRESS],
            "error": "the store is away",
        }
    ]


# Following.


async def test_others_are_followed(one, two):
    """What another host writes comes by the watch, and wakes; own writes do not."""
    async with following(one, two):
        await until(lambda: one.store.starts and two.store.starts)
        await asyncio.sleep(0.05)
        await one.state.commit(putting("hosts/h", host("h")))
        await until(lambda: two.state.view.get(Host, "hosts/h") == host("h"))
        await until(lambda: two.wakes)
        await asyncio.sleep(0.05)
        assert one.wakes == []


async def test_nothing_is_missed_between_listing_and_watch(one, two):
    """What others wrote before an own write comes too, as the watch begins before it."""
    await one.state.relist()
    listed = one.state.view.listed
    await two.state.commit(putting("hosts/c", host("c")))
    await one.state.commit(putting("hosts/d", host("d")))
    watching = asyncio.create_task(one.state.watch())
    await until(lambda: one.state.view.get(Host, "hosts/c") == host("c"))
    assert one.store.starts == [listed + 1]
    watching.cancel()
    await asyncio.wait([watching])


async def test_a_lost_watch(one, two, quick):
    """When the watch is lost, everything is read anew, and watched again."""
    one.store.broken = StoreError("connection lost")
    await two.state.commit(putting("hosts/h", host("h")))
    with structlog.testing.capture_logs() as logs:
        async with following(one):
            await until(lambda: len(one.store.starts) == 2)
            assert one.state.view.get(Host, "hosts/h") == host("h")
            assert one.state.away is None
            assert one.wakes == [None]
            await two.state.commit(putting("hosts/i", host("i")))
            await until(lambda: one.state.view.get(Host, "hosts/i"))
    assert [entry["event"] for entry in logs] == ["store.away", "store.back"]


async def test_a_store_that_was_suspected_in_vain(one):
    """Whoever takes the store for away has it asked at once, and so it is back."""
    reason = StoreError("the store has been away since 1: a; try again")
    reason.__cause__ = StoreError("a")
    with structlog.testing.capture_logs() as logs:
        async with following(one):
            await until(lambda: one.store.starts)
            assert one.state.suspect(reason) == "a"
            assert one.state.away == "a"
            await until(lambda: one.state.away is None)
    assert [entry["event"] for entry in logs] == ["store.away", "store.back"]


async def test_compacted_history(one, two, quick):
    """A watch whose start the store has forgotten begins anew after a whole reading."""
    read, store = one.store.read, one.store.store

    async def overtaken(prefix: str) -> Listing:
        """Answer what is forgotten before the watch begins."""
        listing = await read(prefix)
        one.store.read = read
        await two.state.commit(putting("hosts/h", host("h")))
        newest = (await read("")).revision
        await store.call("write", lambda: store._compact(newest))
        return listing

    one.store.read = overtaken
    with structlog.testing.capture_logs() as logs:
        async with following(one):
            await until(lambda: len(one.store.starts) == 2)
            assert one.state.view.get(Host, "hosts/h") == host("h")
    assert [entry["event"] for entry in logs] == ["store.compacted"]
    assert one.store.starts[1] > one.store.starts[0]


async def test_the_store_comes_back(one, quick):
    """While the store is away it is tried on; when it is back, the outbox is written."""
    await one.state.commit(putting(ADDRESS, RESERVED))
    one.store.away = True
    await one.state.remove(deleting(ADDRESS))
    with structlog.testing.capture_logs() as logs:
        async with following(one):
            await until(lambda: one.state.away == "the store is away")
            await asyncio.sleep(0.1)
            one.store.away = False
            await until(lambda: one.state.away is None)
            assert await one.keys() == []
            assert not one.state.behind
    assert [entry["event"] for entry in logs] == ["store.away", "store.back"]


async def test_reading_anew_at_intervals(one, two, quick, monkeypatch):
    """A watch that tells nothing is not believed: everything is read at intervals."""
    monkeypatch.setattr(state, "RELIST", 0.05)

    async def silent(
        prefix: str, start: int, **_: str
    ) -> AsyncIterator[tuple[Event, ...]]:
        await asyncio.sleep(60)
        yield ()

    one.store.watch = silent
    async with following(one):
        await two.state.commit(putting("hosts/h", host("h")))
        await until(lambda: one.state.view.get(Host, "hosts/h") == host("h"))
        await until(lambda: one.wakes)


def test_going_and_coming_are_logged_once(tmp_path):
    """Each going away and coming back is logged once, however often it is seen."""
    local = LocalDatabase(tmp_path / "local.db")
    noted = State(Moody(None), local, None, None)
    with structlog.testing.capture_logs() as logs:
        for reason in (None, "one", "one", "two", None, None, "three"):
            noted.note(reason)
    assert [(e["event"], e.get("error")) for e in logs] == [
        ("store.away", "one"),
        ("store.back", None),
        ("store.away", "three"),
    ]
    assert noted.away == "three"


# News that did not come by the watch.


async def test_news_of_a_lost_race_wakes(one, two):
    """What a loss told wakes too, as the watch will not tell it a second time."""
    await one.state.relist()
    await two.state.commit(putting("hosts/h", host("h", "2")))
    one.wakes.clear()
    await one.state.commit(putting("hosts/h", host("h", "1")))
    assert one.wakes == [None]


async def test_news_of_a_refusal_wakes(one, two):
    """What was read anew for a refusal wakes, though the refusal stays."""
    one.store.shared = True
    await two.state.commit(putting("hosts/h", host("h")))
    one.wakes.clear()

    def decide(draft: Draft) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        await one.state.commit(decide)
    assert one.wakes == [None]


async def test_watermarks_wake_nobody(one, two):
    """How far other hosts' kernels are is news to nobody."""
    async with following(one):
        await until(lambda: one.store.starts)
        one.wakes.clear()
        await two.state.commit(putting("watermarks/h", Watermark(revision=1)))
        await two.state.commit(putting("hosts/h", host("h")))
        await until(lambda: one.state.view.get(Host, "hosts/h"))
        assert one.wakes == [None]
        assert one.state.view.get(Watermark, "watermarks/h") is None
        await one.state.relist()
        assert one.wakes == [None]


# Bounds.


async def test_a_commit_has_an_end(one, monkeypatch):
    """A commit that cannot be made in time says so, however slow the store is."""
    monkeypatch.setattr(state, "LIMIT", 0.1)

    async def slow() -> list[tuple[int, Change]]:
        await asyncio.sleep(5)
        return []

    one.state.behind = True
    one.local.pending = slow
    with pytest.raises(StoreError, match=r"^the store did not take a change within"):
        await one.state.commit(putting("hosts/h", host("h")))
    assert await one.keys() == []


async def test_a_slow_commit_begins_no_other_write(one, monkeypatch):
    """After most of its time a lost race is not decided again."""
    monkeypatch.setattr(state, "LATEST", 0.05)
    commit = one.store.commit

    async def slow(change: Change, lease: Lease | None = None) -> int:
        await asyncio.sleep(0.1)
        return await commit(change, lease)

    one.store.commit, one.store.losing = slow, 1
    with pytest.raises(StoreError, match="too slow"):
        await one.state.commit(putting("hosts/h", host("h")))
    assert await one.keys() == []


def test_the_interval_is_by_chance():
    """Two readings are a minute apart, give or take a tenth, hardly ever the same."""
    waits = [state.interval() for _ in range(100)]
    assert all(54 <= wait <= 66 for wait in waits)
    assert len(set(waits)) > 90


# A store that went back.


async def fresh(tmp_path, name: str = "new") -> SqliteStore:
    """Open an empty store beside the other."""
    store = SqliteStore(tmp_path / f"{name}.db")
    await store.open()
    return store


async def test_a_wiped_store_takes_nothing_away(one, tmp_path):
    """What a wiped store lacks stays in the view, named, and can be written again."""
    await one.state.commit(putting("members/n/h", MEMBER))
    await one.state.commit(putting("hosts/h", host("h")))
    await one.state.relist()
    wiped = one.store.store = await fresh(tmp_path)
    with structlog.testing.capture_logs() as logs:
        await one.state.relist()
        await one.state.relist()
    assert [entry["event"] for entry in logs] == ["store.rewound"]
    assert one.state.view.get(Member, "members/n/h") == MEMBER
    assert one.state.view.missing == {"members/n/h", "hosts/h"}
    await one.state.commit(putting("members/n/h", MEMBER))
    assert await one.keys() == ["members/n/h"]
    assert one.state.view.missing == {"hosts/h"}
    await wiped.close()


async def test_a_store_that_says_it_went_back(one, two, tmp_path, quick):
    """After the store said that it went back it is read, believed and followed on."""
    await one.state.commit(putting("hosts/h", host("h", "1")))
    await one.state.commit(putting("hosts/h", host("h", "2")))
    restored = await fresh(tmp_path)
    old = records.encode(host("h", "old"))
    await restored.commit(Change(puts={"hosts/h": old}))
    one.store.broken = RewoundError("the store went back")
    async with following(one):
        await until(lambda: one.store.starts)
        one.store.store = restored
        await until(lambda: len(one.store.starts) == 2)
        assert one.state.view.get(Host, "hosts/h") == host("h", "old")
        await restored.commit(Change(puts={"hosts/i": records.encode(host("i"))}))
        await until(lambda: one.state.view.get(Host, "hosts/i"))
        assert one.state.away is None
        assert not one.state.rewound
        assert one.wakes
    await restored.close()


async def test_reading_says_that_the_store_went_back(one, tmp_path):
    """A reading that is refused because the store went back is made again."""
    await one.state.commit(putting("hosts/h", host("h")))
    restored = one.store.store = await fresh(tmp_path)
    read, told = one.store.read, []

    async def once(prefix: str) -> Listing:
        if not told:
            told.append(prefix)
            raise RewoundError("the store went back")
        return await read(prefix)

    one.store.read = once
    await one.state.relist()
    assert one.state.view.missing == {"hosts/h"}
    await restored.close()


# What a lost answer leaves behind.


def found(**revisions: tuple[str, int]) -> Listing:
    """Make a listing of hosts by version and revision."""
    return Listing(
        items={
            f"hosts/{name}": Item(
                value=records.encode(host(name, version)), revision=at
            )
            for name, (version, at) in revisions.items()
        },
        revision=99,
    )


SENT = Change(
    expect={"hosts/a": 5, "hosts/b": 0},
    puts={
        "hosts/a": records.encode(host("a", "2")),
        "hosts/b": records.encode(host("b", "2")),
    },
    deletes=frozenset({"hosts/c"}),
)


@pytest.mark.parametrize(
    ("listing", "landed"),
    [
        (found(a=("2", 8), b=("2", 8)), True),
        (found(a=("3", 9), b=("2", 8)), True),
        (found(a=("2", 8), b=("2", 8), c=("1", 9)), True),
        (found(a=("1", 5)), False),
        (found(a=("1", 5), b=("2", 8)), False),
        (found(a=("2", 8)), False),
        (found(a=("2", 8), b=("2", 8), c=("1", 4)), False),
        (found(a=("2", 8), b=("2", 7)), True),
        (found(a=("2", 5), b=("3", 9)), False),
        (found(a=("3", 9), b=("3", 9)), False),
        (found(), False),
    ],
)
def test_the_trace_of_a_transaction(listing, landed):
    """A transaction is there if all it wrote is there as one, or was written over."""
    assert state.has(listing, SENT) is landed
