"""
Sandboxes: which endpoints can still have one.

When Docker dies it forgets endpoints without a call, and its next life may give their
addresses to others. Such an endpoint is told by its sandbox: it is gone, and no device
of the endpoint reaches into one.
"""

import math
import time

from cnmdriver.driver.site import Site
from cnmdriver.model import Endpoint
from cnmdriver.plan import devices
from cnmdriver.plan.ops import Veth

STARTING = 15.0
"""Seconds after a Join in which a sandbox need not be seen: Docker makes it later."""


class Sandboxes:
    """Knows when endpoints of this daemon's life have joined."""

    def __init__(self, site: Site) -> None:
        """Know of none."""
        self.site = site
        self.times: dict[str, float] = {}

    def joined(self, endpoint: Endpoint) -> None:
        """Note that an endpoint joins now."""
        self.times[endpoint.id] = time.monotonic()

    def left(self, endpoint: Endpoint) -> None:
        """Forget an endpoint."""
        self.times.pop(endpoint.id, None)

    async def is_gone(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint has joined a sandbox that is there no more."""
        joined = self.times.get(endpoint.id, -math.inf)
        if not endpoint.sandbox or time.monotonic() - joined < STARTING:
            return False
        if self.site.dataplane.has_sandbox(endpoint.sandbox):
            return False
        return not await self.is_reached(endpoint)

    async def is_reached(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint's device reaches into a sandbox now."""
        name = devices.port(endpoint.id)
        found = await self.site.dataplane.found()
        pairs = [op for op in found if isinstance(op, Veth) and op.name == name]
        return any(pair.peer is None for pair in pairs)
