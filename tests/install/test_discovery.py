"""The discovery files lead a real dockerd to the daemon."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnmdriver.lab.lab import Lab
from tests.dockerd.tools import eventually, program
from tests.install.image import ROOT

pytestmark = [pytest.mark.root, pytest.mark.dockerd, pytest.mark.timeout(120)]
ELSEWHERE = "/run/pynet/elsewhere.sock"
USUAL = "unix:///run/docker/plugins/pynet.sock"


@pytest.mark.parametrize("name", ["pynet.spec", "pynet.json"])
def test_a_driver_by_its_file(make_lab: Callable[..., Lab], name: str) -> None:
    """
    A daemon that listens elsewhere is found by its file, under the file's name.

    1. pynet runs with another --socket; the file says that, under another name.
    2. A network of that driver is made, a container on it, and both are removed.

    Result: it works as it does without a file.
    """
    host = make_lab(serve=False).hosts[0]
    text = (ROOT / "plugin-spec" / name).read_text()
    assert USUAL in text
    other = f"/etc/docker/plugins/elsewhere{Path(name).suffix}"
    host.exec("mkdir", "-p", "/etc/docker/plugins")
    host.exec("tee", other, input=text.replace(USUAL, f"unix://{ELSEWHERE}"))
    argv = (sys.executable, "-m", "cnmdriver", "serve", "--socket", ELSEWHERE)
    with program(host, *argv):
        assert eventually(host.socket(ELSEWHERE).exists, 30.0)
        host.docker("network", "create", "-d", "elsewhere", "blue")
        host.docker("run", "--rm", "--network=blue", "busybox", "true")
        assert eventually(
            lambda: '"blue"' in host.pynet("network", "ls", "--json").stdout
        )
        host.docker("network", "rm", "blue")
