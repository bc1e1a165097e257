"""
Run every suite, each to its end, and print how long each took.

`python tests/run.py DIRECTORY…` takes the directories that `make check` runs without
root and etcd; of those only the tests that need one are left. Each other directory of tests is a
suite of its own. A test that was skipped counts as failed: markers choose, nothing
skips. Small suites that do not disturb each other share a run, so that no worker waits
for the last test of each. The exit code is 0 only if something passed and nothing failed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

TESTS = Path(__file__).parent
LIMIT = 2700
"""Seconds for one suite."""
WORKERS = 3
SHARING = (
    ("tests/cluster", "tests/lab"),
    ("tests/install", "tests/setup", "tests/web"),
)
"""Suites of which some share a run."""
UNWELL = ("failure", "error", "skipped")
MOST_TEXT = 1500
"""Characters shown of each failure at the end."""
NO_TESTS = 5
"""pytest's exit code when there was nothing to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A command that runs pytest, and its name in the table."""

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a suite ended."""

    name: str
    passed: int
    failed: int
    seconds: float
    failures: tuple[str, ...] = ()
    """Which tests failed, and with what."""


def main(quick: Sequence[str]) -> int:
    """Run all suites; return the exit code."""
    interrupted: list[int] = []
    # Ctrl-C reaches the suite as well, which then cleans up; it must not be left alone.
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    outcomes = []
    for suite in suites(quick):
        outcomes.append(run(suite))
        if interrupted:
            print("interrupted: the other suites were not run")
            break
    report(outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or interrupted or not passed else 0


def suites(quick: Sequence[str]) -> Iterator[Suite]:
    """Yield what there is to run, quick ones first."""
    yield Suite(name="check", argv=("make", "--no-print-directory", "check"))
    if quick:
        rest = ("-m", "root or etcd", *quick)
        yield Suite(name="check, the rest", argv=as_root(*rest))
    found = {str(p.parent.relative_to(TESTS.parent)) for p in TESTS.rglob("test_*.py")}
    every = {
        n for n in found if not any(n == q or n.startswith(f"{q}/") for q in quick)
    }
    alone = every.difference(*SHARING)
    for names in sorted([*SHARING, *((name,) for name in alone)]):
        there = [name for name in names if name in every]
        if there:
            yield Suite(name=", ".join(there), argv=as_root(*there))


def as_root(*arguments: str) -> tuple[str, ...]:
    """Return the command that runs pytest as root, for a limited time."""
    limit = ("timeout", "--foreground", "--signal=INT", "--kill-after=60", str(LIMIT))
    # Half their time these tests wait; each worker has labs of its own.
    parallel = ("-n", str(WORKERS), "--dist", "worksteal", "--durations", "5")
    pytest = (sys.executable, "-m", "pytest", *parallel, *arguments)
    if os.geteuid() == 0:
        return (*limit, *pytest)
    # Root's files must not lie about in another user's directory.
    environment = (
        f"PATH={os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE=1",
        "HYPOTHESIS_STORAGE_DIRECTORY=/var/cache/pynet-tests",
    )
    sudo = ("deploy/as-root", "env", *environment)
    return (*sudo, *limit, *pytest, "-p", "no:cacheprovider")


def run(suite: Suite) -> Outcome:
    """Run a suite, and count."""
    print(f"\n=== {suite.name}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result.xml")
        argv = [*suite.argv]
        environment = dict(os.environ)
        if suite.name == "check":
            environment["PYTEST_ADDOPTS"] = f"--junitxml={result}"
        else:
            argv.append(f"--junitxml={result}")
        code = subprocess.run(argv, env=environment, check=False).returncode
        passed, failures = read(result)
    failed = len(failures)
    if code not in {0, NO_TESTS} and not failed:
        failed = 1
    seconds = time.monotonic() - begin
    return Outcome(
        name=suite.name,
        passed=passed,
        failed=failed,
        seconds=seconds,
        failures=failures,
    )


def read(result: Path) -> tuple[int, tuple[str, ...]]:
    """Return how many tests passed and what the others say, by pytest's own record."""
    if not result.exists():
        return 0, ()
    passed = 0
    failures = []
    for case in ET.parse(result).iter("testcase"):
        bad = [found for kind in UNWELL for found in case.iter(kind)]
        passed += not bad
        where = f"{case.get('classname')}::{case.get('name')}"
        failures += [f"{where}: {reason(found)}" for found in bad]
    return passed, tuple(failures)


def reason(found: ET.Element) -> str:
    """Return what an assertion said, or its end if that is long: there it says why."""
    said = [
        line[1:].strip() for line in (found.text or "").splitlines() if line[:1] == "E"
    ]
    text = "\n".join(said) or found.get("message", "")
    return text if len(text) <= MOST_TEXT else f"[…] {text[-MOST_TEXT:]}"


def report(outcomes: Sequence[Outcome]) -> None:
    """Print what failed, where it can be seen at once, and the table."""
    for outcome in outcomes:
        for failure in outcome.failures:
            print(f"\n=== {outcome.name}, failed: {failure}")
    width = max(len(outcome.name) for outcome in outcomes)
    print(f"\n{'suite':{width}}  passed  failed  seconds")
    for outcome in outcomes:
        print(
            f"{outcome.name:{width}}  {outcome.passed:6}  {outcome.failed:6}"
            f"  {outcome.seconds:7.1f}"
        )
    total = sum(outcome.seconds for outcome in outcomes)
    print(f"{'all':{width}}  {'':6}  {'':6}  {total:7.1f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
