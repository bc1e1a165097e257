"""The scripts that make a lab of virtual machines, run on machines of our own lab."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnmdriver.lab.host import Host
from cnmdriver.lab.lab import Lab
from cnmdriver.lab.process import Completed
from tests.dockerd.tools import Scene, eventually
from tests.setup.test_install import DEPLOY, PYNET, private_usr_local

VAGRANT = DEPLOY / "vagrant"
ETCD = "set -a; . /etc/default/etcd; exec etcd --data-dir=/var/lib/etcd/lab"


def test_the_vagrantfile_is_ruby():
    """Ruby understands the file, and every script it names is there."""
    path = VAGRANT / "Vagrantfile"
    subprocess.run(["ruby", "-c", str(path)], check=True, capture_output=True)
    named = re.findall(r'path: "(.*?)"', path.read_text())
    assert {VAGRANT / name for name in named} == {*VAGRANT.glob("*.sh")}


@pytest.fixture
def hosts(make_lab: Callable[..., Lab]) -> Iterator[list[Host]]:
    """Return two machines with Docker and nothing of pynet's."""
    lab = make_lab(2, serve=False, daemon=(*PYNET, "serve"))
    for host in lab.hosts:
        private_usr_local(host)
    yield list(lab.hosts)


@pytest.mark.root
@pytest.mark.dockerd
@pytest.mark.etcd
@pytest.mark.timeout(900)
def test_provisioning(hosts: list[Host], wheels: Path) -> None:
    """
    What Vagrant runs makes two hosts of one network, and can be run again.

    1. Each script runs on each machine, as the Vagrantfile has it; etcd and the daemon
       are started by hand, as these machines have no systemd.
    2. All of it runs once more.
    3. A container starts on each host.
    Result: they reach each other.
    """
    first = str(hosts[0].address4)

    def script(host: Host, name: str, *words: str) -> Completed:
        offline = ("PIP_NO_INDEX=1", f"PIP_FIND_LINKS={wheels}")
        argv = ("env", "-u", "PYTHONPATH", *offline, str(VAGRANT / name), *words)
        return host.exec(*argv, timeout=400)

    script(hosts[0], "etcd.sh", first)
    etcd = hosts[0].popen("bash", "-c", ETCD)
    assert eventually(lambda: health(hosts[0], first), 60.0)
    for host in hosts:
        script(host, "docker.sh")
        for _ in range(2):
            script(host, "pynet.sh", str(DEPLOY.parent), first, str(host.address4))
        host.start_pynet()
        for _ in range(2):
            script(host, "network.sh")
    script(hosts[0], "etcd.sh", first)
    (listed,) = {
        host.pynet("host", "ls", "--json").stdout.count('"id"') for host in hosts
    }
    assert listed == 2
    with Scene(hosts[0]) as one, Scene(hosts[1]) as other:
        container, peer = one.run("blue"), other.run("blue")
        assert container.pings(peer.ip("blue"))
        assert peer.pings(container.ip("blue"))
    etcd.kill()
    etcd.communicate()


def health(host: Host, address: str) -> bool:
    """Tell whether etcd serves at an address."""
    words = ("etcdctl", f"--endpoints={address}:2379", "endpoint", "health")
    return host.exec(*words, check=False).returncode == 0
