import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from cnmdriver.dataplane.sockets import Sockets, holder
from cnmdriver.errors import Conflict, KernelError
from cnmdriver.model import SCTP, TCP, UDP
from cnmdriver.plan.firewall import TEXT
from cnmdriver.plan.ops import Hold

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host")]

PORT = 8080
ANY4 = "0.0.0.0"
KINDS = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}
REUSE_ADDRESS, REUSE_PORT = (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,)
DOCKER_PROXY = "/usr/sbin/docker-proxy"


@pytest.fixture
async def sockets() -> AsyncIterator[Sockets]:
    """Give a `Sockets` that is closed after the test."""
    made = Sockets()
    yield made
    await made.close()


def hold(
    protocol: int = TCP, address: str | None = None, target: str = "127.0.0.5"
) -> Hold:
    """State that the port is held."""
    return Hold(
        protocol=protocol,
        address=None if address is None else ip_address(address),
        port=PORT,
        target=ip_address(target),
        target_port=80,
    )


@contextmanager
def program(
    protocol: int, address: str, *options: int, listen: bool = True, only: bool = False
) -> Iterator[socket.socket]:
    """Take the port as another program would; `only` is for IPv6 alone."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, KINDS[protocol]) as sock:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only))
        sock.bind((address, PORT))
        if listen and protocol == TCP:
            sock.listen()
        yield sock


def free(protocol: int, address: str, *options: int) -> bool:
    """Tell whether another program can take the port."""
    try:
        with program(protocol, address, *options, only=True):
            return True
    except OSError:
        return False


@contextmanager
def child(script: str) -> Iterator[int]:
    """Run a script in a program of its own, and give its pid once it has run."""
    words = [sys.executable, "-c", f"{script}\nprint(flush=True)\ninput()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, close_fds=False, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.communicate(b"\n", timeout=10)


def myself() -> str:
    """Return what this process is called in a refusal."""
    name = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
    return f"{name} (pid {os.getpid()})"


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("options", [(), REUSE_ADDRESS, REUSE_PORT])
@pytest.mark.parametrize(
    ("held", "taken", "left"),
    [
        (None, [ANY4, "127.0.0.1", "::", "::1"], []),
        (ANY4, [ANY4, "127.0.0.1"], ["::", "::1"]),
        ("::", ["::", "::1"], [ANY4, "127.0.0.1"]),
        ("127.0.0.1", [ANY4, "127.0.0.1"], ["127.0.0.2", "::"]),
        ("::1", ["::", "::1"], [ANY4, "127.0.0.1"]),
    ],
)
async def test_nobody_else_can_take_what_is_held(
    sockets: Sockets,
    protocol: int,
    options: tuple[int, ...],
    held: str | None,
    taken: list[str],
    left: list[str],
) -> None:
    """A held port is refused to others with any option, and no more than the port."""
    op = hold(protocol, held)
    assert await sockets.hold(op) is None
    assert {a: free(protocol, a, *options) for a in taken} == dict.fromkeys(
        taken, False
    )
    assert {a: free(protocol, a, *options) for a in left} == dict.fromkeys(left, True)
    await sockets.release(op)
    assert all(free(protocol, a, *options) for a in taken)


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("options", [(), REUSE_ADDRESS, REUSE_PORT])
@pytest.mark.parametrize(
    ("address", "refused"),
    [
        (ANY4, [None, ANY4, "127.0.0.1"]),
        ("::", [None, ANY4, "127.0.0.1", "::", "::1"]),
        ("127.0.0.1", [None, ANY4, "127.0.0.1"]),
        ("::1", [None, "::", "::1"]),
    ],
)
async def test_what_others_have_is_refused(
    sockets: Sockets,
    protocol: int,
    options: tuple[int, ...],
    address: str,
    refused: list[str | None],
) -> None:
    """A port of another program is a Conflict that names it, else it can be held."""
    name = {TCP: "tcp", UDP: "udp"}[protocol]
    with program(protocol, address, *options):
        for wanted in (None, ANY4, "127.0.0.1", "127.0.0.2", "::", "::1"):
            op = hold(protocol, wanted)
            shared = wanted == "127.0.0.2" and address in {ANY4, "::"}
            if wanted not in refused and not shared:
                assert await sockets.hold(op) is None
                await sockets.release(op)
                continue
            with pytest.raises(Conflict) as caught:
                await sockets.hold(op)
            where = {None: "", "::": "[::]:", "::1": "[::1]:"}.get(wanted, f"{wanted}:")
            assert str(caught.value) == (
                f"port {where}8080/{name} is taken by {myself()}: "
                "publish another host port or stop it"
            )
    assert sockets.held() == ()


async def test_holding_again_is_no_news(sockets: Sockets) -> None:
    """The same hold again, also at the same time, is True once; releasing is free."""
    op = hold()
    assert [*await asyncio.gather(sockets.hold(op), sockets.hold(op))] == [None, op]
    assert sockets.held() == (op,)
    await sockets.release(op)
    await sockets.release(op)
    assert sockets.held() == ()
    assert await sockets.hold(op) is None


async def test_close_gives_all_back(sockets: Sockets) -> None:
    """After close every port is free, and no descriptor is left."""
    before = descriptors()
    ops = {hold(TCP), hold(UDP, ANY4), hold(UDP, "::"), hold(SCTP)}
    for op in ops:
        assert await sockets.hold(op) is None
    assert set(sockets.held()) == ops
    await sockets.close()
    assert sockets.held() == ()
    assert descriptors() == before
    assert free(TCP, "::")
    assert free(UDP, "::")


async def test_two_of_our_own_ports_clash(sockets: Sockets) -> None:
    """A port that overlaps one of ours names that one, for sctp too."""
    for protocol, name in ((TCP, "tcp"), (SCTP, "sctp")):
        await sockets.hold(hold(protocol, "127.0.0.1"))
        with pytest.raises(Conflict) as caught:
            await sockets.hold(hold(protocol))
        assert str(caught.value) == (
            f"port 8080/{name} is taken by pynet, which publishes "
            f"127.0.0.1:8080/{name}: publish another host port"
        )


async def test_sctp_needs_no_sockets_of_the_kernel(sockets: Sockets) -> None:
    """Without sctp in the kernel a port is held by note, for one target alone."""
    op = hold(SCTP)
    assert await sockets.hold(op) is None
    assert await sockets.hold(op) == op
    with pytest.raises(Conflict, match=r"8080/sctp is taken by pynet"):
        await sockets.hold(replace(op, target=ip_address("127.0.0.6")))
    await sockets.release(op)
    assert await sockets.hold(replace(op, target=ip_address("127.0.0.6"))) is None


async def test_an_address_of_another_machine(sockets: Sockets) -> None:
    """An address the host does not have is refused by its name."""
    with pytest.raises(Conflict) as caught:
        await sockets.hold(hold(address="192.0.2.1"))
    assert str(caught.value) == (
        "port 192.0.2.1:8080/tcp cannot be published: 192.0.2.1 is no address of this "
        "host: publish on one of its own addresses"
    )


async def test_a_refusal_of_the_kernel_is_told(sockets: Sockets) -> None:
    """Want of descriptors is a KernelError with the errno's name."""
    with no_more_descriptors(), pytest.raises(KernelError) as caught:
        await sockets.hold(hold())
    assert "port 8080/tcp" in str(caught.value)
    assert "EMFILE" in str(caught.value)


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Have no descriptor left for the process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open("rb") as lowest_free:
        lowest = lowest_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def no_ipv6() -> None:
    """Turn IPv6 off."""
    for device in ("all", "default", "lo"):
        path = Path(f"/proc/sys/net/ipv6/conf/{device}/disable_ipv6")
        path.write_text("1", encoding="ascii")


async def test_no_ipv6_addresses_are_no_hindrance(sockets: Sockets) -> None:
    """Where IPv6 is turned off the port is held for IPv4."""
    no_ipv6()
    assert await sockets.hold(hold()) is None
    assert free(TCP, "127.0.0.1", *REUSE_ADDRESS) is False


async def test_programs_started_later_do_not_inherit(sockets: Sockets) -> None:
    """A child keeps no port, also one that inherits descriptors."""
    op = hold()
    await sockets.hold(op)
    with child("pass"):
        await sockets.release(op)
        assert free(TCP, ANY4)


async def test_a_closing_server_does_not_keep_the_port(sockets: Sockets) -> None:
    """
    A port whose server has just ended can be published at once.

    1. A server with SO_REUSEADDR, as all have, takes a connection and closes first.
    2. It stops listening; the connection lingers in TIME_WAIT.

    Result: the port is held.
    """
    with program(TCP, ANY4, *REUSE_ADDRESS) as server:
        spent(server)
    assert lingering()
    assert await sockets.hold(hold()) is None


async def test_a_closing_stranger_is_told_from_a_program(sockets: Sockets) -> None:
    """A connection that lingers without SO_REUSEADDR is named for what it is."""
    with program(TCP, ANY4) as server:
        spent(server)
    assert lingering()
    with pytest.raises(Conflict) as caught:
        await sockets.hold(hold())
    assert str(caught.value) == (
        "port 8080/tcp is taken by a connection that ended less than a minute ago: "
        "publish another host port or stop it"
    )


def spent(server: socket.socket) -> None:
    """Take a connection and end it from the server's side first."""
    with socket.create_connection(("127.0.0.1", PORT)) as client:
        taken, _ = server.accept()
        taken.close()
        assert client.recv(1) == b""


def descriptors() -> int:
    """Count the open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def lingering() -> bool:
    """Tell whether a connection of the port is in TIME_WAIT."""
    rows = Path("/proc/thread-self/net/tcp").read_text(encoding="ascii").splitlines()
    return any(f":{PORT:04X} " in row and " 06 " in row for row in rows[1:])


async def test_relayed_connections_do_not_keep_the_port(sockets: Sockets) -> None:
    """
    Releasing and holding again works while relayed connections are ending.

    1. A connection is relayed, and the server behind ends it first.
    2. Another is open when the port is released.

    Result: the port is held again at once, by us and then by others.
    """
    ends: list[asyncio.StreamWriter] = []

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        writer.write(b"x")

    server = await asyncio.start_server(serve, "127.0.0.5", 80)
    op = hold()
    await sockets.hold(op)
    clients = [await asyncio.open_connection("::1", PORT) for _ in range(2)]
    for reader, _ in clients:
        assert await reader.readexactly(1) == b"x"
    for writer in ends[:1]:
        writer.close()
    ended = {reader: asyncio.ensure_future(reader.read(-1)) for reader, _ in clients}
    await asyncio.wait(ended.values(), return_when=asyncio.FIRST_COMPLETED)
    await sockets.release(op)
    assert await sockets.hold(op) is None
    await sockets.release(op)
    assert free(TCP, "::", *REUSE_ADDRESS)
    await asyncio.gather(*ended.values(), return_exceptions=True)
    for _, writer in clients:
        writer.close()
    ends[1].close()
    server.close()
    await asyncio.sleep(0.01)


async def test_who_listens_first_has_the_port(sockets: Sockets) -> None:
    """A program that bound with SO_REUSEADDR before us is refused when it listens."""
    with program(TCP, ANY4, *REUSE_ADDRESS, listen=False) as sock:
        assert await sockets.hold(hold()) is None
        with pytest.raises(OSError, match="Address already in use"):
            sock.listen()


@contextmanager
def docker_proxy() -> Iterator[int]:
    """Start Docker's own proxy for the port; give its pid, 0 if it was refused."""
    to_us, to_proxy = os.pipe()
    words = [DOCKER_PROXY, "-proto", "tcp", "-host-ip", ANY4, "-host-port", str(PORT)]
    words += ["-container-ip", "127.0.0.5", "-container-port", "80"]
    actions = [(os.POSIX_SPAWN_DUP2, to_proxy, 3)]
    pid = os.posix_spawn(DOCKER_PROXY, words, os.environ, file_actions=actions)
    os.close(to_proxy)
    try:
        yield pid if os.read(to_us, 100).startswith(b"0") else 0
    finally:
        os.close(to_us)
        os.kill(pid, 15)
        os.waitpid(pid, 0)


async def test_docker_is_refused_a_held_port(sockets: Sockets) -> None:
    """Docker's proxy does not start on a port of ours."""
    with docker_proxy() as pid:
        assert pid
    await sockets.hold(hold())
    with docker_proxy() as pid:
        assert not pid


async def test_a_port_of_docker_is_refused(sockets: Sockets) -> None:
    """A port Docker publishes is a Conflict that names its proxy."""
    with docker_proxy() as pid, pytest.raises(Conflict) as caught:
        await sockets.hold(hold())
    assert f"is taken by docker-proxy (pid {pid}): publish" in str(caught.value)


async def test_the_holder_is_the_one_on_that_address() -> None:
    """Of several programs on one port the one in the way is named, else nobody."""
    script = "import socket as s; x = s.create_server(('127.0.0.2', 8080))"
    with program(TCP, "127.0.0.1"), child(script) as pid:
        assert holder(TCP, PORT, ip_address("127.0.0.1")) == myself()
        assert holder(TCP, PORT, ip_address("127.0.0.2")).endswith(f"(pid {pid})")
        assert holder(TCP, PORT, ip_address("127.0.0.3")) == "another program"
        assert holder(UDP, PORT) == "another program"


async def test_a_listening_server_is_named_before_its_clients() -> None:
    """A connection shares its server's port, but the one that listens is named."""
    script = "import socket as s; x = s.create_connection(('127.0.0.1', 8080))"
    with program(TCP, ANY4) as server, child(script):
        taken, _ = server.accept()
        with taken:
            assert holder(TCP, PORT) == myself()


def load(text: str) -> None:
    """Load nftables rules."""
    words = ["nft", "-f", "-"]
    subprocess.run(words, input=text, text=True, check=True, timeout=10)


async def echoed(address: str, sockets: Sockets, word: bytes) -> bytes:
    """Start a server that greets, and return what the published port says."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(word)
        writer.close()

    assert sockets.held()
    target = sockets.held()[0].target
    async with await asyncio.start_server(greet, str(target), 80):
        reader, writer = await asyncio.open_connection(address, PORT)
        said = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
    return said


async def test_the_relay_follows_the_target(sockets: Sockets) -> None:
    """What reaches the socket goes to the target, also after that has changed."""
    assert await sockets.hold(hold()) is None
    assert await echoed("::1", sockets, b"first") == b"first"
    later = hold(target="::1")
    assert await sockets.hold(later) == hold()
    assert sockets.held() == (later,)
    assert await echoed("127.0.0.1", sockets, b"second") == b"second"


async def test_clients_of_loopback_reach_a_container_of_both_families(
    sockets: Sockets,
) -> None:
    """A client of ::1 is relayed although the table translates the port for IPv6."""
    table = f"{TEXT}}}\n"
    port = "add element inet pynet any6 { tcp . 8080 : fd00::5 . 80 }\n"
    load(table + port)
    assert await sockets.hold(hold()) is None
    assert await asyncio.wait_for(echoed("::1", sockets, b"hi"), 5) == b"hi"
