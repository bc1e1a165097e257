"""A Docker host of the lab: a machine with a dockerd and a pynet of its own."""

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

import cnmdriver
from cnmdriver.lab import image, process
from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.node import Node, Program
from cnmdriver.lab.process import Completed, LabError
from cnmdriver.lab.underlay import Underlay

DOCKER_SOCKET = "/run/docker.sock"
PLUGIN_SOCKET = "/run/docker/plugins/pynet.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What runs on every host of a lab, and how it is started."""

    dockerd: str
    dockerd_args: tuple[str, ...]
    daemon: tuple[str, ...]
    pynet_args: tuple[str, ...]
    serve: bool
    endpoints: tuple[str, ...]
    cgroup: str


class Host(Node):
    """A machine on the underlay that runs dockerd and pynet."""

    def __init__(
        self,
        underlay: Underlay,
        name: str,
        addresses: tuple[IPv4Interface, IPv6Interface],
        software: Software,
    ) -> None:
        """Describe a host; it is made by `boot`."""
        super().__init__(underlay, name, addresses)
        self.software = software
        self.cgroup = f"{software.cgroup}/{name}"
        # As on a real host: what Docker starts again needs its networks' driver.
        self.programs = {"pynet": self._pynet, "dockerd": self._dockerd}
        self.at_boot = ("pynet", "dockerd") if software.serve else ("dockerd",)

    def power_cut(self) -> None:
        """Kill the host with all that runs in it, at once; `boot` starts it again."""
        super().power_cut()
        # A real host's control groups would be gone as well.
        wait_until(lambda: process.remove_cgroup(self.cgroup), 5.0)

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

    def start(
        self, name: str, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start dockerd or pynet; a started dockerd has the image."""
        if name != "dockerd":
            super().start(name, args, env)
            return
        super().start(name, [f"--storage-driver={self._storage_driver()}", *args], env)
        self._import_image()

    def start_dockerd(
        self, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start dockerd; return when its API answers and the image is there."""
        self.start("dockerd", args, env)

    def stop_dockerd(self, signum: int = signal.SIGTERM) -> int | None:
        """Send dockerd a signal, wait for its end and return its exit code."""
        return self.stop("dockerd", signum)

    def kill_dockerd(self) -> None:
        """Kill dockerd; its containers live on."""
        self.kill("dockerd")

    def start_pynet(
        self, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start pynet; return when its plugin socket accepts connections."""
        self.start("pynet", args, env)

    def stop_pynet(self, signum: int = signal.SIGTERM) -> int | None:
        """Send pynet a signal, wait for its end and return its exit code."""
        return self.stop("pynet", signum)

    def kill_pynet(self) -> None:
        """Kill pynet, so that it cannot clean up."""
        self.kill("pynet")

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
        if self.software.endpoints:
            env["ETCDCTL_ENDPOINTS"] = ",".join(self.software.endpoints)
        return env | dict(extra or {})

    def _pynet(self) -> Program:
        argv = [*self.software.daemon, *self.software.pynet_args]
        chosen = any(word.partition("=")[0] == "--store" for word in argv)
        if self.software.endpoints and not chosen:
            argv += ["--store", f"etcd://{','.join(self.software.endpoints)}"]
        return Program(argv=argv, ready=self.pynet_answers)

    def _dockerd(self) -> Program:
        program = self.software.dockerd
        argv = (
            program,
            f"--host=unix://{DOCKER_SOCKET}",
            "--pidfile=/run/docker.pid",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            f"--cgroup-parent={self.cgroup}",
            *self.software.dockerd_args,
        )
        path = os.environ.get("PATH", os.defpath)
        if "/" in program:
            # containerd and runc of the same build lie beside it.
            path = f"{Path(program).parent}:{path}"
        # A killed dockerd leaves its socket, so that the file alone says nothing.
        return Program(argv=argv, env={"PATH": path}, ready=self.docker_answers)

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
