"""A real browser for pages that we write: Chromium without a window, spoken to through a pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "about:blank",
)


def find_browser() -> str:
    """Return the path of a Chromium. Where there is none, which no Python package brings, the test is skipped."""
    found = next((found for name in NAMES if (found := shutil.which(name))), None)
    return found or pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")


class Page:
    """One tab. `console` holds what the page complained of: errors, warnings, and what its policy has blocked."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._number, self._session = 0, ""
        self.console: list[str] = []
        self._events: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, place: Path | str, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Show a file or a URL as a screen of that width would, and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.ask("Page.navigate", url=place if isinstance(place, str) else place.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression in the page is true, and return its value."""
        give_up = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < give_up, f"not within {seconds:g} s: {script}; the page said {self.console}"
            time.sleep(0.05)
        return value

    def point_at(self, selector: str, across: float = 0.5, down: float = 0.5) -> list[float]:
        """Scroll to an element, and move the mouse to a place in it; returns where that is."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            f" const b = e.getBoundingClientRect();"
            f" return [b.left + {across} * b.width, b.top + {down} * b.height]; }})()"
        )
        for dx in (-3, 0):
            self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx, y=y)
        return [x, y]

    def drag(self, selector: str, start: float, end: float) -> None:
        """Move the mouse across an element with its button down."""
        for across, kind in ((start, "mousePressed"), (end, "mouseReleased")):
            x, y = self.point_at(selector, across)
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key of the name that JavaScript gives it."""
        codes = {"Tab": 9, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        known = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **known)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, down to its end if `whole`."""
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        message = json.loads(data)
        method, params = message.get("method"), message.get("params", {})
        if method:
            self._events.append(method)
        if method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.console.append(json.dumps(params))
        return message


@contextlib.contextmanager
def browser_page(browser: str) -> Iterator[Page]:
    """A tab of a browser of its own, with a profile of its own."""
    browser_in, to_browser = os.pipe()
    from_browser, browser_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def as_3_and_4() -> None:  # where Chromium looks for its pipe
            for number, end in enumerate([fcntl.fcntl(e, fcntl.F_DUPFD, 10) for e in (browser_in, browser_out)], 3):
                os.dup2(end, number)

        process = subprocess.Popen(
            [browser, *_FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=as_3_and_4,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(browser_in)
        os.close(browser_out)
        try:
            yield Page(to_browser, from_browser)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
