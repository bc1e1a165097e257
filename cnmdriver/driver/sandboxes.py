"""
Sandboxes: which endpoints can still have one, and whose addresses are on their way out.

When Docker dies it forgets endpoints without a call, and its next life may give their
addresses to others. Such an endpoint is told by its sandbox: it is gone, and no device
of the endpoint reaches into one.
"""

import math
import time

from cnmdriver.driver.site import Site
from cnmdriver.model import Endpoint, IPAddress
from cnmdriver.plan import devices
from cnmdriver.plan.ops import Veth

LEAVING = 10.0
"""Seconds in which Docker releases an endpoint's addresses once it is deleted."""
STARTING = 15.0
"""Seconds after a Join in which a sandbox need not be seen: Docker makes it later."""


class Sandboxes:
    """Knows when endpoints of this daemon's life have joined."""

    def __init__(self, site: Site) -> None:
        """Know of none."""
        self.site = site
        self.times: dict[str, float] = {}
        self.leaving: dict[tuple[str, IPAddress], float] = {}

    def deleted(self, endpoint: Endpoint) -> None:
        """Note that Docker has deleted an endpoint, and will release its addresses."""
        now = time.monotonic()
        self.leaving = {k: t for k, t in self.leaving.items() if now - t < LEAVING}
        for address in endpoint.addresses:
            self.leaving[endpoint.network, address.ip] = now

    def released(self, network: str, ip: IPAddress) -> None:
        """Note that Docker has released an address."""
        self.leaving.pop((network, ip), None)

    def is_leaving(self, network: str, ip: IPAddress) -> bool:
        """Tell whether Docker has yet to release an address of a deleted endpoint."""
        since = self.leaving.get((network, ip), -math.inf)
        return time.monotonic() - since < LEAVING

    def joined(self, endpoint: Endpoint) -> None:
        """Note that an endpoint joins now."""
        self.times[endpoint.id] = time.monotonic()

    def left(self, endpoint: Endpoint) -> None:
        """Forget an endpoint."""
        self.times.pop(endpoint.id, None)

    def has_settled(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint's sandbox is there, and Docker done with it."""
        joined = self.times.get(endpoint.id, -math.inf)
        if time.monotonic() - joined < STARTING:
            return False
        return self.site.dataplane.has_sandbox(endpoint.sandbox)

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
