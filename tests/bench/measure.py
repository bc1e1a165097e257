"""
Rows of the benchmark: what is measured, and how it is shown.

A row is a function that returns lines, each with the samples of some columns. What is
compared takes turns, so that what else the machine does meets all of it. A row that
fails says why, and the others go on.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

Samples = list[float]


@dataclass(slots=True, kw_only=True)
class Line:
    """A line of the table: samples of some columns, in one unit."""

    name: str
    unit: str = "ms"
    columns: dict[str, Samples] = field(default_factory=lambda: defaultdict(list))
    against: str = ""
    """The column that the ratios are to; none, if it is empty."""
    target: str = ""
    note: str = ""

    @contextmanager
    def timed(self, column: str) -> Iterator[None]:
        """Add the milliseconds that the block takes."""
        begin = time.perf_counter()
        yield
        self.columns[column].append((time.perf_counter() - begin) * 1000)

    def add(self, column: str, *samples: float) -> None:
        """Add samples."""
        self.columns[column] += samples

    def middle(self, column: str) -> float:
        """Return a column's median."""
        return statistics.median(self.columns[column])

    def ratio(self, column: str) -> float | None:
        """Return a column's median in the terms of the one it is compared with."""
        if self.against in {"", column} or not self.columns.get(self.against):
            return None
        base = self.middle(self.against)
        return self.middle(column) / base if base else None

    def text(self) -> Iterator[str]:
        """Yield the table's lines."""
        label = f"{self.name}, {self.unit}"
        for column, samples in self.columns.items():
            if not samples:
                continue
            ratio = self.ratio(column)
            low, high = quartiles(samples)
            yield (
                f"{label:46} {column:22} {self.middle(column):10.4g}"
                f"  {low:9.4g} - {high:<9.4g} {len(samples):4}"
                f" {'' if ratio is None else f'{ratio:6.2f}':>6}"
                f"  {'' if ratio is None and self.against else self.target}"
            )
            label = ""
        if self.note:
            yield f"{'':46} {self.note}"

    def data(self) -> dict[str, Any]:
        """Return all of it for a file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "against": self.against,
            "target": self.target,
            "note": self.note,
            "columns": {
                column: {
                    "median": self.middle(column),
                    "quartiles": quartiles(samples),
                    "ratio": self.ratio(column),
                    "samples": samples,
                }
                for column, samples in self.columns.items()
                if samples
            },
        }


def quartiles(samples: Samples) -> tuple[float, float]:
    """Return the values between which half of the samples lie."""
    if len(samples) < 2:
        return (samples[0], samples[0])
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A part of the benchmark that can be run alone."""

    name: str
    run: Callable[[Any], list[Line]]
    quick: bool


ROWS: dict[str, Row] = {}


def row(*, quick: bool = True) -> Callable[[Callable[[Any], list[Line]]], Any]:
    """Register a row under its function's name; `quick` ones are in the short run."""

    def register(run: Callable[[Any], list[Line]]) -> Callable[[Any], list[Line]]:
        name = run.__name__.replace("_", "-")
        ROWS[name] = Row(name=name, run=run, quick=quick)
        return run

    return register


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{len(cpu)} x {cpu[0] if cpu else platform.machine()}",
        "load": Path("/proc/loadavg").read_text().split()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pynet": version("cnmdriver"),
    }


def play(rows: list[Row], context: Any, file: Path) -> int:
    """Run rows, show each when it is done, and keep all; return how many failed."""
    about = machine() | {"docker": context.docker_version()}
    print(", ".join(f"{name} {text}" for name, text in about.items()))
    head = ("what", "", "median", "half of them between", "n", "ratio", "target")
    print("{:46} {:22} {:>10}  {:>21} {:>4} {:>6}  {}".format(*head), flush=True)
    lines: list[Line] = []
    failed: dict[str, str] = {}
    for one in rows:
        begin = time.monotonic()
        try:
            found = one.run(context)
        except Exception as last:  # noqa: BLE001
            error: BaseException = last
            while error.__context__ is not None:
                # What went wrong first, not what tidying up met then.
                error = error.__context__
            failed[one.name] = f"{type(error).__name__}: {error}"
            print(f"{one.name:46} not measured: {failed[one.name]}", flush=True)
            context.start_over()
            continue
        lines += found
        print(*(text for line in found for text in line.text()), sep="\n", flush=True)
        print(f"  {one.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {"about": about, "lines": [line.data() for line in lines], "failed": failed}
    file.write_text(json.dumps(kept, indent=1))
    print(f"kept in {file}")
    return len(failed)


def available(program: str) -> None:
    """Raise FileNotFoundError if a program is not installed."""
    subprocess.run([program, "--version"], check=True, capture_output=True)
