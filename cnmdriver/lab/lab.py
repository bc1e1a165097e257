"""
Several Docker hosts on one machine.

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
from pathlib import Path
from typing import Self

from cnmdriver.lab import image, process
from cnmdriver.lab.host import Host, Software
from cnmdriver.lab.machine import Machine, wait_until
from cnmdriver.lab.process import LabError
from cnmdriver.lab.underlay import Underlay, host_address4, host_address6

DAEMON = (sys.executable, "-m", "cnmdriver", "serve")
MOST_HOSTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a lab consists of; kept in its directory."""

    hosts: int
    serve: bool
    dockerd: str
    dockerd_args: tuple[str, ...]
    daemon: tuple[str, ...]
    pynet_args: tuple[str, ...]


class Lab:
    """A lab; use it as a context manager, or call `up` and `down`."""

    def __init__(self, directory: Path, description: Description) -> None:
        """Describe a lab; `up` makes it."""
        self.directory = directory.resolve()
        self.description = description
        self.cgroup = f"/pynet-lab-{_digest(self.directory)}"
        self.outside = Underlay(self.directory)
        software = Software(
            dockerd=description.dockerd,
            dockerd_args=description.dockerd_args,
            daemon=description.daemon,
            pynet_args=description.pynet_args,
            cgroup=self.cgroup,
        )
        self.hosts = [
            Host(
                self.outside,
                f"h{number}",
                (host_address4(number), host_address6(number)),
                software,
            )
            for number in range(1, description.hosts + 1)
        ]

    @classmethod
    def create(
        cls,
        directory: Path,
        hosts: int = 1,
        *,
        dockerd: str = "dockerd",
        dockerd_args: Sequence[str] = (),
        daemon: Sequence[str] = DAEMON,
        pynet_args: Sequence[str] = (),
        serve: bool = True,
    ) -> Self:
        """Describe a new lab; without `serve`, `up` starts dockerd but not pynet."""
        if not 1 <= hosts <= MOST_HOSTS:
            raise LabError(f"a lab has 1 to {MOST_HOSTS} hosts, not {hosts}")
        description = Description(
            hosts=hosts,
            serve=serve,
            dockerd=dockerd,
            dockerd_args=tuple(dockerd_args),
            daemon=tuple(daemon),
            pynet_args=tuple(pynet_args),
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
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._start, self.hosts))
            stack.pop_all()

    def down(self) -> None:
        """Kill all machines of the lab and remove all that it has made."""
        for machine in self.machines:
            machine.power_cut()
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

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All hosts and the underlay."""
        return (*self.hosts, self.outside)

    def machine(self, name: str) -> Machine:
        """Return the host or `underlay` with this name."""
        for machine in self.machines:
            if machine.name == name:
                return machine
        names = ", ".join(machine.name for machine in self.machines)
        raise LabError(f"there is no {name} in the lab: it has {names}")

    def host(self, name: str) -> Host:
        """Return the host with this name."""
        machine = self.machine(name)
        if isinstance(machine, Host):
            return machine
        raise LabError(f"{name} has no Docker: it only connects the hosts")

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.description))
        (self.directory / "lab.json").write_text(text)
        image.write_image(self.directory / "image.tar")

    def _start(self, host: Host) -> None:
        host.boot()
        host.start_dockerd()
        if self.description.serve:
            host.start_pynet()


def _digest(directory: Path) -> str:
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]
