"""A Docker host of the lab: a machine with a dockerd and a pynet of its own."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

import cnmdriver
from cnmdriver.lab import image, process
from cnmdriver.lab.machine import Machine, end_process, wait_until
from cnmdriver.lab.process import Completed, LabError
from cnmdriver.lab.underlay import Underlay

DOCKER_SOCKET = "/run/docker.sock"
PLUGIN_SOCKET = "/run/docker/plugins/pynet.sock"
START_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What runs on every host of a lab, and how it is started."""

    dockerd: str
    dockerd_args: tuple[str, ...]
    daemon: tuple[str, ...]
    pynet_args: tuple[str, ...]
    cgroup: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running daemon: what to wait for, and what to send signals to."""

    process: subprocess.Popen[str]
    pid: int


class Host(Machine):
    """A machine on the underlay that runs dockerd and pynet."""

    def __init__(
        self,
        underlay: Underlay,
        name: str,
        addresses: tuple[IPv4Interface, IPv6Interface],
        software: Software,
    ) -> None:
        """Describe a host; it is made by `boot`."""
        super().__init__(underlay.lab, name)
        self.underlay = underlay
        self.interfaces = addresses
        self.address4 = addresses[0].ip
        self.address6 = addresses[1].ip
        self.software = software
        self.cgroup = f"{software.cgroup}/{name}"
        self._services: dict[str, Service] = {}

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

    def power_cut(self) -> None:
        """Kill the host with all that runs in it, at once; `boot` starts it again."""
        super().power_cut()
        self._services.clear()
        if self.underlay.is_on:
            self.underlay.disconnect(self.name)
        # A real host's control groups would be gone as well.
        wait_until(lambda: process.remove_cgroup(self.cgroup), 5.0)

    def unplug(self) -> None:
        """Cut the cable between this host and the underlay."""
        self.underlay.unplug(self.name)

    def plug(self) -> None:
        """Mend the cable between this host and the underlay."""
        self.underlay.plug(self.name)

    def docker(
        self,
        *args: str,
        check: bool = True,
        timeout: float = 60,
    ) -> Completed:
        """Run the Docker client against this host's dockerd."""
        return self.exec("docker", *args, check=check, timeout=timeout)

    def container_exec(
        self, name: str, *argv: str, check: bool = True, timeout: float = 30
    ) -> Completed:
        """Run a command in a container of this host."""
        return self.docker("exec", name, *argv, check=check, timeout=timeout)

    def pynet(self, *args: str, check: bool = True, timeout: float = 30) -> Completed:
        """Run the `pynet` command on this host."""
        command = [word for word in self.software.daemon if word != "serve"]
        return self.exec(*command, *args, check=check, timeout=timeout)

    def start_dockerd(
        self, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start dockerd; return when its API answers and the image is there."""
        program = self.software.dockerd
        argv = [
            program,
            f"--host=unix://{DOCKER_SOCKET}",
            "--pidfile=/run/docker.pid",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            f"--cgroup-parent={self.cgroup}",
            f"--storage-driver={self._storage_driver()}",
            *self.software.dockerd_args,
            *args,
        ]
        path = os.environ.get("PATH", os.defpath)
        if "/" in program:
            # containerd and runc of the same build lie beside it.
            path = f"{Path(program).parent}:{path}"
        # A killed dockerd leaves its socket, so that the file alone says nothing.
        self._start("dockerd", argv, {"PATH": path, **(env or {})}, self.docker_answers)
        self._import_image()

    def stop_dockerd(self, signum: int = signal.SIGTERM) -> int:
        """Send dockerd a signal, wait for its end and return its exit code."""
        return self._stop("dockerd", signum)

    def kill_dockerd(self) -> None:
        """Kill dockerd; its containers live on."""
        self._stop("dockerd", signal.SIGKILL)

    def start_pynet(
        self, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start pynet; return when its plugin socket accepts connections."""
        argv = [*self.software.daemon, *self.software.pynet_args, *args]
        self._start("pynet", argv, env or {}, self.pynet_answers)

    def stop_pynet(self, signum: int = signal.SIGTERM) -> int:
        """Send pynet a signal, wait for its end and return its exit code."""
        return self._stop("pynet", signum)

    def kill_pynet(self) -> None:
        """Kill pynet, so that it cannot clean up."""
        self._stop("pynet", signal.SIGKILL)

    def service_pid(self, name: str) -> int:
        """Return the id of the running `dockerd` or `pynet`, as seen from outside."""
        service = self._services.get(name)
        if service is None or service.process.poll() is not None:
            raise LabError(f"{name} does not run on {self.name}")
        return service.pid

    def docker_answers(self) -> bool:
        """Ask dockerd whether it serves its API."""
        request = b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n"
        return b" 200 " in self._ask(DOCKER_SOCKET, request)

    def pynet_answers(self) -> bool:
        """Ask whether pynet's plugin socket accepts connections."""
        return self._ask(PLUGIN_SOCKET, b"") == b"accepted"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of programs on this host; this package is in it."""
        env = super().environment()
        package = str(Path(str(cnmdriver.__file__)).parent.parent)
        known = env.get("PYTHONPATH")
        env["PYTHONPATH"] = f"{package}:{known}" if known else package
        return env | dict(extra or {})

    def _start(
        self,
        name: str,
        argv: list[str],
        env: Mapping[str, str],
        ready: Callable[[], bool],
    ) -> None:
        known = self._services.get(name)
        if known is not None and known.process.poll() is None:
            raise LabError(f"{name} runs on {self.name} already: stop it first")
        with (self.directory / f"{name}.log").open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                self.enter(*argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                env=self.environment(env),
                start_new_session=True,
            )
        self._children.append(child)

        def ended_or_ready() -> bool:
            return child.poll() is not None or ready()

        answered = wait_until(ended_or_ready, START_TIMEOUT)
        pid = process.child_of(child.pid)
        if not answered or pid is None:
            if pid is not None:
                end_process(child, pid, signal.SIGKILL)
            raise LabError(
                f"{name} did not start on {self.name} within {START_TIMEOUT} s; "
                f"its log ends with:\n{self.log_tail(name)}"
            )
        self._services[name] = Service(process=child, pid=pid)

    def _stop(self, name: str, signum: int) -> int:
        service = self._services.pop(name, None)
        if service is None:
            raise LabError(f"{name} does not run on {self.name}")
        return end_process(service.process, service.pid, signum)

    def _ask(self, path: str, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            try:
                client.connect(str(self.socket(path)))
                if not request:
                    return b"accepted"
                client.sendall(request)
                return client.recv(100)
            except OSError:
                return b""

    def _storage_driver(self) -> str:
        """Return overlay2 where the lab's directory allows it, else vfs."""
        probe = "/var/lib/docker/probe"
        layers = [f"{probe}/{name}" for name in ("lower", "upper", "work", "merged")]
        self.exec("mkdir", "-p", *layers)
        lower, upper, work, merged = layers
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mount = ("mount", "-t", "overlay", "-o", options, "overlay", merged)
        works = self.exec(*mount, check=False).returncode == 0
        if works:
            self.exec("umount", merged)
        self.exec("rm", "-rf", probe)
        return "overlay2" if works else "vfs"

    def _import_image(self) -> None:
        if self.docker("image", "inspect", image.NAME, check=False).returncode == 0:
            return
        # From outside, as the lab's directory may be hidden by the host's own /run.
        done = process.run(
            [
                "docker",
                f"--host=unix://{self.socket(DOCKER_SOCKET)}",
                *("import", "--change", 'CMD ["sh"]'),
                *(str(self.lab / "image.tar"), image.NAME),
            ],
            env=self.environment({"DOCKER_CONFIG": str(self.directory / "cli")}),
        )
        if done.returncode:
            raise LabError(f"{self.name} cannot import its image: {done.stderr}")

    def _write_names(self) -> None:
        """Name the host, and send questions about other names where nobody answers."""
        etc = self.socket("/etc")
        for name in ("hosts", "resolv.conf"):
            (etc / name).unlink(missing_ok=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        (etc / "resolv.conf").write_text(f"nameserver {self.underlay.address4}\n")
