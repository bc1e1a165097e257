"""
A host's life in a shared store: its lease, its fence, its identity.

Three keys say how a host is. `alive/` and `fence/` are on one short lease: while it is
kept the host is seen by the others, and every commit of the host expects the fence at
the revision it was written at. So a host that was stopped past its lease cannot write,
and what was sent and not answered can be made void by writing the fence anew. `kept/`
is on a long lease: a host that is not alive but kept may come back.

A host that finds itself alive after a reboot *knocks*: if that is a second machine with
its identity, which watches the store, it answers by writing its sign of life anew.
Nobody answers for the host's own last life, whose lease has only not run out yet.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from cnmdriver.errors import Conflict, StoreError
from cnmdriver.model import Alive, Fence, Kept, Knock
from cnmdriver.store import records
from cnmdriver.store.base import (
    Change,
    Item,
    Lease,
    RaceLostError,
    Store,
    UnknownOutcomeError,
)

TRIES = 10
"""Times the fence is written anew until an answer tells that it was."""
POLL = 0.25
"""Seconds between two looks whether another is alive."""
KNOCK = 3.0
"""Seconds for an answer: one to notice that a watch is broken, and one to write."""
RETRY = 1.0
"""Seconds, at most, before a lease that could not be kept is tried again."""
REST = 2.0
"""Seconds a clean stop may take."""
REKEPT = 3600.0
"""Seconds, at most, between two renewals of the long lease."""
OFTEN = 8
"""Renewals, at least, in its time: half of that is what a host may be alone for."""

log = structlog.get_logger()


def clock() -> float:
    """Return seconds of a clock that nobody sets and that counts in suspend too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def nothing() -> None:
    """Tell nobody."""


class UsurpedError(StoreError):
    """Another pynet is this host in the store: nothing may be done in its name."""


class Session:
    """A host's leases, and the fence that its commits expect."""

    def __init__(
        self,
        store: Store,
        host_id: str,
        boot: str,
        *,
        ttl: float = 15.0,
        keep: float = 86400.0,
    ) -> None:
        """Name the host and the times of its two leases; nothing is written yet."""
        self.store = store
        self.host = host_id
        self.boot = boot
        self.instance = secrets.token_hex(8)
        self.began = time.time()
        self.ttl = ttl
        self.keep = keep
        self.changed: Callable[[], None] = nothing
        """Called when `hidden` flips."""
        self.revision = 0
        """Of the fence as we wrote it; 0 if we have none."""
        self.count = -1
        self.lease: Lease | None = None
        self.long: Lease | None = None
        self.long_kept = 0.0
        self.deadline = 0.0
        """When the short lease runs out unless it is kept: counted from before that."""
        self.lost = clock()
        self.told = True
        self.writing = asyncio.Lock()
        self.opening = asyncio.Lock()
        self.knocks: set[str] = set()
        self.poked = asyncio.Event()

    @property
    def hidden(self) -> bool:
        """Tell whether other hosts must be taken to see us no more."""
        return not self.revision or clock() >= self.deadline

    @property
    def since(self) -> float | None:
        """Return when we were hidden, by `clock()`; None if we are not."""
        if not self.hidden:
            return None
        return self.deadline if self.revision else self.lost

    @property
    def trusted(self) -> bool:
        """Tell whether others surely still leave this host's blocks to it."""
        return bool(self.long_kept) and clock() < self.long_kept + self.keep / 2

    @property
    def contact(self) -> str:
        """Say when the host was last in the store, for a later life to `recall`."""
        return f"{self.boot} {self.long_kept}" if self.long_kept else ""

    def recall(self, contact: str) -> None:
        """Take over what an earlier life knew; a reboot makes that worthless."""
        boot, _, kept = contact.partition(" ")
        if boot == self.boot:
            self.long_kept = max(self.long_kept, float(kept))

    async def open(self) -> None:
        """
        Take the host's place; find out whose life stands in the way if one does.

        Raises StoreError if the store is away, and Conflict if a second machine runs
        with this host's identity.
        """
        async with self.opening:
            other = await self.attempt()
            if other is not None and not await self.knock(other):
                raise Conflict(self.cloned(other))

    async def renew(self) -> None:
        """Take the host's place anew if it was lost; raises StoreError if it cannot."""
        try:
            await self.open()
        except Conflict as error:
            raise UsurpedError(str(error)) from None

    async def run(self) -> None:
        """
        Keep the leases until cancelled; take new ones when they were lost.

        Raises nothing but the Conflict of a second machine with our identity.
        """
        while True:
            pause = self.ttl / 3
            try:
                await self.turn()
            except StoreError as error:
                log.debug("session.away", error=str(error))
                pause = min(RETRY, pause)
            self.tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.poked.wait()
            self.poked.clear()

    async def turn(self) -> None:
        """Keep both leases once, or open anew; raises StoreError."""
        if not self.revision or self.lease is None:
            await self.open()
            return
        sent, seen = clock(), self.revision
        try:
            await self.lease.keep()
        except StoreError:
            await self.verify(seen)
            if self.revision:
                raise
            await self.open()
            return
        self.deadline = sent + self.ttl
        # With a lease that is over nobody can be answered.
        await self.answer()
        if sent >= self.long_kept + min(self.keep / OFTEN, REKEPT):
            await self.keep_long()

    async def rest(self) -> None:
        """Say that this is a clean stop: what we wrote stays valid. Never fails."""
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(REST):
                await self.lie_down()

    async def lie_down(self) -> None:
        """Move the sign of life to the long lease, and end the short one."""
        if not self.revision or self.lease is None or self.long is None:
            return
        sign = self.sign(resting=True)
        change = Change(expect=self.expect(), puts={records.alive(self.host): sign})
        await self.store.commit(change, self.long)
        await self.lease.revoke()
        self.forget()

    async def leave(self) -> None:
        """Give up the host's place at once, as one that may not serve. Never fails."""
        if self.lease is not None:
            with contextlib.suppress(StoreError, TimeoutError):
                async with asyncio.timeout(REST):
                    await self.lease.revoke()
        self.forget()

    # Who we are, if there are two.

    async def knock(self, other: Alive) -> bool:
        """Ask who is alive as this host to say so; take the place if nobody does."""
        expect, found = await self.look()
        now = expect
        log.info("session.knocking", instance=other.instance, boot=other.boot)
        knock = records.encode(Knock(instance=self.instance))
        await self.store.commit(Change(puts={records.knock(self.host): knock}))
        latest = clock() + KNOCK
        while found is not None and clock() < latest:
            await asyncio.sleep(POLL)
            now, found = await self.look()
            if found is not None and now != expect:
                return False
        async with self.writing:
            await self.keep_long()
            await self.take(now if found is None else expect, knocked=True)
        if not self.revision:
            raise StoreError(
                "lost a race for this host's place in the store; try again"
            )
        return True

    def hear(self, knock: Knock) -> None:
        """Hear that somebody asks whether this host is alive."""
        if knock.instance not in {self.instance, *self.knocks}:
            self.knocks.add(knock.instance)
            self.poked.set()

    async def answer(self) -> None:
        """Say that we are, to those who asked."""
        if not self.knocks:
            return
        heard = frozenset(self.knocks)
        log.warning("session.knocked", instances=sorted(heard))
        change = Change(
            expect=self.expect(),
            puts={records.alive(self.host): self.sign()},
            deletes=frozenset({records.knock(self.host)}),
        )
        await self.store.commit(change, self.lease)
        # Only now: who was not answered is answered at the next turn.
        self.knocks -= heard

    async def utter(
        self, puts: Mapping[str, bytes], deletes: Iterable[str] = ()
    ) -> None:
        """
        Write what ends with this host's lease, and delete other such records.

        Raises StoreError if the store is away, or this host has no lease.
        """
        change = Change(expect=self.expect(), puts=puts, deletes=frozenset(deletes))
        await self.store.commit(change, self.lease)

    # The fence.

    @property
    def fence(self) -> str:
        """Return the key that every commit of this host expects."""
        return records.fence(self.host)

    def expect(self) -> dict[str, int]:
        """Return what a commit must expect; raises StoreError without a lease."""
        if not self.revision:
            raise StoreError("this host has no lease in the store now; try again")
        return {self.fence: self.revision}

    async def bump(self, seen: int) -> None:
        """
        Make void whatever was sent that expects the fence at revision `seen`.

        Safe to repeat. Raises StoreError if that could not be made sure.
        """
        for _ in range(TRIES):
            if not self.revision:
                await self.renew()
            if self.revision != seen:
                return
            async with self.writing:
                await self.count_up(seen)
        raise StoreError("cannot make the host's fence anew in the store; try again")

    async def count_up(self, seen: int) -> None:
        """Write the fence anew if it is still at that revision."""
        if self.revision != seen:
            return
        change = Change(expect={self.fence: seen}, puts={self.fence: self.next_fence()})
        try:
            self.revision = await self.store.commit(change, self.lease)
        except RaceLostError as race:
            self.judge(race.current, seen)
        except UnknownOutcomeError:
            await self.verify(seen)
        except StoreError:
            await self.verify(seen)
            if self.revision == seen:
                raise

    def next_fence(self) -> bytes:
        """Return a fence that was never written before."""
        self.count += 1
        return records.encode(Fence(instance=self.instance, count=self.count))

    def judge(self, current: Mapping[str, Item | None], seen: int) -> bool:
        """
        Tell whether a commit that expected the fence at `seen` was refused for it.

        Takes in what has become of the fence. Raises StoreError if it is another's.
        """
        if self.fence not in current:
            return False
        item = current[self.fence]
        if item is not None and item.revision == seen:
            return False
        if self.revision != seen:
            # Somebody has taken in something newer meanwhile.
            return True
        if item is None:
            self.lose()
            return True
        found = records.decode(self.fence, item.value)
        if not isinstance(found, Fence) or found.instance != self.instance:
            raise UsurpedError(
                f"another pynet (instance {getattr(found, 'instance', '?')}) has taken "
                f"this host's place in the store; stop one of the two"
            )
        self.revision = item.revision
        return True

    async def verify(self, seen: int) -> None:
        """Read the fence and take in what has become of it."""
        listing = await self.store.read(self.fence)
        self.judge({self.fence: listing.items.get(self.fence)}, seen)

    # Taking the place.

    async def attempt(self) -> Alive | None:
        """Take the host's place if it is free; return who has it."""
        async with self.writing:
            for _ in range(TRIES):
                if self.revision:
                    return None
                expect, other = await self.look()
                if other is not None:
                    return other
                await self.keep_long()
                await self.take(expect)
        raise StoreError("lost a race for this host's place in the store; try again")

    async def look(self) -> tuple[dict[str, int], Alive | None]:
        """Return the revisions of the two keys, and who bars us from them."""
        alive = records.alive(self.host)
        expect, other = {}, None
        for key in (alive, self.fence):
            item = (await self.store.read(key)).items.get(key)
            expect[key] = item.revision if item else 0
            if key == alive and item is not None:
                other = self.barred(records.decode(key, item.value))
        return expect, other

    def barred(self, found: object) -> Alive | None:
        """Return who is alive unless it rests, or is our own life on this machine."""
        if not isinstance(found, Alive) or found.resting or found.boot == self.boot:
            return None
        return found

    async def take(self, expect: Mapping[str, int], *, knocked: bool = False) -> None:
        """
        Write both keys on a new lease; a lost race leaves us without them.

        Who has `knocked` takes the knock away.
        """
        sent = clock()
        lease = await self.store.lease(self.ttl)
        fence = self.next_fence()
        change = Change(
            expect=expect,
            puts={records.alive(self.host): self.sign(), self.fence: fence},
            deletes=frozenset({records.knock(self.host)} if knocked else ()),
        )
        try:
            revision = await self.store.commit(change, lease)
        except UnknownOutcomeError:
            revision = await self.landed(fence)
        except RaceLostError:
            revision = 0
        if not revision:
            # Nothing may come of it later: without its lease it cannot be written.
            await lease.revoke()
            return
        self.lease, self.revision = lease, revision
        self.deadline = sent + self.ttl
        self.tell()

    def sign(self, *, resting: bool = False) -> bytes:
        """Return the sign of life as it is stored."""
        return records.encode(
            Alive(
                instance=self.instance,
                boot=self.boot,
                resting=resting,
                since=self.began,
            )
        )

    async def landed(self, fence: bytes) -> int:
        """Return the revision of just this fence, 0 if it is not in the store."""
        item = (await self.store.read(self.fence)).items.get(self.fence)
        return item.revision if item is not None and item.value == fence else 0

    async def keep_long(self) -> None:
        """Keep the long lease, or take one and write the key on it."""
        sent = clock()
        if self.long is not None:
            with contextlib.suppress(StoreError):
                await self.long.keep()
                self.long_kept = sent
                return
        lease = await self.store.lease(self.keep)
        change = Change(puts={records.kept(self.host): records.encode(Kept())})
        try:
            await self.store.commit(change, lease)
        except StoreError:
            # Nobody would end it for a day.
            with contextlib.suppress(StoreError):
                await lease.revoke()
            raise
        self.long, self.long_kept = lease, sent

    # Telling.

    def lose(self) -> None:
        """Note that the lease is over."""
        self.forget()
        self.tell()

    def forget(self) -> None:
        """Have no lease."""
        self.lost = min(clock(), self.deadline)
        self.revision = 0
        self.lease = None

    def tell(self) -> None:
        """Log and call back if we were hidden or came back."""
        hidden = self.hidden
        if hidden == self.told:
            return
        self.told = hidden
        if hidden:
            log.warning("session.hidden", host=self.host)
        else:
            log.info("session.alive", host=self.host, instance=self.instance)
        self.changed()

    def cloned(self, other: Alive) -> str:
        """Say who has our identity, and what to do."""
        return (
            f"another machine is alive in the store as this host {self.host} (boot "
            f"{other.boot}, instance {other.instance}): one's disk is a copy of the "
            "other's; remove local.db from the state directory of one and start it anew"
        )
