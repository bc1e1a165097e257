"""What a daemon's work tells those who look at it; this one measures nothing."""

from collections import Counter
from pathlib import Path

from aiohttp import web

from cnmdriver.dataplane.handler import Step
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.driver.remotes import Remotes
from cnmdriver.driver.site import Site
from cnmdriver.insight.events import Events
from cnmdriver.insight.topology import ReadInfo
from cnmdriver.logs import Journal
from cnmdriver.store.base import Store


class Watching:
    """Keeps the log's latest lines, and counts Docker's calls."""

    def __init__(self, journal: Journal) -> None:
        """Have counted nothing."""
        self.journal = journal
        self.outcomes: Counter[str] = Counter()

    def called(self, method: str, outcome: str, seconds: float) -> None:
        """Take note of a call of Docker."""
        del method, seconds
        self.outcomes[outcome] += 1

    def counts(self) -> dict[str, int]:
        """Return how many calls there were, and how many were refused."""
        well = self.outcomes["ok"] + self.outcomes["absent"]
        total = self.outcomes.total()
        return {"calls": total, "refused": total - well}

    async def step(self, name: str) -> None:
        """Take note of a step."""
        del name

    def kernel(self, *, host: str, run_dir: Path, step: Step, namespace: str) -> Kernel:
        """Make the door to the kernel."""
        return Kernel(host=host, run_dir=run_dir, step=step, namespace=namespace)

    def store(self, store: Store) -> Store:
        """Return the door to a store."""
        return store

    def page(
        self, site: Site, remotes: Remotes, info: ReadInfo, events: Events
    ) -> web.Application | None:
        """Make what shows all of it, None if nothing does."""
        del site, remotes, info, events
        return None
