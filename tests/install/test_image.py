"""The image runs as the head of its Dockerfile says, on a real dockerd."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import Cluster, left, nothing_is_left
from tests.dockerd.tools import eventually
from tests.faults.streams import Traffic
from tests.install.image import NAME, SLOW, command, commands

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab], image: Path) -> Lab:
    """Return a host and an etcd member; pynet runs as a container."""
    lab = make_module_lab(1, etcd=1, serve=False)
    host = lab.hosts[0]
    host.docker("load", "-i", str(image), timeout=SLOW)
    for line in commands():
        if line.startswith("mkdir"):
            host.exec("sh", "-c", line)
    run(host)
    return lab


@pytest.fixture
def cluster(lab: Lab) -> Iterator[Cluster]:
    """Return the host; after the test nothing is left."""
    with Cluster(lab) as made:
        yield made
    assert nothing_is_left(made), left(made)


def run(host: Host) -> None:
    """Run the image as its Dockerfile says, on the lab's etcd."""
    store = f"PYNET_STORE=etcd://{','.join(host.software.endpoints)}"
    line = command("docker run").removesuffix(NAME)
    host.exec("sh", "-c", f"{line} --env {store} {NAME}")
    assert eventually(host.pynet_answers, 60.0), host.docker("logs", NAME).stderr


def test_it_is_small_and_has_no_more_rights_than_the_service(lab: Lab) -> None:
    """The image has nothing but what runs; its process has the unit's capabilities."""
    host = lab.hosts[0]
    size = int(host.docker("image", "inspect", "-f", "{{.Size}}", NAME).stdout)
    assert size < 200e6
    inside = host.docker("exec", NAME, "cat", "/proc/self/status").stdout
    rights = next(line for line in inside.splitlines() if line.startswith("CapBnd"))
    assert int(rights.split()[1], 16) == 1 << 10 | 1 << 12 | 1 << 13 | 1 << 21
    listing = ("sh", "-c", "ls /opt/pynet/lib/python*/site-packages")
    packages = host.docker("exec", NAME, *listing).stdout.split()
    assert "cnmdriver" in packages
    assert "pytest" not in packages


@pytest.mark.parametrize("mode", ["overlay", "bridge"])
def test_traffic_does_not_depend_on_the_container(cluster: Cluster, mode: str) -> None:
    """
    Networks work, and go on while pynet's container restarts and is replaced.

    1. Two containers on a network, one with a published port.
    2. pynet's container is restarted, then removed and run again; a third container
       starts after each.

    Result: no packet is lost, all reach each other, and all of it goes.
    """
    scene = cluster.scenes[0]
    host = scene.host
    name = cluster.network("-o", f"pynet.mode={mode}")
    web, client = scene.run(name, "-p", "8080:80"), scene.run(name)
    scene.serve(web, 80)
    with Traffic() as traffic:
        traffic.ping(client, web.ip(), "v4")
        traffic.ping(client, web.ip6(), "v6")
        with traffic.unharmed():
            host.docker("restart", NAME)
            assert eventually(host.pynet_answers, 60.0)
            assert scene.run(name).pings(web.ip())
            host.docker("stop", NAME)
            host.docker("rm", NAME)
            run(host)
            assert scene.run(name).pings(web.ip())
    assert scene.outside.tcp(str(host.address4), 8080) is not None
    status = host.docker("exec", NAME, "pynet", "status", check=False)
    assert status.returncode == 0, status.stdout
