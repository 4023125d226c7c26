"""A stand-in for the process that talks to a tracking service."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from train.observe import outlets


def fake_child(monkeypatch: pytest.MonkeyPatch, *programs: str) -> list[str]:
    """Outlet processes run `programs`, one after the other; returns the wandb modes asked for."""
    asked: list[str] = []

    def start(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
        program = programs[min(len(asked), len(programs) - 1)]
        asked.append(settings["wandb"])
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert child.stdin is not None
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        return child

    monkeypatch.setattr(outlets, "_start_child", start)
    return asked
