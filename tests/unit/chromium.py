"""A headless Chromium driven through a pipe: the Chrome DevTools Protocol, no package and no port.

With ``--remote-debugging-pipe`` the browser reads commands from descriptor 3 and answers on 4: JSON, each ended by NUL.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars", "--mute-audio",
    "--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 60.0
# Gives the browser its two descriptors: subprocess can pass them on, but not under other numbers.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A running browser; made by ``chromium``. Events that came in are in ``events``, oldest first."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result.

        Raises:
            RuntimeError: the browser refused it.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, method: str, session: str) -> dict[str, Any]:
        """The next event of this kind; those before it stay in ``events``, as it does."""
        while True:
            event = self._read()
            self.events.append(event)
            if event.get("method") == method and event.get("sessionId") == session:
                return event

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._answers, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser has gone" if ready else f"no answer in {PATIENCE_S:.0f} s")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def page(self, width: int = 1100, height: int = 900) -> Tab:
        """A new empty tab of this size in CSS pixels."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        tab.resize(width, height)
        return tab


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command to this page."""
        return self.browser.send(method, self.session, **params)

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, path: Path) -> None:
        """Load a file and wait for its ``load`` event."""
        self.send("Page.navigate", url=path.as_uri())
        self.browser.wait("Page.loadEventFired", self.session)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON knows it.

        Raises:
            RuntimeError: it threw.
        """
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """One key down and up, such as ``ArrowRight`` 39 or ``Enter`` 13 with the text ``\\r``."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def mouse(self, kind: str, x: float, y: float, *, down: bool = True) -> None:
        """``mousePressed``, ``mouseMoved`` or ``mouseReleased`` at a point of the window."""
        buttons = {"button": "left", "buttons": int(down)} if down or kind == "mouseReleased" else {}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=int(kind != "mouseMoved"), **buttons)

    def click(self, selector: str) -> None:
        """A click in the middle of the first element that matches, scrolled into view first."""
        box = self.box(selector)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y, down=False)

    def box(self, selector: str) -> dict[str, float]:
        """Where the first element that matches is in the window: x, y, width, height."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box: dict[str, float] = self.run(
            f"(({{x, y, width, height}}) => ({{x, y, width, height}}))({found}.getBoundingClientRect())"
        )
        return box

    def media(self, media: str = "", **features: str) -> None:
        """Emulate ``print``, or features such as ``prefers_color_scheme="dark"``."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", media=media, features=listed)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def close(self) -> None:
        """Give the tab back."""
        self.send("Page.close")

    def said(self) -> list[str]:
        """What the console and the log hold of this page: messages, exceptions, refusals of its policy."""
        lines = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                lines.append(json.dumps(event["params"]))
        return lines

    def asked_for(self) -> list[str]:
        """Addresses that this page has asked for, data in the page itself left out."""
        mine = [event for event in self.browser.events if event.get("sessionId") == self.session]
        sent = [event["params"]["request"]["url"] for event in mine if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile; the test is skipped where there is none.

    Args:
        profile: an empty folder.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    command = [sys.executable, "-S", "-E", "-c", _LAUNCH, str(its_in), str(its_out)]
    command += [program, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=(its_in, its_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    os.close(its_in)
    os.close(its_out)
    browser = Browser(our_out, our_in)
    try:
        yield browser
        browser.send("Browser.close")
    finally:
        os.close(our_out)
        os.close(our_in)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
