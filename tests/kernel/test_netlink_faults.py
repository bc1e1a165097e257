"""
The kernel's answers are lost, late, or not of one moment; things vanish in between.

Devices really come and go meanwhile, and sockets really overflow. What the kernel does
not do at will is done at a narrow door: between one request and the next, or by a
socket that answers in the kernel's place.
"""

import asyncio
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from threading import Thread
from typing import Any

import pytest

from cnmdriver.dataplane import netlink as door
from cnmdriver.dataplane.entries import Reading
from cnmdriver.dataplane.kernel import Kernel
from cnmdriver.dataplane.links import Links
from cnmdriver.dataplane.monitor import Ear
from cnmdriver.dataplane.netlink import Netlink
from cnmdriver.dataplane.place import Place
from cnmdriver.errors import Conflict, DriverError, KernelError
from cnmdriver.plan.ops import GROUP, HOST, Bridge, Vxlan, compare

from .conftest import (
    Namespace,
    host,  # noqa: F401
    network,
    run,
    whole,
)

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

STEADY = 300
"""Devices that stay, enough for a dump of several parts."""
TINY = 2304
"""The smallest buffer that the kernel gives."""


@pytest.fixture
async def place(host: Namespace) -> AsyncIterator[Place]:  # noqa: F811
    """Open a place in the test's own namespace."""
    assert host
    opened = Place()
    await opened.open()
    yield opened
    await opened.close()


def batch(*lines: str) -> None:
    """Have `ip` do many things."""
    text = "\n".join(lines)
    subprocess.run(["ip", "-batch", "-"], input=text, text=True, check=True, timeout=60)


@contextmanager
def coming_and_going() -> Iterator[None]:
    """Let devices come and go all the time."""
    made = subprocess.Popen(
        ["ip", "-batch", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert made.stdin
    pipe = made.stdin

    def feed() -> None:
        try:
            for number in range(100_000):
                pipe.write(f"link add fl{number % 9} type bridge\n")
                pipe.write(f"link del fl{number % 9}\n")
        except OSError:
            return

    thread = Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        made.kill()
        made.wait()
        thread.join()
        with suppress(OSError):
            pipe.close()


async def interrupted_dumps(place: Place) -> int:
    """Count the dumps that the kernel says are not of one moment."""
    count = 0
    for _ in range(5):
        answers = await place.netlink._ip.link("dump")
        flags = [message["header"]["flags"] async for message in answers]
        count += any(flag & door.INTERRUPTED for flag in flags)
    return count


async def test_a_dump_that_is_interrupted(place):
    """While devices come and go every look has all that stay, each of them once."""
    batch(*(f"link add st{number} type bridge" for number in range(STEADY)))
    with coming_and_going():
        await asyncio.sleep(0.3)
        assert await interrupted_dumps(place) > 0
        for _ in range(5):
            found = [link.name for link in await place.netlink.links()]
            assert len([name for name in found if name.startswith("st")]) == STEADY
            assert len(set(found)) == len(found)


class Answers:
    """What stands in for pyroute2's socket, with the dumps it is to answer with."""

    def __init__(self, *dumps: list[dict[str, Any]] | OSError) -> None:
        """Take the answers, in their order."""
        self.dumps = list(dumps)
        self.asked = 0

    async def link(self, *_: object, **__: object) -> AsyncIterator[dict[str, Any]]:
        """Answer with the next dump; the last one answers for all after it."""
        self.asked += 1
        dump = self.dumps.pop(0) if len(self.dumps) > 1 else self.dumps[0]
        if isinstance(dump, OSError):
            raise dump

        async def each() -> AsyncIterator[dict[str, Any]]:
            for message in dump:
                yield message

        return each()

    def close(self) -> None:
        """Do nothing."""


def said(*indexes: int, flags: int = 0) -> list[dict[str, Any]]:
    """Return the messages of a dump, the last one with these flags."""
    marked = (*(0 for _ in indexes[1:]), flags)
    return [
        {"index": index, "header": {"flags": flag}}
        for index, flag in zip(indexes, marked, strict=True)
    ]


async def dumped(*dumps: list[dict[str, Any]] | OSError) -> tuple[list[int], int]:
    """Return which devices a look has, and how many dumps it took."""
    place = Place()
    await place.inside.open()
    try:
        answers = Answers(*dumps)
        netlink = Netlink(place.inside)
        netlink._socket = answers  # type: ignore[assignment]
        found = await netlink._dump("listing", "link")
        return [message["index"] for message in found], answers.asked
    finally:
        place.inside.close()


async def test_a_dump_is_repeated_until_it_is_of_one_moment():
    """A dump that the kernel marks is made again, and only that one counts."""
    broken = said(1, 2, flags=door.INTERRUPTED)
    assert await dumped(broken, broken, said(1, 2, 3)) == ([1, 2, 3], 3)
    assert await dumped(said(1, 2)) == ([1, 2], 1)


async def test_no_dump_is_of_one_moment():
    """The number of dumps is bounded, and the last two count together."""
    some = said(1, 3, flags=door.INTERRUPTED)
    other = said(1, 2, flags=door.INTERRUPTED)
    assert await dumped(some, other) == ([1, 2, 1, 2], door.DUMP_TRIES)
    found, _ = await dumped(other, other, some, other)
    assert set(found) == {1, 2, 3}


async def test_an_overflow_gives_an_error_and_a_new_socket(place):
    """Lost answers are an error within the bound, and the next request is answered."""
    raw = place.netlink._ip.local.transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TINY)
    outcomes = await asyncio.gather(
        *(place.netlink.link("lo") for _ in range(100)), return_exceptions=True
    )
    errors = [each for each in outcomes if isinstance(each, BaseException)]
    assert errors
    assert all(isinstance(each, KernelError) for each in errors)
    link = await place.netlink.link("lo")
    assert link is not None
    assert await place.netlink.links()


async def test_a_dump_after_an_abandoned_one(place):
    """A dump that nobody waits for any more is not in the way of the next."""
    batch(*(f"link add st{number} type bridge" for number in range(STEADY)))
    for _ in range(3):
        task = asyncio.create_task(place.netlink.links())
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(await place.netlink.links()) >= STEADY


# Entries, whose dumps are read without pyroute2.


def entries_message(number: int, kind: int, flags: int, body: bytes) -> bytes:
    """Return a message of the kernel's."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def mac_entry(number: int, last: int, flags: int = 0) -> bytes:
    """Return an entry of bridge port 7 for a MAC with this end."""
    body = struct.pack("=BxxxiHBB", 7, 7, 0x40, 0x44, 0)
    body += struct.pack("=HH6sxx", 10, 2, bytes([2, 0, 0, 0, 0, last]))
    return entries_message(number, 28, flags, body)


@contextmanager
def playing(*turns: Callable[[int], bytes]) -> Iterator[socket.socket]:
    """Give a socket on which the kernel's part is played, a turn for each request."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(2)

    def answer() -> None:
        for turn in turns:
            request = far.recv(65536)
            if not request:
                return
            (number,) = struct.unpack_from("=I", request, 8)
            far.send(turn(number))
        far.recv(1)

    thread = Thread(target=answer)
    thread.start()
    try:
        with near:
            yield near
    finally:
        far.shutdown(socket.SHUT_RDWR)
        thread.join()
        far.close()


def over(number: int, code: int = 0) -> bytes:
    """Return the end of a dump, or its error."""
    return entries_message(number, 2 if code else 3, 2, struct.pack("=i", -code))


def nothing(number: int) -> bytes:
    """Answer that there is no entry."""
    return over(number)


@pytest.mark.parametrize(
    "first",
    [
        lambda n: mac_entry(n, 1, 0x10) + over(n),
        lambda n: over(n, 16),
        lambda n: over(n, 105),
        lambda n: mac_entry(n - 1, 9) + over(n, 16),
    ],
    ids=["interrupted", "EBUSY", "ENOBUFS", "late"],
)
async def test_entries_are_read_again(first):
    """A dump of entries that failed or is not of one moment is made once more."""
    local = ip_address("192.0.2.1")
    vxlan = Vxlan(
        name="pv", vni=1, local=local, port=4789, bridge="pn", mtu=1450, alias=None
    )
    good = lambda n: mac_entry(n, 1) + mac_entry(n, 2) + over(n)  # noqa: E731
    with playing(first, good, nothing, nothing) as sock:
        found = await Reading(sock, {7: vxlan}, HOST).all()
    assert [op.mac[-1] for op in found] == ["1", "2"]


# What vanishes, or comes, between two requests.


class Between:
    """A netlink door at which something happens once before a certain request."""

    def __init__(self, real: Netlink, verb: str, happens: tuple[str, ...]) -> None:
        """Take the request's name and the command to run before it."""
        self.real = real
        self.verb = verb
        self.happens: tuple[str, ...] | None = happens

    def __getattr__(self, name: str) -> Any:
        """Return the real door's method, led by what happens."""
        found = getattr(self.real, name)
        if name != self.verb:
            return found

        async def led(*args: Any, **named: Any) -> Any:
            if self.happens is not None:
                run(*self.happens)
                self.happens = None
            work: Awaitable[Any] = found(*args, **named)
            return await work

        return led


def meddled(place: Place, verb: str, *happens: str) -> Links:
    """Return the handler of devices, with something that happens in between."""
    place.netlink = Between(place.netlink, verb, happens)  # type: ignore[assignment]
    return Links(place, place, mark="pynet:test:", namespace="none")


BRIDGE = Bridge(name="pn-x", mac="02:00:00:00:00:01", mtu=1400, alias="pynet:test:x")


async def test_a_device_that_vanishes_while_it_is_changed(place):
    """A device removed after it was made, before it was set up, is made anew."""
    links = meddled(place, "change", "ip", "link", "del", BRIDGE.name)
    await links.apply((BRIDGE,), [])
    assert await links.devices(()) == (BRIDGE,)


async def test_a_name_that_is_taken_in_between(place):
    """A stranger's device that comes just before ours is left alone, and named."""
    command = ("ip", "link", "add", BRIDGE.name, "type", "bridge")
    links = meddled(place, "add", *command)
    with pytest.raises(Conflict, match=BRIDGE.name):
        await links.apply((BRIDGE,), [])
    assert BRIDGE.name in run("ip", "link")


async def test_ours_that_comes_in_between(place):
    """A device with our mark that comes just before ours is taken as it is."""
    command = ("ip", "link", "add", BRIDGE.name, "group", str(GROUP), "type", "bridge")
    links = meddled(place, "add", *command)
    await links.apply((BRIDGE,), [])
    assert await links.devices(()) == (BRIDGE,)


async def test_a_device_that_is_gone_when_it_is_removed(place):
    """A device that vanishes before it is removed is removed."""
    await Links(place, place, mark="pynet:test:", namespace="none").apply((BRIDGE,), [])
    links = meddled(place, "remove", "ip", "link", "del", BRIDGE.name)
    await links.clear((BRIDGE,))
    assert await links.devices(()) == ()


async def test_devices_that_vanish_all_the_time(host, tmp_path):  # noqa: F811
    """Whatever is removed meanwhile, errors are sentences, and at last all holds."""
    assert host
    kernel = Kernel(host="0123456789abcdef", run_dir=tmp_path)
    await kernel.open()
    plan = whole(network("10.1.0.0/24", "fd01::/64"))
    name = next(op.name for op in plan if isinstance(op, Bridge))
    try:
        for delay in range(12):
            stop = ["sh", "-c", f"sleep 0.00{delay:02d}; ip link del {name}"]
            with subprocess.Popen(stop, stderr=subprocess.DEVNULL):
                try:
                    await kernel.apply(plan)
                    await kernel.found(plan)
                except DriverError as error:
                    assert str(error)
        await kernel.apply(plan)
        assert not compare(plan, await kernel.found(plan))
    finally:
        await kernel.close()


# The monitor.


async def test_an_ear_that_overflows(place):
    """News that were lost are news."""
    ear = Ear(HOST, None)
    await ear.open(place.inside)
    heard: list[bool] = []
    try:
        for each in ear.sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TINY)
        batch(*(f"link add st{number} type bridge" for number in range(20)))
        ear.listen(lambda: heard.append(True))
        await asyncio.sleep(0.3)
        assert heard
    finally:
        ear.close()


async def test_an_ear_passes_by_what_is_not_ours(place):
    """Devices, addresses and routes of others wake nobody; one of ours does."""
    ear = Ear(HOST, None)
    await ear.open(place.inside)
    heard: list[bool] = []
    ear.listen(lambda: heard.append(True))
    try:
        batch(
            "link add other type bridge",
            "link set other up",
            "addr add 10.99.0.1/24 dev other",
            "route add 10.98.0.0/24 dev other",
            "neigh add 10.99.0.9 lladdr 02:00:00:00:00:09 dev other",
            "link del other",
        )
        run("nft", "add", "table", "inet", "other")
        await asyncio.sleep(0.3)
        assert heard == []
        run("ip", "link", "add", "mine", "group", str(GROUP), "type", "bridge")
        await asyncio.sleep(0.3)
        assert heard
        heard.clear()
        batch("link set mine group 0")
        await asyncio.sleep(0.3)
        assert heard
    finally:
        ear.close()
