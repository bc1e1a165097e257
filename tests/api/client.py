"""A server on a real Unix socket, and a client that speaks as Docker does."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from cnmdriver.api.app import runner


@dataclass(frozen=True)
class Reply:
    """What came back for a request."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Docker:
    """A client that writes requests byte for byte as dockerd does."""

    def __init__(self, path) -> None:
        self.path = str(path)

    async def call(self, method, content=None, *, host="plugin.moby.localhost"):
        """Post a JSON object, or no body at all, and return the reply."""
        body = b"" if content is None else json.dumps(content).encode() + b"\n"
        return await self.post(f"/{method}", body, host=host)

    async def post(self, path, body=b"", *, verb="POST", host=""):
        """Send a request on a connection of its own."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        try:
            writer.write(self.bytes(path, body, verb=verb, host=host))
            return await self.reply(reader)
        finally:
            writer.close()

    @staticmethod
    def bytes(path, body=b"", *, verb="POST", host=""):
        head = (
            f"{verb} {path} HTTP/1.1\r\nHost: {host}\r\n"
            "User-Agent: Go-http-client/1.1\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Accept: application/vnd.docker.plugins.v1.2+json\r\n\r\n"
        )
        return head.encode() + body

    @staticmethod
    async def reply(reader):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["Content-Length"]))
        return Reply(int(first.split()[1]), headers, body)


async def eventually(holds):
    """Wait until a condition holds that no event tells."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(app, path):
    """Serve an application on a Unix socket."""
    server = runner(app)
    await server.setup()
    await web.UnixSite(server, str(path)).start()
    try:
        yield Docker(path)
    finally:
        await server.cleanup()
