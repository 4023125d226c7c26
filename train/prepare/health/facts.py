"""Numbers of the health report, from the tables alone: JSON-ready, the same for the same tables.

Hard-excluded records appear as counts per rule and word, nowhere by key and never with a picture.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.data.shards import ShardReader, read_meta
from train.prepare.choosing.facts import among
from train.prepare.choosing.merging import crop_losses
from train.prepare.choosing.weights import by_source, told
from train.prepare.health.captions import caption_facts
from train.prepare.probe import ok_files
from train.prepare.select import all_notes, selection_path, selection_visits, stored
from train.prepare.tables.progress import bar
from train.prepare.tables.refusals import SEEN_COLUMNS, refused_by
from train.prepare.tables.schemas import INDEX
from train.prepare.tables.units import read_table, stream_table
from train.prepare.tagging.policy import resolve
from train.recipe.tag_policy import Policy

Facts = dict[str, Any]
_READ_CHECK_ROWS = 2048  # latents read and checked in full; of the others place and size


def gather(settings: DatasetConfig) -> Facts:
    """All sections. Raises Halt(MISMATCH) naming the step whose table is missing."""
    dataset = dataset_dir(settings)
    stages = {stage: pq.read_table(selection_path(dataset, stage)) for stage in settings.select}
    index = pq.read_table(path) if (path := dataset / "index.parquet").exists() else INDEX.empty_table()
    sound = ok_files(settings, ["key", "width", "height", "ext_mismatch", "size_mismatch"])
    words = _label_words(resolve(settings.policy))
    keys = {stage: set(table.column("key").to_pylist()) for stage, table in stages.items()}
    sections: dict[str, Callable[[], Any]] = {
        "counts": lambda: _counts(settings, index),
        "hard_exclusions": lambda: _hard_exclusions(settings),
        "words": lambda: words,
        "balance": lambda: _balance(dataset, sound, stages, words),
        "tags": lambda: {stage: _tags(dataset, table) for stage, table in stages.items()},
        "buckets": lambda: {stage: _buckets(dataset, stage, table, sound) for stage, table in stages.items()},
        "crop": lambda: _crop(index),
        "captions": lambda: caption_facts(settings, stages),
        "duplicates": lambda: _duplicates(dataset),
        "overlap": lambda: {f"{a} and {b}": len(keys[a] & keys[b]) for a, b in itertools.combinations(keys, 2)},
        "sizes": lambda: _sizes(index, sound),
        "quarantine": lambda: _quarantine(dataset),
        "latents": lambda: _latents(dataset, index),
        "stale_files": lambda: _stale(dataset),
        "disk_bytes": lambda: _disk(dataset),
    }
    found: Facts = {}
    with bar(len(sections), "report: numbers", "sections") as shown:
        for name, make in sections.items():
            found[name] = make()
            shown.update()
    return found


def _counts(settings: DatasetConfig, index: pa.Table) -> Facts:
    dataset = dataset_dir(settings)
    records = read_table(dataset, "records", ["source", "hard_exclusion", "weight"])
    found = {entry["values"]: entry["counts"] for entry in pc.value_counts(records.column("source")).to_pylist()}
    refused = {
        reason: count for step, kind, reason, count in _quarantine(dataset)["counts"] if step == "ingest" and kind == "error"
    }
    return {
        "found": len(records) + sum(refused.values()),
        "refused": refused,
        "records": len(records),
        "by_source": dict(sorted(found.items())),
        "assume_rating": {source.name: source.assume_rating for source in settings.sources if source.assume_rating},
        "weights": {name: low if low == high else told(low, high) for name, (_, low, high) in by_source(settings, records).items()},
        "select": {stage: stored(dataset, stage)["counts"] for stage in settings.select},
        "visits": {stage: selection_visits(dataset, stage) for stage in settings.select},
        "mixed": {stage: stored(dataset, stage)["mixed"] for stage in settings.select},
        "notes": all_notes(dataset, settings.select),
        "corrections": json.loads((dataset / "dataset.json").read_text()).get("label", {}).get("corrections"),
        "flips": _flips(index) if settings.latents.flip == "all" else None,
        "index_rows": len(index),
        "index_images": len(pc.unique(index.column("key"))),
    }


def _flips(index: pa.Table) -> Facts:
    """Pictures with a mirror image, and those whose tags forbid one."""
    having, every = (len(pc.unique(part.column("key"))) for part in (index.filter(index.column("flip")), index))
    return {"pictures": having, "without": every - having}


def _hard_exclusions(settings: DatasetConfig) -> Facts:
    """{rule: {word: records}}: numbers only."""
    dataset = dataset_dir(settings)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for part in stream_table(dataset, "records", [*SEEN_COLUMNS, "hard_exclusion"]):
        for row in part.filter(pc.is_valid(part.column("hard_exclusion"))).to_pylist():
            match = refused_by(row, settings)
            found[row["hard_exclusion"]][match[1] if match else "text that the caption does not keep"] += 1
    return {rule: dict(sorted(words.items())) for rule, words in sorted(found.items())}


def _label_words(policy: Policy) -> dict[str, list[str]]:
    """The words of the set's vocabulary by kind, each kind in its order; a class without a word has none."""
    found = {
        "quality": policy.words.quality,
        "rating": [tags[0] for rating in "gsqe" if (tags := policy.words.rating.get(rating))],
        "year": [tag for tag, _, _ in policy.year_ranges],
        "aesthetic": policy.words.aesthetic,
    }
    return {kind: [word for word in dict.fromkeys(words) if word] for kind, words in found.items()}


def _balance(dataset: Path, sound: pa.Table, stages: dict[str, pa.Table], order: dict[str, list[str]]) -> Facts:
    """Per set of rows: counts of each special tag, and quality by rating and by year."""
    tables = {"all sound files": sound} | stages
    sets = {name: table.column("key").combine_chunks() for name, table in tables.items()}
    counts: dict[str, Counter[tuple[str | None, ...]]] = {name: Counter() for name in sets}
    for part in stream_table(dataset, "labels", ["key", "quality", "rating_tags", "year", "aesthetic"]):
        for name, keys in sets.items():
            rows = among(part, keys)
            ratings = [tags[0] if tags else None for tags in rows.column("rating_tags").to_pylist()]
            words = (rows.column(tag).to_pylist() for tag in ("quality", "year", "aesthetic"))
            counts[name].update(zip(*words, ratings, strict=True))
    result: Facts = {}
    for name, found in counts.items():
        single: dict[str, Counter[str | None]] = {tag: Counter() for tag in order}
        for key, number in found.items():
            for tag, word in zip(("quality", "year", "aesthetic", "rating"), key, strict=True):
                single[tag][word] += number
        result[name] = {
            "rows": found.total(),
            **{tag: _ordered(single[tag], order[tag]) for tag in order},
            "quality_by_rating": _crossed(found, 3, order["rating"], order["quality"]),
            "quality_by_year": _crossed(found, 1, order["year"], order["quality"]),
        }
    return result


def _ordered(counts: Counter[str | None], words: list[str]) -> dict[str, int]:
    known = [*words, *sorted(str(k) for k in counts if k is not None and k not in words)]
    return {name: counts.get(name, 0) for name in known} | {"(none)": counts.get(None, 0)}


def _crossed(
    counts: Counter[tuple[str | None, ...]], at: int, words: list[str], quality: list[str]
) -> dict[str, dict[str, int]]:
    pairs: Counter[tuple[str | None, str | None]] = Counter()
    for key, number in counts.items():
        pairs[key[at], key[0]] += number
    others = {word for word, _ in pairs if word is not None}
    columns = [*words, *sorted(others - set(words))]
    return {column: {word: pairs.get((column, word), 0) for word in quality} for column in columns}


def _tags(dataset: Path, selection: pa.Table) -> Facts:
    keys = selection.column("key").combine_chunks()
    found: Counter[str] = Counter()
    parts = ("fixed_tags", "flex_tags", "tail_tags")
    for part in stream_table(dataset, "labels", ["key", *parts]):
        part = among(part, keys)
        for name in parts:
            for entry in pc.value_counts(pc.list_flatten(part.column(name))).to_pylist():
                found[entry["values"]] += entry["counts"]
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rare = [name for name, count in ordered if count < 5]
    return {"distinct": len(ordered), "top": ordered[:40], "rarer_than_5": len(rare), "rare": rare[:40]}


def _buckets(dataset: Path, stage: str, selection: pa.Table, sound: pa.Table) -> Facts:
    """Visits per bucket, what was merged, what that cost, and the share of the pictures' area that the crop takes."""
    sizes = zip(selection.column("bucket_w").to_pylist(), selection.column("bucket_h").to_pylist(), strict=True)
    repeats = selection.column("repeats").to_pylist()
    counts: Counter[tuple[int, int]] = Counter()
    for size, repeat in zip(sizes, repeats, strict=True):
        counts[size] += repeat
    return {
        "images": {f"{w}x{h}": count for (w, h), count in sorted(counts.items(), key=lambda b: b[0][0] / b[0][1])},
        **{name: stored(dataset, stage)[name] for name in ("merged", "merging", "areas")},
        "crop_loss": _crop_loss(selection, sound),
    }


def _crop_loss(selection: pa.Table, sound: pa.Table) -> Facts:
    """Mean and largest share over the pictures of a selection, from their true sizes: nothing need be encoded yet."""
    at = pc.index_in(selection.column("key").combine_chunks(), value_set=sound.column("key").combine_chunks())
    sides = [sound.column(name).take(at).to_numpy() for name in ("width", "height")]
    loss = crop_losses(*sides, *(selection.column(name).to_numpy() for name in ("bucket_w", "bucket_h")))
    loss = loss[np.isfinite(loss)]  # a file that is gone since then has no size
    return {"mean": round(float(loss.mean()), 4), "max": round(float(loss.max()), 4)} if len(loss) else {"mean": 0.0, "max": 0.0}


def _crop(index: pa.Table) -> Facts:
    """What the crop cuts away, as a share of the resized picture."""
    if len(index) == 0:
        return {"mean": 0.0, "max": 0.0, "worst": []}
    numbers = {name: index.column(name).to_numpy().astype(np.float64) for name in
               ("bucket_w", "bucket_h", "resized_w", "resized_h")}  # fmt: skip
    loss = 1 - numbers["bucket_w"] * numbers["bucket_h"] / (numbers["resized_w"] * numbers["resized_h"])
    keys = index.column("key").to_pylist()
    worst = sorted(range(len(keys)), key=lambda row: (-loss[row], keys[row]))[:20]
    return {
        "mean": round(float(loss.mean()), 4),
        "max": round(float(loss.max()), 4),
        "worst": [{"key": keys[row], "loss": round(float(loss[row]), 4), **_place(index, row)} for row in worst],
    }


def _place(index: pa.Table, row: int) -> Facts:
    names = ("orig_w", "orig_h", "bucket_w", "bucket_h", "resized_w", "resized_h", "crop_top", "crop_left")
    return {name: index.column(name)[row].as_py() for name in names}


def _duplicates(dataset: Path) -> Facts:
    rows = read_table(dataset, "dupes").to_pylist()
    result: Facts = {}
    for method in ("sha256", "pixel", "phash"):
        groups: dict[int, list[Facts]] = defaultdict(list)
        for row in rows:
            if row["method"] == method:
                groups[row["group_id"]].append(row)
        shown = [[row["key"] for row in sorted(group, key=lambda r: (not r["keep"], r["key"]))] for group in
                 itertools.islice(groups.values(), 12)]  # fmt: skip
        result[method] = {
            "groups": len(groups), "rows": sum(len(group) for group in groups.values()),
            "dropped": sum(not row["keep"] for group in groups.values() for row in group), "examples": shown,
        }  # fmt: skip
    return result


def _sizes(index: pa.Table, sound: pa.Table) -> Facts:
    """Pictures that are enlarged, and files whose size or name says something else than their content."""
    scale = index.column("resized_w").to_numpy() / index.column("orig_w").to_numpy()
    keys = index.column("key").to_pylist()
    enlarged = sorted(np.flatnonzero(scale > 1).tolist(), key=lambda row: (-scale[row], keys[row]))
    return {
        "enlarged": len(enlarged),
        "enlarged_worst": [{"key": keys[r], "scale": round(float(scale[r]), 3), **_place(index, r)} for r in
                           enlarged[:20]],
        "size_mismatches": _true(sound, "size_mismatch"), "wrong_extensions": _true(sound, "ext_mismatch"),
    }  # fmt: skip


def _true(table: pa.Table, name: str) -> Facts:
    keys = table.filter(pc.fill_null(table.column(name), False)).column("key").to_pylist()
    return {"count": len(keys), "examples": keys[:20]}


def _quarantine(dataset: Path) -> Facts:
    """Counts by step and reason, and the first rows; of hard exclusions the counts alone."""
    path = dataset / "quarantine.parquet"
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    counts = Counter((row["step"], row["kind"], row["reason"]) for row in rows)
    shown = [row for row in rows if row["message"] not in ("R1", "R2")]
    shown.sort(key=lambda row: row["kind"] != "error")
    return {
        "errors": sum(row["kind"] == "error" for row in rows), "rows": len(rows), "listed": shown[:500],
        "counts": [[*place, count] for place, count in sorted(counts.items())],
    }  # fmt: skip


def _latents(dataset: Path, index: pa.Table) -> Facts:
    """Index rows whose latent cannot be read: its shard missing, short or of another recipe, or not finite."""
    state = json.loads((dataset / "dataset.json").read_text()).get("latents", {}) if len(index) else {}
    sizes: dict[str, int] = {}
    for shard in pc.unique(index.column("shard")).to_pylist():
        try:
            meta = read_meta(dataset / shard)
            good = meta.get("vae_id") == state.get("vae_id") and meta.get("preproc_hash") == state.get("preproc_hash")
            sizes[shard] = len(json.loads(meta["slots"])) if good else 0
        except (Halt, KeyError, ValueError):
            sizes[shard] = 0
    shards, rows = index.column("shard").to_pylist(), index.column("row").to_pylist()
    bad = [row for row in range(len(index)) if rows[row] >= sizes[shards[row]]]
    reader = ShardReader(dataset)
    whole = sorted(set(range(len(index))) - set(bad))
    step = max(len(whole) // _READ_CHECK_ROWS, 1)
    for row in whole[::step]:
        try:
            reader.read([shards[row]], [rows[row]])
        except Halt:
            bad.append(row)
    keys = index.column("key")
    return {"shards": len(sizes), "rows": len(index), "read": len(whole[::step]), "unreadable": len(bad),
            "unreadable_examples": [keys[row].as_py() for row in sorted(bad)[:20]]}  # fmt: skip


def _stale(dataset: Path) -> Facts:
    """Files of other settings, kept because rows may still be copied from them; safe to delete."""
    found = Counter(path.parent.parent.name for path in dataset.glob("*/stale/*.parquet"))
    return dict(sorted(found.items()))


def _disk(dataset: Path) -> Facts:
    sizes: Counter[str] = Counter()
    for path in dataset.rglob("*"):
        if path.is_file():
            top = path.relative_to(dataset).parts[0]
            sizes[top if (dataset / top).is_dir() else "files beside"] += path.stat().st_size
    # What the report itself writes is left out: it would change itself.
    for name in ("report.html", "report.json", "thumbnails.parquet"):
        if (dataset / name).exists():
            sizes["files beside"] -= (dataset / name).stat().st_size
    return dict(sorted(sizes.items()))
