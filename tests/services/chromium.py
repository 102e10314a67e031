"""A Chromium without a window, driven over the DevTools protocol: pipes in and out, no library in between.

References: https://chromedevtools.github.io/devtools-protocol/. With --remote-debugging-pipe the browser reads commands
from descriptor 3 and writes answers and events to descriptor 4, as JSON that ends in a zero byte.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",  # which root may not have
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
)
# Puts the two pipes where the browser looks for them, wherever they were.
LAUNCHER = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE_SECONDS = 60  # for bugs only


class Chromium:
    """A browser with a fresh profile."""

    def __init__(self, binary: str, profile: Path) -> None:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        command = [sys.executable, "-c", LAUNCHER, str(theirs_read), str(theirs_write), binary]
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*command, *flags], pass_fds=(theirs_read, theirs_write), stdout=quiet, stderr=quiet
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self._in, self._out = ours_read, ours_write
        self._buffer = b""
        self._numbers = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile go to their pages."""
        self._numbers += 1
        number = self._numbers
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while number not in self._answers:
            assert time.monotonic() < deadline, f"no answer to {method}"
            self.listen(1.0)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return dict(answer["result"])

    def listen(self, seconds: float) -> None:
        """Take what comes, or wait for a while."""
        ready, _, _ = select.select([self._in], [], [], seconds)
        if not ready:
            return
        data = os.read(self._in, 1 << 20)
        assert data, "the browser has ended"
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif (page := self.pages.get(message.get("sessionId", ""))) is not None:
                page.events.append((message["method"], message["params"]))

    def open(self, *, width: int = 1500, height: int = 900, scheme: str = "dark") -> Page:
        """Return a new page, which tells of its console, its errors and its requests."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.scheme(scheme)
        return page

    def close(self) -> None:
        try:
            self.call("Browser.close")
        finally:
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._in)
            os.close(self._out)


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def scheme(self, name: str) -> None:
        """Prefer dark or light."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def go(self, url: str) -> None:
        """Begin to load an address."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, f"{url}: {failed}"

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until an expression is true, whatever is loaded meanwhile, and return it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if found := self.js(f"((found) => found instanceof Node || found)({expression})"):
                    return found
            except AssertionError:  # between two documents
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, f"never true: {expression}; {self.troubles()}"
            self._browser.listen(0.05)

    def key(self, name: str, code: int = 0, text: str = "") -> None:
        """Press a key."""
        more = {"text": text} if text else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Move, press or release the left button at a place of the window."""
        button = "none" if kind == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def urls(self) -> list[str]:
        """All addresses that were asked for."""
        self.js("0")  # events that are on their way come before this answer
        return [each["request"]["url"] for kind, each in self.events if kind == "Network.requestWillBeSent"]

    def troubles(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, refused loads."""
        self.js("0")
        found: list[str] = []
        for kind, each in self.events:
            if kind == "Runtime.consoleAPICalled" and each["type"] in ("error", "warning", "assert"):
                found.append(f"console: {each['args']}")
            elif kind == "Runtime.exceptionThrown":
                found.append(f"exception: {each['exceptionDetails']}")
            elif kind == "Log.entryAdded" and each["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {each['entry']['text']} {each['entry'].get('url', '')}")
        return found

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return b64decode(found["data"])

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.pages.pop(self._session, None)
