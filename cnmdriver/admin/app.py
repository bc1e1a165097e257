"""
The admin door: what the commands of `pynet` ask the daemon, as JSON over HTTP.

Its socket is for root alone; whoever opens it makes sure of that. A refusal is
`{"error": sentence}`, with a status by the class of the error.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

from aiohttp import web

from cnmdriver.driver.site import Site
from cnmdriver.errors import (
    Conflict,
    DriverError,
    Exhausted,
    InvalidParameter,
    NotFound,
    StoreError,
)
from cnmdriver.insight import kernel, report
from cnmdriver.insight.doctor import doctor
from cnmdriver.insight.events import Events
from cnmdriver.insight.explain import explain
from cnmdriver.insight.status import status
from cnmdriver.insight.topology import SHORTLY, marks, topology
from cnmdriver.insight.trace import trace
from cnmdriver.logs import Journal
from cnmdriver.model import Endpoint, IPAddress, Pool, Reservation
from cnmdriver.store import records
from cnmdriver.streaming import stream

LIMIT = 10.0
"""Seconds a call may take."""
STATUSES: Mapping[type[DriverError], int] = {
    InvalidParameter: 400,
    NotFound: 404,
    Conflict: 409,
    Exhausted: 409,
    StoreError: 503,
}

Info = Callable[[], dict[str, object]]
RemoveEndpoint = Callable[[Endpoint], Awaitable[None]]
ReleaseAddress = Callable[[str, IPAddress], Awaitable[None]]


class RemoveHost(Protocol):
    """Gives up another host, and says what became of its blocks."""

    async def __call__(self, name: str, *, force: bool) -> str:
        """Raise NotFound or Conflict."""


async def no_host(name: str, *, force: bool) -> str:
    """Refuse: this host has a store of its own."""
    del force
    raise NotFound(f"there is no host {name[:80]!r}: this one has a store of its own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """What the calls below work with."""

    site: Site
    info: Info
    remove_endpoint: RemoveEndpoint
    release_address: ReleaseAddress
    remove_host: RemoveHost
    journal: Journal


def application(  # noqa: PLR0913 - an argument for each door
    site: Site,
    *,
    info: Info,
    remove_endpoint: RemoveEndpoint,
    release_address: ReleaseAddress,
    remove_host: RemoveHost = no_host,
    journal: Journal | None = None,
    limit: float = LIMIT,
) -> web.Application:
    """
    Make the application that answers the commands.

    `info` is what `insight.status` describes. A call that takes longer than `limit`
    seconds is cancelled.
    """
    doors = Doors(
        site=site,
        info=info,
        remove_endpoint=remove_endpoint,
        release_address=release_address,
        remove_host=remove_host,
        journal=journal or Journal(),
    )
    app = web.Application(middlewares=[_answer_errors])
    for (verb, path), call in CALLS.items():
        app.router.add_route(verb, f"/v1/{path}", _handler(call, doors, limit))
    return app


def tell(app: web.Application, events: Events) -> None:
    """Let whoever asks for it hear what happens, until the application ends."""

    async def hear(request: web.Request) -> web.StreamResponse:
        return await stream(request, events.follow())

    async def end(_: web.Application) -> None:
        events.close()

    app.router.add_get("/v1/events", hear)
    app.on_shutdown.append(end)


# One function per call: from a request to its answer.


async def _status(doors: Doors, _: web.Request) -> object:
    return await status(doors.site, doors.info())


async def _networks(doors: Doors, _: web.Request) -> object:
    return report.networks(doors.site)


async def _network(doors: Doors, request: web.Request) -> object:
    member = report.find_network(doors.site, request.match_info["network"])
    return report.inspect(doors.site, member)


async def _endpoints(doors: Doors, _: web.Request) -> object:
    return report.endpoints(doors.site)


async def _remove_endpoint(doors: Doors, request: web.Request) -> object:
    endpoint = report.find_endpoint(doors.site, request.match_info["endpoint"])
    await doors.remove_endpoint(endpoint)
    return {"removed": endpoint.id, "name": doors.site.name(endpoint.id)}


async def _hosts(doors: Doors, _: web.Request) -> object:
    return report.hosts(doors.site, await marks(doors.site) or {})


async def _topology(doors: Doors, _: web.Request) -> object:
    return topology(doors.site, doors.info(), await marks(doors.site, SHORTLY))


async def _remove_host(doors: Doors, request: web.Request) -> object:
    name = request.match_info["host"]
    force = request.query.get("force", "") == "true"
    said = await doors.remove_host(name, force=force)
    return {"removed": name, "blocks": said}


async def _ports(doors: Doors, _: web.Request) -> object:
    return report.ports(doors.site)


async def _pools(doors: Doors, _: web.Request) -> object:
    return report.pools(doors.site)


async def _release_address(doors: Doors, request: web.Request) -> object:
    pool = report.find_pool(doors.site, request.query.get("pool", ""))
    address = _address(request.query.get("address", ""))
    _check_idle(doors.site, pool, address)
    await doors.release_address(f"{pool.space}/{pool.cidr}", address)
    return {"released": str(address), "pool": f"{pool.space}/{pool.cidr}"}


def _address(text: str) -> IPAddress:
    try:
        return ip_address(text)
    except ValueError:
        raise InvalidParameter(f"{text[:80]!r} is no IP address") from None


def _check_idle(site: Site, pool: Pool, address: IPAddress) -> None:
    """Raise an error unless this host holds the address and nothing uses it."""
    key = records.address(pool.space, pool.cidr, address)
    held = site.view.get(Reservation, key)
    if held is None:
        raise NotFound(f"address {address} of pool {pool.cidr} is not taken")
    if held.host != site.host.id:
        raise Conflict(f"address {address} is host {held.host[:8]}'s; release it there")
    if held.endpoint:
        raise Conflict(
            f"address {address} is used by endpoint {site.name(held.endpoint)}; remove "
            f"that with pynet endpoint rm {held.endpoint[:12]}"
        )
    if held.gateway and held.bound:
        raise Conflict(
            f"address {address} is the gateway of a network; it goes with the network"
        )


async def _explain(doors: Doors, request: web.Request) -> object:
    wanted = request.query.get("network")
    members = (
        list(doors.site.members())
        if wanted is None
        else [report.find_network(doors.site, wanted)]
    )
    return {"commands": explain(doors.site, members)}


async def _diff(doors: Doors, _: web.Request) -> object:
    return await kernel.diff(doors.site)


async def _trace(doors: Doors, request: web.Request) -> object:
    return await trace(
        doors.site,
        request.query.get("from", ""),
        request.query.get("to", ""),
        repairs=bool(doors.info().get("mends", True)),
    )


async def _doctor(doors: Doors, _: web.Request) -> object:
    return await doctor(doors.site, doors.info())


async def _settings(doors: Doors, _: web.Request) -> object:
    return doors.info().get("settings", {})


async def _log(doors: Doors, _: web.Request) -> object:
    return {"lines": doors.journal.text()}


async def _census(doors: Doors, _: web.Request) -> object:
    return await kernel.census(doors.site)


Call = Callable[[Doors, web.Request], Awaitable[object]]

CALLS: Mapping[tuple[str, str], Call] = {
    ("GET", "status"): _status,
    ("GET", "networks"): _networks,
    ("GET", "networks/{network}"): _network,
    ("GET", "endpoints"): _endpoints,
    ("DELETE", "endpoints/{endpoint}"): _remove_endpoint,
    ("GET", "hosts"): _hosts,
    ("DELETE", "hosts/{host}"): _remove_host,
    ("GET", "topology"): _topology,
    ("GET", "ports"): _ports,
    ("GET", "pools"): _pools,
    ("DELETE", "addresses"): _release_address,
    ("GET", "explain"): _explain,
    ("GET", "diff"): _diff,
    ("GET", "census"): _census,
    ("GET", "trace"): _trace,
    ("GET", "doctor"): _doctor,
    ("GET", "settings"): _settings,
    ("GET", "log"): _log,
}


def _handler(
    call: Call, doors: Doors, limit: float
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(limit) as clock:
                return web.json_response(await call(doors, request))
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise StoreError(
                f"this did not end within {limit:g} s: the store or the kernel does "
                "not answer; try again"
            ) from error

    return handle


@web.middleware
async def _answer_errors(
    request: web.Request,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    try:
        return await handler(request)
    except DriverError as error:
        return _refuse(_status_of(error), str(error))
    except web.HTTPException as error:
        return _refuse(error.status, f"{request.method} {request.path}: {error.reason}")


def _status_of(error: DriverError) -> int:
    matches = (code for kind, code in STATUSES.items() if isinstance(error, kind))
    return next(matches, 500)


def _refuse(code: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=code)
