"""
The nftables table: its text, and the elements of its sets and maps.

libnftables runs inside this process, in the thread of the namespace it is for, at a
fraction of what an `nft` process costs. One run is one transaction.

Elements are made by `create`, which fails where one is there already. Only then is it
asked whether all are, and if not, the table read, to adopt what is identical and to
exchange what differs. Reading first would cost more with every port that is published.
"""

import asyncio
import ctypes
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from cnmdriver.dataplane import conntrack
from cnmdriver.dataplane.handler import BOUND, Undo, only, too_slow
from cnmdriver.dataplane.inside import Inside
from cnmdriver.errors import KernelError
from cnmdriver.model import PROTOCOLS
from cnmdriver.plan.ops import HOST, Element, Key, Op, Plan, Table

LIBRARY = "libnftables.so.1"
JSON = 1 << 4
NAME = "pynet"
"""What a table of ours is called, in whichever family."""
TERSE = 1 << 11
MARK = re.compile(r"text_[0-9a-f]+_(\d+)_(\d+)")
SETS = re.compile(r"^\s*(?:set|map)\s+(\w+)\s*{", re.MULTILINE)
PRINTED = re.compile(r"elements = { (.*) }$", re.MULTILINE)
WORD = re.compile(r"""[\w.:/-]+|"[^\s"{};\\]{1,15}\"""")
"""What a field of an element may be: names of devices come from users."""

Run = asyncio.Future[tuple[bool, str]]
Elements = Mapping[Key, Element]


class Nft:
    """libnftables in a thread, for the namespace that the thread is in."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._context: _Context | None = None

    async def open(self) -> None:
        """Load the library."""
        try:
            self._context = await self._inside.ask(f"loading {LIBRARY}", _Context)
        except OSError as error:
            raise KernelError(
                f"loading {LIBRARY} failed: {error}; install nftables"
            ) from error

    async def close(self) -> None:
        """Let go of the library; a second time does nothing."""
        # Whoever comes after this must not find what is about to be freed.
        context, self._context = self._context, None
        if context is not None:
            # One that hangs is left to itself.
            with suppress(KernelError):
                await self._inside.ask("letting go of the firewall", context.free)

    def start(self, text: str, *, flags: int = 0) -> Run:
        """Hand a transaction to the thread; several run in the order handed over."""
        if self._context is None:
            raise KernelError("the firewall is used before it was opened")
        return self._inside.call(self._context.run, text, flags)

    async def finish(self, what: str, run: Run) -> str:
        """Wait for a transaction, and return what it printed."""
        try:
            async with asyncio.timeout(BOUND):
                done, text = await asyncio.shield(run)
        except TimeoutError as error:
            raise too_slow(what) from error
        if not done:
            raise Refused(f"{what} failed: {_first_line(text)}")
        return text

    async def run(self, what: str, text: str, *, flags: int = 0) -> str:
        """Run a transaction, and return what it printed."""
        return await self.finish(what, self.start(text, flags=flags))

    async def has_chain(self, family: str, table: str, chain: str) -> bool:
        """Tell whether a chain exists, whoever made it."""
        chains = await self.chains(family)
        return (table, chain) in chains

    async def chains(self, family: str) -> frozenset[tuple[str, str]]:
        """Return table and name of all chains of a family."""
        text = await self.run("listing chains", f"list chains {family}", flags=JSON)
        return frozenset(
            (item["chain"]["table"], item["chain"]["name"])
            for item in json.loads(text)["nftables"]
            if "chain" in item and item["chain"]["family"] == family
        )


class Refused(KernelError):
    """nftables would not run a transaction."""


class Firewall:
    """Makes the table and its elements hold."""

    together = True

    def __init__(self, nft: Nft, where: str = HOST) -> None:
        self._nft = nft
        self._where = where
        self._families = ("bridge", "inet") if where == HOST else ("bridge",)
        self._have: dict[Key, Element] = {}
        self._read: set[tuple[str, str]] = set()
        """Family and name of the tables that `_have` is true of."""
        self._new: list[Element] = []
        self._gone: list[Element] = []

    def begin(self) -> None:
        """Begin a plan: what was read for an earlier one may be true no more."""
        self._have = {}
        self._read = set()
        self._new, self._gone = [], []

    async def end(self) -> None:
        """End a plan: connections are looked for once, however many ports changed."""
        await conntrack.forget(self._new, spare=True)
        await conntrack.forget(self._gone)

    async def apply(self, ops: Plan, undo: Undo) -> None:
        """Load what is new of tables and elements, in one transaction."""
        elements = _distinct(only(ops, Element))
        change = _Change()
        for table in only(ops, Table):
            await self._add_table(table, change)
        if not self._read:
            try:
                await self._commit(change.creating(elements.values()), undo)
            except Refused:
                if not change.first and await self._has_all(elements.values()):
                    return
                await self._read_for(elements.values())
                if not self._have:
                    raise
        if self._read:
            await self._read_for(elements.values())
            await self._commit(change.exchanging(elements, self._have), undo)
            self._have.update(elements)

    async def clear(self, ops: Plan) -> None:
        """Remove elements, then tables, in one transaction."""
        elements, tables = _distinct(only(ops, Element)), only(ops, Table)
        if not self._read:
            try:
                await self._commit(_removal(elements.values(), tables), [])
                return
            except Refused:
                pass
        await self._read_for((*elements.values(), *tables))
        here = [op for op in elements.values() if self._have.pop(op.key, None)]
        exist = [t for t in tables if await self._mark(t) is not None]
        await self._commit(_removal(here, exist), [])

    async def found(self, wanted: Plan, devices: Plan) -> Plan:
        """Return the table, if it is there, and all elements."""
        del devices
        tables = {(op.family, op.name) for op in only(wanted, Table)}
        tables |= {(family, NAME) for family in self._families}
        found: list[Op] = []
        for family, name in sorted(tables):
            table = Table(
                where=self._where, family=family, name=name, mark="", text=None
            )
            mark = await self._mark(table)
            if mark is not None:
                elements = (await self._elements(family, name)).values()
                found += [_marked(table, mark), *elements]
        return tuple(found)

    async def drops(self) -> dict[str, int]:
        """
        Count the packets that our tables dropped as nobody may send them, by kind.

        A count begins anew with its table.
        """
        what = "reading the firewall's counters"
        text = await self._nft.run(what, "list counters", flags=JSON)
        listed = (item.get("counter") for item in json.loads(text)["nftables"])
        return {
            counter["name"]: counter["packets"]
            for counter in listed
            if counter and counter["table"] == NAME
        }

    async def ruleset(self) -> str:
        """Return all tables, whoever made them, as JSON; sets without their content."""
        what = "reading the firewall"
        return await self._nft.run(what, "list ruleset", flags=JSON | TERSE)

    async def _mark(self, table: Table) -> str | None:
        """
        Return the mark of the table's text, None if there is no such table.

        It is another one if chains or rules are missing or too many.
        """
        what = f"list table {table.family} {table.name}"
        try:
            # Without the elements, of which there may be many.
            flags = JSON | TERSE
            text = await self._nft.run("reading the firewall", what, flags=flags)
        except Refused:
            return None
        items = json.loads(text)["nftables"]
        names = [item["chain"]["name"] for item in items if "chain" in item]
        rules = sum("rule" in item for item in items)
        mark = next(filter(None, map(MARK.fullmatch, sorted(names))), None)
        if mark is None:
            return ""
        whole = (len(names) - 1, rules) == tuple(map(int, mark.groups()))
        return mark[0] if whole else f"{mark[0]} with {rules} rules"

    async def _add_table(self, table: Table, change: "_Change") -> None:
        """Have the text loaded, if it is not there, with the elements that stay."""
        mark = await self._mark(table)
        if mark == table.mark:
            return
        change.first.append(table.text or "")
        change.back.append(f"delete table {table.family} {table.name}")
        self._read.add((table.family, table.name))
        if mark is None:
            return
        what, place = "reading the firewall", f"{table.family} {table.name}"
        change.back.append(await self._nft.run(what, f"list table {place}"))
        have = await self._elements(table.family, table.name)
        known = set(SETS.findall(table.text or ""))
        kept = {key: op for key, op in have.items() if op.set in known}
        change.first.insert(-1, f"delete table {place}")
        change.first += map(_add, kept.values())
        self._have |= kept

    async def _commit(self, change: "_Change", undo: Undo) -> None:
        if not change.lines:
            return
        run = self._nft.start("\n".join(change.lines))

        async def take_back() -> None:
            # A transaction that was too slow may have been done since.
            try:
                await self._nft.finish("changing the firewall", run)
            except Refused:
                return
            await self._nft.run("restoring the firewall", "\n".join(change.undoing))
            await conntrack.forget(change.new)

        undo.append(take_back)
        await self._nft.finish("changing the firewall", run)
        self._new += change.new
        self._gone += change.gone

    async def _has_all(self, elements: Collection[Element]) -> bool:
        """Tell whether just these elements are there, for less than a listing costs."""
        lines = "\n".join(map(_get, elements))
        try:
            printed = await self._nft.run("reading the firewall", lines)
        except Refused:
            return False
        return PRINTED.findall(printed) == [op.text for op in elements]

    async def _read_for(self, ops: Iterable[Element | Table]) -> None:
        """Read what tables have that elements are for, unless that was done."""
        places = {
            (op.family, op.table if isinstance(op, Element) else op.name) for op in ops
        }
        for family, table in places - self._read:
            self._have.update(await self._elements(family, table))
            self._read.add((family, table))

    async def _elements(self, family: str, table: str) -> Elements:
        try:
            text = await self._nft.run(
                "reading the firewall", f"list table {family} {table}", flags=JSON
            )
        except Refused:
            return {}
        bodies = (
            item.get("set") or item.get("map") for item in json.loads(text)["nftables"]
        )
        return _distinct(
            element for body in bodies if body for element in _parse(body, self._where)
        )


class _Change:
    """A transaction, and the one that takes it back."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.back: list[str] = []
        self.lines: list[str] = []
        self.undoing: list[str] = []
        self.new: tuple[Element, ...] = ()
        self.gone: tuple[Element, ...] = ()

    def creating(self, elements: Iterable[Element]) -> "_Change":
        """Expect that none of the elements is there, nor that the table is new."""
        return self._with(tuple(elements), {}, "create")

    def exchanging(self, elements: Elements, have: Elements) -> "_Change":
        """Leave out what is there and as wanted; the others take its place."""
        new = (op for op in elements.values() if have.get(op.key) != op)
        return self._with(tuple(new), have, "add")

    def _with(self, new: tuple[Element, ...], have: Elements, verb: str) -> "_Change":
        old = [have[op.key] for op in new if op.key in have]
        self.lines = [
            *self.first, *map(_delete, old), *(_add(op, verb) for op in new)
        ]  # fmt: skip
        # A table that is taken back takes its elements along.
        elements = [] if self.back else [*map(_delete, new), *map(_add, old)]
        self.undoing = [*elements, *self.back]
        self.new = new
        return self


def _removal(elements: Iterable[Element], tables: Iterable[Table]) -> _Change:
    change = _Change()
    gone = tuple(elements)
    lines = (f"delete table {t.family} {t.name}" for t in tables)
    change.lines = [*map(_delete, gone), *lines]
    change.gone = gone
    return change


def _distinct(elements: Iterable[Element]) -> dict[Key, Element]:
    return {element.key: element for element in elements}


def _add(op: Element, verb: str = "add") -> str:
    for word in (*op.item, *op.value):
        if not WORD.fullmatch(word):
            raise KernelError(f"adding {word} to the firewall failed: no such word")
    return f"{verb} element {op.family} {op.table} {op.set} {{ {op.text} }}"


def _delete(op: Element) -> str:
    item = " . ".join(op.item)
    return f"delete element {op.family} {op.table} {op.set} {{ {item} }}"


def _get(op: Element) -> str:
    item = " . ".join(op.item)
    return f"get element {op.family} {op.table} {op.set} {{ {item} }}"


def _marked(table: Table, mark: str) -> Table:
    return replace(table, mark=mark, text=None)


def _parse(body: Mapping[str, Any], where: str) -> Iterator[Element]:
    """Yield the elements of a set or map in the spelling of the plans."""
    types = _types(body["type"])
    targets = _types(body.get("map", ()))
    for entry in body.get("elem", ()):
        item, value = entry if targets else (entry, ())
        yield Element(
            where=where,
            family=body["family"],
            table=body["table"],
            set=body["name"],
            item=_spell(item, types, prefixes="interval" in body.get("flags", ())),
            value=_spell(value, targets) if targets else (),
        )


def _types(words: Any) -> tuple[str, ...]:
    return tuple(words.split(" . ")) if isinstance(words, str) else tuple(words)


def _spell(
    item: Any,
    types: tuple[str, ...],
    *,
    prefixes: bool = False,
) -> tuple[str, ...]:
    if isinstance(item, dict) and "elem" in item:
        item = item["elem"]["val"]
    joined = isinstance(item, dict) and "concat" in item
    parts = item["concat"] if joined else [item]
    return tuple(
        _word(part, kind, prefixes=prefixes)
        for part, kind in zip(parts, types, strict=True)
    )


def _word(part: Any, kind: str, *, prefixes: bool) -> str:
    match part, kind:
        case _, "ifname":
            return f'"{part}"'
        case {"prefix": {"addr": address, "len": length}}, _:
            return str(ip_network((address, length)))
        case {"range": [first, last]}, _:
            return f"{first}-{last}"
        case str(), "ipv4_addr" | "ipv6_addr":
            return str(ip_network(part) if prefixes else ip_address(part))
    return _number(part, kind)


def _number(part: Any, kind: str) -> str:
    match part, kind:
        case _, "integer":
            # What is too long for JSON is printed as text, in hex.
            return hex(int(str(part), 0))
        case int(), "inet_proto":
            # Names come from a file that a small system may lack.
            return PROTOCOLS.get(part, str(part))
    return str(part)


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0].removeprefix("Error: ")
    return line[:1].lower() + line[1:] or "nftables did not say why"


class _Context:
    """What libnftables works with; for one thread, in whose namespace it stays."""

    def __init__(self) -> None:
        library = ctypes.CDLL(LIBRARY)
        context, text = ctypes.c_void_p, ctypes.c_char_p
        library.nft_ctx_new.restype = context
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_output_set_flags.argtypes = [context, ctypes.c_uint]
        library.nft_run_cmd_from_buffer.argtypes = [context, text]
        for name in ("free", "buffer_output", "buffer_error"):
            getattr(library, f"nft_ctx_{name}").argtypes = [context]
        for name in ("output", "error"):
            function = getattr(library, f"nft_ctx_get_{name}_buffer")
            function.restype, function.argtypes = text, [context]
        self._library = library
        self._context = library.nft_ctx_new(0)
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)

    def run(self, text: str, flags: int) -> tuple[bool, str]:
        """Run a transaction; return whether it was done, and what it said."""
        library, context = self._library, self._context
        library.nft_ctx_output_set_flags(context, flags)
        done = library.nft_run_cmd_from_buffer(context, text.encode()) == 0
        # Reading a buffer empties it, so both are read.
        printed = library.nft_ctx_get_output_buffer(context)
        refused = library.nft_ctx_get_error_buffer(context)
        return done, (printed if done else refused).decode(errors="replace")

    def free(self) -> None:
        """Give everything back; nothing works after it."""
        self._library.nft_ctx_free(self._context)
