"""The record of scripts/quality.py: kept as JSON, printed as a table. No model is needed to read one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import replace_file

VERSION = 1
TITLES = {
    "aesthetic": "aesthetic score",
    "clip": "CLIP cosine",
    "clip_first": "own prompt nearest",
    "tag_recall": "tags seen of those asked",
    "tag_precision": "tags asked of those seen",
}


def write_quality(path: Path, record: Mapping[str, Any]) -> None:
    """The record as JSON. Raises Halt(CANNOT_WRITE)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"--out {path}: {error}") from error


def read_quality(path: Path, key: str = "--quality") -> dict[str, Any]:
    """What `write_quality` wrote; `key` of the command line names it. Raises Halt(USAGE) for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Halt(ExitCode.USAGE, f"{key} {path}: cannot be read ({error})") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise Halt(ExitCode.USAGE, f"{key} {path}: no record of scripts/quality.py, version {VERSION}")
    return record


def as_text(record: Mapping[str, Any]) -> str:
    """The table that the script prints."""
    lines = []
    for name, stage in record["stages"].items():
        lines.append(f"{name} ({stage['pictures']} pictures)")
        lines += [f"  {TITLES[key]:<26}{shown(one)}" for key, one in stage["statistics"].items()]
    for change in record["changes"]:
        lines.append(f"{change['from']} -> {change['to']} (same prompt and seed: {change['pictures']})")
        lines += [f"  {TITLES[key]:<26}{shown(one, signed=True)}" for key, one in change["statistics"].items()]
    return "\n".join(lines)


def shown(one: Mapping[str, Any], *, signed: bool = False, digits: int = 3) -> str:
    """An estimate as `0.734 [0.701, 0.765]`; a dash for nothing."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    value, low, high = one["value"], one["low"], one["high"]
    if value is None:
        return "–"
    told = form.format(value) + (f" [{form.format(low)}, {form.format(high)}]" if low is not None else "")
    return told.replace("-", "−")
