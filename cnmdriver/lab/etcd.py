"""A member of the lab's etcd cluster, on a machine of its own."""

import contextlib
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.node import Node, Program
from cnmdriver.lab.process import LabError
from cnmdriver.lab.underlay import Underlay

CLIENT_PORT = 2379
PEER_PORT = 2380
DATA = "/var/lib/etcd/data"
ANSWER_TIMEOUT = 1.0
HEALTH_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What all members are told: each other's names and addresses, and more."""

    peers: Mapping[str, str]
    args: tuple[str, ...]


class Member(Node):
    """A machine on the underlay that runs etcd, with its data in /var/lib/etcd."""

    def __init__(
        self,
        underlay: Underlay,
        name: str,
        addresses: tuple[IPv4Interface, IPv6Interface],
        cluster: Cluster,
    ) -> None:
        """Describe a member; it is made by `boot`."""
        super().__init__(underlay, name, addresses)
        self.cluster = cluster
        self.programs = {"etcd": self._etcd}
        self.at_boot = ("etcd",)

    @property
    def client_url(self) -> str:
        """Where clients on the underlay reach this member."""
        return f"http://{self.address4}:{CLIENT_PORT}"

    def start_etcd(
        self, args: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        """Start etcd; return when it accepts connections, with a quorum or without."""
        self.start("etcd", args, env)

    def stop_etcd(self, signum: int = signal.SIGTERM) -> int | None:
        """Send etcd a signal, wait for its end and return its exit code."""
        return self.stop("etcd", signum)

    def kill_etcd(self) -> None:
        """Kill etcd, so that it cannot hand over its leadership."""
        self.kill("etcd")

    def pause(self, name: str = "etcd") -> None:
        """Make etcd hang: it keeps its connections and does nothing."""
        super().pause(name)

    def resume(self, name: str = "etcd") -> None:
        """Let a paused etcd go on; one that is not paused is no error."""
        super().resume(name)

    def wipe(self) -> None:
        """
        Remove etcd's data.

        A cluster of which all members are wiped starts empty; one member alone is not
        taken back by the others until it was removed and added again.
        """
        if self.service("etcd"):
            raise LabError(f"etcd runs on {self.name}: stop it before its data goes")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory / "etcd" / "data")

    def is_healthy(self) -> bool:
        """Ask etcd whether it has a quorum and serves."""
        return b" 200 " in self._ask(b"GET /health HTTP/1.0\r\n\r\n")

    def wait_healthy(self, timeout: float = HEALTH_TIMEOUT) -> None:
        """Return when etcd serves; raise LabError with the end of its log if not."""
        if not wait_until(self.is_healthy, timeout):
            raise LabError(
                f"etcd on {self.name} was not healthy within {timeout} s; "
                f"its log ends with:\n{self.log_tail('etcd')}"
            )

    def state(self, name: str) -> str:
        """Return `up`, `unhealthy` (no quorum), `paused` or `down`."""
        state = super().state(name)
        return "unhealthy" if state == "up" and not self.is_healthy() else state

    def _etcd(self) -> Program:
        if shutil.which("etcd") is None:
            raise LabError("the lab needs etcd for its members: install etcd-server")
        clients = (
            self.client_url,
            f"http://[{self.address6}]:{CLIENT_PORT}",
        )
        local = (f"http://127.0.0.1:{CLIENT_PORT}", f"http://[::1]:{CLIENT_PORT}")
        peers = {
            name: f"http://{address}:{PEER_PORT}"
            for name, address in self.cluster.peers.items()
        }
        together = ",".join(f"{name}={url}" for name, url in peers.items())
        argv = (
            "etcd",
            f"--name={self.name}",
            f"--data-dir={DATA}",
            f"--listen-client-urls={','.join((*clients, *local))}",
            f"--advertise-client-urls={','.join(clients)}",
            f"--listen-peer-urls={peers[self.name]}",
            f"--initial-advertise-peer-urls={peers[self.name]}",
            f"--initial-cluster={together}",
            *self.cluster.args,
        )
        return Program(argv=argv, ready=self._accepts)

    def _accepts(self) -> bool:
        return self._ask(b"") == b"accepted"

    def _ask(self, request: bytes) -> bytes:
        with contextlib.suppress(OSError, LabError), self.tcp_socket() as client:
            client.settimeout(ANSWER_TIMEOUT)
            client.connect(("127.0.0.1", CLIENT_PORT))
            if not request:
                return b"accepted"
            client.sendall(request)
            return client.recv(100)
        return b""
