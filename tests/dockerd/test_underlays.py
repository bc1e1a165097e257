"""Overlays over underlays of several sizes, by tunnels of both families."""

import socket
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster
from tests.dockerd.tools import Container, devices, family_of

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(120)]

MEGABYTES = 64
PORT = 5001
OVERHEAD = {4: 50, 6: 70}
"""Bytes around a frame in a tunnel of each family (RFC 7348)."""
HEADERS = {4: 28, 6: 48}
"""Bytes of the IP and the ICMP header."""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mtu", [1400, 1500, 9000])
def test_size(make_lab: Callable[..., Lab], mtu: int, version: int) -> None:
    """Full-size packets and a long transfer pass whatever the underlay carries."""
    lab = make_lab(2, etcd=1, mtu=mtu, serve=False)
    for host in lab.hosts:
        vtep = host.address4 if version == 4 else host.address6
        host.start_pynet(["--vtep", str(vtep)])
    with Cluster(lab) as cluster:
        name = cluster.network()
        one, other = cluster.run(name)
        room = mtu - OVERHEAD[version]
        assert devices(one)["eth0"]["mtu"] == room
        for address in (other.ip(name), other.ip6(name)):
            assert full_size(one, address, room)
            assert transferred(one, other, address) == MEGABYTES << 20


def full_size(one: Container, address: str, mtu: int) -> bool:
    """Tell whether the largest unfragmented packet is answered, and no larger one."""
    version = 4 if family_of(address) == socket.AF_INET else 6
    largest = mtu - HEADERS[version]

    def passes(size: int) -> bool:
        words = (f"-{version}", "-M", "do", "-c1", "-W2", f"-s{size}", address)
        return one.net("ping", *words, check=False).returncode == 0

    return passes(largest) and not passes(largest + 1)


def transferred(one: Container, other: Container, address: str) -> int:
    """Send megabytes over TCP; return how many bytes arrived."""
    family = family_of(address)
    with (
        closing(other.open(family, socket.SOCK_STREAM)) as listener,
        closing(one.open(family, socket.SOCK_STREAM)) as client,
    ):
        listener.bind((address, PORT))
        listener.listen(1)
        listener.settimeout(30)
        client.settimeout(30)
        arrived: list[int] = []
        taking = threading.Thread(target=lambda: arrived.append(taken(listener)))
        taking.start()
        client.connect((address, PORT))
        block = bytes(1 << 20)
        for _ in range(MEGABYTES):
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)
        taking.join(30)
        return sum(arrived)


def taken(listener: socket.socket) -> int:
    """Accept a connection and count what comes."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(30)
        total = 0
        while data := connection.recv(1 << 20):
            total += len(data)
        return total
