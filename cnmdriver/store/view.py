"""
The view: the store's records as this host last knew them, in memory.

Docker's calls look here and nowhere else. A *draft* is a look that remembers which keys
it saw at which revision, and what it wants to write; committed, it becomes one
transaction that expects just those revisions.

A host is the authority for what it has itself. What others delete of that, or of the
networks it is in, stays in its view and is *missing*, until it is published again.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, TypeVar

from cnmdriver.errors import Conflict, StoreError
from cnmdriver.model import Endpoint, Member, Network, Pool, Reservation, Vni
from cnmdriver.store import records
from cnmdriver.store.base import Change, Item

R = TypeVar("R")
V = TypeVar("V", bound=Hashable)

OF_THE_STORE = (
    *("cluster", "fence/", "kept/", "knocks/", "questions/", "answers/"),
    records.WATERMARKS,
)
"""Records that end with the store's content: they are never published again."""


@dataclass(frozen=True, slots=True)
class Known:
    """A record and the revision it was written at."""

    record: object
    revision: int


@dataclass(frozen=True, slots=True, eq=False)
class Word:
    """What this host says of a key and the store has yet to hear; equal to no other."""

    value: bytes | None


class Feed:
    """What changed of a view since somebody last asked; watermarks are left out."""

    def __init__(self, view: "View") -> None:
        """Begin: the first question is answered with every key there is."""
        self.view = view
        self.fresh: set[str] | None = None

    def drain(self) -> frozenset[str]:
        """Return the keys that changed since the last call, own writes included."""
        changed = self.fresh
        if changed is None:
            keys = (k for keys in self.view.order.values() for k in keys)
            changed = set(filter(followed, keys))
        self.fresh = set()
        return frozenset(changed)

    def add(self, key: str) -> None:
        """Note a change."""
        if self.fresh is not None:
            self.fresh.add(key)


class Index(Generic[V]):
    """Which keys of a group have a value: no search, however many there are."""

    def __init__(self, values: Callable[[object], Iterable[V]]) -> None:
        """Take what values a record has; know of none yet."""
        self.values = values
        self._keys: dict[V, str] = {}
        self._more: dict[V, set[str]] = {}
        """Further keys, of the few values that several have."""

    def __iter__(self) -> Iterator[V]:
        """Yield every value there is."""
        return iter(self._keys)

    def find(self, value: V) -> frozenset[str]:
        """Return the keys of the records that have a value."""
        key = self._keys.get(value)
        if key is None:
            return frozenset()
        return frozenset((key, *self._more.get(value, ())))

    def add(self, key: str, record: object) -> None:
        """Take in a record."""
        for value in self.values(record):
            if self._keys.setdefault(value, key) != key:
                self._more.setdefault(value, set()).add(key)

    def change(self, key: str, before: object, now: object) -> None:
        """Take in what a key's record was and is; None is none."""
        self.drop(key, before)
        self.add(key, now)

    def drop(self, key: str, record: object) -> None:
        """Take out a record."""
        for value in self.values(record):
            more = self._more.get(value, set())
            if self._keys.get(value) != key:
                more.discard(key)
            elif more:
                self._keys[value] = more.pop()
            else:
                del self._keys[value]
            if not more:
                self._more.pop(value, None)


class View:
    """Records by key, and by group of keys."""

    def __init__(self, owner: str = "") -> None:
        """Know nothing yet; `owner` is the host whose own records nobody else ends."""
        self.owner = owner
        self.revision = 0
        self.listed = 0
        """The last whole listing's revision: own writes may be ahead of others'."""
        self.groups: dict[str, dict[str, Known]] = {}
        self.order: dict[str, list[str]] = {}
        """Each group's keys, sorted."""
        self.indexes: dict[str, dict[Callable[[object], Any], Index[Any]]] = {}
        """Of each group those that were asked for."""
        self.written: dict[str, int] = {}
        self.malformed: dict[str, str] = {}
        self.newer: dict[str, int] = {}
        """Keys of records that a newer pynet wrote, with their schema."""
        self.unknown: dict[str, records.Unknown] = {}
        """What such a record, or one of ours, has besides what we know."""
        self.missing: set[str] = set()
        """Keys that the store lacks: known to us, and to be published again."""
        self.ahead: dict[str, Word] = {}
        """Keys of which this host had the last word and the store has not heard it."""
        self.turns = 0
        """Counts what was news, but for watermarks."""
        self.feeds: list[Feed] = []
        self.ending: Counter[str] = Counter()
        """Keys that this host is deleting now: news of that is no surprise."""

    def feed(self) -> Feed:
        """Return a new account of what changes."""
        self.feeds.append(Feed(self))
        return self.feeds[-1]

    def get(self, kind: type[R], key: str) -> R | None:
        """Return the record under a key, None if there is none."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.record if known and isinstance(known.record, kind) else None

    def all(self, kind: type[R], prefix: str) -> Iterator[R]:
        """Yield the records under a prefix that ends in a slash, in order of keys."""
        for name in self.names(prefix):
            found = [k.record for k in self.in_order(name)]
            yield from (r for r in found if isinstance(r, kind))

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

    def index(self, name: str, values: Callable[[object], Iterable[V]]) -> Index[V]:
        """Return which keys of a group have a value; it follows what changes."""
        group = self.groups.get(name)
        if group is None:
            return Index(values)
        indexes = self.indexes.setdefault(name, {})
        if values not in indexes:
            made = indexes[values] = Index(values)
            for key, known in group.items():
                made.add(key, known.record)
        return indexes[values]

    def seen(self, key: str) -> int:
        """Return the revision a key was last written at, 0 if it is absent."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.revision if known else 0

    def write(
        self, key: str, value: bytes | None, revision: int, *, ours: bool = False
    ) -> bool:
        """
        Take in what the store says of a key, and tell if that counts.

        Older news than known changes nothing, nor does any where this host had the last
        word. What is not `ours` does not end a record that only this host may end.
        """
        if key in self.ahead:
            return False
        # What a listing lacks was gone by then: older news of it comes late.
        if value is None and not ours and self.is_owed(key):
            return False
        late = revision <= self.written.get(key, self.listed)
        if late and not (ours and key in self.missing):
            return False
        self.accept(key, value, revision, ours=ours)
        return True

    def foresee(self, key: str, value: bytes | None) -> None:
        """
        Take in what the store is yet to be told.

        The revision stays as it was: one that the store never gave would hide its news.
        """
        # The latest word is the last.
        self.ahead.pop(key, None)
        self.ahead[key] = Word(value)
        self.accept(key, value, self.written.get(key, self.listed), ours=True)

    def heard(self, key: str, word: Word) -> bool:
        """Listen to the store again on a key; False if there is a later word."""
        if self.ahead.get(key) is not word:
            return False
        del self.ahead[key]
        return True

    def confirm(self, key: str, word: Word, value: bytes | None, revision: int) -> bool:
        """Take in how the store answered to a word; False if there is a later one."""
        if not self.heard(key, word):
            return False
        self.accept(key, value, revision, ours=True)
        return True

    def accept(
        self, key: str, value: bytes | None, revision: int, *, ours: bool
    ) -> None:
        """
        Let a key be so, whatever was known of it.

        A value that is not a record is noted in `malformed` and left out.
        """
        self.written[key] = revision
        self.revision = max(self.revision, revision)
        self.malformed.pop(key, None)
        found = self.read(key, value, revision)
        if found is None and not ours and not self.ending[key] and self.stays(key):
            # What stands there instead is written over.
            self.miss(key, 0 if value is None else revision)
        else:
            self.missing.discard(key)
            self.set(key, found)
        if followed(key):
            self.turns += 1
            for feed in self.feeds:
                feed.add(key)

    def read(self, key: str, value: bytes | None, revision: int) -> Known | None:
        """Read a stored value; one that is no record is noted."""
        self.newer.pop(key, None)
        self.unknown.pop(key, None)
        if value is None:
            return None
        try:
            record, schema, unknown = records.read(key, value)
            if schema > records.SCHEMA:
                self.newer[key] = schema
            if unknown:
                self.unknown[key] = unknown
            return Known(record, revision)
        except StoreError as error:
            self.malformed[key] = str(error)
            return None

    def miss(self, key: str, revision: int = 0) -> None:
        """Keep a record that the store lacks, or has something else instead of."""
        self.missing.add(key)
        self.set(key, Known(self.get(object, key), revision))

    def forget(self, key: str) -> None:
        """Drop a record that the store lacks and nobody publishes again."""
        self.missing.discard(key)
        self.set(key, None)
        self.turns += 1
        for feed in self.feeds:
            feed.add(key)

    def is_owed(self, key: str) -> bool:
        """Tell whether a key is missing that this host publishes: it is known to be."""
        record = self.get(object, key)
        return key in self.missing and getattr(record, "host", None) == self.owner

    def stays(self, key: str) -> bool:
        """Tell whether a record is not for others to end: this host stands on it."""
        if not self.owner:
            return False
        match self.get(object, key):
            case Endpoint() | Member() as part:
                return part.host == self.owner
            case Reservation() as held:
                pool = self.get(Pool, records.pool(held.space, held.cidr))
                own = held.bound and held.host == self.owner
                return own and pool is not None and self.serves(pool.network)
            case Network() as network:
                return self.serves(network.id)
            case Pool() | Vni() as taken:
                return self.serves(taken.network)
        return key == records.host(self.owner)

    def serves(self, network: str) -> bool:
        """Tell whether the owner has a created part in a network."""
        member = self.get(Member, records.member(network, self.owner))
        return member is not None and bool(member.docker_id)

    def restore(self, items: Mapping[str, Item], listed: int) -> None:
        """Begin with what was known in an earlier life."""
        for key, item in items.items():
            self.set(key, self.read(key, item.value, item.revision))
            if item.revision == 0:
                self.missing.add(key)
        self.revision = max([listed, *(i.revision for i in items.values())])
        self.listed = listed
        self.written = {k: i.revision for k, i in items.items() if i.revision > listed}

    def set(self, key: str, known: Known | None) -> None:
        """Put a record into its group, or take it out."""
        name = records.group(key)
        group = self.groups.get(name)
        for index in self.indexes.get(name, {}).values():
            before = group.get(key) if group is not None else None
            index.change(key, before and before.record, known and known.record)
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
                self.indexes.pop(name, None)

    def replace(
        self, items: Iterable[tuple[str, Item]], revision: int, *, rewound: bool = False
    ) -> bool:
        """
        Take in a whole listing: what it lacks is gone. Tell if there is news.

        A store that was `rewound` (wiped, or restored from a copy) is believed in what
        it has, whatever we knew. What it lacks proves nothing: it stays, at revision 0,
        and is named in `missing` until it is written again.
        """
        listed = dict(items)
        if rewound:
            self.forget_revisions(listed)
        before = self.turns
        for noted in (self.malformed, self.newer, self.unknown):
            for key in [key for key in noted if key not in listed]:
                del noted[key]
        # What a network has goes only after this host's part in it has.
        for key in sorted(self.lacking(listed), key=stands):
            if self.written.get(key, 0) <= revision:
                self.accept(key, None, revision, ours=False)
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
        """
        Return the keys we know that a listing lacks.

        But for those missing, and those that the store has yet to hear of.
        """
        return [
            key
            for keys in self.order.values()
            for key in keys
            if not (key in listed or key in self.missing or key in self.ahead)
        ]

    def forget_revisions(self, listed: Mapping[str, Item]) -> None:
        """Let any news be newer than what is known, and keep what the store lacks."""
        self.revision = self.listed = 0
        self.written = {}
        for key in self.lacking(listed):
            if not key.startswith(OF_THE_STORE):
                self.miss(key)


def stands(key: str) -> bool:
    """Tell whether a record is there for the sake of members."""
    return not key.startswith("members/")


def followed(key: str) -> bool:
    """Tell whether anybody looks for changes of a key."""
    return not key.startswith(records.WATERMARKS)


class Draft:
    """A look at the view that collects one transaction."""

    def __init__(self, view: View, *, alone: str = "") -> None:
        """
        Look at a view; nothing is written yet.

        `alone` says why the store cannot be asked: only what needs no other host's
        word may be written then.
        """
        self.view = view
        self.alone = alone
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
        if self.changed(prefix):
            return [r for _, r in self.pairs(prefix) if isinstance(r, kind)]
        return list(self.view.all(kind, prefix))

    def values(self, name: str, values: Callable[[object], Iterable[V]]) -> set[V]:
        """Return what values the records of a group have, own writes included."""
        index = self.view.index(name, values)
        found = set(index)
        changed = self.changed(name)
        for key in changed:
            for value in values(self.view.get(object, key)):
                if index.find(value) <= changed:
                    found.discard(value)
        for key in changed & self.puts.keys():
            found.update(values(self.puts[key]))
        return found

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix, as `all` would."""
        return [key for key, _ in self.pairs(prefix)]

    def pairs(self, prefix: str) -> Iterable[tuple[str, object]]:
        """Return keys and records under a prefix, own writes included, in order."""
        changed = self.changed(prefix)
        if not changed:
            return self.view.pairs(prefix)
        merged = [p for p in self.view.pairs(prefix) if p[0] not in changed]
        merged += [(k, v) for k, v in self.puts.items() if k in changed]
        # Cheap: but for the last few they are in order already.
        merged.sort(key=itemgetter(0))
        return merged

    def changed(self, prefix: str) -> set[str]:
        """Return the keys under a prefix that this draft writes."""
        return {k for k in (*self.puts, *self.deletes) if k.startswith(prefix)}

    def put(self, key: str, record: object) -> None:
        """Write a record, expecting the key as it was seen."""
        known = key not in self.puts and self.get(type(record), key) == record
        if known and key not in self.view.missing:
            return
        if key in self.view.newer:
            raise Conflict(
                f"record {key} was written by a newer pynet (schema "
                f"{self.view.newer[key]}, this one knows {records.SCHEMA}) and is not "
                "changed by this one; upgrade this host"
            )
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
            puts={
                key: records.encode(record, self.view.unknown.get(key))
                for key, record in self.puts.items()
            },
            deletes=frozenset(self.deletes),
        )
