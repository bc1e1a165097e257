"""
Docker's door: what only Docker's own API tells, read in the background.

Docker tells its drivers neither names nor removals it could not deliver; here are both.
Nothing in this module is ever called inside one of Docker's calls, which could wait for
each other. When Docker is absent, ids stand for names.
"""

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cnmdriver.errors import StoreError
from cnmdriver.model import IPNetwork

LIMIT = 5.0
"""Seconds one question may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What Docker has, as far as it concerns a network driver."""

    networks: frozenset[str] = frozenset()
    """Ids of all its networks, whatever their driver."""
    endpoints: frozenset[str] = frozenset()
    names: dict[str, str] = field(default_factory=dict)
    pools: frozenset[IPNetwork] = frozenset()
    """Subnets of all its networks, whatever their driver and IPAM."""
    bridges: frozenset[str] = frozenset()
    """Devices of Docker's own bridge networks."""


class DockerApi:
    """Asks one dockerd over its Unix socket."""

    def __init__(self, url: str) -> None:
        """Take `unix:///path`."""
        self.path = url.removeprefix("unix://")

    @asynccontextmanager
    async def session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Open a connection; what goes wrong becomes a StoreError."""
        connector = aiohttp.UnixConnector(self.path)
        try:
            async with aiohttp.ClientSession(
                "http://docker", connector=connector
            ) as session:
                yield session
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise StoreError(
                f"docker at {self.path} does not answer: {error!r}"
            ) from error

    async def inventory(
        self, driver: str, ours: frozenset[str] = frozenset()
    ) -> Inventory:
        """
        List networks and endpoints; those of `driver` with their containers.

        So are the networks with the ids `ours`: a managed plugin's networks have its
        name, which anybody may choose.
        """
        try:
            async with self.session() as session:
                listed = await self.get(session, "/networks")
                details = [
                    await self.get(session, f"/networks/{n['Id']}")
                    for n in listed
                    if n["Id"] in ours or is_named(str(n.get("Driver", "")), driver)
                ]
            return inventory(listed, [d for d in details if d])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise StoreError(
                f"docker at {self.path} answers no list of networks: {error!r}"
            ) from error

    async def version(self) -> str:
        """Return Docker's version; raises StoreError."""
        async with self.session() as session:
            found = await self.get(session, "/version")
        return str(found.get("Version", "")) if isinstance(found, dict) else ""

    async def outlived(self) -> bool:
        """Tell whether containers outlive dockerd (live-restore); raises StoreError."""
        async with self.session() as session:
            found = await self.get(session, "/info")
        return isinstance(found, dict) and found.get("LiveRestoreEnabled") is True

    async def get(self, session: aiohttp.ClientSession, path: str) -> Any:
        """Ask one question; None if what it is about is gone."""
        timeout = aiohttp.ClientTimeout(total=LIMIT)
        async with session.get(path, timeout=timeout) as answer:
            if answer.status == 404:
                return None
            answer.raise_for_status()
            return await answer.json()

    async def events(self) -> AsyncGenerator[None, None]:
        """Yield when connected, then once for all the changes since the last time."""
        filters = '{"type":["network","container"]}'
        timeout = aiohttp.ClientTimeout(total=None)
        async with self.session() as session:
            async with asyncio.timeout(LIMIT):
                answer = await session.get(
                    "/events", params={"filters": filters}, timeout=timeout
                )
            async with answer:
                answer.raise_for_status()
                yield
                async for _ in answer.content.iter_any():
                    yield


def is_named(name: str, driver: str) -> bool:
    """Tell whether Docker's name for a driver is this one, or this one and a tag."""
    return driver in (name, name.partition(":")[0])


def inventory(listed: list[dict[str, Any]], details: list[dict[str, Any]]) -> Inventory:
    """Read Docker's answers."""
    names = {n["Id"]: n["Name"] for n in listed}
    endpoints = set()
    for network in details:
        for container in (network.get("Containers") or {}).values():
            endpoint = container.get("EndpointID", "")
            endpoints.add(endpoint)
            names[endpoint] = container.get("Name", "")
    return Inventory(
        networks=frozenset(n["Id"] for n in listed),
        endpoints=frozenset(endpoints),
        names=names,
        pools=frozenset(pool for n in listed for pool in subnets(n)),
        bridges=frozenset(bridge(n) for n in listed if n.get("Driver") == "bridge"),
    )


def subnets(network: dict[str, Any]) -> Iterator[IPNetwork]:
    """Yield the subnets Docker lists for a network."""
    for config in (network.get("IPAM") or {}).get("Config") or ():
        if config.get("Subnet"):
            yield ipaddress.ip_network(config["Subnet"], strict=False)


def bridge(network: dict[str, Any]) -> str:
    """Name the device of a bridge network of Docker's (libnetwork drivers/bridge)."""
    options = network.get("Options") or {}
    return options.get("com.docker.network.bridge.name") or f"br-{network['Id'][:12]}"
