"""The admin door over its socket: every call, and the status of every refusal."""

import asyncio
from contextlib import asynccontextmanager

import aiohttp
import pytest

from cnmdriver.admin.app import application
from cnmdriver.api.app import runner
from cnmdriver.errors import (
    Conflict,
    Exhausted,
    InvalidParameter,
    KernelError,
    NotFound,
    StoreError,
)
from cnmdriver.model import Pool, Reservation
from cnmdriver.store import records
from tests import scene
from tests.fakes import rig

INFO = {
    "pid": 7,
    "settings": {"audit": 30.0},
    "uptime": 3.5,
    "store": "sqlite:///s",
    "docker": "off",
}


@asynccontextmanager
async def door(made, path, **doors):
    """Serve on a socket and open a client of it."""
    given = {
        "info": lambda: INFO,
        "remove_endpoint": made.networks.remove,
        "release_address": made.ipam.release_address,
        **doors,
    }
    server = runner(application(made.site, **given))
    await server.setup()
    await aiohttp.web.UnixSite(server, str(path)).start()
    connector = aiohttp.UnixConnector(str(path))
    try:
        async with aiohttp.ClientSession("http://pynet", connector=connector) as client:
            yield client
    finally:
        await server.cleanup()


@pytest.fixture
async def made(tmp_path):
    """Build a host with two networks."""
    async with rig(tmp_path) as built:
        await scene.populate(built)
        yield built


@pytest.fixture
async def client(made, tmp_path):
    """Serve it."""
    async with door(made, tmp_path / "admin.sock") as opened:
        yield opened


async def get(client, path):
    """Return status and content of a GET."""
    async with client.get(path) as answer:
        return answer.status, await answer.json()


async def delete(client, path, **query):
    """Return status and content of a DELETE."""
    async with client.delete(path, params=query) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("status", dict),
        ("networks", list),
        ("networks/blue", dict),
        ("endpoints", list),
        ("ports", list),
        ("pools", list),
        ("explain", dict),
        ("explain?network=green", dict),
        ("diff", dict),
        ("census", dict),
        ("doctor", dict),
        ("trace?from=web&to=db", dict),
        ("log", dict),
        ("settings", dict),
    ],
)
async def test_every_question_is_answered(client, path, kind):
    """Each question gets 200 and JSON."""
    code, content = await get(client, f"/v1/{path}")
    assert (code, type(content)) == (200, kind)
    assert content


async def test_network_by_any_of_its_names(client, made):
    """A network is found by name, id and start of an id; names may have a slash."""
    made.site.names[scene.BLUE] = "a/b c"
    for wanted in ("a%2Fb%20c", scene.BLUE, "bbbb"):
        code, content = await get(client, f"/v1/networks/{wanted}")
        assert (code, content["id"]) == (200, scene.BLUE)


async def test_remove_endpoint(client, made):
    """Removing an endpoint takes it from the records and the kernel."""
    code, content = await delete(client, "/v1/endpoints/db")
    assert (code, content) == (200, {"removed": scene.DB, "name": "db"})
    assert not [k for k in made.records if scene.DB in k]
    assert ("device", "host", "pe-3a26c64231") not in made.kernel.ops
    assert (await delete(client, "/v1/endpoints/db"))[0] == 404


async def test_remove_ambiguous_endpoint(client, made):
    """A name that means two endpoints removes none."""
    code, content = await delete(client, "/v1/endpoints/web")
    assert code == 409
    assert content["error"].endswith("say which of e1e1e1e1e1e1, e4e4e4e4e4e4")
    assert len(made.site.endpoints(made.site.member(scene.GREEN).network)) == 2


async def release(client, address, pool="10.1.0.0/24"):
    """Release an address."""
    return await delete(client, "/v1/addresses", pool=pool, address=address)


async def test_release_address(client, made):
    """An address that nothing uses is given back."""
    await made.ipam.request_address(
        "local/10.1.0.0/24", address=None, gateway=False, name="lost"
    )
    code, content = await release(client, "10.1.0.4")
    assert (code, content["released"]) == (200, "10.1.0.4")
    assert (await release(client, "10.1.0.4"))[0] == 404


@pytest.mark.parametrize(
    ("address", "pool", "code", "text"),
    [
        ("10.1.0.2", "10.1.0.0/24", 409, "used by endpoint web"),
        ("10.1.0.1", "10.1.0.0/24", 409, "the gateway of a network"),
        ("10.1.0.9", "10.1.0.0/24", 404, "is not taken"),
        ("10.1.0.2", "10.7.0.0/24", 404, "no pool here is called '10.7.0.0/24'"),
        ("10.1.0", "10.1.0.0/24", 400, "'10.1.0' is no IP address"),
        ("", "", 404, "no pool here is called ''"),
    ],
)
async def test_release_refused(client, made, address, pool, code, text):
    """What is used, unknown or nonsense is not released, and the reason is told."""
    before = made.records
    got, content = await release(client, address, pool)
    assert (got, made.records) == (code, before)
    assert text in content["error"]


async def test_release_of_another_host(client, made):
    """An address of another host is released there."""
    pool = next(iter(made.site.view.all(Pool, "pools/")))
    held = Reservation(
        space="local", cidr=pool.cidr, ip=pool.cidr[50], host="f" * 16, name="far"
    )
    key = records.address("local", pool.cidr, held.ip)
    await made.state.commit(lambda draft: draft.put(key, held))
    code, content = await release(client, str(held.ip), str(pool.cidr))
    assert (code, content["error"]) == (
        409,
        "address 10.1.0.50 is host ffffffff's; release it there",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidParameter("no"), 400),
        (NotFound("no"), 404),
        (Conflict("no"), 409),
        (Exhausted("no"), 409),
        (StoreError("no"), 503),
        (KernelError("no"), 500),
    ],
)
async def test_errors(made, tmp_path, error, code):
    """Each class of error has its status, and the sentence comes through."""

    async def refuse(_):
        raise error

    async with door(made, tmp_path / "a", remove_endpoint=refuse) as client:
        assert await delete(client, "/v1/endpoints/db") == (code, {"error": "no"})


async def test_slow_call_ends(made, tmp_path):
    """A call that takes too long is cancelled and answered."""
    ended = []

    async def wait(_):
        try:
            await asyncio.sleep(20)
        finally:
            ended.append(1)

    async with door(made, tmp_path / "a", remove_endpoint=wait, limit=0.1) as client:
        code, content = await delete(client, "/v1/endpoints/db")
    assert (code, ended) == (503, [1])
    assert content["error"].startswith("this did not end within 0.1 s")


@pytest.mark.parametrize("path", ["/", "/v1/nonsense", "/v1/networks/a/b"])
async def test_unknown_path(client, path):
    """What is no call gets 404, as JSON."""
    code, content = await get(client, path)
    assert (code, content["error"]) == (404, f"GET {path}: Not Found")


async def test_wrong_verb(client):
    """A call with another verb gets 405, as JSON."""
    async with client.post("/v1/status") as answer:
        assert answer.status == 405
        assert "error" in await answer.json()
