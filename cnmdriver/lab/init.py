"""
The first process of a lab machine: makes its namespaces, then reaps.

Run as a script of its own (`python -IS init.py LAB NAME`), as it must come up in
milliseconds and depends on nothing of the package. The outer process makes the
namespaces, prints the inner one's process id as the machine sees it, and waits. The
inner one is process 1 of the new machine: it arranges the mounts, prints `ready` and
reaps. When it is killed the kernel kills all others: that is a power cut.

What the machine has of its own:

- `/run` is empty at every boot; `/etc/docker`, `/etc/pynet`, and `docker`, `etcd` and
  `pynet` in `/var/lib` lie in the lab's directory and survive a power cut.
- `/etc`, `/opt` and `/var/lib` are the real ones seen through an overlay in memory, so
  that whatever a daemon writes there is gone with the machine.
- `/proc` and `/sys` show its own processes and devices; what was mounted below `/sys`,
  the control groups above all, is put back.
- Mounts do not travel out of it. Inside they are shared, as on a real host, so that a
  daemon with a mount namespace of its own behaves as it would there.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET

MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SHARED = 0x100000
MNT_DETACH = 2

KEPT = {
    "etc-docker": "/etc/docker",
    "etc-pynet": "/etc/pynet",
    "docker": "/var/lib/docker",
    "etcd": "/var/lib/etcd",
    "pynet": "/var/lib/pynet",
}
OVERLAID = ("/etc", "/opt", "/var/lib")
FOREIGN = ("/run/", "/var/lib/docker/", "/var/lib/containerd/", "/var/lib/pynet/")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Become the two processes of the machine; return when the inner one died."""
    directory, name = sys.argv[1:3]
    _call("unshare", NAMESPACES)
    child = os.fork()
    if child == 0:
        _inner(f"{directory}/{name}", name)
    _say(str(child))
    _close_output()
    os.chdir("/")
    os.waitpid(child, 0)
    return 0


def _inner(directory: str, name: str) -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    socket.sethostname(name)
    _arrange_mounts(directory)
    os.chdir("/")
    _say("ready")
    _close_output()
    while True:
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _arrange_mounts(directory: str) -> None:
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _detach_foreign(directory)
    _mount("tmpfs", f"{directory}/stage", "tmpfs", data="mode=755")
    # Held open by descriptor: what follows may hide the lab's own directory.
    kept = {name: _hold(f"{directory}/{name}") for name in KEPT}
    stage = _hold(f"{directory}/stage")
    _mount("proc", "/proc", "proc")
    for path in OVERLAID:
        if Path(path).is_dir():
            _overlay(path, f"{stage}/{path.replace('/', '-')}")
    for name, path in KEPT.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount(kept[name], path, "", MS_BIND)
    _fresh_sysfs(f"{stage}/sys")
    _mount("tmpfs", "/run", "tmpfs", data="mode=755")
    _mount("none", "/", "", MS_REC | MS_SHARED)


def _detach_foreign(directory: str) -> None:
    """Let go of what the real machine's own Docker mounted, else it stays alive."""
    for path, kind in reversed(_mounts()):
        foreign = kind == "nsfs" or path.startswith(FOREIGN)
        if foreign and not f"{directory}/".startswith(f"{path}/"):
            with contextlib.suppress(OSError):
                _call("umount2", path.encode(), MNT_DETACH)


def _overlay(path: str, scratch: str) -> None:
    upper, work = f"{scratch}/upper", f"{scratch}/work"
    Path(upper).mkdir(parents=True)
    Path(work).mkdir(parents=True)
    data = f"lowerdir={path},upperdir={upper},workdir={work}"
    _mount("overlay", path, "overlay", data=data)


def _fresh_sysfs(scratch: str) -> None:
    below: list[str] = []
    for path, _ in _mounts():
        inner = path.startswith(tuple(f"{known}/" for known in below))
        if path.startswith("/sys/") and not inner:
            below.append(path)
    saved = {path: f"{scratch}/{number}" for number, path in enumerate(below)}
    for path, copy in saved.items():
        Path(copy).mkdir(parents=True)
        _mount(path, copy, "", MS_BIND | MS_REC)
    _mount("sysfs", "/sys", "sysfs")
    for path, copy in saved.items():
        if Path(path).is_dir():
            _mount(copy, path, "", MS_BIND | MS_REC)
        # Two mounts of one control group hierarchy would confuse runc.
        _call("umount2", copy.encode(), MNT_DETACH)


def _mounts() -> list[tuple[str, str]]:
    """Return path and file system type of every mount, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, right = line.split(" - ", 1)
        path = left.split()[4].encode().decode("unicode_escape")
        found.append((path, right.split()[0]))
    return found


def _hold(path: str) -> str:
    Path(path).mkdir(parents=True, exist_ok=True)
    return f"/proc/self/fd/{os.open(path, os.O_PATH | os.O_CLOEXEC)}"


def _mount(source: str, path: str, kind: str, flags: int = 0, data: str = "") -> None:
    words = (source.encode(), path.encode(), kind.encode(), flags, data.encode())
    _call("mount", *words)


def _call(function: str, *arguments: bytes | int) -> None:
    if getattr(libc, function)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}{arguments}: {os.strerror(code)}")


def _say(text: str) -> None:
    # Whoever started us may have been killed; the machine goes on without it.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{text}\n".encode())


def _close_output() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.exit(main())
