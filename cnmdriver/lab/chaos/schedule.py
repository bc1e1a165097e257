"""
Which faults a chaos run makes, and when: values, and a pure function of the seed.

Faults lie in *lanes*: one for each host, one for all etcd members and one for the
cables. A lane makes one fault at a time and undoes it before the next; the lanes go on
beside each other, so that several faults are there at once.
"""

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

ETCD = "etcd"
CABLES = "cables"
CALM = 5.0
"""Seconds without a fault at the end of a schedule."""
LEASE = (16.0, 20.0)
"""Longer than a host's lease on the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    What is done to which machines, when and for how long; times are in seconds.

    `live` says whether a dockerd that is started afterwards has `--live-restore`.
    """

    at: float
    lane: str
    what: str
    where: tuple[str, ...]
    lasts: float
    live: bool = False

    def __str__(self) -> str:
        """Return the fault as a person would tell it."""
        live = " (live restore)" if self.live else ""
        return f"{self.what} {' '.join(self.where)} for {self.lasts:.1f} s{live}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """
    A kind of fault.

    `weight` is how often it comes up in its lane, `lasts` the least and most seconds
    till it is undone, `mends` the seconds that undoing it takes, `machines` how many
    of the lane's machines it is about.
    """

    what: str
    weight: int
    lasts: tuple[float, float]
    mends: float = 1.0
    machines: int = 1
    kills: int = 0
    live: bool = False


ON_HOSTS = (
    Kind(what="kill pynet", weight=12, lasts=(0.0, 2.0), mends=1.5, kills=1),
    Kind(what="restart pynet", weight=3, lasts=(0.0, 1.0), mends=1.5),
    Kind(what="pause pynet", weight=3, lasts=(0.2, 4.0)),
    Kind(what="pause pynet past its lease", weight=1, lasts=LEASE),
    Kind(what="kill dockerd", weight=3, lasts=(0.0, 2.0), mends=4, kills=1, live=True),
    Kind(what="restart dockerd", weight=2, lasts=(0.0, 1.0), mends=4, live=True),
    Kind(what="kill both", weight=2, lasts=(0.0, 2.0), mends=5, kills=2, live=True),
    Kind(what="power cut", weight=1, lasts=(0.5, 5.0), mends=7, kills=1),
)
ON_MEMBERS = (
    Kind(what="kill etcd", weight=6, lasts=(0.2, 4.0), kills=1),
    Kind(what="restart etcd", weight=1, lasts=(0.0, 1.0)),
    Kind(what="pause etcd", weight=3, lasts=(0.5, 6.0)),
    Kind(what="kill etcd", weight=1, lasts=(2.0, 8.0), machines=2, kills=2),
    Kind(what="pause etcd", weight=1, lasts=(2.0, 8.0), machines=2),
    Kind(what="kill etcd", weight=1, lasts=(2.0, 8.0), machines=3, kills=3),
)
ON_CABLES = (
    Kind(what="cut host from one member", weight=3, lasts=(1.0, 8.0)),
    Kind(what="cut host from all members", weight=3, lasts=(1.0, 8.0)),
    Kind(what="cut host from all members", weight=1, lasts=LEASE),
    Kind(what="cut hosts", weight=2, lasts=(1.0, 6.0)),
    Kind(what="cut members", weight=1, lasts=(1.0, 6.0)),
    Kind(what="unplug host", weight=2, lasts=(0.5, 5.0)),
)
KILLS = {(kind.what, kind.machines): kind.kills for kind in (*ON_HOSTS, *ON_MEMBERS)}
PAUSES = {ETCD: (2.0, 12.0), CABLES: (2.0, 12.0)}
"""Least and most seconds between two faults of a lane."""
BETWEEN = (1.0, 7.0)


def kills(fault: Fault) -> int:
    """Return how many daemons or machines a fault kills."""
    return KILLS.get((fault.what, len(fault.where)), 0)


def schedule(
    seed: int,
    hosts: Sequence[str],
    members: Sequence[str],
    *,
    seconds: float,
    least_kills: int = 0,
) -> tuple[Fault, ...]:
    """
    Return the faults of a run, in the order of their times.

    All are over some seconds before the end. With `least_kills` the run is as long as
    it takes to kill so often, and `seconds` do not count.
    """
    rng = {name: random.Random(f"{seed} {name}") for name in (*hosts, ETCD, CABLES)}  # noqa: S311 - a schedule is no secret
    lanes = [_host_lane(rng[name], name) for name in hosts]
    if members:
        lanes.append(_etcd_lane(rng[ETCD], members))
        lanes.append(_cable_lane(rng[CABLES], hosts, members))
    merged = heapq.merge(*lanes, key=lambda fault: fault.at)
    if least_kills:
        return tuple(_until_killed(merged, least_kills))
    end = seconds - CALM
    before = takewhile(lambda fault: fault.at < end, merged)
    return tuple(fault for fault in before if fault.at + fault.lasts < end)


def _until_killed(faults: Iterator[Fault], wanted: int) -> Iterator[Fault]:
    done = 0
    while done < wanted:
        fault = next(faults)
        done += kills(fault)
        yield fault


def _host_lane(rng: random.Random, host: str) -> Iterator[Fault]:
    for at, kind, lasts in _times(rng, ON_HOSTS, BETWEEN):
        yield Fault(
            at=at,
            lane=host,
            what=kind.what,
            where=(host,),
            lasts=lasts,
            live=kind.live and rng.random() < 0.5,
        )


def _etcd_lane(rng: random.Random, members: Sequence[str]) -> Iterator[Fault]:
    for at, kind, lasts in _times(rng, ON_MEMBERS, PAUSES[ETCD]):
        chosen = rng.sample(members, min(kind.machines, len(members)))
        where = tuple(sorted(chosen))
        yield Fault(at=at, lane=ETCD, what=kind.what, where=where, lasts=lasts)


def _cable_lane(
    rng: random.Random, hosts: Sequence[str], members: Sequence[str]
) -> Iterator[Fault]:
    for at, kind, lasts in _times(rng, ON_CABLES, PAUSES[CABLES]):
        where = _ends(rng, kind.what, hosts, members)
        yield Fault(at=at, lane=CABLES, what=kind.what, where=where, lasts=lasts)


def _ends(
    rng: random.Random, what: str, hosts: Sequence[str], members: Sequence[str]
) -> tuple[str, ...]:
    host = rng.choice(hosts)
    match what:
        case "cut host from one member":
            return host, rng.choice(members)
        case "cut host from all members":
            return (host, *members)
        case "cut hosts":
            return tuple(sorted(rng.sample(hosts, min(2, len(hosts)))))
        case "cut members":
            return tuple(sorted(rng.sample(members, min(2, len(members)))))
    return (host,)


def _times(
    rng: random.Random, kinds: Sequence[Kind], pause: tuple[float, float]
) -> Iterator[tuple[float, Kind, float]]:
    """Yield when a lane has a fault, which kind, and for how long; without end."""
    weights = [kind.weight for kind in kinds]
    at = 0.0
    while at < math.inf:
        at = round(at + rng.uniform(*pause), 2)
        kind = rng.choices(kinds, weights)[0]
        lasts = round(rng.uniform(*kind.lasts), 2)
        yield at, kind, lasts
        at += lasts + kind.mends
