"""The host's kernel: `census` lists what is ours, `diff` what is not as planned."""

import asyncio
from collections.abc import Iterable
from dataclasses import fields

from cnmdriver.driver.looking import Look
from cnmdriver.driver.site import Site
from cnmdriver.insight.report import Json
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Difference, Op, Sysctl

PAUSE = 0.3
"""Seconds until a difference is looked at again: a call may be half done."""


async def census(site: Site) -> Json:
    """
    Return all that pynet owns on this host; without a network it is empty.

    Settings of the host that were changed stay, and are listed with both values.
    """
    found = await site.dataplane.found(())
    changed = site.dataplane.changed_sysctls()
    now = {op.path: op.value for op in found if isinstance(op, Sysctl)}
    foreign = await site.dataplane.foreign()
    return {
        "owned": listed(op for op in found if not is_host_setting(op)),
        "foreign": [{"device": d, "alias": a} for d, a in sorted(foreign)],
        "settings": {
            path: {"was": old, "is": now.get(path)}
            for path, old in sorted(changed.items())
        },
    }


def is_host_setting(op: Op) -> bool:
    """Tell whether an operation is a setting that is not ours to own."""
    return isinstance(op, Sysctl) and op.keep


def listed(found: Iterable[Op]) -> list[Json]:
    """Return operations by kind and key."""
    return [describe(op) for op in sorted(found, key=lambda op: (kind(op), op.key))]


def kind(op: Op) -> str:
    """Name the type of an operation."""
    return type(op).__name__.lower()


def describe(op: Op) -> Json:
    """Return an operation as a value for JSON."""
    return {
        "kind": kind(op),
        "key": list(op.key),
        **{f.name: plain(getattr(op, f.name)) for f in fields(op)},
    }


def plain(value: object) -> object:
    """Return what JSON can say of a field."""
    if value is None or isinstance(value, bool | int | str):
        return value
    return [str(v) for v in value] if isinstance(value, tuple) else str(value)


async def difference(site: Site) -> Difference:
    """Compare kernel and plans; what a call in progress makes is no difference."""
    first = await Look(site).difference()
    if not first:
        return first
    await asyncio.sleep(PAUSE)
    return ops.lasting(first, await Look(site).difference())


async def diff(site: Site) -> Json:
    """Return the difference, as lines for people and as values."""
    found = await difference(site)
    return {
        "lines": list(found.lines()),
        "lacking": [describe(op) for op in found.lacking],
        "changed": [
            {
                "wanted": describe(wanted),
                "found": describe(there),
                "differs": list(ops.differing(wanted, there)),
            }
            for wanted, there in found.changed
        ],
        "surplus": [describe(op) for op in found.surplus],
    }
