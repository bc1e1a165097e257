"""
Mutation testing: for each small change of the code a test should fail.

`python tests/mutate.py [PATTERN…]` changes the modules that pyproject.toml names, or of
these changes only those whose names match, each alone, and runs the tests that reach
it. It prints the survivors, which no test noticed, and each module's score; `mutmut
show NAME` prints what was changed. The exit code is 0 if every change was tried.
"""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

MUTMUT = Path(sys.executable).with_name("mutmut")
KILLED = {"killed", "timeout", "segfault", "caught by type check"}
"""A change that makes a test hang is noticed as well."""
OUTSIDE = {"not checked", "skipped", "check was interrupted by user"}
"""Changes that were not tried, or not to the end."""


def main(patterns: Sequence[str]) -> int:
    """Try all changes, and tell; return the exit code."""
    begin = time.monotonic()
    os.nice(10)
    # Verdicts of an earlier run are of other tests.
    shutil.rmtree("mutants", ignore_errors=True)
    code = subprocess.run(
        [MUTMUT, "run", *workers(), *patterns], check=False
    ).returncode
    listed = subprocess.run(
        [MUTMUT, "results", "--all", "true"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    tried = [(n, s) for n, s in read(listed) if s not in OUTSIDE]
    for name, status in sorted(tried):
        if status not in KILLED:
            print(f"{status:10} {name}")
    report(tried)
    print(f"{time.monotonic() - begin:.0f} seconds")
    return code or int(not tried)


def workers() -> tuple[str, ...]:
    """Leave the number of processes to mutmut, unless the environment says."""
    number = os.environ.get("MUTATE_WORKERS")
    return ("--max-children", number) if number else ()


def read(listed: str) -> Iterable[tuple[str, str]]:
    """Yield the name of each change and what became of it."""
    for line in listed.splitlines():
        name, colon, status = line.strip().rpartition(": ")
        if colon and "__mutmut_" in name:
            yield name, status


def report(tried: Iterable[tuple[str, str]]) -> None:
    """Print each module's score."""
    modules: dict[str, Counter[bool]] = defaultdict(Counter)
    for name, status in tried:
        module = name.rpartition(".")[0]
        modules[module][status in KILLED] += 1
        modules["all"][status in KILLED] += 1
    width = max(map(len, modules), default=0)
    print(f"\n{'module':{width}}  changes  survived  score")
    for module in sorted(modules, key=lambda name: (name == "all", name)):
        killed, survived = modules[module][True], modules[module][False]
        score = killed / (killed + survived)
        print(f"{module:{width}}  {killed + survived:7}  {survived:8}  {score:5.1%}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
