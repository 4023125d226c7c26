"""What training is given: a caption as the networks get it, where an image lands, what a set is and what it set aside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.config import source_rules
from train.data.index import Index
from train.recipe import captions, rng
from train.recipe.buckets import CropCondition, assign_among, crop_condition, place, tables_of

if TYPE_CHECKING:
    from train.model.text import Overflow, TagTokenizer

MODES: tuple[CropCondition, ...] = ("actual", "kohya", "zero")
HARD_RULES = ("R1", "R2")  # messages of the hard exclusions: counted, never listed
_SHOWN = ("name", "schema_version", "fingerprint", "policy_hash", "hard_exclusion_version", "latents", "tables", "separator",
          "sources", "remarks")  # fmt: skip


def tokenizers_in(folder: Path | None) -> TagTokenizer:
    """Tokenizers of a folder with tokenizer/ and tokenizer_2/, or of one tokenizer folder; None = the shipped ones."""
    from train.model import text  # with torch, which the other reports do without

    if folder is None or (folder / "tokenizer").is_dir():
        return text.load_tag_tokenizer(folder)
    return text.TagTokenizer(text.load_tokenizer(folder))


def caption(
    text: str, tokenizers: Path | None, *, draws: int = 0, separator: str = captions.SEPARATOR, max_tokens: int = 225,
    overflow: Overflow = "tag", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Tags, ids per chunk and what does not fit: as written, and as shuffled in the epochs 0 .. draws-1 of an image of that name."""
    if (problem := source_rules.separator_problem(separator)) is not None:
        raise Halt(ExitCode.USAGE, f"--separator is {separator!r}: {problem}")
    if draws < 0:
        raise Halt(ExitCode.USAGE, f"--draws is {draws}, must be at least 0")
    if (found := len(captions.parts(text, separator)) - 1) > 1:  # as at ingest: the rest would leak into a tag
        raise Halt(ExitCode.USAGE, f"the caption holds {found} separators {separator}: one at most")
    fixed, flex = captions.split(text, separator)
    tokenizer = tokenizers_in(tokenizers)

    def encoded(fixed: Sequence[str], flex: Sequence[str]) -> dict[str, Any]:
        tags = [*fixed, *flex]
        ids, lost = tokenizer.fit(fixed, flex, max_tokens, overflow)
        ids_1, ids_2 = tokenizer.chunk_ids(ids, max_tokens)
        return {
            "text": captions.join(tags), "tokens": len(tokenizer.content_ids(tags)), "tokens_kept": len(ids),
            "tags_cut": tags[len(tags) - lost :], "encoder_1": ids_1.tolist(), "encoder_2": ids_2.tolist(),
        }  # fmt: skip

    def drawn(epoch: int) -> tuple[Sequence[str], Sequence[str]]:
        return captions.draw(fixed, flex, captions.DrawOptions(), seed=seed, uid=rng.uid_of(text), epoch=epoch, update=0)

    return {
        "caption": text, "fixed": fixed, "flex": flex, **encoded(fixed, flex),
        "draws": [{"epoch": epoch, **encoded(*drawn(epoch))} for epoch in range(draws)],
    }  # fmt: skip


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
