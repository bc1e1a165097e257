"""What only etcd has: addresses, limits, and members that stop, die and come back."""

import asyncio
import contextlib
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Self

import pytest

from cnmdriver.errors import InvalidParameter, StoreError
from cnmdriver.store.base import (
    Change,
    CompactedError,
    Event,
    RewoundError,
    UnknownOutcomeError,
)
from cnmdriver.store.etcd import Options, read_url
from cnmdriver.store.etcd.rpc import prefix_end
from cnmdriver.store.etcd.store import PAGE, EtcdStore
from tests.store import etcd_server
from tests.store.etcd_server import Cluster, Server

pytestmark = pytest.mark.etcd

Opened = Callable[[Options], EtcdStore]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    """Open stores, close them at the end, and see that nothing of them runs on."""
    stores = []

    async def open_(options: Options) -> EtcdStore:
        store = EtcdStore(options)
        stores.append(store)
        await store.open()
        return store

    yield open_
    for store in stores:
        await store.close()
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """Run one member that no test stops or changes."""
    with etcd_server.running(tmp_path_factory.mktemp("unharmed")) as running:
        yield running


@pytest.fixture
def one(tmp_path):
    """Run one member."""
    with etcd_server.running(tmp_path) as running:
        yield running


@pytest.fixture
def three(tmp_path):
    """Run three members."""
    with etcd_server.running(tmp_path, 3) as running:
        yield running


async def put(store: EtcdStore, **values: str) -> int:
    """Write some keys without looking."""
    return await store.commit(Change(puts={k: v.encode() for k, v in values.items()}))


async def patiently(store: EtcdStore, key: str) -> None:
    """Write a key, as often as it takes."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(StoreError):
                await put(store, **{key: "x"})
                return


class Follower:
    """A task that collects what a watch yields."""

    def __init__(self, store: EtcdStore, start: int) -> None:
        self.events: list[Event] = []
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self.follow(store, start))

    async def follow(self, store: EtcdStore, start: int) -> None:
        async for batch in store.watch("", start):
            self.events.extend(batch)
            self.news.set()

    async def has(self, key: str, limit: float = 10) -> None:
        """Wait for a key."""
        async with asyncio.timeout(limit):
            while key not in self.keys:
                waiting = asyncio.create_task(self.news.wait())
                await asyncio.wait(
                    {waiting, self.task}, return_when=asyncio.FIRST_COMPLETED
                )
                waiting.cancel()
                if self.task.done():
                    await self.task
                self.news.clear()

    @property
    def keys(self) -> list[str]:
        return [event.key for event in self.events]


@contextlib.contextmanager
def within(seconds: float):
    """See that something takes no longer."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


# Addresses.


@pytest.mark.parametrize(
    ("url", "endpoints"),
    [
        ("etcd://one", ("one:2379",)),
        ("etcd://one:1234/", ("one:1234",)),
        ("etcd://h1:2379,10.0.0.2,h1", ("h1:2379", "10.0.0.2:2379")),
        (
            "etcd://[2001:db8::1]:1,[fe80::1%eth0]",
            ("[2001:db8::1]:1", "[fe80::1%eth0]:2379"),
        ),
    ],
)
def test_endpoints_are_read(url, endpoints):
    """An address names members, each with or without a port."""
    assert read_url(url) == Options(endpoints=endpoints, prefix="/pynet/v1/")


def test_settings_go_with_the_address():
    """Files, user and prefix are taken over; a file of TLS's means TLS."""
    options = read_url("etcd://al%40ice@h", prefix="/a", password_file="/p")
    assert (options.user, options.prefix, options.tls) == ("al@ice", "/a/", False)
    assert read_url("etcds://h").tls
    assert read_url("etcd://h", ca="/ca").tls
    assert read_url("etcd://h", cert="/c", key="/k").tls
    assert read_url("etcd://h", user="", ca="", cert="", key="", password_file="") == (
        read_url("etcd://h")
    )


@pytest.mark.parametrize(
    ("url", "settings", "text"),
    [
        ("etcd:/h", {}, "must be etcd://HOST:PORT"),
        ("sqlite:///x", {}, "must be etcd://HOST:PORT"),
        ("etcd://", {}, "'' in the store's address"),
        ("etcd://h,", {}, "'' in the store's address"),
        ("etcd://2001:db8::1", {}, "IPv6 addresses stand in brackets"),
        ("etcd://h:0", {}, "'h:0' in the store's address"),
        ("etcd://h:65536", {}, "'h:65536' in the store's address"),
        ("etcd://h/prefix", {}, "a prefix is set by --store-prefix"),
        ("etcd://h", {"prefix": ""}, "--store-prefix must not be empty"),
        ("etcd://h", {"prefix": "/"}, "--store-prefix must not be empty"),
        ("etcd://h", {"cert": "/c"}, "--store-cert needs --store-key"),
        ("etcd://h", {"key": "/k"}, "--store-key needs --store-cert"),
        ("etcd://u@h", {}, "--store-user needs --store-password-file"),
        ("etcd://h", {"password_file": "/p"}, "needs --store-user"),
        (
            "etcd://u@h",
            {"user": "w", "password_file": "/p"},
            "has user 'u', --store-user 'w'",
        ),
    ],
)
def test_bad_addresses_are_sentences(url, settings, text):
    """What cannot work is refused at once and says which setting is wrong."""
    with pytest.raises(InvalidParameter, match=text):
        read_url(url, **settings)


def test_a_password_in_the_address_is_refused():
    """A password in the address is refused and not repeated."""
    with pytest.raises(InvalidParameter, match="--store-password-file") as refused:
        read_url("etcd://user:s3cret@h")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"/a/", b"/a0"), (b"a\xff\xff", b"b"), (b"\xff", b"\0"), (b"", b"\0")],
)
def test_the_end_of_a_prefix(prefix, end):
    """The end of a prefix is the first key behind it, all if there is none."""
    assert prefix_end(prefix) == end


# Limits.


async def test_a_change_that_is_too_large_is_refused(opened, unharmed):
    """More than 128 puts or expectations are refused, and nothing is written."""
    store = await opened(unharmed.options(prefix="/large/"))
    many = [f"k{number}" for number in range(129)]
    for change in (
        Change(puts=dict.fromkeys(many, b"x")),
        Change(expect=dict.fromkeys(many, 0)),
        Change(puts={"a": b"1"}, expect={"a": 0} | dict.fromkeys(many, 0)),
    ):
        with pytest.raises(StoreError, match="too large for etcd, which takes 128"):
            await store.commit(change)
    await store.commit(
        Change(expect=dict.fromkeys(many[1:], 0), puts=dict.fromkeys(many[1:], b"x"))
    )
    assert len((await store.read("")).items) == 128


async def test_a_value_that_is_too_large_is_a_sentence(opened, unharmed):
    """A value above etcd's limit is a StoreError, no trace."""
    store = await opened(unharmed.options(prefix="/large/"))
    with pytest.raises(StoreError, match="request is too large"):
        await store.commit(Change(puts={"a": b"x" * 2_000_000}))


class Rival(EtcdStore):
    """A store in which another host writes between two parts of a commit."""

    rival: EtcdStore | None = None

    async def delete_unwritten(self, *arguments):
        if self.rival is not None:
            rival, self.rival = self.rival, None
            await put(rival, k150="theirs")
        await super().delete_unwritten(*arguments)


async def test_what_is_made_again_survives_a_large_delete(opened, unharmed):
    """A key that another host wrote after the decision is not deleted with the rest."""
    options = unharmed.options(prefix="/rival/")
    other, store = await opened(options), Rival(options)
    keys = [f"k{number:03}" for number in range(200)]
    for at in (0, 100):
        await other.commit(Change(puts=dict.fromkeys(keys[at : at + 100], b"x")))
    store.rival = other
    revision = await store.commit(Change(deletes=frozenset(keys)))
    items = (await store.read("")).items
    assert {k: i.value for k, i in items.items()} == {"k150": b"theirs"}
    assert items["k150"].revision == revision + 1
    await store.close()


async def test_a_long_list_is_read_in_pages(opened, unharmed):
    """A list of more keys than one page, and of 6 MB, is read as of one revision."""
    store = await opened(unharmed.options(prefix="/pages/"))
    keys = [f"{number:05}" for number in range(PAGE + 200)]
    for at in range(0, len(keys), 100):
        await store.commit(Change(puts=dict.fromkeys(keys[at : at + 100], b"x")))
    for key in keys[-6:]:
        await store.commit(Change(puts={key: b"x" * 1_000_000}))
    listing = await store.read("")
    assert sorted(listing.items) == keys
    assert sum(len(i.value) for i in listing.items.values()) == PAGE + 194 + 6_000_000


class Between(EtcdStore):
    """A store in which something happens after each page."""

    async def between(self) -> None:
        """Do nothing yet."""

    async def ask_kv(self, doing, method, request, **more):
        answer = await super().ask_kv(doing, method, request, **more)
        if method == "Range":
            await self.between()
        return answer


async def test_writes_between_pages_do_not_show(unharmed, monkeypatch):
    """Keys that come and go while a list is read are as at its beginning."""
    monkeypatch.setattr("cnmdriver.store.etcd.store.PAGE", 2)
    store = Between(unharmed.options(prefix="/between/"))
    before = await put(store, a="1", b="1", c="1", d="1")

    async def between() -> None:
        await store.commit(Change(puts={"x": b"1"}, deletes=frozenset({"d"})))

    store.between = between
    listing = await store.read("")
    assert (list(listing.items), listing.revision) == (["a", "b", "c", "d"], before)
    await store.close()


@pytest.mark.parametrize("times", [1, 5])
async def test_a_compaction_between_pages(unharmed, monkeypatch, times):
    """A list that a compaction overtakes is begun anew, but not for ever."""
    monkeypatch.setattr("cnmdriver.store.etcd.store.PAGE", 2)
    store = Between(unharmed.options(prefix=f"/compacted{times}/"))
    await put(store, a="1", b="1", c="1", d="1")
    left = times

    async def between() -> None:
        nonlocal left
        if left:
            left -= 1
            await put(store, d="2")
            unharmed.compact()

    store.between = between
    if times == 1:
        items = (await store.read("")).items
        assert [i.value for i in items.values()] == [b"1", b"1", b"1", b"2"]
    else:
        with pytest.raises(StoreError, match="compacted again and again"):
            await store.read("")
    await store.close()


async def test_clusters_are_apart(opened, unharmed):
    """Two clusters with prefixes of their own see nothing of each other's."""
    a = await opened(read_url(f"etcd://{unharmed.endpoints[0]}", prefix="/c"))
    b = await opened(read_url(f"etcd://{unharmed.endpoints[0]}", prefix="/c1/"))
    c = await opened(read_url(f"etcd://{unharmed.endpoints[0]}", prefix="/c1/x"))
    start = await put(a, key="a") + 1
    follower = Follower(a, start)
    await put(b, key="b")
    await put(c, key="c")
    await put(a, last="a")
    await follower.has("last")
    assert follower.keys == ["last"]
    listed = [(await s.read("")).items for s in (a, b, c)]
    assert [sorted(items) for items in listed] == [
        ["key", "last"],
        ["key", "x/key"],
        ["key"],
    ]


async def test_a_watch_that_is_given_up_leaves_nothing(opened, unharmed):
    """Ten watches that are cancelled or left alone leave no task behind."""
    store = await opened(unharmed.options(prefix="/tasks/"))
    start = await put(store, a="1") + 1
    followers = [Follower(store, start) for _ in range(5)]
    watches = [store.watch("", start) for _ in range(5)]
    await put(store, b="1")
    for follower in followers:
        await follower.has("b")
        follower.task.cancel()
    for watch in watches:
        await anext(watch)
    del watch, watches
    await asyncio.sleep(0.2)
    assert len(asyncio.all_tasks()) == 1


# Leases.


async def test_a_lost_lease_is_named(opened, unharmed):
    """A lease that ran out can neither be kept nor written under; a new one can."""
    store = await opened(unharmed.options(prefix="/lost/"))
    lease = await store.lease(1)
    start = await store.commit(Change(puts={"alive": b"1"}), lease)
    watch = store.watch("", start + 1)
    async with asyncio.timeout(8):
        ((event,),) = [await anext(watch)]
    assert event.value is None
    with pytest.raises(StoreError, match="the lease has run out; take a new one"):
        await lease.keep()
    with pytest.raises(StoreError, match="the lease has run out; nothing was written"):
        await store.commit(Change(puts={"alive": b"2"}), lease)
    await store.commit(Change(puts={"alive": b"3"}), await store.lease(60))


async def test_a_lease_is_kept_while_writes_fail_over(opened, three):
    """While the member in use stands still, writes wait for it and the lease is kept."""
    follower = three.follower()
    store = await opened(three.options(follower))
    lease = await store.lease(60)
    await store.commit(Change(puts={"alive": b"1"}), lease)
    follower.stop()
    with within(2.5):
        _, kept = await asyncio.gather(
            put(store, a="1"), lease.keep(), return_exceptions=True
        )
    assert kept is None
    assert "alive" in (await store.read("")).items


# A full store.


async def test_a_full_store_still_deletes(opened, tmp_path):
    """
    When etcd is full, what takes something back goes on, and the rest says why not.

    1. Values are written until etcd refuses.
    2. A commit that puts is refused, a lease cannot be taken.
    Result: the lease is kept, keys are read, watched and deleted.
    """
    with etcd_server.running(tmp_path, extra=("--quota-backend-bytes", "200000")) as c:
        store = await opened(c.options())
        lease = await store.lease(60)
        await store.commit(Change(puts={"alive": b"1"}), lease)
        full = "cannot write to etcd: etcd is full: compact, defragment and `etcdctl"
        written = 0
        with pytest.raises(StoreError, match=full):
            for written in range(500):
                await store.commit(Change(puts={f"k{written}": b"x" * 50_000}))
                # etcd looks at its file, which it writes ten times a second.
                await asyncio.sleep(0.02)
        with pytest.raises(StoreError, match=full):
            await store.commit(Change(puts={"a": b"1"}, deletes=frozenset({"k0"})))
        with pytest.raises(StoreError, match="etcd is full"):
            await store.lease(60)
        await lease.keep()
        listing = await store.read("")
        follower = Follower(store, listing.revision + 1)
        seen = listing.items["k0"].revision
        await store.commit(Change(expect={"k0": seen}, deletes=frozenset({"k0"})))
        await follower.has("k0")
        follower.task.cancel()
        assert "k0" not in (await store.read("")).items


# Members that stop and die.


async def test_a_member_that_is_away_is_passed_over(unharmed, monkeypatch):
    """A write goes past members that do not listen, or only take connections."""
    # grpc itself gives up a connection only after 20 s then.
    monkeypatch.setattr("cnmdriver.store.etcd.rpc.OPTIONS", ())
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        endpoints = ("127.0.0.1:1", f"127.0.0.1:{port}", *unharmed.endpoints)
        store = EtcdStore(Options(endpoints=endpoints, prefix="/away/"))
        with within(1.5):
            await put(store, a="1")
        with within(0.5):
            await put(store, a="2")
        await store.close()


async def test_no_member_is_a_sentence(opened):
    """If no member answers every call ends within 3 s and names them and the reason."""
    store = EtcdStore(Options(endpoints=("127.0.0.1:1", "127.0.0.1:2")))
    text = (
        "cannot read etcd: no member of 127.0.0.1:1, 127.0.0.1:2 did it within 3 s; "
        "127.0.0.1:[12]: .*Connection refused.*"
    )
    calls = [
        store.open(),
        store.read(""),
        put(store, a="1"),
        store.lease(5),
        anext(store.watch("", 1)),
    ]
    with within(3.6):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreError] * 5
    assert re.fullmatch(text, str(outcomes[0]))
    await store.close()


async def test_an_unknown_name_is_a_sentence(opened, unharmed):
    """A member whose name nobody knows is passed over, and named if it is the last."""
    unknown = "nobody.invalid:2379"
    endpoints = (unknown, *unharmed.endpoints)
    store = await opened(Options(endpoints=endpoints, prefix="/name/"))
    await put(store, a="1")
    store = EtcdStore(Options(endpoints=(unknown,)))
    with pytest.raises(StoreError, match=f"{unknown}: its name is not known"):
        await store.open()
    await store.close()


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("which", ["leader", "follower"])
async def test_fail_over(opened, three, which, how):
    """
    The loss of any member costs reads no error, and writes none but a lost answer.

    1. A store uses the member; a watch is open there. Another store writes elsewhere.
    2. The member is stopped, or killed; the store reads, writes and reads.
    Result: reading takes at most 3 s, writing goes on, the watch misses nothing.
    """
    member: Server = getattr(three, which)()
    other = await opened(three.options(next(s for s in three.servers if s != member)))
    store = await opened(three.options(member))
    start = await put(store, before="1") + 1
    follower = Follower(store, start)
    await put(other, first="1")
    await follower.has("first")
    getattr(member, how)()
    with within(3.2):
        assert "before" in (await store.read("")).items
    await put(store, second="1")
    await patiently(other, "third")
    await follower.has("third")
    assert list(dict.fromkeys(follower.keys)) == ["first", "second", "third"]
    revisions = [event.revision for event in follower.events]
    assert revisions == sorted(set(revisions))
    follower.task.cancel()
    await store.close()


async def test_a_watch_misses_nothing_while_members_die(opened, three):
    """
    Each acknowledged write is seen once and in order, whoever dies.

    1. Two stores, one writing and one watching, at different members.
    2. The watcher's member is stopped, then goes on; the writer's is killed and
       started again; the leader is stopped and goes on.
    Result: the watch had all writes that were acknowledged.
    """
    a, b = three.servers[0], three.servers[1]
    writer, watcher = await opened(three.options(a)), await opened(three.options(b))
    follower = Follower(watcher, await put(writer, begin="1") + 1)
    done, said = asyncio.Event(), []

    async def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            with contextlib.suppress(UnknownOutcomeError):
                await put(writer, **{f"n{number:05}": "x"})
                said.append(f"n{number:05}")
            await asyncio.sleep(0.01)

    writing = asyncio.create_task(write())
    for harm, mend in (
        (b.stop, b.go_on),
        (a.kill, lambda: three.start(a)),
        (three.leader().stop, None),
    ):
        await asyncio.sleep(0.3)
        harm()
        await asyncio.sleep(2.2)
        if mend is not None:
            mend()
            three.wait(a, b)
    done.set()
    await writing
    await patiently(writer, "last")
    await follower.has("last")
    follower.task.cancel()
    revisions = [event.revision for event in follower.events]
    assert revisions == sorted(revisions)
    assert len(set(follower.keys)) == len(follower.keys)
    assert set(said) <= set(follower.keys)
    assert len(said) > 100
    await writer.close()
    await watcher.close()


async def test_a_lost_answer_is_not_repeated(opened, three):
    """
    A write whose answer was lost is reported as such, and not sent to another member.

    1. The leader, which the store uses, stands still; 40 writes are sent to it.
    2. They all end; the others elect a leader.
    Result: each is an UnknownOutcomeError, and none of the keys is in the store.
    """
    leader, other = three.leader(), three.follower()
    store = await opened(three.options(leader))
    await put(store, before="1")
    leader.stop()
    with within(1.5):
        outcomes = await asyncio.gather(
            *(put(store, **{f"k{n}": "x"}) for n in range(40)), return_exceptions=True
        )
    assert {type(outcome) for outcome in outcomes} == {UnknownOutcomeError}
    assert "nobody knows whether it was written: " in str(outcomes[0])
    reader = await opened(three.options(other))
    assert list((await reader.read("")).items) == ["before"]
    leader.go_on()


async def test_a_lost_quorum(opened, three):
    """
    Without a quorum every call ends in time, and all is well when it is back.

    1. Two of three members are stopped; a watch is open at the third.
    2. The store is read and written; then the members go on.
    Result: StoreErrors within 3 s, a StoreError from the watch; later all works.
    """
    alone = three.servers[0]
    store = await opened(three.options(alone))
    start = await put(store, before="1") + 1
    follower = Follower(store, start)
    for server in three.servers[1:]:
        server.stop()
    calls = store.read(""), put(store, a="1"), store.lease(5)
    with within(3.6):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)
    with pytest.raises(StoreError, match="kept a watch"):
        async with asyncio.timeout(6):
            await follower.task
    for server in three.servers[1:]:
        server.go_on()
    with within(6):
        await patiently(store, "after")
    follower = Follower(store, start)
    await follower.has("after")
    follower.task.cancel()


async def test_a_member_that_starts_again(opened, one):
    """When the only member is killed and started again, watch and calls go on."""
    store = await opened(one.options())
    follower = Follower(store, await put(store, before="1") + 1)
    await put(store, first="1")
    await follower.has("first")
    one.end()
    one.start()
    assert "first" in (await store.read("")).items
    await put(store, second="1")
    await follower.has("second")
    assert follower.keys == ["first", "second"]
    follower.task.cancel()


class Wire:
    """A proxy before a member: a cable that can be cut, or made to lose everything."""

    def __init__(self, server: Server) -> None:
        """Lead to a member."""
        self.server = server
        self.lossy: set[asyncio.StreamWriter] = set()
        self.ends: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self.listener = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        port = self.listener.sockets[0].getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        self.cut()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def connect(self, reader, writer) -> None:
        there = await asyncio.open_connection(self.server.address, self.server.client)
        self.ends += [writer, there[1]]
        self.tasks += [
            asyncio.create_task(self.carry(reader, there[1])),
            asyncio.create_task(self.carry(there[0], writer)),
        ]

    async def carry(self, reader, writer) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self.lossy:
                    writer.write(data)
        writer.close()

    def cut(self) -> None:
        """Break all connections."""
        for writer in self.ends:
            writer.transport.abort()

    def lose(self) -> None:
        """Let the connections there are stand, but carry nothing any more."""
        self.lossy.update(self.ends)


@pytest.mark.parametrize("how", ["cut", "lose"])
async def test_a_broken_connection(opened, one, how, monkeypatch):
    """
    A watch goes on after its connection broke, or carries nothing any more.

    1. A store is connected through a wire to the only member; a watch is open.
    2. The wire's connections break, or lose all. Another store writes meanwhile.
    Result: the watch has it; reads and writes work.
    """
    # Not grpc's own pings are meant, which take longer.
    monkeypatch.setattr("cnmdriver.store.etcd.rpc.OPTIONS", ())
    direct = await opened(one.options())
    async with Wire(one.servers[0]) as wire:
        # Two ways to one member: what is lost is a connection, not the member.
        endpoints = (wire.endpoint, wire.endpoint.replace("127.0.0.1", "localhost"))
        store = await opened(Options(endpoints=endpoints))
        follower = Follower(store, await put(store, before="1") + 1)
        await put(direct, first="1")
        await follower.has("first")
        getattr(wire, how)()
        await put(direct, second="1")
        await follower.has("second", 4)
        assert "second" in (await store.read("")).items
        await patiently(store, "third")
        await follower.has("third")
        follower.task.cancel()
        await store.close()


async def test_an_open_watch_survives_a_compaction(opened, one):
    """A compaction disturbs no watch that has seen what is forgotten."""
    store = await opened(one.options())
    follower = Follower(store, await put(store, before="1") + 1)
    for key in ("first", "second"):
        await put(store, **{key: "1"})
        await follower.has(key)
        one.compact()
    await put(store, third="1")
    await follower.has("third")
    assert follower.keys == ["first", "second", "third"]
    follower.task.cancel()


async def test_a_watch_that_missed_a_compaction_says_so(opened, three):
    """A watch whose member stood still over a compaction ends with CompactedError."""
    away = three.follower()
    others = [server for server in three.servers if server is not away]
    writer = await opened(three.options(others[0]))
    store = await opened(three.options(away))
    follower = Follower(store, await put(store, before="1") + 1)
    await put(writer, first="1")
    await follower.has("first")
    away.stop()
    await put(writer, second="1")
    await put(writer, third="1")
    Cluster(others).compact()
    with pytest.raises(CompactedError, match="has forgotten revision"):
        async with asyncio.timeout(6):
            await follower.task
    assert follower.keys == ["first"]


async def test_an_emptied_store_is_noticed(opened, one):
    """
    Whoever knows a later revision than the store has is told that it went back.

    1. Records are written and a watch is open; etcd loses all and starts anew.
    Result: the watch, a reading and a writing each say so once; then all works.
    """
    store, writer = await opened(one.options()), await opened(one.options())
    for number in range(5):
        start = await put(store, a=str(number)) + 1
        await put(writer, a=str(number))
    follower = Follower(store, start)
    await follower.has("a")
    one.empty()
    one.start()
    one.wait()
    back = "went back from revision 11 to 1: it was restored or emptied"
    with pytest.raises(RewoundError, match=back):
        async with asyncio.timeout(6):
            await follower.task
    with pytest.raises(RewoundError, match=back):
        await store.read("")
    assert (await store.read("")).items == {}
    with pytest.raises(RewoundError, match="went back from revision 11 to 2"):
        await put(writer, a="new")
    assert await put(writer, a="newer") == 3
    assert list((await store.read("")).items) == ["a"]


async def test_closing_is_quick(opened, unharmed):
    """A store with open watches closes at once, and the watches end."""
    store = await opened(unharmed.options(prefix="/closing/"))
    start = await put(store, a="1")
    followers = [Follower(store, start) for _ in range(3)]
    for follower in followers:
        await follower.has("a")
    with within(0.5):
        await store.close()
        for follower in followers:
            await follower.task


async def test_closing_while_members_are_away(opened, one):
    """A store is closed in time although its member stands still."""
    store = await opened(one.options())
    follower = Follower(store, await put(store, a="1") + 1)
    one.servers[0].stop()
    reading = asyncio.create_task(store.read(""))
    await asyncio.sleep(0.1)
    with within(2):
        await store.close()
        with pytest.raises(StoreError):
            await reading
        await follower.task
