"""The accept rules, under both kinds of iptables, with traffic."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.errors import KernelError
from cnmdriver.plan import devices
from cnmdriver.plan.ops import GROUP, Accept, compare

from .conftest import (
    HOST,
    V4,
    V6,
    Namespace,
    endpoint,
    namespace,
    network,
    run,
    whole,
)

pytestmark = pytest.mark.root

BOTH = (Accept(version=4), Accept(version=6))
PROGRAMS = tuple(
    f"{name}{what}"
    for name in ("iptables", "ip6tables")
    for what in ("", "-save", "-restore")
)


@pytest.fixture(params=["nft", "legacy"])
def kind(request, tmp_path, monkeypatch) -> str:
    """Put one kind of iptables first on PATH, as an administrator would choose it."""
    return choose(request.param, tmp_path, monkeypatch)


def choose(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make links to one kind of iptables, and nothing else of that name."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(f"/usr/sbin/xtables-{kind}-multi")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return kind


def policy(word: str, *tools: str) -> None:
    """Set the policy of FORWARD."""
    for tool in tools:
        run(tool, "-P", "FORWARD", word)


@contextmanager
def container(net, number: int) -> Iterator[Namespace]:
    """Move an endpoint's far end into a namespace, and set it up as Docker does."""
    own = endpoint(net, number)
    with namespace() as sandbox:
        peer = devices.peer(own.id)
        run("ip", "link", "set", peer, "netns", sandbox.path)
        sandbox.run("ip", "link", "set", peer, "up")
        for address in own.addresses:
            nodad = ("nodad",) if address.version == 6 else ()
            sandbox.run("ip", "addr", "add", str(address), "dev", peer, *nodad)
        for subnet in net.subnets:
            via = ("via", str(subnet.gateway))
            family = f"-{subnet.pool.version}"
            sandbox.run("ip", family, "route", "add", "default", *via)
        yield sandbox


@contextmanager
def outside() -> Iterator[Namespace]:
    """Put a machine behind a link of the host."""
    with namespace() as machine:
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0")
        run("ip", "link", "set", "eth0", "netns", machine.path)
        run("ip", "link", "set", "up0", "up")
        machine.run("ip", "link", "set", "eth0", "up")
        for v, host, far in ((4, "198.51.100.1/24", 2), (6, "2001:db8::1/64", 2)):
            nodad = ("nodad",) if v == 6 else ()
            run("ip", "addr", "add", host, "dev", "up0", *nodad)
            address = host.replace("1/", f"{far}/")
            machine.run("ip", "addr", "add", address, "dev", "eth0", *nodad)
        yield machine


def reaches(source: Namespace, address: str) -> bool:
    """Tell whether a ping is answered."""
    words = ("ping", "-n", "-c", "1", "-W", "1", address)
    return "1 received" in source.run(*words, check=False)


NET = network(V4, V6)
PLAN = whole(NET, endpoint(NET, 2), endpoint(NET, 3))
FAR = ("198.51.100.2", "2001:db8::2")
NEAR = ("10.200.1.3", "fd00:200:1::3")


async def test_traffic_passes(kernel, kind):
    """
    With FORWARD DROP, containers reach each other and the outside by our rules only.

    1. A network with two containers, and a machine outside; FORWARD is DROP, and
       switched frames pass it, as Docker has it.
    2. With the rules: container to container, and to the outside, in both families.
    3. Without the rules: nothing of that.
    4. With the rules again: all of it.

    Result: the two rules by link group are what lets traffic pass.
    """
    assert kind
    policy("DROP", "iptables", "ip6tables")
    await kernel.apply(PLAN)
    for name in ("iptables", "ip6tables"):
        Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}").write_text("1")
    with ExitStack() as stack:
        stack.enter_context(outside())
        one = stack.enter_context(container(NET, 2))
        stack.enter_context(container(NET, 3))
        for holds in (True, False, True):
            await (kernel.apply(BOTH) if holds else kernel.clear(BOTH))
            flush_neighbours(one)
            got = [reaches(one, address) for address in (*NEAR, *FAR)]
            assert got == [holds] * 4


def flush_neighbours(sandbox: Namespace) -> None:
    """Forget connections that are known, which pass by another rule."""
    sandbox.run("ip", "neigh", "flush", "all", check=False)


async def test_rules_read_well(kernel, kind):
    """After apply the programs of the administrator still read their tables."""
    policy("DROP", "ip6tables")
    await kernel.apply(BOTH)
    for tool in ("iptables", "ip6tables"):
        lines = run(tool, "-w", "5", "-S").splitlines()
        mark = "-m comment --comment pynet -j ACCEPT"
        assert lines[-2:] == [
            f"-A DOCKER-USER -m devgroup --dst-group 0x706e {mark}",
            f"-A DOCKER-USER -m devgroup --src-group 0x706e {mark}",
        ]
        jump = "-A FORWARD -m comment --comment pynet -j DOCKER-USER"
        assert jump in lines
        saved = run(f"{tool}-save")
        assert saved.count("--comment pynet") == 3
        assert "unknown" not in saved.lower(), kind


async def test_twice_and_nothing_left(kernel, kind):
    """Applying twice makes no second rule, and clearing twice leaves nothing."""
    assert kind
    policy("DROP", "iptables", "ip6tables")
    before = [run(tool, "-w", "5", "-S") for tool in ("iptables", "ip6tables")]
    await kernel.apply(BOTH)
    once = [run(tool, "-w", "5", "-S") for tool in ("iptables", "ip6tables")]
    await kernel.apply(BOTH)
    assert once == [run(tool, "-w", "5", "-S") for tool in ("iptables", "ip6tables")]
    assert await kernel.found(BOTH) == BOTH
    assert await kernel.found() == BOTH
    await kernel.clear(BOTH)
    await kernel.clear(BOTH)
    assert before == [run(tool, "-w", "5", "-S") for tool in ("iptables", "ip6tables")]
    assert await kernel.found() == ()


async def test_dockers_chain_is_kept(kernel, kind):
    """Docker's chain, jump and RETURN stay; ours stand above, and go alone."""
    assert kind
    run("iptables", "-N", "DOCKER-USER")
    run("iptables", "-A", "DOCKER-USER", "-j", "RETURN")
    run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER")
    before = run("iptables", "-w", "5", "-S")
    await kernel.apply(BOTH[:1])
    lines = run("iptables", "-w", "5", "-S").splitlines()
    assert lines[-1] == "-A DOCKER-USER -j RETURN"
    assert len(lines) == len(before.splitlines()) + 2
    await kernel.clear(BOTH[:1])
    assert run("iptables", "-w", "5", "-S") == before


async def test_dockers_empty_chain_is_kept(kernel, kind):
    """A chain that Docker jumps to stays when our rules go, though it is empty."""
    assert kind
    run("iptables", "-N", "DOCKER-USER")
    run("iptables", "-I", "FORWARD", "-j", "DOCKER-USER")
    before = run("iptables", "-w", "5", "-S")
    await kernel.apply(BOTH[:1])
    await kernel.clear(BOTH[:1])
    assert run("iptables", "-w", "5", "-S") == before


@pytest.mark.parametrize(
    "command",
    [
        ["iptables", "-F"],
        ["iptables", "-D", "FORWARD", "1"],
        ["iptables", "-D", "DOCKER-USER", "1"],
    ],
)
async def test_missing_parts_are_seen(kernel, kind, command):
    """Rules that somebody flushed lack, are put back, and no part comes twice."""
    assert kind
    await kernel.apply(BOTH)
    whole_rules = run("iptables", "-w", "5", "-S")
    run(*command)
    assert compare(BOTH, await kernel.found(BOTH)).lacking == BOTH[:1]
    await kernel.apply(BOTH)
    assert sorted(run("iptables", "-w", "5", "-S").split("\n")) == sorted(
        whole_rules.split("\n")
    )


async def test_no_ipv6_table(kernel, tmp_path, monkeypatch):
    """Where nothing filters IPv6 nothing is made, and nothing lacks."""
    choose("nft", tmp_path, monkeypatch)
    await kernel.apply(BOTH)
    assert "ip6" not in run("nft", "list", "tables")
    assert not compare(BOTH, await kernel.found(BOTH))
    policy("DROP", "ip6tables")
    assert compare(BOTH, await kernel.found(BOTH)).lacking == BOTH[1:]


async def test_host_without_iptables(kernel, tmp_path, monkeypatch):
    """On a host that has no iptables there is nothing to do, and nothing lacks."""
    programs = tmp_path / "none"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    await kernel.apply(BOTH)
    assert await kernel.found(BOTH) == BOTH
    assert await kernel.found() == ()
    await kernel.clear(BOTH)


async def test_legacy_tables_beside_nft(kernel, tmp_path, monkeypatch):
    """With iptables on nftables and legacy tables in use, the rules go into both."""
    choose("nft", tmp_path, monkeypatch)
    policy("DROP", "iptables", "iptables-legacy")
    await kernel.apply(BOTH[:1])
    for tool in ("iptables", "iptables-legacy"):
        assert run(tool, "-w", "5", "-S").count("devgroup") == 2
    run("iptables-legacy", "-F")
    assert compare(BOTH[:1], await kernel.found(BOTH[:1])).lacking
    await kernel.apply(BOTH[:1])
    await kernel.clear(BOTH[:1])
    for tool in ("iptables", "iptables-legacy"):
        assert "DOCKER-USER" not in run(tool, "-w", "5", "-S")


async def test_refusal_is_told(kernel, tmp_path, monkeypatch):
    """What iptables says is in the error, with the command."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "iptables"
    script.write_text(
        "#!/bin/sh\necho 'iptables: Bad table (is it there?).' >&2\nexit 3\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(KernelError, match=r"iptables -S failed: iptables: Bad table"):
        await kernel.apply(BOTH[:1])


async def test_undo(host, tmp_path):
    """Rules, chain and jump made by a plan that failed are taken back."""
    assert host
    before = run("iptables", "-w", "5", "-S")

    async def fail(step):
        if step == "apply.device":
            raise KernelError("stopped")

    kernel = Kernel(host=HOST, run_dir=tmp_path / "run", step=fail)
    await kernel.open()
    with pytest.raises(KernelError, match="stopped"):
        await kernel.apply(PLAN)
    await kernel.close()
    assert run("iptables", "-w", "5", "-S") == before


async def test_at_once(host, tmp_path):
    """Two programs that use iptables at the same time wait for each other."""
    assert host
    kernel = Kernel(host=HOST, run_dir=tmp_path / "run")
    await kernel.open()
    assert shutil.which("iptables-legacy")
    others = [
        await asyncio.create_subprocess_exec("iptables", "-w", "5", "-N", f"OTHER-{n}")
        for n in range(10)
    ]
    await kernel.apply(BOTH)
    for process in others:
        assert await process.wait() == 0
    assert not compare(BOTH, await kernel.found(BOTH))
    await kernel.close()


async def test_rules_that_are_there_twice(kernel, kind):
    """A rule of ours that somebody has added once more is no obstacle: both go."""
    assert kind
    await kernel.apply((Accept(version=4),))
    run(
        *("iptables", "-w", "5", "-I", "DOCKER-USER", "-m", "devgroup"),
        *("--src-group", hex(GROUP), "-m", "comment", "--comment", "pynet"),
        *("-j", "ACCEPT"),
    )
    await kernel.clear((Accept(version=4),))
    await kernel.clear((Accept(version=4),))
    assert "pynet" not in run("iptables", "-w", "5", "-S")


async def test_a_comment_of_two_lines(kernel, kind):
    """What others wrote into the tables is read over, whatever it is."""
    assert kind
    comment = ("-m", "comment", "--comment", "one\ntwo's")
    run("iptables", "-w", "5", "-I", "FORWARD", *comment, "-j", "ACCEPT")
    plan = (Accept(version=4),)
    await kernel.apply(plan)
    assert not compare(plan, await kernel.found(plan))
    await kernel.clear(plan)
    assert "pynet" not in run("iptables", "-w", "5", "-S")
