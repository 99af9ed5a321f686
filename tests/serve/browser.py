"""Drives Chromium over the WebDriver protocol. This needs no package besides the browser and its driver."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from serve.http_peers import wait_until

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One browser window."""

    def __init__(self, http: httpx2.Client, session: str) -> None:
        self._http, self._base = http, f"/session/{session}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        got = self._http.request(method, self._base + path, json=body if method == "POST" else None)
        assert got.status_code == 200, got.text
        return got.json()["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, and return its result."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def wait_for(self, selector: str, text: str) -> None:
        """Wait until an element's text contains `text`."""
        wait_until(lambda: text in self.text(selector), 20)

    def _element(self, selector: str) -> str:
        return str(self._call("POST", "/element", using="css selector", value=selector)[_ELEMENT])

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self._element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        found = self._element(selector)
        self._call("POST", f"/element/{found}/clear")
        self._call("POST", f"/element/{found}/value", text=text)

    def value(self, selector: str) -> str:
        """The value of a form control."""
        return str(self.run("return document.querySelector(arguments[0]).value", selector))

    def choose(self, selector: str, value: str) -> None:
        """Choose the option of a list that has this value."""
        script = (
            "return [...document.querySelector(arguments[0]).options].findIndex((each) => each.value === arguments[1])"
        )
        found = self._element(f"{selector} option:nth-child({self.run(script, selector, value) + 1})")
        self._call("POST", f"/element/{found}/click")

    def errors(self) -> list[str]:
        """The errors in the browser's log."""
        found = self._call("POST", "/se/log", type="browser")
        return [each["message"] for each in found if each["level"] == "SEVERE"]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))


@contextmanager
def chromium(profile: Path, *, width: int = 1200, height: int = 1100) -> Iterator[Browser]:
    """Run a headless browser with a new profile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", f"--window-size={width},{height}",
    ]  # fmt: skip
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, env={**os.environ})
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            wait_until(lambda: _ready(http), 30)
            options = {"binary": CHROMIUM, "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            got = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in got, got
            try:
                yield Browser(http, got["sessionId"])
            finally:
                http.delete(f"/session/{got['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(10)


def _ready(http: httpx2.Client) -> bool:
    try:
        return bool(http.get("/status").json()["value"]["ready"])
    except httpx2.HTTPError:
        return False
