"""
Names of network namespaces, made as `ip netns` makes them: a mount for each.

Nothing but its mount keeps such a namespace when the daemon is gone, so the mount must
be where the host sees it, and not in a mount namespace that ends with the daemon.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cnmdriver.dataplane.handler import refusal
from cnmdriver.dataplane.inside import CLONE_NEWNET, system_call
from cnmdriver.dataplane.place import NAMES
from cnmdriver.errors import KernelError

BIND, RECURSIVE, SHARED, DETACH = 0x1000, 0x4000, 1 << 20, 2


def new_namespace() -> int:
    """Make a namespace; its descriptor is all that keeps it."""
    # The thread that makes it is in it, and ends.
    with ThreadPoolExecutor(1, thread_name_prefix="namespace") as thread:
        try:
            return thread.submit(_unshared).result()
        except OSError as error:
            raise refusal("making a network namespace", error.errno or 0) from error


def mount(name: str, descriptor: int) -> None:
    """Give a namespace a name; raises KernelError if that is not possible."""
    what = f"naming network namespace {name}"
    path = NAMES / name
    source = f"/proc/self/fd/{descriptor}".encode()
    try:
        _refuse_private(what)
        # A link in a managed plugin, to a directory that a reboot has emptied.
        Path(os.path.realpath(NAMES)).mkdir(mode=0o755, parents=True, exist_ok=True)
        _share()
        path.touch(mode=0o444)
        try:
            system_call("mount", source, os.fsencode(path), None, BIND, None)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise refusal(what, error.errno or 0, error.strerror or "") from error


def unmount(name: str) -> None:
    """Take a namespace's name; what still uses it keeps it."""
    path = NAMES / name
    try:
        with suppress(FileNotFoundError):
            system_call("umount2", os.fsencode(path), DETACH)
        path.unlink(missing_ok=True)
    except OSError as error:
        what = f"removing the name of network namespace {name}"
        raise refusal(what, error.errno or 0, error.strerror or "") from error


def stays_here() -> bool:
    """Tell whether the host would not see what this process mounts on a name."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return _is_apart() and _is_slave([line.split() for line in lines])


def has_processes(identity: tuple[int, int]) -> bool:
    """Tell whether any process we may look at is in a network namespace."""
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(OSError):
            found = process.stat()
            if (found.st_dev, found.st_ino) == identity:
                return True
    return False


def _unshared() -> int:
    system_call("unshare", CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _share() -> None:
    """Have later mounts seen wherever the directory is seen, as `ip netns add` does."""
    here = os.fsencode(NAMES)
    with suppress(OSError):
        system_call("mount", b"", here, b"none", SHARED | RECURSIVE, None)
        return
    # It was no mount yet, and can be shared only as one.
    system_call("mount", here, here, b"none", BIND | RECURSIVE, None)
    system_call("mount", b"", here, b"none", SHARED | RECURSIVE, None)


def _refuse_private(what: str) -> None:
    """Refuse to mount where the host would not see it: it would not outlive us."""
    if stays_here():
        raise KernelError(
            f"{what} failed: the host does not see what this daemon mounts on {NAMES}, "
            "as it has a mount namespace of its own; let it share that directory "
            "(as a container: bind it with propagation shared), or make the namespace "
            "with ip netns add (as a service: restart pynet.service)"
        )


def _is_apart() -> bool:
    """Tell whether our mounts are not those of the system's first process."""
    own, first = (Path("/proc", which, "ns/mnt") for which in ("self", "1"))
    try:
        return own.readlink() != first.readlink()
    except OSError:
        return True


def _is_slave(mounts: list[list[str]]) -> bool:
    """Tell whether mounts come to the directory from elsewhere, but do not go back."""
    real = os.path.realpath(NAMES)
    over = [
        fields
        for fields in mounts
        if Path(real).is_relative_to(fields[4].replace("\\040", " "))
    ]
    # Of mounts on one place the last lies on top.
    longest = max(len(fields[4]) for fields in over)
    top = [fields for fields in over if len(fields[4]) == longest][-1]
    return any(word.startswith("master:") for word in top[6 : top.index("-")])
