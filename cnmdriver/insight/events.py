"""
What happens, as it comes: what changed in the view, and what the daemon logs.

Whoever listens costs something, and nobody else does: a listener's account of the view
begins and ends with it. News is told in batches, so that a flood of it is few messages.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator

from cnmdriver.driver.site import Site
from cnmdriver.errors import Exhausted
from cnmdriver.insight.report import Json, life, text
from cnmdriver.insight.topology import label
from cnmdriver.logs import Journal, Line
from cnmdriver.model import Alive, Endpoint, Host, Member, Network
from cnmdriver.redaction import USERINFO
from cnmdriver.store import records
from cnmdriver.store.view import Feed, View

GATHER = 0.1
"""Seconds in which news is gathered, once there is some."""
TICK = 0.4
"""Seconds between two looks at what announces nothing: names, and the store's door."""
FIRST = 200
"""So many of the log's latest lines come first."""
MOST = 64
"""So many may listen at once."""
KINDS = {
    "alive": "host",
    "hosts": "host",
    "members": "network",
    "endpoints": "endpoint",
}
"""What is told of, by the first part of its record's key."""

Facts = dict[str, object]


class Bell(Feed):
    """A feed that tells when there is something in it."""

    def __init__(self, view: View, ring: Callable[[], None]) -> None:
        """Take who is told."""
        super().__init__(view)
        self.ring = ring

    def add(self, key: str) -> None:
        """Note a change, and tell."""
        super().add(key)
        self.ring()


class Events:
    """Tells what happens to whoever asks."""

    def __init__(
        self,
        site: Site,
        journal: Journal,
        glance: Callable[[], object] = lambda: None,
    ) -> None:
        """Take what is told of; `glance` is another value whenever it is news."""
        self.site = site
        self.journal = journal
        self.glance = glance
        self.listeners: list[asyncio.Event] = []
        self.over = False

    def close(self) -> None:
        """End what is told to everybody."""
        self.over = True
        for ring in self.listeners:
            ring.set()

    async def follow(self) -> AsyncGenerator[Json, None]:
        """
        Yield the latest lines first, and then news as it comes, until closed.

        Each has a list of `events`, and `changed`: whether the topology is another one.
        Without news there is an empty one now and then: it finds out who went away.
        Raises Exhausted if too many listen.
        """
        if len(self.listeners) >= MOST:
            raise Exhausted(f"{MOST} are watching already; close some of them")
        ring = asyncio.Event()
        bell = Bell(self.site.view, ring.set)
        self.listeners.append(ring)
        self.site.view.feeds.append(bell)
        self.journal.listeners.append(ring.set)
        try:
            known = dict(self.described(bell.drain()))
            count, seen = self.journal.count, self.seen()
            lines = [line_of(line) for line in self.journal.since(count - FIRST)]
            yield {"events": lines, "changed": True}
            while not self.over:
                await self.wait(ring)
                changes = list(self.changes(known, bell.drain()))
                lines = [line_of(line) for line in self.journal.since(count)]
                count, before, seen = self.journal.count, seen, self.seen()
                changed = bool(changes) or seen != before
                yield {"events": [*changes, *lines], "changed": changed}
        finally:
            self.journal.listeners.remove(ring.set)
            self.site.view.feeds.remove(bell)
            self.listeners.remove(ring)

    async def wait(self, ring: asyncio.Event) -> None:
        """Wait for news, and a moment for more, but not for ever."""
        try:
            async with asyncio.timeout(TICK):
                await ring.wait()
        except TimeoutError:
            return
        if not self.over:
            await asyncio.sleep(GATHER)
        ring.clear()

    def seen(self) -> tuple[object, ...]:
        """Return what is compared, as it does not announce itself."""
        state = self.site.state
        return state.away, dict(self.site.names), self.glance()

    def described(self, keys: Iterable[str]) -> Iterator[tuple[str, Facts]]:
        """Yield keys and what is told of them, for those of which anything is."""
        for key in keys:
            facts = self.describe(key)
            if facts is not None:
                yield key, facts

    def describe(self, key: str) -> Facts | None:
        """Return what is told of a record, None for none. Things go by their ids."""
        match self.site.view.get(object, key):
            case Endpoint() as one:
                return {
                    "endpoint": one.id,
                    "network": one.network,
                    "host": one.host,
                    "addresses": [str(a.ip) for a in one.addresses],
                    "joined": bool(one.sandbox),
                    "ports": [p.host_port for p in one.published],
                }
            case Member() as member if member.docker_id:
                return {"network": member.network, "host": member.host}
            case Host() as host:
                return {"host": host.id, "vtep": text(host.vtep)}
            case Alive() as alive:
                return {"host": key.removeprefix("alive/"), "state": life(alive)}
        return None

    def changes(self, known: dict[str, Facts], keys: Iterable[str]) -> Iterator[Json]:
        """Yield what became of records, and remember how they are."""
        for key in sorted(keys):
            before, now = known.pop(key, None), self.describe(key)
            if now is not None:
                known[key] = now
            if now != before:
                yield self.change(key, before, now)

    def change(self, key: str, before: Facts | None, now: Facts | None) -> Json:
        """Return what became of a record as an event."""
        facts = dict(now or before or {})
        state = facts.pop("state", None)
        if now is None:
            verb = "gone"
        elif before is None or state is not None:
            verb = str(state or "came")
        else:
            verb = "changed"
        ids = {n: v for n, v in facts.items() if n in KINDS.values()}
        facts |= dict(self.labels(facts))
        told = {name: value for name, value in facts.items() if value}
        name = f"{KINDS[key.partition('/')[0]]}.{verb}"
        return {**event(name, "change", told, time.time()), "ids": ids}

    def labels(self, facts: Facts) -> Iterator[tuple[str, str]]:
        """Yield what things are called, as far as it is known by now."""
        view = self.site.view
        if "endpoint" in facts:
            yield "endpoint", self.site.name(str(facts["endpoint"]))
        if "host" in facts:
            host = view.get(Host, records.host(str(facts["host"])))
            yield "host", host.name if host is not None else str(facts["host"])[:12]
        network = view.get(Network, records.network(str(facts.get("network"))))
        if network is not None:
            own = (m for m in self.site.members() if m.network == network.id)
            yield "network", label(self.site, network, own)


def event(name: str, level: str, facts: Facts, at: object) -> Json:
    """Return an event; `at` is seconds of Unix time, or a time as text."""
    return {"event": name, "level": level, "at": at, "facts": facts}


def line_of(line: Line) -> Json:
    """Return a line of the log as an event, without secrets."""
    own = {"event", "level", "timestamp", "exc_info"}
    facts: Facts = {
        k: plain(v)
        for k, v in sorted(line.items(), key=lambda item: (item[0] != "method", item))
        if k not in own and v is not None
    }
    name, level = str(line.get("event")), str(line.get("level"))
    return event(name, level, facts, line.get("timestamp"))


def plain(value: object) -> object:
    """Return what JSON can say of a fact."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [str(v) for v in value]
    return USERINFO.sub("", str(value))
