"""Values of another trainer's config: numbers and booleans, also written as text, and errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from train.base.errors import ExitCode, Halt

WORDS = {"true": True, "false": False}


def number(value: Any) -> int | float | None:
    """A finite number from TOML or from text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(found):
        return None
    exact = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
    return int(value) if exact else found


def whole(theirs: Mapping[str, Any], key: str, least: int, default: int, where: str = "") -> int:
    """A whole number of the TOML. Raises Halt(USAGE) naming the key."""
    value = theirs.get(key)
    if value is None or value == "":
        return default
    found = number(value)
    if found is None or found != int(found) or found < least:
        raise Halt(ExitCode.USAGE, f"{where}{key} is {value!r}, must be a whole number of at least {least}")
    return int(found)


def switch(value: Any) -> Any:
    """True or false where they are written as text; anything else as it is."""
    return WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
