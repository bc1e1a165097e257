"""
What becomes of log lines on their way: repeats are held back, the latest are kept.

Both are processors of structlog. A warning that says again what was just said is let
through a few times, and then once in a period that doubles, with the number of those
held back: a store that is away for a day is some dozens of lines.
"""

import json
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

import structlog

BURST = 3
"""How often one thing is said before its repeats are held back."""
PERIOD = 60.0
"""Seconds for which they are held back at first; after so long a silence it is new."""
LONGEST = 3600.0
"""Seconds for which they are held back at most."""
REMEMBERED = 1000
"""Of so many things it is known that they were said."""
LATEST = 1000
"""So many lines are kept for those who come later."""
LONGEST_LINE = 2000
"""Characters of a line that a report has."""
PROSE = ("error", "reason", "why")
"""Facts that are sentences: numbers in them make no other thing of it."""
OVER = {"store.back": "store.away", "session.alive": "session.hidden"}
"""Events that end what another began: it is news when it happens again."""

EventDict = MutableMapping[str, object]
Line = Mapping[str, object]


@dataclass(slots=True)
class Said:
    """What is known of a thing that was said."""

    event: object
    last: float
    """When it happened the last time."""
    passed: int = 0
    due: float = 0.0
    """When it may be said again, once it was said often."""
    period: float = PERIOD
    held: int = 0
    """How often it happened since it was said."""


class Repeats:
    """Holds back warnings and errors that repeat what was said before."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Know of nothing yet; `now` tells the time in seconds."""
        self.now = now
        self.said: OrderedDict[str, Said] = OrderedDict()

    def __call__(self, _: object, method: str, line: EventDict) -> EventDict:
        """Let a line pass, with `repeated` if it was held back, or drop it."""
        if method not in {"warning", "error"}:
            self.end(OVER.get(str(line.get("event"))))
            return line
        known = self.known(line)
        if known.passed >= BURST and self.now() < known.due:
            known.held += 1
            raise structlog.DropEvent
        if known.passed >= BURST:
            known.period = min(2 * known.period, LONGEST)
        known.passed += 1
        known.due = self.now() + known.period
        if known.held:
            line["repeated"], known.held = known.held, 0
        return line

    def known(self, line: EventDict) -> Said:
        """Return what is known of a line that comes now."""
        key, now = essence(line), self.now()
        known = self.said.pop(key, None)
        if known is None or now - known.last > max(known.period, PERIOD):
            known = Said(event=line.get("event"), last=now)
        known.last = now
        self.said[key] = known
        if len(self.said) > REMEMBERED:
            self.said.popitem(last=False)
        return known

    def end(self, event: str | None) -> None:
        """Forget what was said of an event."""
        if event is not None:
            ended = [key for key, said in self.said.items() if said.event == event]
            for key in ended:
                del self.said[key]


def essence(line: EventDict) -> str:
    """Return what makes two lines one thing: the event and its facts."""
    facts = {k: v for k, v in line.items() if k not in {"timestamp", "exc_info"}}
    for name in PROSE:
        if name in facts:
            facts[name] = re.sub(r"\d+", "#", str(facts[name]))
    return json.dumps(facts, sort_keys=True, default=str)


def told(line: Line) -> Line:
    """Return what of a line is for others: an exception is not."""
    return {key: value for key, value in line.items() if key != "exc_info"}


class Journal:
    """Keeps the latest lines, and tells whoever listens of each."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.latest: deque[Line] = deque(maxlen=LATEST)
        self.count = 0
        """How many lines there were."""
        self.listeners: list[Callable[[], None]] = []

    def __call__(self, _: object, method: str, line: EventDict) -> EventDict:
        """Keep a line, and let it pass as it is."""
        self.note({"level": method, **line})
        return line

    def note(self, line: Line) -> None:
        """Keep a line that is in no log."""
        self.count += 1
        self.latest.append(line)
        for listener in self.listeners:
            listener()

    def text(self) -> list[str]:
        """Return the lines as JSON, a long one cut."""
        return [
            json.dumps(told(line), default=str)[:LONGEST_LINE] for line in self.latest
        ]

    def since(self, count: int) -> list[Line]:
        """Return the lines after so many, as far as they are kept."""
        fresh = self.count - count
        return list(self.latest)[-fresh:] if fresh > 0 else []
