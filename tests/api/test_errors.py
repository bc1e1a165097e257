"""Section 3 of Docker's protocol: errors, repeated calls, limits, concurrency."""

import asyncio
import json

import pytest

from cnmdriver.api.app import _server_log
from cnmdriver.errors import (
    Conflict,
    DriverError,
    Exhausted,
    InvalidParameter,
    KernelError,
    NotFound,
    StoreError,
)
from tests.api.client import eventually
from tests.api.messages import (
    ARGUMENTLESS,
    ENDPOINT,
    NETWORK,
    POOL_ID,
    REMOVING,
    SOUND,
    sound,
)

SENTENCE = "cannot read the request: its body is empty"


@pytest.mark.parametrize("method", SOUND)
@pytest.mark.parametrize("body", [b"", b"\n"])
async def test_empty_body_is_refused_for_every_method_with_arguments(
    docker, networks, method, body
):
    """Docker repeats a call without its body: success would be a lie."""
    reply = await docker.post(f"/{method}", body)
    assert reply.status == 400
    assert reply.json["Err"].startswith(SENTENCE)
    assert networks.calls == []


@pytest.mark.parametrize("method", ARGUMENTLESS)
async def test_empty_body_is_right_for_methods_without_arguments(docker, method):
    """The handshake has no bodies."""
    assert (await docker.post(f"/{method}")).status == 200


@pytest.mark.parametrize("method", ARGUMENTLESS)
async def test_handshake_looks_at_no_body(docker, method):
    """Whatever a later Docker may say in a handshake cannot make it fail."""
    assert (await docker.post(f"/{method}", b'{"New": [')).status == 200


@pytest.mark.parametrize("method", SOUND)
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"0",
        b"{} {}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"NetworkID":' + b"[" * 100_000,
        b'{"New":' + b"[" * 100_000,
    ],
)
async def test_unreadable_body_is_refused(docker, networks, method, body):
    """What is not a JSON object is answered 400 with a sentence."""
    reply = await docker.post(f"/{method}", body)
    assert reply.status == 400
    assert reply.json["Err"].startswith("cannot read the request: ")
    assert reply.json["Err"] == reply.json["Error"]
    assert networks.calls == []


@pytest.mark.parametrize("method", SOUND)
async def test_object_without_its_fields_is_refused(docker, networks, method):
    """`{}` is no request, except where all is optional."""
    reply = await docker.call(method, {})
    if method == "NetworkDriver.GwAllocCheck":
        assert reply.status == 200
    else:
        assert reply.status == 400
        assert "missing required field `" in reply.json["Err"]
        assert networks.calls == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidParameter("option x is unknown"), 400),
        (NotFound("there is no network aaaa"), 500),
        (Conflict("pool 10.1.0.0/16 is taken"), 500),
        (Exhausted("no address is left"), 500),
        (StoreError("etcd does not answer"), 500),
        (KernelError("cannot make device: EPERM"), 500),
        (DriverError("it went wrong"), 500),
    ],
)
@pytest.mark.parametrize(
    ("method", "call"),
    [("NetworkDriver.Join", "join"), ("IpamDriver.RequestPool", "request_pool")],
)
async def test_error_is_told_under_both_keys(
    docker, networks, method, call, error, status
):
    """Each error has its status, and its text alone under `Err` and `Error`."""
    networks.fails[call] = error
    reply = await docker.call(method, SOUND[method])
    assert reply.status == status
    assert reply.json == {"Err": str(error), "Error": str(error)}
    assert reply.headers["Content-Type"] == "application/vnd.docker.plugins.v1.2+json"


@pytest.mark.parametrize("method", REMOVING)
async def test_removing_what_is_not_there_succeeds(docker, networks, method):
    """Docker never repeats a failed removal: NotFound is a success there."""
    networks.fails[REMOVING[method]] = NotFound("there is no such thing")
    reply = await docker.call(method, SOUND[method])
    assert (reply.status, reply.json) == (200, {})


async def test_unknown_endpoint_has_no_info(docker, networks):
    """A call that does not remove tells that there is no such thing, but not by 404."""
    networks.fails["info"] = NotFound("there is no endpoint bbbb")
    reply = await docker.call(
        "NetworkDriver.EndpointOperInfo", SOUND["NetworkDriver.EndpointOperInfo"]
    )
    assert reply.status == 500
    assert reply.json["Err"] == "there is no endpoint bbbb"


async def test_bug_is_an_internal_error_with_its_trace_in_the_log(
    docker, networks, logged
):
    """An unforeseen exception is told as such, and can be found."""
    networks.fails["join"] = KeyError("spam")
    reply = await docker.call("NetworkDriver.Join", SOUND["NetworkDriver.Join"])
    assert reply.status == 500
    text = "internal error: KeyError: 'spam'"
    assert reply.json == {"Err": text, "Error": text}
    bug, call = logged
    assert (bug["event"], bug["log_level"], bug["exc_info"]) == (
        "api.bug",
        "error",
        True,
    )
    assert (call["event"], call["outcome"], call["error"]) == ("api.call", "bug", text)


async def test_time_out_of_another_kind_is_not_ours(docker, networks):
    """A TimeoutError from below is a bug there, and not the call's limit."""
    networks.fails["join"] = TimeoutError("below")
    reply = await docker.call("NetworkDriver.Join", SOUND["NetworkDriver.Join"])
    assert reply.json["Err"] == "internal error: TimeoutError: below"


async def test_slow_call_is_bounded(docker, networks):
    """Docker waits for ever: a call that hangs is cancelled and told."""
    networks.waits["join"] = lambda: asyncio.sleep(60)
    reply = await docker.call("NetworkDriver.Join", SOUND["NetworkDriver.Join"])
    assert reply.status == 500
    assert reply.json["Err"].startswith("NetworkDriver.Join did not end within 0.5 s")
    assert networks.done == []


async def test_slow_removal_is_bounded_too(docker, networks):
    """The limit of a removal is an error, and not taken for "not there"."""
    networks.waits["leave"] = lambda: asyncio.sleep(60)
    reply = await docker.call("NetworkDriver.Leave", SOUND["NetworkDriver.Leave"])
    assert reply.status == 500


async def test_body_that_never_comes_is_bounded(docker, networks):
    """A client that promises more than it sends gets a refusal, and nothing is done."""
    reader, writer = await asyncio.open_unix_connection(docker.path)
    body = json.dumps(SOUND["NetworkDriver.Join"]).encode()
    writer.write(docker.bytes("/NetworkDriver.Join", body)[:-10])
    reply = await docker.reply(reader)
    writer.close()
    assert reply.status == 400
    text = "cannot read the request: it did not arrive within 0.5 s"
    assert reply.json == {"Err": text, "Error": text}
    assert networks.calls == []


@pytest.mark.parametrize(
    ("garbage", "events"),
    [
        (b"\x16\x03\x01" + b"x" * 200 + b"\r\n\r\n", []),
        (b"POST / HTTP/1.1\r\nA" + b"x" * 200 + b"\r\n\r\n", ["api.garbage"]),
        (b"POST / HTTP/1.1\r\nA: " + b"x" * 99_999, ["api.garbage"]),
    ],
)
async def test_garbage_leaves_no_trace(docker, logged, garbage, events):
    """What is no HTTP gets 400 and at most a short line in the log."""
    reader, writer = await asyncio.open_unix_connection(docker.path)
    writer.write(garbage)
    assert (await reader.readline()).startswith(b"HTTP/1.0 400 ")
    writer.close()
    assert [line["event"] for line in logged] == events
    for line in logged:
        assert line["log_level"] == "info"
        assert len(line["error"]) < 400
        assert "exc_info" not in line


def test_faults_of_the_server_are_bugs(logged):
    """What the server itself stumbles over is told with its trace."""
    _server_log().error("it broke", exc_info=ZeroDivisionError())
    (line,) = logged
    assert (line["event"], line["error"]) == ("api.bug", "it broke")
    assert isinstance(line["exc_info"], ZeroDivisionError)


async def test_client_that_goes_away_cancels_nothing(docker, networks, logged):
    """A call goes on to its end when Docker closes the connection in the middle."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def wait():
        begun.set()
        await go.wait()

    networks.waits["join"] = wait
    _, writer = await asyncio.open_unix_connection(docker.path)
    body = json.dumps(SOUND["NetworkDriver.Join"]).encode()
    writer.write(docker.bytes("/NetworkDriver.Join", body))
    await begun.wait()
    writer.close()
    await writer.wait_closed()
    assert (await docker.call("Plugin.Activate")).status == 200
    go.set()
    await eventually(lambda: len(logged) == 2)
    assert networks.done == ["join"]
    assert logged[1]["outcome"] == "ok"


async def test_client_that_goes_away_in_its_request_does_nothing(
    docker, networks, logged
):
    """Half a request is a bad request, and no bug of ours."""
    _, writer = await asyncio.open_unix_connection(docker.path)
    body = json.dumps(SOUND["NetworkDriver.Join"]).encode()
    writer.write(docker.bytes("/NetworkDriver.Join", body)[:-10])
    await writer.drain()
    assert (await docker.call("Plugin.Activate")).status == 200
    writer.close()
    await eventually(lambda: len(logged) == 2)
    assert networks.calls == []
    assert [line["event"] for line in logged] == ["api.call"] * 2
    assert logged[1]["outcome"] == "InvalidParameter"


async def test_calls_run_side_by_side(docker, networks):
    """Fifty calls are in progress at once, and other calls are answered meanwhile."""
    go = asyncio.Event()
    networks.waits["join"] = go.wait
    calls = [
        asyncio.create_task(
            docker.call(
                "NetworkDriver.Join", sound("NetworkDriver.Join", EndpointID=str(n))
            )
        )
        for n in range(50)
    ]
    await eventually(lambda: len(networks.calls) == 50)
    assert (await docker.call("Plugin.Activate")).status == 200
    go.set()
    assert {reply.status for reply in await asyncio.gather(*calls)} == {200}


@pytest.mark.parametrize(
    ("method", "facts"),
    [
        ("Plugin.Activate", {}),
        ("NetworkDriver.CreateNetwork", {"network": NETWORK[:12]}),
        ("NetworkDriver.Join", {"network": NETWORK[:12], "endpoint": ENDPOINT[:12]}),
        ("IpamDriver.RequestPool", {"pool": "10.99.0.0/24"}),
        ("IpamDriver.RequestAddress", {"pool_id": POOL_ID}),
        ("IpamDriver.ReleaseAddress", {"pool_id": POOL_ID, "address": "10.99.0.2"}),
    ],
)
async def test_each_call_is_one_log_line(docker, logged, method, facts):
    """The line has the method, what it was about, the outcome and the time."""
    await docker.call(method, SOUND.get(method))
    (line,) = logged
    assert line.pop("ms") >= 0
    assert line == {
        "event": "api.call",
        "log_level": "info",
        "method": method,
        "outcome": "ok",
        **facts,
    }


@pytest.mark.parametrize(
    ("method", "error", "outcome"),
    [
        ("NetworkDriver.Join", Conflict("it is elsewhere"), "Conflict"),
        ("NetworkDriver.Leave", NotFound("it is gone"), "absent"),
        ("Nothing", None, "HTTPNotFound"),
    ],
)
async def test_each_refusal_is_one_log_line(
    docker, networks, logged, method, error, outcome
):
    """The line of a refusal says which, and why."""
    networks.fails["join"] = networks.fails["leave"] = error
    reply = await docker.call(method, SOUND.get(method))
    (line,) = logged
    assert (line["method"], line["outcome"]) == (method, outcome)
    assert line.get("error") == reply.json.get("Err")


async def test_empty_body_is_one_log_line(docker, logged):
    """A request that cannot be read is logged with its reason."""
    await docker.call("NetworkDriver.Join")
    (line,) = logged
    assert line["outcome"] == "InvalidParameter"
    assert line["error"].startswith(SENTENCE)
