"""What `pynet explain` prints, typed into an empty namespace, makes what is planned."""

import shlex
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest

from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.insight.explain import explain
from cnmdriver.plan.ops import Hold, Veth, compare
from tests import scene
from tests.fakes import rig
from tests.kernel.conftest import run

pytestmark = pytest.mark.root


@contextmanager
def typed(path):
    """Run a script as `bash -e` in the test's namespace; its sandboxes stay a while."""
    steps = (
        "mount -t tmpfs none /run",
        "mount -t sysfs none /sys",
        f"bash -e {shlex.quote(str(path))}",
        "echo typed",
        "read -r end || true",
    )
    with subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", " && ".join(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as shell:
        said = shell.stdout.readline()
        if said != "typed\n":
            pytest.fail(said + shell.communicate(timeout=10)[1])
        yield shell
        shell.communicate(timeout=10)


async def both(site, path, tmp_path):
    """Type the text, and return plans and what the kernel then holds."""
    path.write_text(explain(site, list(site.members())))
    kernel = Kernel(host=site.host.id, run_dir=tmp_path / "run")
    with typed(path) as shell:
        await kernel.open()
        try:
            wanted = site.desired()
            return wanted, await kernel.found(wanted), shell.pid
        finally:
            await kernel.close()


async def test_typed_is_planned(host, tmp_path):
    """Two networks, a published port and a sandbox on both: only the holds lack."""
    assert host
    async with rig(tmp_path) as made:
        await scene.populate(made)
        wanted, found, _ = await both(made.site, tmp_path / "text", tmp_path)
    difference = compare(wanted, found)
    assert (difference.changed, difference.surplus) == ((), ())
    assert {type(op) for op in difference.lacking} == {Hold}
    pairs = {op.name: op for op in found if isinstance(op, Veth)}
    planned = [op for op in wanted if isinstance(op, Veth)]
    assert len(planned) == 3
    for op in planned:
        assert pairs[op.name] == replace(op, peer=None, mac=None)


async def test_typed_without_a_sandbox(host, tmp_path):
    """A network alone is whole by its commands: nothing lacks, nothing is too much."""
    assert host
    async with rig(tmp_path) as made:
        await scene.network(made, scene.GREEN, "10.2.0.0/24", bridge="br.0", mtu="1400")
        wanted, found, _ = await both(made.site, tmp_path / "text", tmp_path)
    assert not compare(wanted, found)


async def test_typed_devices_with_awkward_names(host, tmp_path):
    """A bridge that is called like a word of nft is made all the same."""
    assert host
    async with rig(tmp_path) as made:
        await scene.network(made, scene.GREEN, "10.2.0.0/24", bridge="table")
        wanted, found, _ = await both(made.site, tmp_path / "text", tmp_path)
    assert not compare(wanted, found)


async def test_typed_sandbox_works(host, tmp_path):
    """What Docker adds is right: sandboxes reach each other and their gateway."""
    assert host
    async with rig(tmp_path) as made:
        await scene.populate(made)
        path = tmp_path / "text"
        path.write_text(explain(made.site, list(made.site.members())))
    with typed(path) as shell:
        inside = ("nsenter", f"--target={shell.pid}", "--mount", "ip", "-n")
        words = (*inside, "aaaaaaaaaaaa")
        assert "default via 10.1.0.1 dev eth0" in run(*words, "route")
        assert "default via fd00:1::1 dev eth0" in run(*words, "-6", "route")
        assert "10.2.0.3/24" in run(*words, "addr", "show", "eth1")
        enter = ("nsenter", f"--target={shell.pid}", "--mount")
        ping = (*enter, "ip", "netns", "exec", "aaaaaaaaaaaa", "ping", "-c1", "-W2")
        for address in ("10.1.0.3", "fd00:1::3", "10.1.0.1"):
            assert ip_address(address)
            assert "1 received" in run(*ping, address)
