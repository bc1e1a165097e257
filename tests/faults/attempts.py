"""
What a daemon has no business to do; each attempt tells whether it could.

`python attempts.py NAME…` prints a JSON object: for each name whether it was possible.
Where an attempt could do harm, it asks for something senseless: the kernel says that it
is senseless only to who may ask at all.
"""

import ctypes
import errno
import json
import mmap
import os
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWIPC = 0x08000000
INIT_MODULE, X32_GETPID = 175, 0x40000000 + 39
SCHED_FIFO, PER_LINUX32, KLOG_SIZE = 1, 8, 10
DENIED = {errno.EPERM, errno.EACCES, errno.EROFS, errno.EAFNOSUPPORT}


def call(name: str, *arguments: object) -> None:
    """Make a call of libc's; raises OSError."""
    if getattr(LIBC, name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def write_etc() -> None:
    """Write below /etc."""
    Path("/etc/attempt").write_text("")
    Path("/etc/attempt").unlink()


def write_run() -> None:
    """Write where other services have their sockets."""
    Path("/run/attempt").write_text("")
    Path("/run/attempt").unlink()


def write_setting() -> None:
    """Write a setting of the kernel that is none of the network's."""
    path = Path("/proc/sys/kernel/core_pattern")
    path.open("r+").close()


def write_cgroups() -> None:
    """Make a control group."""
    parent = next(p for p in Path("/sys/fs/cgroup").glob("*/") if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EROFS, str(parent))


def read_home() -> None:
    """Look into root's home."""
    list(Path("/root").iterdir())


def read_tmp() -> None:
    """Look at what others have in /tmp."""
    if not Path(os.environ["ATTEMPT_TMP"]).exists():
        raise PermissionError(errno.EACCES, "not there")


def open_device() -> None:
    """Open the machine's kernel log as a device."""
    if not Path("/dev/kmsg").exists():
        raise PermissionError(errno.EACCES, "not there")
    os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))


def load_module() -> None:
    """Load a module, of no bytes."""
    call("syscall", ctypes.c_long(INIT_MODULE), b"", ctypes.c_ulong(0), b"")


def mount() -> None:
    """Mount something on a directory that is not there."""
    call("mount", b"none", b"/nowhere", b"tmpfs", 0, None)


def give_away() -> None:
    """Give a file of one's own to another user."""
    path = Path("/run/pynet/attempt")
    path.touch()
    try:
        os.chown(path, 1, 1)
    finally:
        path.unlink()


def override() -> None:
    """Read a file that its owner has closed to all."""
    path = Path("/run/pynet/attempt")
    path.touch(mode=0)
    try:
        path.read_text()
    finally:
        path.unlink()


def set_user_id() -> None:
    """Make a program that runs as its owner."""
    path = Path("/run/pynet/attempt")
    path.touch()
    try:
        path.chmod(stat.S_ISUID | 0o700)
    finally:
        path.unlink()


def packets() -> None:
    """Open a socket that sees every frame."""
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def namespace() -> None:
    """Leave the machine's namespace of another kind than networks."""
    call("unshare", CLONE_NEWIPC)


def realtime() -> None:
    """Take the processor from everybody else."""
    os.sched_setscheduler(0, SCHED_FIFO, os.sched_param(1))


def personality() -> None:
    """Be a program of 32 bits."""
    call("personality", PER_LINUX32)


def make_code() -> None:
    """Make memory that can be written and executed."""
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def other_architecture() -> None:
    """Make a system call of another architecture; who may not is killed."""
    child = os.fork()
    if not child:
        LIBC.syscall(ctypes.c_long(X32_GETPID))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise PermissionError(errno.EPERM, f"signal {os.WTERMSIG(status)}")


def set_clock() -> None:
    """Set the clock, to a time that is none."""
    time.clock_settime_ns(time.CLOCK_REALTIME, -(10**9))


def kernel_log() -> None:
    """Ask for the kernel's log."""
    call("klogctl", KLOG_SIZE, None, 0)


def host_name() -> None:
    """Name the machine, as it is called."""
    socket.sethostname(socket.gethostname())


def new_privileges() -> None:
    """Gain privileges by executing a program."""
    if "NoNewPrivs:\t1" in Path("/proc/self/status").read_text():
        raise PermissionError(errno.EPERM, "no new privileges")


def share_files() -> None:
    """Make a file that others may read."""
    path = Path("/run/pynet/attempt")
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    if not mode & 0o077:
        raise PermissionError(errno.EACCES, oct(mode))


def key() -> None:
    """Ask for a key that is none, by number 0."""
    call("syscall", ctypes.c_long(250), ctypes.c_long(6), ctypes.c_long(1 << 30))


def is_possible(attempt: Callable[[], None]) -> bool:
    """Tell whether the kernel would have done it."""
    try:
        attempt()
    except OSError as error:
        return error.errno not in DENIED
    return True


if __name__ == "__main__":
    print(json.dumps({name: is_possible(globals()[name]) for name in sys.argv[1:]}))
