"""
A great many requests that nobody should send, to a real daemon on the real kernel.

`python -m tests.faults.hostile --requests 1000000 --seed S` starts `pynet serve` in
namespaces of its own and attacks both its sockets from several processes, each with
several connections. Meanwhile a well-behaved Docker makes its calls, and every while
all that was made is removed again. The exit code is 0 only if no request was answered
as none should be, nothing in the log speaks of a bug, memory stayed flat, the daemon
is well, and nothing is left in its kernel.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.faults import hostile_grammar as grammar
from tests.faults.hostile_daemon import Daemon, daemon
from tests.faults.hostile_grammar import Grammar

CONNECTIONS = 8
"""Of each process."""
PATIENCE = 25.0
"""Seconds for an answer: more than a call may take, on a busy machine."""
WARM = 0.25
"""Share of the requests after which memory must not grow any more."""
GROWTH = 16.0
"""MB that are no growth: what the allocator happens to keep."""
LATE = 1e-4
"""Share of calls that may reach their bound on a machine that others use as well."""
CLEANING = 15.0
"""Seconds between two removals of all that was made."""
SPACE = "pynet-local"
ADMIN = (
    "status", "networks", "endpoints", "hosts", "ports", "pools", "explain", "diff",
    "census",
)  # fmt: skip

Step = tuple[str, dict[str, Any]]
"""A call of Docker's: its method and its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    closed: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a process has sent and seen."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    late: int = 0
    """Calls that were refused as they took too long."""

    @property
    def requests(self) -> int:
        """Return how many requests there were."""
        return self.sent.total()

    def add(self, other: "Tally") -> None:
        """Take in what another process has seen."""
        self.sent += other.sent
        self.statuses += other.statuses
        self.violations += other.violations
        self.late += other.late

    def blame(self, what: str, sent: bytes) -> None:
        """Note an answer that should not be."""
        if len(self.violations) < 50:
            self.violations.append(f"{what}; sent: {sent[:300]!r}")


class Hangup(Exception):
    """The daemon closed a connection, or did not answer."""


class Connection:
    """One connection, opened when it is needed."""

    def __init__(self, path: str) -> None:
        """Lead to a socket."""
        self.path = path
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def send(self, data: bytes) -> asyncio.StreamReader:
        """Send bytes."""
        if self.writer is None or self.reader is None:
            self.reader, self.writer = await asyncio.open_unix_connection(self.path)
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()
        return self.reader

    def close(self) -> None:
        """Let go."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def answer(reader: asyncio.StreamReader, limit: float = PATIENCE) -> Answer:
    """Read one answer; raises Hangup."""
    try:
        async with asyncio.timeout(limit):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await reader.readexactly(int(headers.get("content-length", "0")))
    except TimeoutError:
        raise Hangup(f"no answer within {limit:g} s") from None
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Hangup(f"no answer: {type(error).__name__}") from None
    closed = headers.get("connection") == "close" or first.startswith("HTTP/1.0")
    return Answer(status=int(first.split()[1]), body=body, closed=closed)


def head(path: str, length: int, verb: str = "POST", *more: str) -> bytes:
    """Write the head of a request as Docker does."""
    lines = [f"{verb} {path} HTTP/1.1", "Host: ", f"Content-Length: {length}", *more]
    text = "\r\n".join([*lines, "", ""])
    return text.encode("utf-8", "surrogateescape")


class Attacker:
    """One connection to each socket, and a share of the requests."""

    def __init__(self, seed: str, plugin: str, admin: str, tally: Tally) -> None:
        """Begin; all that follows comes from the seed."""
        self.random = Random(seed)
        self.grammar = Grammar(self.random)
        self.path = plugin
        self.plugin = Connection(plugin)
        self.admin = Connection(admin)
        self.tally = tally

    async def run(self, requests: int) -> None:
        """Send this many requests, or a few more."""
        done = 0
        acts = (
            (self.message, 8000), (self.life, 60), (self.pipeline, 100),
            (self.garbage, 250), (self.door, 150), (self.large, 12), (self.leave, 20),
        )  # fmt: skip
        works, weights = zip(*acts, strict=True)
        while done < requests:
            (work,) = self.random.choices(works, weights)
            done += await work()
        self.plugin.close()
        self.admin.close()

    # Each of these sends something and returns how many requests it was.

    async def message(self) -> int:
        """Send one message of the grammar."""
        method = self.grammar.method()
        await self.ask(method, self.grammar.body(method))
        return 1

    async def large(self) -> int:
        """Send one message that is long or deep."""
        method = self.grammar.method()
        await self.ask(method, self.grammar.large(method), "large")
        return 1

    async def ask(self, method: str, body: bytes, kind: str = "message") -> None:
        """Send a message, and judge the answer."""
        data = head(f"/{method}", len(body)) + body
        self.tally.sent[kind] += 1
        try:
            found = await answer(await self.plugin.send(data))
        except (Hangup, OSError) as error:
            self.tally.blame(f"{method}: {error}", body)
            self.plugin.close()
            return
        self.judge(found, method, body)
        if found.closed:
            self.plugin.close()

    def judge(self, found: Answer, method: str, sent: bytes) -> None:
        """Note what an answer to a known method must not be."""
        self.count(found, method)
        fault = faulty(found)
        if fault is None and found.status not in {200, 400, 500}:
            fault = f"status {found.status}"
        if fault is not None:
            self.tally.blame(f"{method}: {fault}", sent)

    def count(self, found: Answer, method: str) -> None:
        """Count an answer by its status, and successes by method too."""
        self.tally.statuses[str(found.status)] += 1
        if found.status == 500 and b"did not end within" in found.body:
            self.tally.late += 1
        if found.status in {200, 500}:
            self.tally.statuses[f"{found.status} {method}"] += 1

    async def pipeline(self) -> int:
        """Send several requests before any is answered."""
        count = self.random.choice((2, 5, 40))
        calls = [self.grammar.method() for _ in range(count)]
        bodies = [self.grammar.body(method) for method in calls]
        pairs = list(zip(calls, bodies, strict=True))
        data = b"".join(head(f"/{m}", len(b)) + b for m, b in pairs)
        self.tally.sent["pipelined"] += count
        connection = Connection(self.path)
        try:
            reader = await connection.send(data)
            for method, body in pairs:
                self.judge(await answer(reader, PATIENCE + count), method, body)
        except (Hangup, OSError) as error:
            self.tally.blame(f"{count} at once: {error}", data)
        finally:
            connection.close()
        return count

    async def garbage(self) -> int:
        """Send what is hardly HTTP."""
        data = raw(self.random, self.grammar)
        self.tally.sent["garbage"] += 1
        connection = Connection(self.path)
        try:
            found = await answer(await connection.send(data), 0.3)
        except (Hangup, OSError):
            self.tally.statuses["none"] += 1
        else:
            self.count(found, "garbage")
            # What is no HTTP is answered by the server, not in JSON.
            if found.status >= 500 and faulty(found) is not None:
                self.tally.blame(f"garbage: status {found.status}", data)
        finally:
            connection.close()
        return 1

    async def leave(self) -> int:
        """Send a sound request, or half of one, and go before the answer."""
        method = self.grammar.method()
        body = self.grammar.body(method)
        data = head(f"/{method}", len(body)) + body
        if self.random.random() < 0.5:
            data = data[: self.random.randrange(1, len(data))]
        self.tally.sent["left"] += 1
        self.tally.statuses["none"] += 1
        connection = Connection(self.path)
        with contextlib.suppress(OSError):
            await connection.send(data)
            if self.random.random() < 0.5 and connection.writer is not None:
                connection.writer.write_eof()
                await asyncio.sleep(0.01)
        connection.close()
        return 1

    async def door(self) -> int:
        """Ask something over the admin socket."""
        verb, _, path = door(self.random).partition(" ")
        self.tally.sent["admin"] += 1
        try:
            reader = await self.admin.send(head(path, 0, verb))
            found = await answer(reader)
        except (Hangup, OSError) as error:
            self.tally.blame(f"admin {verb} {path[:80]}: {error}", b"")
            self.admin.close()
            return 1
        self.count(found, "admin")
        if found.status >= 500 and faulty(found) is not None:
            self.tally.blame(f"admin {verb} {path[:80]}: {found.status}", found.body)
        if found.closed:
            self.admin.close()
        return 1

    async def life(self) -> int:
        """Live a container's life on a network, with steps lost, doubled and spoilt."""
        random, count = self.random, 0
        for method, content in life(random):
            times = random.choices((1, 0, 2), (90, 6, 4))[0]
            for _ in range(times):
                tree = content
                if random.random() < 0.05:
                    tree = self.grammar.damage(content)
                body = grammar.written(tree).encode("utf-8", "surrogateescape")
                await self.ask(method, body, "life")
                count += 1
        return count


def faulty(found: Answer) -> str | None:
    """Say what is wrong with an answer in itself, None if nothing is."""
    try:
        content = json.loads(found.body)
    except ValueError:
        return f"status {found.status} without JSON: {found.body[:200]!r}"
    if not isinstance(content, dict) and found.status >= 400:
        return f"status {found.status} with {type(content).__name__}"
    if found.status < 400:
        return None
    text = content.get("Err") or content.get("error")
    if not isinstance(text, str) or not text:
        return f"status {found.status} without a sentence: {found.body[:200]!r}"
    if text.startswith("internal error"):
        return f"status {found.status}: {text[:300]}"
    return None


def life(random: Random) -> list[Step]:
    """Return a life on ids that many have."""
    number = random.randrange(6)
    port = {"Proto": 6, "Port": 80, "HostPort": random.choice((0, 8080, 8081))}
    return steps(
        random.choice(grammar.NETWORKS[:8]),
        grammar.ENDPOINTS[number],
        f"10.77.{number}",
        random.randrange(2, 20),
        options=grammar.options(random),
        ports=[port] * random.choice((0, 1, 3)),
    )


def steps(
    network: str,
    endpoint: str,
    base: str,
    number: int,
    *,
    options: dict[str, Any],
    ports: list[dict[str, Any]],
) -> list[Step]:
    """Return the calls of a network with a container, up to its end."""
    pool = f"{base}.0/24"
    pool_id = f"{SPACE}/{pool}"
    ids = {"NetworkID": network, "EndpointID": endpoint}
    portmap = {"com.docker.network.portmap": ports}
    data = {"AddressSpace": SPACE, "Pool": pool, "Gateway": f"{base}.1/24"}
    generic = {"com.docker.network.generic": options}
    gateway = {"RequestAddressType": "com.docker.network.gateway"}
    at = {"PoolID": pool_id, "Address": f"{base}.{number}"}
    place = {"Address": f"{base}.{number}/24", "AddressIPv6": "", "MacAddress": ""}
    sandbox = f"/var/run/docker/netns/{endpoint[:12]}"
    return [
        ("IpamDriver.RequestPool", {"AddressSpace": SPACE, "Pool": pool}),
        ("IpamDriver.RequestAddress", {"PoolID": pool_id, "Options": gateway}),
        (
            "NetworkDriver.CreateNetwork",
            {"NetworkID": network, "IPv4Data": [data], "Options": generic},
        ),
        ("IpamDriver.RequestAddress", at),
        ("NetworkDriver.CreateEndpoint", {**ids, "Interface": place}),
        ("NetworkDriver.EndpointOperInfo", ids),
        ("NetworkDriver.Join", {**ids, "SandboxKey": sandbox, "Options": portmap}),
        ("NetworkDriver.ProgramExternalConnectivity", {**ids, "Options": portmap}),
        ("NetworkDriver.RevokeExternalConnectivity", ids),
        ("NetworkDriver.Leave", ids),
        ("NetworkDriver.DeleteEndpoint", ids),
        ("IpamDriver.ReleaseAddress", at),
        ("NetworkDriver.DeleteNetwork", {"NetworkID": network}),
        ("IpamDriver.ReleaseAddress", {**at, "Address": f"{base}.1"}),
        ("IpamDriver.ReleasePool", {"PoolID": pool_id}),
    ]


def door(random: Random) -> str:
    """Return a request of the admin socket: verb and path."""
    word = random.choice(
        (
            *grammar.NETWORKS[:3], *grammar.ENDPOINTS[:3], "%00", "%ff%fe", "..", "%2e%2e%2f",
            "a" * 3000, "1", "%ud800", "%ed%a0%80", "*", "", "?x=%zz", "e", "%E2%80%AE",
        )
    )  # fmt: skip
    pool = random.choice(
        (*grammar.POOLS4[:8], "x", "", "%ff", "pynet-local/10.77.0.0/24")
    )
    address = random.choice(grammar.ADDRESSES).strip().replace(" ", "")
    address = address if address.isascii() else "%EF%BC%91"
    return random.choice(
        (
            *(f"GET /v1/{name}" for name in ADMIN),
            f"GET /v1/networks/{word}",
            f"DELETE /v1/endpoints/{word}",
            f"DELETE /v1/addresses?pool={pool}&address={address}",
            f"GET /v1/explain?network={word}",
            f"POST /v1/{word}",
            f"GET /{word}",
            f"BREW /v1/status/{word}",
        )
    )


def raw(random: Random, maker: Grammar) -> bytes:
    """Return bytes that are no sound HTTP, or odd HTTP."""
    method = maker.method()
    body = maker.body(method)
    size = len(body)
    path = f"/{method}"
    odd = random.choice(
        ("PUT", "get", "POST\0", "POST POST", "CONNECT", "TRACE", "PRI")
    )
    chunked = "Transfer-Encoding: chunked"
    return random.choice(
        (
            lambda: head(path, size, odd) + body,
            lambda: head(f"{path}/../{method}", size) + body,
            lambda: head("/" + "A" * random.choice((100, 8000, 9000, 70_000)), 0),
            lambda: head(f"http://[::1/{method}", 0),
            lambda: head("//" + method, 0),
            lambda: head("*", 0, "OPTIONS"),
            lambda: head(path, size + 7) + body,
            lambda: head(path, max(0, size - 3)) + body,
            lambda: head(path, -1) + body,
            lambda: head(path, size, "POST", f"Content-Length: {size + 1}") + body,
            lambda: head(path, size, "POST", chunked) + body,
            lambda: chunks(path, body, random),
            lambda: chunks(path, b"x" * 2_000_000, random),
            lambda: head(path, size, "POST", *(f"X-{n}: y" for n in range(500))) + body,
            lambda: head(path, size, "POST", "X: " + "y" * 100_000) + body,
            lambda: head(path, size, "POST", "X" * 9000 + ": y") + body,
            lambda: head(path, size, "POST", "Bad Header: x") + body,
            lambda: head(path, size, "POST", "X: a\r\n folded") + body,
            lambda: head(path, size, "POST", "X: \udcff\udcfe") + body,
            lambda: head(path, size, "POST", "X: a\0b") + body,
            lambda: head(path, size, "POST", "Upgrade: websocket", "Connection: upgrade"),
            lambda: head(path, size, "POST", "Expect: 100-continue") + body,
            lambda: head(path, size, "POST", "Expect: tea") + body,
            lambda: head(path, size, "POST", "Content-Encoding: gzip") + body,
            lambda: head(path, size, "POST", "Content-Type: text/plain; charset=\0"),
            lambda: head(path, 10**30) + body,
            lambda: head(path, size).replace(b"HTTP/1.1", b"HTTP/9.9") + body,
            lambda: head(path, size).replace(b"HTTP/1.1", b"HTTP/1.0") + body,
            lambda: head(path, size).replace(b"\r\n", b"\n") + body,
            lambda: head(path, size).replace(b" ", b"\t") + body,
            lambda: b"\r\n" * 1000 + head(path, size) + body,
            lambda: random.randbytes(random.choice((1, 100, 20_000))) + b"\r\n\r\n",
            lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500),
            lambda: b"GET / HTTP/1.1\r\n" + b"\0" * 100 + b"\r\n\r\n",
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        )
    )()  # fmt: skip


def chunks(path: str, body: bytes, random: Random) -> bytes:
    """Write a body in chunks, as Docker never does, rightly or wrongly."""
    lines = [f"POST {path} HTTP/1.1", "Host: ", "Transfer-Encoding: chunked", "", ""]
    size = random.choice((1, 100, 65_536))
    pieces = [body[n : n + size] for n in range(0, min(len(body), size * 50), size)]
    data = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces)
    end = random.choice(
        (b"0\r\n\r\n", b"zz\r\n", b"-1\r\n\r\n", b"f" * 40 + b"\r\n", b"")
    )
    return "\r\n".join(lines).encode() + data + end


def process(seed: str, plugin: str, admin: str, requests: int) -> Tally:
    """Attack from a process of its own."""
    return asyncio.run(attack(seed, plugin, admin, requests))


async def attack(seed: str, plugin: str, admin: str, requests: int) -> Tally:
    """Attack over several connections."""
    tally = Tally()
    share = -(-requests // CONNECTIONS)
    async with asyncio.TaskGroup() as group:
        for number in range(CONNECTIONS):
            one = Attacker(f"{seed}:{number}", plugin, admin, tally)
            group.create_task(one.run(share))
    return tally


# Meanwhile.


@dataclass(slots=True, kw_only=True)
class Watch:
    """What a well-behaved Docker meets while others attack."""

    target: Daemon
    waits: list[float] = field(default_factory=list)
    lives: list[float] = field(default_factory=list)
    refused: int = 0
    violations: list[str] = field(default_factory=list)

    def handshake(self) -> None:
        """Make the call that a dockerd begins with."""
        begin = time.monotonic()
        status, content = self.target.call("IpamDriver.GetDefaultAddressSpaces")
        self.waits.append(time.monotonic() - begin)
        if status != 200 or "LocalDefaultAddressSpace" not in content:
            self.violations.append(f"a sound call got {status}: {content}")

    def attach(self) -> None:
        """Start and stop a container on a network of its own."""
        begin = time.monotonic()
        try:
            for method, content in SOUND_LIFE:
                status, answered = self.target.call(method, **content)
                if status != 200:
                    self.refused += 1
                if status not in {200, 500} or "internal" in str(answered):
                    text = f"{method} of a sound life got {status}: {answered}"
                    self.violations.append(text)
        finally:
            self.lives.append(time.monotonic() - begin)

    def clean(self) -> None:
        """Remove all that is there, as Docker would."""
        for endpoint in self.target.ask("GET", "endpoints"):
            ids = {"NetworkID": endpoint["network_id"], "EndpointID": endpoint["id"]}
            self.removed("NetworkDriver.DeleteEndpoint", **ids)
        for network in self.target.ask("GET", "networks"):
            self.removed("NetworkDriver.DeleteNetwork", NetworkID=network["id"])
        for claim in self.target.claims():
            self.removed("IpamDriver.ReleasePool", PoolID=claim)

    def removed(self, method: str, **content: str) -> None:
        """Make a removing call, which must never fail."""
        status, answered = self.target.call(method, **content)
        if status != 200:
            self.violations.append(f"{method} {content} got {status}: {answered}")


SOUND_LIFE = steps("f" * 64, "d" * 64, "172.31.255", 2, options={}, ports=[])
"""A life on ids and a pool that no attacker knows."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What came of a run."""

    seed: str
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    watch: Watch
    memory: list[tuple[int, float]] = field(default_factory=list)
    """How many requests there were, and MB then, after all was removed."""
    descriptors: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def judge_memory(self) -> None:
        """Note memory that grew after it should not any more, and files left open."""
        if not self.memory:
            return
        total = self.memory[-1][0]
        warm = [mb for done, mb in self.memory if done >= total * WARM]
        growth = self.memory[-1][1] - warm[0]
        if growth > GROWTH:
            self.violations.append(f"memory grew by {growth:.1f} MB after {WARM:.0%}")
        if self.descriptors[-1] > self.descriptors[0] + 5:
            self.violations.append(f"files stay open: {self.descriptors}")

    def lines(self) -> Iterator[str]:
        """Yield the summary."""
        tally, watch = self.tally, self.watch
        rate = tally.requests / max(self.seconds, 0.001)
        yield f"seed         {self.seed}"
        yield f"requests     {tally.requests} in {self.seconds:.0f} s, {rate:.0f}/s"
        yield f"kinds        {dict(tally.sent.most_common())}"
        plain = {k: v for k, v in tally.statuses.most_common() if " " not in k}
        yield f"answers      {plain}"
        refused = {k: v for k, v in sorted(tally.statuses.items()) if k[:4] == "500 "}
        yield f"refused      {refused}"
        done = {k[4:]: v for k, v in sorted(tally.statuses.items()) if k[:4] == "200 "}
        yield f"done         {done}"
        yield f"too slow     {tally.late} refused at their bound of 10 s"
        yield f"log          {watch.target.lines} lines, {len(watch.target.troubles)} bugs"
        yield "memory       " + ", ".join(f"{mb:.1f} MB@{n}" for n, mb in self.memory)
        yield f"files        {self.descriptors}"
        yield f"sound calls  {timed(watch.waits)}"
        yield f"sound lives  {timed(watch.lives)}; {watch.refused} calls refused"
        yield f"violations   {len(self.violations)}"
        yield from (f"  {one}" for one in self.violations[:20])


def timed(waits: Sequence[float]) -> str:
    """Describe how long something took."""
    if not waits:
        return "none"
    ordered = sorted(1000 * wait for wait in waits)
    middle, most = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    return (
        f"{len(ordered)}: median {middle:.1f} ms, 95 % {most:.1f} ms, "
        f"slowest {ordered[-1]:.1f} ms"
    )


def run(requests: int, seed: str, *, processes: int = 2, points: int = 8) -> Report:
    """Attack a daemon of its own, and tell what came of it."""
    with daemon("--grace", "1") as target:
        watch = Watch(target=target)
        report = Report(seed=seed, watch=watch)
        begin = time.monotonic()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            for point in range(points):
                share = requests * (point + 1) // points - requests * point // points
                works = [
                    pool.submit(
                        process,
                        f"{seed}:{point}:{number}",
                        str(target.socket),
                        str(target.admin),
                        -(-share // processes),
                    )
                    for number in range(processes)
                ]
                accompany(works, watch)
                for work in works:
                    report.tally.add(work.result())
                watch.clean()
                settle(target)
                report.memory.append((report.tally.requests, target.memory()))
                report.descriptors.append(target.descriptors())
        report.seconds = time.monotonic() - begin
        finish(report)
    return report


def accompany(works: Sequence[Future[Tally]], watch: Watch) -> None:
    """Be a well-behaved Docker until the attackers are done."""
    cleaned = time.monotonic()
    while wait(works, timeout=0.05).not_done:
        if not watch.target.alive:
            raise RuntimeError("the daemon died: " + "\n".join(watch.target.last))
        watch.handshake()
        if len(watch.waits) % 40 == 0:
            watch.attach()
        if time.monotonic() - cleaned > CLEANING:
            watch.clean()
            cleaned = time.monotonic()


def settle(target: Daemon) -> None:
    """Wait until the last connection is gone and idle addresses have lapsed."""
    latest = time.monotonic() + 20
    while time.monotonic() < latest:
        if not target.ask("GET", "pools") and not target.ask("GET", "census")["owned"]:
            return
        time.sleep(0.5)


def finish(report: Report) -> None:
    """Judge what is left when all was removed, and end the daemon."""
    target, wrong = report.watch.target, report.violations
    report.judge_memory()
    if report.tally.late > max(3.0, report.tally.requests * LATE):
        wrong.append(f"{report.tally.late} calls took longer than they may")
    wrong += report.tally.violations + report.watch.violations
    wrong += [f"log: {line}" for line in target.troubles]
    for what in ("endpoints", "networks", "pools", "ports"):
        left = target.ask("GET", what)
        if left:
            known = target.records("members/") + target.records("pools/")
            wrong.append(f"{what} are left: {str(left)[:500]}; records: {known}")
    owned = target.ask("GET", "census")["owned"]
    if owned:
        wrong.append(f"in the kernel is left: {str(owned)[:500]}")
    state = target.ask("GET", "status")
    if not state["well"]:
        wrong.append(f"it is not well: {state['attention']}")
    links = json.loads(target.inside("ip", "-j", "link"))
    if [link["ifname"] for link in links] != ["lo"]:
        wrong.append(f"devices are left: {[link['ifname'] for link in links]}")
    code = target.close()
    if code != 0:
        wrong.append(f"it ended with code {code}: {list(target.last)[-5:]}")


def main() -> int:
    """Read the command line, run, and print the summary."""
    parser = argparse.ArgumentParser(description="Attack a pynet with odd requests.")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    report = run(given.requests, given.seed, processes=given.processes)
    print("\n".join(report.lines()))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
