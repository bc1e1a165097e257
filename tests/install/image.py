"""
The image, built in a lab as the head of the Dockerfile says, on a base made here.

What it says is what is run: lines of four spaces in its comments are commands.
"""

import fcntl
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.install.base import INSIDE, write_base

ROOT = Path(__file__).parents[2]
BASE = "base"
NAME = "pynet"
SLOW = 600.0
"""Seconds for a build on a machine that has other work."""


def commands() -> list[str]:
    """Return the commands in the head of the Dockerfile, each on one line."""
    head = (ROOT / "Dockerfile").read_text().partition("\nARG ")[0]
    lines = [line[6:] for line in head.splitlines() if line.startswith("#     ")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def command(start: str) -> str:
    """Return the last of the commands that begins so."""
    return [line for line in commands() if line.startswith(start)][-1]


def write_context(directory: Path) -> None:
    """Copy what the image is built from, with wheels as the Dockerfile says."""
    directory.mkdir()
    names = (ROOT / ".dockerignore").read_text().splitlines()
    wanted = [name[1:] for name in names if name.startswith("!")]
    for name in (*wanted, "Dockerfile", ".dockerignore"):
        source = ROOT / name
        if source.is_dir():
            left = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, directory / name, ignore=left)
        elif source.exists():
            shutil.copy(source, directory)
    download(directory)


def download(directory: Path) -> None:
    """Get the wheels, for the Python of the base."""
    which = "import sys; print('%d.%d' % sys.version_info[:2])"
    python = subprocess.run(
        [INSIDE, "-c", which], capture_output=True, text=True, check=True
    )
    words = shlex.split(command("pip download"))
    ours = ("--quiet", "--only-binary=:all:", "--python-version", python.stdout.strip())
    argv = [sys.executable, "-m", *words, *ours]
    done = subprocess.run(
        argv, cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def build(host: Host, context: Path, base: Path) -> None:
    """Build the image on a host."""
    host.docker("import", str(base), BASE, timeout=SLOW)
    line = command("docker build").replace("BASE=…", f"BASE={BASE}")
    # BuildKit is a program of its own, which may not be here.
    script = f"cd {shlex.quote(str(context))} && DOCKER_BUILDKIT=0 {line}"
    host.exec("sh", "-c", script.removesuffix(" .") + " .", timeout=SLOW)


def saved(directory: Path) -> Path:
    """
    Return the image as `docker save` writes it.

    Whoever comes first builds it, in a directory that all workers share.
    """
    path = directory / "pynet.tar"
    with alone(directory / "pynet.lock"):
        if not path.exists():
            base, context = directory / "base.tar", directory / "context"
            write_base(base)
            write_context(context)
            with Lab.create(directory / "builder", serve=False) as lab:
                build(lab.hosts[0], context, base)
                draft = path.with_suffix(".new")
                lab.hosts[0].docker("save", "-o", str(draft), NAME, timeout=SLOW)
            draft.rename(path)
            shutil.rmtree(context)
            base.unlink()
    return path


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Let no other worker in meanwhile."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
