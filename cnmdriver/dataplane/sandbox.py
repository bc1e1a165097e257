"""Sandboxes, as far as the daemon may look: whether one is still there."""

from pathlib import Path


def is_there(key: str) -> bool:
    """
    Tell whether Docker's key of a sandbox is a network namespace now.

    Docker bind-mounts the namespace on that path (libnetwork osl/namespace_linux.go);
    without the mount it is an empty file, or nothing.
    """
    try:
        return Path(key).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False
