"""What training is given: where an image lands, what a set is and what it set aside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.data.index import Index
from train.recipe.buckets import CropCondition, assign_among, crop_condition, place, tables_of

MODES: tuple[CropCondition, ...] = ("actual", "kohya", "zero")
HARD_RULES = ("R1", "R2")  # messages of the hard exclusions: counted, never listed
_SHOWN = ("name", "schema_version", "fingerprint", "policy_hash", "hard_exclusion_version", "latents", "tables", "separator",
          "sources", "remarks")  # fmt: skip


def buckets(size: str | None, area_px: int | Sequence[int], min_px: int, max_px: int, step_px: int) -> dict[str, Any]:
    """Bucket, resize, crop and the six numbers that the U-Net is told in each mode; without a size, the tables alone."""
    tables = tables_of(area_px, min_px, max_px, step_px)
    table = sorted({bucket for one in tables for bucket in one})
    if size is None:
        return {"buckets": [f"{width}x{height}" for width, height in table], "count": len(table)}
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", size.strip())
    if match is None or not (int(match[1]) and int(match[2])):
        raise Halt(ExitCode.USAGE, f"--size {size!r}: give width x height in px, e.g. 1500x2000")
    width, height = int(match[1]), int(match[2])
    found = place(width, height, assign_among(width, height, tables)[1])
    crops = {
        mode: crop_condition(mode, width, height, found.bucket_w, found.bucket_h, found.crop_top, found.crop_left)
        for mode in MODES
    }
    return {
        "size": f"{width}x{height}", "bucket": f"{found.bucket_w}x{found.bucket_h}",
        "resized": f"{found.resized_w}x{found.resized_h}", "crop_top": found.crop_top, "crop_left": found.crop_left,
        "kept": round(found.kept, 6), "original_hw": [height, width], "target_hw": [found.bucket_h, found.bucket_w],
        "crop_top_left": {mode: list(crop) for mode, crop in crops.items()},
        "time_ids": {  # text.size_vector, without torch
            mode: [height, width, top, left, found.bucket_h, found.bucket_w] for mode, (top, left) in crops.items()
        },
        "buckets": len(table),
    }  # fmt: skip


def dataset(path: Path) -> dict[str, Any]:
    """Fingerprints, counts and buckets of every stage. Raises Halt(MISMATCH) for a folder not prepared or with a stale index."""
    state = read_json(path / "dataset.json")
    if state is None:
        raise Halt(ExitCode.MISMATCH, f"{path} is not a prepared dataset (no dataset.json): run scripts/prepare.py all")
    stages = {}
    for stage in sorted(found.stem.removeprefix("index_") for found in path.glob("index_*.arrow")):
        index, selected = Index.open(path, stage), state.get("select", {}).get(stage, {})
        sizes = Counter(zip(index.bucket_w.tolist(), index.bucket_h.tolist(), strict=True))
        stages[stage] = {
            "images": len(index), "fingerprint": index.fingerprint, "selection_hash": index.selection_hash,
            "after_each_filter": {str(name): int(count) for name, count in selected.get("counts", [])},
            "buckets": {f"{w}x{h}": count for (w, h), count in sorted(sizes.items())},
            "merged_buckets": selected.get("merged", {}),
        }  # fmt: skip
    bytes_ = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {**{name: state[name] for name in _SHOWN if name in state}, "stages": stages, "bytes": bytes_}


def quarantine(path: Path, step: str | None = None, reason: str | None = None) -> dict[str, Any]:
    """What a set's steps set aside and why: counts by step and reason, then every picture with its message.

    Raises Halt: USAGE for a step or reason that nothing was set aside by, MISMATCH for another folder.
    """
    rows = _set_aside(path)
    for option, value, column in (("--step", step, "step"), ("--reason", reason, "reason")):
        there = sorted({row[column] for row in rows})
        if value is not None and value not in there:
            raise Halt(ExitCode.USAGE, f"{option} {value}: nothing was set aside so; there is {', '.join(there) or 'nothing'}")
    shown = [row for row in rows if step in (None, row["step"]) and reason in (None, row["reason"])]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(shown, key=lambda row: (row["kind"] != "error", row["step"], row["reason"])):
        groups.setdefault((row["step"], row["kind"], row["reason"]), []).append(row)
    return {
        "path": str(path), "set_aside": len(shown),
        "groups": [
            {"step": place[0], "kind": place[1], "reason": place[2], "count": len(mine), "entries": _entries(mine)}
            for place, mine in groups.items()
        ],
    }  # fmt: skip


def _set_aside(folder: Path) -> list[dict[str, Any]]:
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
