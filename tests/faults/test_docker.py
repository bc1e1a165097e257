"""
What Docker does to overlay networks when it, or the daemon, is away at the wrong time.

The same for bridge networks is in tests/dockerd/test_life.py. The oracle: Docker and
pynet know the same, kernel and plans agree on every host, hosts reach each other's
containers, and when all is removed nothing is left anywhere.
"""

import http.client
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest

from cnmdriver.lab.host import PLUGIN_SOCKET, Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import LabError
from tests.dockerd.cluster import Cluster, left
from tests.dockerd.test_life import QUICK, deaf, published, runs, sound
from tests.dockerd.tools import Container, Scene, api, eventually, told
from tests.faults.streams import Traffic

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

GRACE = 2
SETTLED = 30.0
"""Seconds for graces, audits and a busy machine."""
PORT = 7
ENDS = [signal.SIGTERM, signal.SIGKILL]
ALWAYS = ("--restart=always", QUICK)
REAL_SOCKET = "/run/pynet/plugin/pynet.sock"


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab]) -> Lab:
    """Return two hosts on one etcd, whose pynet is quick to forget."""
    args = (f"--grace={GRACE}", "--audit=1")
    return make_module_lab(2, etcd=1, pynet_args=args)


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the hosts with all daemons up; after the test nothing is left."""
    for member in lab.members:
        if not member.service("etcd"):
            member.start_etcd()
            member.wait_healthy()
    for host in lab.hosts:
        for name in ("pynet", "dockerd"):
            if not runs(host, name):
                host.start(name)
    with Cluster(lab) as made:
        yield made
    assert eventually(lambda: not left(made), SETTLED), left(made)


def is_well(cluster: Cluster) -> bool:
    """Tell whether Docker, pynet and the kernel agree on every host."""
    return all(sound(host) for host in cluster.lab.hosts)


def well(cluster: Cluster) -> None:
    """Wait until all agree."""
    agreed = eventually(lambda: is_well(cluster), SETTLED)
    assert agreed, [told(host, "diff") for host in cluster.lab.hosts]


def taken(host: Host) -> list[object]:
    """Return the addresses that are taken, as a host sees it."""
    return [pool["taken"] for pool in told(host, "pools")]


def is_free(host: Host, *wanted: str) -> bool:
    """Tell whether nobody has any of some addresses, as a host sees it."""
    pools = told(host, "pools")
    held = {one["address"] for pool in pools for one in pool["addresses"]}
    return not held & {*wanted}


def is_back(container: Container) -> bool:
    """Tell whether a container runs, and look at what it has now."""
    with suppress(LabError, OSError, http.client.HTTPException):
        return bool(container.look().path and container.state["State"]["Running"])
    return False


def reach(one: Container, other: Container, network: str) -> None:
    """Check that two containers reach each other, in both families."""
    assert eventually(lambda: one.pings(other.ip(network)), 10.0)
    assert one.pings(other.ip6(network))
    assert other.pings(one.ip(network))


def leads_to(host: Host, container: Container, network: str) -> bool:
    """Tell whether a host's tunnels have an entry for a container."""
    mac = container.attachment(network)["MacAddress"]
    shown = host.exec("ip", "netns", "exec", "pynet", "bridge", "fdb", check=False)
    return any(mac in line and "dst" in line for line in shown.stdout.splitlines())


# dockerd.


@pytest.mark.parametrize("ends", ENDS)
def test_dockerd_without_live_restore(cluster: Cluster, ends: int) -> None:
    """
    Containers with `--restart always` are back on their overlay when dockerd is.

    1. A container on each of two hosts; the first host's dockerd ends and starts.

    Result: they reach each other, and there is one endpoint and one address for each.
    """
    name = cluster.network()
    one, other = cluster.run(name, *ALWAYS)
    before = taken(other.host)
    one.host.stop_dockerd(ends)
    one.host.start_dockerd()
    assert eventually(lambda: is_back(one), 15.0)
    reach(one, other, name)
    well(cluster)
    assert taken(other.host) == before


@pytest.mark.parametrize("ends", ENDS)
def test_dockerd_with_live_restore(cluster: Cluster, ends: int) -> None:
    """
    With live-restore traffic across hosts goes on, and stop and start work after it.

    1. A container with a published port and one on another host; pings between them and
       a stream, in both families, and a stream to the port.
    2. The first host's dockerd ends and starts again; audits pass.
    3. The container stops and starts again.

    Result: nothing was lost; the port is free when it stopped, and there again.
    """
    name = cluster.network("-o", "pynet.gateway=pynet")
    near, far = cluster.scenes
    host = near.host
    host.stop_dockerd()
    host.start_dockerd(["--live-restore"])
    one, other = near.run(name, "-p", "8070:7", QUICK), far.run(name)
    with Traffic() as traffic:
        traffic.serve(one, PORT)
        for address in (one.ip(name), one.ip6(name)):
            traffic.ping(other, address, f"ping {address}")
            traffic.stream(other, address, PORT, f"stream {address}")
        traffic.stream(near.outside, str(host.address4), 8070, "published")
        with traffic.unharmed():
            host.stop_dockerd(ends)
            host.start_dockerd(["--live-restore"])
            time.sleep(GRACE + 1.5)
    well(cluster)
    host.docker("stop", one.name)
    # At once: what is left would be taken by an audit later.
    assert published(host) == []
    assert eventually(lambda: not leads_to(other.host, one, name))
    host.docker("start", one.name)
    reach(one.look(), other, name)
    assert published(host)
    near.close()
    host.stop_dockerd()
    host.start_dockerd()


def test_dockerd_returns_while_etcd_is_away(cluster: Cluster) -> None:
    """
    Containers with `--restart always` come back without the store.

    1. A container on each of two hosts; etcd is killed, then the first host's dockerd,
       which starts again.
    2. etcd comes back.

    Result: the container is back and reaches the other while etcd is away; after it all
    agree, and nobody has an address that is another's.
    """
    name = cluster.network()
    one, other = cluster.run(name, *ALWAYS)
    (member,) = cluster.lab.members
    member.kill_etcd()
    try:
        one.host.kill_dockerd()
        one.host.start_dockerd()
        assert eventually(lambda: is_back(one), 30.0)
        if one.ip(name) == other.ip(name):
            raise AssertionError(f"both have {one.ip(name)}")
        second = cluster.scenes[0].run(name)
        assert second.pings(one.ip(name))
    finally:
        member.start_etcd()
        member.wait_healthy()
    well(cluster)
    reach(one, other, name)
    reach(second, other, name)
    addresses = [c.ip(name) for c in (one, second, other)]
    assert len(set(addresses)) == 3


# The daemon.


def test_removed_while_the_daemon_was_away(cluster: Cluster) -> None:
    """
    What Docker removed without a word is given back to all hosts.

    1. Two containers on one host and one on another.
    2. While the first host's daemon is away, one container is removed by force.

    Result: the other host's entries for it go, its address is free for the other host,
    and the rest works.
    """
    name = cluster.network()
    near, far = cluster.scenes
    stays, goes, other = near.run(name), near.run(name), far.run(name)
    four, six = goes.ip(name), goes.ip6(name)
    assert eventually(lambda: leads_to(far.host, goes, name))
    with deaf(near.host):
        near.remove(goes)
    assert eventually(lambda: not leads_to(far.host, goes, name), SETTLED)
    well(cluster)
    assert eventually(lambda: is_free(far.host, four, six), SETTLED)
    heir = far.run(name, "--ip", four, "--ip6", six)
    reach(stays, heir, name)
    reach(stays, other, name)


def test_a_whole_network_removed_while_the_daemon_was_away(cluster: Cluster) -> None:
    """
    A host whose network was removed without a word has no part in it any more.

    1. An overlay on two hosts, a container on each; while the first host's daemon is
       away, its container and its network are removed.
    2. The first host creates the network again.

    Result: the first host is no member until then, the other keeps its container, and
    after it both reach each other.
    """
    name = cluster.network()
    near, far = cluster.scenes
    one, other = cluster.run(name)
    subnets = api(far.host, "GET", f"/networks/{name}")["IPAM"]["Config"]
    with deaf(near.host):
        near.remove(one)
        near.remove_network(name)
    assert eventually(lambda: not told(near.host, "networks"), SETTLED)
    assert eventually(lambda: not leads_to(far.host, one, name), SETTLED)
    well(cluster)
    options = [f"--subnet={subnet['Subnet']}" for subnet in subnets]
    cluster.join(0, name, "--ipv6", *options)
    reach(near.run(name), other, name)


def test_removed_while_nobody_was_there(cluster: Cluster) -> None:
    """
    The same when Docker finds no socket, and tries each call for long.

    1. A container; the daemon is killed and its socket is gone; the container is removed
       by force, which Docker does after it has tried.

    Result: when the daemon is back nothing of the container is left.
    """
    name = cluster.network()
    near = cluster.scenes[0]
    stays, goes = near.run(name), near.run(name)
    near.host.kill_pynet()
    near.host.socket(PLUGIN_SOCKET).unlink(missing_ok=True)
    try:
        near.containers.remove(goes.name)
        near.host.docker("rm", "-f", goes.name, timeout=150)
    finally:
        near.host.start_pynet()
    well(cluster)
    assert len(told(near.host, "endpoints")) == 1
    assert eventually(lambda: is_free(near.host, goes.ip(name)), SETTLED)
    reach(near.run(name, "--ip", goes.ip(name)), stays, name)


class Between(BaseHTTPRequestHandler):
    """
    Hands Docker's calls on to pynet.

    Before the call `fatal` pynet is killed, so that it fails; `silent` is answered as
    if all was well, and pynet does not hear of it.
    """

    host: Host
    fatal: str
    silent: str
    came: threading.Event

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if self.path == f"/NetworkDriver.{self.silent}":
            self.came.set()
            self._answer(200, b"{}")
            return
        if self.path == f"/NetworkDriver.{self.fatal}" and not self.came.is_set():
            self.host.kill_pynet()
            self.came.set()
        try:
            self._answer(*self._asked(body))
        except (OSError, http.client.HTTPException):
            self._answer(500, b'{"Err": "nobody is there"}')

    def _asked(self, body: bytes) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("pynet", timeout=15)) as real:
            real.sock = socket.socket(socket.AF_UNIX)
            real.sock.connect(str(self.host.socket(REAL_SOCKET)))
            real.request("POST", self.path, body)
            response = real.getresponse()
            return response.status, response.read()

    def _answer(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "docker"

    def log_message(self, *args: object) -> None:
        pass


def is_listening(host: Host) -> bool:
    """Tell whether pynet listens on its own socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(host.socket(REAL_SOCKET))) == 0


@contextmanager
def between(
    host: Host, *, fatal: str = "", silent: str = ""
) -> Iterator[threading.Event]:
    """Stand between Docker and pynet; after it pynet starts anew, without."""
    came = threading.Event()
    names = {"host": host, "fatal": fatal, "silent": silent, "came": came}
    host.stop_pynet()
    path: Path = host.socket(PLUGIN_SOCKET)
    path.unlink(missing_ok=True)
    with ThreadingUnixStreamServer(str(path), type("At", (Between,), names)) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            host.start_pynet([f"--socket={REAL_SOCKET}"])
            assert eventually(lambda: is_listening(host), SETTLED)
            yield came
        finally:
            server.shutdown()
            thread.join()
            path.unlink(missing_ok=True)
            if runs(host, "pynet"):
                host.kill_pynet()
            host.start_pynet()


@pytest.mark.parametrize("call", ["Leave", "DeleteEndpoint"])
def test_a_call_that_never_comes(cluster: Cluster, call: str) -> None:
    """
    An endpoint whose Leave or DeleteEndpoint never came goes all the same.

    1. A container; the daemon dies just as Docker makes the call, and Docker forgets.

    Result: its endpoint, its address and the other host's entries go.
    """
    name = cluster.network()
    near, far = cluster.scenes
    goes, other = near.run(name), far.run(name)
    with between(near.host, fatal=call) as came:
        near.remove(goes)
        assert came.is_set()
    well(cluster)
    assert told(near.host, "endpoints") == []
    assert eventually(lambda: not leads_to(far.host, goes, name), SETTLED)
    assert eventually(lambda: is_free(far.host, goes.ip(name)), SETTLED)
    heir = far.run(name, "--ip", goes.ip(name))
    assert other.pings(heir.ip(name))


def test_a_leave_without_revoke(cluster: Cluster) -> None:
    """
    The ports of a container go with its Leave, if Docker does not revoke them before.

    After live-restore newer Dockers leave the Revoke out; here it is kept from pynet.

    1. A container with a published port stops, and starts again.

    Result: the port is free when it stopped, and there again.
    """
    name = cluster.network("-o", "pynet.gateway=pynet")
    scene = cluster.scenes[0]
    with between(scene.host, silent="RevokeExternalConnectivity") as came:
        one = scene.run(name, "-p", "8070:7", QUICK)
        assert published(scene.host)
        scene.host.docker("stop", one.name)
        assert came.is_set()
        # At once: what is left would be taken by an audit later.
        assert published(scene.host) == []
        scene.host.docker("start", one.name)
        assert published(scene.host)
    well(cluster)


def test_a_network_whose_delete_never_comes(cluster: Cluster) -> None:
    """A network of which Docker could not tell that it goes, goes from the store too."""
    name = cluster.network(hosts=[1])
    scene = cluster.scenes[1]
    with between(scene.host, fatal="DeleteNetwork") as came:
        scene.remove_network(name)
        assert came.is_set()
    assert eventually(lambda: not left(cluster), SETTLED), left(cluster)


# Sandboxes.


def vanish(scene: Scene, container: Container) -> None:
    """Kill a container and remove its sandbox, as if both had never been."""
    state = container.state
    key = state["NetworkSettings"]["SandboxKey"]
    scene.host.exec("kill", "-KILL", str(state["State"]["Pid"]))
    scene.host.exec("umount", "--lazy", key, check=False)
    scene.host.exec("rm", "-f", key)


@pytest.mark.parametrize("args", [(), ("--live-restore",)], ids=["plain", "live"])
def test_a_sandbox_that_vanishes(cluster: Cluster, args: tuple[str, ...]) -> None:
    """
    A container whose processes and sandbox vanish while dockerd is down starts again.

    1. Two containers on one host, one on another; dockerd is killed; one container is
       killed and its namespace's name removed. Audits pass.
    2. dockerd comes back, and starts the container again.

    Result: the audits leave the other containers alone, all reach each other after it.
    """
    name = cluster.network()
    near, far = cluster.scenes
    host = near.host
    host.stop_dockerd()
    host.start_dockerd(args)
    goes, other = near.run(name, *ALWAYS), far.run(name)
    host.kill_dockerd()
    vanish(near, goes)
    time.sleep(GRACE + 1.5)
    host.start_dockerd(args)
    assert eventually(lambda: is_back(goes), 20.0)
    reach(goes, other, name)
    well(cluster)
    near.close()
    host.stop_dockerd()
    host.start_dockerd()


def test_a_sandbox_that_vanishes_while_docker_is_there(cluster: Cluster) -> None:
    """A container whose sandbox's name is removed under it is removed without a trace."""
    name = cluster.network()
    near = cluster.scenes[0]
    goes, stays = near.run(name), near.run(name)
    vanish(near, goes)
    near.remove(goes)
    well(cluster)
    assert len(told(near.host, "endpoints")) == 1
    assert near.run(name).pings(stays.ip(name))
