"""
Settings of the kernel, below /proc/sys, of the namespace whose thread opens them.

Those of the whole host stay when a plan is cleared, since others may rely on them by
then. Their old values are remembered in a file that lives as long as the kernel does.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cnmdriver.dataplane.handler import Undo, only, refusal
from cnmdriver.dataplane.inside import Inside
from cnmdriver.dataplane.links import Links
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import HOST, Bridge, Interface, Plan, Sysctl

ROOT = Path("/proc/sys")
BRIDGE_FILTERS = "net/bridge/"
FORWARDING6 = "net/ipv6/conf/all/forwarding"
PER_BRIDGE = {
    "net/ipv4/conf/{}/route_localnet": "0",
    "net/ipv6/conf/{}/accept_ra": "1",
    "net/ipv6/conf/{}/disable_ipv6": "0",
}
"""What our bridges and ends may have, with the value that needs no mention."""

DOCKERS = re.compile(r"lo|docker0|docker_gwbridge|br-[0-9a-f]{12}")


class Sysctls:
    """Writes settings of a place, and remembers what the host's were."""

    together = False

    def __init__(
        self, inside: Inside, links: Links, memory: "Memory", where: str = HOST
    ) -> None:
        self._inside = inside
        self._links = links
        self._memory = memory
        self._where = where

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Write each setting that is not as wanted."""
        for op in only(ops, Sysctl):
            await self._refuse_without_ipv6(op)
            if op.path == FORWARDING6 and op.value != await self._read(op):
                await self._keep_listening(undo)
            await self._set(op, undo)

    async def clear(self, ops: Plan) -> None:
        """Do nothing: a setting stays, or goes with its device or namespace."""

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return what was changed, what is wanted, and what our devices have."""
        here = (op for op in only(wanted, Sysctl) if op.where == self._where)
        paths = {op.path: op for op in here}
        named = [op.device for op in paths.values()]
        others = [
            Sysctl(
                where=self._where,
                path=path.format(op.name),
                value=usual,
                device=op.name,
            )
            for op in devices
            if isinstance(op, Bridge | Interface) and op.name not in named
            for path, usual in PER_BRIDGE.items()
        ]
        every = (*self._remembered(), *paths.values(), *others)
        what = f"reading {len(every)} settings"
        read = zip(every, await self._inside.ask(what, _read_all, every), strict=True)
        return tuple(
            {
                op.path: replace(op, value=value)
                for op, value in read
                if value is not None and not (op in others and value == op.value)
            }.values()
        )

    def _remembered(self) -> tuple[Sysctl, ...]:
        if self._where != HOST:
            return ()
        return tuple(
            Sysctl(path=path, value="", keep=True) for path in self._memory.old
        )

    async def _read(self, op: Sysctl) -> str | None:
        return await self._inside.ask(f"reading {op.path}", _read, op)

    async def _write(self, path: str, value: str) -> None:
        await self._inside.ask(f"setting {path} to {value}", _write, path, value)

    async def _set(self, op: Sysctl, undo: Undo) -> None:
        before = await self._read(op)
        if before == op.value:
            return
        if before is None:
            raise KernelError(
                f"setting {op.path} to {op.value} failed: there is no such setting"
            )
        # What it was at first counts, and only for what outlives the plan.
        kept = op.keep and self._where == HOST
        first = kept and op.path not in self._memory.old

        async def restore() -> None:
            if await self._read(op) != before:
                await self._write(op.path, before)
            if first:
                self._memory.forget(op.path)

        undo.append(restore)
        if first:
            self._memory.keep(op.path, before)
        await self._write(op.path, op.value)

    async def _keep_listening(self, undo: Undo) -> None:
        """
        Keep router advertisements working on devices that listen to them.

        A router does not listen unless it is told to. Left out are ports of a bridge,
        which never listen, and Docker's bridges and ours: there a container could give
        the host a route.
        """
        for link in await self._links.outside():
            path = f"net/ipv6/conf/{link.name}/accept_ra"
            op = Sysctl(where=self._where, path=path, value="2", keep=True)
            others = link.master or DOCKERS.fullmatch(link.name)
            if not others and await self._read(op) == "1":
                await self._set(op, undo)

    async def _refuse_without_ipv6(self, op: Sysctl) -> None:
        wants = op.path == FORWARDING6 or (
            op.path.endswith("/disable_ipv6") and op.value == "0"
        )
        everywhere = Sysctl(path="net/ipv6/conf/all/disable_ipv6", value="1")
        if wants and await self._read(everywhere) == "1":
            raise KernelError(
                f"setting {op.path} to {op.value} failed: IPv6 is off on this host "
                "(net.ipv6.conf.all.disable_ipv6 = 1); set it to 0, or leave out IPv6"
            )


class Memory:
    """The old values of settings that were changed for good, in a file."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "sysctls.json"
        self.old: dict[str, str] = {}

    def open(self) -> None:
        """Read what an earlier life changed."""
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            text = "{}"
        except OSError as error:
            raise _refusal(f"reading {self._file}", error) from error
        try:
            self.old = dict(json.loads(text))
        except ValueError as error:
            raise KernelError(
                f"reading the old settings from {self._file} failed: {error}; remove it"
            ) from error

    def keep(self, path: str, value: str) -> None:
        """Remember an old value."""
        self.old[path] = value
        self._save()

    def forget(self, path: str) -> None:
        """Remember it no more."""
        self.old.pop(path, None)
        self._save()

    def _save(self) -> None:
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(self.old, indent=1))
            new.replace(self._file)
        except OSError as error:
            raise _refusal(f"writing {self._file}", error) from error


def _read_all(ops: Sequence[Sysctl]) -> list[str | None]:
    return [_read(op) for op in ops]


def _read(op: Sysctl) -> str | None:
    """Return the value, None if there is no such setting."""
    try:
        return (ROOT / op.path).read_text().strip()
    except FileNotFoundError:
        # Without the module br_netfilter no rule of the host's filters on bridges.
        if op.path.startswith(BRIDGE_FILTERS):
            return "0"
        # A device with an MTU below 1280, and a kernel without IPv6, have none of it.
        off = op.path.endswith("/disable_ipv6") and op.value == "1"
        return "1" if off and _is_there(op.device) else None
    except OSError as error:
        raise _refusal(f"reading {op.path}", error) from error


def _write(path: str, value: str) -> None:
    try:
        (ROOT / path).write_text(value)
    except OSError as error:
        raise _refusal(f"setting {path} to {value}", error) from error


def _is_there(device: str) -> bool:
    return (ROOT / "net/ipv4/conf" / device).exists()


def _refusal(what: str, error: OSError) -> KernelError:
    return refusal(what, error.errno or 0, error.strerror or "")
