"""
A base image from the files of this machine's own Debian packages.

No registry can be reached from a lab. What is installed here has all that an image
needs, so that its packages, with those they depend on, are the base: in seconds, and
without a network.
"""

import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = (
    *("dash", "coreutils", "mount", "util-linux", "libc-bin", "libstdc++6"),
    *("python3", "python3-venv", "iptables", "nftables"),
)
INSIDE = "/usr/bin/python3"
"""The Python of the base."""
LEFT_OUT = ("/usr/share/", "/usr/include/", "/usr/lib/udev/", "/usr/lib/systemd/")
WHEELS = "/usr/share/python-wheels/"
"""Where Debian's `ensurepip` has its pip."""
LINKS = ("bin", "sbin", "lib", "lib64")
CHOSEN = tuple(
    f"{name}{what}"
    for name in ("iptables", "ip6tables")
    for what in ("", "-save", "-restore")
)
"""Programs that are no package's: `update-alternatives` made a link for each."""
DIRECTORIES = {"tmp": 0o1777, "run": 0o755, "var/lib": 0o755, "root": 0o700}


def write_base(path: Path) -> None:
    """Write a root file system with Python, nftables and iptables as a tar file."""
    with tarfile.open(path, "w") as tar:
        for name in LINKS:
            if Path("/", name).exists():
                tar.add(f"/{name}", recursive=False)
        for name, mode in DIRECTORIES.items():
            made = tarfile.TarInfo(name)
            made.type, made.mode = tarfile.DIRTYPE, mode
            tar.addfile(made)
        made = tarfile.TarInfo("var/run")
        made.type, made.linkname = tarfile.SYMTYPE, "/run"
        tar.addfile(made)
        for file in sorted(files(PACKAGES)):
            tar.add(file, recursive=False)


def files(packages: Iterable[str]) -> set[str]:
    """Return the paths of some packages and of what they depend on."""
    found = {"/usr/bin/python3", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"}
    names = closure(packages)
    listed = subprocess.run(
        ["dpkg-query", "--listfiles", *sorted(names)],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in listed.stdout.splitlines():
        path = real(line)
        name = str(path)
        wanted = not name.startswith(LEFT_OUT) or name.startswith(WHEELS)
        # Directories come with what they hold.
        if line.startswith("/") and wanted and (path.is_symlink() or path.is_file()):
            found.add(name)
    # They are written by themselves.
    found -= {f"/{name}" for name in (*LINKS, *DIRECTORIES, "var/run")}
    for name in CHOSEN:
        found |= {f"/usr/sbin/{name}", f"/etc/alternatives/{name}"}
    return found


def real(path: str) -> Path:
    """Return a path with the links in its directories resolved."""
    return Path(path).parent.resolve() / Path(path).name


def closure(packages: Iterable[str]) -> set[str]:
    """Return installed packages with all that they depend on."""
    needs, provides = installed()
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        names = [name] if name in needs else provides.get(name, [])
        for each in names:
            if each not in found:
                found.add(each)
                waiting += needs[each]
    return found


def installed() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return what each installed package depends on, and who provides what."""
    fields = "${binary:Package}\t${Provides}\t${Pre-Depends},${Depends}\n"
    shown = subprocess.run(
        ["dpkg-query", "--show", f"--showformat={fields}"],
        capture_output=True,
        text=True,
        check=True,
    )
    needs: dict[str, list[str]] = {}
    provides: dict[str, list[str]] = {}
    for line in shown.stdout.splitlines():
        name, provided, depends = line.split("\t")
        name = name.partition(":")[0]
        needs[name] = list(words(depends))
        for word in words(provided):
            provides.setdefault(word, []).append(name)
    return needs, provides


def words(text: str) -> Iterator[str]:
    """Yield the names in a list of dependencies, without versions; all of `|`."""
    for part in re.split(r"[,|]", text):
        name = part.split("(")[0].strip().partition(":")[0]
        if name:
            yield name
