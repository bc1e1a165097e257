"""What pynet is installed from where no package index is reached."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def fetch(directory: Path, *options: str) -> None:
    """Fetch what pynet needs to be built and to run, as the lock has it."""
    lock = (CHECKOUT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)
    names = {*closure("cnmdriver"), "setuptools"}
    needed = directory / "needed"
    needed.write_text("".join(e for e in entries if e.partition("==")[0] in names))
    words = ("download", "--no-deps", "--require-hashes", "--dest", str(directory))
    pip(*words, *options, "--requirement", str(needed))


def fetch_all(directory: Path) -> None:
    """Fetch all that the lock has, the tools of tests included."""
    words = ("download", "--no-deps", "--require-hashes", "--dest", str(directory))
    pip(*words, "--requirement", str(CHECKOUT / "requirements.lock"))


def build(directory: Path) -> None:
    """Make pynet's wheel of a copy, as building leaves files beside the sources."""
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    shutil.copytree(CHECKOUT / "cnmdriver", source / "cnmdriver")
    words = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir")
    pip(*words, str(directory), str(source))


def pip(*words: str) -> None:
    """Run pip."""
    subprocess.run([*PIP, *words], check=True)


def closure(name: str) -> set[str]:
    """Return the names of all that a distribution needs, as the lock spells them."""
    found: set[str] = set()
    wanted = [name]
    while wanted:
        for line in metadata.requires(wanted.pop()) or ():
            other = re.sub("[-_.]+", "-", re.split(r"[^\w.-]", line, maxsplit=1)[0])
            if "extra ==" not in line and other.lower() not in found:
                found.add(other.lower())
                if is_there(other):
                    wanted.append(other)
    return found


def is_there(name: str) -> bool:
    """Tell whether a distribution is installed here."""
    return bool([*metadata.distributions(name=name)])
