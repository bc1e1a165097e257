"""Several lab hosts on one etcd, as the tests of overlay networks use them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any, Self

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import Completed
from tests.dockerd.tools import Container, Scene, eventually, told

POOLS = count(1)
KEPT = ("hosts/", "alive/", "fence/", "kept/", "watermarks/", "cluster")
"""What stays in the store when no network is left."""


def fresh_pools() -> tuple[str, str]:
    """Return an IPv4 and an IPv6 pool that no other test has."""
    number = next(POOLS)
    return f"10.{100 + number // 256}.{number % 256}.0/24", f"fd00:{number:x}::/64"


class Cluster:
    """A scene on each host of a lab; `close` removes all that was made on any."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.stack = ExitStack()
        self.scenes = [self.stack.enter_context(Scene(host)) for host in lab.hosts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def network(
        self, *options: str, hosts: Sequence[int] = (), six: bool = True
    ) -> str:
        """Make one network on some hosts, or on all, and return its name."""
        four, pool6 = fresh_pools()
        pools = ["--subnet", four]
        if six:
            pools += ["--ipv6", "--subnet", pool6]
        name = f"o{next(POOLS)}"
        for number in hosts or range(len(self.scenes)):
            self.join(number, name, *pools, *options)
        return name

    def join(self, number: int, name: str, *options: str) -> str:
        """Create a network on one host, with pynet's IPAM."""
        words = ("--ipam-driver", "pynet", *options)
        return self.scenes[number].network(*words, name=name)

    def run(self, network: str, *options: str) -> list[Container]:
        """Start a container on each host."""
        return [scene.run(network, *options) for scene in self.scenes]

    def keys(self) -> list[str]:
        """Return what etcd has of pynet, less what hosts keep there."""
        found = etcdctl(self.lab, "get", "--prefix", "/pynet/v1/", "--keys-only")
        keys = [
            line.removeprefix("/pynet/v1/")
            for line in found.stdout.splitlines()
            if line.strip()
        ]
        return [key for key in keys if not key.startswith(KEPT)]


def etcdctl(lab: Lab, *args: str) -> Completed:
    """Ask etcd what it has, from the first host."""
    return lab.hosts[0].exec("etcdctl", *args, check=True)


def census(host: Host) -> list[Any]:
    """Return what pynet owns on a host."""
    owned: list[Any] = told(host, "census")["owned"]
    return owned


def left(cluster: Cluster) -> list[object]:
    """Return all that is left of networks in etcd and on any host."""
    owned = [thing for host in cluster.lab.hosts for thing in census(host)]
    return [*cluster.keys(), *owned]


def nothing_is_left(cluster: Cluster) -> bool:
    """Wait until audits that were under way are through, and nothing is left."""
    return eventually(lambda: not left(cluster), 10.0)


def pairs(containers: Sequence[Container]) -> Iterator[tuple[Container, Container]]:
    """Yield each container with each other one."""
    for one in containers:
        yield from ((one, other) for other in containers if other is not one)
