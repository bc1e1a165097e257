"""
Two rules in DOCKER-USER that let traffic of our devices pass the host's FORWARD chain.

Of all chains at a hook each can drop, so an accept in our own table cannot override a
host whose FORWARD has policy DROP, which is what Docker makes. The devices are known by
their link group.

The host may use iptables on nftables or the legacy tables, or still have the latter
from earlier. The rules go where FORWARD can stop us: with the `iptables` on PATH, which
is dockerd's, and in legacy tables that are there.
"""

import asyncio
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cnmdriver.dataplane.handler import Undo, only
from cnmdriver.dataplane.nft import Nft
from cnmdriver.errors import KernelError
from cnmdriver.plan.ops import GROUP, Accept, Plan

BOUND = 6.0
"""Seconds one process may take: it waits up to 5 for the lock of the tables."""

CHAIN = "DOCKER-USER"
COMMENT = "pynet"
SIDES = ("--src-group", "--dst-group")
MARKED = ("-m", "comment", "--comment", COMMENT)
JUMP = ("FORWARD", *MARKED, "-j", CHAIN)

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a filter table has of what concerns us."""

    chain: bool
    jump: bool
    own_jump: bool
    sides: frozenset[str]
    others: bool
    """Whether somebody else has rules in the chain or jumps to it."""

    @property
    def whole(self) -> bool:
        """Tell whether traffic passes."""
        return self.chain and self.jump and self.sides == frozenset(SIDES)

    @property
    def any_own(self) -> bool:
        """Tell whether anything here is ours."""
        return self.own_jump or bool(self.sides)


class Accepts:
    """Keeps our rules in the host's filter tables."""

    together = False

    def __init__(self, nft: Nft) -> None:
        self._nft = nft

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Insert what is missing of chain, rules and jump, in every table."""
        for op in only(ops, Accept):
            for tool in await self._tools(op.version):
                await _insert(tool, await _rules(tool), undo)

    async def clear(self, ops: Plan) -> None:
        """Delete our rules and jump, and the chain if nobody else uses it."""
        for op in only(ops, Accept):
            for tool in await self._tools(op.version):
                await _delete(tool, await _rules(tool))

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """
        Return the versions whose rules stand.

        A wanted one counts when nothing is missing, thus also where no table could stop
        us; another one as soon as anything of ours is left.
        """
        del devices
        found = []
        for version in (4, 6):
            op = Accept(version=version)
            rules = [await _rules(tool) for tool in await self._tools(version)]
            whole = all(r.whole for r in rules)
            if whole if op in wanted else any(r.any_own for r in rules):
                found.append(op)
        return tuple(found)

    async def listings(self) -> tuple[tuple[str, str], ...]:
        """Return the programs whose tables can stop traffic, and what each lists."""
        tools = [tool for v in (4, 6) for tool in await self._tools(v)]
        return tuple([(tool, await _run(tool, "-S")) for tool in tools])

    async def _tools(self, version: int) -> tuple[str, ...]:
        """Return the programs whose tables can stop our traffic."""
        name = "iptables" if version == 4 else "ip6tables"
        program = shutil.which(name)
        if program is None:
            return ()
        legacy = _legacy_tables(version)
        if not _is_nft(program):
            return (name,) if version == 4 or legacy else ()
        # A chain for IPv4 is made before dockerd starts, which then adopts it. For IPv6
        # dockerd may never touch the table, and none is made.
        forward = version == 4 or await self._nft.has_chain("ip6", "filter", "FORWARD")
        others = legacy and shutil.which(f"{name}-legacy")
        return (*([name] if forward else []), *([f"{name}-legacy"] if others else []))


async def _rules(tool: str) -> Rules:
    """Read what the filter table of a tool has."""
    text = await _run(tool, "-S")
    lines = [_words(line) for line in text.splitlines()]
    jumps = [
        line
        for line in lines
        if line[:2] == ("-A", "FORWARD") and line[-2:] == ("-j", CHAIN)
    ]
    own = sum(line[2:-2] == MARKED for line in jumps)
    used = [line for line in lines if line[:1] == ("-A",) and CHAIN in line]
    sides = [side for line in lines for side in _side(line)]
    return Rules(
        chain=("-N", CHAIN) in lines,
        jump=any(set(line[2:-2]) <= set(MARKED) for line in jumps),
        own_jump=own > 0,
        sides=frozenset(sides),
        # What is there twice keeps the chain as well: one of each is deleted.
        others=len(used) > (own > 0) + len(frozenset(sides)),
    )


def _side(line: Words) -> Iterator[str]:
    """Yield which of our two rules a line is, if it is one."""
    match line:
        case ("-A", chain, "-m", "devgroup", side, group, *rest) if (
            chain == CHAIN and tuple(rest) == (*MARKED, "-j", "ACCEPT")
        ):
            if side in SIDES and group in {str(GROUP), hex(GROUP)}:
                yield side


def _rule(side: str) -> Words:
    return (CHAIN, "-m", "devgroup", side, hex(GROUP), *MARKED, "-j", "ACCEPT")


async def _insert(tool: str, rules: Rules, undo: Undo) -> None:
    missing = [side for side in SIDES if side not in rules.sides]
    words: list[Words] = [] if rules.chain else [("-N", CHAIN)]
    words += [("-I", *_rule(side)) for side in missing]
    words += [] if rules.jump else [("-I", *JUMP)]
    back: list[Words] = [] if rules.jump else [("-D", *JUMP)]
    back += [("-D", *_rule(side)) for side in missing]
    back += [] if rules.chain else [("-X", CHAIN)]

    async def take_back() -> None:
        await _batch(tool, back)

    if words:
        await _batch(tool, words)
        undo.append(take_back)


async def _delete(tool: str, rules: Rules, *, again: bool = True) -> None:
    words: list[Words] = [("-D", *_rule(side)) for side in rules.sides]
    words += [("-D", *JUMP)] if rules.own_jump else []
    if not words:
        return
    if not rules.others:
        words.append(("-X", CHAIN))
    try:
        await _batch(tool, words)
    except KernelError:
        now = await _rules(tool)
        if now == rules or not again:
            raise
        # Somebody was at it too: what is left of ours goes, all else may stay.
        await _delete(tool, replace(now, others=True), again=False)


async def _batch(tool: str, commands: Iterable[Words]) -> None:
    """Run some commands as one change: the kernel waits some 16 ms for each."""
    lines = ("*filter", *map(" ".join, commands), "COMMIT", "")
    await _run(f"{tool}-restore", "--noflush", text="\n".join(lines))


def _legacy_tables(version: int) -> bool:
    """Tell whether the kernel has a legacy filter table in this namespace."""
    name = "ip_tables_names" if version == 4 else "ip6_tables_names"
    try:
        names = Path("/proc/thread-self/net", name).read_text(encoding="ascii")
    except OSError:
        return False
    return "filter" in names.split()


def _is_nft(program: str) -> bool:
    """Tell whether a program works on nftables, by the binary its links lead to."""
    return "legacy" not in os.path.realpath(program)


async def _run(tool: str, *words: str, text: str = "") -> str:
    what = shlex.join((tool, *words))
    try:
        process = await asyncio.create_subprocess_exec(
            *(tool, "-w", "5", *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise KernelError(f"{what} failed: {error.strerror}; install it") from error
    try:
        async with asyncio.timeout(BOUND):
            out, err = await process.communicate(text.encode())
    except TimeoutError as error:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise KernelError(
            f"{what} failed: it took more than {BOUND:g} s; look for a process that "
            "holds the lock of the tables"
        ) from error
    if process.returncode != 0:
        raise KernelError(f"{what} failed: {_said(err)}")
    return out.decode(errors="replace")


def _words(line: str) -> tuple[str, ...]:
    """Read a line; one of a rule whose comment goes on in the next is none of ours."""
    try:
        return tuple(shlex.split(line))
    except ValueError:
        return ()


def _said(error: bytes) -> str:
    lines = [
        line
        for line in error.decode(errors="replace").splitlines()
        if line and not line.startswith(("#", "Try "))
    ]
    return lines[0] if lines else "it did not say why"
