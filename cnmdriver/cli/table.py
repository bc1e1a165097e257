"""Tables for people."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDTH = 80


def show(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """
    Print a table; columns with names in lower case are numbers.

    A pipe gets every row on one line, however long, so that grep finds it whole.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        justify = "right" if name.islower() else "left"
        table.add_column(name.upper(), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        wide = Console(file=sys.stdout, width=10_000)
        needed = Measurement.get(wide, wide.options, table).maximum
        console = Console(file=sys.stdout, width=max(WIDTH, needed), highlight=False)
    console.print(table)


def clean(text: str) -> str:
    """Take out of a user's text what would move the cursor; keep line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def short(identity: str) -> str:
    """Shorten an id as Docker does."""
    return identity[:12]
