"""
A disk that is full or takes no writes, under the files and under a whole daemon.

The daemon is a real one on a real kernel and a real store; Docker is played. Its state
directory is a small disk of its own, its log goes elsewhere.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cnmdriver.lab.etcd import Member
from cnmdriver.lab.host import Host
from cnmdriver.lab.machine import wait_until
from tests.faults.failpoint_world import (
    LOG,
    RefusedError,
    World,
)
from tests.faults.files_disks import SCENARIOS, SIZE, fill
from tests.unit.calls import port

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
STATE = "/var/lib/pynet"
TEXT = "/run/pynet.text"
POOLS = ("10.61.0.0/16", "fd61::/64")
"""So large that a host has more addresses in advance than a disk's log has room for."""
BLOCKS = 6.0
"""Seconds until a host can be sure of the blocks that it has taken."""
FULL = f"the disk that holds {STATE} is full"
STUCK = f"the disk that holds {STATE} takes no writes"
PATIENCE = 60.0
REMOVALS = (
    *("NetworkDriver.Leave", "NetworkDriver.DeleteEndpoint"),
    *("NetworkDriver.DeleteNetwork", "NetworkDriver.RevokeExternalConnectivity"),
    *("IpamDriver.ReleaseAddress", "IpamDriver.ReleasePool"),
)
MANY = 400
"""Containers that no disk has room for that is full; the log of a file has for some."""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_files(scenario, tmp_path):
    """Each file refuses what it cannot hold, takes back, and is whole in the end."""
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", sys.executable),
            *("-m", "tests.faults.files_disks", scenario, str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


class Small(World):
    """A world whose daemon has a small disk, which Docker knows nothing of."""

    def __init__(self, host: Host, etcd: Member | None, **given: str) -> None:
        """Mount the disk, and start the daemon."""
        mount(host)
        host.exec("mkfifo", LOG)
        # A limit to the size of files must not meet the log.
        self.reader = host.popen("sh", "-c", f"exec cat <>{LOG} >{TEXT}")
        self.etcd = etcd
        super().__init__(host, **given)
        self.daemon.log = self.log  # type: ignore[method-assign]

    def close(self) -> None:
        """End the daemon, and what reads its log."""
        super().close()
        self.reader.kill()
        self.reader.communicate(timeout=10)

    @property
    def disk(self) -> Path:
        """Return where the disk is found from here."""
        return self.host.socket(STATE)

    def log(self) -> str:
        """Return all that the daemon has logged."""
        return self.host.socket(TEXT).read_text(errors="replace")

    def sqlite_keys(self) -> list[str]:
        """Return the keys of the store, as the daemon reads them."""
        words = ("sqlite3.connect('file:/var/lib/pynet/store.db?mode=ro', uri=True)",)
        code = (
            f"import json, sqlite3; db = {words[0]}; print(json.dumps([key for key, in "
            "db.execute('SELECT key FROM records ORDER BY key')]))"
        )
        return list(json.loads(self.command(sys.executable, "-c", code)))

    def lose_room(self) -> None:
        """Fill the disk."""
        fill(self.disk)

    def give_room(self) -> None:
        """Make room on it."""
        (self.disk / "filler").unlink()

    def refuse_writes(self, limit: str = "0") -> None:
        """Have the kernel refuse the daemon every byte it writes into a file."""
        pid = str(self.status()["daemon"]["pid"])
        self.command("prlimit", "--pid", pid, f"--fsize={limit}:unlimited")

    def take_writes(self) -> None:
        """End that."""
        self.refuse_writes("unlimited")

    def status(self) -> dict[str, Any]:
        """Return what `pynet status` has."""
        return dict(self.admin.get("status"))

    def remarks(self) -> str:
        """Return what `pynet status` says that somebody should look at."""
        return "\n".join(self.status()["attention"])

    async def refusal(self, command: Callable[[], Awaitable[None]]) -> str:
        """Repeat a command until it is refused; return in which words."""
        for _ in range(MANY):
            try:
                await command()
            except RefusedError as error:
                assert "\n" not in str(error)
                return str(error)
        raise AssertionError("it was never refused")

    async def remove_all(self) -> None:
        """Remove all that Docker has, and see that no removal was ever refused."""
        for box in list(self.docker.boxes):
            await self.docker.stop(box)
        for net in list(self.docker.nets):
            await self.docker.remove(net)
        assert [text for text in self.refusals if text.startswith(REMOVALS)] == []

    def ends(self) -> str:
        """Start the daemon where it cannot serve; return what it says, alone."""
        before = len(self.log())
        self.daemon.ask("start 3 ")
        assert self.daemon.ask("wait 30") == "2"
        # What it said goes through a pipe.
        assert wait_until(lambda: self.log()[before:].endswith("\n"), PATIENCE)
        (line,) = self.log()[before:].splitlines()
        return line

    def is_well(self) -> bool:
        """Tell whether nothing needs attention and nothing differs."""
        return bool(self.status()["well"]) and self.admin.get("diff")["lines"] == []

    def calm(self) -> None:
        """See that the daemon lives, and neither loops nor has met a bug."""
        assert self.daemon.ask("wait 0.001") == "alive"
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        assert "Traceback" not in self.log()
        said = [json.loads(line)["event"] for line in lines]
        calls = said.count("api.call")
        # It may say something twice for a call, and a line for each second.
        assert len(said) < 4 * calls + 300, said[-50:]


def mount(host: Host) -> None:
    """Give a host's state directory a small disk of its own."""
    options = f"size={SIZE},mode=700"
    host.exec("mount", "-t", "tmpfs", "-o", options, "tmpfs", STATE)


@pytest.fixture(params=["embedded", "etcd"])
def world(request, make_lab):
    """Give a host on a small disk, alone or with an etcd, which is elsewhere."""
    shared = request.param == "etcd"
    lab = make_lab(etcd=1 if shared else 0, serve=False)
    store = {"store": f"etcd://{lab.members[0].address4}:2379"} if shared else {}
    with Small(lab.hosts[0], lab.members[0] if shared else None, **store) as made:
        yield made


async def populated(world: Small) -> None:
    """Have a network with three containers, of which one has a published port."""
    await world.create(*POOLS)
    await world.start(ports=(port(80, 8080),))
    await world.start()
    await world.start()
    world.tell()


async def whole(world: Small) -> None:
    """See that all goes on as if nothing had been."""
    assert wait_until(world.is_well, PATIENCE), world.status()
    assert wait_until(lambda: world.look() == world.empty, PATIENCE)
    await populated(world)
    assert wait_until(world.is_well, PATIENCE), world.status()
    await world.remove_all()
    assert wait_until(lambda: world.look() == world.empty, PATIENCE)
    world.calm()


async def test_a_full_disk(world):
    """
    A full disk takes no container from an embedded store, and keeps nobody from going.

    1. Containers run. The disk is filled; containers are started until one is refused
       (with etcd they are not: what counts is on other disks).
    2. All is removed; the daemon is killed and started again, on the full disk.
    3. There is room again.
    Result: a refusal is a sentence that names the disk, as `status` does; no removal is
    refused, and none comes back; in the end all is as at the start, and works.
    """
    await populated(world)
    world.lose_room()
    if world.etcd is None:
        told = await world.refusal(world.start)
        assert FULL in told
        assert told.endswith("make room there")
    else:
        await world.start()
    assert FULL in world.remarks()
    world.tell()
    await world.remove_all()
    world.lose_room()
    world.daemon.restart()
    assert wait_until(lambda: world.look() == world.empty, PATIENCE), world.look()
    assert FULL in world.remarks()
    world.give_room()
    await whole(world)


@pytest.mark.parametrize("world", ["etcd"], indirect=True)
async def test_a_full_disk_while_the_store_is_away(world):
    """
    Without store and room nothing is taken that could be forgotten, and all can go.

    1. etcd is stopped, the disk filled; containers are started until one is refused.
    2. All is removed; the daemon is killed and started again, on the full disk.
    3. There is room, and then etcd again.
    Result: the last room is kept for removals: none is refused or comes back.
    """
    await populated(world)
    await asyncio.sleep(BLOCKS)
    world.etcd.stop_etcd()
    world.lose_room()
    told = await world.refusal(world.start)
    assert FULL in told
    assert FULL in world.remarks()
    await world.remove_all()
    world.lose_room()
    world.daemon.restart()
    assert world.admin.get("endpoints") == world.admin.get("networks") == []
    world.give_room()
    world.etcd.start_etcd()
    await whole(world)


async def test_a_disk_that_takes_no_writes(world):
    """
    A disk that became read-only keeps nobody from going; what went is written later.

    1. Containers run. The kernel refuses the daemon every write into a file; with an
       embedded store a container is started.
    2. All is removed, and the disk takes writes again.
    Result: as on a full disk; what was removed meanwhile is nowhere.
    """
    await populated(world)
    world.refuse_writes()
    if world.etcd is None:
        assert STUCK in await world.refusal(world.start)
    assert STUCK in world.remarks()
    await world.remove_all()
    assert world.admin.get("endpoints") == world.admin.get("networks") == []
    world.calm()
    world.take_writes()
    await whole(world)


async def test_a_daemon_that_starts_on_such_a_disk(world):
    """A daemon that cannot have its files says so in one sentence, and later serves."""
    await populated(world)
    world.daemon.kill()
    world.command("mount", "-o", "remount,ro", STATE)
    assert world.ends() == (
        f"pynet: cannot open the local database {STATE}/local.db: attempt to write "
        f"a readonly database; {STUCK} (Read-only file system): mend it or mount it writable"
    )
    world.command("mount", "-o", "remount,rw", STATE)
    world.daemon.start()
    assert wait_until(world.is_well, PATIENCE), world.status()
    await world.remove_all()
    world.daemon.kill()
    world.command("cp", "-a", STATE, "/run/kept")
    world.command("find", STATE, "-mindepth", "1", "-delete")
    world.lose_room()
    assert world.ends() == (
        f"pynet: cannot open the local database {STATE}/local.db: database or disk is "
        f"full; {FULL}: make room there"
    )
    world.give_room()
    world.command("cp", "-aT", "/run/kept", STATE)
    world.daemon.start()
    assert wait_until(world.is_well, PATIENCE), world.status()
