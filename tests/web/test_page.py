"""The page in a real browser: what it shows, how soon, and how one gets about in it."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cnmdriver.model import Endpoint
from tests.web import scenes
from tests.web.browser import Browser, browser
from tests.web.scenes import Shown

pytestmark = pytest.mark.timeout(180)

SOON = 1.0
"""Seconds until a change is on the page, on a machine with nothing else to do."""
SLOW = 4.0
"""How much longer it may take where others work too."""
LIVE = "document.querySelector('#line').textContent.includes('live')"
BLUE = f"{1:032x}"


@pytest.fixture
async def shown(tmp_path: Path) -> AsyncIterator[Shown]:
    """Serve three hosts with two networks."""
    async with scenes.shown(tmp_path) as made:
        await scenes.populate(made.rig, 3, 14)
        yield made


@pytest.fixture
async def page() -> AsyncIterator[Browser]:
    """Open a browser; at the end nothing may have gone wrong in it."""
    async with browser() as opened:
        await opened.look()
        yield opened
        assert opened.complaints == []


async def opened(page: Browser, shown: Shown) -> None:
    """Open the page and wait until it shows the hosts."""
    await page.go(f"{shown.url}/")
    await page.until(f"{LIVE} && document.querySelector('.host')")


def there(text: str, selector: str = ".chip .label") -> str:
    """Return an expression: is there an element with such a text."""
    listed = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return f"{listed}.some((e) => e.textContent === {json.dumps(text)})"


async def focused(page: Browser) -> str:
    """Return what has the focus, by kind and name."""
    found: str = await page.ask(
        "(() => { const e = document.activeElement; const l = e.querySelector('.label,"
        " .name'); return [e.dataset.kind ?? e.id, l?.textContent].join(' ').trim();"
        " })()"
    )
    return found


async def test_what_changes_shows_at_once(shown: Shown, page: Browser) -> None:
    """
    What changes in the cluster is on the page within a second.

    1. A container comes to another host, and goes.
    2. A network comes.
    3. A host's lease runs out: it and its containers are seen to be hidden.
    4. The store goes away and comes back.
    Result: each shows in time, and in the list of events.
    """
    await opened(page, shown)
    commit, other = shown.rig.state.commit, scenes.host_id(2)
    limit = SOON * SLOW
    new = f"{901:064x}"
    shown.rig.site.names[new] = "late"
    await commit(lambda draft: scenes.endpoint(draft, BLUE, other, 900))
    await page.until(there("late"), limit)
    await page.until(there("endpoint.came", "#log .name"), limit)

    def vanish(draft):
        draft.delete(f"endpoints/{BLUE}/{new}")

    await commit(vanish)
    await page.until(f"!({there('late')})", limit)
    await commit(lambda draft: scenes.network(draft, 9, [other]))
    await page.until(there("10.9.0.0/16", ".network .label"), limit)
    await commit(lambda draft: scenes.host(draft, other, 2, state="gone"))
    await page.until("document.querySelector('.host.amiss .chip.away')", limit)
    await page.until("document.querySelector('.link.amiss, .end.amiss')", limit)
    await page.until(there("host.gone", "#log .name"), limit)
    shown.rig.state.away = "etcd does not answer"
    await page.until(
        "document.querySelector('#attention').innerText.includes('does not answer')",
        limit,
    )
    shown.rig.state.away = None
    await page.until("document.querySelector('#attention').hidden", limit)


async def test_calls_of_docker(shown: Shown, page: Browser) -> None:
    """A call is told in few words, with names that come later, and can be left out."""
    await opened(page, shown)
    call = {"event": "api.call", "method": "NetworkDriver.Join", "ms": 12.3}
    new = "ab" * 32
    journal = shown.daemon.watching.journal
    journal(None, "info", {**call, "outcome": "ok", "endpoint": new[:12]})
    journal(None, "info", {**call, "outcome": "Conflict", "error": "taken by a"})
    await page.until(there("ababababab" + "ab · ok · 12.3 ms", "#log .facts"))
    await page.until(there("Conflict · 12.3 ms · taken by a", "#log .error .facts"))
    shown.rig.site.names[new] = "late"

    def decide(draft):
        known = draft.view.get(Endpoint, f"endpoints/{BLUE}/{1:064x}")
        draft.put(f"endpoints/{BLUE}/{new}", replace(known, id=new))

    await shown.rig.state.commit(decide)
    await page.until(there("late · ok · 12.3 ms", "#log .facts"))
    await page.ask("document.querySelector('#calls').click()")
    hidden = "document.querySelector('#log .call').offsetParent === null"
    await page.until(hidden)


async def test_by_keyboard_alone(shown: Shown, page: Browser) -> None:
    """
    All can be reached and read without a mouse.

    1. Tab goes from group to group, the arrows from thing to thing in it.
    2. Enter shows the details, with what `explain` says of the network.
    3. Escape goes back to where one was; a slash goes to the search.
    Result: the search leaves only what is looked for.
    """
    await opened(page, shown)
    seen = []
    for _ in range(9):
        await page.press("Tab")
        seen.append(await focused(page))
    assert seen[:3] == ["", "search", "network blue"]
    assert seen[3] == "host node-01"
    assert [s for s in seen if s.startswith("host ")] == [
        "host node-01",
        "host node-01",
        "host node-02",
        "host node-03",
    ]
    for _ in range(5):
        await page.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key="Tab",
            code="Tab",
            windowsVirtualKeyCode=9,
            modifiers=8,
        )
    while not (await focused(page)).startswith("network"):
        await page.press("Tab")
    await page.press("ArrowDown")
    assert await focused(page) == "network green"
    await page.press("Home")
    assert await focused(page) == "network blue"
    await page.press("Enter")
    assert await focused(page) == "details"
    await page.until(there("✓ blue", "#detail h3"))
    await page.until(
        "document.querySelector('#detail pre').innerText.includes('network blue')"
    )
    await page.press("Escape")
    assert await focused(page) == "network blue"
    await page.press("/")
    assert await focused(page) == "search"
    await page.call("Input.insertText", text="10.1.1.2")
    await page.until("document.querySelectorAll('.chip:not(.dim)').length === 1")
    await page.press("Escape")
    await page.until("document.querySelectorAll('.chip.dim').length === 0")


async def test_a_tunnels_end(shown: Shown, page: Browser) -> None:
    """A host in the drawing is chosen by Enter; only its tunnels are strong then."""
    await opened(page, shown)
    await page.ask("document.querySelector('.end').focus()")
    await page.press("ArrowRight")
    assert await focused(page) == "host node-02"
    await page.press("Enter")
    await page.until(there("✓ node-02", "#detail h3"))
    await page.until("document.querySelectorAll('.link.on').length === 2")
    await page.until("document.querySelectorAll('.link.off').length === 1")


async def test_the_focus_stays(shown: Shown, page: Browser) -> None:
    """What comes and goes before it does not take the focus from an endpoint."""
    await opened(page, shown)
    chips = "[...document.querySelector('.chips').querySelectorAll('.label')]"
    first, name, *_ = await page.ask(f"{chips}.map((e) => e.textContent)")
    await page.ask(f"{chips}[1].closest('button').click()")
    await page.press("Escape")
    assert await focused(page) == f"endpoint {name}"
    shown.rig.site.names[f"{901:064x}"] = "aaa"
    await shown.rig.state.commit(
        lambda draft: scenes.endpoint(draft, BLUE, shown.rig.site.host.id, 900)
    )
    await page.until(there("aaa"))
    assert await focused(page) == f"endpoint {name}"
    identity = next(i for i, n in shown.rig.site.names.items() if n == first)
    await shown.rig.state.commit(
        lambda draft: draft.delete(f"endpoints/{BLUE}/{identity}")
    )
    await page.until(f"!({there(first)})")
    assert await focused(page) == f"endpoint {name}"
    listed = await page.ask(f"{chips}.map((e) => e.textContent)")
    assert listed == sorted(listed)
    assert listed[:2] == ["aaa", name]


async def test_names_are_only_text(shown: Shown, page: Browser) -> None:
    """A name that is HTML is shown as it is, and does nothing."""
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    identity = next(iter(shown.rig.site.names))
    for one in list(shown.rig.site.names):
        shown.rig.site.names[one] = evil
    shown.daemon.watching.journal(
        None, "warning", {"event": evil, "error": evil, evil: evil}
    )
    await opened(page, shown)
    await page.until(there(evil))
    await page.until(there(evil, ".network .label"))
    await page.until(there(evil, "#log .name"))
    await page.ask(f"document.querySelector('[data-id=\"{identity}\"]').click()")
    await page.until(
        "document.querySelector('#detail h3').textContent.includes('<img')"
    )
    await page.until("document.querySelector('#detail pre')")
    assert await page.ask("document.querySelectorAll('img').length") == 0
    assert "owned" not in await page.ask("document.title")


async def test_light_and_dark(shown: Shown, page: Browser) -> None:
    """It is as light or dark as the reader's screen, and readable in both."""
    await opened(page, shown)
    brightness = (
        "(() => { const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3)"
        ".map((v) => { v /= 255; return v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055)"
        " ** 2.4; }).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);"
        " const look = (selector, back) => { const a = rgb(getComputedStyle("
        "document.querySelector(selector)).color), b = rgb(getComputedStyle("
        "document.querySelector(back)).backgroundColor);"
        " return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };"
        " return [rgb(getComputedStyle(document.body).backgroundColor),"
        " look('.chip .label', '.chip'), look('.chip .more', '.chip'),"
        " look('.group h3', '.host'), look('.network .more', 'body'),"
        " look('#health', 'header'), look('#counts dt', 'header')]; })()"
    )
    for dark in (False, True):
        await page.look(dark=dark)
        back, *contrasts = await page.ask(brightness)
        assert (back < 0.1) is dark
        assert min(contrasts) >= 4.5, contrasts


async def test_many(tmp_path: Path, page: Browser) -> None:
    """Of 20 hosts and 500 endpoints all are there, none is cut off, and it is quick."""
    async with scenes.shown(tmp_path) as shown:
        await scenes.populate(shown.rig, 20, 500, 4)
        await opened(page, shown)
        await page.until("document.querySelectorAll('.chip').length === 500")
        assert await page.ask("document.querySelectorAll('.end').length") == 20
        wide = (
            "[...document.querySelectorAll('.host, .chip, .network')]"
            ".filter((e) => e.scrollWidth > e.clientWidth + 1).length"
        )
        assert await page.ask(wide) == 0
        sideways = "document.documentElement.scrollWidth - window.innerWidth"
        assert await page.ask(sideways) <= 0
        shown.rig.site.names[f"{901:064x}"] = "late"
        await shown.rig.state.commit(
            lambda draft: scenes.endpoint(draft, BLUE, scenes.host_id(3), 900)
        )
        await page.until(there("late"), SOON * SLOW)
        await page.go("about:blank")


async def test_a_daemon_that_stops(tmp_path: Path, page: Browser) -> None:
    """When the daemon stops the page says so, and goes on when it is back."""
    port = 0
    for number in range(2):
        async with scenes.shown(tmp_path, port=port) as shown:
            port = int(shown.url.rpartition(":")[2])
            if number == 0:
                await opened(page, shown)
            await page.until(f"{LIVE} && document.querySelector('.host')")
        await page.until("document.querySelector('#line').classList.contains('amiss')")
    # Chromium itself notes each connection that was refused.
    # How the browser words that nobody is there depends on when it asked.
    gone = ("ERR_CONNECTION", "ERR_INCOMPLETE", "ERR_SOCKET_NOT_CONNECTED", "ERR_EMPTY")
    page.complaints = [c for c in page.complaints if not any(g in c for g in gone)]


async def test_nothing_yet(tmp_path: Path, page: Browser) -> None:
    """A host without a network says how to make one."""
    async with scenes.shown(tmp_path) as shown:
        await opened(page, shown)
        await page.until(
            "document.querySelector('#empty code').innerText"
            " === 'docker network create -d pynet blue'"
        )
        assert await page.ask("document.querySelector('#tunnels').hidden")
        await page.go("about:blank")
