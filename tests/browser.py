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
TIMEOUT_S = 180
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
        self.loop = asyncio.new_event_loop()
        self.socket = self.loop.run_until_complete(self._connect())
        return self

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        self.client = aiohttp.ClientSession()
        file = Path(self.profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return await self.client.ws_connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", max_msg_size=0)
            await asyncio.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    def __exit__(self, *_) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait(timeout=20)
        self.profile.cleanup()

    def open(self, url: str, dark: bool = False, width: int = 1280) -> Page:
        """Open a page, which tells by `<html data-ready>` that it is drawn; see `Page.look` for the rest."""
        target = self.call(None, "Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call(None, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.call("Network.enable")
        page.look(dark, width)
        page.call("Page.navigate", url=url)
        page.until("document.documentElement?.dataset.ready === 'true'")
        return page

    def call(self, page: Page | None, method: str, **params) -> dict:
        return self.loop.run_until_complete(self._call(page, method, params))

    async def _call(self, page: Page | None, method: str, params: dict) -> dict:
        session = {"sessionId": page.session} if page else {}
        await self.socket.send_json({"id": 1, "method": method, "params": params, **session})
        while True:
            answer = await self.socket.receive_json(timeout=TIMEOUT_S)
            if page and answer.get("method") == "Network.requestWillBeSent":
                page.requested.append(answer["params"]["request"]["url"][:200])
            if answer.get("id") == 1:
                assert "error" not in answer, (method, answer)
                return answer["result"]


class Page:
    """A page in a tab of its own. `requested` holds the addresses it asked for."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session
        self.requested: list[str] = []

    def call(self, method: str, **params) -> dict:
        return self.browser.call(self, method, **params)

    def ask(self, script: str):
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.ask(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)

    def look(self, dark: bool = False, width: int = 1280, height: int = 900, media: str = "screen") -> None:
        """Be a reader who prefers a dark page, and whose window has so many pixels; a narrow one is a phone's."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        is_phone = width < PHONE_PIXELS
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        size = {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=is_phone)

    def picture(self, path: Path, dark: bool = False, width: int = 1280) -> None:
        """Leave a picture of the whole page as a PNG."""
        self.look(dark, width, self.ask("document.documentElement.scrollHeight"))
        time.sleep(0.7)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
