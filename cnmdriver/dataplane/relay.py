"""
Relays for what reaches the socket of a published port.

The kernel translates a published port before a packet can reach a socket. What it
cannot translate arrives here: clients of `::1`, and clients of one IP version when the
container has only the other. The container sees the host as the client.

A relay owns the socket it is given, and closes it. What it may take of the daemon is
bounded: beyond `CONNECTIONS` further tcp clients wait in the backlog, and beyond
`CLIENTS` the udp client that was silent longest goes.
"""

import asyncio
import socket
import struct
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog

from cnmdriver.model import IPAddress

Target = tuple[IPAddress, int]

CONNECT_SECONDS = 5.0
PAUSE_SECONDS = 1.0
CLOSE_SECONDS = 2.0
WATCH_SECONDS = 60
IDLE_SECONDS = 90.0
CONNECTIONS = 1_000
CLIENTS = 1_000
CHUNK = 65_536
BURST = 64
"""How many datagrams are taken before others have their turn."""

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
TCP_CLOSED = 7
RESET, ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
IP_PKTINFO = 8  # The socket module names it only from Python 3.14 on.

Control = tuple[int, int, bytes]

log = structlog.get_logger()


class TcpRelay:
    """
    Relay the connections a listening socket accepts; needs the running loop.

    `target` may change at any time and counts for later connections; while it is None
    they are reset at once.
    """

    def __init__(
        self,
        listener: socket.socket,
        target: Target | None,
        *,
        connect: float = CONNECT_SECONDS,
        watch: int = WATCH_SECONDS,
        connections: int = CONNECTIONS,
    ) -> None:
        self.target = target
        self._listener = listener
        self._connect = connect
        self._watch = watch
        self._limit = connections
        # Most have none ever, and there are as many of them as ports.
        self._tasks: set[asyncio.Task[None]] | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._listen()

    async def close(self) -> None:
        """Close the socket before the first wait, and cut every connection."""
        if self._pause is not None:
            self._pause.cancel()
        put_away(self._loop, self._listener)
        if self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        if self._tasks is None:
            self._tasks = set()
        if len(self._tasks) >= self._limit:
            self._wait(f"{self._limit} connections are open")
            return
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            self._wait(str(error))
            return
        prepare(client, self._watch)
        task = self._loop.create_task(self._serve(client))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, client, self._tasks))

    def _ended(
        self,
        client: socket.socket,
        tasks: set[asyncio.Task[None]],
        task: asyncio.Task[None],
    ) -> None:
        # Here and not in the task, as one that is cancelled at once never runs.
        client.close()
        tasks.discard(task)

    def _wait(self, reason: str) -> None:
        # The socket stays readable, so without a pause the loop would spin.
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(PAUSE_SECONDS, self._listen)
        log.warning("relay.paused", reason=reason, seconds=PAUSE_SECONDS)

    async def _serve(self, client: socket.socket) -> None:
        if self.target is None:
            return
        address, port = self.target
        try:
            server = socket.socket(FAMILIES[address.version], socket.SOCK_STREAM)
        except OSError as error:
            log.warning("relay.refused", reason=str(error))
            return
        with server:
            prepare(server, self._watch)
            if await connected(server, (str(address), port), self._connect):
                await joined(client, server, self._watch)


def put_away(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Close a socket the loop watches; a second time does nothing."""
    if sock.fileno() >= 0:
        loop.remove_reader(sock)
        sock.close()


def prepare(sock: socket.socket, watch: int) -> None:
    """
    Make a socket fit for relaying: no waits, and the kernel sees a dead peer.

    Until `ended` its close is a reset, as a stream cut short must not look whole.
    """
    sock.settimeout(0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, watch)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, watch)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def ended(sock: socket.socket) -> None:
    """Let the coming close be an orderly one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ORDERLY)


async def connected(
    sock: socket.socket, address: tuple[str, int], seconds: float
) -> bool:
    """Connect in so much time, and tell whether it worked."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(seconds):
            await loop.sock_connect(sock, address)
    except OSError:
        return False
    return True


async def joined(client: socket.socket, server: socket.socket, watch: int) -> None:
    """Copy both ways until both have ended, or either has failed."""
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watched(client, server, watch))
            up = group.create_task(pump(client, server))
            down = group.create_task(pump(server, client))
            await asyncio.wait((up, down))
            watcher.cancel()
        ended(client)
        ended(server)
    except* OSError:
        pass


async def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy one direction; its end is passed on, the other direction stays open."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, CHUNK):
        await loop.sock_sendall(sink, data)
    sink.shutdown(socket.SHUT_WR)


async def watched(client: socket.socket, server: socket.socket, seconds: int) -> None:
    """Raise ConnectionResetError once an end has died that no pump reads any more."""
    while True:
        await asyncio.sleep(seconds)
        if closed(client) or closed(server):
            raise ConnectionResetError


def closed(sock: socket.socket) -> bool:
    """Tell whether the kernel has given the connection up."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED


@dataclass(slots=True, kw_only=True)
class Client:
    """A udp client: its own socket towards the target, and how it is answered."""

    sock: socket.socket
    address: tuple[str, int]
    control: tuple[Control, ...]
    used: float


Peer = tuple[tuple[str, int], tuple[Control, ...]]


class UdpRelay:
    """
    Relay the datagrams that reach a socket; needs the running loop.

    Each client has a socket of its own, until it and the target have been silent for
    `idle` seconds. What cannot be passed on is lost, as datagrams may be.
    """

    def __init__(
        self,
        held: socket.socket,
        target: Target | None,
        *,
        idle: float = IDLE_SECONDS,
        clients: int = CLIENTS,
    ) -> None:
        self._target = target
        self._held = held
        self._idle = idle
        self._limit = clients
        self._clients: OrderedDict[Peer, Client] = OrderedDict()
        self._sweep: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        tell_destination(held)
        self._loop.add_reader(held, self._arrived)

    @property
    def target(self) -> Target | None:
        """Where datagrams go; a change counts for known clients too."""
        return self._target

    @target.setter
    def target(self, target: Target | None) -> None:
        if target != self._target:
            self._target = target
            self._drop_all()

    def __len__(self) -> int:
        """Return the number of clients that are remembered."""
        return len(self._clients)

    async def close(self) -> None:
        """Close the socket and those of all clients."""
        put_away(self._loop, self._held)
        self._drop_all()
        if self._sweep is not None:
            self._sweep.cancel()

    def _arrived(self) -> None:
        for _ in range(BURST):
            try:
                data, control, _, address = self._held.recvmsg(CHUNK, 64)
            except OSError:
                return
            peer = (address, tuple(answer_from(c) for c in control))
            client = self._clients.get(peer) or self._open(peer)
            if client is not None:
                self._use(peer, client)
                with suppress(OSError):
                    client.sock.send(data)

    def _open(self, peer: Peer) -> Client | None:
        if self._target is None:
            return None
        while len(self._clients) >= self._limit:
            self._drop(next(iter(self._clients)))
        try:
            sock = towards(self._target)
        except OSError:
            return None
        address, control = peer
        client = Client(sock=sock, address=address, control=control, used=0.0)
        self._clients[peer] = client
        self._loop.add_reader(sock, self._answered, peer, client)
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._idle, self._expire)
        return client

    def _answered(self, peer: Peer, client: Client) -> None:
        for _ in range(BURST):
            try:
                data = client.sock.recv(CHUNK)
            except OSError:
                return
            self._use(peer, client)
            with suppress(OSError):
                self._held.sendmsg([data], client.control, 0, client.address)

    def _use(self, peer: Peer, client: Client) -> None:
        client.used = self._loop.time()
        self._clients.move_to_end(peer)

    def _expire(self) -> None:
        self._sweep = None
        now = self._loop.time()
        while self._clients:
            peer, client = next(iter(self._clients.items()))
            left = client.used + self._idle - now
            if left > 0:
                self._sweep = self._loop.call_later(left, self._expire)
                return
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        client = self._clients.pop(peer)
        put_away(self._loop, client.sock)

    def _drop_all(self) -> None:
        while self._clients:
            self._drop(next(iter(self._clients)))


def towards(target: Target) -> socket.socket:
    """Open a udp socket that speaks with the target alone."""
    address, port = target
    sock = socket.socket(FAMILIES[address.version], socket.SOCK_DGRAM)
    try:
        sock.settimeout(0)
        sock.connect((str(address), port))
    except OSError:
        sock.close()
        raise
    return sock


def tell_destination(sock: socket.socket) -> None:
    """Ask the kernel to say which address of the host each datagram was sent to."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def answer_from(control: Control) -> Control:
    """
    Turn "was sent to this address" into "send from this address".

    The device is left out: the answer may have another way than the question.
    """
    level, kind, data = control
    if level == socket.IPPROTO_IPV6:
        return level, kind, data[:16] + bytes(4)
    return level, kind, bytes(4) + data[4:]
