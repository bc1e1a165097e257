"""
Questions: what a host asks another about its kernel, through the store.

Commands talk to their own host's daemon alone. What the other end of a tunnel has, only
the daemon there can see; so there is one question for each pair of hosts, on the lease
of the host that asks, and one answer, on the lease of the other. Who asks takes both
away; what is left is written over, or ends with a lease. A question can have a host
look, and nothing else.
"""

import asyncio
import contextlib
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from cnmdriver.driver.site import Site
from cnmdriver.errors import DriverError, StoreError
from cnmdriver.model import Alive, Answer, Hop, Question
from cnmdriver.store import records
from cnmdriver.store.checks import HOPS
from cnmdriver.store.session import Session

PATIENCE = 4.0
"""Seconds for another host to answer."""
LOOKING = 3.0
"""Seconds for a look at this host."""
POLL = 0.02
CALM = 0.2
"""Seconds between two answers, at least: anybody in the store can ask."""
REVIEW = 30.0
"""Seconds until it is looked for questions without news."""
TRIES = 3
"""Times a write may meet a fence that was just made anew."""
LONGEST = 500
"""Characters of a field of an answer."""

Look = Callable[[str, Question], Awaitable[tuple[Hop, ...]]]
"""Looks, for the host of that id, at what is asked; changes nothing."""

log = structlog.get_logger()


class Questions:
    """Asks the other hosts, and answers them."""

    def __init__(self, site: Site, session: Session, look: Look) -> None:
        """Take what looks at this host."""
        self.site = site
        self.session = session
        self.look = look
        self.news = asyncio.Event()
        self.asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By host: there is one question to each."""

    def wake(self) -> None:
        """Look soon whether somebody asks."""
        self.news.set()

    # Asking.

    async def ask(self, host: str, question: Question) -> tuple[Hop, ...]:
        """
        Return what another host finds; the question's id is chosen here.

        Raises StoreError, with why the host cannot be asked or did not answer.
        """
        self.refuse_silent(host)
        question = replace(question, id=secrets.token_hex(8))
        asked = records.question(host, self.site.host.id)
        said = records.answer(host, self.site.host.id)
        async with self.asking[host]:
            await self.utter({asked: records.encode(question)})
            try:
                return await self.answered(said, question.id)
            finally:
                with contextlib.suppress(StoreError):
                    await self.utter({}, asked, said)

    def refuse_silent(self, host: str) -> None:
        """Raise StoreError for a host that cannot answer."""
        if self.site.state.away is not None:
            raise StoreError("the store is away, through which hosts are asked")
        alive = self.site.view.get(Alive, records.alive(host))
        if alive is None:
            raise StoreError("it has no lease in the store: it, or its daemon, is gone")
        if alive.resting:
            raise StoreError("its daemon was stopped")

    async def answered(self, key: str, identity: str) -> tuple[Hop, ...]:
        """Wait for the answer to just this question."""
        latest = time.monotonic() + PATIENCE
        while time.monotonic() < latest:
            found = self.site.view.get(Answer, key)
            if found is not None and found.id == identity:
                return found.hops
            await asyncio.sleep(POLL)
        raise StoreError(
            f"its daemon did not answer within {PATIENCE:g} s; it hangs, or is older"
        )

    async def utter(self, puts: dict[str, bytes], *deletes: str) -> None:
        """Write on this host's lease, again if its fence was made anew meanwhile."""
        for left in reversed(range(TRIES)):
            try:
                await self.session.utter(puts, deletes)
            except StoreError:
                if not left:
                    raise
                await asyncio.sleep(POLL)
            else:
                return

    # Answering.

    async def run(self) -> None:
        """Answer who asks, one at a time, until cancelled."""
        while True:
            if self.site.state.away is None:
                await self.turn()
            await asyncio.sleep(CALM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REVIEW):
                    await self.news.wait()
            self.news.clear()

    async def turn(self) -> None:
        """Answer each question once, and take away answers that nobody waits for."""
        own = self.site.host.id
        asked = dict(self.site.view.pairs(f"questions/{own}/"))
        for key, question in asked.items():
            asking = key.rpartition("/")[2]
            if isinstance(question, Question) and self.is_open(asking, question):
                await self.reply(asking, question)
                await asyncio.sleep(CALM)
        for key, _ in list(self.site.view.pairs(f"answers/{own}/")):
            asking = key.rpartition("/")[2]
            if records.question(own, asking) not in asked:
                with contextlib.suppress(StoreError):
                    await self.utter({}, key)

    def is_open(self, asking: str, question: Question) -> bool:
        """Tell whether a host that lives waits for this answer."""
        view = self.site.view
        said = view.get(Answer, records.answer(self.site.host.id, asking))
        alive = view.get(Alive, records.alive(asking)) is not None
        return alive and (said is None or said.id != question.id)

    async def reply(self, asking: str, question: Question) -> None:
        """Look, and write what was found; what cannot be looked at is said too."""
        try:
            async with asyncio.timeout(LOOKING):
                hops = await self.look(asking, question)
        except TimeoutError:
            text = f"its kernel did not answer within {LOOKING:g} s"
            hops = (Hop(name="kernel", found=text, well=None),)
        except DriverError as error:
            hops = (Hop(name="kernel", found=str(error), well=None),)
        answer = Answer(id=question.id, hops=tuple(map(printable, hops[:HOPS])))
        key = records.answer(self.site.host.id, asking)
        try:
            await self.utter({key: records.encode(answer)})
        except StoreError as error:
            log.debug("questions.not_answered", error=str(error))


def printable(hop: Hop) -> Hop:
    """Shorten texts, and take out of them what no record may have."""

    def line(text: str) -> str:
        return "".join(c if c.isprintable() else "?" for c in text)[:LONGEST]

    return replace(
        hop,
        wanted=line(hop.wanted),
        found=line(hop.found),
        remedy=line(hop.remedy),
    )
