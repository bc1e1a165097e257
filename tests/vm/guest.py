"""A guest of QEMU's, without KVM, and what it is asked to do."""

import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOOT = 600.0
"""Seconds for a boot without KVM on a busy machine."""
MEMORY = "1536"


class Failed(AssertionError):
    """A command in a guest did not do what it should."""


@dataclass
class Guest:
    """A machine that boots."""

    name: str
    process: subprocess.Popen[bytes]
    port: socket.socket
    console: Path
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

    def run(self, *argv: str, seconds: float = 300.0) -> str:
        """Run a command that must succeed; return what it printed."""
        code, out, err = self.ask(*argv, seconds=seconds)
        if code:
            raise Failed(f"{self.name}: {' '.join(argv)} ended with {code}: {out}{err}")
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
                raise Failed(f"{self.name}: never within {seconds} s: {script}: {err}")
            time.sleep(1)

    def reboot(self) -> None:
        """Boot anew, with the disk as it is."""
        self.ask("systemctl", "reboot", "--no-block")
        self.up()


@contextlib.contextmanager
def guest(
    directory: Path, name: str, number: int, wire: str, disk: Path
) -> Iterator[Guest]:
    """Boot a guest with a cable; what it writes is forgotten in the end."""
    boot = disk.parent / "root" / "boot"
    kernel, initrd = (next(boot.glob(f"{p}-*")) for p in ("vmlinuz", "initrd.img"))
    path, console = directory / f"{name}.ctl", directory / f"{name}.console"
    argv = [
        *("nice", "-n", "10", "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max"),
        *("-smp", "1", "-m", MEMORY, "-nodefaults", "-no-user-config"),
        *("-display", "none", "-serial", f"file:{console}"),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "root=/dev/vda rw console=ttyS0 apparmor=0 quiet"),
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
            made = Guest(name, process, port, console)
            made.up()
            yield made
    finally:
        process.kill()
        process.wait()
