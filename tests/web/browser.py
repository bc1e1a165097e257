"""A browser without a screen, driven over a pipe by the DevTools protocol."""

import asyncio
import base64
import json
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
LIMIT = 30.0
"""Seconds for an answer of the browser."""
KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
TEXTS = {"Enter": "\r"}


class Browser:
    """One tab of a running browser."""

    def __init__(self, reader: asyncio.StreamReader, write: int) -> None:
        """Take the pipe's two ends."""
        self.reader = reader
        self.write = write
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.number = 0
        self.session = ""
        self.complaints: list[str] = []
        """What the page's console had to complain about."""

    async def read(self) -> None:
        """Take in what the browser says, until it ends."""
        while True:
            try:
                told = json.loads((await self.reader.readuntil(b"\0"))[:-1])
            except asyncio.IncompleteReadError:
                return
            if "id" in told:
                self.waiting.pop(told["id"]).set_result(told)
            else:
                self.hear(told["method"], told["params"])

    def hear(self, method: str, facts: dict[str, Any]) -> None:
        """Note what is wrong in the page."""
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(facts["exceptionDetails"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] in {
            "error",
            "warning",
        }:
            self.complaints.append(json.dumps(facts["entry"]))
        elif method == "Runtime.consoleAPICalled" and facts["type"] in {
            "error",
            "warning",
            "assert",
        }:
            self.complaints.append(json.dumps(facts["args"]))

    async def call(self, method: str, **facts: object) -> Any:
        """Ask the browser to do something, and return what it says."""
        self.number += 1
        waiting = asyncio.get_running_loop().create_future()
        self.waiting[self.number] = waiting
        asked = {"id": self.number, "method": method, "params": facts}
        if self.session:
            asked["sessionId"] = self.session
        os.write(self.write, json.dumps(asked).encode() + b"\0")
        async with asyncio.timeout(LIMIT + 10):
            told = await waiting
        assert "error" not in told, (method, told)
        return told["result"]

    async def begin(self) -> None:
        """Open a tab and listen to its console."""
        made = await self.call("Target.createTarget", url="about:blank")
        found = await self.call(
            "Target.attachToTarget", targetId=made["targetId"], flatten=True
        )
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def go(self, url: str) -> None:
        """Open an address."""
        await self.call("Page.navigate", url=url)

    async def ask(self, expression: str) -> Any:
        """Return what an expression of JavaScript is in the page, promises awaited."""
        told = await self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in told, (expression, told)
        return told["result"].get("value")

    async def until(self, expression: str, seconds: float = LIMIT) -> float:
        """Wait until an expression is true in the page; return the seconds it took."""
        begin = asyncio.get_running_loop().time()
        seen = await self.ask(
            "new Promise((done) => { const end = Date.now() + "
            f"{seconds * 1000}; const look = () => {{ let found = false;"
            f" try {{ found = ({expression}); }} catch {{}}"
            " if (found || Date.now() > end) done(Boolean(found));"
            " else setTimeout(look, 10); }; look(); })"
        )
        shown = "" if seen else await self.ask("document.body.innerText")
        assert seen, f"not in {seconds} s: {expression}\n{shown}\n{self.complaints}"
        return asyncio.get_running_loop().time() - begin

    async def press(self, key: str) -> None:
        """Press a key and let it go."""
        facts: dict[str, object] = {"key": key, "code": key}
        facts["windowsVirtualKeyCode"] = KEYS.get(key, ord(key[0].upper()))
        text = TEXTS.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, **facts, **more)

    async def look(self, *, dark: bool = False, width: int = 1500, height: int = 950):
        """Show the page in a size, light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG file."""
        told = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))


@asynccontextmanager
async def browser(prefix: Sequence[str] = ()) -> AsyncIterator[Browser]:
    """Run a browser, behind a command such as `nsenter`, and end it."""
    here, there = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        argv = [*prefix, "chromium", *FLAGS, f"--user-data-dir={directory}"]
        # The browser reads from descriptor 3 and writes to 4.
        script = f'exec 3<&{here[0]} 4>&{there[1]}; exec "$0" "$@"'
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            script,
            *argv,
            "about:blank",
            pass_fds=(here[0], there[1]),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(there[1])
        reader = asyncio.StreamReader(limit=1 << 26)
        with os.fdopen(there[0], "rb") as ear:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), ear
            )
            made = Browser(reader, here[1])
            listening = asyncio.create_task(made.read())
            try:
                await made.begin()
                yield made
            finally:
                os.close(here[1])
                try:
                    async with asyncio.timeout(10):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()
                listening.cancel()
                await asyncio.wait({listening})
                transport.close()
