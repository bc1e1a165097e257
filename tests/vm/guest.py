"""A machine that boots in namespaces, and what it is asked."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import GROUP

BOOT = 300.0
"""Seconds for a boot on a busy machine."""
AGAIN = 133
"""With what systemd-nspawn ends when its machine shall boot again."""
PATHS = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failed(AssertionError):
    """A command in a guest did not do what it should."""


@dataclass
class Guest:
    """A machine of systemd-nspawn's: systemd is its first process."""

    name: str
    process: subprocess.Popen[bytes]
    console: Path
    wire: str
    argv: list[str]
    leader: int = 0

    def up(self) -> None:
        """Wait until the first process is another one, and has booted."""
        before, end = self.leader, time.monotonic() + BOOT
        while self.leader == before or self.state() not in {"running", "degraded"}:
            if self.process.poll() == AGAIN:
                self.process = switched_on(self.argv, self.console)
            if time.monotonic() > end or self.process.poll() is not None:
                raise Failed(f"{self.name} does not boot: see {self.console}")
            time.sleep(0.5)
            number = self.process.pid
            children = Path(f"/proc/{number}/task/{number}/children").read_text()
            self.leader = int((children.split() or ["0"])[0])
            # Each boot has a new end of the cable.
            plug = ("link", "set", f"w-{self.name}", "up", "master", "bridge0")
            words = ("ip", "-n", self.wire, *plug)
            subprocess.run(words, check=False, capture_output=True)

    def state(self) -> str:
        """Return what systemd says of the boot."""
        return self.ask("systemctl", "is-system-running")[1].strip()

    def ask(self, *argv: str, seconds: float = 300.0) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed."""
        enter = ("nsenter", f"--target={self.leader}", "--all", "env", "-i", PATHS)
        done = subprocess.run(
            [*enter, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def run(self, *argv: str, seconds: float = 300.0) -> str:
        """Run a command that must succeed; return what it printed."""
        code, out, err = self.ask(*argv, seconds=seconds)
        if code:
            log = self.ask("journalctl", "--no-pager", "-b", "-n", "40", "-p", "info")
            raise Failed(
                f"{self.name}: {' '.join(argv)} ended with {code}: {out}{err}\n{log[1]}"
            )
        return out

    def shell(self, script: str, seconds: float = 300.0) -> str:
        """Run a script that must succeed."""
        return self.run("bash", "-euo", "pipefail", "-c", script, seconds=seconds)

    def until(self, script: str, seconds: float = 120.0) -> str:
        """Run a script until it succeeds."""
        end = time.monotonic() + seconds
        while True:
            code, out, err = self.ask("bash", "-euo", "pipefail", "-c", script)
            if code == 0:
                return out
            if time.monotonic() > end:
                log = self.ask("journalctl", "--no-pager", "-b", "-n", "40")[1]
                raise Failed(
                    f"{self.name}: never within {seconds} s: {script}: {err}\n{log}"
                )
            time.sleep(1)

    def reboot(self) -> None:
        """Boot anew, with the disk as it is."""
        self.ask("systemctl", "reboot", "--no-block")
        self.up()


@contextlib.contextmanager
def booted(directory: Path, name: str, wire: str, system: Path) -> Iterator[Guest]:
    """Boot a machine on a wire, a network namespace; what it writes is forgotten."""
    place, console = directory / name, directory / f"{name}.console"
    upper, work = (place / part for part in ("upper", "work"))
    root = place / "root"
    for part in (place, root):
        part.mkdir()
    with contextlib.ExitStack() as stack:
        mount("-t", "tmpfs", "tmpfs", str(place))
        stack.callback(unmount, place)
        for part in (upper, work, root):
            part.mkdir()
        layers = f"lowerdir={system},upperdir={upper},workdir={work}"
        mount("-t", "overlay", "-o", layers, "overlay", str(root))
        stack.callback(unmount, root)
        argv = [
            *("nsenter", f"--net=/run/netns/{wire}", "nice", "-n", "10"),
            *("systemd-nspawn", "--boot", "--register=no", "--keep-unit"),
            *("--private-network", f"--network-veth-extra=w-{name}:eth0"),
            *("--capability=all", "--link-journal=no", f"--machine={name}"),
            # For Docker's containers.
            *("--system-call-filter=@keyring bpf", f"--directory={root}"),
        ]
        made = Guest(name, switched_on(argv, console), console, wire, argv)
        stack.callback(lambda: ended(made.process))
        made.up()
        yield made


def switched_on(argv: list[str], console: Path) -> subprocess.Popen[bytes]:
    """Start what a machine runs in; what it shows is added to its console."""
    with console.open("ab") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextlib.contextmanager
def cable() -> Iterator[str]:
    """Make a namespace with a bridge, to which machines are connected."""
    name = f"pynet-vm-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for words in ("add bridge0 type bridge", "set bridge0 up"):
            link = ["ip", "-n", name, "link", *words.split()]
            subprocess.run(link, check=True)
        yield name
    finally:
        clear_groups()
        subprocess.run(["ip", "netns", "del", name], check=True)


def mount(*words: str) -> None:
    """Mount something."""
    subprocess.run(["mount", *words], check=True)


def unmount(place: Path) -> None:
    """Unmount something."""
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def clear_groups() -> None:
    """Remove what Docker made of control groups, which are this machine's."""
    for top in Path("/sys/fs/cgroup").glob(f"*{GROUP}"):
        for group in sorted(top.rglob("*"), reverse=True):
            if group.is_dir():
                group.rmdir()
        top.rmdir()


def ended(process: subprocess.Popen[bytes]) -> None:
    """Switch a machine off."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
