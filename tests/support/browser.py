"""Drives a headless Chromium through its debugging pipe; the standard library is enough."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest


def find_chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


def _pipe() -> tuple[int, int]:
    low = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low]
    for end in low:
        os.close(end)
    return ends[0], ends[1]


class Browser:
    """One page of a headless Chromium. `requests` lists every address the page asked for, `errors` every line on its console."""

    def __init__(self, profile: Path) -> None:
        # Above 9: where nothing else is open they would be 3 and 4 themselves, which the shell takes for Chromium's.
        (here_read, its_write), (its_read, here_write) = _pipe(), _pipe()
        arguments = [find_chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                     "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
                     "--window-size=1400,1500"]  # fmt: skip
        # Chromium reads commands from descriptor 3 and answers on 4; the shell puts the pipes there.
        line = f'exec "$@" 3<&{its_read} 4>&{its_write} {its_read}<&- {its_write}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", line, "bash", *arguments], pass_fds=(its_read, its_write), stderr=subprocess.DEVNULL
        )
        os.close(its_read)
        os.close(its_write)
        self._read, self._write, self._buffer, self._number = here_read, here_write, b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        return self._call(method, parameters, session=self._session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression (promises awaited)."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 180.0) -> Any:
        """Ask until the expression is true; fails with the page's text after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):  # between two pages there is none to ask
                if value := self.evaluate(expression):
                    return value
            time.sleep(0.2)
        pytest.fail(f"{expression} never came true; the page says: {self.evaluate('document.body.innerText')}")

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)

    def _call(self, method: str, parameters: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self, timeout_s: float = 180.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(self._read, 1 << 16) if ready else b""
            assert piece, "the browser does not answer"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        details = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        if message.get("method") == "Log.entryAdded":
            self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
        if message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in details["args"]))
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(details["exceptionDetails"].get("exception", {}).get("description")))
        return message
