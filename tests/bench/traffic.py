"""How fast traffic is, and how soon it flows: same host and between hosts."""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.bench.calls import BRIDGE, CLOSED, PYNET, SWARM, bridges
from tests.bench.labs import Context, Docker
from tests.bench.measure import Line, available, row
from tests.dockerd.tools import Place, checksum

PORT = "5201"
Ends = tuple[Docker, str, Docker, str, str]
"""A client's dockerd and container, a server's, and the server's address."""


def inside(docker: Docker, container: str) -> tuple[str, ...]:
    """Return how a program of the machine is run in a container's network."""
    return ("nsenter", f"--net={docker.netns(container)}")


def iperf(ends: Ends, seconds: float, *options: str) -> dict[str, float]:
    """Run iperf3 from one container to another; return the receiver's sums."""
    client, one, server, other, address = ends
    serving = server.host.popen(
        *inside(server, other), "iperf3", "-s", "-1", "--forceflush", "-p", PORT
    )
    try:
        assert serving.stdout is not None
        for line in serving.stdout:
            if "listening" in line:
                break
        words = (
            "iperf3",
            "-J",
            "-c",
            address,
            "-p",
            PORT,
            "-t",
            str(seconds),
            *options,
        )
        done = client.host.exec(*inside(client, one), *words, timeout=seconds + 30)
        end = json.loads(done.stdout)["end"]
    finally:
        serving.kill()
        serving.communicate()
    found: dict[str, float] = end.get("sum_received") or end["sum"]
    return found


def pinged(ends: Ends, count: int) -> float:
    """Return the median of ping's round trips, in microseconds."""
    client, one, _, _, address = ends
    words = ("ping", "-i", "0.002", "-c", str(count), address)
    shown = client.host.exec(*inside(client, one), *words, timeout=60).stdout
    times = sorted(float(t) for t in re.findall(r"time=([0-9.]+)", shown))
    return times[len(times) // 2] * 1000


def measured(
    pairs: dict[str, Ends], context: Context, where: str, base: str, better: str
) -> list[Line]:
    """Measure all kinds of traffic, in turns."""
    available("iperf3")
    tcp = {
        streams: Line(
            name=f"{where}: TCP, {streams} streams",
            unit="Gbit/s",
            against=base,
            target="≥ 1",
        )
        for streams in (1, 4)
    }
    udp = Line(name=f"{where}: UDP, 64 bytes", unit="kpps", against=base, target=better)
    trip = Line(name=f"{where}: ping", unit="µs", against=base, target="≤ 1")
    seconds = 1 if context.quick else 4
    for _ in range(2 if context.quick else 5):
        for column, ends in pairs.items():
            for streams, line in tcp.items():
                found = iperf(ends, seconds, "-P", str(streams))
                line.add(column, found["bits_per_second"] / 1e9)
            found = iperf(ends, seconds, "-u", "-l", "64", "-b", "0")
            got = found["packets"] * (100 - found["lost_percent"]) / 100
            udp.add(column, got / found["seconds"] / 1000)
            trip.add(column, pinged(ends, 200))
    return [*tcp.values(), udp, trip]


@row(quick=False)
def traffic_same_host(context: Context) -> list[Line]:
    """Measure traffic between two containers of one host."""
    docker = context.alone()
    with bridges(docker) as networks, ExitStack() as stack:
        pairs = {}
        for column in (BRIDGE, PYNET):
            network = networks[column]
            one, other = (
                stack.enter_context(docker.container(network)) for _ in range(2)
            )
            pairs[column] = (docker, one, docker, other, docker.address(other, network))
        return measured(pairs, context, "same host", BRIDGE, "≥ 1")


@contextmanager
def across(
    dockers: list[Docker], column: str, subnet: str
) -> Iterator[tuple[str, str]]:
    """Have one network of a kind on both hosts, and return what each calls it."""
    first, second = dockers
    with ExitStack() as stack:
        if column == SWARM:
            made = stack.enter_context(first.network("overlay", subnet))
            yield made, made
            return
        options = {"gateway": "pynet"} if column == PYNET else {}
        yield tuple(  # type: ignore[misc]
            stack.enter_context(d.network("pynet", subnet, ipam="pynet", **options))
            for d in (first, second)
        )


SUBNETS = {SWARM: "10.251.0.0/24", PYNET: "10.252.0.0/24", CLOSED: "10.253.0.0/24"}


@row(quick=False)
def traffic_across(context: Context) -> list[Line]:
    """Measure traffic between containers of two hosts."""
    dockers = context.cluster()
    first, second = dockers
    with ExitStack() as stack:
        pairs = {}
        for column, subnet in SUBNETS.items():
            here, there = stack.enter_context(across(dockers, column, subnet))
            one = stack.enter_context(first.container(here))
            other = stack.enter_context(second.container(there))
            address = second.address(other, there)
            pairs[column] = (first, one, second, other, address)
        return measured(pairs, context, "two hosts", SWARM, "≥ 1.3")


class Prober(threading.Thread):
    """Pings an address every millisecond, and knows when it was answered first."""

    def __init__(self, place: Place, address: str) -> None:
        """Begin at `start`."""
        super().__init__(daemon=True)
        self.sock = place.open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.address = address
        self.answered = 0.0
        self.ending = threading.Event()

    def run(self) -> None:
        number = 0
        self.sock.settimeout(0.001)
        while not self.ending.is_set():
            number = (number + 1) & 0xFFFF
            rest = struct.pack("!HH", 77, number)
            sum_ = checksum(b"\x08\0\0\0" + rest)
            try:
                self.sock.sendto(
                    struct.pack("!BBH", 8, 0, sum_) + rest, (self.address, 0)
                )
                data, who = self.sock.recvfrom(2048)
            except OSError:
                continue
            if who[0] == self.address and data[(data[0] & 15) * 4] == 0:
                self.answered = time.perf_counter()
                return

    def wait(self) -> float:
        """Return when it was answered."""
        self.join(10)
        self.ending.set()
        self.join()
        self.sock.close()
        if not self.answered:
            raise TimeoutError(f"{self.address} never answered")
        return self.answered


@row()
def first_probe(context: Context) -> list[Line]:
    """Measure from connect's return until another host's prober is answered."""
    line = Line(
        name="connect until the other host is answered", against=SWARM, target="≤ 2 ms"
    )
    dockers = context.cluster()
    first, second = dockers
    with ExitStack() as stack:
        parts = {}
        guest = stack.enter_context(first.container())
        for column, subnet in SUBNETS.items():
            here, there = stack.enter_context(across(dockers, column, subnet))
            prober = stack.enter_context(second.container(there))
            key = second.netns(prober).removeprefix("/var")
            parts[column] = (here, Place(str(second.host.socket(key))), subnet)
        for turn in range(-1, max(4, context.rounds // 2)):
            for number, (column, (here, place, subnet)) in enumerate(parts.items()):
                last = 100 + (turn * 3 + number) % 100
                address = subnet.replace("0/24", str(last))
                prober = Prober(place, address)
                first.connect(guest, here, ip=address)
                # Not before: who asked in vain asks again after a second only.
                returned = time.perf_counter()
                prober.start()
                line.add(column, max(0.0, prober.wait() - returned) * 1000)
                first.disconnect(guest, here)
            if turn < 0:
                line.columns.clear()
    return [line]
