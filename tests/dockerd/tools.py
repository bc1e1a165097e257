"""
What the tests on a real dockerd are made of: containers, and programs of theirs.

A socket stays in the network namespace it was made in. So the servers "in" a container
and the clients "on" a machine are sockets of the test itself, made in a thread that
went there for a moment: nothing has to be installed or waited for, and a server tells
by what address it saw its client.
"""

import ctypes
import http.client
import json
import os
import re
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import count
from typing import Any, Self

from cnmdriver.cli.client import Client
from cnmdriver.lab.chaos.oracle import ACTIVE, has_lost_count
from cnmdriver.lab.host import DOCKER_SOCKET, Host
from cnmdriver.lab.machine import Machine, wait_until
from cnmdriver.lab.process import Completed, LabError
from cnmdriver.plan.ops import GROUP

CLONE_NEWNET = 0x40000000
SILENCE = 0.4
"""Seconds after which a client takes it that nobody will answer."""
PATIENCE = 5.0
"""Seconds a client waits for an answer that must come."""

LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = count(1)


# Sockets in any namespace.


def in_namespace(path: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Make a socket in the network namespace at a path."""
    made: list[socket.socket | OSError] = []

    def work() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if LIBC.setns(fd, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter {path}")
            finally:
                os.close(fd)
            made.append(socket.socket(family, kind, protocol))
        except OSError as error:
            made.append(error)

    # The thread ends where it went, and is gone.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def family_of(address: str) -> int:
    """Return the address family of an address in text."""
    six = ip_address(address.partition("%")[0]).version == 6
    return socket.AF_INET6 if six else socket.AF_INET


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Which server answered, and by what address it saw the client."""

    server: str
    client: str


class Place:
    """A network namespace to call from: a machine's, or a container's."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Make a socket here."""
        return in_namespace(self.path, family, kind, protocol)

    def tcp(self, address: str, port: int, timeout: float = PATIENCE) -> Answer | None:
        """Connect and return the server's answer, None if there is none."""
        with self.open(family_of(address), socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            try:
                client.connect((address, port))
                return read_answer(received(client))
            except OSError:
                return None

    def udp(self, address: str, port: int, timeout: float = PATIENCE) -> Answer | None:
        """Send a datagram and return the answer, None if there is none."""
        try:
            client = self.udp_client(address, port)
        except OSError:
            return None
        with client:
            return asked(client, timeout)

    def udp_client(self, address: str, port: int) -> socket.socket:
        """Return a socket that takes answers from this address and port alone."""
        client = self.open(family_of(address), socket.SOCK_DGRAM)
        try:
            client.connect((address, port))
        except OSError:
            client.close()
            raise
        return client

    def refused(self, targets: Sequence[tuple[str, int]], kind: str = "tcp") -> bool:
        """Tell whether no server at all answers; the clients call at once."""
        with ThreadPoolExecutor(len(targets)) as pool:
            call = getattr(self, kind)
            answers = pool.map(lambda target: call(*target, SILENCE), targets)
            return not any(list(answers))


def received(client: socket.socket) -> bytes:
    """Read a stream to its end."""
    data = b""
    while more := client.recv(4096):
        data += more
    return data


def asked(client: socket.socket, timeout: float = PATIENCE) -> Answer | None:
    """Send a datagram on a connected socket and return the answer."""
    client.settimeout(timeout)
    try:
        client.send(b"?")
        return read_answer(client.recv(4096))
    except OSError:
        return None


def read_answer(data: bytes) -> Answer | None:
    """Read what a `Server` wrote."""
    match data.decode(errors="replace").split():
        case [server, client]:
            return Answer(server=server, client=client)
    return None


class Server:
    """Answers every client with its own name and the client's address."""

    def __init__(self, place: Place, name: str, port: int, kind: str = "tcp") -> None:
        """Listen on a port of all addresses; `kind` is tcp or udp."""
        self.name = name
        self.kind = kind
        types = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
        self.sock = place.open(socket.AF_INET6, types[kind])
        self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind(("::", port))
        if kind == "tcp":
            self.sock.listen(64)
        self.heard: list[str] = []
        self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._wake[0].close()
        self._thread.join()
        self._wake[1].close()
        self.sock.close()

    def _serve(self) -> None:
        while True:
            ready = select.select([self.sock, self._wake[1]], [], [])[0]
            if self._wake[1] in ready:
                return
            with suppress(OSError):
                self._answer()

    def _answer(self) -> None:
        if self.kind == "udp":
            _, peer = self.sock.recvfrom(4096)
            self.sock.sendto(self._text(peer), peer)
            return
        client, peer = self.sock.accept()
        with client:
            client.sendall(self._text(peer))

    def _text(self, peer: tuple[str, int]) -> bytes:
        client = ip_address(peer[0].partition("%")[0])
        seen = str(getattr(client, "ipv4_mapped", None) or client)
        self.heard.append(seen)
        return f"{self.name} {seen}".encode()


# Docker.


class Docker(http.client.HTTPConnection):
    """The HTTP API of a lab host's dockerd, for what the command line cannot ask."""

    def __init__(self, host: Host) -> None:
        super().__init__("docker", timeout=30)
        self.path = str(host.socket(DOCKER_SOCKET))

    def connect(self) -> None:
        """Connect to the Unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def api(host: Host, method: str, path: str, body: object = None) -> Any:
    """Ask dockerd's API; return the answer, raise LabError for a refusal."""
    connection = Docker(host)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        data = response.read()
    finally:
        connection.close()
    if response.status >= 300:
        raise LabError(f"{method} {path}: {response.status} {data.decode()}")
    return json.loads(data) if data.strip() else None


@dataclass(slots=True, kw_only=True)
class Container(Place):
    """A container and its network namespace."""

    host: Host
    name: str
    path: str = ""
    state: dict[str, Any] = field(default_factory=dict)

    def look(self) -> Self:
        """Read from Docker what the container has now."""
        self.state = api(self.host, "GET", f"/containers/{self.name}/json")
        key = self.state["NetworkSettings"]["SandboxKey"]
        # The symbolic link /var/run would lead out of the host.
        self.path = str(self.host.socket(key.removeprefix("/var"))) if key else ""
        return self

    def attachment(self, network: str) -> dict[str, Any]:
        """Return what Docker shows of the container's place in a network."""
        found: dict[str, Any] = self.state["NetworkSettings"]["Networks"][network]
        return found

    def ip(self, network: str | None = None) -> str:
        """Return the IPv4 address in a network, or in the only one."""
        return str(self.attachment(network or self.networks[0])["IPAddress"])

    def ip6(self, network: str | None = None) -> str:
        """Return the IPv6 address in a network, or in the only one."""
        return str(self.attachment(network or self.networks[0])["GlobalIPv6Address"])

    @property
    def networks(self) -> list[str]:
        """Return the names of the networks the container is in."""
        return list(self.state["NetworkSettings"]["Networks"])

    def exec(self, *argv: str, check: bool = True) -> Completed:
        """Run a program of the image in the container."""
        return self.host.container_exec(self.name, *argv, check=check)

    def net(self, *argv: str, check: bool = True) -> Completed:
        """Run a program of the machine in the container's network namespace."""
        key = self.state["NetworkSettings"]["SandboxKey"]
        return self.host.exec("nsenter", f"--net={key}", *argv, check=check)

    def pings(self, target: str) -> bool:
        """Tell whether an address answers a ping; every second is tried once."""
        # The machine's ping would resolve names as the machine does.
        done = self.net("busybox", "ping", "-c1", "-W2", target, check=False)
        return done.returncode == 0

    def pings_name(self, name: str) -> bool:
        """Tell whether a name resolves in the container and its address answers."""
        done = self.exec("ping", "-c1", "-W2", name, check=False)
        return done.returncode == 0

    def default_routes(self, version: int = 4) -> list[str]:
        """Return the container's default routes."""
        shown = self.net("ip", f"-{version}", "route", "show", "default").stdout
        return [" ".join(line.split()) for line in shown.splitlines()]


class Scene:
    """Networks, containers and servers on one host; `close` removes all."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.stack = ExitStack()
        self.containers: list[str] = []
        self.networks: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def place(self) -> Place:
        """Return the host's own namespace."""
        return Place(self.host.netns)

    @property
    def outside(self) -> Place:
        """Return the namespace of another machine."""
        return Place(self.host.underlay.netns)

    def network(self, *options: str, driver: str = "pynet", name: str = "") -> str:
        """Create a network and return its name."""
        name = name or f"n{next(NUMBERS)}"
        self.networks.append(name)
        try:
            self.host.docker("network", "create", "-d", driver, *options, name)
        except LabError:
            self.networks.remove(name)
            raise
        return name

    def refused_network(self, *options: str, driver: str = "pynet") -> str:
        """Try to create a network that must be refused, and return why it was."""
        words = ("network", "create", "-d", driver, *options, f"n{next(NUMBERS)}")
        done = self.host.docker(*words, check=False)
        if done.returncode == 0:
            self.networks.append(words[-1])
        assert done.returncode != 0
        return done.stderr

    def run(self, network: str, *options: str, name: str = "") -> Container:
        """Start a container that only sleeps."""
        name = name or f"c{next(NUMBERS)}"
        self.containers.append(name)
        words = ("run", "-d", "--name", name, f"--network={network}", *options)
        self.host.docker(*words, "busybox", "sleep", "600")
        return Container(host=self.host, name=name).look()

    def refused_run(self, network: str, *options: str) -> str:
        """Try to start a container that must be refused, and return why it was."""
        name = f"c{next(NUMBERS)}"
        self.containers.append(name)
        words = ("run", "-d", "--name", name, f"--network={network}", *options)
        done = self.host.docker(*words, "busybox", "sleep", "600", check=False)
        assert done.returncode != 0
        return done.stderr

    def serve(self, container: Container, *ports: int, kind: str = "tcp") -> Container:
        """Let a container answer on some ports, with its name."""
        for port in ports:
            server = Server(container, container.name, port, kind)
            self.stack.callback(server.close)
        return container

    def remove(self, *containers: Container) -> None:
        """Remove containers now."""
        names = [container.name for container in containers]
        self.host.docker("rm", "-f", *names)
        for name in names:
            self.containers.remove(name)

    def remove_network(self, name: str) -> None:
        """Remove a network now."""
        remove_network(self.host, name)
        self.networks.remove(name)

    def close(self) -> None:
        """Remove containers, then networks; raises LabError for what stays."""
        self.stack.close()
        names, self.containers = self.containers, []
        if names:
            self.host.docker("rm", "-f", *names)
        networks, self.networks = self.networks, []
        for network in networks:
            remove_network(self.host, network)


def remove_network(host: Host, name: str) -> None:
    """Remove a network; Docker is started anew if it has lost count of its endpoints."""
    try:
        host.docker("network", "rm", name)
    except LabError as error:
        if ACTIVE not in str(error) or not has_lost_count(host, name):
            raise
        host.stop_dockerd()
        host.start_dockerd()
        host.docker("network", "rm", name)


ADMIN = "/run/pynet/admin.sock"


def told(host: Host, what: str) -> Any:
    """Return what a host's daemon tells its commands, without a process for each look."""
    return Client(str(host.socket(ADMIN))).get(what)


def inspected(host: Host, network: str) -> dict[str, Any]:
    """Return what pynet says of a network, once Docker has told it the name."""
    words = ("network", "inspect", network, "--json")
    assert eventually(lambda: host.pynet(*words, check=False).returncode == 0)
    shown: dict[str, Any] = json.loads(host.pynet(*words).stdout)
    return shown


def bridge_of(host: Host, network: str) -> str:
    """Return the device of a network of pynet's."""
    return str(inspected(host, network)["bridge"])


# What a host has of pynet's.


def accepts(host: Host, tool: str = "iptables") -> list[str]:
    """Return the rules of DOCKER-USER."""
    return host.exec(tool, "-S", "DOCKER-USER", check=False).stdout.splitlines()


def left_of_pynet(host: Host) -> list[str]:
    """List devices, tables and rules of pynet's that a host has."""
    shown = host.exec("ip", "-o", "link", "show", "group", str(GROUP), check=False)
    links = [line.split(":")[1].strip() for line in shown.stdout.splitlines()]
    tables = host.exec("nft", "list", "tables").stdout.splitlines()
    rules = [
        line
        for tool in ("iptables", "ip6tables")
        for line in host.exec(tool, "-S", check=False).stdout.splitlines()
        if "pynet" in line
    ]
    return [*links, *(t for t in tables if t.endswith(" pynet")), *rules]


def published(host: Host) -> list[str]:
    """Return every translation in the maps of pynet's table."""
    names = ("any4", "any6", "bound4", "bound6")
    texts = [
        host.exec("nft", "list", "map", "inet", "pynet", name, check=False).stdout
        for name in names
    ]
    return [
        " ".join(element.split())
        for text in texts
        for body in re.findall(r"elements = \{(.*?)\}", text, re.DOTALL)
        for element in body.split(",")
    ]


def devices(container: Container) -> dict[str, dict[str, Any]]:
    """Return the devices of a container by name, as `ip -j addr` shows them."""
    shown = json.loads(container.net("ip", "-j", "addr").stdout)
    return {device["ifname"]: device for device in shown}


@contextmanager
def program(machine: Machine, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program on a machine as long as the block lasts."""
    child = machine.popen(*argv)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def eventually(question: Callable[[], object], timeout: float = 5.0) -> bool:
    """Ask until the answer is yes, for some seconds at most."""
    return wait_until(lambda: bool(question()), timeout)


# Raw packets.


def checksum(data: bytes) -> int:
    """Compute the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp4(source: tuple[str, int], target: tuple[str, int], data: bytes) -> bytes:
    """Build an IPv4 datagram with any addresses; UDP needs no checksum there."""
    udp = struct.pack("!HHHH", source[1], target[1], 8 + len(data), 0) + data
    ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    summed = struct.pack("!H", checksum(head + ends))
    return head[:10] + summed + ends + udp


def udp6(source: tuple[str, int], target: tuple[str, int], data: bytes) -> bytes:
    """Build an IPv6 datagram with any addresses."""
    ends = b"".join(socket.inet_pton(socket.AF_INET6, a) for a, _ in (source, target))
    length = 8 + len(data)
    pseudo = ends + struct.pack("!IxxxB", length, 17)
    ports = struct.pack("!HHH", source[1], target[1], length)
    summed = struct.pack("!H", checksum(pseudo + ports + b"\0\0" + data))
    head = struct.pack("!IHBB", 0x60000000, length, 17, 64)
    return head + ends + ports + summed + data


def send_frame(place: Place, device: str, mac: str, packet: bytes) -> None:
    """Send an IP packet to a MAC, whatever its addresses are."""
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    with place.open(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        own = raw.getsockname()[4]
        target = bytes.fromhex(mac.replace(":", ""))
        raw.send(target + own + struct.pack("!H", kind) + packet)


def crc32c(data: bytes) -> int:
    """Compute the checksum of SCTP (RFC 9260, appendix A)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def sctp(source: int, target: int, kind: int, tag: int) -> bytes:
    """Build an SCTP packet with one INIT (1) or INIT ACK (2) chunk (RFC 9260, 3.3)."""
    body = struct.pack("!IIHHI", 7, 65536, 1, 1, 1)
    if kind == 2:
        body += struct.pack("!HHI", 7, 8, 1)  # The state cookie is mandatory.
    chunk = struct.pack("!BBH", kind, 0, 4 + len(body)) + body
    head = struct.pack("!HHI", source, target, tag)
    summed = struct.pack("<I", crc32c(head + bytes(4) + chunk))
    return head + summed + chunk
