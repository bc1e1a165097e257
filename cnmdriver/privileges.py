"""
Which of the capabilities that pynet needs this process has, and what fails without.

The unit in `deploy/` gives these and no other. A daemon without one of them starts all
the same, and does what it can.
"""

from pathlib import Path

STATUS = Path("/proc/self/status")
ENTERING = 21
NEEDED = {
    12: ("CAP_NET_ADMIN", "it can change nothing in the kernel, nor attach containers"),
    13: ("CAP_NET_RAW", "networks fail where iptables is the one on legacy tables"),
    10: ("CAP_NET_BIND_SERVICE", "it cannot publish host ports below 1024"),
    ENTERING: ("CAP_SYS_ADMIN", "it refuses overlay networks; bridge networks work"),
}
"""By number (capabilities(7)): the name, and what becomes of pynet without."""
NO_ENTRY = (
    "an overlay network has its devices in a network namespace of its own, which this "
    "daemon may not enter without CAP_SYS_ADMIN; give it that (CapabilityBoundingSet= "
    "of its unit), or make the network with -o pynet.mode=bridge"
)
"""Why there can be no overlay network, if `may_enter` says no."""


def lacking(status: Path = STATUS) -> tuple[str, ...]:
    """Return a sentence for each capability that this process needs and has not."""
    held = effective(status)
    return tuple(
        f"this daemon runs without {name}: {cost}; see CapabilityBoundingSet= of its "
        "unit"
        for number, (name, cost) in NEEDED.items()
        if not held & 1 << number
    )


def may_enter(status: Path = STATUS) -> bool:
    """Tell whether this process may enter other network namespaces."""
    return bool(effective(status) & 1 << ENTERING)


def effective(status: Path) -> int:
    """Return the effective capabilities as bits; all, where that cannot be read."""
    try:
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return -1
    found = [line.split()[1] for line in lines if line.startswith("CapEff:")]
    return int(found[0], 16) if found else -1
