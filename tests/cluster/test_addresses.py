"""
Addresses of several hosts on real etcd: one owner at any moment, none lost.

Every call is recorded with its times, as etcd's own tests do it. An address surely has
an owner from the end of the call that got it to the start of the one that gives it
back; no two such spans of one address may overlap.
"""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from itertools import pairwise
from pathlib import Path

import pytest

from cnmdriver.driver import ipam
from cnmdriver.errors import Conflict, Exhausted
from cnmdriver.model import Host, IPAddress, Reservation
from cnmdriver.store.etcd.options import Options
from cnmdriver.store.etcd.store import EtcdStore
from cnmdriver.store.session import Session
from tests.fakes import Rig, announce, ended, on_store
from tests.store.etcd_server import running

pytestmark = [pytest.mark.etcd, pytest.mark.timeout(300)]

HOSTS = 3
POOL = "10.77.0.0/26"
RACES = 1000
CALLS = 20_000
AT_ONCE = 4
"""Callers on each host."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Options]:
    """Return how to reach three members."""
    with running(tmp_path_factory.mktemp("etcd"), 3) as etcd:
        yield etcd.options()


@asynccontextmanager
async def hosts(options: Options, directory: Path) -> AsyncIterator[list[Rig]]:
    """Build the drivers of several hosts, each with a session and a watch."""
    async with AsyncExitStack() as stack:
        rigs = []
        for number in range(1, HOSTS + 1):
            store = EtcdStore(options)
            await store.open()
            stack.push_async_callback(store.close)
            host = Host(id="", name=f"h{number}", version="test")
            host = replace(host, vtep=ip_address(f"192.0.2.{number}"))
            path = directory / f"h{number}.db"
            one = await on_store(stack, store, path, host)
            session = Session(store, one.site.host.id, one.site.boot)
            await session.open()
            one.state.session = session
            await announce(one)
            for work in (one.state.follow(), session.run()):
                stack.push_async_callback(ended, asyncio.create_task(work))
            rigs.append(one)
        yield rigs


async def claim(one: Rig) -> str:
    """Claim the pool on a host."""
    identity, _ = await one.ipam.request_pool(
        space="pynet", pool=ip_network(POOL), sub_pool=None, options={}, version=4
    )
    return identity


@dataclass(slots=True)
class History:
    """Who had which address, for sure, from when to when."""

    spans: dict[IPAddress, list[tuple[float, float, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    outcomes: Counter[str] = field(default_factory=Counter)
    held: dict[IPAddress, tuple[float, str]] = field(default_factory=dict)

    def got(self, address: IPAddress, owner: str) -> None:
        """Note the end of a call that got an address."""
        now = time.monotonic()
        if address in self.held:
            raise AssertionError(
                f"{address}: {owner} got what {self.held[address]} has"
            )
        self.held[address] = (now, owner)

    def gives(self, address: IPAddress) -> None:
        """Note the start of a call that gives it back."""
        begin, owner = self.held.pop(address)
        self.spans[address].append((begin, time.monotonic(), owner))

    def doubles(self) -> list[object]:
        """Return the pairs of spans that overlap."""
        return [
            (address, one, other)
            for address, spans in self.spans.items()
            for one, other in pairwise(sorted(spans))
            if other[0] < one[1]
        ]


@contextmanager
def counted(history: History) -> Iterator[None]:
    """Count how a call ended; a refusal is an answer like any other."""
    try:
        yield
        history.outcomes["done"] += 1
    except (Conflict, Exhausted) as refusal:
        history.outcomes[type(refusal).__name__] += 1


async def call(one: Rig, pool: str, history: History, dice: random.Random) -> None:
    """Take an address, by name or any, or give one of this host's back."""
    name = one.site.host.name
    mine = [a for a, (_, owner) in history.held.items() if owner == name]
    kind = dice.random()
    with counted(history):
        if mine and kind < 0.5:
            address = dice.choice(mine)
            history.gives(address)
            await one.ipam.release_address(pool, address)
        else:
            wish = dice.choice(list(ip_network(POOL).hosts())) if kind > 0.8 else None
            if wish is not None and wish in mine:
                return
            got = await one.ipam.request_address(
                pool, address=wish, gateway=False, name=f"c{dice.random()}"
            )
            history.got(got.ip, name)


async def test_history(options: Options, tmp_path: Path) -> None:
    """In 20,000 random calls of three hosts no address has two owners; none is lost."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    print(f"seed {seed}")
    history = History()
    async with hosts(replace(options, prefix="/history/"), tmp_path) as rigs:
        claims = [await claim(one) for one in rigs]
        left = iter(range(CALLS))

        async def caller(one: Rig, pool: str) -> None:
            for _ in left:
                await call(one, pool, history, dice)

        await asyncio.gather(
            *(
                caller(one, pool)
                for one, pool in zip(rigs, claims, strict=True)
                for _ in range(AT_ONCE)
            )
        )
        stored = (await rigs[0].state.store.read("addresses/")).items
        assert {ip_address(key.rpartition("/")[2]) for key in stored} == set(
            history.held
        )
        for address in list(history.held):
            history.gives(address)
    print(dict(history.outcomes))
    assert history.doubles() == []
    assert history.outcomes["done"] > CALLS / 2


async def test_races(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three hosts that want one address at once, exactly one gets it, each time."""
    # Nobody gives one back that another waits for: each loser would, and in vain.
    monkeypatch.setattr(ipam, "PASSING", 0.0)
    winners: Counter[str] = Counter()
    async with hosts(replace(options, prefix="/races/"), tmp_path) as rigs:
        claims = [await claim(one) for one in rigs]
        addresses = list(ip_network(POOL).hosts())
        for number in range(RACES):
            address = addresses[number % len(addresses)]
            results = await asyncio.gather(
                *(
                    one.ipam.request_address(
                        pool, address=address, gateway=False, name=f"c{number}"
                    )
                    for one, pool in zip(rigs, claims, strict=True)
                ),
                return_exceptions=True,
            )
            won = [n for n, r in enumerate(results) if not isinstance(r, BaseException)]
            lost = [r for r in results if isinstance(r, BaseException)]
            assert len(won) == 1, results
            owner = rigs[won[0]].site.host.name
            assert all(isinstance(refusal, Conflict) for refusal in lost)
            assert all(owner in str(refusal) for refusal in lost), lost
            winners[owner] += 1
            await rigs[won[0]].ipam.release_address(claims[won[0]], address)
        held = [r for one in rigs for r in one.site.view.all(Reservation, "addresses/")]
        print(dict(winners), len(held))
