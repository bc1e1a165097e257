"""
What pynet asks of a key-value store, in the manner of libkv.

Keys are text, values bytes. Every write has a *revision* that only grows; a key
carries the revision of its last write, and an absent key has revision 0. One commit
changes many keys or none, and only if each key it *expects* still has the revision it
was seen at. A watch is a hint, a read is the truth: when a watch ends, read again.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cnmdriver.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A key's value and the revision of its last write."""

    value: bytes
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """All keys under a prefix, as they were together at one revision."""

    items: Mapping[str, Item]
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One transaction. `expect` maps keys to the revision seen, 0 for absent."""

    expect: Mapping[str, int] = field(default_factory=dict)
    puts: Mapping[str, bytes] = field(default_factory=dict)
    deletes: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Tell whether it would write anything."""
        return bool(self.puts or self.deletes)

    def written(self) -> frozenset[str]:
        """Return the keys it writes."""
        return self.deletes.union(self.puts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A key that was written; `value` None says it was deleted."""

    key: str
    value: bytes | None
    revision: int


class RaceLostError(StoreError):
    """A key had moved on; `current` has every expected key as it is now."""

    def __init__(self, current: Mapping[str, Item | None], revision: int) -> None:
        """Keep what the store answered beside its refusal."""
        super().__init__("somebody else changed the same record; try again")
        self.current = current
        self.revision = revision


class UnknownOutcomeError(StoreError):
    """The answer to a commit was lost: it was done, or not, or will be yet."""


class CompactedError(StoreError):
    """The watch wanted to start before the store's memory: read again."""


class RewoundError(StoreError):
    """The store went back to an older content, or lost it; said once, then it is so."""


class Lease(Protocol):
    """Keys under a lease are deleted when nobody keeps it alive for its time."""

    async def keep(self) -> None:
        """Start its time anew; raises StoreError if it has run out."""

    async def revoke(self) -> None:
        """End it now, and with it its keys."""


class Store(Protocol):
    """A backend. Every call ends within 3 s; what fails raises StoreError."""

    shared: bool
    """Whether other hosts write to it."""

    async def open(self) -> None:
        """Connect, or make the file."""

    async def close(self) -> None:
        """Let go; watches end."""

    def reread(self) -> None:
        """Look again, now, at the files that a login needs; keep the old if bad."""

    async def read(self, prefix: str) -> Listing:
        """Return all keys that start with the prefix, at one revision."""

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        """
        Write all or nothing and return the revision of this write.

        Puts are bound to the lease, if there is one. Raises RaceLostError, and
        UnknownOutcomeError if the answer was lost.
        """

    def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        """
        Yield what is written under the prefix from revision `start` on, in order.

        With `end`, keys from there on (in byte order, prefix included) are left out.

        The events of one commit come together. Raises CompactedError if `start` is
        forgotten, StoreError when the connection is lost.
        """

    async def trouble(self) -> str:
        """Say what keeps this host's disk from taking anything new, "" if nothing."""

    async def lease(self, ttl: float) -> Lease:
        """Make a lease of so many seconds."""
