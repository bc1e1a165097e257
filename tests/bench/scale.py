"""What does not depend on how much there is, and what the daemon itself costs."""

import base64
import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from ipaddress import IPv4Interface, ip_address, ip_network
from typing import Any

from cnmdriver.lab.host import Host as LabHost
from cnmdriver.lab.machine import wait_until
from cnmdriver.lab.process import LabError
from cnmdriver.model import Alive, Endpoint, Host, Member
from cnmdriver.plan import devices
from cnmdriver.store import records
from tests.bench.calls import resident
from tests.bench.labs import FAR_GRACE, Context, Docker, Played, network_body
from tests.bench.measure import Line, row
from tests.dockerd.tools import Place

PREFIX = "/pynet/v1/"
TOGETHER = 60
"""Records in one transaction of etcd; it takes 128."""
NEIGHBOURS, NEW_NEIGHBOUR, DOWN = 0x4, 28, 8.0


class Etcd:
    """A lab's etcd, by its JSON gateway: what other hosts would have written."""

    def __init__(self, host: LabHost) -> None:
        """Go there from a host."""
        address, _, port = host.software.endpoints[0].rpartition(":")
        self.connection = HTTPConnection(address, int(port), timeout=30)
        self.connection.sock = host.tcp_socket()
        self.connection.sock.connect((address, int(port)))

    def put(self, found: Iterable[tuple[str, object]]) -> None:
        """Write records."""
        left = list(found)
        while left:
            some, left = left[:TOGETHER], left[TOGETHER:]
            puts = [
                {
                    "request_put": {
                        "key": coded((PREFIX + key).encode()),
                        "value": coded(records.encode(record)),
                    }
                }
                for key, record in some
            ]
            self.connection.request("POST", "/v3/kv/txn", json.dumps({"success": puts}))
            answer = self.connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"etcd: {answer.status} {text.decode()}")


def coded(data: bytes) -> str:
    """Word bytes as the gateway does."""
    return base64.b64encode(data).decode()


def far_host() -> Iterator[tuple[str, object]]:
    """Yield the records of another host."""
    far = Host(id="far", name="far", version="bench", vtep=ip_address("192.0.2.99"))
    yield records.host("far"), far
    yield records.alive("far"), Alive(instance="i", boot="b")


def far_endpoints(network: str, pool: str, many: int) -> Iterator[tuple[str, object]]:
    """Yield records of endpoints that another host has on a network."""
    net = ip_network(pool)
    yield (
        records.member(network, "far"),
        Member(network=network, host="far", docker_id="f"),
    )
    for number in range(many):
        face = IPv4Interface((net[-number - 3], net.prefixlen))
        one = Endpoint(
            network=network,
            id=f"far{network[:8]}{number}",
            host="far",
            boot="b",
            mac=devices.mac(face.ip),
            ipv4=face,
        )
        yield records.endpoint(network, one.id), one


def pynet_id(docker: Docker, docker_id: str) -> str:
    """Return what pynet calls a network of Docker's."""
    shown = docker.host.exec("etcdctl", "get", "--prefix", f"{PREFIX}members/").stdout
    for line in shown.splitlines():
        if docker_id in line:
            record: dict[str, Any] = json.loads(line)
            return str(record["record"]["network"])
    raise RuntimeError(f"etcd knows no network {docker_id[:12]}")


@contextmanager
def crowded(context: Context, hosts: int = 1) -> Iterator[list[Docker]]:
    """Have a lab of its own, whose daemons do not miss Docker's word of endpoints."""
    lab = context.lab(f"crowd{hosts}", hosts, etcd=1, pynet_args=(FAR_GRACE,))
    yield [Docker(host) for host in lab.hosts]


FEW, HERE = "one on another host", "there"
POOL, OTHER = "10.64.0.0/16", "10.66.0.0/16"


@row(quick=False)
def crowd(context: Context) -> list[Line]:
    """
    Measure connect beside many endpoints, the daemon's memory, and its recovery.

    The endpoints are played: a thousand containers would measure the machine. Connects
    are in turns with those on another host, which has one endpoint.
    """
    some, many = (
        Line(name=f"connect beside {beside}", against=FEW, target="≤ 1.1")
        for beside in ("100", "900, and 10,000 on others")
    )
    memory = Line(name="daemon's memory", unit="MB", target="≤ 75; + 20; + 40")
    back = Line(name="recovery", unit="s", target="intact ≤ 1.5, empty ≤ 15")
    with crowded(context, 2) as (docker, quiet):
        memory.add("etcd, idle", resident(docker) / 1024)
        with (
            docker.network("pynet", POOL, ipam="pynet", gateway="pynet") as network,
            quiet.network("pynet", OTHER, ipam="pynet", gateway="pynet") as empty,
        ):
            guests = Crowd(docker, network)
            Played(quiet.host).join(empty, f"pynet-local/{OTHER}")
            with docker.container() as guest, quiet.container() as lonely:
                places = {FEW: (quiet, lonely, empty), HERE: (docker, guest, network)}
                guests.grow(100)
                connects(places, some, context)
                guests.grow(500)
                memory.add("500 local", resident(docker) / 1024)
                other = far_away(docker, 10_000)
                memory.add("500 local, 10,000 remote", resident(docker) / 1024)
                for column in ("intact", "empty"):
                    recover(docker, back, column)
                if not back.note:
                    guests.grow(900)
                    connects(places, many, context)
            docker.ask("DELETE", f"/networks/{other}")
    context.start_over()
    return [some, many, memory, back]


class Crowd:
    """Played endpoints on a network."""

    def __init__(self, docker: Docker, network: str) -> None:
        """Begin with none."""
        self.docker = docker
        self.network = network
        self.there = 0

    def grow(self, size: int) -> None:
        """Have so many."""
        played = Played(self.docker.host)
        for _ in range(size - self.there):
            played.join(self.network, f"pynet-local/{POOL}")
        self.there = size


def far_away(docker: Docker, many: int) -> str:
    """Have endpoints of another host on another network; return Docker's id of that."""
    etcd = Etcd(docker.host)
    etcd.put(far_host())
    body = network_body("pynet", "10.65.0.0/16", ipam="pynet")
    other = str(docker.ask("POST", "/networks/create", body)["Id"])
    # One of this host's own, so that it has to know the others.
    Played(docker.host).join(other, "pynet-local/10.65.0.0/16")
    etcd.put(far_endpoints(pynet_id(docker, other), "10.65.0.0/16", many))
    wait_until(lambda: endpoints_known(docker) > many, 60)
    return other


def endpoints_known(docker: Docker) -> int:
    """Count the endpoints of all hosts that the daemon knows."""
    shown = json.loads(docker.host.pynet("host", "ls", "--json").stdout)
    return sum(int(host.get("endpoints", 0)) for host in shown)


def connects(
    places: dict[str, tuple[Docker, str, str]], line: Line, context: Context
) -> None:
    """Measure connecting a container to a network of a host, in turns."""
    # What those that came leave to compare is no part of the next one's time.
    time.sleep(15)
    for turn in range(-1, context.rounds):
        for column, (docker, guest, network) in places.items():
            with line.timed(column):
                docker.connect(guest, network)
            docker.disconnect(guest, network)
            time.sleep(0.1)
        if turn < 0:
            line.columns.clear()


def recover(docker: Docker, line: Line, column: str) -> None:
    """Measure a start of the daemon: until it serves, having repaired all."""
    host = docker.host
    for _ in range(3):
        host.stop_pynet()
        if column == "empty":
            host.exec("ip", "netns", "del", "pynet")
            host.exec("nft", "flush", "ruleset")
        begin = time.perf_counter()
        try:
            host.start_pynet()
        except LabError as error:
            line.note = f"{column}: {str(error).partition(';')[0]}"
            return
        line.add(column, time.perf_counter() - begin)


@row()
def memory_idle(context: Context) -> list[Line]:
    """Measure the daemon's memory where nothing happens."""
    line = Line(
        name="daemon's memory, idle", unit="MB", target="≤ 60 alone, 75 with etcd"
    )
    line.add("embedded store", resident(context.alone()) / 1024)
    line.add("etcd", resident(context.cluster()[0]) / 1024)
    return [line]


class Ear:
    """Hears of forwarding entries in a host's overlays."""

    def __init__(self, host: LabHost) -> None:
        """Listen in the namespace of that host's pynet."""
        place = Place(str(host.socket("/run/netns/pynet")))
        self.sock = place.open(socket.AF_NETLINK, socket.SOCK_RAW)
        self.sock.bind((0, NEIGHBOURS))
        self.sock.settimeout(DOWN)

    def wait(self, mac: str) -> float:
        """Return when an entry for a MAC was made."""
        wanted = bytes.fromhex(mac.replace(":", ""))
        while True:
            data = self.sock.recv(65_536)
            if int.from_bytes(data[4:6], "little") == NEW_NEIGHBOUR and wanted in data:
                return time.perf_counter()


@row(quick=False)
def news_of_three(context: Context) -> list[Line]:
    """Measure a change on one host until the kernels of two others have it."""
    return [news(context, "p50 ≤ 10 ms, p99 ≤ 50 ms")]


@row(quick=False)
def news_of_fifty(context: Context) -> list[Line]:
    """Measure the same among fifty hosts, of which all but three are played."""
    return [news(context, "p99 ≤ 250 ms", more=47)]


def news(context: Context, target: str, more: int = 0) -> Line:
    """Measure how long a change takes from one host to the kernels of two others."""
    line = Line(name=f"change on A until B has it, {3 + more} hosts", target=target)
    lab = context.lab(f"news{more}", 3, etcd=3, pynet_args=(FAR_GRACE,))
    dockers = [Docker(host) for host in lab.hosts]
    pool = f"pynet-local/{POOL}"
    body = network_body("pynet", POOL, ipam="pynet", gateway="pynet")
    networks = [d.ask("POST", "/networks/create", body)["Id"] for d in dockers]
    played = [Played(docker.host) for docker in dockers]
    for one, network in zip(played, networks, strict=True):
        one.join(network, pool)
    ears = [Ear(docker.host) for docker in dockers[1:]]
    with beside(dockers[2], more, networks[2]):
        for number in range(10 if context.quick else 200):
            address = str(ip_network(POOL)[1000 + number])
            mac = devices.mac(ip_address(address))
            face = played[0].call(
                "IpamDriver.RequestAddress", PoolID=pool, Address=address
            )
            given = {"Address": face["Address"], "AddressIPv6": "", "MacAddress": ""}
            begin = time.perf_counter()
            played[0].call(
                "NetworkDriver.CreateEndpoint",
                NetworkID=networks[0],
                EndpointID=f"{number:064x}",
                Interface=given,
                Options={},
            )
            for ear in ears:
                line.add("pynet", (ear.wait(mac) - begin) * 1000)
    samples = sorted(line.columns["pynet"])
    line.note = f"p99 {samples[int(len(samples) * 0.99)]:.1f} ms"
    context.start_over()
    return line


@contextmanager
def beside(docker: Docker, many: int, docker_id: str) -> Iterator[None]:
    """Have so many hosts more on a network, played by a program on a host."""
    if not many:
        yield
        return
    host = docker.host
    program = host.popen(
        *(sys.executable, "-m", "tests.bench.hosts"),
        *(",".join(host.software.endpoints), str(many)),
        *(pynet_id(docker, docker_id), POOL),
    )
    try:
        assert program.stdout is not None
        said = []
        for text in program.stdout:
            if text.strip() == "ready":
                break
            said.append(text)
        else:
            raise RuntimeError(f"the other hosts did not start: {''.join(said)}")
        # They take note of each other.
        time.sleep(5)
        yield
    finally:
        program.kill()
        program.wait()
