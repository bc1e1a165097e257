"""Namespaces for the tests of the dataplane, and plans to fill them with."""

import ctypes
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from threading import Thread

import pytest

from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.model import (
    SCTP,
    TCP,
    UDP,
    Endpoint,
    Host,
    Member,
    Network,
    Published,
    Subnet,
)
from cnmdriver.plan import devices
from cnmdriver.plan.modes import MODES
from cnmdriver.plan.ops import Plan, union

CLONE_NEWNET = 0x40000000
HOST = "0123456789abcdef"
LOCAL = Host(id=HOST, name="local", version="0")
LIBC = ctypes.CDLL(None, use_errno=True)

VOLATILE = {
    *("gc_timer", "hello_timer", "tcn_timer", "topology_change_timer"),
    *("forward_delay_timer", "hold_timer", "message_age_timer"),
    # The kernel sees a moment later that nobody is at the other end.
    *("operstate", "state", "LOWER_UP", "NO-CARRIER"),
    "ifindex",
}
SETTINGS = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/*/accept_ra",
    "net/ipv6/conf/*/disable_ipv6",
    "net/ipv4/conf/*/route_localnet",
)


@dataclass(kw_only=True)
class Namespace:
    """A network namespace, held by a descriptor alone."""

    fd: int
    path: str = field(init=False)

    def __post_init__(self):
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command inside, and return what it printed."""
        return run("nsenter", f"--net={self.path}", *words, check=check)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command inside."""
        return subprocess.Popen(
            ["nsenter", f"--net={self.path}", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


def run(*words: str, check: bool = True) -> str:
    """Run a command, and return what it printed."""
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=20
    )
    assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def call(name: str, *arguments: int) -> None:
    """Call a function of libc that returns 0 for success."""
    if getattr(LIBC, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Make a namespace with a loopback that is up."""
    fds: list[int] = []

    def make() -> None:
        call("unshare", CLONE_NEWNET)
        fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = Thread(target=make)
    thread.start()
    thread.join()
    made = Namespace(fd=fds[0])
    try:
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        os.close(made.fd)


@pytest.fixture
def host() -> Iterator[Namespace]:
    """Put the test itself into a namespace of its own."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with namespace() as own:
        call("setns", own.fd, CLONE_NEWNET)
        try:
            yield own
        finally:
            call("setns", before, CLONE_NEWNET)
            os.close(before)


@pytest.fixture
async def kernel(host, tmp_path: Path) -> AsyncIterator[Kernel]:
    """Open a dataplane in the test's namespace."""
    assert host
    opened = Kernel(host=HOST, run_dir=tmp_path / "run")
    await opened.open()
    yield opened
    await opened.close()


def links() -> dict[str, object]:
    """Read all devices, without what changes by itself."""

    def steady(value: object) -> object:
        if isinstance(value, dict):
            return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
        if isinstance(value, list):
            return [steady(v) for v in value if v not in VOLATILE]
        return value

    found = json.loads(run("ip", "-j", "-d", "link"))
    return {link["ifname"]: steady(link) for link in found}


def addresses() -> list[str]:
    """Read all addresses, without the index of their device."""
    lines = run("ip", "-o", "addr").splitlines()
    return sorted(line.partition(":")[2] for line in lines)


def routes() -> str:
    """Read all routes, without what the kernel sees a moment later."""
    found = run("ip", "route") + run("ip", "-6", "route")
    return found.replace("linkdown ", "")


def ruleset() -> str:
    """Read all rules; tables and chains in an order that does not tell their age."""
    tables = run("nft", "-s", "list", "ruleset").split("\n}\n")
    return "".join(sorted(table(text) for text in tables if text))


def table(text: str) -> str:
    """Sort the chains of a table."""
    head, _, body = text.partition("\n")
    parts = (part.strip("\n") for part in body.split("\n\t}"))
    inner = "\n\t}\n".join(sorted(part for part in parts if part))
    return f"{head}\n{inner}\n\t}}\n}}\n" if inner else f"{head}\n}}\n"


def settings() -> dict[str, str]:
    """Read the settings that plans touch."""
    root = Path("/proc/sys")
    paths = (path for pattern in SETTINGS for path in sorted(root.glob(pattern)))
    return {str(path): path.read_text() for path in paths}


def dump() -> dict[str, object]:
    """Read everything a plan can change."""
    return {
        "links": links(),
        "addresses": addresses(),
        "routes": routes(),
        "nft": ruleset(),
        "settings": settings(),
        "sockets": run("ss", "-Hlntu"),
    }


def member(network: Network, **fields: object) -> Member:
    """Return this host's part in a network."""
    name = devices.bridge(network.id)
    return Member(network=network.id, host=HOST, bridge=name, **fields)


def network(*pools: str, **fields: object) -> Network:
    """Return a network of these pools, each with its first address as gateway."""
    subnets = tuple(
        Subnet(space="local", pool=ip_network(p), gateway=ip_network(p)[1])
        for p in pools
    )
    fields = {"id": f"net-{'-'.join(pools)}", "mode": "bridge", "mtu": 1450, **fields}
    return Network(subnets=subnets, **fields)


def endpoint(net: Network, number: int, *published: Published) -> Endpoint:
    """Return the endpoint with the given address in each pool."""
    by = {s.pool.version: s.pool for s in net.subnets}
    addresses = {
        v: ip_interface((p[number].packed, p.prefixlen)) for v, p in by.items()
    }
    return Endpoint(
        network=net.id,
        id=f"ep-{net.id}-{number}",
        host=HOST,
        boot="boot",
        mac=f"02:42:00:00:00:{number:02x}",
        ipv4=addresses.get(4),
        ipv6=addresses.get(6),
        published=published,
    )


def published(protocol: int, host_port: int, host_ip: str | None = None) -> Published:
    """Return a published port that leads to port 80."""
    address = None if host_ip is None else ip_address(host_ip)
    return Published(protocol=protocol, port=80, host_ip=address, host_port=host_port)


def whole(net: Network, *endpoints: Endpoint) -> Plan:
    """Return the plan of a network with endpoints."""
    own, mode = member(net), MODES[net.mode]
    parts = (mode.endpoint(net, own, e, LOCAL) for e in endpoints)
    return union((mode.network(net, own, LOCAL), *parts))


V4, V6 = "10.200.1.0/24", "fd00:200:1::/64"
PORTS = (
    published(TCP, 8080),
    published(UDP, 8080),
    published(SCTP, 8080),
    published(TCP, 8081, "127.0.0.1"),
    published(TCP, 8081, "::1"),
    published(UDP, 8082, "0.0.0.0"),
    published(UDP, 8082, "::"),
)


def cases() -> dict[str, Plan]:
    """Return the plans that every promise must hold for."""
    nets = {
        "v4": network(V4),
        "v6": network(V6),
        "dual": network(V4, V6),
        "icc_off": network(V4, V6, icc=False),
        "internal": network(V4, V6, internal=True),
        "docker_gateway": network(V4, gateway="docker"),
        "no_masquerade": network(V4, masquerade=False),
        "single": network("10.200.1.4/31", "fd00:200:1::4/127"),
        "small_mtu": network(V4, mtu=576),
    }
    plain = {
        n: whole(v, endpoint(v, 1 if n == "single" else 2)) for n, v in nets.items()
    }
    ports = {
        f"{name}_ports": whole(nets[name], endpoint(nets[name], 2, *PORTS))
        for name in ("v4", "v6", "dual")
    }
    return plain | ports


@pytest.fixture(params=cases().values(), ids=cases().keys())
def plan(request: pytest.FixtureRequest) -> Plan:
    """Give each plan in turn."""
    return request.param
