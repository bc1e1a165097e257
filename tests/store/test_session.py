"""A host's life in a store: its place, its fence, and commits whose answer is lost."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network

import pytest
import structlog

from cnmdriver.errors import Conflict, StoreError
from cnmdriver.model import Alive, Fence, Host, Kept, Knock, Reservation
from cnmdriver.store import records, session
from cnmdriver.store.base import Change, Item, RaceLostError, Store
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.session import Session
from cnmdriver.store.sqlite import SqliteStore
from cnmdriver.store.state import State
from cnmdriver.store.view import Draft
from tests.store import etcd_server
from tests.store.doors import Moody

NET = ip_network("10.1.0.0/24")
TTL = {"sqlite": 0.6, "etcd": 2.0, "members": 15.0}
"""Seconds; etcd grants no shorter lease than an election takes."""


@dataclass
class Backend:
    """A store's content, to which each host has a door of its own."""

    name: str
    door: Callable[[], Awaitable[Store]]

    @property
    def ttl(self) -> float:
        """Return the shortest lease that can be had."""
        return TTL[self.name]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    """Run an etcd for all tests of this file."""
    with etcd_server.running(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
async def backend(request, tmp_path):
    """Give an empty store."""
    opened: list[Store] = []

    async def embedded() -> Store:
        if not opened:
            opened.append(SqliteStore(tmp_path / "store.db"))
            await opened[0].open()
        return opened[0]

    async def shared() -> Store:
        store = EtcdStore(cluster.options(prefix=prefix))
        opened.append(store)
        await store.open()
        return store

    if request.param == "etcd":
        cluster = request.getfixturevalue("etcd")
        prefix = f"/{secrets.token_hex(6)}/"
    yield Backend(request.param, embedded if request.param == "sqlite" else shared)
    for store in opened:
        await store.close()


@dataclass
class Seat:
    """One host with its doors."""

    session: Session
    store: Moody
    flips: list[bool] = field(default_factory=list)

    async def item(self, key: str) -> Item | None:
        """Read a key."""
        return (await self.store.store.read(key)).items.get(key)

    async def record(self, key: str) -> object:
        """Read a record, None if there is none."""
        item = await self.item(key)
        return None if item is None else records.decode(key, item.value)

    async def lose(self) -> None:
        """Let the host's lease end behind its back."""
        await self.session.lease.lease.revoke()


async def sit(backend: Backend, host: str, boot: str = "boot") -> Seat:
    """Give a host a session that is not open yet."""
    store = Moody(await backend.door())
    seat = Seat(Session(store, host, boot, ttl=backend.ttl), store)
    seat.session.changed = lambda: seat.flips.append(seat.session.hidden)
    return seat


@pytest.fixture
async def one(backend):
    """Open the first host's session."""
    seat = await sit(backend, "one")
    await seat.session.open()
    return seat


@pytest.fixture
async def two(backend):
    """Open the second host's session."""
    seat = await sit(backend, "two")
    await seat.session.open()
    return seat


@pytest.fixture
def quick(monkeypatch):
    """Look often, and give a new leader of etcd no time."""
    monkeypatch.setattr(session, "POLL", 0.05)
    monkeypatch.setattr(session, "RETRY", 0.05)
    monkeypatch.setattr(session, "KNOCK", 0.5)


@asynccontextmanager
async def running(*seats: Seat) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Keep the leases meanwhile, and hear who knocks."""
    tasks = [
        asyncio.create_task(work)
        for seat in seats
        for work in (seat.session.run(), listening(seat))
    ]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def listening(seat: Seat) -> None:
    """Do what a state does for its session when it follows the store."""
    while True:
        with suppress(StoreError):
            knock = await seat.record(records.knock(seat.session.host))
            if isinstance(knock, Knock):
                seat.session.hear(knock)
        await asyncio.sleep(0.05)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that others bring about."""
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


async def gone(seat: Seat, key: str) -> None:
    """Wait until a key is no more."""
    async with asyncio.timeout(15):
        while await seat.item(key) is not None:
            await asyncio.sleep(0.05)


# The place in the store.


async def test_opening(backend, one):
    """An open session has its three keys in the store and is not hidden."""
    mine = one.session
    alive = await one.record("alive/one")
    assert isinstance(alive, Alive)
    assert (alive.instance, alive.boot) == (mine.instance, "boot")
    assert not alive.resting
    assert await one.record("fence/one") == Fence(instance=mine.instance, count=0)
    assert await one.record("kept/one") == Kept()
    fence = await one.item("fence/one")
    assert mine.expect() == {"fence/one": fence.revision}
    assert (mine.hidden, mine.since) == (False, None)
    assert one.flips == [False]


async def test_before_opening(backend):
    """Who has no place yet is hidden, and may not write."""
    seat = await sit(backend, "one")
    assert seat.session.hidden
    assert 0 <= session.clock() - seat.session.since < 5
    with pytest.raises(StoreError, match="no lease in the store"):
        seat.session.expect()


async def test_opening_without_the_store(backend):
    """Without the store there is no place to take, and opening says why."""
    seat = await sit(backend, "one")
    seat.store.away = True
    with pytest.raises(StoreError, match="away"):
        await seat.session.open()
    assert seat.session.hidden


async def test_two_hosts(one, two):
    """Two hosts have places of their own, and one's end is not the other's."""
    assert one.session.instance != two.session.instance
    await one.lose()
    assert await one.record("alive/one") is None
    assert await one.record("fence/one") is None
    assert await one.record("kept/one") == Kept()
    assert await two.record("alive/two") is not None


async def test_a_lease_is_kept(backend, one, quick):
    """While it runs, a session outlives its lease's time without being hidden."""
    before = await one.item("alive/one")
    async with running(one):
        await asyncio.sleep(2.5 * backend.ttl)
        assert not one.session.hidden
        assert await one.item("alive/one") == before
    assert one.flips == [False]


async def test_nobody_keeps_it(backend, one):
    """A host that stopped is no longer alive in the store, and knows it is hidden."""
    await gone(one, "alive/one")
    assert one.session.hidden
    assert one.session.since == one.session.deadline
    assert await one.record("kept/one") == Kept()


async def test_a_lost_lease(one, quick):
    """A session whose lease is gone is hidden, says so, and takes a new one."""
    before = one.session.expect()
    with structlog.testing.capture_logs() as logs:
        await one.lose()
        async with running(one):
            await until(lambda: one.flips == [False, True, False])
    assert not one.session.hidden
    assert one.session.expect() != before
    assert (await one.record("fence/one")).instance == one.session.instance
    assert [e["event"] for e in logs if e["log_level"] != "debug"] == [
        "session.hidden",
        "session.alive",
    ]


async def test_the_store_is_away_for_long(one, quick):
    """Without the store a host counts as hidden from its lease's last moment."""
    one.store.away = True
    deadline = one.session.deadline
    async with running(one):
        await until(lambda: one.flips == [False, True])
        assert session.clock() >= deadline
        assert one.session.since == deadline
        one.store.away = False
        await until(lambda: one.flips == [False, True, False])
    assert await one.record("alive/one") is not None


async def test_the_store_is_away_for_a_moment(backend, one, quick):
    """An absence shorter than the lease hides nobody."""
    async with running(one):
        one.store.away = True
        await asyncio.sleep(backend.ttl / 2)
        one.store.away = False
        await asyncio.sleep(backend.ttl)
    assert one.flips == [False]


async def test_the_store_is_away_at_the_start(backend, quick):
    """A session that could not be opened opens itself when the store is there."""
    seat = await sit(backend, "one")
    seat.store.away = True
    async with running(seat):
        await asyncio.sleep(0.2)
        assert seat.session.hidden
        seat.store.away = False
        await until(lambda: seat.flips == [False])
    assert await seat.record("alive/one") is not None


async def test_the_long_lease_is_taken_anew(one, quick):
    """A host that was away too long to be kept is kept again."""
    await one.session.long.lease.revoke()
    assert await one.item("kept/one") is None
    one.session.long_kept -= 2 * session.REKEPT
    await one.session.turn()
    assert await one.record("kept/one") == Kept()
    assert session.clock() - one.session.long_kept < 5


async def test_no_long_lease_is_left_behind(one):
    """A long lease whose key could not be written is ended, not left for a day."""
    await one.session.long.lease.revoke()
    given, lease = [], one.store.lease

    async def noted(seconds):
        given.append(await lease(seconds))
        return given[-1]

    async def refused(change, lease=None):
        raise StoreError("the store is full")

    one.store.lease = noted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.store, "commit", refused)
        with pytest.raises(StoreError, match="full"):
            await one.session.keep_long()
    assert len(given) == 1
    with pytest.raises(StoreError):
        await given[0].keep()
    await one.session.keep_long()
    assert await one.record("kept/one") == Kept()


async def test_a_knock_is_answered_when_it_can_be(one):
    """Who knocked while the store took nothing is answered at the next turn."""
    one.session.hear(Knock(instance="other"))
    commit = one.store.commit

    async def refused(change, lease=None):
        raise StoreError("the store is full")

    one.store.commit = refused
    with pytest.raises(StoreError, match="full"):
        await one.session.answer()
    one.store.commit = commit
    before = await one.item("alive/one")
    await one.session.answer()
    after = await one.item("alive/one")
    assert (after.revision > before.revision, one.session.knocks) == (True, set())


async def test_a_lease_that_is_lost_with_a_knock(one):
    """A knock that could not be answered keeps nobody from taking its place anew."""
    one.session.hear(Knock(instance="other"))
    await one.lose()
    await one.session.turn()
    assert not one.session.hidden
    await one.session.turn()
    assert one.session.knocks == set()


async def test_who_was_in_the_way_is_gone_at_once(backend, one):
    """A place that is free by the time of the knock is taken."""
    other = await one.record("alive/one")
    new = await sit(backend, "one", "another boot")
    attempt = new.session.attempt

    async def found_alive():
        assert await attempt() == other
        await one.lose()
        return other

    new.session.attempt = found_alive
    await new.session.open()
    assert (await new.record("alive/one")).boot == "another boot"


async def test_the_long_lease_is_kept_rarely(one):
    """The long lease costs a round now and then, not each time."""
    before = one.session.long_kept
    await one.session.turn()
    assert one.session.long_kept == before


# Whose place it is.


async def test_our_own_last_life(backend, one):
    """A daemon that was killed is back at once, and its old life cannot write."""
    before = one.session.expect()
    again = await sit(backend, "one")
    async with asyncio.timeout(backend.ttl / 2):
        await again.session.open()
    assert (await one.record("alive/one")).instance == again.session.instance
    with pytest.raises(RaceLostError) as lost:
        await one.store.commit(Change(expect=before, puts={"hosts/x": b"x"}))
    with pytest.raises(StoreError, match=again.session.instance):
        one.session.judge(lost.value.current, before["fence/one"])


async def test_a_clean_stop(backend, one):
    """A host that rests stays alive for the others, and cannot write."""
    before = one.session.expect()
    await one.session.rest()
    alive = await one.record("alive/one")
    assert (alive.instance, alive.resting) == (one.session.instance, True)
    assert await one.record("fence/one") is None
    assert await one.record("kept/one") == Kept()
    with pytest.raises(RaceLostError):
        await one.store.commit(Change(expect=before, puts={"hosts/x": b"x"}))
    await asyncio.sleep(1.5 * backend.ttl)
    assert (await one.record("alive/one")).resting
    assert one.flips == [False]


async def test_back_after_a_clean_stop(backend, one):
    """Whoever has the identity of a resting host takes its place at once."""
    await one.session.rest()
    again = await sit(backend, "one", boot="next")
    async with asyncio.timeout(backend.ttl / 2):
        await again.session.open()
    alive = await one.record("alive/one")
    assert (alive.boot, alive.resting) == ("next", False)
    await again.lose()
    assert await one.record("alive/one") is None


async def test_resting_without_the_store(one):
    """A stop without the store ends in time, and without a word."""
    one.store.away = True
    async with asyncio.timeout(session.REST + 1):
        await one.session.rest()
    one.store.away = False
    assert not (await one.record("alive/one")).resting


async def test_leaving(one):
    """A host that leaves is not alive, and may come back."""
    await one.session.leave()
    assert await one.record("alive/one") is None
    assert one.session.hidden
    await one.session.open()
    assert await one.record("alive/one") is not None


async def test_after_a_power_cut(backend, one, quick):
    """After a reboot nobody answers for the life before; its lease is not waited for."""
    again = await sit(backend, "one", boot="next")
    before = await one.item("alive/one")
    begin = session.clock()
    await again.session.open()
    assert begin + session.KNOCK <= session.clock()
    assert before.value != (await one.item("alive/one")).value
    assert (await one.record("alive/one")).boot == "next"
    assert await one.record("knocks/one") is None
    with pytest.raises(StoreError, match="another pynet"):
        await one.session.bump(one.session.revision)


async def test_a_cloned_identity(backend, one, quick):
    """A second machine with our identity is told who is there and what to do."""
    clone = await sit(backend, "one", boot="other")
    async with running(one):
        with pytest.raises(Conflict) as told:
            await clone.session.open()
    for word in (one.session.instance, "boot boot", "local.db"):
        assert word in str(told.value)
    assert (await one.record("alive/one")).instance == one.session.instance


async def test_a_clone_took_the_place(backend, one, quick):
    """A host that was away and finds a clone in its place stops, naming it."""
    await one.lose()
    clone = await sit(backend, "one", boot="other")
    await clone.session.open()
    async with running(clone):
        with pytest.raises(StoreError, match="another pynet"):
            await one.session.verify(one.session.revision)
        one.session.forget()
        with pytest.raises(StoreError, match=clone.session.instance):
            await one.session.renew()
        with pytest.raises(Conflict, match=clone.session.instance):
            await one.session.run()


@pytest.mark.parametrize("fault", ["done", "lost"])
@pytest.mark.parametrize("commit", [0, 1])
async def test_opening_with_a_lost_answer(backend, fault, commit):
    """An answer lost while a place is taken leaves one place, and a right fence."""
    seat = await sit(backend, "one")
    seat.store.swallowed = [*[""] * commit, fault]
    for _ in range(2):
        try:
            await seat.session.open()
        except StoreError:
            continue
    late = await seat.store.deliver()
    assert all(isinstance(each, StoreError) for each in late if commit)
    fence = await seat.item("fence/one")
    assert seat.session.expect() == {"fence/one": fence.revision}
    assert (await seat.record("alive/one")).instance == seat.session.instance
    await seat.session.turn()


# The fence.


async def test_what_was_sent_before_is_void(one):
    """After the fence is written anew, what expects the old one is refused."""
    before = one.session.expect()
    await one.session.bump(before["fence/one"])
    after = one.session.expect()
    assert after["fence/one"] > before["fence/one"]
    assert await one.record("fence/one") == Fence(
        instance=one.session.instance, count=1
    )
    with pytest.raises(RaceLostError) as lost:
        await one.store.commit(Change(expect=before, puts={"hosts/x": b"x"}))
    assert one.session.judge(lost.value.current, before["fence/one"])
    await one.store.commit(Change(expect=after, puts={"hosts/x": b"x"}))


async def test_once_is_enough(one):
    """Of many who want the same fence void, one writes."""
    seen = one.session.revision
    await asyncio.gather(*(one.session.bump(seen) for _ in range(10)))
    assert one.session.count == 1
    await one.session.bump(seen)
    assert one.session.count == 1


@pytest.mark.parametrize("faults", [["done"], ["lost"], ["lost", "lost", "done"]])
async def test_the_fence_with_lost_answers(one, faults):
    """The fence is surely another in the end, and ours is the store's."""
    seen = one.session.revision
    one.store.swallowed = list(faults)
    await one.session.bump(seen)
    assert one.session.revision > seen
    assert (await one.item("fence/one")).revision == one.session.revision
    late = await one.store.deliver()
    assert all(isinstance(each, RaceLostError) for each in late)


async def test_the_fence_without_a_lease(one):
    """If the lease is gone a new one is taken: its fence is another, too."""
    seen = one.session.revision
    await one.lose()
    await one.session.bump(seen)
    assert one.session.expect() != {"fence/one": seen}
    assert await one.record("alive/one") is not None


async def test_what_a_loss_says(one, two):
    """Only a fence that moved is a reason to decide nothing else than before."""
    mine = one.session
    seen = mine.revision
    fence = await one.item("fence/one")
    assert not mine.judge({}, seen)
    assert not mine.judge({"hosts/x": None}, seen)
    assert not mine.judge({"fence/one": fence}, seen)
    assert mine.judge({"fence/one": replace(fence, revision=seen + 9)}, seen)
    assert mine.revision == seen + 9
    assert mine.judge({"fence/one": None}, seen), "older news"
    assert mine.revision == seen + 9
    assert mine.judge({"fence/one": None}, seen + 9)
    assert mine.hidden


# Commits under the fence.


@dataclass
class Whole(Seat):
    """A host with its state."""

    state: State | None = None
    local: LocalDatabase | None = None

    async def keys(self) -> list[str]:
        """Read all keys but those of the hosts' lives and the cluster's."""
        listing = await self.store.store.read("")
        own = ("alive/", "fence/", "kept/", "cluster")
        return sorted(k for k in listing.items if not k.startswith(own))


@asynccontextmanager
async def whole(directory, backend: Backend, host: str) -> AsyncIterator[Whole]:
    """Open a host's session and state."""
    seat = await sit(backend, host)
    seat.store.shared = True
    await seat.session.open()
    local = LocalDatabase(directory / f"{host}.db")
    await local.open()

    async def step(name: str) -> None:
        del name

    state = State(seat.store, local, step, lambda: None, session=seat.session)
    try:
        await state.open()
        seat.store.commits.clear()
        yield Whole(seat.session, seat.store, seat.flips, state, local)
    finally:
        await local.close()


@pytest.fixture
async def a(tmp_path, backend):
    """Open a whole host."""
    async with whole(tmp_path, backend, "a") as opened, running(opened):
        yield opened


@pytest.fixture
async def b(tmp_path, backend, a):
    """Open another whole host."""
    async with whole(tmp_path, backend, "b") as opened, running(opened):
        yield opened


def host(version: str, name: str = "x") -> Host:
    """Make a record."""
    return Host(id=name, name=name, version=version)


def putting(key: str, record: object):
    """Return a decision that puts one record."""

    def decide(draft: Draft) -> None:
        draft.put(key, record)

    return decide


def counting(key: str = "hosts/x"):
    """Return a decision that counts in one record, under its host's name."""

    def decide(draft: Draft) -> int:
        found = draft.get(Host, key) or host("0")
        count = int(found.version) + 1
        name = key.partition("/")[2]
        fresh = {"version": str(count), "name": secrets.token_hex(4)}
        draft.put(key, replace(found, id=name, **fresh))
        return count

    return decide


async def test_every_commit_expects_the_fence(a):
    """Puts, deletes and what the outbox replays can only be written by a living host."""
    await a.state.commit(putting("hosts/x", host("1")))
    await a.state.commit(lambda draft: draft.delete("hosts/x"))
    a.store.away = True
    await a.state.remove(lambda draft: draft.delete("endpoints/n/e"))
    a.store.away = False
    await a.state.replay()
    assert len(a.store.commits) == 3
    for change in a.store.commits:
        assert change.expect["fence/a"] == a.session.revision


async def test_stopped_past_its_lease(tmp_path, backend):
    """A host that slept too long cannot write before it is seen again, then it can."""
    async with whole(tmp_path, backend, "a") as a:
        stale = a.session.expect()
        await gone(a, "fence/a")
        with pytest.raises(RaceLostError):
            await a.store.commit(Change(expect=stale, puts={"hosts/x": b"x"}))
        await a.state.commit(putting("hosts/x", host("1")))
        fence, written = await a.item("fence/a"), await a.item("hosts/x")
        assert written.revision > fence.revision > stale["fence/a"]
        assert await a.record("alive/a") is not None
        assert not a.session.hidden


async def test_replaying_past_its_lease(tmp_path, backend):
    """What the outbox holds is written after the host is seen again."""
    async with whole(tmp_path, backend, "a") as a:
        a.store.away = True
        await a.state.remove(putting("members/n/a", host("1")))
        a.store.away = False
        await gone(a, "fence/a")
        await a.state.replay()
        assert await a.keys() == ["members/n/a"]
        assert await a.local.pending() == []


@pytest.mark.parametrize("faults", [["done"], ["lost"], ["lost", "done"], ["lost"] * 3])
async def test_a_lost_answer(a, faults):
    """A commit whose answer is lost counts exactly once, also when it comes late."""
    await a.state.commit(counting())
    a.store.swallowed = list(faults)
    assert await a.state.commit(counting()) == 2
    late = await a.store.deliver()
    assert all(isinstance(each, RaceLostError) for each in late)
    assert (await a.record("hosts/x")).version == "2"
    assert a.state.unsettled is None
    assert a.state.view.get(Host, "hosts/x") == await a.record("hosts/x")


@pytest.mark.parametrize("fault", ["done", "lost"])
async def test_a_lost_answer_to_a_deletion(a, fault):
    """A deletion is made again if nobody knows whether it was done."""
    await a.state.commit(putting("hosts/x", host("1")))
    a.store.swallowed = [fault]
    await a.state.commit(lambda draft: draft.delete("hosts/x"))
    assert await a.keys() == []
    assert a.state.view.get(Host, "hosts/x") is None


@pytest.mark.parametrize("fault", ["done", "lost"])
async def test_a_lost_answer_to_a_replay(a, fault):
    """The outbox is emptied in order, whichever answer is lost."""
    a.store.away = True
    await a.state.remove(putting("members/n/a", host("1")))
    await a.state.remove(putting("members/n/a", host("2")))
    a.store.away = False
    a.store.swallowed = [fault]
    await a.state.replay()
    late = await a.store.deliver()
    assert all(isinstance(each, RaceLostError) for each in late)
    assert await a.item("members/n/a") is not None
    assert (await a.item("members/n/a")).value == records.encode(host("2"))
    assert await a.local.pending() == []


@pytest.mark.parametrize("late", [False, True])
async def test_a_replay_leaves_others_records_alone(a, b, late):
    """What was freed, and is another host's now, is not freed again by a replay."""
    ip = ip_address("10.1.0.2")
    key = records.address("s", NET, ip)
    mine = Reservation(space="s", cidr=NET, ip=ip, host="a")
    theirs = replace(mine, host="b")
    await a.state.commit(putting(key, mine))
    a.store.away = True
    await a.state.remove(lambda draft: draft.delete(key))
    await a.state.remove(lambda draft: draft.delete("endpoints/n/e"))
    a.store.away = False
    await b.state.relist()
    bump = a.session.bump

    async def taken(seen: int) -> None:
        await b.state.relist()
        await b.state.commit(putting(key, theirs))
        await bump(seen)

    if late:
        a.store.swallowed = ["done"]
        a.session.bump = taken
    else:
        await b.state.commit(lambda draft: draft.delete(key))
        await b.state.commit(putting(key, theirs))
    await a.state.replay()
    assert await a.record(key) == theirs
    assert await a.local.pending() == []
    await a.state.relist()
    assert a.state.view.get(Reservation, key) == theirs


async def test_a_lost_answer_among_many(a):
    """One lost answer makes the others' fence old: they are decided again, once each."""
    a.store.swallowed = ["", "lost", "", "done", "", "", "lost"]
    await asyncio.gather(*(a.state.commit(counting(f"hosts/{n}")) for n in range(20)))
    late = await a.store.deliver()
    assert all(isinstance(each, RaceLostError) for each in late)
    versions = [(await a.record(f"hosts/{n}")).version for n in range(20)]
    assert versions == ["1"] * 20


async def test_an_answer_nobody_could_settle(a):
    """A commit that could not be settled is void before the next one is decided."""
    a.store.swallowed = ["lost"]
    read = a.store.read

    async def away(prefix: str) -> object:
        raise StoreError("the store is away")

    commit = a.store.commit

    async def refused(change, lease=None):
        if a.store.swallowed:
            return await commit(change, lease)
        raise StoreError("the store is away")

    a.store.read, a.store.commit = away, refused
    with pytest.raises(StoreError, match="away"):
        await a.state.commit(counting())
    assert a.state.unsettled is not None
    a.store.read, a.store.commit = read, commit
    await a.state.commit(putting("hosts/y", host("1")))
    assert [type(each) for each in await a.store.deliver()] == [RaceLostError]
    assert await a.keys() == ["hosts/y"]
    assert a.state.unsettled is None


async def test_a_lost_answer_is_cancelled(a):
    """Who is cancelled while the answer is lost leaves it to the next commit."""
    begun, go = asyncio.Event(), asyncio.Event()
    commit = a.store.commit

    async def slow(change, lease=None):
        begun.set()
        await go.wait()
        a.store.commit = commit
        return await commit(change, lease)

    a.store.commit = slow
    a.store.swallowed = ["lost"]
    task = asyncio.create_task(a.state.commit(counting()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await a.state.commit(putting("hosts/y", host("1")))
    assert [type(each) for each in await a.store.deliver()] == [RaceLostError]
    assert await a.keys() == ["hosts/y"]


async def test_another_took_our_place(backend, a):
    """A host whose fence is another's is told so, and writes nothing."""
    again = await sit(backend, "a")
    await again.session.open()
    with pytest.raises(StoreError, match=again.session.instance):
        await a.state.commit(putting("hosts/x", host("1")))
    assert await a.keys() == []


async def test_others_in_between(a, b):
    """A record that another wrote after a lost answer is decided on as it is."""
    await a.state.commit(counting())
    a.store.swallowed = ["lost"]
    bump = a.session.bump

    async def between(seen: int) -> None:
        await bump(seen)
        await b.state.relist()
        await b.state.commit(counting())

    a.session.bump = between
    assert await a.state.commit(counting()) == 3
    assert (await a.record("hosts/x")).version == "3"


@pytest.mark.timeout(60)
async def test_nothing_is_given_twice(a, b):
    """Two hosts whose answers get lost at random never have one address both."""
    chance = random.Random(7)
    wanted = [ip_address("10.1.0.0") + n for n in range(1, 9)]
    owners: dict[object, str] = {}

    async def work(seat: Whole, name: str) -> None:
        for _ in range(60):
            if chance.random() < 0.3:
                seat.store.swallowed.append(chance.choice(["done", "lost", ""]))
            ip = chance.choice(wanted)
            key = records.address("s", NET, ip)
            if owners.get(ip) == name:

                def give(draft: Draft, key=key) -> None:
                    found = draft.get(Reservation, key)
                    if found is not None and found.host == name:
                        draft.delete(key)

                del owners[ip]
                await seat.state.commit(give)
                continue

            def take(draft: Draft, key=key, ip=ip) -> None:
                if draft.get(Reservation, key) is not None:
                    raise Conflict("taken")
                taken = Reservation(space="s", cidr=NET, ip=ip, host=name)
                draft.put(key, taken)

            try:
                await seat.state.commit(take)
            except Conflict:
                continue
            assert ip not in owners
            owners[ip] = name
            if chance.random() < 0.2:
                late = await seat.store.deliver()
                assert all(isinstance(each, RaceLostError) for each in late)

    await asyncio.gather(work(a, "a"), work(b, "b"))
    held = (await a.store.store.read("addresses/")).items
    found = {k: records.decode(k, i.value).host for k, i in held.items()}
    assert found == {records.address("s", NET, ip): h for ip, h in owners.items()}


# Refusals.


def taking(calls: list[str]):
    """Return a decision that refuses while the record is there."""

    def decide(draft: Draft) -> str:
        if draft.get(Host, "hosts/x") is not None:
            calls.append("refused")
            raise Conflict("taken")
        calls.append("taken")
        draft.put("hosts/x", host("2"))
        return "done"

    return decide


async def test_a_refusal_is_made_on_fresh_news(a, b):
    """What another host has just freed is not refused."""
    await a.state.commit(putting("hosts/x", host("1")))
    await b.state.relist()
    await a.state.commit(lambda draft: draft.delete("hosts/x"))
    calls: list[str] = []
    assert await b.state.commit(taking(calls)) == "done"
    assert calls == ["refused", "taken"]


async def test_a_refusal_without_news(a, b):
    """If nothing changed the decision is not made again."""
    await a.state.commit(putting("hosts/x", host("1")))
    await b.state.relist()
    calls: list[str] = []
    with pytest.raises(Conflict, match="taken"):
        await b.state.commit(taking(calls))
    assert calls == ["refused"]
    assert b.store.reads[-1] == ""


async def test_a_refusal_is_looked_at_twice_at_most(a, b):
    """News that keeps coming does not keep a refusal from going out."""
    await a.state.commit(putting("hosts/x", host("1")))
    await b.state.relist()
    await a.state.commit(putting("hosts/y", host("1")))
    calls: list[str] = []
    with pytest.raises(Conflict, match="taken"):
        await b.state.commit(taking(calls))
    assert calls == ["refused", "refused"]


async def test_a_refusal_without_the_store(a, b):
    """Without the store a refusal stays what it was."""
    await a.state.commit(putting("hosts/x", host("1")))
    await b.state.relist()
    b.store.away = True
    with pytest.raises(Conflict, match="taken"):
        await b.state.commit(taking([]))


async def test_a_refusal_of_a_host_alone(a):
    """On a store of its own a host knows all there is."""
    a.store.shared = False
    await a.state.commit(putting("hosts/x", host("1")))
    before = len(a.store.reads)
    with pytest.raises(Conflict, match="taken"):
        await a.state.commit(taking([]))
    assert len(a.store.reads) == before


# Real members that stop.


@asynccontextmanager
async def members(directory, host: str, cluster, first) -> AsyncIterator[Whole]:
    """Open a whole host whose first member is a certain one."""
    store = EtcdStore(cluster.options(first))
    await store.open()

    async def door() -> Store:
        return store

    try:
        backend = Backend("members", door)
        async with whole(directory, backend, host) as seat, running(seat):
            yield seat
    finally:
        await store.close()


@pytest.mark.etcd
@pytest.mark.timeout(90)
async def test_the_leader_stops_amid_commits(tmp_path):
    """What was sent to a leader that stops is written once: by it, or again, not both."""
    with etcd_server.running(tmp_path, 3) as cluster:
        leader = cluster.leader()
        async with members(tmp_path, "a", cluster, leader) as a:
            names = [f"hosts/{n}" for n in range(120)]
            works = [asyncio.create_task(a.state.commit(counting(k))) for k in names]
            # The rest is on its way.
            while not a.store.commits:
                await asyncio.sleep(0)
            leader.stop()
            begin = session.clock()
            try:
                found = await asyncio.gather(*works, return_exceptions=True)
            finally:
                leader.go_on()
            assert session.clock() - begin < 10
            assert a.session.count > 1, "no answer was lost"
            # What the old leader still had is done, or void, by now.
            await asyncio.sleep(2)
            versions = [await version(a, key) for key in names]
            for outcome, counted in zip(found, versions, strict=True):
                # A commit that failed may have been done, but only once.
                assert counted == 1 or (isinstance(outcome, StoreError) and not counted)


async def version(seat: Whole, key: str) -> int:
    """Return what was counted under a key."""
    record = await seat.record(key)
    return int(record.version) if isinstance(record, Host) else 0
