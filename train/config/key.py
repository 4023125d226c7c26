"""A key of a config: default, range, meaning and what a resume may do with it, on one line where it is declared.

    keep: int = key(2, "checkpoints kept beside the permanent ones", at_least=2, resume="free")

The schema stays OmegaConf's dataclasses; what is said here stands in the field's metadata, and everything that
speaks of keys reads it there: the refusals, the resume, `scripts/show.py keys` and `docs/keys.md`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING

# free: the result cannot change. warn: its bits or its length may, the run goes on. refuse: it would be another run.
Resume = Literal["free", "warn", "refuse"]


@dataclass(frozen=True)
class Key:
    """What is said about one key. Bounds hold for every number of the value; None = none on that side."""

    meaning: str
    resume: Resume
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None

    def range(self) -> str:
        """The bounds in words, such as `at least 1` or `in [0, 1)`; empty where there are none."""
        low, high = (self.at_least if self.above is None else self.above), (self.at_most if self.below is None else self.below)
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{_number(low)}, {_number(high)}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {_number(low)}"
        return "" if high is None else f"{'at most' if self.below is None else 'below'} {_number(high)}"

    def holds(self, number: float) -> bool:
        """Whether a finite number lies within the bounds."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def key(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    resume: Resume = "refuse",
) -> Any:
    """A dataclass field with its `Key`. `default`: a value, MISSING (the user decides), or what makes it (`list`).

    `resume` is what a checkpoint's stage says of the key; it means nothing for dataset.yaml and prompts.yaml.
    """
    metadata = {"key": Key(meaning, resume, at_least, above, at_most, below)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> Key | None:
    """The `Key` of a field; None for a section, which is described by its own class."""
    found: Key | None = field.metadata.get("key")
    return found


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value where nobody sets the key; MISSING where somebody must."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def range_problems(said: Key, value: Any, name: str) -> Iterator[str]:
    """One sentence for every number of `value` that is not finite or out of the key's range."""
    many = isinstance(value, list | tuple | dict)
    for number in (value.values() if isinstance(value, dict) else value) if many else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        told = f"{name} holds {number}, each" if many else f"{name} is {number},"
        if isinstance(number, float) and not math.isfinite(number):
            yield f"{told} must be finite"
        elif not said.holds(number):
            yield f"{told} must be {said.range()}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
