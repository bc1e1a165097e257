"""
Whether an endpoint's interface is built in its sandbox, and what it is called there.

Docker moves an interface into a sandbox and calls it eth0, eth1 and so on; the kernel
takes longer for the move than for all the rest. Where the sandbox is there before
Docker is answered, the interface can be built in it at once. Docker counts only what it
has moved, so the names begin at a number that it does not reach.

With `auto` the first interface is Docker's, by its usual name, and those that a running
container gets later are built in it: names stay over a restart where Docker makes the
sandbox before it asks its drivers.
"""

from collections.abc import Collection
from itertools import count

from cnmdriver.model import Endpoint
from cnmdriver.plan.ops import Seat

FIRST = 10
"""The number of the first interface that is built in a sandbox."""
BY_ITSELF = frozenset({
    *("lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip6gre0"),
    *("ip_vti0", "ip6_vti0"),
})  # fmt: skip
"""Devices that the kernel may give to every namespace."""


def is_direct(attach: str, present: Collection[str]) -> bool:
    """Tell whether a sandbox with these devices gets the next one built in it."""
    if attach == "auto":
        return not BY_ITSELF.issuperset(present)
    return attach == "direct"


def free_name(prefix: str, present: Collection[str]) -> str:
    """Return the first name that no device of a sandbox has."""
    names = (f"{prefix}{number}" for number in count(FIRST))
    return next(name for name in names if name not in present)


def seat(endpoint: Endpoint) -> Seat | None:
    """Return what is built in the sandbox, None if Docker moves it there."""
    if not endpoint.device:
        return None
    return Seat(
        sandbox=endpoint.sandbox, name=endpoint.device, addresses=endpoint.addresses
    )
