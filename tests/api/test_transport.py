"""Sections 1 and 2 of Docker's protocol: how it speaks, and how it begins."""

import asyncio
import gzip
import json

import pytest

from tests.api.messages import ARGUMENTLESS, NETWORK, SOUND, sound

METHODS = [*ARGUMENTLESS, *SOUND]
MEDIA_TYPE = "application/vnd.docker.plugins.v1.2+json"


async def test_activation_names_both_subsystems(docker):
    """The manifest has Docker's spelling of both subsystems."""
    reply = await docker.call("Plugin.Activate")
    assert reply.json == {"Implements": ["NetworkDriver", "IpamDriver"]}


async def test_capabilities_are_those_of_the_design(docker):
    """The scopes are valid ones, gateways are asked about, and nothing is replayed."""
    network = await docker.call("NetworkDriver.GetCapabilities")
    ipam = await docker.call("IpamDriver.GetCapabilities")
    assert network.json == {
        "Scope": "local",
        "ConnectivityScope": "global",
        "GwAllocChecker": True,
    }
    assert ipam.json == {"RequiresMACAddress": False, "RequiresRequestReplay": False}


async def test_address_spaces_are_constant(docker):
    """Docker asks for the address spaces three times per network: same answer."""
    replies = [
        await docker.call("IpamDriver.GetDefaultAddressSpaces") for _ in range(3)
    ]
    assert [reply.json for reply in replies] == [
        {
            "LocalDefaultAddressSpace": "pynet-local",
            "GlobalDefaultAddressSpace": "pynet-global",
        }
    ] * 3


async def test_handshake_is_told_to_the_daemon(docker, handshakes):
    """Both the first call of a socket plugin and that of a managed one are told."""
    await docker.call("Plugin.Activate")
    assert len(handshakes) == 1
    await docker.call("NetworkDriver.GetCapabilities")
    assert len(handshakes) == 2
    await docker.call("IpamDriver.GetCapabilities")
    assert len(handshakes) == 2


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_answers_an_object_of_dockers_type(docker, method):
    """A sound request without Content-Type gets 200 and a JSON object."""
    reply = await docker.call(method, SOUND.get(method))
    assert reply.status == 200
    assert reply.headers["Content-Type"] == MEDIA_TYPE
    assert isinstance(reply.json, dict)


@pytest.mark.parametrize("method", ["Plugin.Activate", "NetworkDriver.Join"])
async def test_empty_host_header_is_accepted(docker, method):
    """Dockers up to 24.0.4 send `Host:` without a value."""
    reply = await docker.call(method, SOUND.get(method), host="")
    assert reply.status == 200


@pytest.mark.parametrize("method", METHODS)
async def test_get_is_refused_as_the_wrong_verb(docker, method):
    """A known path answers other verbs than POST with 405 and a sentence."""
    reply = await docker.post(f"/{method}", verb="GET")
    assert reply.status == 405
    assert reply.headers["Allow"] == "POST"
    assert reply.json["Err"] == f"'/{method}' must be called with POST, not 'GET'"


@pytest.mark.parametrize(
    "path",
    [
        "/NetworkDriver.Resize",
        "/networkdriver.join",
        "/NetworkDriver.Join/",
        "/",
        "/IpamDriver.Join",
        "/NetworkDriver.Join%00",
    ],
)
async def test_unknown_path_is_404(docker, networks, path):
    """Docker takes 404 for "not implemented"; names are case-sensitive."""
    reply = await docker.post(path, json.dumps(sound("NetworkDriver.Join")).encode())
    assert reply.status == 404
    assert reply.json["Err"] == reply.json["Error"]
    assert "has no method" in reply.json["Err"]
    assert networks.calls == []


async def test_connection_is_kept_for_the_next_call(docker):
    """Docker keeps and reuses its connections."""
    reader, writer = await asyncio.open_unix_connection(docker.path)
    for _ in range(3):
        writer.write(docker.bytes("/Plugin.Activate"))
        reply = await docker.reply(reader)
        assert reply.status == 200
        assert reply.headers.get("Connection", "keep-alive") == "keep-alive"
    writer.close()


async def test_refused_call_keeps_the_connection(docker):
    """A refusal does not close the connection, or Docker would repeat the next call."""
    reader, writer = await asyncio.open_unix_connection(docker.path)
    for status in (400, 404, 400):
        path = "/NetworkDriver.Join" if status == 400 else "/Nothing"
        writer.write(docker.bytes(path))
        assert (await docker.reply(reader)).status == status
    writer.write(docker.bytes("/Plugin.Activate"))
    assert (await docker.reply(reader)).status == 200
    writer.close()


async def test_body_may_end_with_a_newline_and_have_keys_in_any_order(docker, networks):
    """Go ends bodies with a newline and promises no order of keys."""
    request = dict(reversed(sound("NetworkDriver.CreateNetwork").items()))
    body = b" \n" + json.dumps(request).encode() + b"\n\n"
    assert (await docker.post("/NetworkDriver.CreateNetwork", body)).status == 200
    assert networks.calls[0][1] == (NETWORK,)


async def test_two_megabytes_are_refused_as_a_bad_request(docker, networks):
    """A body of 2 MB is answered 400 with a sentence, and nothing is done."""
    body = json.dumps(sound("NetworkDriver.Join", Padding="x" * 2_000_000)).encode()
    reply = await docker.post("/NetworkDriver.Join", body)
    assert reply.status == 400
    assert "more than 1048576 bytes" in reply.json["Err"]
    assert reply.json["Err"] == reply.json["Error"]
    assert networks.calls == []
    assert (await docker.call("Plugin.Activate")).status == 200


async def test_half_a_megabyte_of_unknown_fields_is_accepted(docker):
    """The limit does not hinder what Docker may grow to."""
    request = sound("NetworkDriver.Join", Padding="x" * 500_000)
    assert (await docker.call("NetworkDriver.Join", request)).status == 200


async def test_what_is_said_to_be_too_much_is_not_awaited(docker, networks):
    """A body that is announced as too large is refused before any of it came."""
    reader, writer = await asyncio.open_unix_connection(docker.path)
    head = docker.bytes("/NetworkDriver.Join").replace(b": 0", b": 1048577")
    writer.write(head)
    async with asyncio.timeout(0.4):
        reply = await docker.reply(reader)
    writer.close()
    assert reply.status == 400
    assert "more than 1048576 bytes" in reply.json["Err"]
    assert networks.calls == []


async def test_a_body_is_not_unpacked(docker, networks):
    """A compressed body is no JSON: a small one could become a large one."""
    body = gzip.compress(json.dumps(sound("NetworkDriver.Join")).encode())
    head = docker.bytes("/NetworkDriver.Join", body)
    head = head.replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1)
    reader, writer = await asyncio.open_unix_connection(docker.path)
    writer.write(head)
    reply = await docker.reply(reader)
    writer.close()
    assert reply.status == 400
    assert networks.calls == []
