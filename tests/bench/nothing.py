"""
A driver that answers every call and does nothing: what is left is Docker's own part.

Its containers get no interface, or if `pair` is said a bare pair of devices, which
Docker moves. `python -m tests.bench.nothing SOCKET [pair]` prints `ready` when Docker
can find it, and ends when it is told to.
"""

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from pyroute2 import AsyncIPRoute

ANSWERS: dict[str, object] = {
    "Plugin.Activate": {"Implements": ["NetworkDriver"]},
    "NetworkDriver.GetCapabilities": {"Scope": "local", "ConnectivityScope": "local"},
    "NetworkDriver.CreateEndpoint": {"Interface": {}},
    # Else Docker makes a way out of its own, docker_gwbridge, with a pair it moves.
    "NetworkDriver.Join": {"DisableGatewayService": True},
}


async def join(ip: AsyncIPRoute, near: str, far: str) -> dict[str, object]:
    """Make a pair, and have Docker move an end of it."""
    await ip.link("add", ifname=near, kind="veth", peer={"ifname": far}, state="up")
    name = {"SrcName": far, "DstPrefix": "eth"}
    return {"InterfaceName": name, "DisableGatewayService": True}


async def leave(ip: AsyncIPRoute, near: str, _far: str) -> dict[str, object]:
    """Remove the pair, unless it went with its sandbox."""
    for index in await ip.link_lookup(ifname=near):
        await ip.link("del", index=index)
    return {}


PAIRED: dict[str, Callable[[AsyncIPRoute, str, str], Awaitable[object]]] = {
    "NetworkDriver.Join": join,
    "NetworkDriver.DeleteEndpoint": leave,
}


async def answer(request: web.Request) -> web.Response:
    """Answer any call."""
    method = request.match_info["method"]
    return web.json_response(ANSWERS.get(method, {}))


async def answer_with_pairs(request: web.Request) -> web.Response:
    """Answer any call, and make a pair for each endpoint that joins."""
    method = request.match_info["method"]
    if method not in PAIRED:
        return await answer(request)
    said: dict[str, Any] = await request.json()
    name = said["EndpointID"][:10]
    async with AsyncIPRoute() as ip:
        found = await PAIRED[method](ip, f"na-{name}", f"nb-{name}")
    return web.json_response(found)


def main() -> None:
    """Serve the socket of the command line."""
    socket, *words = sys.argv[1:]
    application = web.Application()
    handler = answer_with_pairs if "pair" in words else answer
    application.router.add_post("/{method}", handler)
    web.run_app(application, path=socket, print=lambda _: print("ready", flush=True))


if __name__ == "__main__":
    main()
