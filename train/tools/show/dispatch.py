"""Behind scripts/show.py: which tool answers, imported when it is asked for, and printing what it says."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

INLINE_CHARACTERS = 100  # a list or object that fits is shown on one line


ROOMS = {  # subcommand: who answers, with its arguments by their names
    **{name: f"inputs.{name}" for name in ("buckets", "dataset", "quarantine")}, "model": "model.report", "caption": "caption.report",
    "compare": "compare.report", "keys": "keys.report", "checkpoint": "run.checkpoint", "step": "run.step",
}  # fmt: skip


def report_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of one subcommand, JSON-ready. Raises Halt."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("what", "json", "markdown")}
    room, _, name = ROOMS[arguments.what].partition(".")
    report: dict[str, Any] = getattr(importlib.import_module(f"train.tools.show.{room}"), name)(**options)
    return report


def show(report: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one JSON object, or indented lines for people."""
    if as_json:
        # What files claim may be no JSON (NaN, infinity: told as text) or no Unicode (escaped).
        plainly = json.loads(json.dumps(report), parse_constant=str)
        text = json.dumps(plainly, ensure_ascii=False, allow_nan=False)
        told = text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(plainly)
    else:
        told = "\n".join(lines(report))
    print(told)


def lines(report: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """`key: value` lines; nested objects indented, long lists one entry a line. Control characters are escaped."""
    for key, value in report.items():
        inline = plain(value)
        if isinstance(value, Mapping | list | tuple) and value and len(inline) > INLINE_CHARACTERS:
            yield f"{indent}{plain(key)}:"
            if isinstance(value, Mapping):
                yield from lines(value, indent + "  ")
                continue
            for entry in value:
                if isinstance(entry, Mapping):
                    yield f"{indent}  -"
                    yield from lines(entry, indent + "    ")
                else:
                    yield f"{indent}  - {plain(entry)}"
        else:
            yield f"{indent}{plain(key)}: {inline}"


def plain(value: Any) -> str:
    """One line; what comes from files must not steer the terminal."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
