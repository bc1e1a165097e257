"""A machine that boots, in QEMU without KVM or in namespaces, and what it is asked."""

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import GROUP, disk_of

BOOT = 600.0
"""Seconds for a boot without KVM on a busy machine."""
MEMORY = "1536"
AGAIN = 133
"""With what systemd-nspawn ends when its machine shall boot again."""
PATHS = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failed(AssertionError):
    """A command in a guest did not do what it should."""


@dataclass
class Guest:
    """A machine that boots."""

    name: str
    process: subprocess.Popen[bytes]
    console: Path

    def up(self) -> None:
        """Wait for the end of the boot."""
        raise NotImplementedError

    def ask(
        self, *argv: str, seconds: float = 300.0, text: str = ""
    ) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed."""
        raise NotImplementedError

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


@dataclass
class Emulated(Guest):
    """One of QEMU's, with a kernel and udev of its own."""

    port: socket.socket
    rest: bytes = b""

    def line(self, seconds: float) -> str:
        """Read a line from the agent."""
        end = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = end - time.monotonic()
            if left < 0 or self.process.poll() is not None:
                raise Failed(f"{self.name} does not answer: see {self.console}")
            if select.select([self.port], [], [], min(left, 1.0))[0]:
                self.rest += self.port.recv(65536)
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode()

    def up(self) -> None:
        """Wait until the agent runs, and then for the end of the boot."""
        while self.line(BOOT) != "ready":
            pass
        self.ask("systemctl", "is-system-running", "--wait", seconds=BOOT)

    def ask(
        self, *argv: str, seconds: float = 300.0, text: str = ""
    ) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed."""
        asked = {"argv": argv, "input": text, "timeout": seconds}
        self.port.sendall(json.dumps(asked).encode() + b"\n")
        found = json.loads(self.line(seconds + 60))
        return found["code"], found["out"], found["err"]


@dataclass
class Booted(Guest):
    """One of systemd-nspawn's: systemd is its first process, on this machine's kernel."""

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

    def ask(
        self, *argv: str, seconds: float = 300.0, text: str = ""
    ) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed."""
        enter = ("nsenter", f"--target={self.leader}", "--all", "env", "-i", PATHS)
        done = subprocess.run(
            [*enter, *argv], input=text, capture_output=True, text=True,
            errors="replace", timeout=seconds, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


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
        made = Booted(name, switched_on(argv, console), console, wire, argv)
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


@contextlib.contextmanager
def emulated(
    directory: Path, name: str, number: int, wire: str, system: Path
) -> Iterator[Guest]:
    """Boot a guest with a cable; what it writes is forgotten in the end."""
    boot, disk = system / "boot", disk_of(system)
    kernel, initrd = (next(boot.glob(f"{p}-*")) for p in ("vmlinuz", "initrd.img"))
    path, console = directory / f"{name}.ctl", directory / f"{name}.console"
    argv = [
        *("nice", "-n", "10", "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max"),
        *("-smp", "1", "-m", MEMORY, "-nodefaults", "-no-user-config"),
        *("-display", "none", "-serial", f"file:{console}"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "root=/dev/vda rw console=ttyS0 apparmor=0 no_timer_check quiet"),
        *("-drive", f"file={disk},format=raw,if=virtio,snapshot=on"),
        *("-device", "virtio-serial"),
        *("-chardev", f"socket,path={path},server=on,wait=off,id=ctl"),
        *("-device", "virtserialport,chardev=ctl,name=pynet.ctl"),
        *("-netdev", f"{wire},id=wire"),
        *("-device", f"virtio-net-pci,netdev=wire,mac=52:54:00:00:00:0{number}"),
        *("-device", "virtio-rng-pci"),
    ]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        port = socket.socket(socket.AF_UNIX)
        with port:
            end = time.monotonic() + 30
            while True:
                try:
                    port.connect(str(path))
                    break
                except OSError:
                    if time.monotonic() > end or process.poll() is not None:
                        raise
                    time.sleep(0.1)
            made = Emulated(name, process, console, port)
            made.up()
            yield made
    finally:
        process.kill()
        process.wait()
