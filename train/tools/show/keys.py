"""Every key of a stage, a dataset and a prompts file: default, range or choices, meaning, and what a resume may do.

All of it is read from the schema (`train/config/`), where each key is one line. `scripts/show.py keys --markdown`
writes `docs/keys.md`.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig
from train.config.prompts import PromptsFile
from train.config.schema import Found, describe, keys_of, plainly
from train.config.stage import StageConfig

ESCAPED = "\\|"  # a bar within a table's cell, in code too
FILES = (("stage", StageConfig), ("dataset", DatasetConfig), ("prompts", PromptsFile))
RESUME = {
    "free": "may change", "warn": "may change, with a warning: bits or length of the run differ",
    "refuse": "refused unless resume.accept names it",
}  # fmt: skip


def report(pattern: str | None = None) -> dict[str, Any]:
    """JSON-ready: file, then key, then what is said of it. `pattern`: a glob over keys, or a part of a key.

    Raises Halt(USAGE) for a pattern that no key fits.
    """
    found = {
        file: {key: _told(one, file) for key, one in keys_of(schema).items() if _fits(key, file, pattern)} for file, schema in FILES
    }
    if not any(found.values()):
        raise Halt(ExitCode.USAGE, f"no key fits {pattern!r}: give a part of its name, or a pattern such as '*.every_steps'")
    return {file: keys for file, keys in found.items() if keys}


def _fits(key: str, file: str, pattern: str | None) -> bool:
    return pattern is None or pattern in key or fnmatch.fnmatchcase(key, pattern) or fnmatch.fnmatchcase(f"{file}.{key}", pattern)


def _told(found: Found, file: str) -> dict[str, str]:
    told = {
        "default": "must be set" if found.default == MISSING else json.dumps(plainly(found.default), ensure_ascii=False),
        "values": f"{describe(found.hint)}{', ' if found.said.range() else ''}{found.said.range()}",
        "meaning": found.said.meaning,
    }
    return told | ({"resume": found.said.resume} if file == "stage" else {})


def markdown() -> str:
    """The page `docs/keys.md`."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Every key"
    yield ""
    yield "Made by `scripts/show.py keys --markdown > docs/keys.md` from `train/config/`; a test holds it, so change the key there."
    yield "In a name, `*` is yours to choose and `[]` an item of a list (`sources.0.adapter=x` on the command line)."
    yield "Resume says what a checkpoint does when the key has changed:"
    yield from (f"- `{name}`: {meaning}" for name, meaning in RESUME.items())
    for file, keys in report().items():
        columns = ["key", "default", "values", "meaning", *(["resume"] if file == "stage" else [])]
        yield from ("", f"## {file}.yaml", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
        for key, told in keys.items():
            default, *rest = told.values()
            cells = [f"`{key}`", f"`{default}`", *(text.replace("<", "&lt;") for text in rest)]
            yield f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"
