"""What is printed for people: tables, without a frame."""

import sys
from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDTH = 80
WIDEST = 10_000


def show(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """
    Print a table; numbers stand to the right. Without columns it has no head.

    A pipe gets lines as long as they need be, so that grep finds them whole.
    """
    cells = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.show_header = bool(columns)
    for number, name in enumerate(columns or (cells[0] if cells else ())):
        is_number = bool(cells) and all(isinstance(row[number], int) for row in cells)
        table.add_column(
            str(name), justify="right" if is_number else "left", overflow="fold"
        )
    for row in cells:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    place = console(table)
    with place.capture() as printed:
        place.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def console(table: Table) -> Console:
    """Return where to print: a terminal as it is, anything else as wide as needed."""
    found = Console(file=sys.stdout, highlight=False)
    if found.is_terminal:
        return found
    wide = Console(file=sys.stdout, width=WIDEST)
    needed = Measurement.get(wide, wide.options, table).maximum
    return Console(file=sys.stdout, highlight=False, width=max(WIDTH, needed))


def clean(text: str) -> str:
    """Take out of a user's text what would move the cursor; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def short(identity: str) -> str:
    """Shorten an id as Docker does."""
    return identity[:12]
