"""Every recorded conversation of both Dockers, replayed against the whole driver."""

import pytest

from cnmdriver.api.app import application
from tests.api.client import serving
from tests.api.replay import DEVIATIONS, TRANSCRIPTS, Door, Session, expected, load
from tests.fakes import rig

FILES = sorted(
    str(path.relative_to(TRANSCRIPTS)) for path in TRANSCRIPTS.glob("*/*.jsonl")
)


@pytest.mark.parametrize("file", FILES)
async def test_recorded_session_goes_as_docker_expects(file, tmp_path):
    """Each call has the outcome Docker goes on with; nothing is left in the end."""
    async with rig(tmp_path) as driver:
        doors = Door(driver.networks), Door(driver.ipam)
        async with serving(application(*doors), tmp_path / "pynet.sock") as docker:
            session = Session(file, docker, doors)
            await session.replay(load(file))
            await session.finish()
        assert driver.records == []
        assert driver.kernel.left == []


@pytest.mark.parametrize("row", DEVIATIONS, ids=lambda row: row.reason)
def test_every_deviation_is_of_use(row):
    """A deviation that no recorded call needs is to be deleted."""
    found = [expected(file, call)[1] for file in FILES for call in load(file)]
    assert row in found
