"""A headless Chromium, driven over two pipes by the DevTools protocol: no driver, no port.

``--remote-debugging-pipe`` makes the browser read commands from descriptor 3 and write answers and
events to descriptor 4, each a JSON text that ends in a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """The browser's path: $MEGAMOE_CHROMIUM, or the first of :data:`NAMES` on the path."""
    path = os.environ.get("MEGAMOE_CHROMIUM")
    return path or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser with one page. Use as a context manager."""

    def __init__(self, path: str, seconds: float = 60.0) -> None:
        self.path, self.seconds = path, seconds
        self.events: list[dict[str, Any]] = []
        """Everything the page reported since it was opened, oldest first."""
        self._rest = b""
        self._last = 0
        self._session = ""

    def __enter__(self) -> Chromium:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--hide-scrollbars",
        ]
        options += ["--no-first-run", "--disable-extensions", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={self._folder.name}", "--window-size=1280,900"]
        if os.geteuid() == 0:  # the sandbox refuses to run as root
            options.append("--no-sandbox")
        # The shell puts the pipes where the browser looks for them, whatever their numbers are.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, self.path, *options, "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        at: TracebackType | None,
    ) -> None:  # fmt: skip
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def open(self, path: Path) -> None:
        """Open a file from the disk and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: any(e["method"] == "Page.loadEventFired" for e in self.events))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; what it throws is an ``AssertionError``."""
        out = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def press(self, key: str, code: int = 0) -> None:
        """One key, as a keyboard sends it."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        code = code or {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    def media(self, media: str = "", scheme: str = "light") -> None:
        """Look at the page as paper (``print``) or in another colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])

    def width(self, pixels: int) -> None:
        """Make the window this wide."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1,
            mobile=False,
        )  # fmt: skip

    def screenshot(self, selector: str = "body") -> bytes:
        """A PNG of one element, however far down it is."""
        box = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return {x: r.x + scrollX, y: r.y + scrollY, "
            "width: r.width, height: r.height, scale: 1}; })()"
        )
        out = self.call("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        return base64.b64decode(out["data"])

    def pdf(self) -> bytes:
        """The page as it would be printed on A4."""
        out = self.call(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False
        )
        return base64.b64decode(out["data"])

    def complaints(self) -> list[str]:
        """Errors and warnings in the console, exceptions, and refusals by the page's own policy."""
        self.js("1")  # what came before this answer has been read
        out = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                out.append(str(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                out.append(str(params["args"]))
            elif event["method"] == "Log.entryAdded":
                out.append(params["entry"]["text"])
        return out

    def requests(self) -> list[str]:
        """Addresses that were asked for, besides pictures that stand in the page itself."""
        self.js("1")
        events = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        urls = [e["params"]["request"]["url"] for e in events]
        return [url for url in urls if not url.startswith("data:")]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        answer: list[dict[str, Any]] = []
        self._until(lambda: bool(answer), self._last, answer)
        assert "error" not in answer[0], (method, answer[0]["error"])
        result: dict[str, Any] = answer[0]["result"]
        return result

    def _until(
        self,
        is_met: Callable[[], bool],
        number: int = 0,
        answer: list[dict[str, Any]] | None = None,
    ) -> None:
        deadline = time.monotonic() + self.seconds
        while not is_met():
            rest = deadline - time.monotonic()
            if rest <= 0 or not select.select([self._in], [], [], rest)[0]:
                raise TimeoutError(f"the browser said nothing for {self.seconds:g} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError(f"the browser ended: exit status {self._process.wait(10)}")
            *messages, self._rest = (self._rest + data).split(b"\0")
            for message in map(json.loads, messages):
                if "method" in message:
                    self.events.append(message)
                elif message.get("id") == number and answer is not None:
                    answer.append(message)
