"""Stand-ins for the services that metrics are sent to."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import pytest

from train.observe import trackers


class Fake:
    """A tracker that keeps what it is sent, or fails in one way."""

    def __init__(self, fault: str = "", sent: list[Any] | None = None) -> None:
        self.fault, self.sent = fault, [] if sent is None else sent
        self._act("open")

    def write(self, message: Any) -> None:
        """Keep one message."""
        self._act("write")
        self.sent.append(message)

    def close(self) -> None:
        """The end."""
        self._act("close")
        self.sent.append("closed")

    def _act(self, where: str) -> None:
        if self.fault == f"{where}: exit":
            sys.exit(3)
        if self.fault == f"{where}: raise":
            raise ConnectionError("no key\nand a second line")
        if self.fault == f"{where}: hang":
            time.sleep(60)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, sent: list[Any], *faults: str) -> list[str]:
    """wandb is a `Fake`, with one of `faults` after the other; returns the modes asked for."""
    asked: list[str] = []

    def opened(settings: dict[str, Any], mode: str) -> Fake:
        asked.append(mode)
        return Fake(faults[min(len(asked), len(faults)) - 1] if faults else "", sent)

    monkeypatch.setattr(trackers, "Wandb", opened)
    monkeypatch.setattr(trackers, "kill_wandb", lambda: None)
    monkeypatch.setattr(trackers, "end_wandb", lambda: None)
    monkeypatch.setattr(trackers, "_import", lambda name: None)
    return asked


def services() -> list[psutil.Process]:
    """wandb's service processes of this process."""
    return [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
