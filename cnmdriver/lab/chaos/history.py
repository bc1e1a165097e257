"""
Who had which address, and from when to when; and what a run may not leave behind.

A stay begins when Docker has said that a running container has an address, and ends
before a command or a fault that may end it is begun. So a stay is never longer than
the truth, and two that overlap are an address that was given twice.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

KEPT = ("hosts/", "alive/", "fence/", "kept/", "watermarks/", "applied/", "cluster")
"""What stays in the store when no network is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """An address of a network at a container, from when to when (monotonic time)."""

    network: str
    address: str
    host: str
    container: str
    since: float
    until: float | None = None

    def __str__(self) -> str:
        """Return who it was and when."""
        end = "the end" if self.until is None else f"{self.until:.3f}"
        return f"{self.container} on {self.host} from {self.since:.3f} to {end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a host or the store has, as sorted lines of text by where they are."""

    things: Mapping[str, tuple[str, ...]]

    def beyond(self, before: "State") -> list[str]:
        """Return what is here and was not before, each with where it is."""
        return [
            f"{where}: {thing}"
            for where, things in sorted(self.things.items())
            for thing in things
            if thing not in before.things.get(where, ())
        ]


class History:
    """All stays of a run; threads may write at once."""

    def __init__(self) -> None:
        """Begin with no stay."""
        self.lock = threading.Lock()
        self.over: list[Stay] = []
        self.open: dict[tuple[str, str, str], Stay] = {}
        self.doubts: set[tuple[str, str]] = set()
        self.lives: defaultdict[str, int] = defaultdict(int)
        self.start = time.monotonic()

    def now(self) -> float:
        """Return the seconds since the run has begun."""
        return time.monotonic() - self.start

    def life(self, host: str) -> int:
        """Return a number that is another one after a fault ended stays on a host."""
        with self.lock:
            return self.lives[host]

    def begin(
        self, host: str, container: str, found: Iterable[tuple[str, str]], life: int
    ) -> None:
        """
        Note the networks and addresses that a container was just seen with.

        `life` is what it was before Docker was asked: an answer from before a fault
        says nothing about the time after it.
        """
        with self.lock:
            if self.lives[host] != life:
                return
            for network, address in found:
                if (container, network) in self.doubts:
                    continue
                self.open.setdefault(
                    (container, network, address),
                    Stay(
                        network=network,
                        address=address,
                        host=host,
                        container=container,
                        since=self.now(),
                    ),
                )

    def doubt(self, container: str, network: str) -> None:
        """
        Believe no address of a container on a network from now on.

        Docker goes on showing the address of a connection that it could not make.
        """
        with self.lock:
            self.doubts.add((container, network))

    def trust(self, container: str, network: str = "") -> None:
        """Believe what Docker shows of a network, or of all: it has just made it."""
        with self.lock:
            self.doubts -= {
                doubt
                for doubt in self.doubts
                if doubt[0] == container and network in {"", doubt[1]}
            }

    def end(self, container: str, network: str = "") -> None:
        """End the stays of a container, on one network or on all."""
        with self.lock:
            self._end(
                stay
                for stay in self.open.values()
                if stay.container == container and network in {"", stay.network}
            )

    def end_host(self, host: str) -> None:
        """End the stays of all containers of a host: a fault may end any of them."""
        with self.lock:
            self.lives[host] += 1
            self._end(stay for stay in self.open.values() if stay.host == host)

    def stays(self) -> list[Stay]:
        """Return all stays, over or not."""
        with self.lock:
            return [*self.over, *self.open.values()]

    def _end(self, stays: Iterable[Stay]) -> None:
        now = self.now()
        for stay in list(stays):
            del self.open[stay.container, stay.network, stay.address]
            self.over.append(replace(stay, until=now))


def twice(stays: Iterable[Stay]) -> list[tuple[Stay, Stay]]:
    """Return the pairs of containers that had one address of a network at one time."""
    places = defaultdict(list)
    for stay in stays:
        places[stay.network, stay.address].append(stay)
    return [pair for place in places.values() for pair in _overlapping(place)]


def _overlapping(stays: Sequence[Stay]) -> list[tuple[Stay, Stay]]:
    found: list[tuple[Stay, Stay]] = []
    running: list[Stay] = []
    for stay in sorted(stays, key=lambda stay: stay.since):
        running = [
            one for one in running if one.until is None or one.until > stay.since
        ]
        found += [(one, stay) for one in running if one.container != stay.container]
        running.append(stay)
    return found
