"""`pynet trace` and `doctor`: what does not work, why, and what mends it."""

import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import click

from cnmdriver.cli import table
from cnmdriver.cli.client import Client, NotRunningError
from cnmdriver.cli.options import asks, show_json

AMISS = 1
WIDTH = 80
MARKS = {True: "ok", False: "!!", None: "?"}


@click.command()
@click.argument("source", metavar="A")
@click.argument("target", metavar="B")
@asks
def trace(client: Client, source: str, target: str, *, as_json: bool) -> None:
    """
    Find where a packet between two endpoints dies, and what mends it.

    A and B are endpoints of one network, by name, id or address; one is on this host.
    Each step of the way is compared with what it should be, on both hosts, and real
    packets are sent. Nothing is changed.
    """
    found = client.get("trace", **{"from": source, "to": target})
    if as_json:
        show_json(found)
    else:
        for line in told(found):
            click.echo(line)
    sys.exit(0 if found["reachable"] else AMISS)


def told(found: Any) -> Iterator[str]:
    """Yield a trace in lines."""
    yield f"{party(found['from'])}  ->  {party(found['to'])}"
    yield table.clean(f"network {found['network']}, {found['mode']}")
    yield ""
    hosts = max(len(h["host"]) for h in found["hops"])
    names = max(len(h["name"]) for h in found["hops"])
    for hop in found["hops"]:
        mark = MARKS[hop["well"]]
        head = f"{mark:<3}{hop['host']:<{hosts}}  {hop['name']:<{names}}  "
        yield from folded(head, hop["found"], lines=1 if hop["well"] else 9)
    yield ""
    for echo in found["probes"]:
        yield from folded("probe  ", probed(echo))
    yield from folded("", found["verdict"])
    if found["remedy"]:
        where = f" on {table.clean(found['at']['host'])}" if found["at"] else ""
        yield from folded(f"remedy{where}: ", found["remedy"], whole=True)


def party(one: Any) -> str:
    """Return who an endpoint is."""
    where = one["addresses"][0] if one["addresses"] else one["mac"]
    return table.clean(f"{one['name']} ({where}, {one['host']})")


def probed(echo: Any) -> str:
    """Return what became of a probe."""
    if echo["milliseconds"] is not None:
        became = f"answered in {echo['milliseconds']:g} ms"
    else:
        became = echo["error"] or "no answer"
    return f"{echo['bytes']} bytes to {echo['to']}: {became}"


SIGNS = {"ok": "ok", "info": "i", "warning": "!", "error": "!!"}


@click.command()
@asks
def doctor(client: Client, *, as_json: bool) -> None:
    """
    Check this host, and the way to each other one, each finding with its remedy.

    Packets are sent to the other hosts, and from a container here to one on each of
    them. Nothing is changed.
    """
    try:
        found = client.get("doctor")
    except NotRunningError:
        # Imported late: with a daemon it is not needed.
        from cnmdriver.insight.doctor import alone  # noqa: PLC0415

        found = alone()
    if as_json:
        show_json(found)
    else:
        for line in findings(found["findings"]):
            click.echo(line)
    sys.exit(found["code"])


def findings(found: Any) -> Iterator[str]:
    """Yield findings in lines; what is well in one, anything else with why and how."""
    names = max(len(table.clean(one["check"])) for one in found)
    for one in found:
        sign = SIGNS.get(one["severity"], "?")
        head = f"{sign:<3}{table.clean(one['check']):<{names}}  "
        yield from folded(head, one["what"])
        if one["why"]:
            yield from folded(" " * len(head), one["why"])
        if one["remedy"]:
            yield from folded(" " * len(head) + "-> ", one["remedy"], whole=True)


def folded(
    head: str, text: str, *, lines: int = 99, whole: bool = False
) -> Iterator[str]:
    """Yield a text in lines below each other; commands stay `whole`, to be copied."""
    text = table.clean(text)
    if whole:
        yield head + text
        return
    width = max(WIDTH - len(head), 30)
    parts = textwrap.wrap(
        text, width, max_lines=lines, placeholder=" …", break_on_hyphens=False
    )
    for number, line in enumerate(parts or [""]):
        yield (head if number == 0 else " " * len(head)) + line
