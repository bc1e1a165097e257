"""
What is counted and measured, in Prometheus' text form.

What happens often is counted as it happens: steps of the kernel by the step hook that
failpoints use too, calls by the one place that answers them, the store and the kernel
as wholes by a door before each. What there is, is looked up when somebody asks.
"""

import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cnmdriver.dataplane.handler import Step
from cnmdriver.dataplane.kernel import Kernel, all_of
from cnmdriver.driver.remotes import Remotes
from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError
from cnmdriver.insight import report, topology
from cnmdriver.insight.events import Events
from cnmdriver.insight.topology import ReadInfo
from cnmdriver.insight.watching import Watching
from cnmdriver.logs import Journal
from cnmdriver.model import Endpoint, Network, Pool, Reservation
from cnmdriver.plan.ops import Plan
from cnmdriver.store.base import Change, Event, Lease, Listing, Store
from cnmdriver.web.app import application

QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper bounds of what is measured, in seconds: Docker's calls end within ten."""


DOORS = ("store", "kernel")

# When each began to be counted would double the lines, and Prometheus has no use of it.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics(Watching):
    """All that is measured in one daemon."""

    def __init__(self, journal: Journal, version: str) -> None:
        """Have measured nothing; `version` is pynet's."""
        super().__init__(journal)
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "pynet_docker_calls",
            "Calls of Docker, by what became of them.",
            ["method", "outcome"],
            registry=self.registry,
        )
        self.call_seconds = self.histogram(
            "pynet_docker_call_seconds", "How long Docker waited for a call.", "method"
        )
        self.operations = {
            door: Counter(
                f"pynet_{door}_operations",
                f"Operations of the {door}, by what became of them.",
                ["operation", "outcome"],
                registry=self.registry,
            )
            for door in DOORS
        }
        self.operation_seconds = {
            door: self.histogram(
                f"pynet_{door}_operation_seconds",
                f"How long an operation of the {door} took.",
                "operation",
            )
            for door in DOORS
        }
        self.steps = Counter(
            "pynet_kernel_steps",
            "Objects that plans had made or removed in the kernel.",
            ["verb", "kind"],
            registry=self.registry,
        )
        self.lag = self.histogram(
            "pynet_programming_lag_seconds",
            "From the news of what another host did until the kernel held it.",
        )
        Info("pynet_build", "What runs.", registry=self.registry).info(
            {"version": version}
        )
        Gauge(
            "pynet_start_time_seconds",
            "When the daemon was started, in seconds of Unix time.",
            registry=self.registry,
        ).set_to_current_time()

    def histogram(self, name: str, text: str, *labels: str) -> Histogram:
        """Make a histogram of seconds."""
        return Histogram(name, text, labels, buckets=QUICK, registry=self.registry)

    def called(self, method: str, outcome: str, seconds: float) -> None:
        """Count a call of Docker."""
        super().called(method, outcome, seconds)
        self.calls.labels(method, outcome).inc()
        self.call_seconds.labels(method).observe(seconds)

    async def step(self, name: str) -> None:
        """Count a step of the kernel; those of the store have a door of their own."""
        verb, _, kind = name.partition(".")
        if verb in {"apply", "clear"}:
            self.steps.labels(verb, kind).inc()

    @contextmanager
    def timing(self, door: str, operation: str) -> Iterator[None]:
        """Measure an operation, however it ends."""
        begin, outcome = time.perf_counter(), "cancelled"
        try:
            yield
            outcome = "ok"
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = time.perf_counter() - begin
            self.operation_seconds[door].labels(operation).observe(seconds)
            self.operations[door].labels(operation, outcome).inc()

    def kernel(self, *, host: str, run_dir: Path, step: Step, namespace: str) -> Kernel:
        """Make the door to the kernel."""
        made = TimedKernel(host=host, run_dir=run_dir, step=step, namespace=namespace)
        made.metrics = self
        return made

    def store(self, store: Store) -> Store:
        """Return the door to a store."""
        return TimedStore(store, self)

    def page(
        self, site: Site, remotes: Remotes, info: ReadInfo, events: Events
    ) -> web.Application:
        """Make what shows all of it; from now on it can be looked up."""
        found = Found(site, remotes, info)
        self.registry.register(found)
        remotes.programmed = self.lag.observe

        async def scrape() -> bytes:
            await found.look()
            return generate_latest(self.registry)

        return application(site, info=info, events=events, scrape=scrape)


class TimedStore:
    """A store whose operations are measured."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        """Stand before a store."""
        self.store = store
        self.metrics = metrics
        self.shared = store.shared

    async def open(self) -> None:
        """Connect, or make the file."""
        with self.metrics.timing("store", "open"):
            await self.store.open()

    async def close(self) -> None:
        """Let go; watches end."""
        await self.store.close()

    async def trouble(self) -> str:
        """Say what keeps this host's disk from taking anything new."""
        return await self.store.trouble()

    def reread(self) -> None:
        """Look again at the files that a login needs."""
        self.store.reread()

    async def read(self, prefix: str) -> Listing:
        """Return all keys that start with the prefix, at one revision."""
        with self.metrics.timing("store", "read"):
            return await self.store.read(prefix)

    async def commit(self, change: Change, lease: Lease | None = None) -> int:
        """Write all or nothing and return the revision of this write."""
        with self.metrics.timing("store", "commit"):
            return await self.store.commit(change, lease)

    def watch(
        self, prefix: str, start: int, *, end: str = ""
    ) -> AsyncIterator[tuple[Event, ...]]:
        """Yield what is written under the prefix from revision `start` on."""
        return self.store.watch(prefix, start, end=end)

    async def lease(self, ttl: float) -> Lease:
        """Make a lease of so many seconds."""
        with self.metrics.timing("store", "lease"):
            return await self.store.lease(ttl)


class TimedKernel(Kernel):
    """A kernel whose operations are measured, the wait for their turn included."""

    metrics: Metrics

    async def apply(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """Make every operation hold, in order, or leave the kernel as it was."""
        with self.metrics.timing("kernel", "apply"):
            await super().apply(plan, still)

    async def clear(self, plan: Plan, still: Callable[[Plan], Plan] = all_of) -> None:
        """Remove every object, last first."""
        with self.metrics.timing("kernel", "clear"):
            await super().clear(plan, still)

    async def found(self, wanted: Plan = ()) -> Plan:
        """Read everything of ours in the kernel."""
        with self.metrics.timing("kernel", "found"):
            return await super().found(wanted)


class Found(Collector):
    """What there is at the moment."""

    def __init__(self, site: Site, remotes: Remotes, read: ReadInfo) -> None:
        """Take where to look."""
        self.site = site
        self.remotes = remotes
        self.read = read
        self.drops: Mapping[str, int] = {}
        self.outbox = 0
        self.marks: Mapping[str, int] | None = None

    async def look(self) -> None:
        """Ask the kernel and the store; what cannot be read is as it was."""
        with suppress(DriverError):
            self.drops = await self.site.dataplane.drops()
        with suppress(DriverError):
            self.outbox = len(await self.site.state.local.pending())
        self.marks = await topology.marks(self.site, topology.SHORTLY)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics."""
        yield from self.sizes()
        yield from self.troubles()
        yield from self.peers()
        yield counted("pynet_repairs", "Objects put right that others changed.", "kind",
                      texts(self.read().get("repairs")))  # fmt: skip
        yield counted("pynet_dropped_packets", "Packets nobody may send.", "kind",
                      self.drops)  # fmt: skip

    def sizes(self) -> Iterator[Metric]:
        """Yield how much there is."""
        view, here = self.site.view, self.site.host.id
        own = {m.network for m in self.site.members()}
        ports = len(report.ports(self.site))
        yield gauge("pynet_pools", "Pools that are handed out.",
                    sum(1 for _ in view.all(Pool, "pools/")))  # fmt: skip
        yield gauge("pynet_published_ports", "Ports published on this host.", ports)
        yield split("pynet_networks", "Networks.", here_or_elsewhere(
            n.id in own for n in view.all(Network, "networks/")))  # fmt: skip
        yield split("pynet_endpoints", "Endpoints.", here_or_elsewhere(
            e.host == here for e in view.all(Endpoint, "endpoints/")))  # fmt: skip
        yield split("pynet_addresses", "Addresses taken.", here_or_elsewhere(
            r.host == here for r in view.all(Reservation, "addresses/")))  # fmt: skip

    def troubles(self) -> Iterator[Metric]:
        """Yield how the store is, and what waits for it."""
        state, info = self.site.state, self.read()
        conflicts, problems = info.get("conflicts"), info.get("problems")
        for name, text, value in (
            ("store_away", "1 while the store cannot be used.", state.away is not None),
            ("hidden", "1 while this host has no lease.", info.get("hidden") is True),
            ("outbox_changes", "Changes that wait for the store.", self.outbox),
            ("records_missing", "Records the store lacks.", len(state.view.missing)),
            ("records_malformed", "Values in the store that are no records.",
             len(state.view.malformed)),
            ("conflicts", "What this host has and is another's by now.",
             len(conflicts) if isinstance(conflicts, list) else 0),
            ("unmended", "What the last audit could not put right.",
             len(problems) if isinstance(problems, list) else 0),
            ("store_revision", "The latest revision this host knows.",
             state.view.revision),
            ("programmed_revision",
             "The store's, at the last change of the kernel.", self.remotes.worked),
        ):  # fmt: skip
            yield gauge(f"pynet_{name}", text, value)

    def peers(self) -> Iterator[Metric]:
        """Yield how the hosts are."""
        hosts = topology.hosts(self.site, self.read(), self.marks)
        states = dict.fromkeys(("alive", "resting", "gone"), 0)
        states |= Tally(str(h["state"]) for h in hosts)
        yield split("pynet_hosts", "Hosts of the cluster.", states, "state")
        behind = GaugeMetricFamily(
            "pynet_host_endpoints_behind",
            "Endpoints of others that a host's kernel does not hold yet.",
            labels=["host"],
        )
        for host in hosts if self.marks is not None else ():
            behind.add_metric([str(host["name"])], float(str(host["behind"])))
        yield behind


def gauge(name: str, text: str, value: float) -> Metric:
    """Return a single value."""
    return GaugeMetricFamily(name, text, value=value)


def split(
    name: str, text: str, parts: Mapping[str, int], label: str = "where"
) -> Metric:
    """Return a value by one label."""
    found = GaugeMetricFamily(name, text, labels=[label])
    for part, value in parts.items():
        found.add_metric([part], value)
    return found


def counted(name: str, text: str, label: str, parts: Mapping[str, int]) -> Metric:
    """Return a count by one label."""
    found = CounterMetricFamily(name, text, labels=[label])
    for part, value in sorted(parts.items()):
        found.add_metric([part], value)
    return found


def here_or_elsewhere(own: Iterable[bool]) -> dict[str, int]:
    """Count what is this host's and what is others'."""
    tally = Tally(own)
    return {"here": tally[True], "elsewhere": tally[False]}


def texts(value: object) -> dict[str, int]:
    """Return counts by name."""
    if not isinstance(value, Mapping):
        return {}
    return {str(k): int(v) for k, v in value.items()}
