"""`pynet watch`: hosts, networks and endpoints as they come and go, and how fast."""

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cnmdriver.cli import table
from cnmdriver.cli.client import Client, ClientError
from cnmdriver.cli.host import duration
from cnmdriver.cli.options import asks

AGAIN = 1.0
"""Seconds between two looks at the whole if nothing is said to have changed."""
PATIENCE = 1.0
"""Seconds until a daemon that went away is asked again."""
WINDOW = 10.0
"""Seconds that rates are taken over."""
FADE = 8.0
"""Seconds for which it is marked what came, changed or went."""
MOST = 100
"""So many events are shown, where there is room."""
SIGNS = {"well": ("✓", "green"), "away": ("○", "yellow"), "amiss": ("!", "bold red")}
MARKS = {"came": ("+", "green"), "changed": ("~", "cyan"), "gone": ("-", "red")}
LEVELS = {"warning": "yellow", "error": "bold red", "change": "cyan"}
RATES = {"calls": "calls", "refused": "refused", "changes": "changes"}

Row = Sequence[Text]


@click.command()
@asks
def watch(client: Client, *, as_json: bool) -> None:
    """
    Show what happens, as it happens, until Ctrl-C.

    On a terminal it is a screen of hosts, networks and endpoints; + has just come, ~
    changed, - gone. Elsewhere, and with --json, it is a line for each event.
    """
    try:
        if as_json or not sys.stdout.isatty():
            lines(client, as_json=as_json)
        else:
            screen(client)
    except KeyboardInterrupt:
        pass


def patiently(client: Client) -> Iterator[Any]:
    """
    Yield news for ever; while the daemon is away, ClientErrors that say so.

    Raises ClientError if it was not there in the first place.
    """
    heard = False
    while True:
        try:
            for news in client.news("events"):
                heard = True
                yield news
        except ClientError as error:
            if not heard:
                raise
            yield error
        else:
            yield ClientError(f"pynet stopped (no more news from {client.path})")
        time.sleep(PATIENCE)


# Lines, for pipes and programs.


def lines(client: Client, *, as_json: bool) -> None:
    """Print a line for each event."""
    said = ""
    for news in patiently(client):
        if isinstance(news, ClientError):
            if str(news) != said:
                said = str(news)
                click.echo(f"pynet: {said}; trying again", err=True)
            continue
        said = ""
        for event in news["events"] if news else ():
            click.echo(json.dumps(event) if as_json else plain(event))


def plain(event: Mapping[str, Any]) -> str:
    """Return an event in one line."""
    return table.clean(f"{clock(event)} {event['event']} {facts(event)}").rstrip()


def clock(event: Mapping[str, Any]) -> str:
    """Return when an event was, by the clock here."""
    at = event["at"]
    with contextlib.suppress(ValueError):
        at = datetime.fromisoformat(at).timestamp() if isinstance(at, str) else at
    known = isinstance(at, int | float)
    return time.strftime("%H:%M:%S", time.localtime(at)) if known else ""


def facts(event: Mapping[str, Any]) -> str:
    """Return what an event is about."""
    return " ".join(f"{k}={word(v)}" for k, v in event["facts"].items())


def word(value: Any) -> str:
    """Write a fact's value in one line."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split())


# The screen.


@dataclass(slots=True)
class Seen:
    """What was seen so far."""

    whole: Any = None
    events: deque[Any] = field(default_factory=lambda: deque(maxlen=MOST))
    samples: deque[tuple[float, Any]] = field(default_factory=deque)
    """Counts, and when they were so."""
    marks: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    """What became of things, by kind and id, and when."""
    gone: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Things that are no more, as they were."""
    trouble: str = ""

    def take(self, whole: Any) -> None:
        """Take in how all is now."""
        now = time.monotonic()
        for kind in ("hosts", "networks", "endpoints") if self.whole else ():
            before = {t["id"]: t for t in self.whole[kind]}
            after = {t["id"]: t for t in whole[kind]}
            for key in before.keys() | after.keys():
                verb = became(before.get(key), after.get(key))
                if verb:
                    self.marks[kind, key] = (verb, now)
                    self.gone[kind, key] = before.get(key)
        late = [key for key, (_, at) in self.marks.items() if now - at > FADE]
        for name in late:
            del self.marks[name], self.gone[name]
        self.whole, self.trouble = whole, ""
        self.samples.append((now, whole["counts"]))
        while now - self.samples[0][0] > WINDOW:
            self.samples.popleft()

    def rates(self) -> dict[str, float]:
        """Return how often things happen in a second, lately."""
        (begin, before), (end, after) = self.samples[0], self.samples[-1]
        seconds = max(end - begin, AGAIN)
        return {k: max(after[k] - before[k], 0) / seconds for k in RATES}

    def things(self, kind: str) -> list[tuple[str, Any]]:
        """Return things of a kind with what became of them, the newest first."""
        listed = [(self.marks.get((kind, t["id"])), t) for t in self.whole[kind]]
        listed += [
            (mark, self.gone[key])
            for key, mark in self.marks.items()
            if key[0] == kind and mark[0] == "gone"
        ]
        listed.sort(key=lambda pair: -pair[0][1] if pair[0] else 0)
        return [(mark[0] if mark else "", thing) for mark, thing in listed]


def became(before: Any, after: Any) -> str:
    """Say what became of a thing, "" if it is as it was."""
    if before is None:
        return "came"
    if after is None:
        return "gone"
    return "" if lasting(before) == lasting(after) else "changed"


def lasting(thing: Any) -> Any:
    """Return a thing without what changes with others."""
    return {k: v for k, v in thing.items() if k not in {"behind", "endpoints"}}


def screen(client: Client) -> None:
    """Draw until interrupted."""
    seen, latest = Seen(), 0.0
    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for news in patiently(client):
            try:
                if isinstance(news, ClientError):
                    raise news
                seen.events.extend(news["events"] if news else ())
                if (news and news["changed"]) or time.monotonic() - latest > AGAIN:
                    seen.take(client.get("topology"))
                    latest = time.monotonic()
            except ClientError as error:
                seen.trouble = f"{error}; trying again"
            live.update(drawn(seen, console.width, console.height), refresh=True)


def drawn(seen: Seen, width: int, height: int) -> Group:
    """Draw what was seen, on so many columns and lines."""
    if seen.whole is None:
        return Group(Text(table.clean(seen.trouble or "…"), style="bold red"))
    head = list(heading(seen, width))
    left = max(height - len(head) - 1, 4)
    parts: list[Text | Table] = [*head]
    wanted = {
        "hosts": host_rows(seen),
        "networks": network_rows(seen),
        "endpoints": endpoint_rows(seen),
        "events": event_rows(seen),
    }
    shares = share({kind: len(rows) for kind, rows in wanted.items()}, left)
    for kind, rows in wanted.items():
        if shares[kind] > 1:
            there = len(seen.whole.get(kind, rows))
            parts.append(section(f"{kind} {there}", rows, shares[kind], width))
    parts.append(Text("Ctrl-C ends this", style="dim"))
    return Group(*parts)


def share(wanted: Mapping[str, int], lines: int) -> dict[str, int]:
    """Divide lines between sections, titles included: who needs less leaves more."""
    shares, left = {}, lines
    for number, kind in enumerate(sorted(wanted, key=lambda kind: wanted[kind])):
        shares[kind] = min(wanted[kind] + 1, left // (len(wanted) - number))
        left -= shares[kind]
    return shares


def heading(seen: Seen, width: int) -> Iterator[Text]:
    """Yield the lines on top."""
    whole = seen.whole
    amiss = len(whole["attention"])
    verdict = (
        ("✓ well", "green") if not amiss else (f"! {amiss} to look at", "bold red")
    )
    store = ("store AWAY", "bold red") if whole["away"] else (
        f"store at {whole['revision']}", "")  # fmt: skip
    yield cut(width, (f"pynet {whole['name']}", "bold"), verdict, store,
              (f"docker {whole['docker']}", ""),
              (f"up {duration(whole['uptime'])}", ""))  # fmt: skip
    rates = seen.rates()
    said = [(f"{name} {rates[key]:.1f}/s", "") for key, name in RATES.items()]
    yield cut(width, *said, (f"put right {whole['counts']['repairs']}", ""))
    for text in [seen.trouble] if seen.trouble else whole["attention"][:2]:
        yield cut(width, (f"! {text}", "bold red"))


def cut(width: int, *parts: tuple[str, str]) -> Text:
    """Make a line of parts, cut off where the screen ends."""
    line = Text("  ").join(
        Text(table.clean(text), style=style) for text, style in parts
    )
    line.truncate(width, overflow="ellipsis")
    return line


def section(title: str, rows: Sequence[Row], lines: int, width: int) -> Table:
    """Make a table of as many rows as there is room for, below a title."""
    shown = rows if len(rows) < lines else rows[: lines - 1]
    more = f" (the first {len(shown)})" if len(shown) < len(rows) else ""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), width=width,
                 title=title.upper() + more, title_justify="left",
                 title_style="bold reverse", show_header=False)  # fmt: skip
    for number in range(max((len(row) for row in rows), default=1)):
        last = number == len(rows[0]) - 1 if rows else True
        made.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if last else None)
    for row in shown:
        made.add_row(*row)
    return made


def lead(verb: str, thing: Any) -> Row:
    """Return what stands before a thing: what became of it, and how it is."""
    return Text(*MARKS.get(verb, (" ", ""))), Text(*SIGNS[thing["health"]])


def cells(*texts: object, style: str = "") -> Row:
    """Make cells of texts that may come from users."""
    return [Text(table.clean(" ".join(str(t).split())), style=style) for t in texts]


def host_rows(seen: Seen) -> list[Row]:
    """Return a row for each host."""
    return [
        (
            *lead(verb, host),
            *cells(
                host["label"],
                host["state"],
                host["vtep"] or "",
                f"{host['endpoints']} endpoints",
                f"{host['behind']} behind" if host["behind"] else "",
            ),
        )
        for verb, host in seen.things("hosts")
    ]


def network_rows(seen: Seen) -> list[Row]:
    """Return a row for each network."""
    return [
        (
            *lead(verb, network),
            *cells(
                network["label"],
                network["mode"],
                f"{network['endpoints']} endpoints",
                " ".join(network["subnets"]),
            ),
        )
        for verb, network in seen.things("networks")
    ]


def endpoint_rows(seen: Seen) -> list[Row]:
    """Return a row for each endpoint."""
    hosts = {h["id"]: h["label"] for h in seen.whole["hosts"]}
    networks = {n["id"]: n["label"] for n in seen.whole["networks"]}
    return [
        (
            *lead(verb, one),
            *cells(
                one["label"],
                networks.get(one["network"], one["network"][:12]),
                hosts.get(one["host"], one["host"][:12]),
                " ".join(a.partition("/")[0] for a in one["addresses"]),
            ),
        )
        for verb, one in seen.things("endpoints")
    ]


def event_rows(seen: Seen) -> list[Row]:
    """Return a row for each event, the latest first."""
    kinds = ("endpoint", "network", "host")
    labels = {k: {t["id"]: t["label"] for t in seen.whole[k + "s"]} for k in kinds}
    return [
        (
            *cells(clock(event), style="dim"),
            *cells(event["event"], style=LEVELS.get(event["level"], "")),
            *cells(facts(named(event, labels))),
        )
        for event in reversed(seen.events)
    ]


def named(event: Any, labels: Mapping[str, Mapping[str, str]]) -> Any:
    """Return an event with the names that things have by now."""
    ids = event.get("ids", {})
    known = {kind: labels[kind].get(ids[kind]) for kind in ids}
    now = {kind: label for kind, label in known.items() if label}
    return {**event, "facts": {**event["facts"], **now}}
