"""A headless Chromium, driven over the WebDriver protocol with nothing but the standard library."""

import base64
import contextlib
import csv
import io
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]

_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
)


class Browser:
    """`with Browser() as browser: browser.open(path)`; `browser.run(script, *arguments)` returns what it returns."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._address = f"http://127.0.0.1:{port}"
        self._session = ""
        options = {
            "binary": shutil.which("chromium"),
            "args": [*_SWITCHES, f"--user-data-dir={self._home.name}"],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(100):
            try:
                answer = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
                break
            except urllib.error.URLError:  # not listening yet
                time.sleep(0.1)
        else:
            self._driver.kill()
            raise RuntimeError("chromedriver does not answer")
        self._session = f"/session/{answer['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._ask("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._home.cleanup()

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._address + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        # no proxy of the environment may come between
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path | str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": page.as_uri() if isinstance(page, Path) else page})

    def run(self, script: str, *arguments: Any) -> Any:
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Until the script returns something true, which is returned."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds} s: {script}; console: {self.console()}")
            time.sleep(0.05)
        return found

    def devtools(self, command: str, **parameters: Any) -> Any:
        path = f"{self._session}/goog/cdp/execute"
        return self._ask("POST", path, {"cmd": command, "params": parameters})

    def size(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def theme(self, name: str) -> None:
        """What the system prefers: "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def press(self, key: str, **more: Any) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.devtools("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **more)
        self.devtools("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.devtools("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        picture = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))

    def console(self) -> list[str]:
        """What the page logged since the last call."""
        entries = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]


@contextlib.contextmanager
def opened(browser: Browser, report: Path) -> Iterator[None]:
    """A report is drawn, what it saves is kept for ``exported``, and it logs nothing to the end."""
    browser.console()
    browser.size(1280, 900)
    browser.theme("light")
    browser.open("about:blank")
    browser.open(report)
    browser.wait("return document.querySelector('main .page')")
    browser.run(
        "window.saved = []; document.addEventListener('gatewright-saved', (event) => window.saved.push(event.detail))"
    )
    yield
    assert browser.console() == []


def click(page: Browser, selector: str) -> None:
    page.run("document.querySelector(arguments[0]).click()", selector)


def text(page: Browser, selector: str) -> str:
    return page.run("return document.querySelector(arguments[0]).textContent", selector)


def exported(page: Browser, kind: str, figure: str) -> bytes:
    """What a figure's button saves."""
    page.run("window.saved.length = 0; window.content = null")
    click(page, f'[data-{kind}="{figure}"]')
    return base64.b64decode(
        page.wait(
            """if (!window.saved.length) return null;
            if (window.content) return window.content;
            const reader = new FileReader();
            reader.onload = () => { window.content = reader.result.split(",")[1]; };
            reader.readAsDataURL(window.saved[0].blob);
            return null"""
        )
    )


def rows(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))
