"""
What netlink does at its worst: news that is lost, dumps of no moment, and races.

The kernel is a real one, and so is who changes it meanwhile: another process that adds
and deletes in a loop what the test names.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cnmdriver.courtesy import Courtesy
from cnmdriver.dataplane import monitor
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.plan import devices
from cnmdriver.plan.ops import Fdb, Neighbour, Veth, compare
from tests.unit.calls import Docker

from .conftest import V4, V6, dump, endpoint, network, run, whole
from .machine import daemon, drop_namespace
from .sides import alone, elsewhere
from .sides import net as overlay
from .test_kernel import without_filter

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

NET = network(V4, V6)
PLAN = whole(NET, endpoint(NET, 2), endpoint(NET, 3))
BRIDGE = devices.bridge(NET.id)
PAIR, PEER = next((op.name, op.peer or "") for op in PLAN if isinstance(op, Veth))
REMOTES = 400
STAYING = 400
LOOP = 'while :; do printf "%s\\n" "$0"; done | "$@" -force -batch - >&- 2>&-'


@contextmanager
def meanwhile(lines: list[str], *enter: str, tool: str = "ip") -> Iterator[None]:
    """Let another process do lines of `ip -batch` again and again."""
    ended, alive = os.pipe()
    rival = subprocess.Popen(
        [*enter, "sh", "-c", LOOP, "\n".join(lines), tool],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(alive,),
    )
    os.close(alive)
    try:
        yield
        assert rival.poll() is None
    finally:
        os.killpg(rival.pid, signal.SIGKILL)
        rival.wait(10)
        # The tool may yet be in the kernel; then it still has the pipe.
        assert select.select([ended], [], [], 10)[0]
        os.close(ended)


# News.


async def no_step(name):
    """Announce a step to nobody."""
    del name


async def test_lost_news_is_news(tmp_path, host, monkeypatch):
    """
    When the kernel's news does not fit, an audit follows, and repairs.

    1. The socket of the news is as small as can be. While the daemon is busy, eighty
       devices of others come and go, and then a bridge of ours is deleted.
    Result: no message about the bridge is heard; it is back all the same.
    """
    assert host
    monkeypatch.setattr(monitor, "BUFFER", 1)
    heard = []
    is_ours = monitor.Ear.is_ours

    mended = []

    def noted(ear, kind, body):
        verdict = is_ours(ear, kind, body)
        # What the repair itself makes is news again.
        if not any(one.sync.repairs["device"] for one in mended):
            heard.append(verdict)
        return verdict

    monkeypatch.setattr(monitor.Ear, "is_ours", noted)
    others = [f"link {verb} other type bridge" for verb in ("add", "del")]
    try:
        async with daemon(tmp_path, no_step) as one:
            mended.append(one)
            await Docker(one.rig).create("n" * 64, V4)
            await one.sync.turn()
            assert await one.difference() == []
            (bridge,) = (m.bridge for m in one.rig.site.members())
            loops = [asyncio.ensure_future(w()) for w in (one.sync.run, one.sync.watch)]
            # The ear is open, and what it makes of that is over.
            await asyncio.sleep(0)
            await settled(one)
            heard.clear()
            batch = "\n".join([*others * 40, f"link del {bridge}"])
            subprocess.run(
                ["ip", "-batch", "-"], input=batch, text=True, check=True, timeout=60
            )
            async with asyncio.timeout(50):
                while one.sync.repairs["device"] == 0:
                    await asyncio.sleep(0.01)
            lost = len(heard) < 80 and not any(heard)
            assert lost, "the news fitted: make it more"
            async with asyncio.timeout(50):
                while await one.difference():
                    await asyncio.sleep(0.01)
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)
            await one.rig.networks.delete("n" * 64)
    finally:
        drop_namespace(tmp_path)


async def settled(one):
    """Wait until the daemon listens, and has looked for what it did not hear."""
    async with asyncio.timeout(50):
        while one.sync.ended == 0.0 or one.sync.dirty.is_set() or one.sync.planned:
            await asyncio.sleep(0.01)
            if one.sync.planned and one.sync.planned.when() < one.sync.ended:
                break


# Dumps.


async def test_a_dump_while_devices_come_and_go(kernel):
    """Whatever comes and goes meanwhile, what stays is found, and as it is."""
    before = dump()
    await kernel.apply(PLAN)
    names = [f"other{number}" for number in range(40)]
    lines = [f"link add {name} type bridge" for name in names]
    lines += [f"link del {name}" for name in reversed(names)]
    with meanwhile(lines):
        for _ in range(15):
            assert list(compare(PLAN, await kernel.found(PLAN)).lines()) == []
            assert await kernel.foreign() == ()
    for name in names:
        run("ip", "link", "del", name, check=False)
    await kernel.clear(PLAN)
    assert left(dump()) == left(before)


async def test_a_dump_while_addresses_come_and_go(kernel):
    """
    Addresses that go before ours make the kernel pass by ours; none is missed for long.

    A dump can look whole and lack some, if seldom. The next one has what that lacked.
    """
    run("ip", "link", "add", "many", "type", "bridge")
    stay = [f"10.78.{n >> 8}.{n & 255}" for n in range(STAYING)]
    batch = "\n".join(f"addr add {ip}/32 dev many" for ip in stay)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    # Of a narrower scope they stand before the others.
    lines = [
        f"addr {verb} 10.77.{n >> 8}.{n & 255}/32 dev many scope link"
        for verb in ("add", "del")
        for n in range(STAYING)
    ]
    netlink = kernel._host.netlink
    missed: set[str] = set()
    with meanwhile(lines):
        for _ in range(20):
            found = {str(one.interface.ip) for one in await netlink.own()}
            before, missed = missed, set(stay) - found
            assert before & missed == set()


async def test_a_dump_while_entries_come_and_go(tmp_path):
    """
    Entries of others that come and go among ours keep none of ours from being found.

    A dump goes on by counting, and so passes by what moved up meanwhile.
    """
    async with alone(tmp_path) as one:
        net = overlay()
        bridge, vxlan = devices.bridge(net.id), devices.vxlan(net.id)
        plan = one.plan(net, others=one.remote(net, *elsewhere(REMOTES)))
        await one.apply(plan)
        wanted = {op for op in plan if isinstance(op, Fdb | Neighbour)}
        assert len(wanted) > 3 * REMOTES
        macs = [f"02:77:00:00:{n >> 8:02x}:{n & 255:02x}" for n in range(600)]
        ips = [f"10.99.{n >> 8}.{n & 255}" for n in range(600)]
        near = [
            f"neigh {verb} {ip} lladdr {mac} dev {bridge} nud reachable"
            for verb in ("replace", "del")
            for ip, mac in zip(ips, macs, strict=True)
        ]
        far = [
            f"fdb {verb} {mac} dev {vxlan} {rest}"
            for verb, rest in (("replace", "master dynamic"), ("del", "master"))
            for mac in macs
        ]
        enter = ("ip", "netns", "exec", one.host.namespace)
        with meanwhile(near, *enter), meanwhile(far, *enter, tool="bridge"):
            for _ in range(40):
                found = await one.found(plan)
                assert wanted - set(found) == set()
                assert len(found) == len(set(found))
        assert await one.lines(plan) == []


async def test_changes_go_before_a_look(tmp_path, monkeypatch):
    """Who changes the kernel while entries are read does not wait until they are."""
    async with alone(tmp_path) as one:
        net = overlay()
        plan = one.plan(net, others=one.remote(net, *elsewhere(REMOTES)))
        late = one.remote(net, *elsewhere(REMOTES + 1)[-1:])
        await one.apply(plan)
        stand_back = Courtesy.stand_back
        begun, over = [], []

        async def noted(courtesy):
            if not begun:
                begun.append(asyncio.ensure_future(one.apply(late)))
                await asyncio.sleep(0)
            await stand_back(courtesy)
            over.append(begun[0].done())

        monkeypatch.setattr(Courtesy, "stand_back", noted)
        found = await one.found(plan)
        assert all(over)
        assert len(over) > REMOTES // 100
        assert set(late) <= set(found)
        assert await one.lines((*plan, *late)) == []


async def test_many_dumps_at_once(kernel):
    """The kernel has one dump at a time on a socket (EBUSY); nobody notices."""
    await kernel.apply(PLAN)
    names = [f"other{number}" for number in range(60)]
    batch = "\n".join(f"link add {name} type bridge" for name in names)
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    looks = [kernel.routes() for _ in range(8)] + [kernel.vnis() for _ in range(2)]
    netlink = kernel._host.netlink
    looks += [netlink.links() for _ in range(8)] + [netlink.own() for _ in range(8)]
    answers = await asyncio.gather(*looks)
    whole_ = {link.name for link in await netlink.links()}
    assert {*names, BRIDGE, PAIR} <= whole_
    for answer in answers[10:18]:
        assert {link.name for link in answer} == whole_


# Races.


RACES = {
    "ours are deleted": [f"link del {BRIDGE}", f"link del {PAIR}"],
    "a name is taken": [f"link add {BRIDGE} type bridge", f"link del {BRIDGE}"],
    "a peer is taken": [f"link add {PEER} type bridge", f"link del {PEER}"],
    "a port is moved": [f"link set {PAIR} nomaster", f"link set {PAIR} down"],
    "addresses go": [f"addr flush dev {BRIDGE}", f"link set {BRIDGE} down"],
}


@pytest.mark.parametrize("race", RACES)
async def test_another_process_is_at_the_same_devices(kernel, race):
    """
    Between look and make anything may happen: a plan holds, or a sentence says why not.

    1. A process creates and deletes in a loop what the plan needs; the plan is applied
       and cleared meanwhile, eight times.
    Result: apply succeeds or raises a DriverError of one line, and so does clear; when
    the process is gone, a plan that failed has left nothing half, can be applied, and
    is cleared without a rest.
    """
    before = left(dump())
    for _ in range(8):
        failed = False
        with meanwhile(RACES[race]):
            try:
                await kernel.apply(PLAN)
            except (Conflict, KernelError) as error:
                assert "\n" not in str(error)
                failed = True
        forsaken()
        if failed:
            assert left(dump()) == before
        await kernel.apply(PLAN)
        assert list(compare(PLAN, await kernel.found(PLAN)).lines()) == []
        with meanwhile(RACES[race]), contextlib.suppress(KernelError):
            await kernel.clear(PLAN)
        forsaken()
        await kernel.clear(PLAN)
        assert left(dump()) == before


def forsaken():
    """Remove what the other process has made and left."""
    for name in (BRIDGE, PEER):
        shown = run("ip", "-d", "link", "show", name, check=False)
        if " bridge " in shown and "pynet" not in shown:
            run("ip", "link", "del", name)


async def test_a_port_that_somebody_uses(kernel):
    """
    A device that is busy (EBUSY) makes a sentence, and what was there before stays.

    1. A pair's device is taken from its bridge, and a macvlan is put on it, so that the
       kernel gives it to no bridge.
    Result: apply says so; nothing else has changed; without the macvlan it holds.
    """
    await kernel.apply(PLAN)
    run("ip", "link", "set", PAIR, "nomaster")
    run("ip", "link", "add", "link", PAIR, "name", "mv0", "type", "macvlan")
    before = dump()
    with pytest.raises(KernelError, match=rf"master of {PAIR} failed: .*\(E\w+\)$"):
        await kernel.apply(PLAN)
    assert dump() == before
    run("ip", "link", "del", "mv0")
    await kernel.apply(PLAN)
    assert list(compare(PLAN, await kernel.found(PLAN)).lines()) == []
    await kernel.clear(PLAN)


def left(found):
    """Leave out what stays when a plan is cleared."""
    return {k: v for k, v in without_filter(found).items() if k != "settings"}
