"""Is it well: the daemon, its store, Docker's door, and what needs attention."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.insight import kernel
from cnmdriver.insight.report import Json, ports, text
from cnmdriver.model import Reservation
from cnmdriver.plan.ops import Difference
from cnmdriver.privileges import lacking
from cnmdriver.redaction import USERINFO
from cnmdriver.store import checks

SPARED = {
    False: "only removals succeed",
    True: "nothing new is kept here, and without the store only removals succeed",
}
"""What a disk that takes nothing leaves, by whether the store is shared."""
SHOWN = 3
"""How many of a kind are named; of more there is only the number."""


async def status(site: Site, info: Mapping[str, object]) -> Json:
    """
    Return the state of this host's pynet.

    `info` has what only the daemon knows of itself: `pid`, `uptime` in seconds, `store`
    (its address), `docker` ("connected", "away" or "off"), `hidden` (whether it lost
    its lease), `docker_version`, `mends` (whether drift is put right), and the
    sentences of `problems` and the names of `orphans` that the last audit left.
    """
    attention = [sentence async for sentence in remarks(site, info)]
    members = list(site.members())
    held = site.view.all(Reservation, "addresses/")
    return {
        "well": not attention,
        "attention": attention,
        "daemon": {
            "version": site.host.version,
            "pid": info.get("pid"),
            "uptime": info.get("uptime"),
        },
        "host": {
            "id": site.host.id,
            "name": site.host.name,
            "boot": site.boot,
            "vtep": text(site.host.vtep),
        },
        "store": {
            "url": USERINFO.sub("", str(info.get("store", ""))),
            "revision": site.view.revision,
            "away": site.state.away,
        },
        "docker": info.get("docker"),
        "repairs": info.get("repairs", {}),
        "drops": await drops(site),
        "networks": len(members),
        "endpoints": sum(len(site.endpoints(m.network)) for m in members),
        "ports": len(ports(site)),
        "addresses": sum(r.host == site.host.id for r in held),
    }


async def remarks(site: Site, info: Mapping[str, object]) -> AsyncIterator[str]:
    """Yield a sentence for everything a person should look at."""
    for sentence in (*reached(site, info), *lacking()):
        yield sentence
    if not info.get("mends", True):
        yield (
            "what others change of pynet's in the kernel is reported and left, as "
            "repair=false says; start pynet without that to have it put right"
        )
    async for sentence in kept(site):
        yield sentence
    for sentence in stored(site, info):
        yield sentence
    for name in strings(info.get("orphans")):
        yield f"{name} is in use by a sandbox and in no record; pynet diff shows it"
    for problem in strings(info.get("problems")):
        yield f"the last audit could not mend the kernel: {problem}"
    async for sentence in differences(site):
        yield sentence


def reached(site: Site, info: Mapping[str, object]) -> Iterator[str]:
    """Say whether the store, and through it the others, are out of reach."""
    if site.state.away is not None:
        since = time.strftime("%H:%M:%S UTC", time.gmtime(site.state.since))
        why = USERINFO.sub("", site.state.away)
        yield f"the store has been away since {since}: {why}"
    if info.get("hidden"):
        yield (
            "this host has no lease in the store: the others do not see its containers "
            "until it has one again"
        )


def stored(site: Site, info: Mapping[str, object]) -> Iterator[str]:
    """Say what is in the store as it should not be, or lacks there."""
    yield from strings(info.get("conflicts"))
    if site.view.missing:
        yield (
            f"the store lacks {len(site.view.missing)} records that this host knows: "
            "it was wiped, restored or exchanged; what is in use is published again"
        )
    malformed = sorted(site.view.malformed.items())
    if malformed[SHOWN:]:
        number = len(malformed)
        yield f"{number} records in the store cannot be read and are left out, such as:"
    for key, error in malformed[:SHOWN]:
        name = checks.shown(key)
        yield f"record {name} in the store cannot be read and is left out: {error}"


async def drops(site: Site) -> dict[str, int]:
    """Count what was dropped as nobody may send it; nothing if that cannot be read."""
    try:
        found = await site.dataplane.drops()
    except DriverError:
        return {}
    return {kind: count for kind, count in sorted(found.items()) if count}


def strings(value: object) -> list[str]:
    """Return the texts of a list."""
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


async def kept(site: Site) -> AsyncIterator[str]:
    """Say what waits to be written to the store, and if the disk takes nothing."""
    try:
        for sentence in await site.state.troubles():
            yield f"{sentence}; until then {SPARED[site.state.store.shared]}"
        pending = len(await site.state.local.pending())
    except DriverError as error:
        yield f"the local database cannot be read: {error}"
        return
    if pending:
        yield f"changes that wait until the store is back: {pending}"


async def differences(site: Site) -> AsyncIterator[str]:
    """Say what is not in the kernel as it should be."""
    try:
        found = await kernel.difference(site)
        foreign = await site.dataplane.foreign()
    except DriverError as error:
        yield f"the kernel cannot be read: {error}"
        return
    if found:
        yield f"the kernel differs from the plans: {summary(found)}; see pynet diff"
    for name, alias in sorted(foreign):
        yield (
            f"device {name} is another pynet's ({alias}) and left alone; if that "
            f"daemon is gone for good, remove it with ip link del {name}"
        )


def summary(found: Difference) -> str:
    """Name a few differences, or count many."""
    lines = list(found.lines())
    if len(lines) <= SHOWN:
        return ", ".join(lines)
    numbers = (len(found.lacking), len(found.changed), len(found.surplus))
    words = ("lacking", "not as planned", "too much")
    parts = zip(numbers, words, strict=True)
    return ", ".join(f"{number} {word}" for number, word in parts if number)
