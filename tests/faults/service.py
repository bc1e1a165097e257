"""
Run a program as systemd would run the service of a unit, where there is no systemd.

`python service.py UNIT PROGRAM ARGUMENT…` reads the unit's settings, restricts itself
accordingly and becomes the program (which stands for ExecStart=). The program, its
interpreter and its package are bound to where they are, wherever the unit hides them.
What the unit wants (Wants=) and lies beside it is run before, without restrictions.

What each setting does is taken from systemd.exec(5) and systemd's own code (v252,
src/core/namespace.c and src/shared/seccomp-util.c). A setting that is not known here is
an error: none is passed over. The sets of system calls are systemd-analyze's.
"""

import ctypes
import errno
import os
import re
import resource
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000
NAMESPACES = {
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mnt": CLONE_NEWNS,
    "net": 0x40000000,
    "pid": 0x20000000,
    "user": 0x10000000,
    "uts": CLONE_NEWUTS,
}
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE, MS_SHARED = 0x1000, 0x4000, 1 << 19, 1 << 20
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38

CAPABILITIES = """
chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap
linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner
sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice
sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap
mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf
checkpoint_restore
""".split()  # noqa: SIM905 - as a list it would fill a page
"""By number (capabilities(7))."""


NO_MATTER = {
    *("Type", "ExecStart", "Restart", "RestartSec", "RestartPreventExitStatus"),
    *("ExecReload", "TimeoutStartSec", "WatchdogSec"),
    *("TimeoutStopSec", "StateDirectoryMode", "RuntimeDirectoryMode"),
    *("RuntimeDirectoryPreserve", "SystemCallErrorNumber"),
}
"""Settings that do not restrict, or that another one reads."""

KERNEL_TUNABLES = """
/proc/acpi /proc/apm /proc/asound /proc/bus /proc/fs /proc/irq /proc/latency_stats
/proc/mtrr /proc/scsi /proc/sys /proc/sysrq-trigger /proc/timer_stats /sys
""".split()  # noqa: SIM905 - as above
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


# Reading.


@dataclass(slots=True)
class Unit:
    """A unit file; of a setting that comes several times, all values in order."""

    path: Path
    settings: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        section = ""
        text = self.path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in map(str.strip, text.splitlines()):
            if line.startswith("["):
                section = line.strip("[]")
            elif line and line[0] not in "#;":
                name, _, value = line.partition("=")
                self.settings.append((section, name.strip(), value.strip()))

    def all(self, name: str, section: str = "Service") -> list[str]:
        """Return the values of a setting."""
        return [v for s, n, v in self.settings if (s, n) == (section, name)]

    def words(self, name: str, section: str = "Service") -> list[str]:
        """Return the words of a setting, of all its lines."""
        return [word for value in self.all(name, section) for word in value.split()]

    def one(self, name: str, default: str = "") -> str:
        """Return the last value of a setting."""
        return [default, *self.all(name)][-1]

    def says(self, name: str) -> bool:
        """Tell whether a setting is on."""
        return self.one(name, "no") in {"yes", "true", "on", "1"}

    @property
    def names(self) -> set[str]:
        """The names of all settings of the service."""
        return {name for section, name, _ in self.settings if section == "Service"}


# Calls.


def call(name: str, *arguments: object) -> int:
    """Make a call of libc's; raises OSError."""
    done: int = getattr(LIBC, name)(*arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")
    return done


def mount(source: str, path: str, kind: str, flags: int, data: str = "") -> None:
    """Make a mount."""
    words = (source.encode(), path.encode(), kind.encode(), flags, data.encode())
    call("mount", *words)


def read_only(path: str, *, yes: bool = True) -> None:
    """Make what is mounted on a path and below it read-only, or writable again."""
    wanted = (MOUNT_ATTR_RDONLY, 0) if yes else (0, MOUNT_ATTR_RDONLY)
    attributes = (ctypes.c_uint64 * 4)(*wanted, 0, 0)
    number, size = ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_size_t(32)
    words = (AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    call("syscall", number, *words)


# Files.


def prepare(unit: Unit) -> None:
    """Run what the unit wants, and make its directories."""
    beside = map(unit.path.with_name, unit.words("Wants", "Unit"))
    for path in (path for path in beside if path.exists()):
        other = Unit(path)
        umask = int(other.one("UMask", "0022"), 8)
        for line in other.all("ExecStart"):
            may_fail = line.startswith("-")
            argv = shlex.split(line.removeprefix("-"))
            subprocess.run(
                argv, check=not may_fail, umask=umask, capture_output=may_fail
            )
    for kind, parent in (("State", "/var/lib"), ("Runtime", "/run")):
        for name in unit.words(f"{kind}Directory"):
            path = Path(parent, name)
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(int(unit.one(f"{kind}DirectoryMode", "0755"), 8))


def writable(unit: Unit) -> Iterator[str]:
    """Yield the paths that the unit may write to."""
    for kind, parent in (("State", "/var/lib"), ("Runtime", "/run")):
        yield from (f"{parent}/{name}" for name in unit.words(f"{kind}Directory"))
    for path in unit.words("ReadWritePaths"):
        if Path(path.lstrip("-")).exists() or not path.startswith("-"):
            yield path.lstrip("-")


def arrange(unit: Unit, software: Sequence[str]) -> None:
    """Enter a mount namespace that has of the host's what the unit leaves."""
    call("unshare", CLONE_NEWNS)
    mount("", "/", "", MS_REC | MS_SLAVE)
    kept = {path: hold(path) for path in software}
    devices = {name: hold(f"/dev/{name}") for name in DEVICES}
    if unit.one("ProtectSystem") == "strict":
        close_all(unit)
    elif unit.one("ProtectSystem"):
        raise SystemExit("ProtectSystem= is known as strict only")
    for path in hidden(unit):
        hide(path)
    if unit.says("PrivateTmp"):
        for path in ("/tmp", "/var/tmp"):
            mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    if unit.says("PrivateDevices"):
        private_devices(devices)
    for path, source in kept.items():
        bind_software(path, source)
    mount("", "/", "", MS_REC | MS_SHARED)


def close_all(unit: Unit) -> None:
    """Make all read-only but the kernel's own file systems and what is writable."""
    open_again = [*writable(unit)]
    for path in open_again:
        mount(path, path, "", MS_BIND | MS_REC)
    read_only("/")
    for path in ("/dev", "/proc", "/sys"):
        read_only(path, yes=False)
    if unit.says("ProtectKernelTunables") or unit.says("ProtectControlGroups"):
        # These make systemd 252 mount /run, unless it is there, and then leave it.
        read_only("/run", yes=False)
    for path in unit.words("ReadOnlyPaths"):
        read_only(path)
    if unit.says("ProtectKernelTunables"):
        tunables = [path for path in KERNEL_TUNABLES if Path(path).exists()]
        for path in tunables:
            mount(path, path, "", MS_BIND | MS_REC)
            read_only(path)
    if unit.says("ProtectControlGroups"):
        read_only("/sys/fs/cgroup")
    for path in open_again:
        # What was bound before may lie under what was bound since.
        mount(path, path, "", MS_BIND | MS_REC)
        read_only(path, yes=False)


def hidden(unit: Unit) -> Iterator[str]:
    """Yield the paths that the unit must not see."""
    paths = {
        "ProtectHome": ("/home", "/root", "/run/user"),
        "ProtectKernelModules": ("/usr/lib/modules",),
        "ProtectKernelLogs": ("/proc/kmsg", "/dev/kmsg"),
        "ProtectKernelTunables": ("/proc/kallsyms", "/proc/kcore"),
    }
    for name, places in paths.items():
        if unit.says(name):
            yield from (path for path in places if Path(path).exists())


def hide(path: str) -> None:
    """Put what nobody without capabilities can look into on a path."""
    if Path(path).is_dir():
        # Software that lies below it is bound there again.
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=111")
        read_only(path)
        return
    mount("tmpfs", "/mnt", "tmpfs", 0, "mode=000")
    os.mknod("/mnt/nothing", stat.S_IFREG)
    mount("/mnt/nothing", path, "", MS_BIND)
    call("umount2", b"/mnt", 2)


def private_devices(devices: dict[str, str]) -> None:
    """Put a directory with harmless devices on /dev."""
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755")
    for name, source in devices.items():
        os.mknod(f"/dev/{name}", stat.S_IFREG)
        mount(source, f"/dev/{name}", "", MS_BIND)
    Path("/dev/fd").symlink_to("/proc/self/fd")
    read_only("/dev")


def bind_software(path: str, source: str) -> None:
    """Put a directory back where it was, if something hides it."""
    if same(path, source):
        return
    hiding = next(p for p in Path(path).parents if p.exists())
    # Only the masks above, which are file systems of their own, need a new directory.
    read_only(str(hiding), yes=False)
    for directory in (*reversed(Path(path).parents), Path(path)):
        if not directory.exists():
            directory.mkdir()
            directory.chmod(0o755)
    mount(source, path, "", MS_BIND | MS_REC)
    read_only(path)


def same(path: str, source: str) -> bool:
    """Tell whether a path leads to what is held."""
    try:
        return Path(path).samefile(source)
    except OSError:
        return False


def hold(path: str) -> str:
    """Keep a way to what a path leads to now."""
    return f"/proc/self/fd/{os.open(path, os.O_PATH | os.O_CLOEXEC)}"


# System calls.


class Argument(ctypes.Structure):
    """Compares an argument of a system call (seccomp.h: struct scmp_arg_cmp)."""

    _fields_ = (
        ("number", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("one", ctypes.c_uint64),
        ("two", ctypes.c_uint64),
    )


NOT, LESS, EQUAL, GREATER, MASKED = 1, 2, 4, 6, 7
ALLOW, KILL = 0x7FFF0000, 0x80000000
DEFAULT_ACTION, BAD_ARCHITECTURE, NO_NEW_PRIVILEGES = 1, 2, 3


def refused(code: int) -> int:
    """Return the action that makes a system call fail."""
    return 0x00050000 | code


class Filter:
    """A filter of system calls, by libseccomp."""

    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p

    def __init__(self, action: int = ALLOW, others: int = ALLOW) -> None:
        """Take what becomes of a call no rule is for, and of other architectures'."""
        self.own = ctypes.c_void_p(self.lib.seccomp_init(ctypes.c_uint32(action)))
        self.check(self.lib.seccomp_attr_set(self.own, BAD_ARCHITECTURE, others))
        # The unit's own NoNewPrivileges= shall do that.
        self.check(self.lib.seccomp_attr_set(self.own, NO_NEW_PRIVILEGES, 0))

    def add(self, action: int, names: Iterable[str], *arguments: Argument) -> None:
        """Add a rule for some system calls; those this machine has not are left out."""
        compared = (Argument * len(arguments))(*arguments)
        for name in names:
            number = self.lib.seccomp_syscall_resolve_name(name.encode())
            if number >= 0:
                done = self.lib.seccomp_rule_add_array(
                    self.own, ctypes.c_uint32(action), number, len(arguments), compared
                )
                self.check(done)

    def load(self) -> None:
        """Apply it to this process, for good."""
        self.check(self.lib.seccomp_load(self.own))

    @staticmethod
    def check(done: int) -> None:
        """Raise OSError for a negative result."""
        if done < 0:
            raise OSError(-done, f"libseccomp: {os.strerror(-done)}")


def refuse(names: str, *arguments: Argument, code: int = errno.EPERM) -> None:
    """Let system calls fail when their arguments are such."""
    made = Filter()
    made.add(refused(code), names.split(), *arguments)
    made.load()


def call_sets() -> dict[str, list[str]]:
    """Return systemd's sets of system calls."""
    command = ("systemd-analyze", "--no-pager", "syscall-filter")
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sets: dict[str, list[str]] = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines():
        if line.startswith("@"):
            current = sets.setdefault(line.strip(), [])
        elif line.startswith("    ") and not line.lstrip().startswith("#"):
            current.append(line.strip())
    return sets


def expand(words: Iterable[str], sets: dict[str, list[str]]) -> set[str]:
    """Return the system calls that words of a SystemCallFilter= stand for."""
    found: set[str] = set()
    for word in words:
        found |= expand(sets[word], sets) if word.startswith("@") else {word}
    return found


def filter_calls(unit: Unit) -> None:
    """Apply SystemCallFilter=, of which the first line must be a list to allow."""
    sets = call_sets()
    allowed = expand(["@default"], sets)
    for value in unit.all("SystemCallFilter"):
        calls = expand(value.lstrip("~").split(), sets)
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    code = getattr(errno, unit.one("SystemCallErrorNumber", "EPERM"))
    made = Filter(refused(code))
    made.add(ALLOW, sorted(allowed))
    made.load()


def restrict_families(unit: Unit) -> None:
    """Apply RestrictAddressFamilies=, a list to allow."""
    words = unit.words("RestrictAddressFamilies")
    allowed = sorted(int(getattr(socket, word)) for word in words)
    made = Filter()
    action = refused(errno.EAFNOSUPPORT)
    made.add(action, ["socket"], Argument(0, LESS, allowed[0], 0))
    made.add(action, ["socket"], Argument(0, GREATER, allowed[-1], 0))
    for family in set(range(allowed[0], allowed[-1])) - {*allowed}:
        made.add(action, ["socket"], Argument(0, EQUAL, family, 0))
    made.load()


def restrict_namespaces(unit: Unit) -> None:
    """Apply RestrictNamespaces=, a list to allow."""
    allowed = unit.words("RestrictNamespaces")
    made = Filter()
    made.add(refused(errno.ENOSYS), ["clone3"])
    made.add(refused(errno.EPERM), ["setns"], Argument(1, EQUAL, 0, 0))
    for flag in (flag for name, flag in NAMESPACES.items() if name not in allowed):
        for name, place in (("unshare", 0), ("clone", 0), ("setns", 1)):
            action = refused(errno.EPERM)
            made.add(action, [name], Argument(place, MASKED, flag, flag))
    made.load()


def restrict_modes(_: Unit) -> None:
    """Apply RestrictSUIDSGID=."""
    made = Filter()
    create = os.O_CREAT
    for bit in (stat.S_ISUID, stat.S_ISGID):
        for name, mode, flags in (
            *(("chmod", 1, None), ("fchmod", 1, None), ("fchmodat", 2, None)),
            *(("mkdir", 1, None), ("mkdirat", 2, None), ("creat", 1, None)),
            *(("mknod", 1, None), ("mknodat", 2, None)),
            *(("open", 2, 1), ("openat", 3, 2)),
        ):
            words = [Argument(mode, MASKED, bit, bit)]
            if flags is not None:
                words.append(Argument(flags, MASKED, create, create))
            made.add(refused(errno.EPERM), [name], *words)
    made.add(refused(errno.ENOSYS), ["openat2"])
    made.load()


def restrict_realtime(_: Unit) -> None:
    """Apply RestrictRealtime=: of the policies, others, batch and idle are left."""
    refuse("sched_setscheduler", Argument(1, GREATER, 5, 0))
    for policy in (1, 2, 4):
        refuse("sched_setscheduler", Argument(1, EQUAL, policy, 0))


def deny_write_execute(_: Unit) -> None:
    """Apply MemoryDenyWriteExecute=."""
    both, execute = 0x6, 0x4
    refuse("mmap", Argument(2, MASKED, both, both))
    refuse("mprotect pkey_mprotect", Argument(2, MASKED, execute, execute))
    refuse("shmat", Argument(2, MASKED, 0o100000, 0o100000))


def lock_personality(_: Unit) -> None:
    """Apply LockPersonality=."""
    refuse("personality", Argument(0, NOT, LIBC.personality(0xFFFFFFFF), 0))


def native_only(_: Unit) -> None:
    """Apply SystemCallArchitectures=native."""
    Filter(others=KILL).load()


def no_modules(_: Unit) -> None:
    """Apply what ProtectKernelModules= does about system calls."""
    refuse(" ".join(expand(["@module"], call_sets())))


def no_clock(_: Unit) -> None:
    """Apply what ProtectClock= does about system calls."""
    refuse(" ".join(expand(["@clock"], call_sets())))


def no_log(_: Unit) -> None:
    """Apply what ProtectKernelLogs= does about system calls."""
    refuse("syslog")


def no_raw_devices(_: Unit) -> None:
    """Apply what PrivateDevices= does about system calls."""
    refuse(" ".join(expand(["@raw-io"], call_sets())))


def own_hostname(_: Unit) -> None:
    """Apply ProtectHostname=."""
    call("unshare", CLONE_NEWUTS)
    refuse("sethostname setdomainname")


FILTERS: dict[str, Callable[[Unit], None]] = {
    "ProtectHostname": own_hostname,
    "PrivateDevices": no_raw_devices,
    "ProtectKernelModules": no_modules,
    "ProtectKernelLogs": no_log,
    "ProtectClock": no_clock,
    "LockPersonality": lock_personality,
    "RestrictRealtime": restrict_realtime,
    "RestrictSUIDSGID": restrict_modes,
    "RestrictNamespaces": restrict_namespaces,
    "RestrictAddressFamilies": restrict_families,
    "MemoryDenyWriteExecute": deny_write_execute,
    "SystemCallArchitectures": native_only,
    "SystemCallFilter": filter_calls,
}
"""What restricts system calls, in an order in which one does not stop the next."""

DROPPED = {
    "ProtectKernelModules": {"sys_module"},
    "ProtectKernelLogs": {"syslog"},
    "ProtectClock": {"sys_time", "wake_alarm"},
    "PrivateDevices": {"mknod", "sys_rawio"},
}
"""Capabilities that settings take away besides."""

OTHERS = {
    *("StateDirectory", "RuntimeDirectory", "ReadOnlyPaths", "ReadWritePaths"),
    *("UMask", "LimitNOFILE"),
    *("CapabilityBoundingSet", "NoNewPrivileges", "ProtectSystem", "ProtectHome"),
    *("PrivateTmp", "ProtectControlGroups", "ProtectKernelTunables"),
}


# All together.


def check(unit: Unit) -> None:
    """Refuse settings of which nothing is known here."""
    unknown = unit.names - NO_MATTER - OTHERS - FILTERS.keys()
    if unknown:
        raise SystemExit(f"{unit.path}: what do {', '.join(sorted(unknown))} do?")


def drop_capabilities(unit: Unit) -> None:
    """Leave of the bounding set what the unit leaves; the rest goes with exec."""
    listed = unit.words("CapabilityBoundingSet")
    left = {word.lower().removeprefix("cap_") for word in listed} or {*CAPABILITIES}
    for name, dropped in DROPPED.items():
        if unit.says(name):
            left -= dropped
    for number, name in enumerate(CAPABILITIES):
        if name not in left:
            call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0)


def limit_files(most: int) -> None:
    """Set the limit of descriptors, or the one closest to it that may be set."""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))
    except ValueError:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))


def confine(unit: Unit, software: Sequence[str]) -> None:
    """Restrict this process as the unit says; what is executed next is restricted."""
    os.umask(int(unit.one("UMask", "0022"), 8))
    if unit.one("LimitNOFILE"):
        limit_files(int(unit.one("LimitNOFILE")))
    arrange(unit, software)
    os.chdir("/")
    drop_capabilities(unit)
    if unit.says("NoNewPrivileges"):
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, apply in FILTERS.items():
        if unit.all(name) and unit.one(name) != "no":
            apply(unit)


def software_of(argv: Sequence[str]) -> list[str]:
    """Return the directories that a program of this Python's is read from."""
    package = str(Path(__file__).resolve().parents[2])
    places = [package, sys.prefix, sys.base_prefix]
    places += [str(Path(argv[0]).resolve().parent)]
    return [place for place in dict.fromkeys(places) if place != "/"]


def main(path: str, *argv: str) -> NoReturn:
    """Prepare, restrict, and become the program."""
    unit = Unit(Path(path))
    check(unit)
    prepare(unit)
    confine(unit, software_of(argv))
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
