"""The configs that come with the code: configs/ of a checkout, `train/config/yaml/` where setup.py put it for an installation."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

INSTALLED = Path(__file__).with_name("yaml")


def folder() -> Path:
    """Where the shipped configs lie."""
    return INSTALLED if INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def find(path: str | Path) -> Path:
    """`path`, or the shipped config of that name (`ft1.yaml`, `configs/ft1.yaml`) where no such file exists; says once which.

    Result unchanged where neither exists, so that the message of who reads it names what the user wrote.
    """
    given = Path(path)
    parts = given.parts[1:] if given.parts[:1] == ("configs",) else given.parts
    if given.exists() or given.is_absolute() or not parts or ".." in parts:
        return given
    ours = folder().joinpath(*parts)
    if not ours.is_file():
        return given
    _say(str(given), str(ours))
    return ours


@functools.cache  # a file is read for its values and again for its text
def _say(given: str, ours: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"config {given}: no such file here, the shipped {ours} is taken", file=sys.stderr)
