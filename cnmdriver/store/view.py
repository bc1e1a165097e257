"""
The view: the store's records as this host last knew them, in memory.

Docker's calls look here and nowhere else. A *draft* is a look that remembers which keys
it saw at which revision, and what it wants to write; committed, it becomes one
transaction that expects just those revisions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cnmdriver.errors import StoreError
from cnmdriver.store import records
from cnmdriver.store.base import Change, Item

R = TypeVar("R")


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
        self.written: dict[str, int] = {}
        self.malformed: dict[str, str] = {}

    def get(self, kind: type[R], key: str) -> R | None:
        """Return the record under a key, None if there is none."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.record if known and isinstance(known.record, kind) else None

    def all(self, kind: type[R], prefix: str) -> Iterator[R]:
        """Yield the records under a prefix that ends in a slash, in order of keys."""
        for group in self.matching(prefix):
            for key in sorted(group):
                record = group[key].record
                if key.startswith(prefix) and isinstance(record, kind):
                    yield record

    def matching(self, prefix: str) -> list[dict[str, Known]]:
        """Return the groups that can have keys under a prefix."""
        if prefix in self.groups:
            return [self.groups[prefix]]
        return [g for name, g in sorted(self.groups.items()) if name.startswith(prefix)]

    def seen(self, key: str) -> int:
        """Return the revision a key was last written at, 0 if it is absent."""
        known = self.groups.get(records.group(key), {}).get(key)
        return known.revision if known else 0

    def write(self, key: str, value: bytes | None, revision: int) -> bool:
        """
        Take in what the store says of a key; older news than known changes nothing.

        A value that is not a record is noted in `malformed` and left out.
        """
        if revision <= self.written.get(key, 0):
            return False
        self.written[key] = revision
        self.revision = max(self.revision, revision)
        self.malformed.pop(key, None)
        group = self.groups.setdefault(records.group(key), {})
        group.pop(key, None)
        if value is not None:
            try:
                group[key] = Known(records.decode(key, value), revision)
            except StoreError as error:
                self.malformed[key] = str(error)
        elif not group:
            del self.groups[records.group(key)]
        return True

    def replace(self, items: Iterable[tuple[str, Item]], revision: int) -> bool:
        """Take in a whole listing: what it lacks is gone. Tell if there is news."""
        listed = dict(items)
        news = False
        self.malformed = {k: v for k, v in self.malformed.items() if k in listed}
        for group in list(self.groups.values()):
            for key in [k for k in group if k not in listed]:
                if self.written.get(key, 0) <= revision:
                    news |= self.write(key, None, max(revision, self.written[key] + 1))
        for key, item in listed.items():
            news |= self.write(key, item.value, item.revision)
        self.revision = max(self.revision, revision)
        self.listed = max(self.listed, revision)
        # Deleted keys need no memory once a listing at a later revision lacks them.
        self.written = {
            k: r for k, r in self.written.items() if k in listed or r > revision
        }
        return news


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
        changed = {k for k in (*self.puts, *self.deletes) if k.startswith(prefix)}
        if not changed:
            return list(self.view.all(kind, prefix))
        merged = {
            key: known.record
            for group in self.view.matching(prefix)
            for key, known in group.items()
            if key.startswith(prefix) and key not in changed
        }
        merged |= {k: v for k, v in self.puts.items() if k in changed}
        return [r for _, r in sorted(merged.items()) if isinstance(r, kind)]

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix, as `all` would."""
        known = {k for g in self.view.matching(prefix) for k in g}
        known = (known | self.puts.keys()) - self.deletes
        return sorted(k for k in known if k.startswith(prefix))

    def put(self, key: str, record: object) -> None:
        """Write a record, expecting the key as it was seen."""
        if key not in self.puts and self.get(type(record), key) == record:
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
