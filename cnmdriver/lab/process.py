"""Processes of a lab, found in /proc: there is no other record of them to go stale."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cnmdriver.errors import DriverError

INIT = Path(__file__).absolute().with_name("init.py")
NAMESPACES = ("net", "mnt")


class LabError(DriverError):
    """The lab could not do what was asked; the text says what stood in the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def processes() -> Iterator[int]:
    """Yield the id of every process that this process can see."""
    for name in os.listdir("/proc"):  # noqa: PTH208 - half the time of iterdir
        if name.isdigit():
            yield int(name)


def machine_processes(directory: Path) -> dict[int, str]:
    """Return process id and machine name of all that hold a lab's machines."""
    found = {}
    for pid in processes():
        words = _arguments(pid)
        match words[-3:]:
            case [program, place, name] if place == str(directory):
                if program.endswith("/lab/init.py"):
                    found[pid] = name
    return found


def inner_process(directory: Path, name: str) -> int | None:
    """Return the id of a machine's process 1, or None if the machine is off."""
    for pid, owner in machine_processes(directory).items():
        if owner == name and is_first(pid):
            return pid
    return None


def is_first(pid: int) -> bool:
    """Tell whether a process is process 1 of a namespace below ours."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                numbers = line.split()[1:]
                return len(numbers) > 1 and numbers[-1] == "1"
    return False


def titled(title: str) -> list[int]:
    """Return the processes whose first argument ends with a text."""
    return [pid for pid in processes() if _arguments(pid)[0].endswith(title)]


def child_of(parent: int) -> int | None:
    """Return the id of one child of a process, or None if it has none."""
    wanted = str(parent)
    return next((pid for pid in processes() if _status(pid)[1] == wanted), None)


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped by a signal."""
    return _status(pid)[0] == "T"


def has_ended(pid: int) -> bool:
    """Tell whether a process is gone, or only waits for somebody to ask for its end."""
    return _status(pid)[0] in {"", "Z"}


def namespaces_of(pid: int) -> frozenset[str]:
    """Return the names of the namespaces that only a machine's own processes have."""
    with contextlib.suppress(OSError):
        links = (Path(f"/proc/{pid}/ns/{kind}").readlink() for kind in NAMESPACES)
        return frozenset(map(str, links))
    return frozenset()


@contextlib.contextmanager
def held(pids: Iterable[int]) -> Iterator[frozenset[str]]:
    """
    Keep the namespaces of processes, and return their names.

    The name of a namespace that is gone is soon another's, of any process on the
    machine. Those that are held have no such successor.
    """
    with contextlib.ExitStack() as stack:
        names = set()
        for place in (f"/proc/{pid}/ns/{kind}" for pid in pids for kind in NAMESPACES):
            with contextlib.suppress(OSError):
                space = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, space)
                names.add(str(Path(f"/proc/self/fd/{space}").readlink()))
        yield frozenset(names)


def members(namespaces: frozenset[str]) -> list[int]:
    """Return the processes in one of these namespaces, unless it is ours as well."""
    others = namespaces - namespaces_of(os.getpid())
    return [pid for pid in processes() if others & namespaces_of(pid)]


def kill(pid: int) -> None:
    """Kill a process at once; one that is gone already is no error."""
    send(pid, signal.SIGKILL)


def send(pid: int, signum: int) -> None:
    """Send a process a signal; one that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def remove_cgroup(path: str) -> bool:
    """Remove a control group in every hierarchy; tell whether it is gone."""
    tops = [Path(mount + path) for mount in cgroup_mounts()]
    for top in tops:
        below = [inner for inner in top.rglob("*") if inner.is_dir()]
        for directory in sorted([top, *below], reverse=True):
            with contextlib.suppress(OSError):
                directory.rmdir()
    return not any(top.exists() for top in tops)


def run(
    argv: list[str],
    *,
    timeout: float = 30,
    data: str | None = None,
    env: dict[str, str] | None = None,
) -> Completed:
    """Run a command to its end; raise LabError if it takes longer than the time-out."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
    ) as process:
        try:
            stdout, stderr = process.communicate(data, timeout)
        except subprocess.TimeoutExpired:
            raise LabError(
                f"`{' '.join(argv)}` did not end within {timeout} s"
            ) from None
        finally:
            process.kill()
    return Completed(returncode=process.returncode, stdout=stdout, stderr=stderr)


def cgroup_mounts() -> list[str]:
    """Return where the machine's control group hierarchies are mounted."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    words = [line.split() for line in lines]
    return [word[1] for word in words if word[2] in {"cgroup", "cgroup2"}]


def _arguments(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        return os.fsdecode(raw).rstrip("\0").split("\0")
    return [""]


def _status(pid: int) -> tuple[str, str]:
    """Return the state and the parent of a process; of one that is gone, nothing."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
        state, parent = stat.rpartition(")")[2].split()[:2]
        return state, parent
    return "", ""
