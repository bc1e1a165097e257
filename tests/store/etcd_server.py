"""Real etcd members on loopback, to be stopped, killed, emptied and filled by tests."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.rpc import grpc, pb, prefix_end

READY = 20.0
"""Seconds in which a cluster must have a leader."""


@dataclass
class Server:
    """One etcd process and its files."""

    name: str
    directory: Path
    address: str
    client: int
    peer: int
    extra: Sequence[str] = ()
    scheme: str = "http"
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Return where clients connect."""
        return f"{self.address}:{self.client}"

    def start(self, cluster: str) -> None:
        """Start the process; `cluster` names all members."""
        client = f"{self.scheme}://{self.endpoint}"
        peer = f"http://{self.address}:{self.peer}"
        argv = [
            "etcd", "--name", self.name, "--data-dir", str(self.directory),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", cluster, "--log-level", "warn", "--logger", "zap",
            "--unsafe-no-fsync", *self.extra,
        ]  # fmt: skip
        environment = {"PATH": os.environ["PATH"]}
        with self.directory.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        """Make it stand still, connections and all."""
        self.signal(signal.SIGSTOP)
        # It may do a little more until the signal has reached all its threads.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """Let it run again."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


class Cluster:
    """Some members, and what an operator does with them."""

    def __init__(self, servers: list[Server]) -> None:
        """Take members that are not started yet."""
        self.servers = servers
        self.credentials: grpc.ChannelCredentials | None = None

    @property
    def names(self) -> str:
        """Return what each member is told of all."""
        return ",".join(f"{s.name}=http://{s.address}:{s.peer}" for s in self.servers)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Return where clients connect."""
        return tuple(server.endpoint for server in self.servers)

    def options(self, first: Server | None = None, **changes: object) -> Options:
        """Return options for this cluster, with one member in front."""
        ordered = sorted(self.servers, key=lambda server: server is not first)
        endpoints = tuple(server.endpoint for server in ordered)
        return Options(**{"endpoints": endpoints, **changes})

    def start(self, *servers: Server) -> None:
        """Start members, all if none is named."""
        for server in servers or self.servers:
            server.start(self.names)

    def end(self) -> None:
        """End all members."""
        for server in self.servers:
            server.kill()

    def ask(
        self, service: str, method: str, request: object, at: Server | None = None
    ) -> object:
        """Call any method of etcd's, at the first member or another."""
        server = at or self.servers[0]
        if self.credentials is None:
            channel = grpc.insecure_channel(server.endpoint)
        else:
            channel = grpc.secure_channel(server.endpoint, self.credentials)
        with channel:
            call = getattr(getattr(pb, f"{service}Stub")(channel), method)
            return call(request, timeout=READY, wait_for_ready=True)

    def wait(self, *servers: Server) -> None:
        """Wait until members answer as part of a cluster with a leader."""
        for server in servers or self.servers:
            self.ask("KV", "Range", pb.RangeRequest(key=b"x"), server)

    def leader(self) -> Server:
        """Return the member that leads."""
        for server in self.servers:
            answer = self.ask("Maintenance", "Status", pb.StatusRequest(), server)
            if answer.leader == answer.header.member_id:
                return server
        raise AssertionError("no member leads")

    def follower(self) -> Server:
        """Return a member that does not lead."""
        leader = self.leader()
        return next(server for server in self.servers if server is not leader)

    def compact(self) -> None:
        """Make etcd forget what was before its newest revision."""
        newest = self.ask("KV", "Range", pb.RangeRequest(key=b"x")).header.revision
        self.ask("KV", "Compact", pb.CompactionRequest(revision=newest, physical=True))

    def empty(self) -> None:
        """End all members and lose their data."""
        self.end()
        for server in self.servers:
            shutil.rmtree(server.directory)

    def add_user(self, name: str, password: str, prefix: str) -> None:
        """Make a user with a role of its own that may use a prefix."""
        key = prefix.encode()
        permission = {"permType": 2, "key": key, "range_end": prefix_end(key)}
        self.ask("Auth", "RoleAdd", pb.AuthRoleAddRequest(name=name))
        self.ask(
            "Auth",
            "RoleGrantPermission",
            pb.AuthRoleGrantPermissionRequest(name=name, perm=permission),
        )
        self.ask("Auth", "UserAdd", pb.AuthUserAddRequest(name=name, password=password))
        self.grant(name)

    def grant(self, name: str) -> None:
        """Give a user the role of the same name."""
        request = pb.AuthUserGrantRoleRequest(user=name, role=name)
        self.ask("Auth", "UserGrantRole", request)

    def enable_auth(self) -> None:
        """Let etcd ask everybody for a login."""
        self.ask("Auth", "UserAdd", pb.AuthUserAddRequest(name="root", password="root"))
        self.ask("Auth", "RoleAdd", pb.AuthRoleAddRequest(name="root"))
        self.grant("root")
        self.ask("Auth", "AuthEnable", pb.AuthEnableRequest())


@contextlib.contextmanager
def prepared(
    directory: Path, count: int = 1, extra: Sequence[str] = (), scheme: str = "http"
) -> Iterator[Cluster]:
    """Prepare members, which the caller starts, and end them."""
    # Addresses of its own keep a cluster's ports from being taken by another.
    net = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
    servers = []
    for number in range(1, count + 1):
        address, name = f"{net}.{number}", f"m{number}"
        ports = free_ports(address)
        servers.append(Server(name, directory / name, address, *ports, extra, scheme))
    cluster = Cluster(servers)
    try:
        yield cluster
    finally:
        cluster.end()


@contextlib.contextmanager
def running(
    directory: Path, count: int = 1, extra: Sequence[str] = ()
) -> Iterator[Cluster]:
    """Run members that trust everybody."""
    with prepared(directory, count, extra) as cluster:
        cluster.start()
        cluster.wait()
        yield cluster


def free_ports(address: str) -> tuple[int, int]:
    """Return two ports that nobody has now."""
    with socket.socket() as one, socket.socket() as two:
        one.bind((address, 0))
        two.bind((address, 0))
        return one.getsockname()[1], two.getsockname()[1]
