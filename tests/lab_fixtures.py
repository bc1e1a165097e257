"""Labs for tests: one that the session shares, and labs of a test's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One host with dockerd and pynet, shared by the session: leave it as found."""
    with Lab.create(tmp_path_factory.mktemp("lab")) as made:
        yield made


@pytest.fixture(scope="session")
def host(lab: Lab) -> Host:
    """Return the shared lab's only host."""
    return lab.hosts[0]


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Return `Lab.create` without its directory, for labs of the test's own, up."""
    with ExitStack() as stack:
        yield _factory(stack, tmp_path)


@pytest.fixture(scope="module")
def make_module_lab(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Lab]]:
    """Return the same as `make_lab`, for labs that a module's tests share."""
    with ExitStack() as stack:
        yield _factory(stack, tmp_path_factory.mktemp("labs"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return a directory for a lab that is taken down whatever happens."""
    directory = tmp_path / "place"
    yield directory
    if (directory / "lab.json").exists():
        Lab.attach(directory).down()


def _factory(stack: ExitStack, directory: Path) -> Callable[..., Lab]:
    def make(hosts: int = 1, **options: object) -> Lab:
        place = directory / f"lab{len(list(directory.iterdir()))}"
        return stack.enter_context(Lab.create(place, hosts, **options))  # type: ignore[arg-type]

    return make
