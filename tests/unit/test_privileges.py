"""Which capabilities are lacking, and what is said of that."""

from pathlib import Path

import pytest

from cnmdriver.privileges import lacking, may_enter

ALL = 0x203400
"""NET_BIND_SERVICE, NET_ADMIN, NET_RAW and SYS_ADMIN (capabilities(7))."""


def status(directory: Path, effective: int) -> Path:
    """Write what the kernel shows of a process with these capabilities."""
    path = directory / "status"
    path.write_text(
        f"Name:\tpynet\nCapPrm:\t{-1 & 2**41 - 1:016x}\nCapEff:\t{effective:016x}\n"
    )
    return path


def test_nothing_is_said_if_all_are_there(tmp_path: Path):
    """With the four capabilities of the unit, nothing is lacking."""
    path = status(tmp_path, ALL)
    assert lacking(path) == ()
    assert may_enter(path)


@pytest.mark.parametrize(
    ("bit", "name", "cost"),
    [
        (12, "CAP_NET_ADMIN", "it can change nothing"),
        (13, "CAP_NET_RAW", "legacy tables"),
        (10, "CAP_NET_BIND_SERVICE", "ports below 1024"),
        (21, "CAP_SYS_ADMIN", "it refuses overlay networks"),
    ],
)
def test_each_is_named_with_what_fails(tmp_path: Path, bit: int, name: str, cost: str):
    """Of a capability that lacks, one sentence tells the name and the cost."""
    path = status(tmp_path, ALL & ~(1 << bit))
    (sentence,) = lacking(path)
    assert name in sentence
    assert cost in sentence
    assert may_enter(path) is (bit != 21)


def test_none_at_all(tmp_path: Path):
    """A process without capabilities lacks all four."""
    assert len(lacking(status(tmp_path, 0))) == 4


@pytest.mark.parametrize("text", [None, "", "Name:\tpynet\n"])
def test_what_cannot_be_read_is_no_reason_to_refuse(tmp_path: Path, text: str | None):
    """Where the kernel does not tell, nothing is said to be lacking."""
    path = tmp_path / "status"
    if text is not None:
        path.write_text(text)
    assert lacking(path) == ()
    assert may_enter(path)
