"""Fixtures of the tests of what is installed: the image, built once."""

import os
from pathlib import Path

import pytest

from tests.install.image import saved


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the image as a tar file."""
    own = tmp_path_factory.getbasetemp()
    # A worker of several has a directory in the one that they share.
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return saved(shared)
