"""Life with Docker: compose, prune, restarts and crashes of either daemon."""

import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingUnixStreamServer

import pytest

from cnmdriver.lab.host import PLUGIN_SOCKET, Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import LabError
from tests.dockerd.tools import (
    Container,
    Place,
    Scene,
    accepts,
    api,
    checksum,
    eventually,
    left_of_pynet,
    published,
    told,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(120),
]

GRACE = 2
INTERVAL = 0.01
ENDS = [signal.SIGTERM, signal.SIGKILL]
QUICK = "--stop-signal=SIGKILL"
"""Process 1 of a container ignores SIGTERM, and Docker would wait for 10 s."""

COMPOSE = """
version: "3.5"
services:
  one:
    image: busybox
    container_name: life_one
    command: sleep 600
    stop_signal: SIGKILL
    networks: [own, shared]
  two:
    image: busybox
    container_name: life_two
    command: sleep 600
    stop_signal: SIGKILL
    networks:
      own: {ipv4_address: 10.77.0.9}
      default: {}
networks:
  default:
    driver: pynet
  own:
    driver: pynet
    ipam: {driver: pynet, config: [{subnet: 10.77.0.0/24}]}
  shared:
    external: true
"""


@pytest.fixture(scope="module")
def life(make_module_lab: Callable[..., Lab]) -> Host:
    """Return a host whose pynet is quick to forget."""
    lab = make_module_lab(pynet_args=(f"--grace={GRACE}", "--audit=1"))
    return lab.hosts[0]


@pytest.fixture
def scene(life: Host) -> Iterator[Scene]:
    """Return a scene with both daemons up; after it nothing of pynet may be left."""
    if not runs(life, "dockerd"):
        life.start_dockerd()
    if not runs(life, "pynet"):
        life.start_pynet()
    before = accepts(life)
    with Scene(life) as made:
        yield made
    assert eventually(lambda: not left_of_pynet(life)), left_of_pynet(life)
    assert accepts(life) == before
    assert told(life, "endpoints") == told(life, "pools") == []


def runs(host: Host, service: str) -> bool:
    """Tell whether a daemon runs."""
    try:
        return bool(host.service_pid(service))
    except LabError:
        return False


def ids(host: Host) -> list[str]:
    """Return the ids of the networks that pynet has."""
    return [network["id"] for network in told(host, "networks")]


def sound(host: Host) -> bool:
    """Tell whether the kernel is as planned, and pynet and Docker know the same."""
    networks = api(
        host, "GET", "/networks?filters=%7B%22driver%22%3A%5B%22pynet%22%5D%7D"
    )
    known = {
        e["EndpointID"]
        for network in networks
        for e in api(host, "GET", f"/networks/{network['Id']}")["Containers"].values()
    }
    ours = {e["id"] for e in told(host, "endpoints")}
    return known == ours and not told(host, "diff")["lines"]


def web(scene: Scene, network: str, *options: str, name: str) -> Container:
    """Start a container that answers on port 80 with its name."""
    scene.containers.append(name)
    words = ("run", "-d", "--name", name, f"--network={network}", QUICK, *options)
    server = ("busybox", "nc", "-ll", "-p", "80", "-e", "echo", name, "ok")
    scene.host.docker(*words, *server)
    made = Container(host=scene.host, name=name).look()
    assert eventually(lambda: made.tcp("127.0.0.1", 80))
    return made


def answers(place: Place, address: str, port: int) -> str:
    """Return the name of the server that answers, "" for none."""
    found = place.tcp(address, port, 1.0)
    return found.server if found else ""


# Streams that notice every loss.


class Stream(threading.Thread):
    """Does something every 10 ms until stopped; `lost` counts what did not succeed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self.done = 0
        self.lost = 0

    def stop(self) -> None:
        """Stop, and wait for what is under way."""
        self.ending.set()
        self.join()

    def run(self) -> None:
        while not self.ending.is_set():
            due = time.monotonic() + INTERVAL
            self.step(due)
            self.done += 1
            self.ending.wait(max(0.0, due - time.monotonic()))

    def step(self, due: float) -> None:
        """Do it once; may use the time until the next is due."""
        raise NotImplementedError


class Pings(Stream):
    """Pings an IPv4 address."""

    def __init__(self, place: Place, target: str) -> None:
        super().__init__()
        self.sock = place.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.sock.connect((target, 0))
        self.heard: set[int] = set()

    def stop(self) -> None:
        """Wait for late answers and count what is missing."""
        super().stop()
        end = time.monotonic() + 1.0
        while time.monotonic() < end and len(self.heard) < self.done:
            self.hear(end)
        self.sock.close()
        self.lost = self.done - len(self.heard)

    def step(self, due: float) -> None:
        number = struct.pack("!HH", os.getpid() & 0xFFFF, self.done)
        total = checksum(b"\x08\0\0\0" + number)
        self.sock.send(struct.pack("!BBH", 8, 0, total) + number)
        while time.monotonic() < due:
            self.hear(due)

    def hear(self, end: float) -> None:
        """Read one answer, if there is one before the end."""
        self.sock.settimeout(max(0.001, end - time.monotonic()))
        try:
            data = self.sock.recv(2048)
        except TimeoutError:
            return
        icmp = data[(data[0] & 0xF) * 4 :]
        if icmp[0] == 0:
            self.heard.add(struct.unpack("!H", icmp[6:8])[0])


class Connections(Stream):
    """Makes a new TCP connection each time."""

    def __init__(self, place: Place, address: str, port: int, name: str) -> None:
        super().__init__()
        self.target = (place, address, port)
        self.name_wanted = name

    def step(self, due: float) -> None:
        self.lost += answers(*self.target) != self.name_wanted


class Conversation(Stream):
    """Sends bytes through one TCP connection and wants them back."""

    def __init__(self, place: Place, address: str, port: int) -> None:
        super().__init__()
        self.sock = place.open(socket.AF_INET, socket.SOCK_STREAM)
        self.sock.settimeout(5.0)
        self.sock.connect((address, port))

    def stop(self) -> None:
        super().stop()
        self.sock.close()

    def step(self, due: float) -> None:
        try:
            self.sock.sendall(b"?")
            self.lost += self.sock.recv(10) != b"?"
        except OSError:
            self.lost += 1
            self.ending.set()


@contextmanager
def without_loss(*streams: Stream) -> Iterator[None]:
    """Run streams as long as the block lasts; none of them may lose anything."""
    for stream in streams:
        stream.start()
    try:
        yield
    finally:
        for stream in streams:
            stream.stop()
    found = [(type(s).__name__, s.done, s.lost) for s in streams]
    assert all(done > 50 and lost == 0 for _, done, lost in found), found


# Compose, prune, rm.


def test_compose_up_and_down_twice(scene: Scene) -> None:
    """
    docker-compose creates and removes its networks as often as one likes.

    1. A compose file with a default network, one with pynet's IPAM, an external one.
    2. Up: the services reach each other by name on their network, a static address is
       held. Down: all but the external network is gone. Twice.

    Result: both times the same.
    """
    host = scene.host
    scene.network("--subnet=10.78.0.0/24", name="shared")
    compose = ("docker-compose", "--project-name=life", "--file=-")
    before = ids(host)
    for _ in range(2):
        host.exec(*compose, "up", "-d", input=COMPOSE, timeout=40)
        try:
            one, two = (
                Container(host=host, name=f"life_{name}").look()
                for name in ("one", "two")
            )
            assert two.ip("life_own") == "10.77.0.9"
            assert one.pings_name("two")
            assert two.pings_name("one")
            assert one.ip("shared").startswith("10.78.0.")
            assert len(ids(host)) == 3
            assert sound(host)
        finally:
            host.exec(*compose, "down", input=COMPOSE, timeout=40)
        assert ids(host) == before
        assert told(host, "pools") == []


def test_network_prune_removes_unused_networks_only(scene: Scene) -> None:
    """`docker network prune` removes networks without containers, and all of them."""
    used, unused = scene.network(), scene.network("--ipam-driver=pynet")
    first, second = scene.run(used), scene.run(used)
    scene.host.docker("network", "prune", "--force")
    scene.networks.remove(unused)
    assert [n["name"] for n in told(scene.host, "networks")] == [used]
    assert first.pings(second.ip())
    assert sound(scene.host)


def test_rm_force_takes_back_what_a_running_container_had(scene: Scene) -> None:
    """After `docker rm -f` port, address and devices are free, and used again."""
    network = scene.network("--ipam-driver=pynet")
    for turn in range(3):
        made = web(scene, network, "-p", "8080:80", name=f"web{turn}")
        assert answers(scene.outside, "192.0.2.11", 8080) == made.name
        scene.remove(made)
        assert published(scene.host) == []
        assert told(scene.host, "endpoints") == []
    assert sound(scene.host)


def test_paused_container_answers_again(scene: Scene) -> None:
    """A paused container keeps its place, and its server answers when it goes on."""
    network = scene.network()
    made = web(scene, network, "-p", "8080:80", name="paused")
    scene.host.docker("pause", "paused")
    time.sleep(GRACE + 1.5)
    assert sound(scene.host)
    assert answers(scene.outside, "192.0.2.11", 8080) == ""
    scene.host.docker("unpause", "paused")
    assert answers(scene.outside, "192.0.2.11", 8080) == "paused"
    assert answers(scene.place, made.ip(), 80) == "paused"


def test_default_bridge_beside_it(scene: Scene) -> None:
    """A container on Docker's bridge and on a network of pynet's uses both."""
    network = scene.network()
    plain, mine = scene.run("bridge"), scene.run(network)
    both = scene.run("bridge")
    scene.host.docker("network", "connect", network, both.name)
    both.look()
    assert both.pings(plain.ip())
    assert both.pings(mine.ip())
    assert both.pings_name(mine.name)
    assert both.pings("192.0.2.1")
    assert not plain.pings(mine.ip())
    scene.host.docker("network", "disconnect", "bridge", both.name)
    assert both.pings(mine.ip())
    assert both.pings("192.0.2.1")


# Restarts of dockerd.


@pytest.mark.parametrize("ends", ENDS)
def test_restart_always_over_a_restart_of_dockerd(scene: Scene, ends: int) -> None:
    """
    Containers with `--restart always` are back when dockerd is, with port and address.

    1. A server with a published port and a client, on a network with pynet's IPAM.
    2. dockerd ends and starts again.

    Result: both run, by name and through the port; pynet has two endpoints and no
    address more than before.
    """
    host = scene.host
    network = scene.network("--ipam-driver=pynet")
    web(scene, network, "--restart=always", "-p", "8080:80", name="server")
    client = scene.run(network, "--restart=always", QUICK)
    before = [pool["taken"] for pool in told(host, "pools")]
    host.stop_dockerd(ends)
    host.start_dockerd()
    assert eventually(lambda: answers(scene.outside, "192.0.2.11", 8080), 10.0)
    assert eventually(lambda: client.look().path)
    assert client.pings_name("server")
    assert answers(client, Container(host=host, name="server").look().ip(), 80)
    assert eventually(lambda: sound(host), GRACE + 4)
    assert [pool["taken"] for pool in told(host, "pools")] == before


@pytest.mark.parametrize("ends", ENDS)
def test_live_restore_keeps_traffic_over_a_restart_of_dockerd(
    scene: Scene, ends: int
) -> None:
    """
    With --live-restore no packet is lost while dockerd is away and comes back.

    1. Two containers, one with a published port; pings and connections all the time.
    2. dockerd ends and starts again; nothing is replayed to the driver.
    3. The server is stopped, and started again.

    Result: nothing was lost; stopping takes the port back although dockerd has no
    record of it any more, and starting publishes it.
    """
    host = scene.host
    host.stop_dockerd()
    host.start_dockerd(["--live-restore"])
    network = scene.network("--ipam-driver=pynet")
    server = web(scene, network, "-p", "8080:80", name="live")
    client = scene.run(network)
    streams = (
        Pings(client, server.ip()),
        Connections(scene.outside, "192.0.2.11", 8080, "live"),
    )
    with without_loss(*streams):
        host.stop_dockerd(ends)
        host.start_dockerd(["--live-restore"])
        time.sleep(GRACE + 1.5)
    assert sound(host)
    host.docker("stop", server.name)
    assert published(host) == []
    host.docker("start", server.name)
    assert eventually(lambda: answers(scene.outside, "192.0.2.11", 8080) == "live")
    scene.close()
    host.stop_dockerd()
    host.start_dockerd()


def test_dockerd_killed_with_containers_that_do_not_restart(scene: Scene) -> None:
    """What Docker had on a network when it was killed is cleaned up as it starts."""
    host = scene.host
    network = scene.network("--ipam-driver=pynet")
    made = web(scene, network, "-p", "8080:80", name="once")
    host.kill_dockerd()
    assert told(host, "status")["endpoints"] == 1
    host.start_dockerd()
    assert eventually(lambda: sound(host), GRACE + 4)
    assert published(host) == []
    host.docker("start", made.name)
    assert eventually(lambda: answers(scene.outside, "192.0.2.11", 8080) == "once")


# Restarts of pynet.


def test_no_packet_is_lost_over_twenty_restarts(scene: Scene) -> None:
    """
    Traffic does not depend on the daemon.

    1. Pings every 10 ms from one container to another and to the outside, new
       connections from outside to a published port, and one conversation through it.
    2. pynet is stopped ten times and killed ten times, and started each time.

    Result: nothing was lost.
    """
    host = scene.host
    network = scene.network()
    server = web(scene, network, "-p", "8080:80", "-p", "8081:81", name="steady")
    host.docker("exec", "-d", server.name, "nc", "-ll", "-p", "81", "-e", "cat")
    client = scene.run(network)
    assert eventually(lambda: client.tcp(server.ip(), 81, 0.2) or True)
    streams = (
        Pings(client, server.ip()),
        Pings(client, "192.0.2.1"),
        Connections(scene.outside, "192.0.2.11", 8080, "steady"),
        Conversation(scene.outside, "192.0.2.11", 8081),
    )
    with without_loss(*streams):
        for turn in range(20):
            host.stop_pynet(ENDS[turn % 2])
            host.start_pynet()
    assert sound(host)


@pytest.mark.parametrize("ends", ENDS)
def test_restart_always_over_a_restart_of_pynet(scene: Scene, ends: int) -> None:
    """A container that Docker restarts after pynet came back is whole again."""
    host = scene.host
    network = scene.network("--ipam-driver=pynet")
    server = web(scene, network, "--restart=always", "-p", "8080:80", name="again")
    host.stop_pynet(ends)
    host.start_pynet()
    pid = api(host, "GET", f"/containers/{server.name}/json")["State"]["Pid"]
    host.exec("kill", "-KILL", str(pid))

    def restarted() -> bool:
        return api(host, "GET", f"/containers/{server.name}/json")["RestartCount"] > 0

    assert eventually(restarted)
    assert eventually(lambda: answers(scene.outside, "192.0.2.11", 8080) == "again")
    assert eventually(lambda: sound(host), GRACE + 4)


def test_killed_in_the_midst_of_parallel_runs(scene: Scene) -> None:
    """
    Whenever pynet is killed, it loses nothing and leaves nothing.

    1. Four clients run containers and remove every other one, all at once.
    2. Meanwhile pynet is killed four times, at any moment, and started again.

    Result: every container that Docker started is reached, no address is there twice,
    pynet and Docker know the same endpoints; when all is removed nothing is left.
    """
    host = scene.host
    network = scene.network("--ipam-driver=pynet")
    names = [[f"churn{worker}x{turn}" for turn in range(6)] for worker in range(4)]
    scene.containers += [name for row in names for name in row]

    def churn(row: list[str]) -> list[str]:
        kept = []
        for turn, name in enumerate(row):
            words = ("run", "-d", "--name", name, f"--network={network}", "-p", "80")
            done = host.docker(*words, QUICK, "busybox", "sleep", "600", check=False)
            if turn % 2:
                host.docker("rm", "-f", name)
            elif done.returncode == 0:
                kept.append(name)
        return kept

    chance = random.Random(2)
    with ThreadPoolExecutor(4) as pool:
        rows = [pool.submit(churn, row) for row in names]
        for _ in range(4):
            time.sleep(chance.uniform(0.2, 1.0))
            host.kill_pynet()
            host.start_pynet()
        kept = [name for row in rows for name in row.result()]
    containers = [Container(host=host, name=name).look() for name in kept]
    assert len(containers) >= 4
    assert len({c.ip() for c in containers}) == len(containers)
    gateway = api(host, "GET", f"/networks/{network}")["IPAM"]["Config"][0]["Gateway"]
    assert all(c.pings(gateway.partition("/")[0]) for c in containers)
    assert eventually(lambda: sound(host), GRACE + 4)


# Lost state.


class Refusing(BaseHTTPRequestHandler):
    """Answers each call with an error."""

    def do_POST(self) -> None:
        text = b'{"Err": "not now"}'
        self.send_response(500)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "docker"

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def deaf(host: Host) -> Iterator[None]:
    """
    Replace pynet by one that refuses all, as if it were away.

    Docker tries for 15 s for each call to a socket where nobody is, and goes on then as
    it does after an error.
    """
    host.kill_pynet()
    path = host.socket(PLUGIN_SOCKET)
    path.unlink(missing_ok=True)
    with ThreadingUnixStreamServer(str(path), Refusing) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink(missing_ok=True)
    host.start_pynet()


def test_what_was_removed_while_it_was_away_is_cleaned_up(scene: Scene) -> None:
    """
    Docker forgets a removal that the driver did not hear of; pynet finds out.

    1. Two networks, one of them with pynet's IPAM, and containers on both.
    2. While pynet is away, one container and the whole second network are removed.

    Result: when the grace is over pynet has what Docker has, and the rest works.
    """
    host = scene.host
    stays, goes = scene.network(), scene.network("--ipam-driver=pynet")
    first, second, third = scene.run(stays), scene.run(stays), scene.run(goes)
    removed = web(scene, goes, "-p", "8080:80", name="lost")
    with deaf(host):
        scene.remove(second, third, removed)
        scene.remove_network(goes)
    assert len(told(host, "endpoints")) == 4
    assert eventually(lambda: sound(host), GRACE + 6)
    assert [n["name"] for n in told(host, "networks")] == [stays]
    assert told(host, "pools") == published(host) == []
    assert first.pings(scene.run(stays).ip())


def test_another_state_directory_removes_nothing_in_use(scene: Scene) -> None:
    """
    A daemon that knows of nothing leaves alone what running containers use.

    1. Two containers, one with a published port; pings inside and to the outside and
       connections to the port all the time.
    2. pynet is started with another, empty state directory, and after a while with its
       own again.

    Result: nothing was lost, and all is as planned again.
    """
    host = scene.host
    network = scene.network("--ipam-driver=pynet")
    server = web(scene, network, "-p", "8080:80", name="kept")
    client = scene.run(network)
    streams = (
        Pings(client, server.ip()),
        Pings(client, "192.0.2.1"),
        Connections(scene.outside, "192.0.2.11", 8080, "kept"),
    )
    with without_loss(*streams):
        host.stop_pynet()
        host.start_pynet(["--state-dir=/var/lib/pynet/other"])
        time.sleep(GRACE + 2)
        host.stop_pynet()
        host.start_pynet()
    assert sound(host)


def test_a_lost_store_removes_nothing_in_use(scene: Scene) -> None:
    """
    A daemon whose store was deleted leaves alone what running containers use.

    1. As before, but the store is deleted and not the rest of the state.
    2. Docker removes containers and network.

    Result: nothing was lost until then, and nothing is left after it.
    """
    host = scene.host
    network = scene.network()
    server = web(scene, network, "-p", "8080:80", name="kept")
    client = scene.run(network)
    streams = (
        Pings(client, server.ip()),
        Pings(client, "192.0.2.1"),
        Connections(scene.outside, "192.0.2.11", 8080, "kept"),
    )
    with without_loss(*streams):
        host.stop_pynet()
        host.exec("sh", "-c", "rm /var/lib/pynet/store.db*")
        host.start_pynet()
        time.sleep(GRACE + 2)
