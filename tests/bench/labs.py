"""The labs that rows share, and what they do in them: Docker's API, and played calls."""

import http.client
import json
import secrets
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

from cnmdriver.lab.host import DOCKER_SOCKET, PLUGIN_SOCKET, Host
from cnmdriver.lab.lab import Lab

NUMBERS = count(1)
PAUSE = "7200"
FAR_GRACE = "--grace=86400"
"""Endpoints that Docker knows nothing of are not given back while they are needed."""


class Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        """Describe it; the first request opens it."""
        super().__init__("docker", timeout=120)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Api:
    """JSON over a Unix socket; each thread has a connection of its own."""

    def __init__(self, path: Path) -> None:
        """Name the socket."""
        self.path = path
        self.threads = threading.local()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """Make a request and return the answer; raises RuntimeError for a refusal."""
        connection = getattr(self.threads, "connection", None)
        if connection is None:
            connection = self.threads.connection = Connection(self.path)
        data = None if body is None else json.dumps(body)
        header = {"Content-Type": "application/json"} if data else {}
        try:
            connection.request(method, path, data, header)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException):
            self.threads.connection = None
            raise
        if answer.status >= http.client.BAD_REQUEST:
            raise RuntimeError(f"{method} {path}: {answer.status} {text.decode()}")
        return json.loads(text) if text.strip() else None


class Docker(Api):
    """A dockerd, with what was made in it."""

    def __init__(self, host: Host) -> None:
        """Speak to a lab host's."""
        super().__init__(Path(host.socket(DOCKER_SOCKET)))
        self.host = host

    @contextmanager
    def network(
        self,
        driver: str,
        subnet: str,
        *,
        ipam: str = "",
        name: str = "",
        **options: str,
    ) -> Iterator[str]:
        """Have a network as long as the block lasts, and return its id."""
        body = network_body(driver, subnet, ipam=ipam, name=name, **options)
        made = self.ask("POST", "/networks/create", body)["Id"]
        with self.tidied(made):
            yield made

    @contextmanager
    def tidied(self, network: str) -> Iterator[None]:
        """Remove a network at the end; what is attached to it is disconnected."""
        try:
            yield
        finally:
            inside = self.ask("GET", f"/networks/{network}")["Containers"] or {}
            # Swarm's own end is not one to disconnect.
            for container in (one for one in inside if not one.startswith("lb-")):
                body = {"Container": container, "Force": True}
                self.ask("POST", f"/networks/{network}/disconnect", body)
            try:
                self.ask("DELETE", f"/networks/{network}")
            except RuntimeError:
                # Many at once make 20.10 lose count of its endpoints, until it restarts.
                self.host.stop_dockerd()
                self.host.start_dockerd()
                self.threads = threading.local()
                self.ask("DELETE", f"/networks/{network}")

    @contextmanager
    def container(self, network: str = "bridge", **config: object) -> Iterator[str]:
        """Have a container that sleeps as long as the block lasts; return its id."""
        made = self.create(network, **config)
        try:
            self.start(made)
            yield made
        finally:
            self.remove(made)

    @contextmanager
    def containers(self, many: int, network: str = "bridge") -> Iterator[list[str]]:
        """Have many containers."""
        made: list[str] = []
        with ThreadPoolExecutor(4) as pool:
            try:
                made += pool.map(lambda _: self.create(network), range(many))
                list(pool.map(self.start, made))
                yield made
            finally:
                list(pool.map(self.remove, made))

    def create(
        self, network: str, ports: Sequence[int] = (), ip: str = "", name: str = ""
    ) -> str:
        """Create a container and return its id."""
        place = {"IPAMConfig": {"IPv4Address": ip}} if ip else {}
        exposed = {f"{port}/tcp": [{"HostPort": str(port)}] for port in ports}
        body = {
            "Image": "busybox",
            "Cmd": ["sleep", PAUSE],
            "StopSignal": "SIGKILL",
            "ExposedPorts": {key: {} for key in exposed},
            "HostConfig": {"NetworkMode": network, "PortBindings": exposed},
            "NetworkingConfig": {"EndpointsConfig": {network: place} if place else {}},
        }
        path = f"/containers/create?name={name}" if name else "/containers/create"
        return str(self.ask("POST", path, body)["Id"])

    def start(self, container: str) -> None:
        """Start a container."""
        self.ask("POST", f"/containers/{container}/start")

    def remove(self, container: str) -> None:
        """Remove a container."""
        self.ask("DELETE", f"/containers/{container}?force=true")

    def connect(self, container: str, network: str, ip: str = "") -> None:
        """Connect a container to a network."""
        config = {"IPAMConfig": {"IPv4Address": ip}} if ip else {}
        body = {"Container": container, "EndpointConfig": config}
        self.ask("POST", f"/networks/{network}/connect", body)

    def disconnect(self, container: str, network: str) -> None:
        """Disconnect a container from a network."""
        body = {"Container": container}
        self.ask("POST", f"/networks/{network}/disconnect", body)

    def netns(self, container: str) -> str:
        """Return the path of a container's network namespace on its host."""
        state = self.ask("GET", f"/containers/{container}/json")
        return str(state["NetworkSettings"]["SandboxKey"])

    def address(self, container: str, network: str) -> str:
        """Return a container's address in a network, by the network's id."""
        state = self.ask("GET", f"/containers/{container}/json")
        places = state["NetworkSettings"]["Networks"].values()
        return str(next(p["IPAddress"] for p in places if p["NetworkID"] == network))


def network_body(
    driver: str, subnet: str, *, ipam: str = "", name: str = "", **options: str
) -> dict[str, Any]:
    """Return what a network is created with; options are pynet's."""
    body: dict[str, Any] = {
        "Name": name or f"net{next(NUMBERS)}",
        "Driver": driver,
        "IPAM": {"Driver": ipam or "default", "Config": [{"Subnet": subnet}]},
        "Options": {f"pynet.{key}": value for key, value in options.items()},
    }
    return body | ({"Attachable": True} if driver == "overlay" else {})


def together(work: Callable[[str], object], things: Sequence[str]) -> None:
    """Do something for many at once."""
    with ThreadPoolExecutor(len(things)) as pool:
        list(pool.map(work, things))


class Played:
    """Docker's calls for endpoints that have no container: many, and soon made."""

    def __init__(self, host: Host) -> None:
        """Speak to a lab host's pynet."""
        self.api = Api(Path(host.socket(PLUGIN_SOCKET)))

    def call(self, method: str, **content: object) -> Any:
        """Make a call."""
        return self.api.ask("POST", f"/{method}", content)

    def join(self, network: str, pool: str) -> str:
        """Make an endpoint that has joined a sandbox, and return its id."""
        endpoint = secrets.token_hex(32)
        face = self.call("IpamDriver.RequestAddress", PoolID=pool, Address="")
        self.call(
            "NetworkDriver.CreateEndpoint",
            NetworkID=network,
            EndpointID=endpoint,
            Interface={"Address": face["Address"], "AddressIPv6": "", "MacAddress": ""},
            Options={},
        )
        self.call(
            "NetworkDriver.Join",
            NetworkID=network,
            EndpointID=endpoint,
            SandboxKey=f"/run/docker/netns/{endpoint[:12]}",
            Options={},
        )
        return endpoint

    def leave(self, network: str, endpoint: str) -> None:
        """Remove an endpoint."""
        for method in ("NetworkDriver.Leave", "NetworkDriver.DeleteEndpoint"):
            self.call(method, NetworkID=network, EndpointID=endpoint)


class Context:
    """Labs, made when a row needs them, and gone at the end."""

    def __init__(self, *, dockerd: str, rounds: int, quick: bool) -> None:
        """Take the dockerd to measure, and how often."""
        self.dockerd = dockerd
        self.rounds = rounds
        self.quick = quick
        self.stack = ExitStack()
        self.labs: dict[str, Lab] = {}
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def docker_version(self) -> str:
        """Return what the dockerd says of itself."""
        done = subprocess.run(
            [self.dockerd, "--version"], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def lab(self, name: str, hosts: int = 1, **options: object) -> Lab:
        """Return the lab of a name, as it is."""
        if name not in self.labs:
            place = self.directory / f"{name}{next(NUMBERS)}"
            made = Lab.create(place, hosts, dockerd=self.dockerd, **options)  # type: ignore[arg-type]
            self.labs[name] = self.stack.enter_context(made)
        return self.labs[name]

    def alone(self) -> Docker:
        """Return the dockerd of a host that is alone."""
        return Docker(self.lab("alone").hosts[0])

    def cluster(self) -> list[Docker]:
        """Return the dockerds of two hosts on one etcd, that are a swarm as well."""
        fresh = "cluster" not in self.labs
        dockers = [Docker(h) for h in self.lab("cluster", 2, etcd=1).hosts]
        if fresh:
            swarm(dockers)
        return dockers

    def start_over(self) -> None:
        """Give up all labs: a row left them in some state."""
        self.labs.clear()
        self.stack.close()
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))


def swarm(dockers: Sequence[Docker]) -> None:
    """Make a swarm of the hosts, for its overlay networks."""
    first, *others = dockers
    address = str(first.host.address4)
    init = {"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": address}
    first.ask("POST", "/swarm/init", init)
    token = first.ask("GET", "/swarm")["JoinTokens"]["Worker"]
    for other in others:
        joining = {
            "ListenAddr": "0.0.0.0:2377",
            "AdvertiseAddr": str(other.host.address4),
            "RemoteAddrs": [f"{address}:2377"],
            "JoinToken": token,
        }
        other.ask("POST", "/swarm/join", joining)
