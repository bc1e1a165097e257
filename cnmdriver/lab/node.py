"""A machine with a cable to the underlay, and with daemons that can be ended."""

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface

from cnmdriver.lab import process
from cnmdriver.lab.machine import Machine, wait_until
from cnmdriver.lab.process import LabError
from cnmdriver.lab.underlay import Underlay

START_TIMEOUT = 30.0
STOP_TIMEOUT = 40.0
KILL_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How a daemon is started, and how it is seen that it serves."""

    argv: Sequence[str]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running daemon, and the process outside that waits for it."""

    pid: int
    waiter: int


class Node(Machine):
    """
    A machine on the underlay.

    `programs` are its daemons, in the order in which they start; those in `at_boot`
    start by themselves.
    """

    def __init__(
        self,
        underlay: Underlay,
        name: str,
        addresses: tuple[IPv4Interface, IPv6Interface],
    ) -> None:
        """Describe a machine; it is made by `boot`."""
        super().__init__(underlay.lab, name)
        self.underlay = underlay
        self.interfaces = addresses
        self.address4 = addresses[0].ip
        self.address6 = addresses[1].ip
        self.programs: dict[str, Callable[[], Program]] = {}
        self.at_boot: tuple[str, ...] = ()

    def boot(self) -> None:
        """Make the namespaces and the link to the underlay; start no daemon."""
        super().boot()
        self.underlay.disconnect(self.name)
        self.underlay.connect(self)
        address4, address6 = self.interfaces
        # Namespaces inherit this from the real machine, and dockerd's FORWARD policy
        # depends on it.
        self.sysctl("net.ipv4.ip_forward", "0")
        self.exec(
            "ip",
            "-batch",
            "-",
            input=f"""
link set lo up
addr add {address4} dev eth0
addr add {address6} dev eth0 nodad
link set eth0 up
route add default via {self.underlay.address4}
route add ::/0 via {self.underlay.address6}
""",
        )
        self._write_names()

    def power_on(self) -> None:
        """Boot with the disk as it is, and start the daemons of `at_boot`."""
        if self.is_on:
            raise LabError(f"{self.name} is on already")
        self.boot()
        for name in self.at_boot:
            self.start(name)

    def power_cut(self) -> None:
        """Kill the machine with all that runs in it, at once; off is no error."""
        super().power_cut()
        if self.underlay.is_on:
            self.underlay.disconnect(self.name)

    def unplug(self) -> None:
        """Cut the cable between this machine and the underlay."""
        self.underlay.set_port(self, "down")

    def plug(self) -> None:
        """Mend the cable between this machine and the underlay."""
        self.underlay.set_port(self, "up")

    def start(
        self, name: str, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start a daemon; return when it accepts connections."""
        program = self._program(name)
        if self.service(name):
            raise LabError(f"{name} runs on {self.name} already: stop it first")
        # The title is how any process finds the daemon again.
        _, *words = self.enter(*program.argv, *args)
        with (self.directory / f"{name}.log").open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                [self._title(name), *words],
                executable="nsenter",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env=self.environment({**program.env, **(env or {})}),
                start_new_session=True,
            )
        self._children.append(child)

        def ended_or_ready() -> bool:
            return child.poll() is not None or program.ready()

        answered = wait_until(ended_or_ready, START_TIMEOUT)
        if child.poll() is None and answered:
            return
        if self.service(name):
            self.stop(name, signal.SIGKILL)
        raise LabError(
            f"{name} did not start on {self.name} within {START_TIMEOUT} s; "
            f"its log ends with:\n{self.log_tail(name)}"
        )

    def stop(self, name: str, signum: int = signal.SIGTERM) -> int | None:
        """
        Send a daemon a signal and wait for its end.

        The exit code is returned to the process that has started it, None to others.
        """
        service = self._running(name)
        if signum != signal.SIGKILL and process.is_stopped(service.pid):
            raise LabError(f"{name} on {self.name} is paused: resume or kill it")
        process.send(service.pid, signum)
        if signum == signal.SIGKILL:
            process.send(service.waiter, signal.SIGCONT)
        own = [child for child in self._children if child.pid == service.waiter]

        def ended() -> bool:
            if own:
                return own[0].poll() is not None
            return process.has_ended(service.waiter)

        timeout = KILL_TIMEOUT if signum == signal.SIGKILL else STOP_TIMEOUT
        if not wait_until(ended, timeout):
            raise LabError(f"{name} on {self.name} did not end within {timeout} s")
        return own[0].returncode if own else None

    def kill(self, name: str) -> None:
        """Kill a daemon, so that it cannot clean up; its children live on."""
        self.stop(name, signal.SIGKILL)

    def pause(self, name: str) -> None:
        """Make a daemon hang: it keeps its connections and does nothing."""
        service = self._running(name)
        process.send(service.pid, signal.SIGSTOP)
        # nsenter stops itself then; one resumed before that would stay stopped.
        if not wait_until(lambda: process.is_stopped(service.waiter), KILL_TIMEOUT):
            raise LabError(f"{name} on {self.name} cannot be paused")

    def resume(self, name: str) -> None:
        """Let a paused daemon go on; one that is not paused is no error."""
        service = self._running(name)
        for pid in (service.pid, service.waiter):
            process.send(pid, signal.SIGCONT)

    def service(self, name: str) -> Service | None:
        """Return the running daemon, whoever has started it, or None."""
        for waiter in process.titled(self._title(name)):
            pid = process.child_of(waiter)
            if pid is not None:
                return Service(pid=pid, waiter=waiter)
        return None

    def service_pid(self, name: str) -> int:
        """Return the id of a running daemon, as seen from outside."""
        return self._running(name).pid

    def state(self, name: str) -> str:
        """Return `up`, `paused` or `down` for a daemon."""
        service = self.service(name)
        if service and process.is_stopped(service.pid):
            return "paused"
        return "up" if self.is_on and self._program(name).ready() else "down"

    def _program(self, name: str) -> Program:
        if name not in self.programs:
            known = " and ".join(self.programs)
            raise LabError(f"there is no {name} on {self.name}: it runs {known}")
        return self.programs[name]()

    def _running(self, name: str) -> Service:
        self._program(name)
        service = self.service(name)
        if service is None:
            raise LabError(f"{name} does not run on {self.name}")
        return service

    def _title(self, name: str) -> str:
        return f"{name}@{self.directory}"

    def _write_names(self) -> None:
        """Name the machine, and send questions about others where nobody answers."""
        etc = self.socket("/etc")
        for name in ("hosts", "resolv.conf"):
            (etc / name).unlink(missing_ok=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (etc / "resolv.conf").write_text(f"nameserver {self.underlay.address4}\n")
