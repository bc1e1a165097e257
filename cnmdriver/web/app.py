"""
The web door: metrics, the page, and what the page asks. It only reads.

Whoever reaches it may read everything, so it listens on loopback or a Unix socket. A
browser is no such reader: any site it is on can ask it to connect to loopback under a
name of the site's own. Therefore a request must name this machine as such (`Host`), and
the page may load nothing from anywhere else.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError, Exhausted, NotFound, StoreError
from cnmdriver.insight.events import Events
from cnmdriver.insight.explain import explain
from cnmdriver.insight.topology import SHORTLY, ReadInfo, marks, topology
from cnmdriver.streaming import stream

LIMIT = 10.0
"""Seconds an answer may take."""
PAGE = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "drawing.js": ("drawing.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""What the page consists of: file and type by path."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
STATUSES: Mapping[type[DriverError], int] = {
    NotFound: 404,
    Exhausted: 503,
    StoreError: 503,
}

Scrape = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """What the answers below are made of."""

    site: Site
    info: ReadInfo
    events: Events
    scrape: Scrape


def application(
    site: Site, *, info: ReadInfo, events: Events, scrape: Scrape
) -> web.Application:
    """Make the application; `scrape` returns the metrics as text."""
    doors = Doors(site=site, info=info, events=events, scrape=scrape)
    app = web.Application(middlewares=[_guard])
    for path, (name, kind) in PAGE.items():
        content = resources.files("cnmdriver.web").joinpath("page", name).read_bytes()
        app.router.add_get(f"/{path}", _file(content, kind))
    for path, answer in ANSWERS.items():
        app.router.add_get(f"/{path}", _handler(answer, doors))

    async def end(_: web.Application) -> None:
        events.close()

    app.on_shutdown.append(end)
    app.on_response_prepare.append(_protect)
    return app


def _file(
    content: bytes, kind: str
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=content, content_type=kind, charset="utf-8")

    return handle


# One function per question.


async def _metrics(doors: Doors, _: web.Request) -> web.StreamResponse:
    async with asyncio.timeout(LIMIT):
        text = await doors.scrape()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _topology(doors: Doors, _: web.Request) -> web.StreamResponse:
    known = await marks(doors.site, SHORTLY)
    return web.json_response(topology(doors.site, doors.info(), known))


async def _explain(doors: Doors, request: web.Request) -> web.StreamResponse:
    wanted = request.query.get("network", "")
    members = [m for m in doors.site.members() if m.network == wanted]
    if not members:
        raise NotFound(
            "this host has no part in the network; look at it on a host that has one"
        )
    return web.json_response({"commands": explain(doors.site, members)})


async def _events(doors: Doors, request: web.Request) -> web.StreamResponse:
    return await stream(request, doors.events.follow())


Answer = Callable[[Doors, web.Request], Awaitable[web.StreamResponse]]

ANSWERS: Mapping[str, Answer] = {
    "metrics": _metrics,
    "topology": _topology,
    "explain": _explain,
    "events": _events,
}


def _handler(
    answer: Answer, doors: Doors
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await answer(doors, request)
        except TimeoutError as error:
            raise StoreError(
                f"this did not end within {LIMIT:g} s: the store or the kernel does "
                "not answer; try again"
            ) from error

    return handle


@web.middleware
async def _guard(
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """Refuse who does not mean this machine; answer errors; say what a page may do."""
    if not meant(request):
        text = "ask for this by localhost, 127.0.0.1 or [::1], and by no other name"
        return _refuse(421, text)
    try:
        return await handler(request)
    except DriverError as error:
        matches = (code for kind, code in STATUSES.items() if isinstance(error, kind))
        return _refuse(next(matches, 500), str(error))
    except web.HTTPException as error:
        return _refuse(error.status, f"{request.method} {request.path}: {error.reason}")


async def _protect(_: web.Request, response: web.StreamResponse) -> None:
    """Let a browser load nothing from elsewhere, nor show this in another's page."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)


def meant(request: web.Request) -> bool:
    """Tell whether a request is for this machine, by its own name or address."""
    transport = request.transport
    if transport is None or isinstance(transport.get_extra_info("sockname"), str):
        # A browser does not reach a Unix socket.
        return True
    name = request.host.rpartition(":")[0] or request.host
    if request.host.endswith("]"):
        name = request.host
    if name.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    return False


def _refuse(code: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=code)
