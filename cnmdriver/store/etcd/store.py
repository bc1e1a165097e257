"""
The shared store: an etcd cluster, API v3.

Reads are linearizable and consistent over all their pages. A commit is one transaction
that compares the revisions it expects; when its answer is lost nobody can tell whether
it was done *or will be yet* (a member that was stopped may do it when it wakes), so it
is not repeated: see UnknownOutcomeError.

etcd takes 128 operations in a transaction. What is larger is refused, with one
exception: deletes that are too many follow the transaction that has all expectations
and puts, each only where the key was not written since. That is as if they had been in
it, except that others see them a little later; and it may be repeated.
"""

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import islice
from typing import Any

import structlog

from cnmdriver.errors import StoreError
from cnmdriver.store.base import (
    Change,
    Event,
    Item,
    Lease,
    Listing,
    RaceLostError,
    UnknownOutcomeError,
)
from cnmdriver.store.etcd.client import WHOLE, Client, FaultError, now
from cnmdriver.store.etcd.faults import Verdict
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import Member, Metadata, grpc, pb, prefix_end
from cnmdriver.store.etcd.watch import Range, Watch, lost, send, went_back

PAGE = 1000
"""Keys in one answer."""
RESTARTS = 3
"""How often a reading may be overtaken by a compaction."""
MOST = 128
"""Operations that etcd takes in one transaction."""

log = structlog.get_logger()


class EtcdLease:
    """A lease of etcd's."""

    def __init__(self, client: Client, number: int, ttl: int) -> None:
        """Take what etcd granted."""
        self.client = client
        self.number = number
        self.ttl = ttl
        """The seconds etcd gave, which may be more than were asked for."""

    async def keep(self) -> None:
        """Start its time anew; raises StoreError if it has run out."""
        ttl = await self.client.call("keep the lease in etcd", self.ask, login=False)
        if ttl == 0:
            raise StoreError("the lease has run out; take a new one")

    async def ask(self, member: Member, metadata: Metadata, left: float) -> int:
        """Keep it at one member; return the seconds it has now."""
        call = member.lease.LeaseKeepAlive(metadata=metadata, timeout=left)
        try:
            await send(call, pb.LeaseKeepAliveRequest(ID=self.number))
            answer = await call.read()
        finally:
            call.cancel()
        if answer is grpc.aio.EOF:
            raise lost("it ended the stream")
        return int(answer.TTL)

    async def revoke(self) -> None:
        """End it now, and with it its keys."""
        request = pb.LeaseRevokeRequest(ID=self.number)
        with contextlib.suppress(FaultError):
            await self.client.call(
                "end the lease in etcd",
                lambda member, metadata, left: member.lease.LeaseRevoke(
                    request, metadata=metadata, timeout=left
                ),
            )


class EtcdStore:
    """`etcd://host,…`. One object per process and cluster."""

    shared = True

    def __init__(self, options: Options) -> None:
        """Take the address; nothing is connected yet."""
        self.options = options
        self.client = Client(options)
        self.watches: set[Watch] = set()

    async def open(self) -> None:
        """
        Connect, log in, and read a little.

        If that fails the store is open all the same, and works once etcd does.
        """
        first = not self.client.members
        if first and self.options.user and not self.options.tls:
            log.warning(
                "store.plaintext_password",
                why="the password goes to etcd unencrypted; use etcds://",
            )
        self.saw(await self.client.revision())

    async def close(self) -> None:
        """Let go; watches end."""
        self.client.closed = True
        for watch in self.watches:
            watch.end()
        await self.client.close()

    # Reading.

    def reread(self) -> None:
        """Look at the certificates' files now; what cannot be used is logged."""
        self.client.look_again()

    async def read(self, prefix: str) -> Listing:
        """Return all keys that start with the prefix, at one revision."""
        newest, until = self.client.newest, now() + WHOLE
        for _ in range(RESTARTS):
            with contextlib.suppress(FaultError):
                listing = await self.pages(self.root(prefix), until)
                self.saw(listing.revision, newest)
                return listing
        raise StoreError(
            "cannot read etcd: it was compacted again and again while it was read"
        )

    async def pages(self, first: bytes, until: float) -> Listing:
        """Read page by page; raises FaultError if a compaction comes in between."""
        items: dict[str, Item] = {}
        key, revision, more = first, 0, True
        while more:
            request = pb.RangeRequest(
                key=key, range_end=prefix_end(first), revision=revision, limit=PAGE
            )
            page = await self.ask_kv("read etcd", "Range", request, until=until)
            revision = revision or page.header.revision
            items |= {self.name(kv.key): read_item(kv) for kv in page.kvs}
            more = page.more
            key = page.kvs[-1].key + b"\0" if more else b""
        return Listing(items=items, revision=revision)

    async def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        """Yield what is written under the prefix from revision `start` on, in order."""
        first = self.root(prefix)
        last = prefix_end(first)
        if end:
            last = min(last, self.root(end))
        watch = Watch(self.client, Range(first=first, end=last), start)
        self.watches.add(watch)
        try:
            while batches := await watch.receive():
                for batch in batches:
                    self.saw(batch[0].revision)
                    yield batch
        finally:
            watch.end()
            self.watches.discard(watch)

    # Writing.

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        """
        Write all or nothing and return the revision of this write.

        Raises RewoundError if that is lower than one seen before; it may be written.
        """
        first, rest = divide(change)
        number = lease.number if isinstance(lease, EtcdLease) else 0
        newest, until = self.client.newest, now() + WHOLE
        answer = await self.transact(self.transaction(first, number), until)
        revision = int(answer.header.revision)
        self.saw(revision, newest)
        if not answer.succeeded:
            raise RaceLostError(self.current(first, answer), revision)
        try:
            while rest:
                part, rest = rest[:MOST], rest[MOST:]
                await self.delete_unwritten(part, revision, until)
        except (StoreError, FaultError) as error:
            raise UnknownOutcomeError(
                f"etcd did a part of a large change, and then: {error}"
            ) from None
        return revision

    async def trouble(self) -> str:
        """Say nothing: what etcd writes is on no disk of this host's."""
        return ""

    async def lease(self, ttl: float) -> Lease:
        """Make a lease of so many seconds, rounded up; etcd may give more."""
        request = pb.LeaseGrantRequest(TTL=max(1, math.ceil(ttl)))
        answer = await self.client.call(
            "take a lease in etcd",
            lambda member, metadata, left: member.lease.LeaseGrant(
                request, metadata=metadata, timeout=left
            ),
        )
        return EtcdLease(self.client, answer.ID, answer.TTL)

    async def transact(self, request: Any, until: float) -> Any:
        """Send a transaction; it is never sent twice unless it was refused."""
        try:
            return await self.ask_kv(
                "write to etcd", "Txn", request, repeat=False, until=until
            )
        except FaultError as error:
            if error.fault.verdict is not Verdict.NO_LEASE:
                raise
            raise StoreError("the lease has run out; nothing was written") from None

    def transaction(self, change: Change, lease: int) -> Any:
        """Spell a change in etcd's words; the else branch reads what is expected."""
        expected = [(self.root(k), revision) for k, revision in change.expect.items()]
        return pb.TxnRequest(
            compare=[written_at(key, revision) for key, revision in expected],
            success=[
                *(put(self.root(k), v, lease) for k, v in change.puts.items()),
                *(delete(self.root(k)) for k in sorted(change.deletes)),
            ],
            failure=[
                pb.RequestOp(request_range=pb.RangeRequest(key=key))
                for key, _ in expected
            ],
        )

    def current(self, change: Change, answer: Any) -> dict[str, Item | None]:
        """Return what a refused transaction found instead of what it expected."""
        found = (response.response_range.kvs for response in answer.responses)
        return {
            key: read_item(kvs[0]) if kvs else None
            for key, kvs in zip(change.expect, found, strict=True)
        }

    async def delete_unwritten(
        self, keys: list[str], revision: int, until: float
    ) -> None:
        """Delete keys, but none that was written after a revision."""
        while keys:
            rooted = [self.root(key) for key in keys]
            request = pb.TxnRequest(
                compare=[not_written_since(key, revision) for key in rooted],
                success=[delete(key) for key in rooted],
                failure=[
                    pb.RequestOp(request_range=pb.RangeRequest(key=key))
                    for key in rooted
                ],
            )
            answer = await self.ask_kv("write to etcd", "Txn", request, until=until)
            if answer.succeeded:
                self.saw(answer.header.revision)
                return
            current = self.current(Change(expect=dict.fromkeys(keys, 0)), answer)
            keys = [k for k, i in current.items() if i and i.revision <= revision]

    # Words.

    async def ask_kv(
        self,
        doing: str,
        method: str,
        request: Any,
        *,
        until: float,
        repeat: bool = True,
    ) -> Any:
        """Call a method of etcd's KV service."""

        async def ask(member: Member, metadata: Metadata, left: float) -> Any:
            call: Callable[..., Any] = getattr(member.kv, method)
            return await call(request, metadata=metadata, timeout=left)

        return await self.client.call(doing, ask, until=until, repeat=repeat)

    def saw(self, revision: int, before: int = 0) -> None:
        """Remember a revision; raises RewoundError if it was higher before."""
        if revision < before:
            self.client.newest = revision
            raise went_back(before, revision)
        self.client.newest = max(self.client.newest, revision)

    def root(self, key: str) -> bytes:
        """Return a key as etcd has it."""
        return self.options.root + key.encode(errors="surrogateescape")

    def name(self, key: bytes) -> str:
        """Return etcd's key as we have it."""
        return key[len(self.options.root) :].decode(errors="surrogateescape")


def divide(change: Change) -> tuple[Change, list[str]]:
    """
    Return the transaction that decides, and the deletes that do not fit into it.

    A key that is to be put and deleted is deleted. Raises StoreError if more than
    deletes is too much.
    """
    puts = {k: v for k, v in change.puts.items() if k not in change.deletes}
    guarded = change.deletes.intersection(change.expect)
    if max(len(change.expect), len(puts) + len(guarded)) > MOST:
        raise StoreError(
            f"a change of {len(puts)} writes and {len(change.expect)} expectations is "
            f"too large for etcd, which takes {MOST} in one; nothing was written"
        )
    # Backwards: addresses go before the pools that they are found by.
    free = iter(sorted(change.deletes - guarded, reverse=True))
    fitting: Iterable[str] = islice(free, MOST - len(puts) - len(guarded))
    deletes = guarded.union(fitting)
    return Change(expect=change.expect, puts=puts, deletes=deletes), list(free)


def read_item(kv: Any) -> Item:
    """Read etcd's value and revision."""
    return Item(value=kv.value, revision=kv.mod_revision)


def written_at(key: bytes, revision: int) -> Any:
    """Compare a key's last write; 0 is an absent key's."""
    return pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=revision)


def not_written_since(key: bytes, revision: int) -> Any:
    """Compare a key's last write with a revision; absent is fine."""
    return pb.Compare(
        key=key,
        target=pb.Compare.MOD,
        result=pb.Compare.LESS,
        mod_revision=revision + 1,
    )


def put(key: bytes, value: bytes, lease: int) -> Any:
    """Write a key."""
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def delete(key: bytes) -> Any:
    """Delete a key."""
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
