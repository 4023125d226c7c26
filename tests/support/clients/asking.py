"""What the programs in this folder share. They run in a client's own Python, beside its own code: nothing of ours is imported.

`ask_X.py REQUEST ANSWER`: a JSON request in, a JSON answer out, arrays beside it as `.npz`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Heard(logging.Handler):
    """Keeps what a program logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def listen() -> Heard:
    """From now on everything that is logged."""
    heard = Heard()
    logging.getLogger().addHandler(heard)
    logging.getLogger().setLevel(logging.DEBUG)
    return heard


def request() -> dict[str, Any]:
    """What was asked."""
    return dict(json.loads(Path(sys.argv[1]).read_text()))


def answer(facts: dict[str, Any], arrays: dict[str, Any], out: str) -> None:
    """Write facts and arrays (tensors) for who asked."""
    np.savez(Path(out).with_suffix(".npz"), **{name: value.detach().float().cpu().numpy() for name, value in arrays.items()})
    Path(out).write_text(json.dumps(facts))
