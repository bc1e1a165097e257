"""
How long Docker's commands take on a network of pynet, beside Docker's own bridge.

`make bench` runs this in a lab of its own. The two drivers take turns, so that what
else the machine does meets both. A number is the median of all rounds, in milliseconds,
as Docker's API answers. An argument is the number of rounds.
"""

import http.client
import json
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from cnmdriver.lab.lab import Lab

SUBNETS = {"bridge": "10.231.0.0/24", "pynet": "10.232.0.0/24"}
ROUNDS = 20
WARM_UP = 2

Times = dict[str, dict[str, list[float]]]


class Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        """Describe it; the first request opens it."""
        super().__init__("docker", timeout=60)
        self.path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Docker:
    """Docker's API on one host, with a clock."""

    def __init__(self, path: Path) -> None:
        """Connect to a dockerd's socket."""
        self.connection = Connection(path)
        self.times: Times = defaultdict(lambda: defaultdict(list))

    def ask(self, method: str, path: str, body: object = None) -> str:
        """Make a request; return the id in the answer, or nothing."""
        data = None if body is None else json.dumps(body)
        header = {"Content-Type": "application/json"}
        self.connection.request(method, path, data, header)
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= http.client.BAD_REQUEST:
            raise SystemExit(f"{method} {path}: {answer.status} {text.decode()}")
        return str(json.loads(text).get("Id", "")) if text else ""

    def timed(
        self, step: str, driver: str, method: str, path: str, body: object = None
    ) -> str:
        """Make a request, and note how long it took."""
        begin = time.perf_counter()
        answer = self.ask(method, path, body)
        self.times[step][driver].append((time.perf_counter() - begin) * 1000)
        return answer

    def container(self, network: str) -> str:
        """Create a container on a network, and do not start it."""
        body = {
            "Image": "busybox",
            "Cmd": ["sleep", "600"],
            "HostConfig": {"NetworkMode": network},
        }
        return self.ask("POST", "/containers/create", body)


def play(docker: Docker, driver: str) -> None:
    """Make a network, use it, and remove it."""
    ipam = {"Config": [{"Subnet": SUBNETS[driver]}]}
    name = f"bench-{driver}"
    body = {"Name": name, "Driver": driver, "IPAM": ipam}
    guest = docker.container("bridge")
    docker.ask("POST", f"/containers/{guest}/start")
    network = docker.timed("network create", driver, "POST", "/networks/create", body)
    member = docker.container(name)
    docker.timed("start", driver, "POST", f"/containers/{member}/start")
    place, who = f"/networks/{network}", {"Container": guest}
    docker.timed("network connect", driver, "POST", f"{place}/connect", who)
    docker.timed("network disconnect", driver, "POST", f"{place}/disconnect", who)
    docker.timed("kill", driver, "POST", f"/containers/{member}/kill")
    docker.timed("rm", driver, "DELETE", f"/containers/{member}?force=true")
    docker.timed("network rm", driver, "DELETE", place)
    docker.ask("DELETE", f"/containers/{guest}?force=true")


def report(times: Times) -> None:
    """Print a row for each step."""
    print(f"{'':20}" + "".join(f"{driver:>10}" for driver in SUBNETS) + f"{'ratio':>8}")
    for step, taken in times.items():
        bridge, pynet = (statistics.median(taken[driver]) for driver in SUBNETS)
        print(f"{step:20}{bridge:10.1f}{pynet:10.1f}{pynet / bridge:8.2f}")


def main() -> None:
    """Measure, and print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with (
        tempfile.TemporaryDirectory() as directory,
        Lab.create(Path(directory, "lab")) as lab,
    ):
        docker = Docker(lab.hosts[0].socket("/run/docker.sock"))
        for number in range(-WARM_UP, rounds):
            if number == 0:
                docker.times.clear()
            for driver in SUBNETS:
                play(docker, driver)
    print(f"median of {rounds} rounds, in ms")
    report(docker.times)


if __name__ == "__main__":
    main()
