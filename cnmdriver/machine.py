"""
What a machine has that pynet stands on, as far as its files tell: kernel, programs.

Nothing here needs the daemon, or root.
"""

import gzip
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
FEATURES: Mapping[str, str] = {
    "veth": "VETH",
    "bridge": "BRIDGE",
    "vxlan": "VXLAN",
    "nf_tables": "NF_TABLES",
    "nft_fib_inet": "NFT_FIB_INET",
    "nf_nat": "NF_NAT",
}
"""The kernel's modules that pynet needs, each with the option that makes it."""
PROGRAMS = ("iptables", "ip6tables")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """A service that manages network devices, unless it is told to leave some."""

    name: str
    running: bool
    told: bool
    """Whether its configuration names pynet's devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found."""

    kernel: str
    features: Mapping[str, bool | None]
    """Whether the kernel has a module, loaded or not; None if nothing tells."""
    programs: Mapping[str, bool]
    managers: tuple[Manager, ...]


def look(root: Path = ROOT, release: str = "") -> Machine:
    """Read this machine's files; those of a kernel release, or of the one that runs."""
    release = release or platform.release()
    return Machine(
        kernel=release,
        features={name: has(root, release, name) for name in FEATURES},
        programs={name: shutil.which(name) is not None for name in PROGRAMS},
        managers=tuple(managers(root)),
    )


def has(root: Path, release: str, module: str) -> bool | None:
    """Tell whether a kernel has a module, loaded, built in, or to be loaded."""
    if (root / "sys/module" / module).exists():
        return True
    place = root / "lib/modules" / release
    lists = [read(place / "modules.builtin"), read(place / "modules.dep")]
    if any(f"/{module}.ko" in text for text in lists):
        return True
    option = built(root / "proc/config.gz", FEATURES[module])
    return option if option is not None or not any(lists) else False


def built(config: Path, option: str) -> bool | None:
    """Tell whether a kernel was built with an option, None if it does not say."""
    try:
        text = gzip.decompress(config.read_bytes()).decode(errors="replace")
    except (OSError, EOFError):
        return None
    lines = text.splitlines()
    return f"CONFIG_{option}=y" in lines or f"CONFIG_{option}=m" in lines


def managers(root: Path) -> Iterable[Manager]:
    """Yield what else manages devices here."""
    for name, sign, places in (
        (
            "systemd-networkd",
            "run/systemd/netif/state",
            ("etc/systemd/network", "run/systemd/network", "usr/lib/systemd/network"),
        ),
        (
            "NetworkManager",
            "run/NetworkManager",
            ("etc/NetworkManager", "usr/lib/NetworkManager", "run/NetworkManager"),
        ),
        ("dhcpcd", "run/dhcpcd", ("etc/dhcpcd.conf",)),
    ):
        told = any(names_ours(root / place) for place in places)
        yield Manager(name=name, running=(root / sign).exists(), told=told)


def names_ours(place: Path) -> bool:
    """Tell whether a file, or one of a directory, names pynet's bridges."""
    if place.is_dir():
        files = [Path(top, name) for top, _, names in os.walk(place) for name in names]
    else:
        files = [place]
    return any("pn-" in read(file) for file in files if file.is_file())


def read(path: Path) -> str:
    """Return a file's text, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
