"""
Settings of the kernel, below /proc/sys.

Those of the whole host stay when a plan is cleared, since others may rely on them by
then. Their old values are remembered in a file that lives as long as the kernel does.
"""

import json
import re
from pathlib import Path

from cnmdriver.dataplane.handler import Undo, only, refusal
from cnmdriver.dataplane.links import Links
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import Bridge, Plan, Sysctl

ROOT = Path("/proc/sys")
FORWARDING6 = "net/ipv6/conf/all/forwarding"
PER_BRIDGE = {
    "net/ipv4/conf/{}/route_localnet": "0",
    "net/ipv6/conf/{}/accept_ra": "1",
    "net/ipv6/conf/{}/disable_ipv6": "0",
}
"""What a bridge of ours may have, with the value that needs no mention."""

DOCKERS = re.compile(r"lo|docker0|docker_gwbridge|br-[0-9a-f]{12}")


class Sysctls:
    """Writes settings and remembers what they were."""

    together = False

    def __init__(self, links: Links, run_dir: Path) -> None:
        self._links = links
        self._file = run_dir / "sysctls.json"
        self._old: dict[str, str] = {}

    def open(self) -> None:
        """Read what an earlier life changed."""
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            text = "{}"
        except OSError as error:
            raise _refusal(f"reading {self._file}", error) from error
        try:
            self._old = dict(json.loads(text))
        except ValueError as error:
            raise KernelError(
                f"reading the old settings from {self._file} failed: {error}; remove it"
            ) from error

    def changed(self) -> dict[str, str]:
        """Return path and earlier value of what was changed for good."""
        return dict(self._old)

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Write each setting that is not as wanted."""
        for op in only(ops, Sysctl):
            _refuse_without_ipv6(op)
            if op.path == FORWARDING6 and op.value != _read(op):
                await self._keep_listening(undo)
            self._set(op, undo)

    async def clear(self, ops: Plan) -> None:
        """Do nothing: a setting stays, or goes with its device."""

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return what was changed, what is wanted, and what our bridges have."""
        paths = {op.path: op for op in wanted if isinstance(op, Sysctl)}
        named = [op.device for op in paths.values()]
        kept = [Sysctl(path=path, value="", keep=True) for path in self._old]
        others = [
            Sysctl(path=path.format(op.name), value=usual, device=op.name)
            for op in only(devices, Bridge)
            if op.name not in named
            for path, usual in PER_BRIDGE.items()
        ]
        read = ((op, _read(op)) for op in (*kept, *paths.values(), *others))
        return tuple(
            {
                op.path: _with(op, value)
                for op, value in read
                if value is not None and not (op in others and value == op.value)
            }.values()
        )

    def _set(self, op: Sysctl, undo: Undo) -> None:
        before = _read(op)
        if before == op.value:
            return
        if before is None:
            raise KernelError(
                f"setting {op.path} to {op.value} failed: there is no such setting"
            )
        # What it was at first counts, and only for what outlives the plan.
        first = op.keep and op.path not in self._old

        async def restore() -> None:
            if _read(op) != before:
                self._write(op.path, before)
            if first:
                self._old.pop(op.path, None)
                self._save()

        undo.append(restore)
        if first:
            self._old[op.path] = before
            self._save()
        self._write(op.path, op.value)

    async def _keep_listening(self, undo: Undo) -> None:
        """
        Keep router advertisements working on devices that listen to them.

        A router does not listen unless it is told to. Left out are ports of a bridge,
        which never listen, and Docker's bridges and ours: there a container could give
        the host a route.
        """
        for link in await self._links.outside():
            path = f"net/ipv6/conf/{link.name}/accept_ra"
            op = Sysctl(path=path, value="2", keep=True)
            others = link.master or DOCKERS.fullmatch(link.name)
            if not others and _read(op) == "1":
                self._set(op, undo)

    def _write(self, path: str, value: str) -> None:
        try:
            (ROOT / path).write_text(value)
        except OSError as error:
            raise _refusal(f"setting {path} to {value}", error) from error

    def _save(self) -> None:
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(self._old, indent=1))
            new.replace(self._file)
        except OSError as error:
            raise _refusal(f"writing {self._file}", error) from error


def _read(op: Sysctl) -> str | None:
    """Return the value, None if there is no such setting."""
    try:
        return (ROOT / op.path).read_text().strip()
    except FileNotFoundError:
        # A device with an MTU below 1280, and a kernel without IPv6, have none of it.
        off = op.path.endswith("/disable_ipv6") and op.value == "1"
        return "1" if off and _is_there(op.device) else None
    except OSError as error:
        raise _refusal(f"reading {op.path}", error) from error


def _is_there(device: str) -> bool:
    return (ROOT / "net/ipv4/conf" / device).exists()


def _with(op: Sysctl, value: str) -> Sysctl:
    return Sysctl(path=op.path, value=value, keep=op.keep, device=op.device)


def _refuse_without_ipv6(op: Sysctl) -> None:
    wants = op.path == FORWARDING6 or (
        op.path.endswith("/disable_ipv6") and op.value == "0"
    )
    everywhere = Sysctl(path="net/ipv6/conf/all/disable_ipv6", value="1")
    if wants and _read(everywhere) == "1":
        raise KernelError(
            f"setting {op.path} to {op.value} failed: IPv6 is off on this host "
            "(net.ipv6.conf.all.disable_ipv6 = 1); set it to 0, or leave out IPv6"
        )


def _refusal(what: str, error: OSError) -> KernelError:
    return refusal(what, error.errno or 0, error.strerror or "")
