"""A walk through what can happen to a daemon: Docker, deaths, and strangers."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from ipaddress import ip_network
from pathlib import Path
from random import Random
from typing import Any

from cnmdriver.dockerapi import Inventory
from cnmdriver.errors import DriverError
from cnmdriver.plan import devices
from cnmdriver.plan.ops import GROUP
from tests.unit.calls import UDP, Docker, port

from .conftest import Namespace, run
from .machine import (
    Door,
    Doors,
    Sandbox,
    daemon,
    own_namespace,
)

KINDS: dict[str, tuple[tuple[str | None, ...], dict[str, Any]]] = {
    "v4": (("10.1.0.0/24",), {}),
    "dual": (("10.2.0.0/24", "fd02::/64"), {}),
    "chosen": ((None, "ipv6"), {"options": {"pynet.mtu": "1400"}}),
    "internal": (("10.3.0.0/24",), {"internal": True}),
    "icc_off": (("10.4.0.0/24", "fd04::/64"), {"options": {"pynet.icc": "false"}}),
    "docker": (("10.5.0.0/24",), {"options": {"pynet.gateway": "docker"}}),
    "small": (("10.6.0.0/24",), {"options": {"pynet.mtu": "576"}}),
    "bridge": (("10.7.0.0/24",), {"options": {"pynet.bridge": "my.bridge"}}),
    "overlay": (("10.8.0.0/24", "fd08::/64"), {"options": {"pynet.mode": "overlay"}}),
    "routed": (
        ("10.9.0.0/24", "fd09::/64"),
        {
            "options": {
                "pynet.mode": "overlay",
                "pynet.gateway": "pynet",
                "pynet.host_access": "true",
            }
        },
    ),
}
OVERLAYS = ("overlay", "routed")
MOST = 5
"""Containers at a time."""
PORTS = (
    port(80, 8080),
    port(80, 8081, ip="127.0.0.1"),
    port(80, 8081, ip="::1"),
    port(80, 8080, 8083),
    port(53, 5353, protocol=UDP),
    port(53, protocol=UDP),
)


class Death(BaseException):
    """The daemon is gone."""


class Walk:
    """One Docker, its pynet, its kernel and what befalls them."""

    def __init__(self, directory: Path, host: Namespace, seed: int) -> None:
        """Start with nothing."""
        self.directory = directory
        self.host = host
        self.random = Random(seed)
        self.stack = AsyncExitStack()
        self.sandboxes: dict[str, Sandbox] = {}
        self.intact: set[str] = set()
        self.fuse: tuple[int, Callable[[], None]] | None = None
        self.made = 0
        self.nets: dict[str, Any] = {}
        self.boxes: dict[str, Any] = {}
        doors = Doors(
            Door(lambda: self.alive.rig.networks, self.call, self.where),
            Door(lambda: self.alive.rig.ipam, self.call, self.where),
        )
        self.docker = Docker(doors)
        self.docker.nets, self.docker.boxes = self.nets, self.boxes
        self.networks = doors.networks

    async def up(self) -> None:
        """Start the daemon; it audits first."""
        self.alive = await self.stack.enter_async_context(
            daemon(self.directory, self.step)
        )
        await self.alive.sync.turn()

    async def down(self) -> None:
        """Stop the daemon."""
        self.fuse = None
        await self.stack.aclose()

    async def restart(self) -> None:
        """Stop the daemon, or bury it, and start another over the same files."""
        await self.down()
        await self.up()

    async def step(self, name: str) -> None:
        """Go wrong if it is this step's turn."""
        del name
        if self.fuse is not None:
            left, action = self.fuse
            self.fuse = (left - 1, action) if left else None
            if not left:
                action()
                # A cancel is to be felt here, not wherever there is the next wait.
                await asyncio.sleep(0)

    def where(self, box: str) -> str:
        """Make the sandbox of a container that starts."""
        if box not in self.sandboxes:
            path = self.directory / f"sandbox-{box}"
            self.sandboxes[box] = Sandbox(path)
        return str(self.sandboxes[box].path)

    async def call(self, name: str, work: Callable[[], Any]) -> Any:
        """Make a call of Docker's, which after a death may make it again."""
        while True:
            try:
                return await work()
            except Death:
                await self.restart()
                if self.random.random() < 0.5:
                    raise DriverError(f"the daemon died in {name}") from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task
                task.uncancel()
                raise DriverError(f"{name} took too long") from None

    async def refusable(self, work: Any) -> bool:
        """Do something of Docker's; a refusal has a sentence. Tell whether it went."""
        try:
            await work
        except DriverError as error:
            assert str(error)
            return False
        return True

    # What Docker does.

    async def create_network(self) -> None:
        name = self.random.choice(sorted(KINDS))
        if name not in self.nets:
            cidrs, named = KINDS[name]
            await self.refusable(self.docker.create(name, *cidrs, **named))

    async def remove_network(self) -> None:
        free = set(self.nets) - {box.net.id for box in self.boxes.values()}
        if free:
            await self.refusable(self.docker.remove(self.random.choice(sorted(free))))

    async def start_container(self) -> None:
        if not self.nets or len(self.boxes) >= MOST:
            return
        box = self.new_id()
        name = self.random.choice(sorted(self.nets))
        ports = tuple(self.random.sample(PORTS, self.random.randrange(3)))
        if await self.refusable(self.docker.start(box, name, ports=ports)):
            self.sandboxes[box].enter(devices.peer(box))
            self.intact.add(box)
        else:
            self.forget(box)

    def new_id(self) -> str:
        """Return an id that Docker has not used before."""
        self.made += 1
        return f"endpoint{self.made}" * 4

    async def stop_container(self) -> None:
        """Stop a container; its namespace goes after its endpoint, or before."""
        if not self.boxes:
            return
        box = self.random.choice(sorted(self.boxes))
        await self.stop(box)

    async def stop(self, box: str) -> None:
        if self.random.random() < 0.3:
            self.end_sandbox(box)
        elif box in self.intact:
            self.sandboxes[box].leave(devices.peer(box), self.host.path)
        self.intact.discard(box)
        await self.refusable(self.docker.stop(box))
        self.forget(box)

    def forget(self, box: str) -> None:
        """Know no more of a container; Docker never repeats a removal that failed."""
        self.boxes.pop(box, None)
        self.end_sandbox(box)

    def end_sandbox(self, box: str) -> None:
        self.intact.discard(box)
        if sandbox := self.sandboxes.pop(box, None):
            sandbox.remove()

    async def forget_container(self) -> None:
        """Docker dies, and its next life knows nothing of a container."""
        if self.boxes:
            box = self.random.choice(sorted(self.boxes))
            self.forget(box)

    async def single_call(self) -> None:
        """Call in or out of place, for an endpoint that is there or not."""
        box = self.random.choice([*sorted(self.boxes), self.new_id()])
        known = self.boxes.get(box)
        name = known.net.id if known else self.random.choice(sorted(KINDS))
        ports = tuple(self.random.sample(PORTS, self.random.randrange(3)))
        work = self.random.choice(
            (
                lambda: self.networks.join(name, box),
                lambda: self.networks.program(name, box, ports=ports, ipv6=True),
                lambda: self.networks.revoke(name, box),
                lambda: self.networks.leave(name, box),
                lambda: self.remove_endpoint(name, box),
            )
        )
        await self.refusable(work())

    async def remove_endpoint(self, name: str, box: str) -> None:
        """Remove an endpoint without Leave, from under its container."""
        self.intact.discard(box)
        await self.networks.delete_endpoint(name, box)
        if box in self.boxes:
            # Its address can be another's by the time the container stops.
            self.boxes[box].held.clear()

    # What goes wrong.

    async def die_soon(self) -> None:
        def die() -> None:
            raise Death

        self.fuse = (self.random.randrange(30), die)

    async def cancel_soon(self) -> None:
        def cancel() -> None:
            task = asyncio.current_task()
            assert task
            task.cancel()

        self.fuse = (self.random.randrange(30), cancel)

    async def interfere(self) -> None:
        """Let a stranger change something of ours."""
        words = self.random.choice(self.changes())
        self.spoils(words)
        run(*words, check=False)
        await self.audit()

    def changes(self) -> list[tuple[str, ...]]:
        """Return the commands of strangers that change something of ours."""
        place = self.place()
        return [
            *(
                change
                for where in ([(), place] if place else [()])
                for change in self.changes_of_devices(where)
            ),
            *self.changes_of_rules(),
            *self.changes_of_entries(place),
        ]

    def place(self) -> tuple[str, ...]:
        """Return what leads a command into pynet's namespace, if there is one."""
        name = own_namespace(self.directory)
        there = Path("/run/netns", name).exists()
        return ("ip", "netns", "exec", name) if there else ()

    def spoils(self, words: tuple[str, ...]) -> None:
        """Note which containers lose their devices by a command."""
        if words[-3:-1] == ("link", "del"):
            ends = {devices.port(box): box for box in self.boxes}
            self.intact.discard(ends.get(words[-1], ""))
        if words[:3] == ("ip", "netns", "del"):
            # A container's end goes with the namespace that its other end is in.
            self.intact -= {
                box for box, known in self.boxes.items() if known.net.id in OVERLAYS
            }

    def changes_of_entries(self, place: tuple[str, ...]) -> list[tuple[str, ...]]:
        if not place:
            return []
        return [
            ("ip", "netns", "del", place[-1]),
            (*place, "nft", "delete", "table", "bridge", "pynet"),
            (*place, "nft", "flush", "set", "bridge", "pynet", "gateways"),
            (*place, "sysctl", "-qw", "net/bridge/bridge-nf-call-iptables=1"),
            *(
                words
                for net in self.nets
                if net in OVERLAYS
                for device in (devices.vxlan(self.made_as(net)),)
                for words in (
                    (*place, "bridge", "link", "set", "dev", device, "flood", "on"),
                    (*place, "bridge", "link", "set", "dev", device, "learning", "on"),
                    (*place, "bridge", "fdb", "add", "02:00:00:00:00:66", "dev", device,
                     "dst", "192.0.2.66"),
                )
            ),
        ]  # fmt: skip

    def made_as(self, net: str) -> str:
        """Return pynet's id of a network of Docker's."""
        return self.alive.rig.site.member(net).network

    def changes_of_devices(self, place: tuple[str, ...]) -> list[tuple[str, ...]]:
        links = json.loads(run(*place, "ip", "-j", "-d", "link"))
        link = ("ip", "link", "set")
        return [
            (*place, *words)
            for name in [x["ifname"] for x in links if x.get("group") == str(GROUP)]
            for words in (
                ("ip", "link", "del", name),
                (*link, name, "down"),
                (*link, name, "mtu", "1300"),
                (*link, name, "nomaster"),
                (*link, name, "group", "0"),
                (*link, name, "alias", ""),
                (*link, name, "address", "02:00:00:00:00:77"),
                ("ip", "addr", "flush", "dev", name),
                ("ip", "addr", "add", "10.99.0.1/24", "dev", name),
                ("bridge", "link", "set", "dev", name, "hairpin", "on"),
                ("bridge", "link", "set", "dev", name, "isolated", "on"),
                ("sysctl", "-qw", f"net/ipv4/conf/{name}/route_localnet=1"),
                ("sysctl", "-qw", f"net/ipv6/conf/{name}/disable_ipv6=1"),
                ("sysctl", "-qw", f"net/ipv6/conf/{name}/disable_ipv6=0"),
            )
        ]

    def changes_of_rules(self) -> list[tuple[str, ...]]:
        table = ("inet", "pynet")
        element = ("nft", "add", "element", *table)
        return [
            ("nft", "delete", "table", *table),
            *(
                ("nft", "flush", kind, *table, name)
                for kind, name in (
                    ("set", "bridges"), ("set", "self"), ("set", "masq4"),
                    ("map", "any4"), ("set", "own6"), ("set", "icc_off"),
                )
            ),
            (*element, "bridges", '{ "stray" }'),
            (*element, "masq4", "{ 10.77.0.0/16 }"),
            (*element, "any4", "{ tcp . 9999 : 10.77.0.1 . 80 }"),
            ("nft", "delete", "chain", *table, "guard"),
            ("iptables", "-F", "DOCKER-USER"),
            ("iptables", "-F", "FORWARD"),
            ("ip6tables", "-F", "DOCKER-USER"),
            ("sysctl", "-qw", "net/ipv4/ip_forward=0"),
            ("sysctl", "-qw", "net/ipv6/conf/all/forwarding=0"),
        ]  # fmt: skip

    async def audit(self) -> None:
        """Audit, perhaps with Docker's list, and look at what came of it."""
        if self.random.random() < 0.2:
            await self.restart()
        sync = self.alive.sync
        sync.lapsing.grace = sync.missing.grace = 0
        if self.random.random() < 0.7:
            sync.learn(self.inventory())
        try:
            await sync.turn()
        except Death:
            await self.restart()
            sync = self.alive.sync
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task
            task.uncancel()
        self.fuse = None
        await sync.turn()
        sync.lapsing.grace = sync.missing.grace = 3600
        sync.inventory = None
        assert await self.alive.difference() == []
        assert sync.problems == ()
        lost = [b for b in self.intact if not self.sandboxes[b].has_device()]
        assert lost == []

    def inventory(self) -> Inventory:
        """Return what Docker knows."""
        return Inventory(
            networks=frozenset(self.nets),
            endpoints=frozenset(self.boxes),
            pools=frozenset(
                ip_network(cidr) for net in self.nets.values() for _, cidr in net.pools
            ),
        )

    async def let_go(self) -> None:
        """Docker removes everything, then tells that it has nothing."""
        await self.audit()
        for box in list(self.boxes):
            await self.stop(box)
        for name in list(self.nets):
            await self.docker.remove(name)
        for box in list(self.sandboxes):
            self.end_sandbox(box)
        await self.audit()
        sync = self.alive.sync
        sync.missing.grace = sync.lapsing.grace = 0
        sync.learn(self.inventory())
        await sync.turn()
