"""Fixtures of the tests on a real dockerd: scenes that clean up after themselves."""

from collections.abc import Iterator

import pytest

from cnmdriver.lab.host import Host
from tests.dockerd.tools import Scene, accepts, eventually, left_of_pynet


@pytest.fixture(scope="module")
def clean_host(host: Host) -> Iterator[Host]:
    """Return the shared host; after the module nothing of pynet may be left on it."""
    before = accepts(host)
    yield host
    # An audit that runs beside the last removal may need another turn.
    eventually(lambda: not left_of_pynet(host))
    assert left_of_pynet(host) == []
    assert accepts(host) == before


@pytest.fixture
def scene(clean_host: Host) -> Iterator[Scene]:
    """Return a scene of the test's own on the shared host."""
    with Scene(clean_host) as made:
        yield made


@pytest.fixture(scope="module")
def stage(clean_host: Host) -> Iterator[Scene]:
    """Return a scene that a module's tests share; they leave it as it is."""
    with Scene(clean_host) as made:
        yield made
