"""
The state of the cluster as one host works with it: view, commits, outbox.

A caller gives a *decision*: a plain function that looks at a draft, writes into it and
returns what it found out. If another host was faster, the view is brought up to date
and the decision is made again, so it must have no effects of its own. A refusal is
made on fresh news too, as another host may have just freed what was wanted.

On a shared store every commit expects the host's fence (`session.py`). When an answer
was lost, the fence is written anew and everything read: what is there then has
happened, and what is not never will.

While the store is away, a host goes on with what needs no other's word: it takes back
what it has, and attaches by the addresses of its own blocks. Both go to the outbox and
are written when the store is back. The view is kept in a snapshot, so that this is so
after a restart too.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import structlog

from cnmdriver.errors import Conflict, DriverError, StoreError
from cnmdriver.model import Cluster, Endpoint, Knock, Network, Reservation
from cnmdriver.settling import settled
from cnmdriver.store import records
from cnmdriver.store.base import (
    Change,
    CompactedError,
    Item,
    Listing,
    RaceLostError,
    RewoundError,
    Store,
    UnknownOutcomeError,
)
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.session import Session, UsurpedError
from cnmdriver.store.view import Draft, View, Word

T = TypeVar("T")
Step = Callable[[str], Awaitable[None]]
Decision = Callable[[Draft], T]

TRIES = 50
"""Races a decision may lose in turn; each loss is somebody's progress."""
RELIST = 60.0
"""Seconds between two whole readings: a watch is a hint, the list is the truth."""
SPREAD = (0.9, 1.1)
"""How much of that it is, by chance, so that hosts do not read all at once."""
PAUSE = 1.0
"""Seconds before the store is tried again when it was away."""

LIMIT = 8.0
"""Seconds for a commit with all that it needs; Docker's calls have ten."""
LATEST = 5.0
"""Seconds after which a commit begins no other write, as that may take three."""

AWAY = 2.5
"""Seconds to try a store that is known to be away."""
BATCH = 40
"""Keys of the outbox written at once; a transaction has 128 operations at most."""
CALM = 0.05
"""Seconds between two writings of the snapshot."""

OWN = ("endpoints/", "members/", "addresses/", "blocks/")
"""Records with one writer: a host changes its own without looking."""
ATTACHING = ("endpoints/", "addresses/")
"""Of those, what a host may add without the store."""
CONTACT = "contact"
"""The fact that says when the host last had its place in the store."""

log = structlog.get_logger()


class State:
    """The view, and the only way to change what is behind it."""

    def __init__(
        self,
        store: Store,
        local: LocalDatabase,
        step: Step,
        changed: Callable[[], None],
        *,
        session: Session | None = None,
    ) -> None:
        """
        Take the doors; `changed` is called when others changed something.

        A shared store needs a session, whose fence every commit expects.
        """
        self.store = store
        self.local = local
        self.step = step
        self.changed = changed
        self.session = session
        self.view = View(local.host if store.shared else "")
        self.feed = self.view.feed()
        self.away: str | None = None
        """Why the store cannot be used now, None if it can."""
        self.since = time.time()
        """When that began, in seconds of Unix time: for people."""
        self.told = False
        """Whether it was logged."""
        self.informed = False
        """Whether the view has anything to go by: a snapshot, or the store's word."""
        self.watching: asyncio.Timeout | None = None
        self.unkept = asyncio.Event()
        """Set while the snapshot is behind the view."""
        self.behind = True
        """Whether there may be an outbox to empty."""
        self.recollected = False
        """Whether the view has what an earlier life left in the outbox."""
        self.unsaved: list[Change] = []
        """What not even the outbox took; oldest first."""
        self.saving, self.replaying = asyncio.Lock(), asyncio.Lock()
        self.unsettled: int | None = None
        """The latest fence that a commit expected whose outcome is not known yet."""
        self.rewound = False
        """Whether the store went back and was not read since."""

    async def load(self) -> None:
        """Begin with the snapshot of an earlier life, if there is one."""
        if not self.store.shared:
            return
        self.away = "it has not answered since pynet was started"
        kept = await self.local.snapshot()
        self.view.restore(kept.items, kept.revision)
        # The snapshot has that already.
        self.feed.drain()
        await self.recollect()
        self.informed = bool(kept.items)
        if self.session is not None:
            self.session.recall(await self.local.fact(CONTACT))

    async def open(self) -> None:
        """Read everything, write what waits, and see that the cluster has an id."""
        await self.relist()
        await self.replay()
        await self.found()

    async def found(self) -> None:
        """Make the cluster's record if there is none: the store is empty."""
        identity = Cluster(id=secrets.token_hex(8), schema=records.SCHEMA)

        def decide(draft: Draft) -> None:
            known = draft.get(Cluster, records.CLUSTER)
            if known is None:
                draft.put(records.CLUSTER, identity)
            elif known.schema > records.SCHEMA:
                raise Conflict(
                    f"the store has schema {known.schema}, this pynet knows "
                    f"{records.SCHEMA}; upgrade this host"
                )

        await self.commit(decide)

    async def relist(self) -> bool:
        """Read everything anew. Tell whether there was news."""
        before = self.view.turns
        await self.read()
        # The watch may have brought it meanwhile.
        return self.view.turns != before

    async def read(self) -> Listing:
        """
        Read everything into the view.

        If the store went back, what the view shows and the store lacks stays, and is
        in `view.missing`: a host's own records there are for it to publish again.
        """
        known = self.view.listed
        try:
            listing = await self.store.read("")
        except RewoundError:
            self.rewound = True
            listing = await self.store.read("")
        rewound = self.rewound or listing.revision < known or self.is_another(listing)
        items = listing.items.items()
        news = self.view.replace(items, listing.revision, rewound=rewound)
        self.rewound = False
        self.informed = True
        if rewound:
            log.warning("store.rewound", known=known, revision=listing.revision)
        self.unkept.set()
        self.heed()
        if news:
            self.changed()
        return listing

    def heed(self) -> None:
        """Let the session know if somebody asks for this host."""
        if self.session is not None:
            knock = self.view.get(Knock, records.knock(self.session.host))
            if knock is not None:
                self.session.hear(knock)

    def is_another(self, listing: Listing) -> bool:
        """Tell whether a store has not the content that this host knows."""
        known = self.view.get(Cluster, records.CLUSTER)
        if known is None:
            return False
        item = listing.items.get(records.CLUSTER)
        return item is None or records.decode(records.CLUSTER, item.value) != known

    async def commit(self, decision: Decision[T]) -> T:
        """
        Decide and write; on a lost race look and decide again.

        Raises what the decision raises, and StoreError if the store is away.
        """
        away = self.away
        limit = LIMIT if away is None else AWAY
        try:
            async with asyncio.timeout(limit):
                return await self.decide(decision)
        except TimeoutError:
            if away is not None:
                raise self.absent(away) from None
            raise StoreError(
                f"the store did not take a change within {limit:g} s; try again"
            ) from None
        except StoreError as error:
            if away is not None and not isinstance(error, UsurpedError):
                raise self.absent(away) from error
            raise

    def absent(self, reason: str) -> StoreError:
        """Make the refusal of what cannot be done without the store."""
        since = time.strftime("%H:%M:%S UTC", time.gmtime(self.since or time.time()))
        return StoreError(
            f"the store has been away since {since}: {reason}; try again when it is "
            "back"
        )

    async def commit_own(self, decision: Decision[T]) -> T:
        """
        Decide about this host's own endpoints and their addresses, and write that.

        If the store is away, what needs nobody else's word is done all the same, and
        written when the store is back; for the rest StoreError is raised.
        """
        if self.away is not None and self.store.shared:
            return await self.go_alone(decision, self.away)
        if self.session is None or not self.session.trusted:
            return await self.commit(decision)
        try:
            async with asyncio.timeout(AWAY):
                return await self.decide(decision)
        except UsurpedError:
            raise
        except (StoreError, TimeoutError) as error:
            reason = self.suspect(error)
            return await self.go_alone(decision, reason)

    async def go_alone(self, decision: Decision[T], reason: str) -> T:
        """Decide without the store; raises StoreError for what needs it."""
        if self.session is None or not self.session.trusted:
            raise self.absent(reason)
        draft = Draft(self.view, alone=str(self.absent(reason)))
        result = decision(draft)
        change = draft.change()
        if any(not key.startswith(ATTACHING) for key in change.written()):
            raise self.absent(reason)
        if change:
            log.debug("store.alone", keys=sorted(change.written()))
            await self.step("alone.before")
            await self.defer(change, must=True)
            await self.step("alone.after")
        return result

    async def decide(self, decision: Decision[T]) -> T:
        """Do what `commit` says, without its limit."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + LATEST
        refused = not self.store.shared
        for _ in range(TRIES):
            await self.prepare()
            draft = Draft(self.view)
            try:
                result = decision(draft)
            except DriverError:
                if refused or not await self.news():
                    raise
                refused = True
                continue
            change = draft.change()
            if not change:
                return result
            if loop.time() > latest:
                raise StoreError("the store is too slow for this change; try again")
            if await self.written(change):
                return result
        raise StoreError("lost 50 races for the same record in turn; try again")

    async def prepare(self) -> None:
        """Settle what was before: the next decision must not be undone by it."""
        if self.unsettled is not None:
            await self.settle()
        if self.behind:
            await self.replay()
        if self.session is not None and not self.session.revision:
            await self.session.renew()

    async def news(self) -> bool:
        """Read everything anew; tell if a decision made before may be another now."""
        try:
            return await self.relist()
        except StoreError:
            return False

    async def written(self, change: Change) -> bool:
        """Write a transaction; tell if it is written, else it is to be decided anew."""
        change = self.fenced(change)
        try:
            await self.write(change)
        except RaceLostError as race:
            self.learn(race, change)
            if partial(race, change):
                await self.read()
        except (UnknownOutcomeError, RewoundError):
            return has(await self.settle(), change)
        else:
            return True
        return False

    def fenced(self, change: Change) -> Change:
        """Return a transaction that expects this host's fence too."""
        if self.session is None:
            return change
        return replace(change, expect={**change.expect, **self.session.expect()})

    def learn(self, race: RaceLostError, change: Change) -> None:
        """Take in why a race was lost; raises StoreError if we are not this host."""
        self.hear(
            (key, item.value, item.revision) if item else (key, None, race.revision)
            for key, item in race.current.items()
        )
        if self.session is not None:
            seen = change.expect.get(self.session.fence, 0)
            self.session.judge(race.current, seen)

    def hear(self, news: Iterable[tuple[str, bytes | None, int]]) -> None:
        """Take in keys, values and revisions, and tell if that was news."""
        before = self.view.turns
        for key, value, revision in news:
            self.view.write(key, value, revision)
        if self.view.turns != before:
            self.unkept.set()
            self.heed()
            self.changed()

    async def settle(self) -> Listing:
        """Make sure that nothing sent before will yet be written, and read all."""
        seen = self.unsettled
        if self.session is not None and seen is not None:
            await self.session.bump(seen)
        listing = await self.read()
        if self.unsettled == seen:
            self.unsettled = None
        return listing

    async def write(self, change: Change) -> None:
        """
        Commit a transaction and take it into the view.

        A cancel counts when that has ended, so that its caller can take it back.
        """
        await self.step("commit.before")
        await settled(self.end(change))
        if change.deletes:
            # Whoever begins with an older snapshot would publish again what is gone.
            await self.keep()
        await self.step("commit.after")

    async def end(self, change: Change) -> None:
        """Commit and take in a transaction; news of what it deletes is its own."""
        self.view.ending.update(change.deletes)
        try:
            self.take(change, await self.send(change))
        finally:
            self.view.ending.subtract(change.deletes)
            self.view.ending += Counter()

    async def send(self, change: Change) -> int:
        """Commit a transaction, and remember if its outcome is not known."""
        try:
            return await self.store.commit(change)
        except (UnknownOutcomeError, RewoundError) as error:
            self.rewound |= isinstance(error, RewoundError)
            seen = change.expect.get(self.session.fence, 0) if self.session else 0
            self.unsettled = max(self.unsettled or 0, seen)
            raise

    def take(self, change: Change, revision: int) -> None:
        """Let the view know of our own write without waiting for the watch."""
        for key, value in change.puts.items():
            self.view.write(key, value, revision)
        for key in change.deletes:
            self.view.write(key, None, revision, ours=True)
        self.unkept.set()

    async def remove(self, decision: Decision[T]) -> T:
        """
        Take something back and write that; never fails for the store's sake.

        If the store is away, what it changes of this host's own records goes to the
        outbox and is replayed; what hosts share is left to a later audit.
        """
        if self.away is not None:
            # Docker waits for each removal; what is known need not be found out again.
            return await self.put_off(decision, self.away)
        try:
            return await self.commit(decision)
        except StoreError as error:
            self.doubt()
            return await self.put_off(decision, str(error))

    async def put_off(self, decision: Decision[T], reason: str) -> T:
        """Decide, and write what is this host's own when the store is back."""
        draft = Draft(self.view)
        result = decision(draft)
        change = own(draft.change())
        log.warning("store.deferred", keys=sorted(change.written()), error=reason)
        if change:
            await self.defer(change)
        return result

    async def defer(self, change: Change, *, must: bool = False) -> None:
        """
        Take a change into the view, and write it when the store is back.

        Raises StoreError if it `must` outlive this process and cannot. Nothing may stop
        a removal, not even a full disk: that is remembered as long as we live.
        """
        if not must:
            self.foresee(change)
            self.unsaved.append(change)
            with contextlib.suppress(StoreError):
                async with self.saving:
                    await self.save()
            return
        async with self.saving:
            await self.save()
            try:
                await self.local.remember(change, taking=True)
            except asyncio.CancelledError:
                # It may be written, and its caller takes it back.
                self.foresee(change)
                raise
            self.foresee(change)

    def foresee(self, change: Change) -> None:
        """Let the view know what the store will when it is back."""
        for key in sorted(change.written()):
            self.view.foresee(key, change.puts.get(key))
        self.behind = True
        self.unkept.set()
        # The store may have come back since it was found away: who follows it looks.
        self.doubt()

    async def save(self) -> None:
        """Write into the outbox what could not be written there before."""
        while self.unsaved:
            await self.local.remember(self.unsaved[0])
            del self.unsaved[0]

    async def troubles(self) -> tuple[str, ...]:
        """Say what keeps the disks of this host's files from taking anything new."""
        found = [await self.local.trouble(), await self.store.trouble()]
        return tuple(dict.fromkeys(filter(None, found)))

    async def recollect(self) -> None:
        """Let the view know what an earlier life has left in the outbox."""
        for _, change in await self.local.pending():
            self.foresee(change)
        self.recollected = True

    async def replay(self, *, once: bool = False) -> None:
        """
        Write what the store has yet to hear, and empty the outbox.

        If only `once`, what is put off meanwhile waits for the next time.

        The outbox is for the next life; in this one the view knows each last word.
        """
        async with self.replaying:
            if not self.recollected:
                await self.recollect()
            while self.behind:
                async with self.saving:
                    # No entry is made meanwhile of which the view does not know.
                    entries = await self.local.pending()
                    ahead = dict(self.view.ahead)
                for part in parts(ahead):
                    await self.repeat(part)
                # What the outbox forgets the snapshot has.
                await self.keep()
                async with self.saving:
                    if entries:
                        await self.local.done(entries[-1][0])
                    left = self.view.ahead.keys()
                    self.unsaved = [c for c in self.unsaved if c.written() & left]
                    self.behind = bool(left)
                if once:
                    break

    async def repeat(self, words: Mapping[str, Word]) -> None:
        """Write what the store has yet to hear, until it surely has."""
        for _ in range(TRIES):
            left = await self.still_ours(words)
            if not left:
                return
            change = self.fenced(left)
            try:
                revision = await self.send(change)
            except RaceLostError as race:
                self.learn(race, change)
            except (UnknownOutcomeError, RewoundError):
                await self.settle()
            else:
                for key in left.written():
                    self.view.confirm(key, words[key], words[key].value, revision)
                self.unkept.set()
                return
        raise StoreError("lost 50 races for what is deferred; try again")

    async def still_ours(self, words: Mapping[str, Word]) -> Change:
        """
        Return the transaction of what no other host has taken since.

        An address that was given back, or that others freed while this host was away,
        may be another's by now. A host that is alone need not look.
        """
        change = spoken(words)
        if self.session is None:
            return change
        if not self.session.revision:
            await self.session.renew()
        keys, host = sorted(change.written()), self.session.host
        listings = await asyncio.gather(*map(self.store.read, keys))
        found = {
            key: one.items.get(key) for key, one in zip(keys, listings, strict=True)
        }
        items = {key: item for key, item in found.items() if item is not None}
        before = self.view.turns
        left = []
        for key in keys:
            item = items.get(key)
            if item is not None and is_anothers(key, item, host):
                self.view.confirm(key, words[key], item.value, item.revision)
            else:
                left.append(key)
        for key in [k for k in left if self.is_late(k, words[k].value)]:
            # It is reported as long as it stays, and published by nobody.
            if self.view.heard(key, words[key]):
                self.view.miss(key)
            left.remove(key)
        if self.view.turns != before:
            self.unkept.set()
            self.changed()
        return Change(
            expect={k: items[k].revision if k in items else 0 for k in left},
            puts={k: v for k, v in change.puts.items() if k in left},
            deletes=change.deletes.intersection(left),
        )

    def is_late(self, key: str, value: bytes | None) -> bool:
        """Tell whether an endpoint has an address that is another host's by now."""
        record: object = None
        if value is not None:
            with contextlib.suppress(StoreError):
                record = records.decode(key, value)
        if self.session is None or not isinstance(record, Endpoint):
            return False
        network = self.view.get(Network, records.network(record.network))
        for subnet in network.subnets if network is not None else ():
            for address in record.addresses:
                taken = records.address(subnet.space, subnet.pool, address.ip)
                held = self.view.get(Reservation, taken)
                if held is not None and held.host != self.session.host:
                    return True
        return False

    async def follow(self) -> None:
        """Keep the view true until cancelled: read everything, watch, and again."""
        while True:
            try:
                await self.catch_up()
                async with asyncio.timeout(interval()) as self.watching:
                    await self.watch()
            except TimeoutError:
                pass
            except CompactedError:
                log.info("store.compacted")
            except StoreError as error:
                self.rewound |= isinstance(error, RewoundError)
                self.note(str(error))
                await asyncio.sleep(PAUSE)

    def suspect(self, error: StoreError | TimeoutError) -> str:
        """Take the store for away until it was asked again; return why."""
        cause = error.__cause__
        # Of a store that was away already, what it had said, not that it was away.
        reason = str(cause if isinstance(cause, StoreError) else error)
        reason = reason or f"it did not answer within {AWAY:g} s"
        self.note(reason)
        self.doubt()
        return reason

    def doubt(self) -> None:
        """Have the store asked whether it is there: a call found it away."""
        if self.watching is not None and not self.watching.expired():
            with contextlib.suppress(RuntimeError):
                self.watching.reschedule(asyncio.get_running_loop().time())

    async def watch(self) -> None:
        """Take in what others write, until the watch ends."""
        async for events in self.store.watch(
            "", self.view.listed + 1, end=records.WATERMARKS
        ):
            self.hear((e.key, e.value, e.revision) for e in events)

    async def catch_up(self) -> None:
        """Replay the outbox and read everything; raises StoreError."""
        if self.unsettled is not None:
            # A full store refuses that, and can still be followed.
            with contextlib.suppress(StoreError):
                await self.settle()
        await self.read()
        await self.replay(once=True)
        # What is put off until it is known to be back would put that off too.
        self.note(None)
        await self.replay()

    def note(self, reason: str | None) -> None:
        """Remember, and log once, that the store went away or came back."""
        if reason is not None and self.away is None:
            self.since = time.time()
        self.away = reason
        if (reason is not None) != self.told:
            self.told = not self.told
            if reason is None:
                log.info("store.back")
            else:
                log.warning("store.away", error=reason)

    async def remember(self) -> None:
        """Keep the snapshot up to date until cancelled."""
        while True:
            await self.unkept.wait()
            await self.keep()
            await asyncio.sleep(CALM)

    async def keep(self) -> None:
        """Write the snapshot; what fails is tried again after a while."""
        self.unkept.clear()
        if not self.store.shared:
            return
        keys = self.feed.drain()
        facts = {CONTACT: self.session.contact} if self.session is not None else {}
        try:
            await self.local.keep(self.items(keys), self.view.listed, facts)
        except StoreError as error:
            self.remind(keys)
            log.warning("snapshot.not_kept", error=str(error))
            asyncio.get_running_loop().call_later(PAUSE, self.unkept.set)
        except asyncio.CancelledError:
            # It may never have come to its turn.
            self.remind(keys)
            self.unkept.set()
            raise

    def remind(self, keys: Iterable[str]) -> None:
        """Have keys written with the next snapshot."""
        for key in keys:
            self.feed.add(key)

    def items(self, keys: Iterable[str]) -> dict[str, Item | None]:
        """Return what the view has under keys, as the store would."""
        found: dict[str, Item | None] = {}
        # A key that is no text never was a record's, and the file cannot name it.
        for key in filter(is_text, keys):
            record = self.view.get(object, key)
            found[key] = None if record is None else Item(
                value=records.encode(record), revision=self.view.seen(key)
            )  # fmt: skip
        return found


def interval() -> float:
    """Return the seconds until everything is read anew."""
    return RELIST * random.uniform(*SPREAD)  # noqa: S311  nobody gains by guessing it


def is_text(key: str) -> bool:
    """Tell whether a key of the store is UTF-8."""
    return key.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in key)


def parts(ahead: Mapping[str, Word]) -> list[dict[str, Word]]:
    """
    Divide what the store has yet to hear into what it takes at once.

    Each is of this host's own records, which nobody else looks at together. But an
    endpoint goes before its addresses are free, and comes when they are surely ours.
    """

    def rank(key: str) -> int:
        if not key.startswith("endpoints/"):
            return 1
        return 0 if ahead[key].value is None else 2

    keys = sorted(ahead, key=rank)
    groups = (keys[i : i + BATCH] for i in range(0, len(keys), BATCH))
    return [{key: ahead[key] for key in group} for group in groups]


def spoken(words: Mapping[str, Word]) -> Change:
    """Return the transaction that tells the store."""
    values = {key: word.value for key, word in words.items()}
    return Change(
        puts={k: v for k, v in values.items() if v is not None},
        deletes=frozenset(k for k, v in values.items() if v is None),
    )


def own(change: Change) -> Change:
    """Return the part of a change that no other host may contradict."""
    return Change(
        puts={k: v for k, v in change.puts.items() if k.startswith(OWN)},
        deletes=frozenset(k for k in change.deletes if k.startswith(OWN)),
    )


def is_anothers(key: str, item: Item, host: str) -> bool:
    """Tell whether what is stored under a key belongs to another host."""
    with contextlib.suppress(StoreError):
        return getattr(records.decode(key, item.value), "host", host) != host
    return False


def partial(race: RaceLostError, change: Change) -> bool:
    """
    Tell whether a lost race is news of a group whose records are not in it.

    Who changes a space's record has changed others, and decisions rely on having seen
    all of them when they have seen that one.
    """
    return any(
        key.startswith("spaces/")
        and (item.revision if item else 0) != change.expect.get(key, 0)
        for key, item in race.current.items()
    )


def has(listing: Listing, change: Change) -> bool:
    """
    Tell whether a transaction whose answer was lost is in the store.

    A put of ours that is there at another revision than expected is its trace; all
    else that it wrote must be as old, or newer. Of deletions alone there is no trace,
    and none of puts that were all written over since: those are decided again, so a
    decision must not mind being made again on what it wrote itself.
    """
    items = listing.items
    traces = {
        item.revision
        for key, value in change.puts.items()
        if (item := items.get(key)) is not None
        and item.value == value
        and item.revision != change.expect.get(key, 0)
    }
    return any(consistent(items, change, revision) for revision in traces)


def consistent(items: Mapping[str, Item], change: Change, revision: int) -> bool:
    """Tell whether a listing can follow from a transaction written at a revision."""
    puts = all(
        (item := items.get(key)) is not None
        and (item.revision > revision or (item.value, item.revision) == (v, revision))
        for key, v in change.puts.items()
    )
    deleted = all(
        (item := items.get(key)) is None or item.revision > revision
        for key in change.deletes
    )
    return puts and deleted
