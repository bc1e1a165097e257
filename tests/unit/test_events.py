"""What happens, as it comes: from the view, from the log, and from what is silent."""

import asyncio

import pytest

from cnmdriver.errors import Exhausted
from cnmdriver.insight import events as module
from cnmdriver.insight.events import Events
from cnmdriver.logs import Journal
from tests import scene
from tests.fakes import rig


@pytest.fixture
async def made(tmp_path):
    """Build a host with two networks."""
    async with rig(tmp_path) as built:
        await scene.populate(built)
        yield built


@pytest.fixture
def journal():
    """Make a journal."""
    return Journal()


@pytest.fixture
def events(made, journal):
    """Tell of the host."""
    return Events(made.site, journal)


async def news(follow, wanted=lambda piece: any(piece.values())):
    """Return the next piece of news that is wanted."""
    async with asyncio.timeout(10):
        async for piece in follow:
            if wanted(piece):
                return piece
    raise AssertionError("it ended")


async def test_an_endpoint_comes_and_goes(made, events):
    """A new endpoint is told of by its names and ids, its end too."""
    follow = events.follow()
    assert await anext(follow) == {"events": [], "changed": True}
    new = "e7" * 32
    made.site.names[new] = "late"
    await scene.endpoint(made, scene.BLUE, new, "10.1.0.9/24")
    came = await news(follow, lambda p: p["events"])
    assert came["changed"]
    (event,) = came["events"]
    network = made.site.member(scene.BLUE).network
    assert event["event"] == "endpoint.came"
    assert event["level"] == "change"
    assert event["facts"] == {
        "endpoint": "late",
        "network": "blue",
        "host": made.site.host.id[:12],
        "addresses": ["10.1.0.9"],
    }
    assert event["ids"] == {
        "endpoint": new,
        "network": network,
        "host": made.site.host.id,
    }
    await made.networks.delete_endpoint(scene.BLUE, new)
    gone = await news(follow, lambda p: p["events"])
    assert [e["event"] for e in gone["events"]] == ["endpoint.gone"]
    assert gone["events"][0]["facts"]["endpoint"] == "late"
    await follow.aclose()


async def test_a_network_and_its_end(made, events):
    """A network that is made and removed is told of, with all that was on it."""
    follow = events.follow()
    await anext(follow)
    red = "7" * 64
    await scene.network(made, red, "10.7.0.0/24")
    came = await news(follow, lambda p: p["events"])
    assert [e["event"] for e in came["events"]] == ["network.came"]
    await made.networks.delete(scene.BLUE)
    gone = await news(follow, lambda p: p["events"])
    assert sorted(e["event"] for e in gone["events"]) == [
        "endpoint.gone",
        "endpoint.gone",
        "network.gone",
    ]
    await follow.aclose()


async def test_lines_of_the_log(events, journal):
    """Lines of before come first, later ones as they come; secrets never."""
    journal(None, "info", {"event": "store.back", "timestamp": "2026-01-01T00:00:00Z"})
    follow = events.follow()
    first = await anext(follow)
    assert first["events"] == [
        {
            "event": "store.back",
            "level": "info",
            "at": "2026-01-01T00:00:00Z",
            "facts": {},
        }
    ]
    line = {"event": "store.away", "error": "etcd://u:pw@h does not answer", "n": 3}
    journal(None, "warning", line)
    later = await news(follow)
    assert later == {
        "events": [
            {
                "event": "store.away",
                "level": "warning",
                "at": None,
                "facts": {"error": "etcd://h does not answer", "n": 3},
            }
        ],
        "changed": False,
    }
    await follow.aclose()


async def test_what_does_not_announce_itself(made, events):
    """A name that Docker tells late, and a store that goes away, change the picture."""
    follow = events.follow()
    await anext(follow)
    made.site.names["e4" * 32] = "renamed"
    assert await news(follow) == {"events": [], "changed": True}
    made.state.away = "it does not answer"
    assert await news(follow) == {"events": [], "changed": True}
    await follow.aclose()


async def test_silence_is_told(events):
    """Without news there is an empty piece now and then."""
    follow = events.follow()
    await anext(follow)
    async with asyncio.timeout(10):
        assert await anext(follow) == {"events": [], "changed": False}
    await follow.aclose()


async def test_a_flood_is_one_piece(made, events, journal):
    """What happens at once is told at once."""
    follow = events.follow()
    await anext(follow)
    for number in range(50):
        journal(None, "info", {"event": "e", "number": number})
    piece = await news(follow)
    assert [e["facts"]["number"] for e in piece["events"]] == list(range(50))
    await follow.aclose()


async def test_not_all_of_before(events, journal):
    """Of the lines of before only the latest come."""
    for number in range(module.FIRST + 7):
        journal(None, "info", {"event": "e", "number": number})
    follow = events.follow()
    first = await anext(follow)
    numbers = [e["facts"]["number"] for e in first["events"]]
    assert numbers == list(range(7, module.FIRST + 7))
    await follow.aclose()


async def test_who_left_costs_nothing(made, events, journal):
    """What is kept for a listener goes with it."""
    feeds = len(made.site.view.feeds)
    follow = events.follow()
    await anext(follow)
    assert len(made.site.view.feeds) == feeds + 1
    await follow.aclose()
    assert len(made.site.view.feeds) == feeds
    assert (journal.listeners, events.listeners) == ([], [])


async def test_the_end(events):
    """When all ends, who listens is let go at once."""
    follow = events.follow()
    await anext(follow)
    events.close()
    async with asyncio.timeout(5):
        assert [piece async for piece in follow][1:] == []


async def test_not_too_many(events, monkeypatch):
    """Only so many may listen; the next is told."""
    monkeypatch.setattr(module, "MOST", 1)
    first = events.follow()
    await anext(first)
    with pytest.raises(Exhausted, match="1 are watching already"):
        await anext(events.follow())
    await first.aclose()
    second = events.follow()
    await anext(second)
    await second.aclose()
