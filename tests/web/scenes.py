"""Clusters made up through the store, and a daemon that shows them to a browser."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from cnmdriver import listening
from cnmdriver.daemon import Daemon
from cnmdriver.logs import Journal
from cnmdriver.model import (
    TCP,
    Alive,
    Endpoint,
    Host,
    Member,
    Network,
    Pool,
    Published,
    Subnet,
)
from cnmdriver.settings import Settings
from cnmdriver.store import records
from cnmdriver.store.view import Draft
from cnmdriver.web.metrics import Metrics
from tests.fakes import Rig, announce, rig

NAMES = ("web", "db", "cache", "queue", "batch", "mail", "search", "auth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A daemon that is shown."""

    rig: Rig
    daemon: Daemon
    url: str


def free_port() -> int:
    """Return a TCP port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def shown(directory: Path, *, port: int = 0) -> AsyncIterator[Shown]:
    """Serve the page of a daemon over a fake kernel, on loopback."""
    async with rig(directory) as parts:
        await announce(parts)
        port = port or free_port()
        settings = Settings(docker="", listen=f"127.0.0.1:{port}")
        metrics = Metrics(Journal(), "test")
        daemon = Daemon(settings, parts.site, watching=metrics)
        parts.networks, parts.ipam = daemon.sync.networks, daemon.sync.ipam
        parts.state.changed = daemon.hear
        async with (
            listening.listening(daemon.admin, directory / "admin.sock"),
            daemon.seen(),
        ):
            yield Shown(rig=parts, daemon=daemon, url=f"http://127.0.0.1:{port}")


def docker_id(number: int) -> str:
    """Return what Docker calls a network."""
    return f"d{number:063x}"


def host_id(number: int) -> str:
    """Return a host's id."""
    return f"{number:016x}"


def host(draft: Draft, identity: str, number: int, *, state: str = "alive") -> None:
    """Write a host."""
    draft.put(
        records.host(identity),
        Host(
            id=identity,
            name=f"node-{number:02}",
            version="1.0.0",
            vtep=ip_address(f"192.0.2.{number}"),
        ),
    )
    if state == "gone":
        draft.delete(records.alive(identity))
    else:
        sign = Alive(
            instance="i", boot="b", resting=state == "resting", since=1_700_000_000.0
        )
        draft.put(records.alive(identity), sign)


def network(draft: Draft, number: int, hosts: list[str]) -> str:
    """Write an overlay network with a part on each host."""
    identity, cidr = f"{number:032x}", ip_network(f"10.{number}.0.0/16")
    subnet = Subnet(space="local", pool=cidr, gateway=cidr[1])
    draft.put(
        records.network(identity),
        Network(
            id=identity,
            mode="overlay",
            subnets=(subnet,),
            mtu=1450,
            vni=10_000_000 + number,
            gateway="docker",
        ),
    )
    draft.put(
        records.pool("local", cidr),
        Pool(space="local", cidr=cidr, network=identity, claimed=True),
    )
    for one in hosts:
        member = Member(network=identity, host=one, docker_id=docker_id(number))
        draft.put(records.member(identity, one), member)
    return identity


def endpoint(
    draft: Draft, network_id: str, host_id: str, number: int, *, joined: bool = True
) -> str:
    """Write an endpoint; return its id."""
    identity = f"{number + 1:064x}"
    second = int(network_id, 16)
    at = ip_interface(f"10.{second}.{number // 250 + 1}.{number % 250 + 2}/16")
    port = Published(protocol=TCP, port=80, host_ip=None, host_port=8000 + number)
    draft.put(
        records.endpoint(network_id, identity),
        Endpoint(
            network=network_id,
            id=identity,
            host=host_id,
            boot="b",
            mac="02:42:" + at.ip.packed.hex(":"),
            ipv4=at,
            sandbox="/s" if joined else "",
            published=(port,) if number % 7 == 0 else (),
        ),
    )
    return identity


async def populate(parts: Rig, hosts: int, endpoints: int, networks: int = 2) -> None:
    """Write a cluster; its first host is the one that shows it."""
    own = parts.site.host.id
    parts.site.host = replace(
        parts.site.host, name="node-01", vtep=ip_address("192.0.2.1")
    )
    ids = [own, *map(host_id, range(2, hosts + 1))]

    def decide(draft: Draft) -> None:
        for number, identity in enumerate(ids, 1):
            host(draft, identity, number)
        for number in range(1, networks + 1):
            network(draft, number, ids[:: 1 + number % 2])
        for number in range(endpoints):
            place, turn = number % networks + 1, number // networks
            at = ids[:: 1 + place % 2]
            identity = endpoint(draft, f"{place:032x}", at[turn % len(at)], number)
            named = NAMES[number % len(NAMES)]
            parts.site.names[identity] = f"{named}-{number // len(NAMES)}"

    await parts.state.commit(decide)
    for number, name in enumerate(("blue", "green", "back-office", "monitoring")):
        parts.site.names[docker_id(number + 1)] = name
