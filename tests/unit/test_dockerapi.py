"""Docker's door: what its answers mean, and what becomes of bad ones."""

import asyncio
import contextlib
import json
import time
from ipaddress import ip_network

import pytest
from aiohttp import web

from cnmdriver import dockerapi
from cnmdriver.dockerapi import DockerApi, Inventory
from cnmdriver.errors import StoreError

RED, BLUE, DOCKER0, OTHER = "1" * 64, "2" * 64, "3" * 64, "4" * 64
WEB, DB = "e" * 64, "f" * 64
LISTED = [
    {
        "Name": "red",
        "Id": RED,
        "Driver": "pynet",
        "IPAM": {
            "Driver": "pynet",
            "Config": [
                {"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.1"},
                {"Subnet": "fd00::/64"},
            ],
        },
        "Containers": {},
        "Options": {},
    },
    {
        "Name": "bridge",
        "Id": DOCKER0,
        "Driver": "bridge",
        "IPAM": {"Driver": "default", "Config": [{"Subnet": "172.17.0.0/16"}]},
        "Options": {"com.docker.network.bridge.name": "docker0"},
    },
    {
        "Name": "home",
        "Id": OTHER,
        "Driver": "bridge",
        "IPAM": {"Driver": "default", "Options": None, "Config": None},
        "Options": None,
    },
    {"Name": "blue", "Id": BLUE, "Driver": "pynet:latest", "IPAM": None},
    {"Name": "none", "Id": "5" * 64, "Driver": "null", "IPAM": {"Config": []}},
]
DETAILS = {
    RED: {
        "Name": "red",
        "Id": RED,
        "Containers": {
            "c1": {"Name": "web", "EndpointID": WEB},
            "c2": {"Name": "db", "EndpointID": DB},
        },
    },
    BLUE: {"Name": "blue", "Id": BLUE, "Containers": None},
}
WHOLE = Inventory(
    networks=frozenset({RED, BLUE, DOCKER0, OTHER, "5" * 64}),
    endpoints=frozenset({WEB, DB}),
    names={
        RED: "red",
        BLUE: "blue",
        DOCKER0: "bridge",
        OTHER: "home",
        "5" * 64: "none",
        WEB: "web",
        DB: "db",
    },
    pools=frozenset(
        ip_network(t) for t in ("10.1.0.0/24", "fd00::/64", "172.17.0.0/16")
    ),
    bridges=frozenset({"docker0", "br-444444444444"}),
)

# What answers mean.


def test_inventory():
    """Docker's lists become ids, names, subnets and the devices of its bridges."""
    assert dockerapi.inventory(LISTED, list(DETAILS.values())) == WHOLE


def test_empty_inventory():
    """A Docker without networks has nothing."""
    assert dockerapi.inventory([], []) == Inventory()


def test_details_may_lack_anything():
    """A container without name or endpoint is listed with what it has."""
    details = [{"Containers": {"c1": {}}}, {}]
    found = dockerapi.inventory([], details)
    assert found == Inventory(endpoints=frozenset({""}), names={"": ""})


@pytest.mark.parametrize(
    ("ipam", "found"),
    [
        (None, []),
        ({}, []),
        ({"Config": None}, []),
        ({"Config": [{}]}, []),
        ({"Config": [{"Subnet": ""}]}, []),
        ({"Config": [{"Subnet": "10.1.0.5/24"}]}, ["10.1.0.0/24"]),
        (
            {"Config": [{"Subnet": "10.1.0.0/24"}, {"Subnet": "fd00::/64"}]},
            ["10.1.0.0/24", "fd00::/64"],
        ),
    ],
)
def test_subnets(ipam, found):
    """All subnets are read that Docker lists, some with bits right of the prefix."""
    assert [str(net) for net in dockerapi.subnets({"IPAM": ipam})] == found
    assert list(dockerapi.subnets({})) == []


@pytest.mark.parametrize(
    ("options", "device"),
    [
        ({"com.docker.network.bridge.name": "docker0"}, "docker0"),
        ({"com.docker.network.bridge.name": ""}, "br-333333333333"),
        ({"com.docker.network.driver.mtu": "1400"}, "br-333333333333"),
        (None, "br-333333333333"),
    ],
)
def test_bridge(options, device):
    """A bridge of Docker's has the name it was given, or one from its id."""
    assert dockerapi.bridge({"Id": DOCKER0, "Options": options}) == device


# What becomes of them.


class Docker:
    """Answers as Docker does, from a real socket, or as the test wants it."""

    def __init__(self, path):
        """Listen on a path."""
        self.path = path
        self.answers = {
            "/networks": LISTED,
            **{f"/networks/{i}": d for i, d in DETAILS.items()},
        }
        self.asked = []
        self.events = asyncio.Queue()

    async def answer(self, request):
        """Answer a question."""
        self.asked.append(request.path_qs)
        if request.path == "/events":
            return await self.stream(request)
        found = self.answers.get(request.path, web.HTTPNotFound())
        if isinstance(found, web.HTTPException):
            raise found
        if found is None:
            await asyncio.sleep(60)
        if isinstance(found, str):
            return web.Response(text=found, content_type="application/json")
        return web.json_response(found)

    async def stream(self, request):
        """Send what the test puts into the queue, until it puts None."""
        answer = web.StreamResponse()
        await answer.prepare(request)
        while (chunk := await self.events.get()) is not None:
            await answer.write(chunk)
        return answer


@pytest.fixture
async def docker(tmp_path):
    """Serve a Docker on a socket of its own."""
    served = Docker(tmp_path / "docker.sock")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", served.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(served.path)).start()
    yield served
    await runner.cleanup()


@pytest.fixture
def api(docker):
    """Return the door to it."""
    return DockerApi(f"unix://{docker.path}")


@pytest.fixture
def short(monkeypatch):
    """Make a question take little time at most."""
    monkeypatch.setattr(dockerapi, "LIMIT", 0.2)


def test_path():
    """The address is a Unix socket's, with or without its scheme."""
    assert DockerApi("unix:///run/docker.sock").path == "/run/docker.sock"
    assert DockerApi("/run/docker.sock").path == "/run/docker.sock"


async def test_asks(docker, api):
    """Only networks of the driver are asked for in detail, whatever its tag."""
    assert await api.inventory("pynet") == WHOLE
    assert docker.asked == ["/networks", f"/networks/{RED}", f"/networks/{BLUE}"]


async def test_asks_for_another_driver(docker, api):
    """A driver without networks is told about the networks, and nothing in them."""
    found = await api.inventory("other")
    assert found.networks == WHOLE.networks
    assert found.endpoints == frozenset()
    assert docker.asked == ["/networks"]


async def test_asks_for_networks_of_a_plugin_with_any_name(docker, api):
    """A managed plugin has a name of the user's: its networks are known by their ids."""
    found = await api.inventory("other", frozenset({RED, BLUE}))
    assert found.endpoints == WHOLE.endpoints


@pytest.mark.parametrize(
    ("name", "driver", "same"),
    [
        ("pynet", "pynet", True),
        ("pynet:latest", "pynet", True),
        ("pynet:latest", "pynet:latest", True),
        ("example.org/pynet:1", "example.org/pynet:1", True),
        ("pynet", "pynet:latest", False),
        ("other:latest", "pynet", False),
    ],
)
def test_names_of_drivers(name, driver, same):
    """A driver that was named without a tag is meant with any."""
    assert dockerapi.is_named(name, driver) is same


async def test_network_goes_meanwhile(docker, api):
    """A network that is removed between the two questions has no endpoints."""
    del docker.answers[f"/networks/{RED}"]
    found = await api.inventory("pynet")
    assert found.networks == WHOLE.networks
    assert found.endpoints == frozenset()


@pytest.mark.parametrize(
    "answer",
    [
        web.HTTPInternalServerError(),
        web.HTTPForbidden(),
        web.HTTPNotFound(),
        "no json",
        "",
        "null",
        "7",
        '"text"',
        "[7]",
        "{}x",
        '{"message": "not what was asked"}',
        '[{"Driver": "pynet"}]',
        '[{"Id": "1"}]',
        '[{"Id": [], "Name": "n"}]',
        '[{"Id": "1", "Name": "n", "IPAM": {"Config": [{"Subnet": "ten"}]}}]',
        '[{"Id": "1", "Name": "n", "IPAM": {"Config": [7]}}]',
        '[{"Id": "1", "Name": "n", "Driver": "bridge", "Options": 7}]',
    ],
)
async def test_bad_list(docker, api, answer):
    """Whatever is no list of networks is a StoreError that names the socket."""
    docker.answers["/networks"] = answer
    with pytest.raises(StoreError) as refused:
        await api.inventory("pynet")
    assert str(refused.value).startswith(f"docker at {docker.path} ")


@pytest.mark.parametrize(
    "answer",
    [
        web.HTTPInternalServerError(),
        "no json",
        "[7]",
        '{"Containers": [7]}',
        '{"Containers": {"c": 7}}',
        '{"Containers": {"c": {"EndpointID": []}}}',
    ],
)
async def test_bad_details(docker, api, answer):
    """So is a network that cannot be read."""
    docker.answers[f"/networks/{RED}"] = answer
    with pytest.raises(StoreError, match=f"docker at {docker.path} "):
        await api.inventory("pynet")


@pytest.mark.parametrize("path", ["/networks", f"/networks/{RED}"])
async def test_silence(docker, api, short, path):
    """A Docker that does not answer is given up when its time is over."""
    docker.answers[path] = None
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"does not answer: .*Timeout"):
        await api.inventory("pynet")
    assert 0.1 < time.monotonic() - started < 5


async def test_no_socket(tmp_path):
    """Without a Docker there is a StoreError, for lists and for events."""
    away = DockerApi(f"unix://{tmp_path}/none")
    wanted = f"docker at {tmp_path}/none does not answer: "
    with pytest.raises(StoreError, match=wanted):
        await away.inventory("pynet")
    with pytest.raises(StoreError, match=wanted):
        await anext(away.events())


async def test_events(docker, api):
    """It is told when connected, and then at each change."""
    async with contextlib.aclosing(api.events()) as events:
        await anext(events)
        (asked,) = docker.asked
        assert asked.startswith("/events?filters=")
        for _ in range(3):
            docker.events.put_nowait(b"{}\n")
            await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        docker.events.put_nowait(None)
        with pytest.raises(StopAsyncIteration):
            await waiting


async def test_events_ask_for_what_concerns_networks(docker, api):
    """Docker is asked for news of networks and containers and no others."""
    seen = []

    async def answer(request):
        seen.append(json.loads(request.query["filters"]))
        return web.StreamResponse()

    docker.stream = answer
    async with contextlib.aclosing(api.events()) as events:
        await anext(events)
    assert seen == [{"type": ["network", "container"]}]


async def test_events_coalesce(docker, api):
    """What happens while nobody looks is one event."""
    async with contextlib.aclosing(api.events()) as events:
        await anext(events)
        for _ in range(50):
            docker.events.put_nowait(b'{"Type":"network"}\n')
        docker.events.put_nowait(None)
        while not docker.events.empty():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        counted = [event async for event in events]
    assert 1 <= len(counted) <= 2


async def test_events_last(docker, api, short):
    """A quiet Docker is no absent one: no time limit ends its events."""
    async with contextlib.aclosing(api.events()) as events:
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        done, _ = await asyncio.wait([waiting], timeout=0.6)
        assert not done
        docker.events.put_nowait(b"{}\n")
        await waiting


async def test_silent_events(docker, api, short):
    """A Docker that does not even begin to answer is given up."""

    async def silent(request):
        await asyncio.sleep(60)

    docker.stream = silent
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"does not answer: .*Timeout"):
        await anext(api.events())
    assert 0.1 < time.monotonic() - started < 5


async def test_refused_events(docker, api):
    """An error instead of events is a StoreError."""

    async def refuse(request):
        raise web.HTTPInternalServerError

    docker.stream = refuse
    with pytest.raises(StoreError, match="500"):
        await anext(api.events())


async def test_events_break(docker, api):
    """A connection that breaks is a StoreError, and no quiet end."""

    async def broken(request):
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        await docker.events.get()
        request.transport.abort()
        return answer

    docker.stream = broken
    async with contextlib.aclosing(api.events()) as events:
        await anext(events)
        docker.events.put_nowait(b"")
        with pytest.raises(StoreError):
            await anext(events)
