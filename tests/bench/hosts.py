"""
Many hosts in one process, each with its session, its watch and its view of etcd.

Only their kernels are played. Each has a part in one network and an endpoint there, and
follows what all others do. `python -m tests.bench.hosts ENDPOINTS MANY NETWORK POOL`
prints `ready` when all are there, and ends with its input.
"""

import asyncio
import logging
import sys
import tempfile
from contextlib import AsyncExitStack
from ipaddress import IPv4Interface, ip_address, ip_network
from pathlib import Path

import structlog

from cnmdriver.model import Endpoint, Host, Member
from cnmdriver.plan import devices
from cnmdriver.store import records
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.session import Session
from cnmdriver.store.view import Draft
from tests.fakes import announce, ended, on_store

VTEPS = ip_network("198.51.100.0/24")
FIRST = 20_000
"""Where in the pool the addresses of these hosts begin."""


async def host(
    stack: AsyncExitStack, options: Options, number: int, network: str, pool: str
) -> None:
    """Start a host with an endpoint on a network."""
    directory = stack.enter_context(tempfile.TemporaryDirectory())
    store = EtcdStore(options)
    await store.open()
    stack.push_async_callback(store.close)
    name = f"far{number}"
    told = Host(id="", name=name, version="bench", vtep=VTEPS[number])
    one = await on_store(stack, store, Path(directory, "local.db"), told)
    session = Session(store, one.site.host.id, one.site.boot)
    await session.open()
    one.state.session = session
    await announce(one)
    here = one.site.host.id
    net = ip_network(pool)
    face = IPv4Interface((net[FIRST + number], net.prefixlen))
    endpoint = Endpoint(
        network=network,
        id=name,
        host=here,
        boot=one.site.boot,
        mac=devices.mac(ip_address(face.ip)),
        ipv4=face,
    )

    def decide(draft: Draft) -> None:
        part = Member(network=network, host=here, docker_id=name)
        draft.put(records.member(network, here), part)
        draft.put(records.endpoint(network, name), endpoint)

    await one.state.commit(decide)
    remotes = one.networks.remotes
    one.state.changed = remotes.wake
    for work in (one.state.follow(), session.run(), remotes.run()):
        stack.push_async_callback(ended, asyncio.create_task(work))


async def main(endpoints: str, many: str, network: str, pool: str) -> None:
    """Have hosts until the input ends."""
    # Nobody reads what they log.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )
    options = Options(endpoints=tuple(endpoints.split(",")))
    async with AsyncExitStack() as stack:
        for number in range(1, int(many) + 1):
            await host(stack, options, number, network, pool)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
