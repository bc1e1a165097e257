"""What the tests of the installer share."""

from pathlib import Path

import pytest

from tests.setup.wheels import build, fetch


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with pynet's wheel, and all that it needs."""
    directory = tmp_path_factory.mktemp("wheels")
    fetch(directory)
    build(directory)
    return directory
