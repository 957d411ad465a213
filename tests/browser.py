"""A headless Chromium, spoken to over its DevTools protocol: opens a page and asks what is on it."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
TIMEOUT_S = 60
PHONE_PIXELS = 600  # a narrower window is a phone's, with a touch screen


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One Chromium without a network. Use as a context manager."""

    def __enter__(self) -> Browser:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-port=0", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [find_chromium(), *flags, f"--user-data-dir={self.profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.profile.cleanup()

    def endpoint(self) -> str:
        """Address of the browser's own socket, as soon as it has one."""
        file = Path(self.profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    def open(self, url: str, *scripts: str, dark: bool = False, width: int = 1280, screenshot: Path | None = None):
        """Open a page in a tab of its own.

        Args:
            url: the page, which tells by `<html data-ready>` that it is drawn.
            scripts: JavaScript expressions (promises are awaited), one after the other.
            dark: the reader prefers a dark page.
            width: of the window in pixels; a narrow one is a phone's.
            screenshot: where to leave a picture of the whole page.

        Returns:
            The values of the scripts, and the addresses that the page asked for.
        """
        return asyncio.run(self._open(url, scripts, dark, width, screenshot))

    async def _open(self, url, scripts, dark, width, screenshot):
        async with aiohttp.ClientSession() as client, client.ws_connect(self.endpoint(), max_msg_size=0) as socket:
            tab = Tab(socket)
            target = await tab.call("Target.createTarget", url="about:blank")
            attached = await tab.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            tab.session = attached["sessionId"]
            await tab.call("Network.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", features=[scheme])
            await tab.resize(width, 900)
            await tab.call("Emulation.setTouchEmulationEnabled", enabled=width < PHONE_PIXELS)
            await tab.call("Page.enable")
            await tab.call("Page.navigate", url=url)
            await tab.until("document.documentElement?.dataset.ready === 'true'")
            values = [await tab.evaluate(script) for script in scripts]
            if screenshot:
                await tab.take_picture(width, screenshot)
            await tab.call("Target.closeTarget", session=None, targetId=target["targetId"])
            return values, tab.requested


class Tab:
    """The protocol of one tab: a command, its answer, and the requests noticed on the way."""

    def __init__(self, socket):
        self.socket, self.session, self.number = socket, None, 0
        self.requested: list[str] = []

    async def call(self, method: str, session: str | None = "own", **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session == "own" and self.session:
            message["sessionId"] = self.session
        await self.socket.send_json(message)
        while True:
            answer = await self.socket.receive_json(timeout=TIMEOUT_S)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"][:200])
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    async def evaluate(self, script: str):
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not await self.evaluate(script):
            assert time.monotonic() < deadline, script
            await asyncio.sleep(0.05)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < PHONE_PIXELS,
        )

    async def take_picture(self, width: int, path: Path) -> None:
        height = await self.evaluate("document.documentElement.scrollHeight")
        await self.resize(width, height)
        await asyncio.sleep(0.7)
        picture = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))
