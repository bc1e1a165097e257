"""
A driver that answers every call and does nothing: what is left is Docker's own part.

Its containers get no interface. `python -m tests.bench.nothing SOCKET` prints `ready`
when Docker can find it, and ends when it is told to.
"""

import sys

from aiohttp import web

ANSWERS: dict[str, object] = {
    "Plugin.Activate": {"Implements": ["NetworkDriver"]},
    "NetworkDriver.GetCapabilities": {"Scope": "local", "ConnectivityScope": "local"},
    "NetworkDriver.CreateEndpoint": {"Interface": {}},
    # Else Docker makes a way out of its own, docker_gwbridge, with a pair it moves.
    "NetworkDriver.Join": {"DisableGatewayService": True},
}


async def answer(request: web.Request) -> web.Response:
    """Answer any call."""
    await request.read()
    return web.json_response(ANSWERS.get(request.match_info["method"], {}))


def main() -> None:
    """Serve the socket of the command line."""
    application = web.Application()
    application.router.add_post("/{method}", answer)
    web.run_app(
        application, path=sys.argv[1], print=lambda _: print("ready", flush=True)
    )


if __name__ == "__main__":
    main()
