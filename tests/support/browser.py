"""A real browser, driven over the Chrome DevTools Protocol: https://chromedevtools.github.io/devtools-protocol/."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 30
_LISTENING = "DevTools listening on "


def program() -> str | None:
    """Return where a browser is, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def launched(command: str, profile: Path) -> Iterator["Browser"]:
    """Start a browser without a window, whose files are in `profile`; it ends with the block."""
    # As root, as in a container, Chromium starts without its sandbox or not at all.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    options = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", "--no-first-run"]
    with subprocess.Popen(
        [command, *options, *sandbox, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            with connect(_address(process), max_size=None, open_timeout=DEADLINE_S) as socket:
                yield Browser(socket)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr
    lines: list[str] = []
    while not (line := process.stderr.readline()).startswith(_LISTENING):
        lines.append(line)
        assert line, "".join(lines)
    return line.removeprefix(_LISTENING).strip()


class Browser:
    """A browser with one page. What the page fetched and what went wrong on it is kept.

    Attributes:
        requested: every address that the page asked for.
        complaints: what the browser logged: errors, exceptions, violations of the page's own policy.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number, self._session, self._loaded = 0, "", False
        self.requested: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded, with nothing kept of the one before."""
        self.requested.clear()
        self.complaints.clear()
        self._loaded = False
        self._call("Page.navigate", url=url)
        while not self._loaded:
            self._note(json.loads(self._socket.recv(DEADLINE_S)))

    def evaluate(self, expression: str) -> Any:
        """Return what JavaScript says on the page, once its promise is kept."""
        result = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Wait until JavaScript says something that is true, and return it."""
        ends = time.monotonic() + DEADLINE_S
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < ends, f"{expression} was never true; {self.complaints}"
            time.sleep(0.02)
        return value

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (received := json.loads(self._socket.recv(DEADLINE_S))).get("id") != self._number:
            self._note(received)
        assert "error" not in received, received
        return dict(received["result"])

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Page.loadEventFired":
            self._loaded = True
        kept: dict[str, Callable[[Any], None]] = {
            "Network.requestWillBeSent": lambda of: self.requested.append(of["request"]["url"]),
            "Log.entryAdded": lambda of: self.complaints.append(f"{of['entry']['text']} {of['entry'].get('url')}"),
            "Runtime.exceptionThrown": lambda of: self.complaints.append(str(of["exceptionDetails"])),
        }
        if note := kept.get(event.get("method", "")):
            note(event["params"])
