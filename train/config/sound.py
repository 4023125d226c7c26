"""The sound part of a config that has problems, so that what does not go together is told in the same message.

A rule reads the config as always; a key that has a problem of its own cannot be judged further, and whoever reads it
is stopped by `Unsound`. No value is invented in its place.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, Union


class Unsound(Exception):
    """A rule has read a key that holds nothing it could judge."""


class Sound:
    """A section as its rules read it: attributes are its keys, and those in `unsound` raise Unsound."""

    def __init__(self, section: Any, unsound: Set[str], key: str) -> None:
        self._section, self._unsound, self._key = section, unsound, key

    def __getattr__(self, name: str) -> Any:
        full = f"{self._key}.{name}" if self._key else name
        value = getattr(self._section, name)
        items = [f"{full}[{n}]" for n in range(len(value))] if isinstance(value, list) else (
            [f"{full}.{n}" for n in value] if isinstance(value, dict) else [])  # fmt: skip
        if not self._unsound.isdisjoint((full, *items)):
            raise Unsound(full)
        return _wrapped(value, self._unsound, full)


def _wrapped(value: Any, unsound: Set[str], key: str) -> Any:
    if dataclasses.is_dataclass(value):
        return Sound(value, unsound, key)
    if isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
        return [_wrapped(one, unsound, f"{key}[{number}]") for number, one in enumerate(value)]
    if isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
        return {name: _wrapped(one, unsound, f"{key}.{name}") for name, one in value.items()}
    return value


def sound_part(schema: type, found: dict[str, Any], unsound: Set[str]) -> Sound:
    """What `found` holds of `schema`, defaults for the rest, raising Unsound where it is asked for a key in `unsound`."""
    return Sound(_built(schema, found, "", unsound), unsound, "")


def _built(hint: Any, value: Any, key: str, unsound: Set[str]) -> Any:
    """`value` as the annotation wants it; what is unsound stays as it is and is never read."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if key in unsound:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        known = {name: _built(hints[name], inner, f"{key}.{name}" if key else name, unsound)
                 for name, inner in value.items() if name in hints}  # fmt: skip
        return typing.cast(type, hint)(**known)
    if origin in (Union, types.UnionType):
        section = next((one for one in arguments if dataclasses.is_dataclass(one)), None)
        return value if section is None or not isinstance(value, dict) else _built(section, value, key, unsound)
    if origin is dict and isinstance(value, dict):
        return {name: _built(arguments[1], inner, f"{key}.{name}", unsound) for name, inner in value.items()}
    if origin is list and isinstance(value, list):
        return [_built(arguments[0], inner, f"{key}[{number}]", unsound) for number, inner in enumerate(value)]
    return tuple(value) if origin is tuple and isinstance(value, list) else value


def judged(config: Any, rules: Iterable[Callable[[Any], str | None]]) -> Iterator[str]:
    """The sentences of all rules that find something wrong; a rule that reads an unsound key finds nothing."""
    for rule in rules:
        try:
            sentence = rule(config)
        except Unsound:
            continue
        if sentence is not None:
            yield sentence


def told_by(rules: Callable[[Any], Iterable[str]], config: Any) -> Iterator[str]:
    """What a set of rules tells, up to where it needs a section that is unsound as a whole."""
    try:
        yield from rules(config)
    except Unsound:
        return


# A key that only one kind of config has: one sentence is better than a refusal of every key in the file.
_OTHER_KINDS = {
    "sources": "a dataset config, which scripts/prepare.py takes", "sampler": "a prompts file, which sampling.prompts names",
    "optimizer": "a stage config, which train/run.py, plan.py and recipe.py take",
}  # fmt: skip


def other_kind(schema: type, found: Any) -> str | None:
    """What a config is that was given in the place of another kind; None for one of its own."""
    fields = {field.name for field in dataclasses.fields(schema)}
    for mark, kind in _OTHER_KINDS.items():
        if isinstance(found, dict) and mark in found and mark not in fields:
            return f"this is {kind}: key {mark} is none of those that this command reads ({', '.join(sorted(fields))})"
    return None
