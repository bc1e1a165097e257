"""
What Docker's users wait for: connect, disconnect, run, networks, ports.

Beside the drivers stands one that does nothing: what it takes is Docker's own part. So
is what Docker does with a pair that it moves.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.labs import Context, Docker, network_body, together
from tests.bench.measure import Line, row

AT_ONCE = 20
BRIDGE, MOVED, PYNET = "Docker's bridge", "pynet, attach=moved", "pynet"
SWARM, CLOSED = "swarm's overlay", "pynet with gwbridge"
NOTHING, PAIR = "one that does nothing", "one with a bare pair"


@contextmanager
def nothing(docker: Docker, *words: str) -> Iterator[str]:
    """Have a driver that does nothing, or `pair` alone, and return its name."""
    name = "-".join(("nothing", *words))
    socket = f"/run/docker/plugins/{name}.sock"
    host = docker.host
    program = host.popen(sys.executable, "-m", "tests.bench.nothing", socket, *words)
    try:
        assert program.stdout is not None
        if program.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the driver that does nothing: {program.communicate()}")
        yield name
    finally:
        program.terminate()
        program.communicate()


@contextmanager
def bridges(docker: Docker, before: str = "") -> Iterator[dict[str, str]]:
    """
    Have a network of each kind on one host.

    Docker takes the first of a container's networks, by their names, as its way out.
    The containers here are on `bridge`; `before` begins names that come before that.
    """

    def make(driver: str, number: int, **options: str) -> str:
        name = f"{before}{number}" if before else ""
        subnet = f"10.{number}.0.0/24"
        return stack.enter_context(docker.network(driver, subnet, name=name, **options))

    with nothing(docker) as idle, ExitStack() as stack:
        yield {
            BRIDGE: make("bridge", 231),
            PYNET: make("pynet", 232),
            MOVED: make("pynet", 233, attach="moved"),
            NOTHING: make(idle, 234),
        }


@contextmanager
def overlays(docker: Docker) -> Iterator[dict[str, str]]:
    """Have an overlay of each kind, made on one host."""
    with nothing(docker) as idle, ExitStack() as stack:
        make = docker.network
        yield {
            SWARM: stack.enter_context(make("overlay", "10.241.0.0/24")),
            PYNET: stack.enter_context(
                make("pynet", "10.242.0.0/24", ipam="pynet", gateway="pynet")
            ),
            CLOSED: stack.enter_context(make("pynet", "10.243.0.0/24", ipam="pynet")),
            NOTHING: stack.enter_context(make(idle, "10.244.0.0/24")),
        }


def one_by_one(
    docker: Docker, networks: dict[str, str], rounds: int, lines: tuple[Line, Line]
) -> None:
    """Connect and disconnect a container, in turns."""
    on, off = lines
    with docker.container() as guest:
        for turn in range(-2, rounds):
            for name, network in networks.items():
                with on.timed(name):
                    docker.connect(guest, network)
                time.sleep(0.05)
                with off.timed(name):
                    docker.disconnect(guest, network)
                # What one leaves to do afterwards is no part of the next one's time.
                time.sleep(0.1)
            if turn < 0:
                on.columns.clear()
                off.columns.clear()


def at_once(
    docker: Docker, networks: dict[str, str], rounds: int, lines: tuple[Line, Line]
) -> None:
    """Connect and disconnect many containers at once, in turns."""
    on, off = lines
    refused: Counter[str] = Counter()

    def tried(work: Callable[[str, str], None], network: str, name: str) -> None:
        def one(guest: str) -> None:
            try:
                work(guest, network)
            except RuntimeError:
                refused[name] += 1

        together(one, guests)

    with docker.containers(AT_ONCE) as guests:
        for _ in range(rounds):
            for name, network in networks.items():
                before = refused[name]
                with on.timed(name):
                    tried(docker.connect, network, name)
                time.sleep(0.2)
                missing = refused[name] - before
                with off.timed(name):
                    tried(docker.disconnect, network, name)
                # Docker refuses to disconnect what it could not connect.
                refused[name] = before + missing
                time.sleep(0.2)
    if refused.total():
        found = ", ".join(f"{name} {many}" for name, many in refused.items() if many)
        on.note = f"connects that Docker refused: {found}"


@row()
def connect_bridge(context: Context) -> list[Line]:
    """Measure connect and disconnect on one host."""
    on = Line(name="network connect", against=BRIDGE, target="≤ 0.45")
    off = Line(name="network disconnect", against=BRIDGE, target="≤ 0.25")
    docker = context.alone()
    with bridges(docker) as networks:
        one_by_one(docker, networks, context.rounds, (on, off))
    return [on, off]


@row()
def way_out_bridge(context: Context) -> list[Line]:
    """Measure the same where the container's way out moves to the new network."""
    what = "the way out moves"
    on = Line(name=f"network connect, {what}", against=BRIDGE)
    off = Line(name=f"network disconnect, {what}", against=BRIDGE)
    docker = context.alone()
    with bridges(docker, "a") as networks:
        one_by_one(docker, networks, context.rounds, (on, off))
    return [on, off]


@row()
def at_once_bridge(context: Context) -> list[Line]:
    """Measure many at once on one host."""
    on = Line(name=f"{AT_ONCE} connects at once", against=BRIDGE, target="≤ 0.15")
    off = Line(name=f"{AT_ONCE} disconnects at once", against=BRIDGE, target="≤ 0.1")
    docker = context.alone()
    with bridges(docker) as networks:
        at_once(docker, networks, max(2, context.rounds // 5), (on, off))
    return [on, off]


@row()
def connect_overlay(context: Context) -> list[Line]:
    """Measure connect and disconnect on overlays."""
    on = Line(name="overlay: network connect", against=SWARM, target="≤ 0.15")
    off = Line(name="overlay: network disconnect", against=SWARM, target="≤ 0.25")
    docker, _ = context.cluster()
    with overlays(docker) as networks:
        one_by_one(docker, networks, context.rounds, (on, off))
    return [on, off]


@row()
def at_once_overlay(context: Context) -> list[Line]:
    """Measure many at once on overlays."""
    what = f"overlay: {AT_ONCE} connects at once"
    on = Line(name=what, against=SWARM, target="≤ 0.15")
    what = f"overlay: {AT_ONCE} disconnects at once"
    off = Line(name=what, against=SWARM, target="≤ 0.1")
    docker, _ = context.cluster()
    with overlays(docker) as networks:
        at_once(docker, networks, max(2, context.rounds // 5), (on, off))
    return [on, off]


def share_of_run(
    docker: Docker, networks: dict[str, str], rounds: int, name: str
) -> Line:
    """Measure what a network adds to the start of a container, against none."""
    line = Line(name=name)
    took = Line(name="")
    columns = [("none", "none"), *networks.items()]
    for turn in range(-1, rounds):
        # Each comes after each: what the kernel has yet to do of one is not another's.
        for column, network in random.sample(columns, len(columns)):
            made = docker.create(network)
            with took.timed(column):
                docker.start(made)
            docker.remove(made)
            # What one leaves to do afterwards is no part of the next one's time.
            time.sleep(0.2)
        if turn < 0:
            took.columns.clear()
    none = took.middle("none")
    for column in networks:
        line.add(column, *(sample - none for sample in took.columns[column]))
    return line


@row()
def run_bridge(context: Context) -> list[Line]:
    """Measure a network's share of `docker run`."""
    docker = context.alone()
    name = "network's share of docker run"
    with (
        bridges(docker) as networks,
        nothing(docker, "pair") as idle,
        docker.network(idle, "10.235.0.0/24") as bare,
    ):
        networks[PAIR] = bare
        line = share_of_run(docker, networks, context.rounds, name)
    line.against, line.target = BRIDGE, "≤ 0.95 (20.10), ≤ 0.8 (29)"
    return [line]


@row()
def run_overlay(context: Context) -> list[Line]:
    """Measure an overlay's share of `docker run`."""
    docker, _ = context.cluster()
    name = "overlay's share of docker run"
    with overlays(docker) as networks:
        line = share_of_run(docker, networks, context.rounds, name)
    line.against, line.target = SWARM, "≤ 0.2; ≤ 0.5 with gwbridge"
    return [line]


@row()
def create_network(context: Context) -> list[Line]:
    """Measure making and removing a network."""
    line = Line(name="network create and rm", against=BRIDGE, target="≤ 0.4")
    docker = context.alone()
    with nothing(docker) as idle:
        drivers = {BRIDGE: "bridge", PYNET: "pynet", NOTHING: idle}
        for turn in range(-1, context.rounds):
            for column, driver in drivers.items():
                with line.timed(column):
                    body = network_body(driver, "10.235.0.0/24")
                    made = docker.ask("POST", "/networks/create", body)["Id"]
                    docker.ask("DELETE", f"/networks/{made}")
                # What one leaves to do afterwards is no part of the next one's time.
                time.sleep(0.2)
            if turn < 0:
                line.columns.clear()
    return [line]


@row(quick=False)
def published_ports(context: Context) -> list[Line]:
    """Measure starting a container with one port, beside many that are published."""
    docker = context.alone()
    line = Line(name="start with one port, beside n others", target="flat")
    sizes = (0, 100, 1000)
    memory = Line(name="daemon's memory for a port", unit="kB", target="< 2")
    with bridges(docker) as networks:
        for column, driver in ((PYNET, PYNET), (BRIDGE, BRIDGE)):
            for size in sizes if driver == PYNET else sizes[:2]:
                before = resident(docker)
                with ExitStack() as stack:
                    if size:
                        ports = range(20_000, 20_000 + size)
                        stack.enter_context(
                            docker.container(networks[driver], ports=ports)
                        )
                        # What it leaves to do is no part of the others' time.
                        time.sleep(6)
                    if size == sizes[-1]:
                        memory.add(PYNET, (resident(docker) - before) / size)
                    for _ in range(max(3, context.rounds // 2)):
                        made = docker.create(networks[driver], ports=(19_999,))
                        with line.timed(f"{column}, n = {size}"):
                            docker.start(made)
                        docker.remove(made)
    line.against = f"{PYNET}, n = 0"
    return [line, memory]


def resident(docker: Docker) -> float:
    """Return the memory of the daemon of a host, in kB; what is shared counts partly."""
    pid = docker.host.service_pid("pynet")
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(x for x in text.splitlines() if x.startswith("Pss:"))
    return float(line.split()[1])
