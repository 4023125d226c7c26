"""What a prepared dataset is: fingerprints, counts and buckets of every stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.data.index import Index


def report(folder: Path) -> dict[str, Any]:
    """JSON-ready. Raises Halt(MISMATCH) for a folder that is not prepared or whose index is stale."""
    state = read_json(folder / "dataset.json")
    if state is None:
        raise Halt(
            ExitCode.MISMATCH, f"{folder} is not a prepared dataset (no dataset.json): run scripts/prepare.py all"
        )
    stages = {path.stem.removeprefix("index_") for path in folder.glob("index_*.arrow")}
    shown = ("name", "schema_version", "fingerprint", "policy_hash", "hard_exclusion_version", "latents", "tables",
             "separator", "sources", "remarks")  # fmt: skip
    return {
        **{name: state[name] for name in shown if name in state},
        "stages": {stage: _stage(folder, stage, state) for stage in sorted(stages)},
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def _stage(folder: Path, stage: str, state: dict[str, Any]) -> dict[str, Any]:
    index = Index.open(folder, stage)
    buckets = Counter(zip(index.bucket_w.tolist(), index.bucket_h.tolist(), strict=True))
    selected = state.get("select", {}).get(stage, {})
    return {
        "images": len(index),
        "fingerprint": index.fingerprint,
        "selection_hash": index.selection_hash,
        "after_each_filter": {str(name): int(count) for name, count in selected.get("counts", [])},
        "buckets": {f"{w}x{h}": count for (w, h), count in sorted(buckets.items())},
        "merged_buckets": selected.get("merged", {}),
    }
