"""Whatever step the daemon dies at, its next life goes on, and nothing is left."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(190)]


def lives(life: str, directory: Path, patience: str) -> list[dict[str, Any]]:
    """Live a life whole, and then once for each step at which it is cut."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel.life", life, str(directory), patience],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    files = sorted(directory.glob("*.json"), key=lambda file: int(file.stem))
    reports = [json.loads(file.read_text()) for file in files]
    whole, *cut = reports
    assert not whole["problem"], whole["problem"]
    assert all(report["problem"] or report["cut"] for report in cut)
    return reports


def wrong(reports: list[dict[str, Any]], **wanted: object) -> list[str]:
    """Name each life that did not end as wanted, by the step at which it was cut."""
    wanted = {"problem": "", "audit": [], "left": [], **wanted}
    return [
        f"life {number}, cut at {report['cut'] or 'none'}: {key} is {report.get(key)}"
        for number, report in enumerate(reports)
        for key, value in wanted.items()
        if report.get(key) != value
    ]


async def test_a_call_made_again_gets_the_same_answer(tmp_path):
    """With all named, each answer is as if nothing had been, and no audit is needed."""
    reports = lives("named", tmp_path, "patient")
    assert len(reports) > 40
    same = {"answers": reports[0]["answers"], "refused": "", "left_by_docker": []}
    assert wrong(reports, **same) == []


async def test_a_call_made_again_in_an_overlay(tmp_path):
    """It succeeds and leaves nothing in pynet's own namespace, nor the namespace."""
    reports = lives("overlaid", tmp_path, "patient")
    assert len(reports) > 60
    assert wrong(reports, refused="", left_by_docker=[]) == []


async def test_a_call_made_again_succeeds(tmp_path):
    """What pynet chose may be chosen anew, but each call succeeds and nothing is left."""
    reports = lives("chosen", tmp_path, "patient")
    assert len(reports) > 60
    assert wrong(reports, refused="") == []


async def test_a_call_given_up_is_rolled_back(tmp_path):
    """Docker takes the cut call for failed and rolls back; then nothing is left."""
    whole, *cut = lives("chosen", tmp_path, "impatient")
    assert wrong([whole], refused="") == []
    assert wrong(cut) == []
    # The host's own rules go after the last answer: no call is cut there.
    called = [report for report in cut if report["cut"] != "clear.accept"]
    assert {report["refused"] != "" for report in called} == {True}
    assert len(called) > 60
