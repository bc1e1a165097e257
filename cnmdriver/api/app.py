"""
Docker's door: one row per method, one place that answers errors, one log line per call.

Docker shows a user nothing but the text of an error, and takes 404 for "not
implemented, go on": so a method that is in the table never answers 404, and one that is
not always does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from structlog.contextvars import bind_contextvars, clear_contextvars

from cnmdriver.api import wire
from cnmdriver.errors import DriverError, InvalidParameter, NotFound
from cnmdriver.model import (
    Attachment,
    IPAddress,
    IPInterface,
    IPNetwork,
    PortRequest,
    Subnet,
)

MEDIA_TYPE = "application/vnd.docker.plugins.v1.2+json"
LARGEST_BODY = 1 << 20
LIMIT = 10.0
"""Seconds a call may take; Docker itself would wait for ever."""
KEEP_ALIVE = 24 * 3600.0
"""Docker repeats a call on a connection we just closed, but without its body."""

Called = Callable[[str, str, float], object]
"""Is told of each call: its method, what became of it, and the seconds it took."""

API_CALL = "api.call"
API_BUG = "api.bug"
API_GARBAGE = "api.garbage"
_FACTS = {
    "network_id": ("network", 12),
    "endpoint_id": ("endpoint", 12),
    "pool_id": ("pool_id", None),
    "pool": ("pool", None),
    "address": ("address", None),
}
"""What of a request is logged, under which name and how many characters of it."""

log = structlog.get_logger()


class Networks(Protocol):
    """What Docker may want of the network driver; every call may come twice."""

    async def create(
        self,
        docker_id: str,
        *,
        subnets: tuple[Subnet, ...],
        options: Mapping[str, str],
        internal: bool,
    ) -> None:
        """Make a network on this host."""

    async def delete(self, docker_id: str) -> None:
        """Remove a network from this host; Docker asks only once."""

    async def create_endpoint(
        self,
        docker_id: str,
        endpoint_id: str,
        *,
        ipv4: IPv4Interface | None,
        ipv6: IPv6Interface | None,
        mac: str,
        attach: str,
    ) -> str:
        """Make an endpoint; return the MAC to answer with, "" if Docker sent one."""

    async def delete_endpoint(self, docker_id: str, endpoint_id: str) -> None:
        """Remove an endpoint; implies `leave`."""

    async def join(self, docker_id: str, endpoint_id: str, sandbox: str) -> Attachment:
        """Make the device in the sandbox, or the one Docker will move there."""

    async def leave(self, docker_id: str, endpoint_id: str) -> None:
        """Take an endpoint out of its sandbox; implies `revoke`."""

    async def program(
        self,
        docker_id: str,
        endpoint_id: str,
        *,
        ports: tuple[PortRequest, ...],
        ipv6: bool,
    ) -> None:
        """Publish ports; without `ipv6` no IPv6 host port is this endpoint's."""

    async def revoke(self, docker_id: str, endpoint_id: str) -> None:
        """Publish no port any more."""

    async def info(self, docker_id: str, endpoint_id: str) -> None:
        """Raise NotFound if there is no such endpoint."""

    async def allocate(
        self,
        docker_id: str,
        *,
        subnets: tuple[Subnet, ...],
        options: Mapping[str, str],
    ) -> Mapping[str, str]:
        """Settle a swarm's network; return the options all nodes get instead."""

    async def free(self, docker_id: str) -> None:
        """Undo `allocate`."""

    async def discover(self, address: str, *, gone: bool, own: bool) -> None:
        """Hear of a host that came or went."""

    def skips_gateway(self, options: Mapping[str, str], *, internal: bool) -> bool:
        """Tell whether such a network needs no gateway address."""


class Ipam(Protocol):
    """What Docker may want of the IPAM driver; every call may come twice."""

    async def request_pool(
        self,
        *,
        space: str,
        pool: IPNetwork | None,
        sub_pool: IPNetwork | None,
        options: Mapping[str, str],
        version: int,
    ) -> tuple[str, IPNetwork]:
        """Hand out a pool; return its id and what it is."""

    async def release_pool(self, pool_id: str) -> None:
        """Take a pool back."""

    async def request_address(
        self, pool_id: str, *, address: IPAddress | None, gateway: bool, name: str
    ) -> IPInterface:
        """Hand out an address, with the pool's prefix length."""

    async def release_address(self, pool_id: str, address: IPAddress) -> None:
        """Take an address back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """What the methods below work with."""

    networks: Networks
    ipam: Ipam
    scope: str
    on_handshake: Callable[[], None]


# One function per method: from a request to its answer, whose type is the annotation.


async def _activate(doors: Doors, _: wire.NoArguments) -> wire.Activation:
    doors.on_handshake()
    return wire.Activation()


async def _network_capabilities(
    doors: Doors, _: wire.NoArguments
) -> wire.NetworkCapabilities:
    # A managed plugin is never activated: for it this is the first call.
    doors.on_handshake()
    return wire.NetworkCapabilities(scope=doors.scope)


async def _ipam_capabilities(_: Doors, __: wire.NoArguments) -> wire.IpamCapabilities:
    return wire.IpamCapabilities()


async def _address_spaces(_: Doors, __: wire.NoArguments) -> wire.AddressSpaces:
    return wire.AddressSpaces()


async def _allocate_network(doors: Doors, call: wire.AllocateNetwork) -> wire.Allocated:
    options = await doors.networks.allocate(
        call.network_id, subnets=call.subnets(), options=call.driver_options()
    )
    return wire.Allocated(options=dict(options))


async def _free_network(doors: Doors, call: wire.NetworkRequest) -> wire.Done:
    await doors.networks.free(call.network_id)
    return wire.Done()


async def _create_network(doors: Doors, call: wire.CreateNetwork) -> wire.Done:
    await doors.networks.create(
        call.network_id,
        subnets=call.subnets(),
        options=call.driver_options(),
        internal=call.internal,
    )
    return wire.Done()


async def _delete_network(doors: Doors, call: wire.NetworkRequest) -> wire.Done:
    await doors.networks.delete(call.network_id)
    return wire.Done()


async def _create_endpoint(
    doors: Doors, call: wire.CreateEndpoint
) -> wire.EndpointCreated:
    mac = await doors.networks.create_endpoint(
        call.network_id,
        call.endpoint_id,
        ipv4=call.ipv4(),
        ipv6=call.ipv6(),
        mac=call.mac(),
        attach=call.attach(),
    )
    return wire.EndpointCreated(interface=wire.Interface(mac_address=mac))


async def _endpoint_info(doors: Doors, call: wire.EndpointRequest) -> wire.OperInfo:
    await doors.networks.info(call.network_id, call.endpoint_id)
    return wire.OperInfo()


async def _delete_endpoint(doors: Doors, call: wire.EndpointRequest) -> wire.Done:
    await doors.networks.delete_endpoint(call.network_id, call.endpoint_id)
    return wire.Done()


async def _join(doors: Doors, call: wire.Join) -> wire.Joined:
    # Docker gives the ports here too: a bad one is refused before anything is made.
    call.ports()
    attachment = await doors.networks.join(
        call.network_id, call.endpoint_id, call.sandbox_key
    )
    return wire.Joined.of(attachment)


async def _leave(doors: Doors, call: wire.EndpointRequest) -> wire.Done:
    await doors.networks.leave(call.network_id, call.endpoint_id)
    return wire.Done()


async def _discover_new(doors: Doors, call: wire.Discover) -> wire.Done:
    node = call.node()
    if node is not None:
        await doors.networks.discover(node.ip(), gone=False, own=node.own)
    return wire.Done()


async def _discover_delete(doors: Doors, call: wire.Discover) -> wire.Done:
    node = call.node()
    if node is not None:
        await doors.networks.discover(node.ip(), gone=True, own=node.own)
    return wire.Done()


async def _program(doors: Doors, call: wire.SandboxRequest) -> wire.Done:
    await doors.networks.program(
        call.network_id, call.endpoint_id, ports=call.ports(), ipv6=call.ipv6_ports
    )
    return wire.Done()


async def _revoke(doors: Doors, call: wire.EndpointRequest) -> wire.Done:
    await doors.networks.revoke(call.network_id, call.endpoint_id)
    return wire.Done()


async def _gateway_check(doors: Doors, call: wire.GwAllocCheck) -> wire.GatewaySkip:
    skip = doors.networks.skips_gateway(call.driver_options(), internal=call.internal)
    return wire.GatewaySkip(skip_ipv4=skip, skip_ipv6=skip)


async def _request_pool(doors: Doors, call: wire.RequestPool) -> wire.PoolGiven:
    pool, sub_pool = call.pools()
    pool_id, given = await doors.ipam.request_pool(
        space=call.address_space,
        pool=pool,
        sub_pool=sub_pool,
        options=call.ipam_options(),
        version=call.version,
    )
    return wire.PoolGiven(pool_id=pool_id, pool=str(given))


async def _release_pool(doors: Doors, call: wire.ReleasePool) -> wire.Done:
    await doors.ipam.release_pool(call.pool_id)
    return wire.Done()


async def _request_address(
    doors: Doors, call: wire.RequestAddress
) -> wire.AddressGiven:
    given = await doors.ipam.request_address(
        call.pool_id, address=call.ip(), gateway=call.gateway, name=call.name
    )
    return wire.AddressGiven(address=str(given))


async def _release_address(doors: Doors, call: wire.ReleaseAddress) -> wire.Done:
    await doors.ipam.release_address(call.pool_id, call.ip())
    return wire.Done()


M = TypeVar("M", bound=wire.Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Generic[M]):
    """A row of the table: what Docker sends, and who answers it."""

    request: type[M]
    answer: Callable[[Doors, M], Awaitable[wire.Message]]
    removes: bool = False
    """Whether it takes something away: what is not there is then a success."""


def _adds(
    request: type[M], answer: Callable[[Doors, M], Awaitable[wire.Message]]
) -> Method[M]:
    return Method(request=request, answer=answer)


def _removes(
    request: type[M], answer: Callable[[Doors, M], Awaitable[wire.Message]]
) -> Method[M]:
    return Method(request=request, answer=answer, removes=True)


METHODS: Mapping[str, Method[Any]] = {
    "Plugin.Activate": _adds(wire.NoArguments, _activate),
    "NetworkDriver.GetCapabilities": _adds(wire.NoArguments, _network_capabilities),
    "NetworkDriver.AllocateNetwork": _adds(wire.AllocateNetwork, _allocate_network),
    "NetworkDriver.FreeNetwork": _removes(wire.NetworkRequest, _free_network),
    "NetworkDriver.CreateNetwork": _adds(wire.CreateNetwork, _create_network),
    "NetworkDriver.DeleteNetwork": _removes(wire.NetworkRequest, _delete_network),
    "NetworkDriver.CreateEndpoint": _adds(wire.CreateEndpoint, _create_endpoint),
    "NetworkDriver.EndpointOperInfo": _adds(wire.EndpointRequest, _endpoint_info),
    "NetworkDriver.DeleteEndpoint": _removes(wire.EndpointRequest, _delete_endpoint),
    "NetworkDriver.Join": _adds(wire.Join, _join),
    "NetworkDriver.Leave": _removes(wire.EndpointRequest, _leave),
    "NetworkDriver.DiscoverNew": _adds(wire.Discover, _discover_new),
    "NetworkDriver.DiscoverDelete": _removes(wire.Discover, _discover_delete),
    "NetworkDriver.ProgramExternalConnectivity": _adds(wire.SandboxRequest, _program),
    "NetworkDriver.RevokeExternalConnectivity": _removes(wire.EndpointRequest, _revoke),
    "NetworkDriver.GwAllocCheck": _adds(wire.GwAllocCheck, _gateway_check),
    "IpamDriver.GetCapabilities": _adds(wire.NoArguments, _ipam_capabilities),
    "IpamDriver.GetDefaultAddressSpaces": _adds(wire.NoArguments, _address_spaces),
    "IpamDriver.RequestPool": _adds(wire.RequestPool, _request_pool),
    "IpamDriver.ReleasePool": _removes(wire.ReleasePool, _release_pool),
    "IpamDriver.RequestAddress": _adds(wire.RequestAddress, _request_address),
    "IpamDriver.ReleaseAddress": _removes(wire.ReleaseAddress, _release_address),
}


def application(
    networks: Networks,
    ipam: Ipam,
    *,
    scope: str = "local",
    on_handshake: Callable[[], None] = lambda: None,
    on_call: Called = lambda *_: None,
    limit: float = LIMIT,
) -> web.Application:
    """
    Make the application that answers Docker.

    `on_handshake` is called when Docker introduces itself, some times more than once,
    and `on_call` after each call; both must be quick. A call that takes longer than
    `limit` seconds is cancelled.
    """
    doors = Doors(networks=networks, ipam=ipam, scope=scope, on_handshake=on_handshake)
    app = web.Application(
        middlewares=[_answering(on_call)], client_max_size=LARGEST_BODY
    )
    for name, method in METHODS.items():
        app.router.add_post(f"/{name}", _handler(name, method, doors, limit))
    return app


def runner(app: web.Application) -> web.AppRunner:
    """
    Make the server of an application; the caller opens the sockets.

    A client that goes away does not cancel its call: a Join stopped half-way helps
    nobody, and Docker would not hear of it. Idle clients are kept, as Docker is one.
    """
    return web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=False,
        keepalive_timeout=KEEP_ALIVE,
        # Docker compresses nothing, and a small body could become a large one.
        auto_decompress=False,
        logger=_server_log(),
    )


def _server_log() -> logging.Logger:
    """Make the log of the HTTP server itself: no trace for what a client did."""
    server = logging.getLogger("cnmdriver.http")
    server.handlers = [_ServerLog(logging.WARNING)]
    server.propagate = False
    return server


class _ServerLog(logging.Handler):
    """Tells of requests that were no HTTP, and of the server's own faults."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            log.info(API_GARBAGE, error=repr(error.message[:80]))
        else:
            log.error(API_BUG, error=record.getMessage(), exc_info=error)


def _handler(
    name: str, method: Method[M], doors: Doors, limit: float
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        body = await _body(request, limit)
        try:
            async with asyncio.timeout(limit) as clock:
                call = wire.decode(method.request, body)
                bind_contextvars(**_facts(call))
                return _response(200, await method.answer(doors, call))
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise _TooSlow(
                f"{name} did not end within {limit:g} s: the store or the kernel does"
                " not answer; try again, and see `pynet status`"
            ) from error

    return handle


class _TooSlow(DriverError):
    """A call that took too long."""


async def _body(request: web.Request, limit: float) -> bytes:
    length = request.content_length or 0
    if length > LARGEST_BODY:
        # What is said to be too much need not be read to be refused.
        raise web.HTTPRequestEntityTooLarge(LARGEST_BODY, length)
    try:
        async with asyncio.timeout(limit):
            return await request.read()
    except (ConnectionError, web.RequestPayloadError) as error:
        raise InvalidParameter("cannot read the request: it broke off") from error
    except TimeoutError as error:
        raise InvalidParameter(
            f"cannot read the request: it did not arrive within {limit:g} s"
        ) from error


def _facts(call: wire.Message) -> dict[str, str]:
    """Return what the log tells of a request."""
    fields = msgspec.structs.asdict(call)
    return {
        fact: fields[name][:length]
        for name, (fact, length) in _FACTS.items()
        if fields.get(name)
    }


def _answering(on_call: Called) -> Middleware:
    """Make what answers every error, logs every call, and tells of it."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        # Requests of one connection may share a context.
        clear_contextvars()
        bind_contextvars(method=request.path[1:65])
        start = time.monotonic()
        response, outcome = await _answer_errors(request, handler)
        seconds = time.monotonic() - start
        log.info(API_CALL, **outcome, ms=round(seconds * 1000, 1))
        # What Docker may call has a bound, and what anybody may send has not.
        method = request.path[1:] if request.path[1:] in METHODS else "unknown"
        on_call(method, outcome["outcome"], seconds)
        return response

    return answer


async def _answer_errors(request: web.Request, handler: Handler) -> "Answer":
    """Answer every error."""
    try:
        return await handler(request), {"outcome": "ok"}
    except web.HTTPException as error:
        return _answer_http(request, error)
    except DriverError as error:
        return _answer_driver(request, error)
    except Exception as error:
        log.exception(API_BUG)
        text = f"internal error: {type(error).__name__}: {error}"
        return _refuse(500, "bug", text)


Answer = tuple[web.StreamResponse, dict[str, str]]


def _answer_http(request: web.Request, error: web.HTTPException) -> Answer:
    """Answer what the server itself refuses; 404 must stay 404."""
    path = repr(request.path[:65])
    match error:
        case web.HTTPRequestEntityTooLarge():
            # Only 400 says that the request is at fault, and not the path.
            text = f"the request has more than {LARGEST_BODY} bytes; publish fewer"
            return _refuse(400, "InvalidParameter", text)
        case web.HTTPNotFound():
            text = f"pynet has no method {path}; a newer pynet may know it"
        case web.HTTPMethodNotAllowed():
            text = f"{path} must be called with POST, not {request.method[:16]!r}"
        case _:
            text = f"{path} was refused: {error.reason.lower()}"
    response, outcome = _refuse(error.status, type(error).__name__, text)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response, outcome


def _answer_driver(request: web.Request, error: DriverError) -> Answer:
    """Answer what the driver refuses; what is not there is removed already."""
    if isinstance(error, NotFound) and METHODS[request.path[1:]].removes:
        return _response(200, wire.Done()), {"outcome": "absent"}
    status = 400 if isinstance(error, InvalidParameter) else 500
    # One of the six that a caller knows, whatever kind of it this is.
    known = (k for k in type(error).__mro__ if k.__module__ == DriverError.__module__)
    return _refuse(status, next(known).__name__, str(error))


def _refuse(status: int, outcome: str, text: str) -> Answer:
    refusal = wire.Refusal(err=text, error=text)
    return _response(status, refusal), {"outcome": outcome, "error": text}


def _response(status: int, message: wire.Message) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(message), content_type=MEDIA_TYPE
    )
