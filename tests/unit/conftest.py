"""A driver over a real store and a fake kernel, and a Docker that calls it."""

import tempfile
from pathlib import Path

import pytest

from tests.fakes import rig
from tests.unit.calls import Docker

MEMORY = Path("/dev/shm")


@pytest.fixture
def directory(tmp_path):
    """Give a directory in memory where that can be: the disk is not on trial here."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        yield Path(path)


@pytest.fixture
async def docker(directory):
    """Play Docker's calls against a driver that has nothing yet."""
    async with rig(directory) as built:
        yield Docker(built)
