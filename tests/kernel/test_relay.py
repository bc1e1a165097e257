import asyncio
import os
import resource
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from cnmdriver.dataplane.relay import Target, TcpRelay, UdpRelay

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host")]

PORT = 8080
ANY4 = "0.0.0.0"
ECHO = (ip_address("127.0.0.5"), 80)
INSIDE = (ip_address("127.0.0.5"), 53)
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, and end when it ends."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


class Parts:
    """What a test opens; it is closed in reverse, also when the test fails."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    def relay(self, target: Target | None = ECHO, **options: Any) -> TcpRelay:
        """Relay what comes to the port."""
        made = TcpRelay(listener(), target, **options)
        self._stack.push_async_callback(made.close)
        return made

    async def serve(self, serve: Serve = echo, target: Target = ECHO) -> None:
        """Start what the relay leads to."""

        async def closing(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            with suppress(OSError):
                await serve(reader, writer)
            writer.close()

        server = await asyncio.start_server(closing, str(target[0]), target[1])
        self._stack.callback(server.close)

    async def connect(self) -> Stream:
        """Connect to the published port at ::1."""
        reader, writer = await asyncio.open_connection("::1", PORT)
        self._stack.callback(writer.close)
        return reader, writer

    def udp(self, address: str = "::1", port: int = 0) -> socket.socket:
        """Open a udp socket; `::` stands for both families."""
        return self._stack.enter_context(udp(address, port))

    def relay_udp(
        self, target: Target | None = INSIDE, held: str = "::", **options: Any
    ) -> UdpRelay:
        """Relay the datagrams that come to the port."""
        made = UdpRelay(udp(held, PORT), target, **options)
        self._stack.push_async_callback(made.close)
        return made


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    """Give the parts, and wait until nothing of them is left."""
    async with AsyncExitStack() as stack:
        yield Parts(stack)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    # A transport closes its socket in the next turn of the loop.
    await asyncio.sleep(0)


def listener() -> socket.socket:
    """Open the tcp socket of a published port, as `Sockets` does."""
    family = socket.AF_INET6
    sock = socket.create_server(("::", PORT), family=family, dualstack_ipv6=True)
    sock.settimeout(0)
    return sock


def udp(address: str, port: int = 0) -> socket.socket:
    """Open a udp socket."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if address == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((address, port))
    sock.settimeout(0)
    return sock


async def until(done: Callable[[], bool]) -> None:
    """Wait for a state of the kernel, which has no event for it."""
    async with asyncio.timeout(5):
        while not done():
            await asyncio.sleep(0.01)


def descriptors() -> int:
    """Count the open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def run(*words: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, timeout=10)


async def test_data_goes_both_ways_until_both_have_ended(parts: Parts) -> None:
    """All bytes arrive in order, and nothing is left of the connection."""
    await parts.serve()
    parts.relay()
    tasks, before = asyncio.all_tasks(), descriptors()
    reader, writer = await parts.connect()
    sent = os.urandom(1 << 22)

    async def send() -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    received, _ = await asyncio.gather(reader.read(-1), send())
    assert received == sent
    writer.close()
    await until(lambda: descriptors() == before)
    assert asyncio.all_tasks() == tasks


async def test_half_a_connection_may_end_first(parts: Parts) -> None:
    """A server that answers only after the client's end still reaches it."""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read(-1)
        await asyncio.sleep(0.1)
        writer.write(b"got " + asked)

    await parts.serve(late)
    parts.relay()
    reader, writer = await parts.connect()
    writer.write(b"all")
    writer.write_eof()
    assert await reader.read(-1) == b"got all"


async def test_a_slow_reader_slows_the_writer(parts: Parts) -> None:
    """While the client does not read, the server cannot send without end."""
    sent = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(bytes(65536))
            await writer.drain()
            sent += 65536

    await parts.serve(pour)
    parts.relay()
    with socket.create_connection(("::1", PORT)):
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert 0 < sent < 32 << 20


@pytest.mark.parametrize("target", [ECHO, (ip_address("fd00::9"), 80)])
async def test_a_client_learns_that_nobody_answers(
    parts: Parts, target: Target
) -> None:
    """A target that refuses, or has no route, resets the client."""
    parts.relay(target)
    reader, _ = await parts.connect()
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)


async def test_a_silent_target_is_given_up(parts: Parts) -> None:
    """A connection that is not taken within the bound resets the client."""
    hook = "type filter hook output priority 0;"
    run("nft", f"table ip t {{ chain c {{ {hook} ip daddr {ECHO[0]} drop; }}; }}")
    parts.relay(connect=0.3)
    begun = time.monotonic()
    reader, _ = await parts.connect()
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)
    assert 0.2 < time.monotonic() - begun < 2


async def test_a_broken_connection_does_not_look_whole(parts: Parts) -> None:
    """A reset of the server reaches the client as a reset, not as an end."""

    async def break_off(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reader.readexactly(1)
        linger = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(*linger)

    await parts.serve(break_off)
    parts.relay()
    reader, writer = await parts.connect()
    writer.write(b"12")
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)


async def test_without_a_target_connections_are_reset(parts: Parts) -> None:
    """A port whose container cannot be reached resets its clients at once."""
    parts.relay(None)
    reader, _ = await parts.connect()
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)


async def test_a_new_target_counts_for_new_connections(parts: Parts) -> None:
    """After a change new connections go to the new target, old ones go on."""

    def says(word: bytes) -> Serve:
        async def say(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            while await reader.read(1):
                writer.write(word)

        return say

    other = ip_address("127.0.0.6"), 81
    await parts.serve(says(b"old"))
    await parts.serve(says(b"new"), other)
    made = parts.relay()
    old = await parts.connect()
    old[1].write(b"?")
    assert await old[0].readexactly(3) == b"old"
    made.target = other
    new = await parts.connect()
    for (reader, writer), word in ((old, b"old"), (new, b"new")):
        writer.write(b"?")
        assert await reader.readexactly(3) == word


async def test_close_cuts_what_is_open(parts: Parts) -> None:
    """Closing resets the clients, frees the port and leaves no task behind."""
    await parts.serve()
    tasks, before = asyncio.all_tasks(), descriptors()
    made = parts.relay()
    reader, writer = await parts.connect()
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    waiting, _ = await parts.connect()
    await made.close()
    listener().close()
    for end in (reader, waiting):
        with pytest.raises(ConnectionResetError):
            await end.read(-1)
    await until(lambda: asyncio.all_tasks() == tasks and descriptors() == before)


async def test_connections_beyond_the_limit_wait(parts: Parts) -> None:
    """One connection too many is served once another has ended."""
    await parts.serve()
    parts.relay(connections=1)
    first, second = await parts.connect(), await parts.connect()
    first[1].write(b"1")
    second[1].write(b"2")
    assert await first[0].readexactly(1) == b"1"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(second[0].readexactly(1), 0.3)
    first[1].close()
    assert await asyncio.wait_for(second[0].readexactly(1), 5) == b"2"


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Have no descriptor left for the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open("rb") as lowest_free:
        limit = lowest_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_want_of_descriptors_is_waited_out(parts: Parts) -> None:
    """
    Without descriptors the relay neither spins nor dies.

    1. A client connects while the process has no descriptor left.
    2. Half a second passes.
    3. There are descriptors again.

    Result: hardly any time was computed, and the client is served.
    """
    await parts.serve()
    parts.relay()
    with socket.socket(socket.AF_INET6) as sock:
        sock.settimeout(5)
        with no_more_descriptors():
            sock.connect(("::1", PORT))
            begun = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - begun < 0.1
        sock.send(b"x")
        sock.settimeout(0)
        received = asyncio.get_running_loop().sock_recv(sock, 1)
        assert await asyncio.wait_for(received, 5) == b"x"


async def test_a_client_that_is_gone_does_not_keep_the_server(parts: Parts) -> None:
    """A client that ended and vanished is noticed, though nobody writes to it."""
    run("sysctl", "-q", "net.ipv4.tcp_fin_timeout=1")
    ended = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(-1) == b""
        sock = writer.get_extra_info("socket")
        while sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\7":
            await asyncio.sleep(0.05)
        ended.set()

    await parts.serve(mute)
    parts.relay(watch=1)
    socket.create_connection(("::1", PORT)).close()
    await asyncio.wait_for(ended.wait(), 10)


async def receive(sock: socket.socket, seconds: float = 3) -> tuple[bytes, str]:
    """Return a datagram, and from where it came."""
    work = asyncio.get_running_loop().sock_recvfrom(sock, 100)
    data, sender = await asyncio.wait_for(work, seconds)
    return data, sender[0]


async def asked(sock: socket.socket, host: str, server: socket.socket) -> str:
    """
    Ask through the relay; return who answered in the eyes of the client.

    A datagram may get lost on a busy machine: it is asked up to three times.
    """
    loop = asyncio.get_running_loop()
    for turn in range(3):
        sock.sendto(b"ask", (host, PORT))
        try:
            data, sender = await asyncio.wait_for(loop.sock_recvfrom(server, 100), 3)
            break
        except TimeoutError:
            assert turn < 2
    assert data == b"ask"
    server.sendto(b"answer", sender)
    data, source = await receive(sock)
    assert data == b"answer"
    return source


@pytest.mark.parametrize(
    ("held", "server", "hosts"),
    [
        ("::", "127.0.0.5", ["::1", "fd00::1", "fd00::2"]),
        ("::", "::1", ["::1", "127.0.0.1", "127.0.0.7"]),
        (ANY4, "::1", ["127.0.0.1", "127.0.0.7"]),
        ("127.0.0.9", "127.0.0.5", ["127.0.0.9"]),
    ],
)
async def test_datagrams_are_answered_from_the_address_asked(
    parts: Parts, held: str, server: str, hosts: list[str]
) -> None:
    """Whatever address of the host a client asks, the answer comes from there."""
    for address in ("fd00::1/64", "fd00::2/64"):
        run("ip", "addr", "add", address, "dev", "lo", "nodad")
    inside = parts.udp(server, 53)
    parts.relay_udp((ip_address(server), 53), held)
    for host in hosts:
        client = parts.udp("::" if ":" in host else ANY4)
        assert await asked(client, host, inside) == host


async def test_each_client_has_its_own_answers(parts: Parts) -> None:
    """Answers find their client, though all come from one server."""
    inside, one, two = parts.udp("127.0.0.5", 53), parts.udp(), parts.udp()
    made = parts.relay_udp()
    loop = asyncio.get_running_loop()
    one.sendto(b"one", ("::1", PORT))
    two.sendto(b"two", ("::1", PORT))
    for _ in range(2):
        data, sender = await loop.sock_recvfrom(inside, 100)
        inside.sendto(b"for " + data, sender)
    assert await receive(one) == (b"for one", "::1")
    assert await receive(two) == (b"for two", "::1")
    one.sendto(b"", ("::1", PORT))
    assert (await loop.sock_recvfrom(inside, 100))[0] == b""
    assert len(made) == 2


async def test_silent_clients_are_forgotten(parts: Parts) -> None:
    """After the idle time a client's socket is closed, and a later one works."""
    inside, one, two = parts.udp("127.0.0.5", 53), parts.udp(), parts.udp()
    made = parts.relay_udp(idle=0.4)
    before = descriptors()
    await asked(one, "::1", inside)
    for _ in range(4):
        await asyncio.sleep(0.15)
        await asked(two, "::1", inside)
    assert len(made) == 1
    await until(lambda: len(made) == 0)
    assert descriptors() == before
    await asked(one, "::1", inside)
    assert len(made) == 1


async def test_the_client_silent_longest_makes_room(parts: Parts) -> None:
    """Beyond the limit the one that was silent longest goes, not the first one."""
    inside, one, two = parts.udp("127.0.0.5", 53), parts.udp(), parts.udp()
    made = parts.relay_udp(clients=2)
    loop = asyncio.get_running_loop()
    senders = {}
    for name, sock in {"a": one, "b": two, "c": one, "d": parts.udp()}.items():
        sock.sendto(name.encode(), ("::1", PORT))
        data, senders[name] = await loop.sock_recvfrom(inside, 100)
        assert data == name.encode()
    assert len(made) == 2
    assert senders["a"] == senders["c"]
    inside.sendto(b"still", senders["c"])
    assert await receive(one) == (b"still", "::1")
    inside.sendto(b"gone", senders["b"])
    with pytest.raises(TimeoutError):
        await receive(two, 0.2)


async def test_a_moved_target_gets_the_next_datagram(parts: Parts) -> None:
    """A change of the target counts at once, for known clients too."""
    old, new, one = parts.udp("127.0.0.5", 53), parts.udp("::1", 53), parts.udp()
    made = parts.relay_udp()
    await asked(one, "::1", old)
    made.target = (ip_address("::1"), 53)
    await asked(one, "::1", new)
    made.target = None
    one.sendto(b"lost", ("::1", PORT))
    with pytest.raises(TimeoutError):
        await receive(new, 0.2)
    assert len(made) == 0


async def test_an_absent_server_costs_nothing(parts: Parts) -> None:
    """A refused datagram is lost; the relay goes on, and serves once it can."""
    parts.relay_udp()
    one = parts.udp()
    begun = time.process_time()
    for _ in range(20):
        one.sendto(b"x", ("::1", PORT))
        await asyncio.sleep(0.02)
    assert time.process_time() - begun < 0.2
    await asked(one, "::1", parts.udp("127.0.0.5", 53))


async def test_datagrams_without_descriptors_are_lost(parts: Parts) -> None:
    """Without descriptors datagrams of new clients are dropped, without spinning."""
    made, one = parts.relay_udp(), parts.udp()
    inside = parts.udp("127.0.0.5", 53)
    with no_more_descriptors():
        one.sendto(b"x", ("::1", PORT))
        begun = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - begun < 0.1
        assert len(made) == 0
    await asked(one, "::1", inside)
