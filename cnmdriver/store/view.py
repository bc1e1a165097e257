"""
The view: the store's records as this host last knew them, in memory.

Docker's calls look here and nowhere else. A *draft* is a look that remembers which keys
it saw at which revision, and what it wants to write; committed, it becomes one
transaction that expects just those revisions.
"""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

from cnmdriver.errors import StoreError
from cnmdriver.store import records
from cnmdriver.store.base import Change, Item

R = TypeVar("R")

OF_THE_STORE = ("cluster", "alive/", "fence/", "kept/", records.WATERMARKS)
"""Records that end with the store's content: they are never published again."""


@dataclass(frozen=True, slots=True)
class Known:
    """A record and the revision it was written at."""

    record: object
    revision: int


class View:
    """Records by key, and by group of keys."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.revision = 0
        self.listed = 0
        """The last whole listing's revision: own writes may be ahead of others'."""
        self.groups: dict[str, dict[str, Known]] = {}
        self.order: dict[str, list[str]] = {}
        """Each group's keys, sorted."""
        self.written: dict[str, int] = {}
        self.malformed: dict[str, str] = {}
        self.missing: set[str] = set()
        """Keys that a rewound store lacks: known to us, and to be published again."""
        self.turns = 0
        """Counts what was news, but for watermarks."""
        self.fresh: set[str] | None = None

    def get(self, kind: type[R], key: str) -> R | None:
        """Return the record under a key, None if there is none."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.record if known and isinstance(known.record, kind) else None

    def all(self, kind: type[R], prefix: str) -> Iterator[R]:
        """Yield the records under a prefix that ends in a slash, in order of keys."""
        for name in self.names(prefix):
            for known in self.in_order(name):
                if isinstance(known.record, kind):
                    yield known.record

    def in_order(self, name: str) -> list[Known]:
        """Return the records of a group, in order of keys."""
        return list(map(self.groups[name].__getitem__, self.order[name]))

    def pairs(self, prefix: str) -> Iterator[tuple[str, object]]:
        """Yield keys and records under a prefix that ends in a slash, in order."""
        for name in self.names(prefix):
            # A copy: whoever looks may change the view between two records.
            keys = self.order[name].copy()
            yield from zip(keys, (k.record for k in self.in_order(name)), strict=True)

    def matching(self, prefix: str) -> list[dict[str, Known]]:
        """Return the groups that have keys under a prefix."""
        return [self.groups[name] for name in self.names(prefix)]

    def names(self, prefix: str) -> list[str]:
        """Return the names of the groups that have keys under a prefix."""
        if prefix in self.groups:
            return [prefix]
        if records.group(prefix) == prefix:
            return []
        return [name for name in sorted(self.groups) if name.startswith(prefix)]

    def seen(self, key: str) -> int:
        """Return the revision a key was last written at, 0 if it is absent."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.revision if known else 0

    def drain(self) -> frozenset[str]:
        """
        Return the keys that changed since the last call, own writes included.

        The first call returns every key there is; nothing is remembered before it.
        Watermarks are left out.
        """
        changed = self.fresh
        if changed is None:
            changed = {k for keys in self.order.values() for k in keys if followed(k)}
        self.fresh = set()
        return frozenset(changed)

    def write(self, key: str, value: bytes | None, revision: int) -> bool:
        """
        Take in what the store says of a key; older news than known changes nothing.

        A value that is not a record is noted in `malformed` and left out.
        """
        # What a listing lacks was gone by then: older news of it comes late.
        if revision <= self.written.get(key, self.listed):
            return False
        self.written[key] = revision
        self.revision = max(self.revision, revision)
        self.malformed.pop(key, None)
        self.missing.discard(key)
        record = None
        if value is not None:
            try:
                record = Known(records.decode(key, value), revision)
            except StoreError as error:
                self.malformed[key] = str(error)
        self.set(key, record)
        if followed(key):
            self.turns += 1
            if self.fresh is not None:
                self.fresh.add(key)
        return True

    def set(self, key: str, known: Known | None) -> None:
        """Put a record into its group, or take it out."""
        name = records.group(key)
        group = self.groups.get(name)
        if known is not None:
            if group is None:
                group, self.order[name] = self.groups.setdefault(name, {}), []
            if key not in group:
                bisect.insort(self.order[name], key)
            group[key] = known
        elif group is not None and group.pop(key, None) is not None:
            order = self.order[name]
            del order[bisect.bisect_left(order, key)]
            if not group:
                del self.groups[name], self.order[name]

    def replace(
        self, items: Iterable[tuple[str, Item]], revision: int, *, rewound: bool = False
    ) -> bool:
        """
        Take in a whole listing: what it lacks is gone. Tell if there is news.

        A store that was `rewound` (wiped, or restored from a copy) is believed in what
        it has, whatever we knew. What it lacks proves nothing: it stays, at revision 0,
        and is named in `missing` until it is written again. Only the signs of life,
        which it lost with their leases, are gone.
        """
        listed = dict(items)
        if rewound:
            self.forget_revisions(listed)
        before = self.turns
        self.malformed = {k: v for k, v in self.malformed.items() if k in listed}
        for key in self.lacking(listed):
            if self.written.get(key, 0) <= revision:
                after = max(revision, self.written.get(key, 0) + 1)
                self.write(key, None, after)
        for key, item in listed.items():
            self.write(key, item.value, item.revision)
        self.revision = max(self.revision, revision)
        self.listed = max(self.listed, revision)
        # Deleted keys need no memory once a listing at a later revision lacks them.
        self.written = {
            k: r for k, r in self.written.items() if k in listed or r > revision
        }
        return self.turns != before

    def lacking(self, listed: Mapping[str, Item]) -> list[str]:
        """Return the keys we know that a listing lacks, but for those missing."""
        return [
            key
            for keys in self.order.values()
            for key in keys
            if key not in listed and key not in self.missing
        ]

    def forget_revisions(self, listed: Mapping[str, Item]) -> None:
        """Let any news be newer than what is known, and keep what the store lacks."""
        self.revision = self.listed = 0
        self.written = {}
        for key in self.lacking(listed):
            if key.startswith(OF_THE_STORE):
                continue
            self.missing.add(key)
            self.set(key, Known(self.get(object, key), 0))


def followed(key: str) -> bool:
    """Tell whether anybody looks for changes of a key."""
    return not key.startswith(records.WATERMARKS)


class Draft:
    """A look at the view that collects one transaction."""

    def __init__(self, view: View) -> None:
        """Look at a view; nothing is written yet."""
        self.view = view
        self.expect: dict[str, int] = {}
        self.puts: dict[str, object] = {}
        self.deletes: set[str] = set()

    def get(self, kind: type[R], key: str) -> R | None:
        """Return a record; the commit will fail if it changes meanwhile."""
        if key in self.puts:
            record = self.puts[key]
            return record if isinstance(record, kind) else None
        if key in self.deletes:
            return None
        self.expect.setdefault(key, self.view.seen(key))
        return self.view.get(kind, key)

    def all(self, kind: type[R], prefix: str) -> list[R]:
        """
        Return the records under a prefix, this draft's own writes included.

        The commit does not notice a new key there; whoever relies on absence must
        expect a key that every writer of the group changes.
        """
        return [r for _, r in self.pairs(prefix) if isinstance(r, kind)]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix, as `all` would."""
        return [key for key, _ in self.pairs(prefix)]

    def pairs(self, prefix: str) -> Iterable[tuple[str, object]]:
        """Return keys and records under a prefix, own writes included, in order."""
        changed = {k for k in (*self.puts, *self.deletes) if k.startswith(prefix)}
        if not changed:
            return self.view.pairs(prefix)
        merged = [p for p in self.view.pairs(prefix) if p[0] not in changed]
        merged += [(k, v) for k, v in self.puts.items() if k in changed]
        # Cheap: but for the last few they are in order already.
        merged.sort(key=itemgetter(0))
        return merged

    def put(self, key: str, record: object) -> None:
        """Write a record, expecting the key as it was seen."""
        known = key not in self.puts and self.get(type(record), key) == record
        if known and key not in self.view.missing:
            return
        self.expect.setdefault(key, self.view.seen(key))
        self.deletes.discard(key)
        self.puts[key] = record

    def delete(self, key: str) -> None:
        """Delete a record, whatever its revision."""
        self.puts.pop(key, None)
        self.deletes.add(key)

    def change(self) -> Change:
        """Return the transaction."""
        return Change(
            expect=dict(self.expect),
            puts={key: records.encode(record) for key, record in self.puts.items()},
            deletes=frozenset(self.deletes),
        )
