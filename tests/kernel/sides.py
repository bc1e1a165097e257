"""Two hosts on one underlay, each with a dataplane and a namespace of its own."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from itertools import count
from pathlib import Path

from cnmdriver.dataplane.handler import Step, nothing
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.model import Endpoint, Host, IPAddress, Member, Network, Remote
from cnmdriver.plan import devices, firewall, overlay
from cnmdriver.plan.ops import Op, Plan, compare, union

from .conftest import CLONE_NEWNET, Namespace, call, namespace, network, run

NUMBERS = count(1)
V4, V6 = "10.210.1.0/24", "fd00:210:1::/64"
UNDERLAY = {4: "192.0.2.{}/24", 6: "fd00:99::{}/64"}


@dataclass(kw_only=True)
class Side:
    """A host: its namespace, its dataplane, and the containers on it."""

    number: int
    space: Namespace
    kernel: Kernel
    host: Host
    stack: ExitStack
    boxes: dict[str, Namespace] = field(default_factory=dict)
    vteps: tuple[IPAddress, ...] = ()
    """Where the tunnels of the other hosts end."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be on this host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        call("setns", self.space.fd, CLONE_NEWNET)
        try:
            yield
        finally:
            call("setns", before, CLONE_NEWNET)
            os.close(before)

    async def apply(self, plan: Plan) -> None:
        """Make a plan hold here."""
        with self.entered():
            await self.kernel.apply(plan)

    async def clear(self, plan: Plan) -> None:
        """Take a plan back."""
        with self.entered():
            await self.kernel.clear(plan)

    async def found(self, wanted: Plan = ()) -> Plan:
        """Read what is here."""
        with self.entered():
            return await self.kernel.found(wanted)

    async def rest(self) -> Plan:
        """Read what is here, but what a host keeps for good."""
        found = await self.found()
        return tuple(op for op in found if not getattr(op, "keep", False))

    async def lines(self, wanted: Plan) -> list[str]:
        """Return what stands between a plan and what is here."""
        return list(compare(wanted, await self.found(wanted)).lines())

    def own(self, *words: str, check: bool = True) -> str:
        """Run a command in pynet's namespace."""
        return run("ip", "netns", "exec", self.host.namespace, *words, check=check)

    def member(self, net: Network) -> Member:
        """Return this host's part in a network, with the host's own addresses."""
        own: dict[str, object] = {}
        if net.host_access:
            for subnet in net.subnets:
                address = subnet.pool[250 + self.number]
                face = ip_interface((address, subnet.pool.prefixlen))
                own[f"ipv{face.version}"] = face
        return Member(network=net.id, host=self.host.id, **own)

    def endpoint(self, net: Network, number: int) -> Endpoint:
        """Return an endpoint of this host's with the given address in each pool."""
        pools = {s.pool.version: s.pool for s in net.subnets}
        faces = {
            v: ip_interface((pool[number], pool.prefixlen)) for v, pool in pools.items()
        }
        return Endpoint(
            network=net.id,
            id=f"ep-{net.id}-{number}",
            host=self.host.id,
            boot="boot",
            mac=f"02:42:00:00:00:{number:02x}",
            ipv4=faces.get(4),
            ipv6=faces.get(6),
        )

    def plan(self, net: Network, *endpoints: Endpoint, others: Plan = ()) -> Plan:
        """Return the plan of a network with endpoints here, and what is elsewhere."""
        own = self.member(net)
        plan = overlay.network(net, own, self.host)
        let_in = tuple(map(firewall.vtep, self.vteps))
        parts = (overlay.endpoint(net, own, e, self.host) for e in endpoints)
        return union((plan, let_in, *parts, others))

    def remote(self, net: Network, *remotes: Remote) -> Plan:
        """Return what lets containers here reach some elsewhere."""
        own = self.member(net)
        return union(overlay.remote(net, own, r, self.host) for r in remotes)

    def as_remote(self, endpoint: Endpoint) -> Remote:
        """Return what others must know of an endpoint here."""
        assert self.host.vtep is not None
        addresses = tuple(a.ip for a in endpoint.addresses)
        return Remote(mac=endpoint.mac, addresses=addresses, vtep=self.host.vtep)

    def start(self, endpoint: Endpoint, gateway: IPAddress | None = None) -> Namespace:
        """Start a container: do what Docker does after Join."""
        box = self.stack.enter_context(namespace())
        peer = devices.peer(endpoint.id)
        self.space.run("ip", "link", "set", peer, "netns", box.path, "name", "eth0")
        for face in endpoint.addresses:
            box.run("ip", "addr", "add", str(face), "dev", "eth0", "nodad")
        box.run("ip", "link", "set", "eth0", "up")
        if gateway is not None:
            box.run("ip", "route", "add", "default", "via", str(gateway))
        self.boxes[endpoint.id] = box
        return box

    def left(self) -> list[str]:
        """Name what is pynet's here, asking no code of pynet's."""
        links = self.space.run("ip", "-o", "-d", "link").splitlines()
        found = [line for line in links if "pynet" in line or "group 28782" in line]
        tables = self.space.run("nft", "list", "tables").splitlines()
        found += [line for line in tables if "pynet" in line]
        if Path("/run/netns", self.host.namespace).exists():
            found.append(f"namespace {self.host.namespace}")
        return found


def other_kernel(side: Side, directory: Path, step: Step = nothing) -> Kernel:
    """Make a second dataplane of the same host: a later life of its daemon."""
    name = side.host.namespace
    return Kernel(
        host=side.host.id, run_dir=directory / "again", step=step, namespace=name
    )


@asynccontextmanager
async def side(
    directory: Path, *, number: int = 1, version: int = 4
) -> AsyncIterator[Side]:
    """Make a host with a dataplane; nothing leads out of it yet."""
    name = f"pynet-{os.getpid()}-{next(NUMBERS)}"
    vtep = ip_interface(UNDERLAY[version].format(number)).ip
    host = Host(
        id=f"{number}123456789abcdef",
        name=f"host{number}",
        version="0",
        vtep=vtep,
        namespace=name,
    )
    async with AsyncExitStack() as closing:
        stack = closing.enter_context(ExitStack())
        stack.callback(run, "ip", "netns", "del", name, check=False)
        space = stack.enter_context(namespace())
        kernel = Kernel(host=host.id, run_dir=directory / name, namespace=name)
        made = Side(number=number, space=space, kernel=kernel, host=host, stack=stack)
        with made.entered():
            await kernel.open()
        closing.push_async_callback(kernel.close)
        yield made


def addressed(one: Side, device: str) -> None:
    """Give a host's underlay device its addresses."""
    for version in (4, 6):
        face = ip_interface(UNDERLAY[version].format(one.number))
        one.space.run("ip", "addr", "add", str(face), "dev", device, "nodad")
    one.space.run("ip", "link", "set", device, "up")


@asynccontextmanager
async def pair(directory: Path, version: int = 4) -> AsyncIterator[tuple[Side, Side]]:
    """Make two hosts, joined by an underlay."""
    async with (
        side(directory, number=1, version=version) as one,
        side(directory, number=2, version=version) as two,
    ):
        run(
            *("nsenter", f"--net={one.space.path}", "ip", "link", "add", "eth0"),
            *("type", "veth", "peer", "name", "eth0", "netns", two.space.path),
        )
        addressed(one, "eth0")
        addressed(two, "eth0")
        one.vteps, two.vteps = (two.host.vtep,), (one.host.vtep,)
        yield one, two


@asynccontextmanager
async def alone(directory: Path, version: int = 4) -> AsyncIterator[Side]:
    """Make one host, whose underlay leads nowhere."""
    async with side(directory, version=version) as one:
        one.space.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "x")
        addressed(one, "eth0")
        yield one


def net(*pools: str, **fields: object) -> Network:
    """Return an overlay of these pools."""
    fields = {"mode": "overlay", "vni": 10_000_001, "gateway": "docker", **fields}
    return network(*(pools or (V4, V6)), **fields)


def elsewhere(count: int) -> tuple[Remote, ...]:
    """Return that many endpoints on other hosts."""
    return tuple(
        Remote(
            mac=":".join(f"{byte:02x}" for byte in (0x0243 << 32 | n).to_bytes(6)),
            addresses=(
                ip_address(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}"),
                ip_address(f"fd00:10::{n:x}"),
            ),
            vtep=ip_address(f"192.0.2.{10 + n % 200}"),
        )
        for n in range(1, count + 1)
    )


def kinds(plan: Plan) -> dict[type[Op], int]:
    """Count the operations of each type."""
    return {kind: sum(type(o) is kind for o in plan) for kind in map(type, plan)}
