"""A daemon on the real kernel that can die and come back, and what Docker adds."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cnmdriver.dataplane.handler import Step
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.driver.sync import Sync
from cnmdriver.model import Host
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import GROUP
from cnmdriver.store.local import LocalDatabase
from cnmdriver.store.sqlite import SqliteStore
from tests.fakes import Rig, on_store

from .conftest import Namespace, namespace, run


@dataclass
class Daemon:
    """One life of a daemon."""

    rig: Rig
    kernel: Kernel
    sync: Sync

    async def difference(self) -> list[str]:
        """
        Return what stands between kernel and records.

        While a pair of nobody's reaches into a sandbox, what is too much may stay.
        """
        desired = self.rig.site.desired()
        found = await self.kernel.found(desired)
        difference = ops.compare(desired, found)
        return list(difference.lines(surplus=not self.sync.orphans))


VTEP = "192.0.2.1"
"""The address of a host's tunnels, which lead to nobody."""


def own_namespace(directory: Path) -> str:
    """Name pynet's own namespace for the host whose state is in a directory."""
    return f"pynet-{devices.digest(str(directory.resolve()))}"


@asynccontextmanager
async def daemon(directory: Path, step: Step) -> AsyncIterator[Daemon]:
    """Run a daemon over the files of a directory, in the namespace of the caller."""
    name = own_namespace(directory)
    local = LocalDatabase(directory / "local.db")
    await local.open()
    kernel = Kernel(
        host=local.host, run_dir=directory / "run", step=step, namespace=name
    )
    await local.close()
    host = Host(id="", name="h1", version="test", vtep=ip_address(VTEP), namespace=name)
    async with AsyncExitStack() as stack:
        await kernel.open()
        stack.push_async_callback(kernel.close)
        store = SqliteStore(directory / "store.db")
        await store.open()
        stack.push_async_callback(store.close)
        path = directory / "local.db"
        parts = await on_store(stack, store, path, host, kernel=kernel)
        parts.state.step = step
        sync = Sync(parts.site, parts.networks, parts.ipam, None, grace=3600, audit=60)
        yield Daemon(parts, kernel, sync)


class Door:
    """A driver as its caller sees it: every call goes by `call(name, work)`."""

    def __init__(
        self,
        target: Callable[[], Any],
        call: Callable[..., Any],
        where: Callable[[str], str],
    ) -> None:
        """Take what finds the driver, which a restart replaces, and the sandboxes."""
        self.target = target
        self.call = call
        self.where = where

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return the method of that name, led by the door."""

        def method(*args: Any, **named: Any) -> Any:
            if name == "join":
                args = (*args[:2], self.where(args[1]))
            return self.call(name, lambda: getattr(self.target(), name)(*args, **named))

        return method


@dataclass
class Doors:
    """Both drivers, for `tests.unit.calls.Docker`."""

    networks: Door
    ipam: Door


class Sandbox:
    """A namespace that plays a container's, at a path of its own."""

    def __init__(self, path: Path) -> None:
        """Make it."""
        self.path = path
        self.stack = ExitStack()
        self.space: Namespace = self.stack.enter_context(namespace())
        path.symlink_to(self.space.path)

    def enter(self, peer: str) -> None:
        """Move the device in, as Docker does after Join."""
        run("ip", "link", "set", peer, "netns", self.space.path, "name", "eth0")

    def leave(self, peer: str, host: str) -> None:
        """Move the device back, as Docker does after Leave."""
        self.space.run("ip", "link", "set", "eth0", "netns", host, "name", peer)

    def has_device(self) -> bool:
        """Tell whether the device is inside."""
        return "eth0" in self.space.run("ip", "-o", "link")

    def remove(self) -> None:
        """Let go of it, with its device, which the kernel would only remove later."""
        self.space.run("ip", "link", "del", "eth0", check=False)
        with suppress(FileNotFoundError):
            self.path.unlink()
        self.stack.close()


def left_in_kernel(directory: Path) -> list[str]:
    """Name what is pynet's in the kernel, asking no code of pynet's."""
    name = own_namespace(directory)
    links = json.loads(run("ip", "-j", "-d", "link"))
    found = [x["ifname"] for x in links if x.get("group") in {str(GROUP), hex(GROUP)}]
    found += [x["ifname"] for x in links if "pynet" in x.get("ifalias", "")]
    tables = run("nft", "list", "tables").splitlines()
    found += [line for line in tables if "pynet" in line]
    for tool in ("iptables", "ip6tables"):
        found += [line for line in run(tool, "-S").splitlines() if "pynet" in line]
    found += [line for line in run("ip", "netns", "list").splitlines() if name in line]
    return found + run("ss", "-Hlntu").splitlines()


def drop_namespace(directory: Path) -> None:
    """Remove what a test that failed left of the namespace."""
    run("ip", "netns", "del", own_namespace(directory), check=False)
