"""A machine of the lab: namespaces with a private /run, and programs run in them."""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnmdriver.lab import process
from cnmdriver.lab.process import Completed, LabError

BOOT_TIMEOUT = 10.0
POLL = 0.02
CLONE_NEWNET = 0x40000000

Connection = socket.socket


def wait_until(done: Callable[[], bool], timeout: float) -> bool:
    """Ask every 20 ms until the answer is yes; return the last answer."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


class Machine:
    """A set of namespaces (network, mount, pid, uts, ipc) that can lose its power."""

    def __init__(self, lab: Path, name: str) -> None:
        """Describe the machine `name` of a lab; it is made by `boot`."""
        self.lab = lab
        self.name = name
        self.directory = lab / name
        self._init: int | None = None
        self._children: list[subprocess.Popen[str]] = []

    def boot(self) -> None:
        """Make the namespaces and their first process."""
        (self.directory / "stage").mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-IS", str(process.INIT), str(self.lab), self.name]
        with (self.directory / "boot.log").open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._children.append(child)
        if not _says_ready(child):
            self.power_cut()
            raise LabError(
                f"machine {self.name} could not be made: {self.log_tail('boot')}"
            )
        self._init = process.inner_process(self.lab, self.name)

    def power_cut(self) -> None:
        """Kill the machine with all that runs in it, at once; off is no error."""
        inner = process.inner_process(self.lab, self.name)
        with process.held([inner] if inner else []) as spaces:
            if not wait_until(self._killed, BOOT_TIMEOUT):
                raise LabError(f"the first process of {self.name} does not end")
            self._init = None
            for child in self._children:
                child.wait(BOOT_TIMEOUT)
            self._children.clear()
            self._wait_off(spaces)

    @property
    def is_on(self) -> bool:
        """Whether the machine has its first process."""
        return process.inner_process(self.lab, self.name) is not None

    @property
    def pid(self) -> int:
        """The machine's process 1, as seen from outside."""
        if self._init is None or not Path(f"/proc/{self._init}").exists():
            self._init = process.inner_process(self.lab, self.name)
        if self._init is None:
            raise LabError(f"{self.name} is off: switch it on first")
        return self._init

    @property
    def netns(self) -> str:
        """A path to the network namespace; good as long as the power is on."""
        return f"/proc/{self.pid}/ns/net"

    def socket(self, path: str) -> Path:
        """Return where a path of the machine is found from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def tcp_socket(self) -> Connection:
        """Return an IPv4 TCP socket that connects from the machine."""
        # A thread of its own, as it stays in the network it has entered.
        with ThreadPoolExecutor(1) as thread, Path(self.netns).open() as netns:
            return thread.submit(_socket_in, netns.fileno()).result()

    def enter(self, *argv: str) -> list[str]:
        """Return the command that runs a command in the machine."""
        flags = ("--net", "--mount", "--pid", "--uts", "--ipc")
        return ["nsenter", f"--target={self.pid}", *flags, "--", *argv]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of programs in the machine."""
        foreign = ("DOCKER_", "PYNET_", "CONTAINERD_", "ETCD")
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        env["DOCKER_CONFIG"] = "/etc/docker/cli"
        return env | dict(extra or {})

    def exec(
        self,
        *argv: str,
        check: bool = True,
        timeout: float = 30,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
    ) -> Completed:
        """Run a command in the machine; raise LabError if it fails and `check`."""
        done = process.run(
            self._mortal(*argv), timeout=timeout, data=input, env=self.environment()
        )
        if check and done.returncode:
            text = (done.stderr or done.stdout).strip()
            raise LabError(
                f"`{' '.join(argv)}` on {self.name} ended with "
                f"{done.returncode}: {text}"
            )
        return done

    def popen(
        self, *argv: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command with pipes; killing what is returned kills the command."""
        child = subprocess.Popen(
            self._mortal(*argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment(env),
        )
        self._children.append(child)
        return child

    def sysctl(self, name: str, value: str | None = None) -> str:
        """Set a sysctl of the machine's namespaces, if given a value; return it."""
        path = "/proc/sys/" + name.replace(".", "/")
        if value is not None:
            self.exec("tee", path, input=value)
        return self.exec("cat", path).stdout.strip()

    def log(self, name: str) -> str:
        """Return all that a program of the machine has logged: boot, dockerd, …."""
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of a log, for error texts."""
        return "\n".join(self.log(name).splitlines()[-lines:])

    def _mortal(self, *argv: str) -> list[str]:
        # nsenter forks to enter the pid namespace and passes no signal on.
        return self.enter("setpriv", "--pdeathsig", "KILL", *argv)

    def _killed(self) -> bool:
        everybody = process.machine_processes(self.lab).items()
        mine = [pid for pid, name in everybody if name == self.name]
        # The outer process waits for the inner one, which ends when all is gone.
        for pid in [pid for pid in mine if process.is_first(pid)] or mine:
            process.kill(pid)
        for waiter in process.titled(f"@{self.directory}"):
            # Stopped with the daemon that it waits for, if that was paused.
            process.send(waiter, signal.SIGCONT)
        return not mine

    def _wait_off(self, spaces: frozenset[str]) -> None:
        def gone() -> bool:
            return not process.members(spaces)

        if spaces and not wait_until(gone, 1.0):
            # Entered some of the namespaces only, so that the kernel spared them.
            for pid in process.members(spaces):
                process.kill(pid)
            if not wait_until(gone, 5.0):
                raise LabError(f"processes of {self.name} do not end")


def _socket_in(netns: int) -> Connection:
    if ctypes.CDLL(None, use_errno=True).setns(netns, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise LabError(f"the network cannot be entered: {os.strerror(code)}")
    return Connection()


def _says_ready(child: subprocess.Popen[str]) -> bool:
    """Read what a machine's first processes print until it is ready, or failed."""
    assert child.stdout is not None  # noqa: S101 - asked for a pipe
    end = time.monotonic() + BOOT_TIMEOUT
    text = b""
    with child.stdout as pipe:
        while b"ready\n" not in text:
            left = max(0.0, end - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                return False
            more = os.read(pipe.fileno(), 100)
            if not more:
                return False
            text += more
    return True
