"""What a dataset's steps set aside and why: counts by step and reason, then every picture with its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt

HARD_RULES = ("R1", "R2")  # messages of the hard exclusions: counted, never listed


def report(folder: Path, step: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """JSON-ready. Raises Halt: USAGE for a step or reason that nothing was set aside by, MISMATCH for another folder."""
    rows = _rows(folder)
    for option, value, column in (("--step", step, "step"), ("--reason", reason, "reason")):
        there = sorted({row[column] for row in rows})
        if value is not None and value not in there:
            raise Halt(ExitCode.USAGE, f"{option} {value}: nothing was set aside so; there is {', '.join(there) or 'nothing'}")
    shown = [row for row in rows if step in (None, row["step"]) and reason in (None, row["reason"])]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(shown, key=lambda row: (row["kind"] != "error", row["step"], row["reason"])):
        groups.setdefault((row["step"], row["kind"], row["reason"]), []).append(row)
    return {
        "path": str(folder), "set_aside": len(shown),
        "groups": [
            {"step": place[0], "kind": place[1], "reason": place[2], "count": len(mine), "entries": _entries(mine)}
            for place, mine in groups.items()
        ],
    }  # fmt: skip


def _rows(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise Halt(ExitCode.USAGE, f"{folder} is no folder")
    path = folder / "quarantine.parquet"
    if not path.is_file():
        if (folder / "records" / "manifest.json").is_file():
            return []
        raise Halt(ExitCode.MISMATCH, f"{folder} is not a prepared dataset (no quarantine.parquet): run scripts/prepare.py")
    try:
        return list(pq.read_table(path, columns=["key", "step", "kind", "reason", "message"]).to_pylist())
    except (OSError, pa.ArrowInvalid) as error:
        raise Halt(ExitCode.MISMATCH, f"{path} cannot be read ({error}): run scripts/prepare.py report") from error


def _entries(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Key: message, of those that may be named."""
    found: dict[str, str] = {}
    for row in rows:
        if row["message"] not in HARD_RULES:
            before = found.get(row["key"])
            found[row["key"]] = f"{before}; {row['message']}" if before else row["message"]
    return found
