"""
A watch that goes on when its member does not.

etcd ends a watch in many ways, and some are silent: a member that is stopped, or cut
off, just says nothing. So a member that is silent for a second is asked for a sign of
life, and left when it gives none. On another member the watch goes on behind the last
event seen; never behind a revision that merely stood in some answer's header, as old
history arrives late and in parts.

etcd sends the events of one revision in one answer (parts of one would have to be asked
for), so an answer can be handed on as it is.
"""

import asyncio
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cnmdriver.errors import StoreError
from cnmdriver.store.base import CompactedError, Event, RewoundError
from cnmdriver.store.etcd.client import (
    CONNECT,
    PAUSE,
    WHOLE,
    Client,
    FaultError,
    cancelling,
    now,
)
from cnmdriver.store.etcd.faults import Fault, Verdict, judge, read_text
from cnmdriver.store.etcd.rpc import Member, Metadata, NotConnectedError, grpc, pb

SILENCE = 1.0
"""Seconds a member may say nothing before it is asked, and at least after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Keys from `first` on, `end` excluded."""

    first: bytes
    end: bytes


class Stream:
    """A watch's stream at one member."""

    def __init__(self, call: Any, patience: float) -> None:
        """Take what grpc opened, and the seconds that an answer may take."""
        self.call = call
        self.patience = patience
        self.reading: asyncio.Future[Any] | None = None

    async def answer(self) -> Any:
        """Wait for an answer, and ask for a sign of life when there is none."""
        asked = False
        while True:
            # Not wait_for: to cancel a read is to cancel the stream.
            reading = self.reading or asyncio.ensure_future(self.call.read())
            self.reading = reading
            await asyncio.wait({reading}, timeout=self.patience if asked else SILENCE)
            if reading.done():
                self.reading = None
                return received(reading)
            if asked:
                raise lost("it says nothing any more")
            asked = True
            await send(
                self.call, pb.WatchRequest(progress_request=pb.WatchProgressRequest())
            )

    def end(self) -> None:
        """Give it up; whoever waits for an answer is woken."""
        self.call.cancel()
        if self.reading is not None:
            self.reading.add_done_callback(forget)


class Watch:
    """One watch, over as many streams as it takes."""

    def __init__(self, client: Client, keys: Range, start: int) -> None:
        """Take what to watch; nothing is asked yet."""
        self.client = client
        self.keys = keys
        self.start = start
        self.known = min(start - 1, client.newest)
        """A revision that the store had: a lower one means it went back."""
        self.stream: Stream | None = None
        self.member: Member | None = None
        self.metadata: Metadata = ()
        self.lost_at: float | None = None
        """Since when no member has served it."""
        self.failed_at = 0.0

    def end(self) -> None:
        """Give up the stream."""
        if self.stream is not None:
            self.stream.end()

    async def receive(self) -> list[tuple[Event, ...]]:
        """Wait for events, in a tuple per revision; none: the client was closed."""
        while not self.client.closed:
            try:
                batches = self.take(await self.answer())
            except FaultError as error:
                self.end()
                self.stream = None
                await self.failed(error.fault)
            else:
                if batches:
                    return batches
        return []

    async def answer(self) -> Any:
        """Wait for the next answer; raises FaultError when a member is of no use."""
        try:
            stream = self.stream or await self.connect()
            response = await stream.answer()
        except NotConnectedError:
            raise lost("it did not take a connection in time") from None
        except grpc.aio.AioRpcError as error:
            raise FaultError(judge(error, self.client.options)) from None
        except grpc.aio.UsageError:
            raise lost("the connection to it was closed") from None
        await self.check(response)
        self.lost_at = None
        return response

    async def connect(self) -> Stream:
        """Open a stream at the member that is asked now."""
        self.member = member = self.client.member()
        self.metadata = await self.client.metadata("watch etcd", now() + WHOLE)
        await member.connected(CONNECT)
        call = member.watch.Watch(metadata=self.metadata)
        self.stream = Stream(call, max(SILENCE, self.client.patience))
        await send(self.stream.call, self.request())
        return self.stream

    async def failed(self, fault: Fault) -> None:
        """Go on to the next member; raises StoreError when that is of no use."""
        again, self.failed_at = now() < self.failed_at + WHOLE, now()
        self.lost_at = self.lost_at or now()
        if self.client.closed or self.member is None:
            return
        if fault.verdict is Verdict.LOGIN:
            self.client.token.drop(dict(self.metadata).get("token", ""))
        elif fault.verdict is Verdict.FINAL:
            raise StoreError(f"cannot watch etcd: {fault.text}")
        else:
            self.client.skip(self.member)
        if now() > self.lost_at + WHOLE:
            members = ", ".join(self.client.options.endpoints)
            raise StoreError(
                f"cannot watch etcd: no member of {members} kept a watch; "
                f"{self.member.endpoint}: {fault.text}"
            )
        if again:
            await asyncio.sleep(PAUSE)

    def take(self, response: Any) -> list[tuple[Event, ...]]:
        """Read an answer, and note how far the watch has come."""
        root = len(self.client.options.root)
        found = []
        for revision, events in groupby(response.events, revision_of):
            found.append(tuple(read_event(event, root) for event in events))
            self.start = revision + 1
            self.known = max(self.known, revision)
        return found

    def request(self) -> Any:
        """Return the request that opens this watch."""
        return pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=self.keys.first,
                range_end=self.keys.end,
                start_revision=self.start,
            )
        )

    async def check(self, response: Any) -> None:
        """Raise what an answer says instead of events."""
        if response.compact_revision:
            raise CompactedError(
                f"the store has forgotten revision {self.start}; read everything again"
            )
        if response.canceled:
            reason = response.cancel_reason or "it ended the watch"
            raise FaultError(
                read_text(reason, self.client.options)
                or Fault(verdict=Verdict.LOST, text=reason)
            )
        if response.created and response.header.revision < self.known:
            # A member that lags behind looks like a store that went back.
            revision = await self.client.revision()
            if revision < self.known:
                raise went_back(self.known, revision)


async def send(call: Any, request: Any) -> None:
    """Write to a stream; raises FaultError or grpc's error if it is over."""
    try:
        async with asyncio.timeout(SILENCE):
            await call.write(request)
    except (asyncio.InvalidStateError, TimeoutError):
        raise lost("it took no request any more") from None
    except asyncio.CancelledError:
        if cancelling():
            raise
        raise lost("the stream was closed") from None


def received(reading: asyncio.Future[Any]) -> Any:
    """Return what was read; raises FaultError or grpc's error at the end."""
    # A stream that was ended on our side says so by a cancelled read.
    if reading.cancelled():
        raise lost("the stream was closed")
    answer = reading.result()
    if answer is grpc.aio.EOF:
        raise lost("it ended the stream")
    return answer


def forget(reading: asyncio.Future[Any]) -> None:
    """Look at a read that nobody waits for, so that its error is not reported."""
    if not reading.cancelled():
        reading.exception()


def lost(text: str) -> FaultError:
    """Say that a stream is over."""
    return FaultError(Fault(verdict=Verdict.LOST, text=text))


def went_back(before: int, revision: int) -> RewoundError:
    """Say that the store is not what it was."""
    return RewoundError(
        f"the store went back from revision {before} to {revision}: it was restored or "
        "emptied"
    )


def revision_of(event: Any) -> int:
    """Return the revision that made an event."""
    return int(event.kv.mod_revision)


def read_event(event: Any, root: int) -> Event:
    """Read etcd's event; `root` is the length of our prefix."""
    return Event(
        key=event.kv.key[root:].decode(errors="surrogateescape"),
        value=None if event.type == event.DELETE else event.kv.value,
        revision=event.kv.mod_revision,
    )
