"""
Takes pynet's part of this host's kernel away, where no daemon runs and none shall.

What a daemon leaves when it stops is what traffic needs. This is for the day on which
pynet leaves a host: devices, firewall and namespace go, if no container uses them.
Records in the store stay, and a daemon that starts again makes of them what there was.
"""

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from cnmdriver.daemon import only_one
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.dockerapi import DockerApi, Inventory
from cnmdriver.driver.sync import in_use
from cnmdriver.errors import Conflict, DriverError, KernelError
from cnmdriver.plan import devices, ops
from cnmdriver.plan.ops import Plan, Sysctl, Veth
from cnmdriver.settings import Settings
from cnmdriver.store.local import copied_host


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """What went, what was left to others, and what stays."""

    removed: tuple[str, ...]
    foreign: tuple[str, ...]
    """Devices with another host's mark, which are not touched."""
    settings: dict[str, str]
    """Settings of the host that were turned on, with their old values: they stay."""


async def clear(settings: Settings, *, really: bool = True) -> Cleared:
    """
    Remove all that the census lists; if not `really`, only tell what that would be.

    Raises Conflict, which names them, if containers use it, InvalidParameter if a
    daemon runs, and KernelError for what the kernel did not let go.
    """
    if os.geteuid() != 0:
        raise KernelError("what pynet has in the kernel only root sees; use sudo")
    # The kernel's directory may have to be made, and is root's alone.
    os.umask(0o077)
    async with AsyncExitStack() as stack:
        if really:
            stack.enter_context(only_one())
        kernel = Kernel(
            host=copied_host(Path(settings.state_dir)),
            run_dir=Path(settings.run_dir),
            namespace=settings.namespace,
        )
        await kernel.open()
        stack.push_async_callback(kernel.close)
        owned = await look(kernel)
        refuse_used(owned, await docker_has(settings))
        if really:
            await kernel.clear(owned)
            await check_gone(kernel)
        return Cleared(
            removed=tuple(map(ops.name, owned)),
            foreign=tuple(sorted(device for device, _ in await kernel.foreign())),
            settings=kernel.changed_sysctls(),
        )


async def look(kernel: Kernel) -> Plan:
    """Return all that is ours, but for settings of the host."""
    found = await kernel.found()
    return tuple(op for op in found if not (isinstance(op, Sysctl) and op.keep))


async def check_gone(kernel: Kernel) -> None:
    """Raise KernelError for what is still there."""
    left = await look(kernel)
    if left:
        raise KernelError(
            f"{', '.join(map(ops.name, left))} could not be removed: something makes "
            "it again; see who with pynet status, and clear once more"
        )


async def docker_has(settings: Settings) -> Inventory | None:
    """Return what Docker has, None if it does not say."""
    if not settings.docker:
        return None
    try:
        async with asyncio.timeout(10):
            return await DockerApi(settings.docker).inventory(settings.driver_name)
    except (DriverError, TimeoutError):
        return None


def refuse_used(owned: Plan, docker: Inventory | None) -> None:
    """Raise Conflict if a pair of devices reaches into a container."""
    known = None if docker is None else docker.endpoints
    pairs = [op for op in owned if isinstance(op, Veth) and in_use(op, known)]
    if pairs:
        names = {} if docker is None else docker.names
        using = sorted(container(pair, names) for pair in pairs)
        raise Conflict(
            f"containers use networks of pynet: {', '.join(using)}; stop them, or "
            "docker network disconnect them, and try again"
        )


def container(pair: Veth, names: dict[str, str]) -> str:
    """Name the container that a pair reaches into, or else its endpoint."""
    endpoint = devices.endpoint_id(pair.alias)
    return names.get(endpoint) or f"endpoint {endpoint[:12]} by {pair.name}"
