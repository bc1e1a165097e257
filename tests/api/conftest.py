"""Fixtures of the API tests: a served application over fake drivers."""

import pytest
import structlog

from cnmdriver.api.app import application
from tests.api.client import serving
from tests.api.fakes import FakeIpam, FakeNetworks


@pytest.fixture
def networks():
    """Make a fake network driver; the fake IPAM driver notes its calls there too."""
    return FakeNetworks()


@pytest.fixture
def handshakes():
    """Make the list that grows by one with each handshake."""
    return []


@pytest.fixture
async def docker(networks, handshakes, tmp_path):
    """Serve on the fake drivers, with 0.5 s for a call."""
    app = application(
        networks,
        FakeIpam(networks),
        on_handshake=lambda: handshakes.append(1),
        limit=0.5,
    )
    async with serving(app, tmp_path / "pynet.sock") as client:
        yield client


@pytest.fixture
def logged():
    """Catch the log lines of the test."""
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as lines:
        yield lines
