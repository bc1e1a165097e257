"""Log lines on their way: repeats are held back and counted, the latest are kept."""

import json

import pytest
import structlog

from cnmdriver import daemon
from cnmdriver.logs import LATEST, REMEMBERED, Journal, Repeats
from cnmdriver.settings import Settings


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """Make a clock."""
    return Clock()


@pytest.fixture
def said(clock):
    """Return what lets a line through, or says None."""
    repeats = Repeats(clock)

    def say(event, level="warning", **facts):
        line = {"event": event, "level": level, **facts}
        try:
            return repeats(None, level, {**line, "timestamp": str(clock.now)})
        except structlog.DropEvent:
            return None

    return say


def test_a_day_without_the_store(said, clock):
    """What is said each second of a day is some dozens of lines, and counted."""
    passed = []
    for second in range(86_400):
        clock.now = 1000.0 + second
        line = said("authority.not_published", error=f"no answer in 3.0{second % 10} s")
        if line is not None:
            passed.append((second, line.get("repeated", 0)))
    assert [second for second, _ in passed[:6]] == [0, 1, 2, 62, 182, 422]
    assert [count for _, count in passed[:6]] == [0, 0, 0, 59, 119, 239]
    assert len(passed) < 40
    last, _ = passed[-1]
    assert sum(count + 1 for _, count in passed) == last + 1


def test_other_facts_are_another_thing(said):
    """A line about something else passes; a number in a sentence is nothing else."""
    for _ in range(5):
        said("ipam.lapsed", address="10.1.0.2")
        said("sync.failed", error="took 3.01 s")
    assert said("ipam.lapsed", address="10.1.0.2") is None
    assert said("ipam.lapsed", address="10.1.0.3") is not None
    assert said("sync.failed", error="took 2.99 s") is None
    assert said("sync.failed", error="refused") is not None
    assert said("sync.failed", "error", error="took 2.99 s") is not None


def test_a_silence_makes_it_new(said, clock):
    """After a silence of a minute it is said as often as at first."""
    for _ in range(10):
        said("sync.failed", error="e")
    clock.now += 61
    assert [said("sync.failed", error="e") is not None for _ in range(4)] == [
        True,
        True,
        True,
        False,
    ]


def test_what_ended_is_news_again(said):
    """A store that is away anew after it was back is told of each time."""
    for _ in range(10):
        assert said("store.away", error="e") is not None
        assert said("store.back", "info") is not None


def test_what_is_no_warning_passes(said):
    """Lines of information are never held back."""
    assert all(said("api.call", "info", method="Join") for _ in range(20))


def test_memory_has_a_bound(clock):
    """However many things go wrong, only so many are remembered."""
    repeats = Repeats(clock)
    for number in range(REMEMBERED + 50):
        repeats(None, "warning", {"event": "e", "key": str(number)})
    assert len(repeats.said) == REMEMBERED


def test_the_journal_keeps_the_latest():
    """The latest lines are kept, and who listens is told of each."""
    journal, told = Journal(), []
    journal.listeners.append(lambda: told.append(1))
    for number in range(LATEST + 5):
        line = {"event": "e", "number": number}
        assert journal(None, "info", line) is line
    assert len(told) == LATEST + 5
    assert journal.latest[0]["number"] == 5
    fresh = [line["number"] for line in journal.since(LATEST + 3)]
    assert fresh == [LATEST + 3, LATEST + 4]
    assert journal.since(LATEST + 5) == []
    assert len(journal.since(0)) == LATEST


def test_the_daemons_log_holds_back(capsys):
    """In the daemon's log a repeated warning comes three times, then not."""
    journal = Journal()
    try:
        daemon.configure_logs(Settings(log_format="json"), Repeats(), journal)
        log = structlog.get_logger()
        for _ in range(10):
            log.warning("area.verb", error="e")
    finally:
        structlog.reset_defaults()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["area.verb"] * 3
    assert journal.count == 3
