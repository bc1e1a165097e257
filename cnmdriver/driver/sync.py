"""
Sync: brings kernel, store and Docker's own list into agreement, at start and for good.

One loop: whatever happens sets *dirty*; the loop drains it and compares everything
once. A timer (*audit*) does so too: a missed event costs time and nothing else.

Who decides what ends: a local endpoint ends by Docker's call, by `pynet endpoint rm`,
or because Docker's own list has been without it for the grace time; never because the
store lacks it. A device that still reaches into a sandbox is in use, whatever the
records say: it and what it stands on are reported, not removed.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import structlog

from cnmdriver.dockerapi import DockerApi, Inventory
from cnmdriver.driver import claims
from cnmdriver.driver.ipam import IpamDriver
from cnmdriver.driver.looking import Look
from cnmdriver.driver.network import NetworkDriver
from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError, StoreError
from cnmdriver.model import Member, Network, Pool, Reservation
from cnmdriver.plan import ops
from cnmdriver.plan.ops import Plan, Veth
from cnmdriver.plan.pools import parse_id
from cnmdriver.store import records
from cnmdriver.store.view import Draft

SETTLE = 0.2
"""Seconds to wait for more of Docker's events, or for its calls to end."""
QUIET, CALM = 0.05, 1.0
"""Seconds without a call of Docker's that a look waits for, and how long at most."""
SHARE = 0.2
"""Of its time that the loop looks at changes that the kernel announces, at most."""
SOON = 0.3
"""Seconds, at least, between two comparisons for the kernel's sake."""
LATER = 5.0
"""Seconds until changes that may have been our own are compared, and others at most."""
PAUSE = 2.0
"""Seconds before Docker is tried again when it did not answer."""
DOUBT = 2.0
"""Seconds that Docker's list must lack a network in doubt: it has a new one soon."""

log = structlog.get_logger()


@dataclass(slots=True)
class Patience:
    """Remembers since when each of some things has been as it should not be."""

    grace: float
    since: dict[str, float] = field(default_factory=dict)

    def expired(self, names: Iterable[str]) -> set[str]:
        """Return those that have been named without a break for the grace time."""
        now = time.monotonic()
        self.since = {name: self.since.get(name, now) for name in names}
        return {n for n, start in self.since.items() if now - start >= self.grace}


class Sync:
    """The loop of one daemon."""

    def __init__(
        self,
        site: Site,
        networks: NetworkDriver,
        ipam: IpamDriver,
        docker: DockerApi | None,
        *,
        grace: float,
        audit: float,
    ) -> None:
        """Take what it keeps in agreement, and the two intervals in seconds."""
        self.site = site
        self.networks = networks
        self.ipam = ipam
        self.docker = docker
        self.audit = audit
        self.mends = True
        """Whether what others change in the kernel is put right, once started."""
        self.reported: tuple[str, ...] = ()
        """The differences that were last logged and left."""
        self.dirty = asyncio.Event()
        self.curious = False
        """Whether the kernel is to be compared at the next turn."""
        self.settle = 0.0
        """Seconds to look again after a difference; none before Docker can call."""
        self.lapsing = Patience(grace)
        self.missing = Patience(grace)
        self.doubted = Patience(DOUBT)
        self.inventory: Inventory | None = None
        self.docker_version = ""
        self.orphans: tuple[str, ...] = ()
        self.problems: tuple[str, ...] = ()
        self.repairs: Counter[str] = Counter()
        """How often something of a kind was put right; not what is made at start."""
        self.ended = self.took = 0.0
        """When the last comparison ended, and how long its looks took, in seconds."""
        self.planned: asyncio.TimerHandle | None = None
        self.looking = False
        self.missed: set[bool] = set()
        """Whose changes the kernel announced while it was compared: our own?"""

    def wake(self) -> None:
        """Ask for a comparison soon."""
        self.curious = True
        self.dirty.set()

    def tidy(self) -> None:
        """Ask soon whether anything is to be forgotten, without a comparison."""
        self.dirty.set()

    def hear(self, own: bool) -> None:
        """Hear that the kernel was changed; ask for a comparison in its turn."""
        if self.looking:
            self.missed.add(own)
            return
        if self.curious:
            # The comparison that is about to begin sees it.
            return
        loop = asyncio.get_running_loop()
        share = self.took / SHARE
        wait = share if own else min(LATER, max(SOON, share))
        due = max(self.ended + wait, loop.time() + (LATER if own else SETTLE))
        if self.planned is not None:
            if self.planned.when() <= due:
                return
            self.planned.cancel()
        self.planned = loop.call_at(due, self.look_now)

    def look_now(self) -> None:
        """Compare what the kernel announced."""
        self.planned = None
        self.wake()

    async def run(self) -> None:
        """Compare whenever woken, and at every audit, until cancelled."""
        self.settle = SETTLE
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(self.audit):
                    await self.dirty.wait()
            except TimeoutError:
                self.curious = True
            await self.calm()
            self.dirty.clear()
            if not self.curious:
                await self.forget()
                continue
            self.curious, self.looking = False, True
            if self.planned is not None:
                self.planned.cancel()
                self.planned = None
            try:
                await self.turn()
            finally:
                self.looking = False
            self.ended = loop.time()
            missed, self.missed = self.missed, set()
            if missed:
                self.hear(all(missed))

    async def calm(self) -> None:
        """
        Let Docker's calls end: each would wait for the look, and be seen halfway.

        Of many that come together one begins when another has ended.
        """
        locks = self.site.locks
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CALM):
                begun = -1
                while begun != locks.begun:
                    await locks.idle.wait()
                    begun = locks.begun
                    await asyncio.sleep(QUIET)

    async def watch(self) -> None:
        """Hear what happens to the kernel, until cancelled."""
        await self.site.dataplane.watch(self.hear)

    async def turn(self) -> None:
        """Do everything once; what fails is logged and done at the next turn."""
        if await self.forget():
            try:
                await self.repair()
            except DriverError as error:
                log.warning("sync.failed", error=str(error))
            finally:
                self.site.let_go()

    async def forget(self) -> bool:
        """Give back what nobody has any more; tell whether that was done."""
        if not self.site.state.informed:
            # Of a store that was never reached nothing follows.
            return False
        try:
            await self.settle_doubts()
            await self.forget_removed()
            await self.forget_unused()
            await self.lapse()
        except DriverError as error:
            log.warning("sync.failed", error=str(error))
            return False
        return True

    async def repair(self) -> None:
        """Make the kernel equal to the plans."""
        self.took = 0.0
        difference = await self.look()
        if difference and self.settle:
            # A call of Docker may be half way between the records and the kernel, then
            # and now, but hardly about the same thing.
            await asyncio.sleep(self.settle)
            difference = ops.lasting(difference, await self.look())
        if self.settle and not self.mends:
            self.report(difference)
            return
        problems = await self.mend(difference)
        surplus, self.orphans = removable(
            difference.surplus,
            self.known_endpoints(),
            shared=bool(difference.surplus) and await self.shared(),
        )
        if surplus:
            log.info("sync.surplus", objects=[ops.name(op) for op in surplus])
            try:
                await self.site.dataplane.clear(surplus, self.still_surplus)
            except DriverError as error:
                problems.append(str(error))
        self.problems = tuple(problems)

    def report(self, difference: ops.Difference) -> None:
        """Log what is left as it was found, once."""
        lines = tuple(difference.lines())
        for line in lines:
            if line not in self.reported:
                log.warning("sync.left", what=line)
        self.reported = lines

    async def look(self) -> ops.Difference:
        """Compare the kernel with the plans."""
        begin = time.monotonic()
        look, sandboxes = Look(self.site), self.networks.sandboxes
        made = sandboxes.made_now()
        difference = await look.difference()
        self.networks.remotes.seen(look.found)
        difference = ops.less(difference, made | sandboxes.made_now())
        if look.passed_over:
            self.hear(own=True)
        self.took += time.monotonic() - begin
        return difference

    def still_wanted(self, plan: Plan) -> Plan:
        """Return what is in a plan by now, as it is wanted now."""
        now = self.site.wanted()
        return tuple(now[op.key] for op in plan if op.key in now)

    def still_surplus(self, plan: Plan) -> Plan:
        """Return what is in no plan by now."""
        now = self.site.wanted()
        return tuple(op for op in plan if op.key not in now)

    async def shared(self) -> bool:
        """Tell whether endpoints of another pynet, or of an earlier state, are here."""
        foreign = await self.site.dataplane.foreign()
        return any(":endpoint:" in alias for _, alias in foreign)

    def known_endpoints(self) -> frozenset[str] | None:
        """Return the endpoints Docker has, None if it has not told."""
        return self.inventory.endpoints if self.inventory is not None else None

    async def mend(self, difference: ops.Difference) -> list[str]:
        """
        Apply what lacks or differs, with what stands on it; return what failed.

        Each network and endpoint is a plan of its own: one that the kernel refuses
        must not keep the others from being mended.
        """
        amiss = {op.key for op in difference.lacking}
        amiss |= {op.key for op, _ in difference.changed}
        for line in difference.lines(surplus=False):
            log.info("sync.repair", what=line)
        if self.settle:
            self.repairs.update(key[0] for key in amiss)
        lost = [op.key for op in difference.lacking if isinstance(op, Veth)]
        problems = []
        for plan in list(self.plans()) if amiss else ():
            part = affected(plan, amiss)
            try:
                if part:
                    await self.site.dataplane.apply(part, self.still_wanted)
            except DriverError as error:
                log.error("sync.cannot_repair", error=str(error))
                problems.append(str(error))
        if (lost or self.networks.owed) and self.settle:
            problems += await self.networks.reattach(frozenset(lost))
        return problems

    def plans(self) -> Iterator[Plan]:
        """Yield the plan of each network, and then of each of its endpoints."""
        for member in list(self.site.members()):
            yield self.site.network_plan(member)
            for endpoint in self.site.endpoints(member.network):
                yield self.site.endpoint_plan(endpoint)
            yield self.site.remote_plan(member)

    # What Docker no longer has, and what nobody claimed.

    async def forget_removed(self) -> None:
        """Remove endpoints and networks that Docker has been without for long."""
        if self.inventory is None:
            return
        have = self.inventory
        members = list(self.site.members())
        endpoints = {
            e.id: e
            for m in members
            for e in self.site.endpoints(m.network)
            if e.id not in have.endpoints
        }
        networks = {m.docker_id for m in members if m.docker_id not in have.networks}
        pools = set(self.idle_claims(have))
        gone = self.missing.expired({*endpoints, *networks, *pools})
        for name in gone.intersection(endpoints):
            log.warning("sync.endpoint_gone", endpoint=name[:12])
            await self.networks.remove(endpoints[name])
        for name in gone.intersection(networks):
            log.warning("sync.network_gone", network=name[:12])
            await self.drop_network(name)
        for name in gone & pools:
            log.warning("sync.pool_gone", pool=name)
            await self.ipam.release_pool(name)

    async def settle_doubts(self) -> None:
        """Remove networks in doubt that Docker has not; it is asked twice."""
        doubts = self.networks.doubts
        doubts.end(doubts.names - {m.docker_id for m in self.site.members()})
        if not doubts.names or self.docker is None or not self.settle:
            return
        try:
            # Of no driver: the list alone, and no endpoints.
            have = await self.docker.inventory("")
        except StoreError as error:
            log.debug("docker.away", error=str(error))
            return
        doubts.end(have.networks)
        lacking = {name for name in doubts.names if not self.site.locks.is_busy(name)}
        for name in self.doubted.expired(lacking):
            log.warning("sync.network_gone", network=name[:12])
            await self.drop_network(name)
            doubts.end([name])
        if doubts.names:
            asyncio.get_running_loop().call_later(DOUBT, self.wake)

    def idle_claims(self, have: Inventory) -> Iterator[str]:
        """Yield claims for networks of others that Docker's list has no subnet for."""
        for member in self.site.view.all(Member, "members/"):
            if member.host == self.site.host.id and not member.docker_id:
                for claim in member.claims:
                    if parse_id(claim).pool not in have.pools:
                        yield claim

    async def drop_network(self, docker_id: str) -> None:
        """Remove a network whose removal Docker could not tell us, pools included."""
        member = self.networks.part(docker_id)
        await self.networks.delete(docker_id)
        for claim in member.claims if member is not None else ():
            await self.ipam.release_pool(claim)

    async def forget_unused(self) -> None:
        """Delete networks and pools without a member: the store was away for that."""
        view = self.site.view
        used = {m.network for m in view.all(Member, "members/")}
        known = {n.id for n in view.all(Network, "networks/")}
        known |= {p.network for p in view.all(Pool, "pools/")}
        for name in sorted(known - used):

            def decide(draft: Draft, name: str = name) -> None:
                if not draft.all(Member, f"members/{name}/"):
                    claims.prune(draft, name)

            await self.site.state.remove(decide)

    async def lapse(self) -> None:
        """Give back provisional addresses, where a network of ours has the pool."""
        host = self.site.host.id
        idle = {
            records.address(r.space, r.cidr, r.ip): r
            for pool in self.site.view.all(Pool, "pools/")
            if pool.claimed
            for r in claims.reservation(self.site.view, pool)
            if not r.bound and r.host == host
        }
        for key in self.lapsing.expired(idle):
            log.warning("ipam.lapsed", address=str(idle[key].ip))

            def decide(draft: Draft, key: str = key) -> None:
                held = draft.get(Reservation, key)
                if held is not None and not held.bound:
                    draft.delete(key)

            await self.site.state.remove(decide)

    # Docker's door.

    async def listen(self, driver: str) -> None:
        """Follow Docker's events until cancelled; its absence is no error."""
        if self.docker is None:
            return
        while True:
            try:
                await self.follow(self.docker, driver)
            except StoreError as error:
                log.debug("docker.away", error=str(error))
            self.inventory = None
            await asyncio.sleep(PAUSE)

    async def follow(self, docker: DockerApi, driver: str) -> None:
        """Read Docker's lists at each of its events, until it goes away."""
        async with contextlib.aclosing(docker.events()) as events:
            self.docker_version = await docker.version()
            self.site.outlived = await docker.outlived()
            async for _ in events:
                # What happens meanwhile comes as one event more.
                await asyncio.sleep(SETTLE)
                await self.calm()
                ours = frozenset(m.docker_id for m in self.site.members())
                self.learn(await docker.inventory(driver, ours))

    def learn(self, inventory: Inventory) -> None:
        """Take in what Docker has."""
        # What was in use as far as could be told may be so no more.
        told = self.inventory is None and bool(self.orphans)
        self.inventory = inventory
        self.site.names = inventory.names
        bridges = self.site.docker_bridges
        always = {"docker0", "docker_gwbridge"}
        self.site.docker_bridges = frozenset(inventory.bridges | always)
        if told or self.site.docker_bridges != bridges:
            self.wake()
        elif self.missing.since or self.stale(inventory):
            self.tidy()

    def stale(self, inventory: Inventory) -> bool:
        """Tell whether anything of ours is not in Docker's list."""
        return any(
            m.docker_id not in inventory.networks
            or any(
                e.id not in inventory.endpoints for e in self.site.endpoints(m.network)
            )
            for m in self.site.members()
        )


def affected(plan: Plan, amiss: set[ops.Key]) -> Plan:
    """Return what of a plan is amiss or stands on it; `amiss` grows by the latter."""
    part = []
    for op in plan:
        if op.key in amiss or amiss.intersection(op.stands_on()):
            amiss.add(op.key)
            part.append(op)
    return tuple(part)


def removable(
    surplus: Plan, known: frozenset[str] | None, *, shared: bool
) -> tuple[Plan, tuple[str, ...]]:
    """
    Divide what is in no plan into what may go and the names of what may not.

    A pair whose far end is in a sandbox is in use unless Docker's list lacks its
    endpoint; while there is one in use, or the kernel is `shared` with endpoints that
    are not ours, only pairs may go: the firewall's part has no owner's name on it.
    """
    pairs = [op for op in surplus if isinstance(op, Veth)]
    used = {op.key for op in pairs if in_use(op, known)}
    if not used and not shared:
        return surplus, ()
    names = tuple(ops.name(op) for op in surplus if op.key in used)
    return tuple(op for op in pairs if op.key not in used), names


def in_use(pair: Veth, known: frozenset[str] | None) -> bool:
    """Tell whether a pair reaches into a sandbox that Docker may still have."""
    if pair.peer is not None:
        return False
    *_, endpoint = (pair.alias or "").split(":")
    return known is None or not endpoint or endpoint in known
