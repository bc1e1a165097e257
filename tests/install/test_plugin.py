"""The managed plugin: made, set, used, replaced and removed on a real dockerd."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from tests.dockerd.cluster import census, etcdctl
from tests.dockerd.tools import Container, eventually
from tests.faults.streams import Traffic
from tests.install.image import NAME as IMAGE
from tests.install.plugins import (
    NAME,
    PluginScene,
    create,
    enable,
    load,
    mounts,
    processes,
    pynet,
    remove,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.dockerd,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
RIGHTS = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 21
SUBNET = ("--ipam-driver", NAME, "--subnet", "10.120.0.0/24")
PLAIN = ("-o", "pynet.mode=bridge", "--subnet", "10.121.0.0/24")


@pytest.fixture(scope="module")
def lab(make_module_lab: Callable[..., Lab], image: Path) -> Lab:
    """Return a host that has the image, and an etcd member."""
    lab = make_module_lab(1, etcd=1, serve=False)
    load(lab, image)
    return lab


@pytest.fixture
def scene(lab: Lab) -> Iterator[PluginScene]:
    """Return a scene on the host; after the test it has no network."""
    with PluginScene(lab.hosts[0]) as made:
        yield made


def daemon(host: Host) -> str:
    """Return the process id that the plugin's daemon has on the host."""
    return host.exec("pgrep", "-f", "pynet serve$").stdout.split()[-1]


def test_the_life_of_a_plugin(lab: Lab, scene: PluginScene) -> None:
    """
    A plugin can be made, set, used, replaced under traffic, and removed.

    1. It is built, set and enabled; its daemon has the unit's capabilities.
    2. An overlay and a bridge network, two containers on each, published ports; one is
       connected to both for a while.
    3. It cannot be disabled, nor set, while networks use it.
    4. Its process is killed; then it is disabled by force, removed, built and enabled
       again, under traffic.
    5. The host loses its power: containers that shall restart come back by themselves.
    6. Networks and plugin are removed.

    Result: all is reached throughout, no packet is lost while the plugin is away, and
    at the end neither mounts, processes nor devices are left.
    """
    host = scene.host
    before = mounts(host)
    create(host)
    enable(host, "PYNET_LOG_LEVEL=debug")
    status = host.exec("cat", f"/proc/{daemon(host)}/status").stdout.splitlines()
    shown = next(line for line in status if line.startswith("CapEff"))
    assert int(shown.split()[1], 16) == RIGHTS

    refused = scene.refused_network()
    assert f"docker network create -d {NAME} --ipam-driver {NAME}" in refused
    wide, plain = scene.network(*SUBNET), scene.network(*PLAIN)
    web = scene.run(wide, "-p", "8080:80", "--restart=always")
    near = scene.run(plain, "-p", "8081:80", "--restart=always")
    clients = [scene.run(wide), scene.run(plain)]
    scene.serve(web, 80)
    reaches(scene, web, clients[0], 8080)
    host.docker("network", "connect", wide, clients[1].name)
    assert clients[1].pings(web.ip())
    host.docker("network", "disconnect", wide, clients[1].name)

    done = host.docker("plugin", "disable", NAME, check=False)
    assert "in use" in done.stderr
    done = host.docker("plugin", "set", NAME, "PYNET_AUDIT=10", check=False)
    assert done.returncode != 0

    with Traffic() as traffic:
        traffic.ping(clients[0], web.ip(), "overlay")
        traffic.ping(clients[1], near.ip(), "bridge")
        with traffic.unharmed():
            killed = host.socket(f"/proc/{daemon(host)}")
            host.exec("kill", "-KILL", killed.name)
            assert eventually(lambda: not killed.exists() and processes(host), 60.0)
            remove(host)
            assert processes(host) == []
            create(host)
            enable(host)
            assert scene.run(wide).pings(web.ip())
    reaches(scene, web, clients[0], 8080)
    found = json.loads(pynet(host, "status", "--json"))
    assert found["well"], found
    asking = ("--volume=/run/pynet:/run/pynet", "--entrypoint=pynet", IMAGE)
    said = host.docker("run", "--rm", *asking, "status")
    assert said.stdout.startswith("pynet   well")

    host.power_cut()
    host.power_on()
    for box, port in ((web, 8080), (near, 8081)):
        assert eventually(lambda box=box: box.look().state["State"]["Running"], 60.0)
        scene.serve(box, 80)
        assert scene.outside.tcp(str(host.address4), port) is not None

    scene.close()
    assert eventually(lambda: not census(host), 20.0), census(host)
    remove(host)
    assert processes(host) == []
    assert mounts(host) == before
    assert "members/" not in etcdctl(lab, "get", "--prefix", "/pynet/v1/").stdout


def reaches(scene: PluginScene, web: Container, client: Container, port: int) -> None:
    """Assert that a container is reached by another and from outside."""
    assert client.pings(web.ip())
    assert scene.outside.tcp(str(scene.host.address4), port) is not None
