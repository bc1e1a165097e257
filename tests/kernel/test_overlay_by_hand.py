"""The overlay's recipe itself: the plans of two hosts, typed into them by a shell."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

import pytest

from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.insight.explain import Part, Seat, script
from cnmdriver.model import (
    TCP,
    Endpoint,
    Host,
    Member,
    Network,
    Published,
    Remote,
    Subnet,
)
from cnmdriver.plan import devices, firewall, overlay
from cnmdriver.plan.ops import compare, union
from tests.kernel.conftest import namespace, run

pytestmark = pytest.mark.root

OUTSIDE = "192.0.2.254"
OUTSIDE6 = "2001:db8::254"
FOUR = Subnet(space="l", pool=ip_network("10.1.0.0/24"), gateway=ip_address("10.1.0.1"))
SIX = Subnet(space="l", pool=ip_network("fd00::/64"), gateway=ip_address("fd00::1"))
NETWORK = Network(
    id="red",
    mode="overlay",
    subnets=(FOUR, SIX),
    mtu=1450,
    vni=10_000_001,
    gateway="docker",
)
ENDS = ((1, "a", 11), (1, "b", 12), (2, "c", 21), (2, "d", 22))
GATEWAYS = {"10.1.0.1", "fd00::1"}
"""Two endpoints on each of the two hosts: host, name and last number."""


@dataclass
class Lab:
    """Two hosts, and the world outside, which knows no address of a container."""

    shells: list
    outside: object

    def at(self, host, *words, check=True):
        """Run a command on a host."""
        enter = ("nsenter", f"--target={self.shells[host - 1].pid}", "--net", "--mount")
        return run(*enter, *words, check=check)

    def within(self, name, *words, check=True):
        """Run a command in the sandbox of that name."""
        (host,) = [number for number, end, _ in ENDS if end == name]
        return self.at(host, "ip", "netns", "exec", name, *words, check=check)

    def pings(self, place, target, *, wait=1):
        """Tell whether a sandbox or a host has an answer of a target."""
        words = ("ping", "-c1", "-W", str(wait), target)
        go = self.at if isinstance(place, int) else self.within
        return " 1 received" in go(place, *words, check=False)

    def asks(self, place, address):
        """Tell whether a sandbox or a host has an answer of a published port."""
        go = self.at if isinstance(place, int) else self.within
        return go(place, *asking(address), check=False) == "hello"


def machine(number, *, six=False):
    """Return one of the hosts."""
    vtep = ip_address(f"2001:db8::{number}" if six else f"192.0.2.{number}")
    return Host(id=f"{number}" * 16, name=f"h{number}", version="1", vtep=vtep)


def member(number):
    """Return a host's part, with addresses of its own."""
    return Member(
        network="red",
        host=f"{number}" * 16,
        docker_id="d",
        ipv4=ip_interface(f"10.1.0.{number + 1}/24"),
        ipv6=ip_interface(f"fd00::{number + 1}/64"),
    )


def endpoint(number, name, last, *ports):
    """Return an endpoint."""
    four, six = ip_interface(f"10.1.0.{last}/24"), ip_interface(f"fd00::{last}/64")
    return Endpoint(
        network="red",
        id=name,
        host=f"{number}" * 16,
        boot="b",
        mac=devices.mac(four.ip),
        ipv4=four,
        ipv6=six,
        sandbox=f"/run/netns/{name}",
        published=ports,
    )


def parts(network, number, *, six, ports=()):
    """Yield what a host types: the network, its endpoints, and the other host's."""
    own, its = machine(number, six=six), member(number)
    yield Part(title="network red", plan=overlay.network(network, its, own))
    gateways = (FOUR.gateway, SIX.gateway) if network.gateway == "pynet" else ()
    for of, name, last in ENDS:
        if of != number:
            continue
        end = endpoint(of, name, last, *(ports if name == "a" else ()))
        seat = Seat(
            endpoint=end,
            source=devices.peer(name),
            device="eth0",
            opens=True,
            gateways=gateways,
        )
        plan = overlay.endpoint(network, its, end, own)
        yield Part(title=name, first=seat.opening(), plan=plan, docker=seat.commands())
    yield Part(title="others", plan=others(network, own))


def others(network, own):
    """Return what a host knows of the other one."""
    far = 2 if own.name == "h1" else 1
    its, six = member(3 - far), own.vtep.version == 6
    vtep = machine(far, six=six).vtep
    known = [
        Remote(mac=e.mac, addresses=tuple(a.ip for a in e.addresses), vtep=vtep)
        for e in (endpoint(*end) for end in ENDS if end[0] == far)
    ]
    if network.host_access:
        addresses = tuple(a.ip for a in member(far).addresses)
        mac = devices.mac(addresses[0])
        known.append(Remote(mac=mac, addresses=addresses, vtep=vtep))
    plan = (firewall.vtep(vtep), *overlay.peer(network, its, vtep, own))
    for remote in known:
        plan += overlay.remote(network, its, remote, own)
    return plan


def underlay(outside, number, pid):
    """Join a host to the segment that all are on."""
    port = ("ip", "link", "add", f"h{number}", "type", "veth", "peer", "name", "eth0")
    outside.run(*port, "netns", str(pid))
    outside.run("ip", "link", "set", f"h{number}", "master", "segment", "up")
    enter = ("nsenter", f"--target={pid}", "--net")
    run(*enter, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
    run(*enter, "sysctl", "-qw", "net.ipv4.conf.default.rp_filter=1")
    for address in (f"192.0.2.{number}/24", f"2001:db8::{number}/64"):
        nodad = ("nodad",) if ":" in address else ()
        run(*enter, "ip", "addr", "add", address, "dev", "eth0", *nodad)
    for device in ("lo", "eth0"):
        run(*enter, "ip", "link", "set", device, "up")
    for way in (("-4", OUTSIDE), ("-6", OUTSIDE6)):
        run(*enter, "ip", way[0], "route", "add", "default", "via", way[1])


def shell(stack, path):
    """Start a host that types the file when it is told to, and ends with its input."""
    steps = (
        "mount -t tmpfs none /run",
        "echo made",
        "read -r go",
        f"bash -e {path}",
        "echo typed",
        "read -r end || true",
    )
    opened = subprocess.Popen(
        ["unshare", "--net", "--mount", "bash", "-c", " && ".join(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.callback(opened.communicate, timeout=10)
    assert opened.stdout.readline() == "made\n"
    return opened


@contextmanager
def typed(network, tmp_path, *, six=False, ports=()):
    """Type the plans of a network into two hosts."""
    with ExitStack() as stack:
        outside = stack.enter_context(namespace())
        outside.run("ip", "link", "add", "segment", "type", "bridge")
        outside.run("ip", "link", "set", "segment", "up")
        outside.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "segment")
        outside.run("ip", "addr", "add", f"{OUTSIDE6}/64", "dev", "segment", "nodad")
        shells = []
        for number in (1, 2):
            path = tmp_path / f"host{number}"
            listed = parts(network, number, six=six, ports=ports)
            path.write_text(script(f"h{number}", listed))
            shells.append(shell(stack, path))
            underlay(outside, number, shells[-1].pid)
        for opened in shells:
            print("go", file=opened.stdin, flush=True)
        for opened in shells:
            assert opened.stdout.readline() == "typed\n", opened.stderr.read()
        yield Lab(shells, outside)


def between(lab, *places):
    """Assert that sandboxes reach each other's addresses of both families."""
    for place in places:
        for _, name, last in ENDS:
            if place != name:
                assert lab.pings(place, f"10.1.0.{last}"), (place, name)
                assert lab.pings(place, f"fd00::{last}"), (place, name)


def answers(lab, name, target):
    """Return who else answers a sandbox's ping of a group."""
    words = ("ping", "-c", "2", "-i", "0.3", "-W", "1", target)
    said = lab.within(name, *words, check=False)
    heard = {x.split()[3].rstrip(":") for x in said.splitlines() if "ttl=" in x}
    return {address for address in heard if not address.startswith("fe80::")}


def fdb(lab, number):
    """Return which port of a host's bridge each MAC is behind."""
    said = lab.at(number, "bridge", "-n", "pynet", "fdb", "show").splitlines()
    return {x.split()[0]: x.split()[2] for x in said if "master" in x}


@pytest.mark.parametrize("six", [False, True])
def test_plain(tmp_path, six):
    """All reach each other by both families, by tunnels of either; nobody the host."""
    network = replace(NETWORK, mtu=1430 if six else 1450)
    with typed(network, tmp_path, six=six) as lab:
        between(lab, "a", "d")
        for option, target, header in (("-4", "10.1.0.21", 28), ("-6", "fd00::21", 48)):
            whole = ("ping", option, "-c1", "-W1", "-M", "do")
            size = ("-s", str(network.mtu - header))
            assert " 1 received" in lab.within("a", *whole, *size, target)
        assert answers(lab, "a", "ff02::1%eth0") == {"fd00::12"}
        lab.within("a", "ip", "route", "add", "default", "dev", "eth0")
        assert not lab.pings("a", "192.0.2.1")
        for number in (1, 2):
            assert not re.search("p[a-z]+-", lab.at(number, "nft", "list", "ruleset"))
            assert "10.1.0" not in lab.at(number, "ip", "route")


def test_forged_source(tmp_path):
    """No sandbox takes another's frames by sending with its MAC."""
    with typed(NETWORK, tmp_path) as lab:
        before = fdb(lab, 1)
        for stolen in (12, 21):
            mac = devices.mac(IPv4Address(f"10.1.0.{stolen}"))
            lab.within("a", "ip", "link", "set", "eth0", "address", mac)
            lab.pings("a", "10.1.0.250")
            assert fdb(lab, 1)[mac] == before[mac]
        assert before[devices.mac(IPv4Address("10.1.0.21"))] == devices.vxlan("red")
        assert lab.pings("b", "10.1.0.21")


def test_flood(tmp_path):
    """What is for everybody reaches the sandboxes of all hosts, if it is asked for."""
    with typed(replace(NETWORK, flood=True), tmp_path) as lab:
        between(lab, "a")
        assert answers(lab, "a", "ff02::1%eth0") == {"fd00::12", "fd00::21", "fd00::22"}


def test_no_icc(tmp_path):
    """Without traffic between sandboxes there is none, on one host or between two."""
    with typed(replace(NETWORK, icc=False, gateway="pynet"), tmp_path) as lab:
        for target in ("10.1.0.12", "fd00::12", "10.1.0.21", "fd00::21"):
            assert not lab.pings("a", target, wait=0.5)
        assert lab.pings("a", "10.1.0.1")
        assert lab.pings("a", OUTSIDE)


SERVER = """
import socket
with socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True) as s:
    print("ready", flush=True)
    while True:
        s.accept()[0].sendall(b"hello")
"""


def published(lab):
    """Assert that a port of sandbox `a` answers at its host's addresses."""
    enter = ("nsenter", f"--target={lab.shells[0].pid}", "--net", "--mount")
    inside = ("ip", "netns", "exec", "a", sys.executable, "-c", SERVER)
    with subprocess.Popen(
        [*enter, *inside], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout.readline() == "ready\n"
            for address in ("192.0.2.1", "2001:db8::1"):
                for place in ("a", "b", "c", 1, 2):
                    assert lab.asks(place, address), (place, address)
                said = lab.outside.run(*asking(address), check=False)
                assert said == "hello", address
            assert lab.asks(1, "127.0.0.1")
        finally:
            server.kill()


def asking(address):
    """Return the command that prints what port 8080 of an address says."""
    return ("timeout", "2", "bash", "-c", f"cat < /dev/tcp/{address}/8080")


@pytest.mark.parametrize("access", [False, True])
@pytest.mark.parametrize("flood", [False, True])
def test_gateway(tmp_path, access, flood):
    """Each host is its sandboxes' router: out by NAT, in by a port, never by tunnel."""
    port = Published(protocol=TCP, port=80, host_ip=None, host_port=8080)
    network = replace(NETWORK, gateway="pynet", host_access=access, flood=flood)
    with typed(network, tmp_path, ports=(port,)) as lab:
        between(lab, "a", "d")
        mac = devices.mac(FOUR.gateway)
        for name in ("a", "b", "c"):
            for target in ("10.1.0.1", "fd00::1", OUTSIDE, OUTSIDE6):
                assert lab.pings(name, target), (name, target)
            for option in ("-4", "-6"):
                known = lab.within(name, "ip", option, "neigh")
                ways = [x for x in known.splitlines() if x.split()[0] in GATEWAYS]
                assert ways
                assert all(mac in way for way in ways), known
        published(lab)


@pytest.mark.parametrize(
    ("gateway", "internal", "flood"),
    [("docker", False, False), ("pynet", False, True), ("pynet", True, True)],
)
def test_host_access(tmp_path, gateway, internal, flood):
    """A host with an address of its own reaches sandboxes and hosts, and they it."""
    network = replace(
        NETWORK, gateway=gateway, internal=internal, host_access=True, flood=flood
    )
    with typed(network, tmp_path) as lab:
        between(lab, 1, 2)
        for place in ("a", "d", 1, 2):
            for target in ("10.1.0.2", "fd00::2", "10.1.0.3", "fd00::3"):
                assert lab.pings(place, target), (place, target)
        own = lab.within("a", "ip", "neigh", "show", "10.1.0.2")
        assert devices.mac(IPv4Address("10.1.0.2")) in own
        for target, way in ((OUTSIDE, "10.1.0.3"), (OUTSIDE6, "fd00::3")):
            lab.within("a", "ip", "route", "replace", target, "via", way)
            assert not lab.pings("a", target, wait=0.5)


def dropped(lab, number):
    """Return how many frames from, and to, the gateway a host kept out of tunnels."""
    inside = ("ip", "netns", "exec", "pynet", "nft", "list", "chain", "bridge")
    said = lab.at(number, *inside, "pynet", "forward")
    return [int(count) for count in re.findall(r"packets (\d+)", said)]


def test_gateway_stays_where_it_is(tmp_path):
    """Another host's gateway neither answers nor takes what is sent to it."""
    network = replace(NETWORK, gateway="pynet", flood=True)
    with typed(network, tmp_path) as lab:
        assert lab.pings("a", "10.1.0.1")
        assert dropped(lab, 2)[0] > 0
        tunnel, mac = devices.vxlan("red"), devices.mac(FOUR.gateway)
        entry = ("bridge", "-n", "pynet", "fdb", "replace", mac, "dev", tunnel)
        lab.at(2, *entry, "dst", "192.0.2.1", "self", "permanent")
        lab.at(2, *entry, "master", "static", "sticky")
        known = ("ip", "neigh", "replace", "10.1.0.1", "lladdr", mac, "dev", "eth0")
        lab.within("c", *known)
        assert not lab.pings("c", OUTSIDE)
        assert dropped(lab, 1)[1] > 0


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"subnets": (SIX,), "gateway": "pynet", "icc": False},
        {"subnets": (FOUR,), "mtu": 1200, "gateway": "pynet"},
        {"internal": True, "host_access": True},
        {"gateway": "pynet", "host_access": True, "flood": True},
    ],
)
async def test_typed_is_planned(host, tmp_path, said):
    """What is typed is found as it was planned, in every field that can be seen."""
    assert host
    network = replace(NETWORK, **said)
    place = f"by-hand-{os.getpid()}"
    own = replace(machine(1), namespace=place)
    ends = (endpoint(*end) for end in ENDS if end[0] == 1)
    wanted = union(
        (
            overlay.network(network, member(1), own),
            *(overlay.endpoint(network, member(1), end, own) for end in ends),
            others(network, own),
        )
    )
    path = tmp_path / "text"
    path.write_text(script("h1", [Part(title="red", plan=wanted)]))
    kernel = Kernel(host=own.id, run_dir=tmp_path / "run", namespace=place)
    try:
        run("bash", "-e", str(path))
        await kernel.open()
        try:
            found = await kernel.found(wanted)
        finally:
            await kernel.close()
    finally:
        run("ip", "netns", "del", place, check=False)
    assert list(compare(wanted, found).lines()) == []
