"""`pynet status`, `explain`, `diff` and `census`: what holds on this host."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from cnmdriver.cli import table
from cnmdriver.cli.client import Client
from cnmdriver.cli.options import asks, show_json

AMISS = 1
"""The exit code that says no."""


@click.command()
@asks
def status(client: Client, *, as_json: bool) -> None:
    """Tell whether all is well on this host: exit code 0 or 1."""
    found = client.get("status")
    if as_json:
        show_json(found)
    else:
        click.echo("\n".join(summary(found)))
    sys.exit(0 if found["well"] else AMISS)


def summary(found: Any) -> Iterator[str]:
    """Yield the status in lines."""
    daemon, host, store = found["daemon"], found["host"], found["store"]
    verdict = "well" if found["well"] else "NOT well"
    counts = ("networks", "endpoints", "ports", "addresses")
    away = "away" if store["away"] else f"at revision {store['revision']}"
    lines = {
        "pynet": verdict,
        "daemon": f"version {daemon['version']}, pid {daemon['pid']}, "
        f"up {duration(daemon['uptime'])}",
        "host": f"{host['name']} ({host['id']})",
        "store": f"{store['url']}, {away}",
        "docker": found["docker"],
        "holds": ", ".join(f"{name} {found[name]}" for name in counts),
    }
    if found.get("repairs"):
        lines["mended"] = ", ".join(f"{k} {n}" for k, n in found["repairs"].items())
    if found.get("drops"):
        lines["dropped"] = ", ".join(f"{k} {n}" for k, n in found["drops"].items())
    yield from (table.clean(f"{name:<8}{text}") for name, text in lines.items())
    if found["attention"]:
        yield from ("", "Attention:")
        yield from (f"- {table.clean(sentence)}" for sentence in found["attention"])


def duration(seconds: float | None) -> str:
    """Write a time in its two largest units."""
    if seconds is None:
        return "?"
    left, parts = int(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


@click.command()
@click.argument("network", required=False)
@asks
def explain(client: Client, network: str | None, *, as_json: bool) -> None:
    """
    Print the commands that do by hand what pynet does, for all networks or one.

    The text runs as it is, by bash -e in an empty network namespace.
    """
    query = {} if network is None else {"network": network}
    found = client.get("explain", **query)
    if as_json:
        show_json(found)
    else:
        click.echo(found["commands"], nl=False)


@click.command()
@asks
def diff(client: Client, *, as_json: bool) -> None:
    """
    Compare the kernel with the plans; exit code 1 if they differ.

    A line begins with + for what the kernel lacks, with - for what is too much, and
    with ~ for what is not as planned.
    """
    found = client.get("diff")
    if as_json:
        show_json(found)
    else:
        for line in found["lines"]:
            click.echo(table.clean(line))
    sys.exit(AMISS if found["lines"] else 0)


@click.command()
@asks
def census(client: Client, *, as_json: bool) -> None:
    """List all that pynet owns on this host, and what it changed."""
    found = client.get("census")
    if as_json:
        show_json(found)
        return
    rows = [(op["kind"], said(op)) for op in found["owned"]]
    rows += [("changed", changed(*item)) for item in found["settings"].items()]
    rows += [("foreign", f"{f['device']} {f['alias']}") for f in found["foreign"]]
    if rows:
        table.show(("KIND", "WHAT"), rows)
    else:
        click.echo("pynet owns nothing on this host")


def said(op: Any) -> str:
    """Return an operation in one line: its key, and what else there is to know."""
    _, where, *key = op["key"]
    place = "" if where == "host" else f"{where}: "
    more = {
        "bridge": ("mac", "mtu"),
        "veth": ("peer", "bridge"),
        "sysctl": ("value",),
        "element": ("value",),
        "hold": ("target", "target_port"),
    }.get(op["kind"], ())
    facts = ((name, text(op[name])) for name in more)
    return place + " ".join(
        (*key, *(f"{name}={value}" for name, value in facts if value))
    )


def text(value: Any) -> str:
    """Write a field's value, nothing for none."""
    return (
        ":".join(value)
        if isinstance(value, list)
        else ""
        if value is None
        else str(value)
    )


def changed(path: str, values: Any) -> str:
    """Return a setting of the host that pynet changed."""
    return f"{path} was {values['was']}, is {values['is']}"
