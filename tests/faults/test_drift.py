"""
Somebody changes what is pynet's: it is put right at once, without an audit.

On the real kernel, in namespaces of the test's own. What the kernel announces is heard
by the monitor; what it does not announce (settings) waits for the audit, which
`tests/kernel/test_any_state.py` is about.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address, ip_interface
from typing import Any

import pytest

from cnmdriver.driver import sandboxes
from cnmdriver.model import Alive, Endpoint, Host, Network
from cnmdriver.plan import devices
from cnmdriver.store import records
from tests.kernel.conftest import Namespace, host, run  # noqa: F401
from tests.kernel.machine import VTEP, drop_namespace
from tests.kernel.walk import Walk

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

SOON = 9.0
"""Seconds for a repair on a loaded machine, just after one of our own changes."""
MUTATIONS = 500
AT_ONCE = 10
BRIDGE, OVERLAY = "dual", "routed"
FAR, FAR_MAC = "192.0.2.9", "02:42:0a:09:00:63"
FAR_ADDRESSES = ("10.9.0.99", "fd09::99")
CHANGES: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "bridge deleted": lambda w: ("ip", "link", "del", w.bridge),
    "bridge down": lambda w: ("ip", "link", "set", w.bridge, "down"),
    "bridge's MAC": lambda w: (
        *("ip", "link", "set", w.bridge),
        *("address", "02:00:00:00:00:77"),
    ),
    "bridge's MTU": lambda w: ("ip", "link", "set", w.bridge, "mtu", "1300"),
    "gateway's address": lambda w: ("ip", "addr", "flush", "dev", w.bridge),
    "port out of its bridge": lambda w: ("ip", "link", "set", w.port, "nomaster"),
    "port's flag": lambda w: (
        *("bridge", "link", "set", "dev", w.port),
        *("isolated", "on"),
    ),
    "port down": lambda w: ("ip", "link", "set", w.port, "down"),
    "alias": lambda w: ("ip", "link", "set", w.bridge, "alias", ""),
    "group": lambda w: ("ip", "link", "set", w.bridge, "group", "0"),
    "element": lambda w: ("nft", "flush", "set", "inet", "pynet", "bridges"),
    "chain's rules": lambda w: ("nft", "flush", "table", "inet", "pynet"),
    "chain": lambda w: ("nft", "delete", "chain", "inet", "pynet", "guard"),
    "table": lambda w: ("nft", "delete", "table", "inet", "pynet"),
    "ruleset": lambda w: ("nft", "flush", "ruleset"),
    "iptables": lambda w: ("iptables", "-F"),
    "iptables' own chain": lambda w: ("iptables", "-F", "DOCKER-USER"),
    "VXLAN device deleted": lambda w: (*w.inside, "ip", "link", "del", w.tunnel),
    "VXLAN device down": lambda w: (*w.inside, "ip", "link", "set", w.tunnel, "down"),
    "VXLAN port's flag": lambda w: (
        *(*w.inside, "bridge", "link", "set"),
        *("dev", w.tunnel, "neigh_suppress", "off"),
    ),
    "overlay's bridge down": lambda w: (
        *(*w.inside, "ip", "link", "set", w.switch, "down"),
    ),
    "overlay's bridge's MAC": lambda w: (
        *(*w.inside, "ip", "link", "set", w.switch),
        *("address", "02:00:00:00:00:77"),
    ),
    "tunnel entry": lambda w: (
        *(*w.inside, "bridge", "fdb", "del", FAR_MAC, "dev", w.tunnel),
        *("dst", FAR, "self"),
    ),
    "bridge's entry": lambda w: (
        *(*w.inside, "bridge", "fdb", "del", FAR_MAC, "dev", w.tunnel, "master"),
    ),
    "neighbour": lambda w: (
        *(*w.inside, "ip", "neigh", "del", FAR_ADDRESSES[0], "dev", w.switch),
    ),
    "IPv6 neighbour": lambda w: (
        *(*w.inside, "ip", "-6", "neigh", "del", FAR_ADDRESSES[1], "dev", w.switch),
    ),
    "strange entry": lambda w: (
        *(*w.inside, "bridge", "fdb", "add", "02:00:00:00:00:66", "dev", w.tunnel),
        *("dst", "192.0.2.66"),
    ),
    "overlay's table": lambda w: (*w.inside, "nft", "flush", "ruleset"),
    "host's route to an overlay": lambda w: ("ip", "route", "del", "10.9.0.0/24"),
    "gateway's pair": lambda w: ("ip", "link", "del", w.gateway),
}


class Stage(Walk):
    """A daemon with a network of each mode, containers, and another host's."""

    bridge = port = tunnel = switch = gateway = ""
    inside: tuple[str, ...] = ()

    async def set(self) -> None:
        """Make all that can be changed."""
        for name, cidrs in (
            (BRIDGE, ("10.2.0.0/24", "fd02::/64")),
            (OVERLAY, ("10.9.0.0/24", "fd09::/64")),
        ):
            options = {"pynet.mode": "overlay", "pynet.gateway": "pynet"}
            options["pynet.host_access"] = "true"
            named = {} if name == BRIDGE else {"options": options}
            await self.docker.create(name, *cidrs, **named)
            box = self.new_id()
            await self.docker.start(box, name)
            self.sandboxes[box].enter(devices.peer(box))
            self.intact.add(box)
            if name == BRIDGE:
                self.bridge = devices.bridge(self.made_as(name))
                self.port = devices.port(box)
        network = self.made_as(OVERLAY)
        self.tunnel, self.switch = devices.vxlan(network), devices.bridge(network)
        self.gateway = devices.gateway(network)
        self.inside = self.place()
        await self.add_far(network)

    async def add_far(self, network: str) -> None:
        """Let another host have a container on the overlay."""
        rig = self.alive.rig
        four, six = (
            ip_interface(f"{address}/{length}")
            for address, length in zip(FAR_ADDRESSES, (24, 64), strict=True)
        )
        found = rig.site.view.get(Network, records.network(network))
        assert found is not None
        far = Endpoint(
            network=network, id="f" * 64, host="far", boot="b", mac=FAR_MAC,
            ipv4=four, ipv6=six,  # type: ignore[arg-type]
        )  # fmt: skip

        def decide(draft: Any) -> None:
            there = Host(id="far", name="h9", version="x", vtep=ip_address(FAR))
            draft.put(records.host("far"), there)
            draft.put(records.alive("far"), Alive(instance="i", boot="b"))
            draft.put(records.endpoint(network, far.id), far)

        await rig.state.commit(decide)
        await rig.networks.remotes.update()

    async def repaired(self, limit: float) -> float:
        """Wait until all is as it should be; return the seconds that took."""
        begin = time.monotonic()
        while lines := await self.alive.difference():
            assert time.monotonic() < begin + limit, lines
            await asyncio.sleep(0.05)
        return time.monotonic() - begin


@asynccontextmanager
async def staged(directory: Any, own: Namespace, seed: int) -> AsyncIterator[Stage]:
    """Set the stage, with a monitor and without audits; clear it away after."""
    run("ip", "addr", "add", VTEP, "dev", "lo")
    stage = Stage(directory, own, seed)
    await stage.up()
    try:
        await stage.set()
        stage.alive.sync.audit = 3600
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(stage.alive.sync.run()),
                group.create_task(stage.alive.sync.watch()),
            ]
            # The ears open, and what they might have missed is looked for.
            await asyncio.sleep(1.5)
            yield stage
            for loop in loops:
                loop.cancel()
    finally:
        for box in list(stage.sandboxes):
            stage.end_sandbox(box)
        await stage.down()
        drop_namespace(directory)


@pytest.mark.timeout(60 + 10 * len(CHANGES))
async def test_each_change_is_put_right_and_counted(host, tmp_path):  # noqa: F811
    """Whatever is changed is as it was soon after, and every repair is counted."""
    slowest = 0.0
    async with staged(tmp_path, host, 1) as stage:
        sync = stage.alive.sync
        for name, change in CHANGES.items():
            assert await stage.alive.difference() == [], name
            before = sync.repairs.total()
            run(*change(stage))
            changed = await stage.alive.difference()
            took = await stage.repaired(SOON)
            print(f"{name}: {took:.2f} s, {len(changed)} differences")
            slowest = max(slowest, took)
            if changed:
                surplus = all("no plan" in line for line in changed)
                assert sync.repairs.total() > before or surplus or name, name
            assert stage.sandboxes[next(iter(stage.intact))].has_device()
    print(f"the slowest took {slowest:.2f} s")


@pytest.mark.parametrize("network", [BRIDGE, OVERLAY])
async def test_a_container_gets_its_device_back(host, tmp_path, monkeypatch, network):  # noqa: F811
    """A deleted pair is made again, into the sandbox, with name, addresses, routes."""
    monkeypatch.setattr(sandboxes, "STARTING", 0.0)
    async with staged(tmp_path, host, 2) as stage:
        box = next(b for b, known in stage.boxes.items() if known.net.id == network)
        space = stage.sandboxes[box].space
        set_up(space, stage.boxes[box])
        before = shown(space)
        place = () if network == BRIDGE else stage.inside
        run(*place, "ip", "link", "del", devices.port(box))
        assert not stage.sandboxes[box].has_device()
        begin = time.monotonic()
        while not stage.sandboxes[box].has_device() or shown(space) != before:
            assert time.monotonic() < begin + SOON, (before, shown(space))
            await asyncio.sleep(0.05)
        await stage.repaired(SOON)
        gateway = "10.2.0.1" if network == BRIDGE else "10.9.0.1"
        await asyncio.to_thread(space.run, "ping", "-c1", "-W2", gateway)


def set_up(space: Namespace, box: Any) -> None:
    """Do what Docker does in a sandbox after the move."""
    space.run("sysctl", "-qw", "net/ipv6/conf/eth0/disable_ipv6=0")
    space.run("ip", "link", "set", "eth0", "up")
    for face in box.addresses:
        space.run("ip", "addr", "add", str(face), "dev", "eth0", "nodad")
        gateway = face.network.network_address + 1
        space.run("ip", "route", "add", "default", "via", str(gateway))


def shown(space: Namespace) -> tuple[Any, ...]:
    """Return name, MAC, MTU, addresses and default routes of a sandbox's device."""
    links = json.loads(space.run("ip", "-j", "addr"))
    routes = [
        space.run("ip", f"-{version}", "route", "show", "default").split()[:5]
        for version in (4, 6)
    ]
    return (
        [
            (link["ifname"], link["address"], link["mtu"])
            + (sorted(each["local"] for each in link["addr_info"]),)
            for link in links
            if link["ifname"] != "lo"
        ],
        routes,
    )


async def test_500_changes(host, tmp_path):  # noqa: F811
    """After 500 random changes by strangers, several at once, all is as it should be."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    async with staged(tmp_path, host, seed) as stage:
        slowest = 0.0
        for _ in range(MUTATIONS // AT_ONCE):
            for change in stage.random.choices(list(CHANGES.values()), k=AT_ONCE):
                run(*change(stage), check=False)
            slowest = max(slowest, await stage.repaired(4 * SOON))
        print(f"the slowest took {slowest:.2f} s; {dict(stage.alive.sync.repairs)}")
        assert stage.alive.sync.repairs.total() > MUTATIONS / 2
        assert stage.alive.sync.problems == ()
        lost = [b for b in stage.intact if not stage.sandboxes[b].has_device()]
        assert lost == []
