"""What a chaos run has counted and found wrong, and how it is told."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

DUPLICATES = "duplicates"
LEAKS = "leaks"
MANUAL = "manual steps"
WRONG = "violations"
FINDINGS = (DUPLICATES, LEAKS, MANUAL, WRONG)
BUG = "internal error"
UNKNOWN = "unknown"
REFUSALS = (
    (BUG, r"internal error"),
    ("dockerd is away", r"^docker does not answer"),
    ("pynet is away", r"pynet\.sock|plugin .?pynet.? not found|: EOF$|reset by peer"),
    ("its call broke off", r"its body is empty, as Docker repeats a call"),
    ("kernel too slow", r"did not answer within|it took more than"),
    ("address taken", r"is taken by .*choose another|lies in block"),
    ("no free address", r"has no free address"),
    ("port taken", r"already allocated|host port|port .* is taken by pynet"),
    ("store is away", r"\bstore\b|\betcd\b|no member of .* did it"),
    ("network has no member here", r"network \S+ is not known here"),
    ("endpoint unknown", r"endpoint \S+ is not known on network"),
    (
        "docker's own",
        (
            r"no such container|is not running|already in progress|marked for removal"
            r"|already exists in network|is not connected|already in use by container"
            r"|not running|context canceled|already attached|not receive an exit event"
            r"|task \w+: already exists|userland proxy: .* address already in use"
            r"|failed to start shim: mkdir \S+: file exists|transport is closing"
            # Killed as it had set a default route and not yet written that down: seen
            # with its own bridges too, in one of 80 kills. From then on it takes an
            # interface in the container for another, or for none.
            r"|failed to set gateway while updating gateway: file exists"
            r"|failed to add interface \S+ to sandbox: error renaming interface"
            r"|endpoint join on GW Network failed: failed to add interface"
        ),
    ),
)
"""Why a command of a user may be refused, by words of its text; the first counts."""
IN_PEACE = {"address taken", "no free address", "port taken", "docker's own"}


def refusal(text: str) -> str:
    """Return what kind of refusal a text is."""
    for kind, pattern in REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            return kind
    return UNKNOWN


@dataclass(slots=True, kw_only=True)
class Notes:
    """Numbers and findings; threads may write at once."""

    seed: int
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in FINDINGS}
    )
    say: Callable[[str], None] = print
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, table: str, what: str, by: int = 1) -> None:
        """Count something in `faults`, `kills`, `commands` or `refusals`."""
        if by:
            with self.lock:
                getattr(self, table)[what] += by

    def find(self, kind: str, text: str) -> None:
        """Note something that must not be."""
        with self.lock:
            self.findings[kind].append(text)
            self.say(f"{kind}: {text}")

    def refuse(self, command: str, text: str, *, peace: bool = False) -> None:
        """
        Note a refused command; one that nobody could explain is a finding.

        In peace, when all faults are over, there are fewer explanations.
        """
        kind = refusal(text)
        self.count("commands", "refused")
        self.count("refusals", kind)
        if kind in {BUG, UNKNOWN} or (peace and kind not in IN_PEACE):
            self.find(WRONG, f"{command}: refused with: {text}")

    @property
    def well(self) -> bool:
        """Whether nothing was found wrong."""
        return not any(self.findings.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all as JSON's types."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "well": self.well,
            "faults": dict(self.faults),
            "kills": dict(self.kills),
            "commands": dict(self.commands),
            "refusals": dict(self.refusals),
            "findings": self.findings,
        }

    def summary(self) -> Iterator[str]:
        """Yield the table that ends a run, and each finding with its facts."""
        yield f"{'seed':<22}{self.seed}"
        yield f"{'seconds':<22}{self.seconds:.0f}"
        for name in ("faults", "kills", "commands", "refusals"):
            table: Counter[str] = getattr(self, name)
            yield f"{name:<22}{table.total() if name != 'commands' else ''}".rstrip()
            yield from (f"  {what:<34}{n:>6}" for what, n in table.most_common())
        yield from (f"{name:<22}{len(self.findings[name])}" for name in FINDINGS)
        for name in FINDINGS:
            for number, text in enumerate(self.findings[name], 1):
                yield ""
                yield f"{name} {number}: {text}"
