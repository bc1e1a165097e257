"""What the README says about two hosts, typed as it stands there."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from cnmdriver.lab.lab import Lab
from cnmdriver.lab.machine import Machine
from tests.dockerd.tools import Scene, eventually, program
from tests.setup.test_install import DEPLOY
from tests.setup.wheels import fetch_all

ROOT = DEPLOY.parent
FIVE_MINUTES = 300.0


def lines(section: str) -> list[str]:
    """Return the commands of a section, as they are in its blocks."""
    text = (ROOT / "README.md").read_text()
    body = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (\S.*)$", body, re.MULTILINE)


def checkout(directory: Path) -> Path:
    """Make a clone's files, as they are now."""
    words = ("git", "-C", str(ROOT), "ls-files", "-z")
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return directory


def typed(
    stack: ExitStack, machine: Machine, line: str, log: Path, *before: str
) -> None:
    """Type a line in a terminal of its own; what it prints goes to a file."""
    words = (*before, "bash", "-c", f"exec >{log} 2>&1; {line}")
    stack.enter_context(program(machine, *words))


@pytest.mark.root
@pytest.mark.dockerd
@pytest.mark.etcd
@pytest.mark.timeout(900)
def test_two_hosts(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    """
    Two machines with Docker, Python and a clone are one network in five minutes.

    1. etcd, `make run` and `docker network create` are typed as the README has them; of
       the packages that pip fetches there is a copy, as these machines reach nobody.
    2. A container starts on each host.
    Result: they reach each other, and each host sees both.
    """
    wheels = tmp_path / "wheels"
    fetch_all(wheels)
    said = lines("Two hosts")
    (etcd,) = (line for line in said if line.startswith("etcd --listen"))
    (run,) = (line for line in said if line.startswith("PYNET_STORE="))
    create, *_ = (line for line in said if line.startswith("docker network create"))
    lab = make_lab(2, etcd=1, serve=False)
    (member,) = lab.members
    member.stop_etcd()
    begin = time.monotonic()
    offline = ("env", "-u", "PYTHONPATH", "PIP_NO_INDEX=1", f"PIP_FIND_LINKS={wheels}")
    with ExitStack() as stack:
        typed(stack, member, f"cd /var/lib/etcd && exec {etcd}", tmp_path / "etcd.log")
        for host in lab.hosts:
            place = checkout(tmp_path / host.name)
            log = tmp_path / f"{host.name}.log"
            typed(stack, host, f"cd {place} && exec env {run}", log, *offline)
        for host in lab.hosts:
            answers = eventually(host.pynet_answers, FIVE_MINUTES)
            assert answers, (tmp_path / f"{host.name}.log").read_text()[-3000:]
            host.exec("bash", "-c", create, timeout=60)
        one, other = (stack.enter_context(Scene(host)) for host in lab.hosts)
        for scene in (one, other):
            scene.networks.append("blue")
        web = one.run("blue")
        client = other.run("blue")
        assert web.ip("blue") == "10.1.0.2"
        assert client.pings("10.1.0.2")
        spent = time.monotonic() - begin
        print(f"two hosts after {spent:.0f} s on {os.cpu_count()} processors")
        assert spent < FIVE_MINUTES
        for host in lab.hosts:
            assert host.pynet("host", "ls", "--json").stdout.count('"vtep"') == 2
