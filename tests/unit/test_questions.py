"""Questions between hosts: asked, answered, and gone; nothing else comes of them."""

import asyncio
from contextlib import suppress

import pytest

from cnmdriver.driver import questions as module
from cnmdriver.driver.questions import Questions, printable
from cnmdriver.errors import KernelError, StoreError
from cnmdriver.model import Alive, Answer, Hop, Question
from cnmdriver.store import records
from cnmdriver.store.base import Change
from tests.fakes import cluster, ended

GOOD = Hop(name="port", wanted="up", found="up")


class Sayer:
    """Writes as a session would, without a lease; `failures` writes fail before."""

    def __init__(self, state):
        """Write into a state's store."""
        self.state = state
        self.failures = 0
        self.writes = 0

    async def utter(self, puts, deletes=()):
        """Write."""
        if self.failures:
            self.failures -= 1
            raise StoreError("the fence was made anew")
        self.writes += 1
        change = Change(puts=puts, deletes=frozenset(deletes))
        await self.state.store.commit(change)


class Scene:
    """Two hosts; the second answers with what the test says, and counts."""

    def __init__(self, rigs):
        """Let both ask; only the second answers."""
        self.rigs = rigs
        self.looks = []
        self.hops = (GOOD,)
        self.sayers = [Sayer(one.state) for one in rigs]
        self.asker, self.asked = (
            Questions(one.site, sayer, self.look)
            for one, sayer in zip(rigs, self.sayers, strict=True)
        )
        rigs[1].state.changed = self.asked.wake

    @property
    def ids(self):
        """Return both hosts' ids."""
        return [one.site.host.id for one in self.rigs]

    async def look(self, asking, question):
        """Note who asks what."""
        self.looks.append((asking, question))
        if isinstance(self.hops, Exception):
            raise self.hops
        return self.hops

    async def keys(self):
        """Return what is left in the store of questions and answers."""
        listing = await self.rigs[0].state.store.read("")
        return [k for k in listing.items if k.startswith(("questions/", "answers/"))]

    async def put(self, key, record):
        """Write a record, as anybody could."""
        change = Change(puts={key: records.encode(record)})
        await self.rigs[0].state.store.commit(change)
        await self.rigs[1].state.relist()


@pytest.fixture
async def made(tmp_path, monkeypatch):
    """Build two hosts, of which the second answers."""
    monkeypatch.setattr(module, "CALM", 0.01)
    async with cluster(tmp_path, 2) as rigs:
        both = Scene(rigs)
        # Each must know the other.
        for one in rigs:
            await one.state.relist()
        task = asyncio.create_task(both.asked.run())
        yield both
        await ended(task)


async def test_a_question_is_answered(made):
    """Who asks gets what the other finds, and nothing is left in the store."""
    asking, asked = made.ids
    question = Question(id="", network="n", endpoint="e", other="o")
    assert await made.asker.ask(asked, question) == (GOOD,)
    ((who, heard),) = made.looks
    assert (who, heard.network, heard.endpoint, heard.other) == (asking, "n", "e", "o")
    assert heard.id
    assert await made.keys() == []


async def test_an_old_answer(made):
    """An answer to an earlier question is none to this one."""
    asking, asked = made.ids
    old = Answer(id="old", hops=(Hop(name="old"),))
    await made.put(records.answer(asked, asking), old)
    await made.rigs[0].state.relist()
    assert await made.asker.ask(asked, Question(id="")) == (GOOD,)


async def test_several_at_once(made):
    """Questions to one host take turns, each with its own answer."""
    asked = made.ids[1]
    every = [made.asker.ask(asked, Question(id="", endpoint=f"e{n}")) for n in range(4)]
    assert await asyncio.gather(*every) == [(GOOD,)] * 4
    assert len({question.id for _, question in made.looks}) == 4
    assert await made.keys() == []


async def test_a_fence_that_was_made_anew(made):
    """A write that failed once is tried again."""
    made.sayers[0].failures = 2
    assert await made.asker.ask(made.ids[1], Question(id="")) == (GOOD,)


@pytest.mark.parametrize("error", [KernelError("no table"), StoreError("gone")])
async def test_a_look_that_fails(made, error):
    """What a host cannot look at is said, and proves nothing."""
    made.hops = error
    (hop,) = await made.asker.ask(made.ids[1], Question(id=""))
    assert (hop.name, hop.found, hop.well) == ("kernel", str(error), None)


async def test_long_and_odd_answers(made):
    """What a host finds is made fit for a record."""
    made.hops = (Hop(name="port", found="x\x1b[2J" + "y" * 900),) * 99
    hops = await made.asker.ask(made.ids[1], Question(id=""))
    assert len(hops) == 64
    assert hops[0].found == "x?[2J" + "y" * 495
    assert printable(GOOD) == GOOD


async def test_who_cannot_be_asked(made):
    """A host that is gone, stopped or silent is not asked, and the reason is told."""
    asked = made.ids[1]
    state = made.rigs[0].state
    state.view.set(records.alive(asked), None)
    with pytest.raises(StoreError, match="it has no lease in the store"):
        await made.asker.ask(asked, Question(id=""))
    await made.put(records.alive(asked), Alive(instance="i", boot="b", resting=True))
    await state.relist()
    with pytest.raises(StoreError, match="its daemon was stopped"):
        await made.asker.ask(asked, Question(id=""))
    state.away = "no route"
    with pytest.raises(StoreError, match="the store is away"):
        await made.asker.ask(asked, Question(id=""))
    assert made.looks == []
    assert made.sayers[0].writes == 0


async def test_a_silent_host(tmp_path, monkeypatch):
    """A host that does not answer is waited for no longer than the limit."""
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    async with cluster(tmp_path, 2) as rigs:
        both = Scene(rigs)
        await rigs[0].state.relist()
        with pytest.raises(StoreError, match=r"did not answer within 0\.1 s"):
            await both.asker.ask(both.ids[1], Question(id=""))
        assert await both.keys() == []


async def test_what_others_write(made):
    """A question of no host that lives is not looked at; an old answer is removed."""
    asked = made.ids[1]
    await made.put(records.question(asked, "stranger"), Question(id="q"))
    await made.put(records.answer(asked, "nobody"), Answer(id="a"))
    for _ in range(200):
        if records.answer(asked, "nobody") not in await made.keys():
            break
        await asyncio.sleep(0.01)
    assert await made.keys() == [records.question(asked, "stranger")]
    assert made.looks == []


async def test_a_question_is_looked_at_once(made):
    """A question that stays in the store is answered once."""
    asking, asked = made.ids
    await made.put(records.question(asked, asking), Question(id="q"))
    for _ in range(200):
        if records.answer(asked, asking) in await made.keys():
            break
        await asyncio.sleep(0.01)
    await made.rigs[1].state.relist()
    with suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            while True:
                made.asked.wake()
                await asyncio.sleep(0.01)
    assert len(made.looks) == 1
