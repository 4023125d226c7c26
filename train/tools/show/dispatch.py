"""Behind scripts/show.py: which tool answers, imported when it is asked for, and printing what it says."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

INLINE_CHARACTERS = 100  # a list or object that fits is shown on one line


def report_of(a: argparse.Namespace) -> dict[str, Any]:
    """The report of one subcommand, JSON-ready. Raises Halt."""
    match a.what:
        case "caption":
            from train.tools.show import caption

            options = {"separator": a.separator, "max_tokens": a.max_tokens, "overflow": a.overflow, "seed": a.seed}
            return caption.report(a.text, caption.load(a.tokenizers), draws=a.draws, **options)
        case "buckets":
            from train.tools.show import buckets

            return buckets.report(a.size, a.area_px, a.min_px, a.max_px, a.step_px)
        case "model":
            from train.tools.show import model

            return model.report(a.path)
        case "compare":
            from train.tools.show import compare

            return compare.report(a.a, a.b, a.base)
        case "dataset":
            from train.tools.show import dataset

            return dataset.report(a.path)
        case "quarantine":
            from train.tools.show import quarantine

            return quarantine.report(a.path, a.step, a.reason)
        case "keys":
            from train.tools.show import keys

            return keys.report(a.pattern)
        case "checkpoint":
            from train.tools.show import run

            return run.checkpoint(a.path)
        case _:
            from train.tools.show import run

            return run.step(a.path, a.update, recompute=a.recompute)


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
