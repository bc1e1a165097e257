"""`pynet watch`: lines for pipes, a screen for people, and a daemon that goes away."""

import asyncio
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from cnmdriver.cli import watch as module
from cnmdriver.cli.watch import Seen, drawn, share
from tests.web import scenes

LIMIT = 25.0
BLUE = f"{1:032x}"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@contextmanager
def daemon(directory: Path):
    """Serve three hosts in a thread of its own; yield what writes to their store."""
    ready, over, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()
    made = []

    async def serve():
        async with scenes.shown(directory) as shown:
            await scenes.populate(shown.rig, 3, 14)
            made.append(shown)
            ready.set()
            await over.wait()

    def write(decide):
        work = made[0].rig.state.commit(decide)
        asyncio.run_coroutine_threadsafe(work, loop).result(LIMIT)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield write
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def argv(directory: Path, *more: str) -> list[str]:
    """Return the command."""
    admin = str(directory / "admin.sock")
    return [sys.executable, "-m", "cnmdriver", "watch", "--admin", admin, *more]


def late(number: int):
    """Return what writes a new endpoint on another host."""
    return lambda draft: scenes.endpoint(draft, BLUE, scenes.host_id(2), number)


class Output:
    """What a program writes, as it writes it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.text = ""

    def until(self, wanted: str) -> str:
        """Read on until a text has come."""
        begin = time.monotonic()
        while wanted not in self.text:
            left = LIMIT - (time.monotonic() - begin)
            assert left > 0, (wanted, self.text)
            if select.select([self.descriptor], [], [], left)[0]:
                more = os.read(self.descriptor, 65536).decode(errors="replace")
                self.text += ESCAPE.sub("", more)
        return self.text


@pytest.mark.timeout(120)
@pytest.mark.parametrize("form", ["--json", ""])
def test_lines(tmp_path, form):
    """
    In a pipe each event is a line, as JSON or as text.

    1. An endpoint comes.
    2. Ctrl-C.
    Result: it ends with code 0 and without a word more.
    """
    with daemon(tmp_path) as write, start(tmp_path, form) as program:
        output, errors = (Output(s.fileno()) for s in (program.stdout, program.stderr))
        write_until(write, output)
        line = next(s for s in output.text.splitlines() if "endpoint.came" in s)
        if form:
            told = json.loads(line)
            assert told["event"] == "endpoint.came"
            assert told["facts"]["host"] == "node-02"
        else:
            assert re.match(r"\d\d:\d\d:\d\d endpoint\.came endpoint=", line)
            assert "host=node-02" in line
        program.send_signal(signal.SIGINT)
        assert program.wait(LIMIT) == 0
        assert os.read(errors.descriptor, 100) == b""


@contextmanager
def start(directory: Path, *more: str):
    """Run the command, and end it."""
    with subprocess.Popen(
        argv(directory, *filter(None, more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as program:
        try:
            yield program
        finally:
            program.kill()


def write_until(write, output: Output) -> None:
    """Write new endpoints until one is told of: it listens only once it has begun."""
    for number in range(900, 900 + int(LIMIT)):
        write(late(number))
        if select.select([output.descriptor], [], [], 1)[0]:
            output.until("endpoint.came")
            return
    raise AssertionError("nothing was told")


@pytest.mark.timeout(120)
def test_away_and_back(tmp_path):
    """A daemon that stops is told of, and followed again when it is back."""
    with daemon(tmp_path) as write:
        program = subprocess.Popen(
            argv(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        output, errors = (Output(s.fileno()) for s in (program.stdout, program.stderr))
        write_until(write, output)
    try:
        errors.until("trying again")
        output.text = ""
        with daemon(tmp_path) as write:
            write_until(write, output)
            program.send_signal(signal.SIGINT)
            assert program.wait(LIMIT) == 0
    finally:
        program.kill()
        program.communicate()


def test_no_daemon(tmp_path):
    """Without a daemon it ends as other commands do, with what to do."""
    done = subprocess.run(
        argv(tmp_path), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1
    assert "pynet is not running" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(120)
def test_the_screen(tmp_path):
    """
    On a terminal of 80 columns and 24 lines it is a screen that lives.

    1. Hosts, networks and endpoints are there.
    2. What comes is marked and told of.
    3. The daemon stops: the screen says so.
    Result: Ctrl-C gives the terminal back, with code 0.
    """
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 80))
    try:
        with daemon(tmp_path) as write:
            program = subprocess.Popen(
                argv(tmp_path),
                stdin=child,
                stdout=child,
                stderr=child,
                start_new_session=True,
                env=os.environ | {"TERM": "xterm-256color"},
            )
            output = Output(parent)
            for wanted in ("HOSTS 3", "node-02", "NETWORKS 2", "blue", "ENDPOINTS 14"):
                output.until(wanted)
            write(late(900))
            output.until("+ ✓ 000000000000")
            output.until("endpoint.came")
        output.until("! pynet ")
        program.send_signal(signal.SIGINT)
        assert program.wait(LIMIT) == 0
    finally:
        program.kill()
        program.wait()
        os.close(child)
        os.close(parent)


# What is drawn.


def whole(hosts: int, endpoints: int, **more: object) -> dict[str, object]:
    """Make up how all is."""
    return {
        "name": "node-01",
        "here": "h0",
        "away": False,
        "revision": 7,
        "docker": "connected",
        "uptime": 75.0,
        "attention": [],
        "counts": {"calls": 0, "refused": 0, "changes": 0, "repairs": 0},
        "hosts": [
            {
                "id": f"h{n}",
                "label": f"node-{n}",
                "state": "alive",
                "vtep": "192.0.2.1",
                "health": "well",
                "endpoints": 1,
                "behind": 0,
            }
            for n in range(hosts)
        ],
        "networks": [
            {
                "id": "n",
                "label": "blue",
                "mode": "overlay",
                "endpoints": endpoints,
                "subnets": ["10.1.0.0/24"],
                "health": "well",
            }
        ],
        "endpoints": [
            {
                "id": f"e{n}",
                "label": f"web-{n}",
                "network": "n",
                "host": "h0",
                "addresses": [f"10.1.0.{n}/24"],
                "health": "well",
            }
            for n in range(endpoints)
        ],
        **more,
    }


def printed(seen: Seen, width: int = 80, height: int = 24) -> list[str]:
    """Return the lines of the screen."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(drawn(seen, width, height))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 15), (200, 60)])
def test_it_fits(width, height):
    """However much there is, it fits on the screen, and nothing is left out unsaid."""
    seen = Seen()
    event = {"event": "e.v", "level": "info", "at": 0, "facts": {"long": "x" * 300}}
    seen.events.extend([event] * 50)
    trouble = ["something long " * 20] * 5
    seen.take(whole(20, 500, attention=trouble))
    lines = printed(seen, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "ENDPOINTS 500 (THE FIRST" in text.upper()
    assert "HOSTS 20" in text
    assert "! 5 to look at" in text


def test_what_came_and_went(monkeypatch):
    """What came, changed and went stands first, marked, and fades after a while."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seen = Seen()
    seen.take(whole(2, 3))
    after = whole(2, 4)
    gone = after["endpoints"].pop(0)
    after["endpoints"][0] = {**after["endpoints"][0], "addresses": ["10.1.0.99/24"]}
    now[0] += 1
    seen.take(after)
    marked = {t["label"]: mark for mark, t in seen.things("endpoints") if mark}
    assert marked == {"web-0": "gone", "web-1": "changed", "web-3": "came"}
    assert {mark for mark, _ in seen.things("networks")} == {""}
    assert "- ✓ web-0" in "\n".join(printed(seen))
    now[0] += module.FADE + 1
    seen.take(after)
    assert gone["label"] not in "\n".join(printed(seen))
    assert {mark for mark, _ in seen.things("endpoints")} == {""}


def test_rates(monkeypatch):
    """Rates are over the last seconds; a daemon that began anew has none below zero."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seen = Seen()
    for calls in (0, 4, 8):
        counts = {"calls": calls, "refused": 0, "changes": 2 * calls, "repairs": 0}
        seen.take(whole(1, 1, counts=counts))
        now[0] += 2
    assert seen.rates() == {"calls": 2.0, "refused": 0.0, "changes": 4.0}
    seen.take(whole(1, 1))
    assert min(seen.rates().values()) == 0.0


def test_hostile_names():
    """A name that would move the cursor, or is markup, is only text."""
    seen = Seen()
    made = whole(1, 1)
    made["endpoints"][0]["label"] = "\x1b[2Jevil\n[red]x[/red]"
    made["name"] = "\x1b]0;owned\x07"
    seen.take(made)
    text = "\n".join(printed(seen))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]x[/red]" in text


def test_shares():
    """Who needs fewer lines leaves them to the others, and all are used at most."""
    assert share({"a": 1, "b": 2, "c": 50, "d": 50}, 20) == {
        "a": 2,
        "b": 3,
        "c": 7,
        "d": 8,
    }
    assert sum(share({"a": 99, "b": 99, "c": 99, "d": 99}, 21).values()) == 21
