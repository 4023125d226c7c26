"""From shards and tables to what training opens: index.parquet, the memory-mapped index, dataset.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, dataset_dir
from train.data.index import FLIP_COLUMNS, MASK, WEIGHT, Index, file_hashes
from train.data.index_writer import build_index, encoded
from train.data.shards import read_meta
from train.prepare.choosing import weights
from train.prepare.choosing.facts import Facts, among
from train.prepare.encoding.npz import NPZ_PREPROCESSING, tally
from train.prepare.encoding.shard_plan import Recipe, Slot, by_shard
from train.prepare.select import selection_path, stored
from train.prepare.tables.schemas import INDEX, SCHEMA_VERSION
from train.prepare.tables.units import config_id, stream_table, table_fingerprint, write_parquet, write_text
from train.recipe.buckets import place
from train.recipe.exclusions import EXCLUSIONS_VERSION
from train.recipe.rng import uid_of

_LABELS = ["key", "policy_hash", "fixed_tags", "flex_tags", "quality", "rating_tags", "year", "aesthetic",
           "tail_tags", "prose", "tag_variants"]  # fmt: skip


def finish(
    settings: DatasetConfig, recipe: Recipe, used: list[Slot], facts: Facts, without: set[str],
    masks: Mapping[str, Mapping[int, int]],
) -> None:  # fmt: skip
    """Write index.parquet, the arrow files and dataset.json. `without`: keys selected but not stored; `masks`: digests by shard and row."""
    dataset = dataset_dir(settings)
    index = index_table(dataset, recipe, used, facts)
    write_parquet(dataset / "index.parquet", index)
    joined = _with_masks(_join(settings, index, facts), masks)
    selections = {}
    for stage in settings.select:
        table = pq.read_table(selection_path(dataset, stage))
        if without:
            gone = pa.array(sorted(without), pa.string())
            table = table.filter(pc.invert(pc.is_in(table.column("key"), value_set=gone)))
        selections[stage] = table
    policy = sorted(pc.unique(joined.column("policy_hash").cast(pa.string())).to_pylist())
    buckets = config_id(buckets=asdict(settings.buckets), exclusions=EXCLUSIONS_VERSION)
    meta = {"vae_id": recipe.vae_id, "content": recipe.content, "buckets": buckets}
    for old in dataset.glob("index_*.arrow"):  # of stages that are gone
        if old.stem.removeprefix("index_") not in selections:
            old.unlink()
    _write_dataset_json(settings, recipe, policy, index)  # an index opens only beside a dataset.json
    build_index(dataset, joined.drop_columns(["policy_hash"]), selections, meta)
    fingerprints = {stage: Index.open(dataset, stage).fingerprint for stage in selections}
    _write_dataset_json(settings, recipe, policy, index, fingerprints)


def index_table(dataset: Path, recipe: Recipe, used: list[Slot], facts: Facts) -> pa.Table:
    """One row per stored picture, bucket and flip, sorted so."""
    parts = [INDEX.empty_table()]
    for name, slots in by_shard(used):
        meta = read_meta(dataset / name)
        stored = {slot: row for row, slot in enumerate(json.loads(meta["slots"]))}
        imported = set(json.loads(meta.get("npz", "[]")))
        rows = []
        for slot in slots:
            if slot.slot in stored:
                row = _row(recipe, slot, stored[slot.slot], facts[slot.key])
                rows.append(row | {"preproc_hash": NPZ_PREPROCESSING} if slot.slot in imported else row)
        parts.append(pa.Table.from_pylist(rows, schema=INDEX))
    return pa.concat_tables(parts).sort_by([(column, "ascending") for column in ("key", "bucket_w", "bucket_h", "flip")])


def _row(recipe: Recipe, slot: Slot, row: int, fact: Mapping[str, Any]) -> dict[str, Any]:
    placement = place(fact["width"], fact["height"], (slot.bucket_w, slot.bucket_h))
    left = placement.crop_left if not slot.flip else placement.resized_w - slot.bucket_w - placement.crop_left
    return {
        "key": slot.key, "uid": uid_of(slot.key), "orig_w": fact["width"], "orig_h": fact["height"],
        "bucket_w": slot.bucket_w, "bucket_h": slot.bucket_h, "resized_w": placement.resized_w,
        "resized_h": placement.resized_h, "crop_top": placement.crop_top, "crop_left": left,
        "shard": slot.shard, "row": row, "vae_id": recipe.vae_id, "dtype": recipe.dtype, "content": recipe.content,
        "preproc_hash": recipe.preproc_hash, "flip": slot.flip,
    }  # fmt: skip


def _join(settings: DatasetConfig, index: pa.Table, facts: Facts) -> pa.Table:
    """A row for each picture and bucket, with captions and labels, the file's hash, the rating that the last gate goes by, and
    where its flip lies."""
    dataset, index = dataset_dir(settings), _flips_beside(index)
    keys = index.column("key").combine_chunks()
    wanted = pc.unique(keys)
    # Unit by unit, each word once: the captions of a million images as plain text would be a gigabyte.
    labels = _encoded(stream_table(dataset, "labels", _LABELS), wanted)
    at = pc.index_in(keys, value_set=labels.column("key").combine_chunks())
    if at.null_count:
        raise Halt(ExitCode.MISMATCH, f"{at.null_count} images have no labels: run scripts/prepare.py label and select")
    for name in _LABELS[1:]:
        index = index.append_column(name, labels.column(name).combine_chunks().take(at))
    records = _encoded(_gate_columns(settings), wanted)
    at = pc.index_in(keys, value_set=records.column("key").combine_chunks())
    source = records.column("source").combine_chunks().cast(pa.string()).take(at)
    gate = records.column("rating").combine_chunks().cast(pa.string()).take(at)
    for config in settings.sources:
        if config.assume_rating is not None:
            gate = pc.if_else(pc.and_(pc.is_null(gate), pc.equal(source, config.name)), config.assume_rating, gate)
    weighed = weights.weights(settings, source, records.column("weight").combine_chunks().take(at))
    if pc.any(pc.not_equal(weighed, 1)).as_py():  # without the column a set is as before, bit for bit
        index = index.append_column(WEIGHT, weighed)
    index = index.append_column("gate_rating", gate)
    index = index.append_column("gate_fixed", records.column("unnamed").combine_chunks().take(at))
    return index.append_column("content_hash", facts.column("sha256", keys))


def _flips_beside(index: pa.Table) -> pa.Table:
    """The rows that are no flips, with shard and row of each one's flip, "" and -1 for none; without flips as a set was before there were any."""
    flips, plain = (index.filter(pc.equal(index.column("flip"), flip)).drop_columns(["flip"]).combine_chunks() for flip in (True, False))
    if len(flips) == 0:
        return plain
    places = [pc.binary_join_element_wise(*(table.column(name).combine_chunks().cast(pa.string()) for name in ("key", "bucket_w", "bucket_h")), "\0")
              for table in (plain, flips)]  # fmt: skip
    at = pc.index_in(places[0], value_set=places[1])
    for name, none in zip(FLIP_COLUMNS, ("", -1), strict=True):
        column = flips.column(name.removeprefix("flip_")).combine_chunks().take(at)
        plain = plain.append_column(name, pc.fill_null(column, none))
    return plain


def _with_masks(index: pa.Table, masks: Mapping[str, Mapping[int, int]]) -> pa.Table:
    """The index with the digest of each picture's mask; as it is where none has one."""
    if not any(masks.values()):
        return index
    places = zip(index.column("shard").to_pylist(), index.column("row").to_pylist(), strict=True)
    return index.append_column(MASK, pa.array([masks.get(shard, {}).get(row, 0) for shard, row in places], pa.uint64()))


def weights_told(settings: DatasetConfig, facts: Facts) -> list[str]:
    """A line for each source whose pictures do not weigh 1."""
    return [f"{count} pictures of {name} weigh {weights.told(least, most)} in the loss"
            for name, (count, least, most) in weights.by_source(settings, facts.table).items()]  # fmt: skip


def _gate_columns(settings: DatasetConfig) -> Iterator[pa.Table]:
    """key, source, rating, weight, and `unnamed`: the fixed tags come from a caption, so nothing tells names from tags."""
    names = ["tags_character", "tags_copyright", "tags_artist"]
    names_of_tagger = settings.tag.source != "none" and settings.tag.use == "all"
    for part in stream_table(dataset_dir(settings), "records", ["key", "source", "rating", "weight", "caption", *names]):
        unnamed = pc.is_valid(part["caption"])
        for name in names:
            unnamed = pc.and_(unnamed, pc.equal(pc.list_value_length(part[name]), 0))
        unnamed = pc.and_(unnamed, not names_of_tagger)
        yield part.select(["key", "source", "rating", "weight"]).append_column("unnamed", unnamed)


def _encoded(parts: Iterable[pa.Table], wanted: pa.Array) -> pa.Table:
    """Rows of the wanted keys, texts by number."""
    found = []
    for part in parts:
        part = among(part, wanted).combine_chunks()
        columns = {name: part.column(name).combine_chunks() for name in part.column_names}
        found.append(pa.table({name: c if name == "key" else encoded(c) for name, c in columns.items()}))
    return pa.concat_tables(found).unify_dictionaries().combine_chunks()


def _write_dataset_json(
    settings: DatasetConfig,
    recipe: Recipe,
    policy: list[str],
    index: pa.Table,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    dataset = dataset_dir(settings)
    path = dataset / "dataset.json"
    shards = pc.unique(index.column("shard")).to_pylist()
    npz = {"npz": tally(dataset, shards)} if any(source.npz_vae for source in settings.sources) else {}
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    state |= {
        "schema_version": SCHEMA_VERSION, "name": settings.name,
        "fingerprint": config_id(**dict(fingerprints or {})), "fingerprints": dict(fingerprints or {}),
        "policy_hash": policy[0] if len(policy) == 1 else policy, "hard_exclusion_version": EXCLUSIONS_VERSION,
        "latents": {**asdict(recipe), "images": len(index), **npz},
        "index": fingerprints and file_hashes(dataset, sorted(path.name for path in dataset.glob("index*.arrow"))),
        "tables": {name: table_fingerprint(dataset, name) for name in
                   ("records", "probe", "aesthetic", "tags", "dupes", "labels")},
        "select": {stage: {name: stored(dataset, stage)[name] for name in ("counts", "merged")} for stage in settings.select},
        "sources": [
            {key: value for key, value in asdict(source).items() if key not in ("path", "images", "dictionary", "npz_vae")}
            for source in settings.sources
        ],
    }  # fmt: skip
    write_text(path, json.dumps(state, indent=1, sort_keys=True) + "\n")
