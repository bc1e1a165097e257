import asyncio
import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from pyroute2 import Conntrack

from cnmdriver.dataplane import conntrack
from cnmdriver.dataplane.conntrack import forget
from cnmdriver.plan.firewall import TEXT
from cnmdriver.plan.ops import Element

pytestmark = pytest.mark.root

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNET = 0x40000000
PORT, INSIDE = 5353, 53
ANY4 = "0.0.0.0"


def call(*words: str, text: str | None = None) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, input=text, text=True, timeout=10)


def current() -> int:
    """Open the network namespace of the thread."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Have the thread in another network namespace."""
    before = current()
    assert LIBC.setns(namespace, NEWNET) == 0
    try:
        yield
    finally:
        assert LIBC.setns(before, NEWNET) == 0
        os.close(before)


@contextmanager
def fresh() -> Iterator[int]:
    """Make an empty network namespace that lives as long as the block."""
    before = current()
    assert LIBC.unshare(NEWNET) == 0
    made = current()
    assert LIBC.setns(before, NEWNET) == 0
    os.close(before)
    with inside(made):
        no_dad = Path("/proc/sys/net/ipv6/conf/default/accept_dad")
        no_dad.write_text("0", encoding="ascii")
        call("ip", "link", "set", "lo", "up")
    yield made
    os.close(made)


class Lab:
    """
    A host, number 0, with our table, and four machines around it.

    Machine n has 10.n.0.2 and fd0n::2, the host 10.n.0.1 and fd0n::1.
    """

    def __init__(self, host: int) -> None:
        self.sockets: list[socket.socket] = []
        self.machines = {0: host}

    def wire(self, number: int, namespace: int) -> None:
        self.machines[number] = namespace
        there = f"/proc/{os.getpid()}/fd/{namespace}"
        call("ip", "link", "add", f"h{number}", "type", "veth", "peer", "name", "eth0")
        call("ip", "link", "set", "eth0", "netns", there)
        up(f"h{number}", f"10.{number}.0.1/24", f"fd0{number}::1/64")
        with inside(namespace):
            up("eth0", f"10.{number}.0.2/24", f"fd0{number}::2/64")
            call("ip", "route", "add", "default", "via", f"10.{number}.0.1")
            call("ip", "route", "add", "default", "via", f"fd0{number}::1")

    def open(self, number: int, address: str, port: int, kind: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with inside(self.machines[number]):
            sock = socket.socket(family, kind)
        self.sockets.append(sock)
        sock.settimeout(2)
        sock.bind((address, port))
        return sock

    def udp(self, number: int, address: str, port: int = 0) -> socket.socket:
        return self.open(number, address, port, socket.SOCK_DGRAM)


def up(device: str, *addresses: str) -> None:
    """Set a device up and give it addresses."""
    call("ip", "link", "set", device, "up")
    for address in addresses:
        nodad = ("nodad",) if ":" in address else ()
        call("ip", "addr", "add", address, "dev", device, *nodad)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Give a lab, with the thread inside its host."""
    with fresh() as host, inside(host):
        made = Lab(host)
        for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", setting).write_text("1", encoding="ascii")
        call("nft", "-f", "-", text=f"{TEXT}}}\n")
        with fresh() as one, fresh() as two, fresh() as three, fresh() as four:
            for number, namespace in enumerate((one, two, three, four), 1):
                made.wire(number, namespace)
            yield made
            for sock in made.sockets:
                sock.close()


def element(name: str, *item: str, to: str, port: int = INSIDE) -> Element:
    """Write an element of a map of published ports."""
    return Element(set=name, item=item, value=(to, str(port)))


def published(to: int, version: int = 4) -> Element:
    """Publish the udp port for a machine."""
    address = f"10.{to}.0.2" if version == 4 else f"fd0{to}::2"
    return element(f"any{version}", "udp", str(PORT), to=address)


def put(wanted: Element, *, instead_of: Element | None = None) -> None:
    """Put an element into the table."""
    place = f"element inet pynet {wanted.set}"
    gone = f"delete {place} {{ {instead_of.text} }}\n" if instead_of else ""
    call("nft", "-f", "-", text=f"{gone}add {place} {{ {wanted.text} }}\n")


def ask(client: socket.socket, host: str, *servers: socket.socket) -> int:
    """Send a datagram, and return the index of the server that got it."""
    client.sendto(b"hello", (host, PORT))
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        for index, server in enumerate(servers):
            with suppress(TimeoutError):
                server.settimeout(0.02)
                data, sender = server.recvfrom(100)
                server.sendto(data, sender)
                assert client.recv(100) == b"hello"
                return index
    raise AssertionError("nobody got the datagram")


async def entries(port: int = PORT) -> list[str]:
    """Return "client address → address" of all entries to a port, as others see it."""

    def listed() -> list[str]:
        with Conntrack() as kernel:
            return sorted(
                f"{e.tuple_orig.saddr} → {e.tuple_orig.daddr}"
                for e in kernel.dump_entries()
                if e.tuple_orig.dport == port
            )

    return await asyncio.to_thread(listed)


@pytest.mark.parametrize("version", [4, 6])
async def test_a_udp_client_follows_a_port_that_moved(lab: Lab, version: int) -> None:
    """
    A client that keeps its source port reaches the container the port moved to.

    1. The port is published for A, and a client asks: A has it.
    2. The port moves to B; the client asks again: A still has it.
    3. The old state is forgotten; the client asks again.

    Result: B has it.
    """
    host, wild = ("10.3.0.1", ANY4) if version == 4 else ("fd03::1", "::")
    servers = lab.udp(1, wild, INSIDE), lab.udp(2, wild, INSIDE)
    client = lab.udp(3, wild, 40000)
    old, new = published(1, version), published(2, version)
    put(old)
    assert ask(client, host, *servers) == 0
    put(new, instead_of=old)
    assert ask(client, host, *servers) == 0
    await forget([new])
    assert ask(client, host, *servers) == 1


async def test_flows_through_the_host_stay(lab: Lab) -> None:
    """A flow to another machine's same port stays, also if others translated it."""
    call("ip", "route", "add", "198.51.100.0/24", "via", "10.4.0.2")
    rule = "ip daddr 198.51.100.9 udp dport 5353 dnat to 10.4.0.2"
    hook = "type nat hook prerouting priority -100;"
    text = f"table ip other {{\nchain c {{\n{hook}\n{rule}\n}}\n}}\n"
    call("nft", "-f", "-", text=text)
    server = lab.udp(4, ANY4, PORT)
    assert ask(lab.udp(3, ANY4), "10.4.0.2", server) == 0
    assert ask(lab.udp(3, ANY4), "198.51.100.9", server) == 0
    put(published(1))
    here = lab.udp(1, ANY4, INSIDE)
    assert ask(lab.udp(3, ANY4), "10.3.0.1", here) == 0
    others = ["10.3.0.2 → 10.4.0.2", "10.3.0.2 → 198.51.100.9"]
    assert await entries() == ["10.3.0.2 → 10.3.0.1", *others]
    await forget([published(1)])
    assert await entries() == others


async def test_an_earlier_client_reaches_a_port_published_later(lab: Lab) -> None:
    """A udp client that asked before the port was published reaches the container."""
    held = lab.udp(0, ANY4, PORT)
    server, client = lab.udp(1, ANY4, INSIDE), lab.udp(3, ANY4, 40000)
    assert ask(client, "10.3.0.1", held, server) == 0
    put(published(1))
    await forget([published(1)], spare=True)
    assert ask(client, "10.3.0.1", held, server) == 1


async def test_a_bound_port_concerns_its_address_alone(lab: Lab) -> None:
    """Flows to the same port of another address of the host stay."""
    server = lab.udp(1, ANY4, INSIDE)
    ports = [
        element("bound4", host, "udp", str(PORT), to="10.1.0.2")
        for host in ("10.3.0.1", "10.4.0.1")
    ]
    for port in ports:
        put(port)
    assert ask(lab.udp(3, ANY4), "10.3.0.1", server) == 0
    assert ask(lab.udp(3, ANY4), "10.4.0.1", server) == 0
    await forget(ports[:1])
    assert await entries() == ["10.3.0.2 → 10.4.0.1"]


async def test_spared_flows_are_those_to_the_element_itself(lab: Lab) -> None:
    """With `spare` a flow that goes to the element's target stays, others go."""
    servers = lab.udp(1, ANY4, INSIDE), lab.udp(2, ANY4, INSIDE)
    put(published(1))
    assert ask(lab.udp(3, ANY4), "10.3.0.1", *servers) == 0
    put(published(2), instead_of=published(1))
    assert ask(lab.udp(4, ANY4), "10.4.0.1", *servers) == 1
    await forget([published(2)], spare=True)
    assert await entries() == ["10.4.0.2 → 10.4.0.1"]


async def test_tcp_of_programs_stays_and_translated_tcp_goes(lab: Lab) -> None:
    """Only translated tcp connections go: others are with a program or a relay."""
    inside_port = element("any4", "tcp", str(PORT), to="10.1.0.2")
    here = lab.open(0, "10.3.0.1", PORT, socket.SOCK_STREAM)
    there = lab.open(1, ANY4, INSIDE, socket.SOCK_STREAM)
    here.listen()
    there.listen()
    lab.open(3, ANY4, 0, socket.SOCK_STREAM).connect(("10.3.0.1", PORT))
    put(inside_port)
    lab.open(4, ANY4, 0, socket.SOCK_STREAM).connect(("10.4.0.1", PORT))
    both = ["10.3.0.2 → 10.3.0.1", "10.4.0.2 → 10.4.0.1"]
    assert await entries() == both
    await forget([inside_port], spare=True)
    assert await entries() == both
    await forget([inside_port])
    assert await entries() == both[:1]


async def test_addresses_of_a_local_route_are_the_host_too(lab: Lab) -> None:
    """An address the host has by a local route alone counts as one of its own."""
    call("ip", "route", "add", "local", "192.0.2.0/24", "dev", "lo")
    server = lab.udp(1, ANY4, INSIDE)
    put(published(1))
    client = lab.udp(3, ANY4)
    assert ask(client, "192.0.2.77", server) == 0
    await forget([published(1)])
    assert await entries() == []


async def test_many_ports_at_once(lab: Lab) -> None:
    """A thousand ports cost one look at the table, and forget no other port's flow."""
    server = lab.udp(1, ANY4, INSIDE)
    put(published(1))
    assert ask(lab.udp(3, ANY4), "10.3.0.1", server) == 0
    ports = [
        element("any4", "udp", str(number), to="10.1.0.2")
        for number in range(20000, 21000)
    ]
    await forget(ports)
    assert await entries() == ["10.3.0.2 → 10.3.0.1"]
    await forget([*ports, published(1)])
    assert await entries() == []


@pytest.mark.timeout(60)
async def test_many_flows_are_forgotten_within_the_bound(lab: Lab) -> None:
    """Some thousand clients of one port are forgotten by one call."""
    put(published(1))
    clients = [lab.udp(3, ANY4) for _ in range(500)]
    for client in clients:
        for last in range(1, 5):
            client.sendto(b"x", (f"10.{last}.0.1", PORT))
    assert len(await entries()) == 2000
    await forget([published(1)])
    assert await entries() == []


async def test_an_sctp_association_is_forgotten(lab: Lab) -> None:
    """An entry of sctp goes as well, though this kernel may have no such sockets."""
    port = element("any4", "sctp", str(PORT), to="10.1.0.2")
    put(port)
    with inside(lab.machines[3]):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 132)
    lab.sockets.append(raw)
    raw.sendto(init(40000, PORT), ("10.3.0.1", 0))
    assert await flows(port) == [(bytes((10, 3, 0, 1)), PORT)]
    await forget([port])
    assert await flows(port) == []


@pytest.mark.usefixtures("lab")
async def test_other_sets_and_a_kernel_that_remembers_nothing() -> None:
    """Elements of other sets are passed over, and an empty table is no error."""
    await forget([])
    await forget([Element(set="own4", item=("10.1.0.0/24", '"pn-1"'))])
    await forget([published(1), published(1, 6)])
    with fresh() as bare, inside(bare):
        await forget([published(1)])


async def flows(element: Element) -> list[tuple[bytes, int]]:
    """Return where the flows to a port were sent; the only reader that knows sctp."""

    def listed() -> list[tuple[bytes, int]]:
        with conntrack.opened(conntrack.NETLINK_NETFILTER) as sock:
            kind = conntrack.port(element).kind
            found = conntrack.found(sock, [kind], time.monotonic() + 2)
            return [flow.sent_to for flow in found]

    return await asyncio.to_thread(listed)


def init(source: int, port: int) -> bytes:
    """Pack the first packet of an sctp association."""
    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)
    head = struct.pack(">HHI", source, port, 0)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def crc32c(data: bytes) -> int:
    """Return the checksum of sctp."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF
