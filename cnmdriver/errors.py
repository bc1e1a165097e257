"""
The six errors a caller of pynet can meet.

Each text is one lower-case sentence: what was wanted, what stood in the way and what
to do. Docker shows nothing but the text, so everything a user needs stands in it.
"""


class DriverError(Exception):
    """Anything pynet refuses or fails to do, told in one sentence."""


class InvalidParameter(DriverError):
    """The request itself is wrong; the same request will always fail."""


class NotFound(DriverError):
    """There is no such network, endpoint, pool or address."""


class Conflict(DriverError):
    """The request is sound but clashes with what exists."""


class Exhausted(DriverError):
    """No address, pool or port is left."""


class StoreError(DriverError):
    """The store is away, or refused; trying again later can help."""


class KernelError(DriverError):
    """The kernel refused an operation; the text names the operation and the errno."""
