"""A real headless Chromium, driven over WebDriver (W3C) with plain HTTP: only what a person could do."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import httpx

from scripts.lab.child import Child, free_port, listens

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key by which WebDriver names an element
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "Left": "\ue012", "Right": "\ue014", "Shift": "\ue008", "Space": " "}
_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--ignore-certificate-errors",
]


class Browser:
    """One window; `close` ends browser and driver."""

    def __init__(self, folder: Path, *, width: int = 1440, height: int = 900) -> None:
        port = free_port()
        driver = shutil.which("chromedriver") or "/usr/bin/chromedriver"
        self._child = Child("chromedriver", [driver, f"--port={port}"], log=folder / "chromedriver.log")
        self._child.wait_ready("chromedriver", lambda: listens(port))
        arguments = [*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self._session = ""
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        """Loads a page and waits for it."""
        self._ask("POST", "/url", {"url": url})

    @property
    def url(self) -> str:
        return str(self._ask("GET", "/url"))

    def text(self, selector: str = "body") -> str:
        """Returns the visible text of the first element that matches."""
        return str(self._ask("GET", f"/element/{self._find(selector)}/text"))

    def script(self, code: str) -> Any:
        """Returns what a script in the page returns."""
        return self._ask("POST", "/execute/sync", {"script": code, "args": []})

    def press(self, *keys: str, held: str = "") -> None:
        """Types on the keyboard: names of KEYS, or text, key by key; `held` is held down meanwhile."""
        letters = [letter for key in keys for letter in ([KEYS[key]] if key in KEYS else key)]
        actions = [{"type": kind, "value": letter} for letter in letters for kind in ("keyDown", "keyUp")]
        if held:
            actions = [{"type": "keyDown", "value": KEYS[held]}, *actions, {"type": "keyUp", "value": KEYS[held]}]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def screenshot(self, path: Path) -> None:
        """Writes what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        """Ends the browser, then its driver."""
        self._ask("DELETE", "")
        self._http.close()
        self._child.stop()

    def _find(self, selector: str) -> str:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[ELEMENT])

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._http.request(method, self._session + path, json=body)
        value = answer.json()["value"]
        if answer.is_error:
            raise RuntimeError(f"{method} {path}: {value['message']}")
        return value
