"""
Several Docker hosts on one machine, and an etcd cluster if they need one.

Everything a lab has made is found again from its directory: `lab.json` says what it
is, its machines are the processes that carry the directory in their command line, its
control groups carry a hash of it. So `Lab.attach(directory).down()` cleans up after
any end, `kill -9` included, and nothing is left: no process, mount, namespace, control
group or file. The machine's own namespaces are never changed.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Self

from cnmdriver.lab import image, process
from cnmdriver.lab.etcd import CLIENT_PORT, Cluster, Member
from cnmdriver.lab.host import Host, Software
from cnmdriver.lab.machine import Machine, wait_until
from cnmdriver.lab.node import Node
from cnmdriver.lab.process import LabError
from cnmdriver.lab.underlay import Underlay, addresses

DAEMON = (sys.executable, "-m", "cnmdriver", "serve")
MOST_HOSTS = 90
MOST_MEMBERS = 5
BEFORE_HOSTS = 10
BEFORE_MEMBERS = 100
MTU = 1500
MTUS = (1280, 65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a lab consists of; kept in its directory."""

    hosts: int
    serve: bool
    dockerd: str
    dockerd_args: tuple[str, ...]
    daemon: tuple[str, ...]
    pynet_args: tuple[str, ...]
    etcd: int
    etcd_args: tuple[str, ...]
    mtu: int


class Lab:
    """A lab; use it as a context manager, or call `up` and `down`."""

    def __init__(self, directory: Path, description: Description) -> None:
        """Describe a lab; `up` makes it."""
        self.directory = directory.resolve()
        self.description = description
        self.cgroup = f"/pynet-lab-{_digest(self.directory)}"
        self.outside = Underlay(self.directory, description.mtu)
        self.members = self._members()
        self.hosts = self._hosts()

    @classmethod
    def create(
        cls,
        directory: Path,
        hosts: int = 1,
        *,
        etcd: int = 0,
        mtu: int = MTU,
        dockerd: str = "dockerd",
        dockerd_args: Sequence[str] = (),
        daemon: Sequence[str] = DAEMON,
        pynet_args: Sequence[str] = (),
        etcd_args: Sequence[str] = (),
        serve: bool = True,
    ) -> Self:
        """
        Describe a new lab; `up` makes it.

        With `etcd` members, their cluster is pynet's store, unless `pynet_args` have a
        `--store`. Without `serve`, `up` starts dockerd but not pynet.
        """
        _check("hosts", hosts, 1, MOST_HOSTS)
        _check("etcd members", etcd, 0, MOST_MEMBERS)
        _check("bytes of MTU", mtu, *MTUS)
        description = Description(
            hosts=hosts,
            serve=serve,
            dockerd=dockerd,
            dockerd_args=tuple(dockerd_args),
            daemon=tuple(daemon),
            pynet_args=tuple(pynet_args),
            etcd=etcd,
            etcd_args=tuple(etcd_args),
            mtu=mtu,
        )
        return cls(directory, description)

    @classmethod
    def attach(cls, directory: Path) -> Self:
        """Return the lab that was made in a directory, by any process."""
        try:
            found = json.loads((directory / "lab.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise LabError(
                f"there is no lab in {directory}: start one with `pynet lab up`"
            ) from None
        except ValueError:
            # Written first of all: there was nothing else yet.
            raise LabError(
                f"{directory}/lab.json was not completed: remove the directory"
            ) from None
        lists = {k: tuple(v) for k, v in found.items() if isinstance(v, list)}
        return cls(directory, Description(**{**found, **lists}))

    def __enter__(self) -> Self:
        """Bring the lab up."""
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the lab down."""
        self.down()

    def up(self) -> None:
        """Start all; on any failure take down what was started."""
        if self.directory.exists() and any(self.directory.iterdir()):
            raise LabError(
                f"{self.directory} is not empty: take the lab in it down with "
                "`pynet lab down`, or choose another directory"
            )
        with ExitStack() as stack:
            stack.callback(self.down)
            self._write()
            self.outside.boot()
            with ThreadPoolExecutor(len(self.nodes)) as pool:
                list(pool.map(self._start, self.nodes))
                list(pool.map(Member.wait_healthy, self.members))
                if self.description.serve:
                    list(pool.map(Host.start_pynet, self.hosts))
            stack.pop_all()

    def down(self) -> None:
        """Kill all machines of the lab and remove all that it has made."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(methodcaller("power_cut"), self.nodes))
        self.outside.power_cut()
        if not wait_until(lambda: process.remove_cgroup(self.cgroup), 5.0):
            raise LabError(f"the control group {self.cgroup} cannot be removed")
        for machine in self.machines:
            if machine.directory.exists():
                shutil.rmtree(machine.directory)
        # The description goes last: as long as anything is left, `attach` finds it.
        for name in ("image.tar", "lab.json"):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.directory.rmdir()

    def cut(self, first: str, second: str) -> None:
        """Drop all that two machines send each other, until it is mended."""
        self.outside.cut(*self._pair(first, second))

    def mend(self, first: str, second: str) -> None:
        """Let two machines reach each other again; not cut is no error."""
        self.outside.mend(*self._pair(first, second))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All machines on the underlay: members and hosts."""
        return (*self.members, *self.hosts)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All hosts, members and the underlay."""
        return (*self.hosts, *self.members, self.outside)

    def machine(self, name: str) -> Machine:
        """Return the host, member or `underlay` with this name."""
        for machine in self.machines:
            if machine.name == name:
                return machine
        names = ", ".join(machine.name for machine in self.machines)
        raise LabError(f"there is no {name} in the lab: it has {names}")

    def node(self, name: str) -> Node:
        """Return the host or member with this name."""
        machine = self.machine(name)
        if isinstance(machine, Node):
            return machine
        raise LabError(f"{name} only connects the others: name one of them")

    def host(self, name: str) -> Host:
        """Return the host with this name."""
        machine = self.machine(name)
        if isinstance(machine, Host):
            return machine
        raise LabError(f"{name} has no Docker: only hosts have")

    def member(self, name: str) -> Member:
        """Return the etcd member with this name."""
        machine = self.machine(name)
        if isinstance(machine, Member):
            return machine
        raise LabError(f"{name} has no etcd: only members have")

    def _members(self) -> list[Member]:
        numbers = range(1, self.description.etcd + 1)
        places = {
            f"e{number}": addresses(BEFORE_MEMBERS + number) for number in numbers
        }
        cluster = Cluster(
            peers={name: str(place[0].ip) for name, place in places.items()},
            args=self.description.etcd_args,
        )
        return [
            Member(self.outside, name, place, cluster) for name, place in places.items()
        ]

    def _hosts(self) -> list[Host]:
        described = self.description
        ends = [f"{member.address4}:{CLIENT_PORT}" for member in self.members]
        software = Software(
            dockerd=described.dockerd,
            dockerd_args=described.dockerd_args,
            daemon=described.daemon,
            pynet_args=described.pynet_args,
            serve=described.serve,
            endpoints=tuple(ends),
            cgroup=self.cgroup,
        )
        return [
            Host(self.outside, f"h{number}", addresses(BEFORE_HOSTS + number), software)
            for number in range(1, described.hosts + 1)
        ]

    def _pair(self, first: str, second: str) -> tuple[str, str]:
        if first == second:
            raise LabError(f"{first} cannot be cut from itself: name two machines")
        return self.node(first).name, self.node(second).name

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.description))
        (self.directory / "lab.json").write_text(text)
        image.write_image(self.directory / "image.tar")

    def _start(self, node: Node) -> None:
        node.boot()
        # pynet starts when its store is there, so that a lab that is up works.
        for name in node.at_boot:
            if name != "pynet":
                node.start(name)


def _check(what: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise LabError(f"a lab has {least} to {most} {what}, not {number}")


def _digest(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]
