"""The training set as memory-mapped columns: who is selected, where the latents lie, what the captions say.

`index.arrow` (uncompressed Arrow IPC) holds one row per (image, bucket) with its caption; `index_<stage>.arrow` names
the rows that a stage trains on. Both are derived from the parquet tables beside them, whose hashes they carry. Opening
them reads no caption and hashes no key: under a second for a million images.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.numpy

from train.exclusions import excluded_by
from train.exits import ExitCode, Halt
from train.rng import uid_of
from train.rundir import read_json, replace_file

INDEX, VERSION = "index.arrow", "1"
CAPTION_COLUMNS = ("fixed_tags", "flex_tags")
LABEL_COLUMNS = ("quality", "rating_tags", "year", "aesthetic")
_NUMBERS = ("orig_w", "orig_h", "bucket_w", "bucket_h", "resized_w", "resized_h", "crop_top", "crop_left")
_CONSTANT = ("vae_id", "dtype", "content", "preproc_hash", "uid", "policy_hash")  # in the header, or derived
U64 = npt.NDArray[np.uint64]


def _numbers(name: str) -> cached_property[npt.NDArray[Any]]:
    """A column of numbers of the selected rows, gathered when it is first asked for: many are asked by nobody."""
    return cached_property(lambda index: _column(index._table, name)[index._rows])


class Index:
    """The selected images of one stage, in the order of their keys; position i is what the plan calls a row."""

    orig_w = _numbers("orig_w")
    orig_h = _numbers("orig_h")
    bucket_w = _numbers("bucket_w")
    bucket_h = _numbers("bucket_h")
    resized_w = _numbers("resized_w")
    resized_h = _numbers("resized_h")
    crop_top = _numbers("crop_top")
    crop_left = _numbers("crop_left")

    def __init__(self, table: pa.Table, rows: npt.NDArray[np.integer[Any]], uids: U64, meta: Mapping[str, str]) -> None:
        self._table, self._rows, self._meta = table, rows, meta
        self.uids = uids
        self.vae_id, self.content = meta["vae_id"], meta["content"]

    @classmethod
    def open(cls, dataset_dir: str | Path, stage: str) -> Index:
        """The selection `stage` of a prepared dataset. Raises Halt(MISMATCH) naming the step to run."""
        folder = Path(dataset_dir)
        if not (folder / "dataset.json").is_file():
            raise Halt(
                ExitCode.MISMATCH,
                f"data.path {folder} is not a prepared dataset (no dataset.json): run "
                "scripts/prepare.py all --config <dataset.yaml>",
            )
        selection = folder / f"index_{stage}.arrow"
        if not selection.is_file():
            known = sorted(path.stem.removeprefix("index_") for path in folder.glob("index_*.arrow"))
            raise Halt(
                ExitCode.MISMATCH,
                f"data.path {folder} has no selection {stage!r} (it has {', '.join(known) or 'none'}): add "
                f"select.{stage} to its dataset.yaml and run scripts/prepare.py select and latents, or set data.select",
            )
        table, whole = _map(folder / INDEX)
        rows, meta = _map(selection)
        _require_fresh(folder, stage, whole, meta)
        return cls(table, _column(rows, "row"), np.array(_column(rows, "uid")), {**whole, **meta})

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """`<source>:<id>` of image i."""
        return str(self._table.column("key")[int(self._rows[i])].as_py())

    def caption(self, i: int) -> tuple[list[str], list[str]]:
        """(fixed tags, flex tags) of image i."""
        row = int(self._rows[i])
        fixed, flex = (self._table.column(name)[row].as_py() or [] for name in CAPTION_COLUMNS)
        return fixed, flex

    def latent(self, i: int) -> tuple[str, int]:
        """(shard relative to the dataset directory, row in it) of image i."""
        row = int(self._rows[i])
        return str(self._table.column("shard")[row].as_py()), int(self._table.column("row")[row].as_py())

    def labels(self, i: int) -> dict[str, Any]:
        """quality, rating_tags, year and aesthetic of image i."""
        row = int(self._rows[i])
        return {name: self._table.column(name)[row].as_py() for name in LABEL_COLUMNS}

    def digests(self) -> tuple[U64, U64]:
        """(image digest, caption digest) per image: what tells an edited dataset from the one trained on."""
        image, caption = (_column(self._table, name)[self._rows] for name in ("image_digest", "caption_digest"))
        return image, caption

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """A number per entry that is equal for the repeats of one image."""
        return self._rows.astype(np.int64)

    def select(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Index:
        """Those images alone."""
        return Index(self._table, self._rows[which], self.uids[which], self._meta)

    @property
    def fingerprint(self) -> str:
        """sha256 over uid, bucket, size, crop, content and caption of every image, and the VAE."""
        image, caption = self.digests()
        order = np.argsort(self.uids)
        digest = hashlib.sha256(f"{self.vae_id} {self.content} {self._meta.get('buckets', '')}".encode())
        for column in (self.uids, image, caption):
            digest.update(np.ascontiguousarray(column[order]).tobytes())
        return digest.hexdigest()

    @property
    def selection_hash(self) -> str:
        """sha256 over which images stand in which bucket."""
        order = np.argsort(self.uids)
        digest = hashlib.sha256()
        for column in (self.uids, self.bucket_w.astype(np.int32), self.bucket_h.astype(np.int32)):
            digest.update(np.ascontiguousarray(column[order]).tobytes())
        return digest.hexdigest()


def save_selection(path: Path, index: Index) -> None:
    """Remember which images with which captions a run trains on: what `changes_since` compares with."""
    image, caption = index.digests()
    columns = {"uid": index.uids, "image": np.array(image), "caption": np.array(caption)}
    replace_file(path, safetensors.numpy.save({name: value.view(np.int64) for name, value in columns.items()}))


def changes_since(path: Path, index: Index) -> str:
    """What changed in the selection since `save_selection`, in counts per kind; empty when nothing did, or is known."""
    if not path.is_file():
        return ""
    saved = safetensors.numpy.load(path.read_bytes())
    before, now = saved["uid"].view(np.uint64), index.uids
    image, caption = index.digests()
    common, old, new = np.intersect1d(before, now, return_indices=True)
    same_image = saved["image"].view(np.uint64)[old] == image[new]
    same_caption = saved["caption"].view(np.uint64)[old] == caption[new]
    counts = {
        "images added": len(now) - len(common),
        "images removed (or renamed)": len(before) - len(common),
        "images changed": int((~same_image).sum()),
        "captions edited": int((~same_caption).sum()),
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def build_index(
    dataset_dir: Path, index: pa.Table, selections: Mapping[str, pa.Table], meta: Mapping[str, str]
) -> None:
    """Write index.arrow and one index_<stage>.arrow per selection, atomically.

    `index` has the index table's columns sorted by (key, bucket), with captions and labels joined to it, the file's
    sha256 as `content_hash` and the rating, or the one its source declares, as `gate_rating`; `meta` holds vae_id,
    content and buckets. Raises Halt(MISMATCH) for two keys with one uid, for a selected image without latents, and
    for a row that the hard exclusions refuse.
    """
    _refuse_excluded(index)
    left_out = [name for name in ("content_hash", "gate_rating", *_CONSTANT) if name in index.column_names]
    table = index.drop_columns(left_out)
    image, caption = _digests(index)
    table = table.append_column("image_digest", pa.array(image)).append_column("caption_digest", pa.array(caption))
    for name in (*CAPTION_COLUMNS, *LABEL_COLUMNS, "shard"):  # each word once: a quarter of the size
        column = table.column(name).combine_chunks()
        table = table.set_column(table.schema.get_field_index(name), name, _encoded(column))
    whole = {"version": VERSION, **meta, "sources": json.dumps(_source_hashes(dataset_dir, None))}
    _write(dataset_dir / INDEX, table.combine_chunks(), whole)
    uids = np.array([uid_of(key) for key in index.column("key").to_pylist()], dtype=np.uint64)
    _refuse_equal_uids(uids, index)
    for stage, selection in selections.items():
        rows, stage_uids = _select_rows(stage, selection, index, uids)
        columns = pa.table({"row": pa.array(rows, pa.int32()), "uid": pa.array(stage_uids, pa.uint64())})
        stage_meta = {"version": VERSION, "sources": json.dumps(_source_hashes(dataset_dir, stage))}
        _write(dataset_dir / f"index_{stage}.arrow", columns, stage_meta)


def _encoded(column: pa.Array) -> pa.Array:
    """Strings, or lists of strings, by number."""
    if pa.types.is_list(column.type):
        flat, offsets = pc.list_flatten(column), pc.cumulative_sum(pc.fill_null(pc.list_value_length(column), 0))
        starts = pa.concat_arrays([pa.array([0], pa.int32()), offsets.cast(pa.int32())])
        return pa.ListArray.from_arrays(starts, flat.dictionary_encode())
    return column.dictionary_encode() if pa.types.is_string(column.type) else column


def _refuse_equal_uids(uids: U64, index: pa.Table) -> None:
    """Equal uids of different keys: the plan could not tell the images apart."""
    order = np.argsort(uids, kind="stable")
    same = np.flatnonzero(uids[order][1:] == uids[order][:-1])
    keys = index.column("key")
    for at in same.tolist():
        one, other = keys[int(order[at])].as_py(), keys[int(order[at + 1])].as_py()
        if one != other:
            uid = int(uids[order[at]])
            raise Halt(ExitCode.MISMATCH, f"{one} and {other} have the same uid {uid:016x}: rename one")


def _select_rows(stage: str, selection: pa.Table, index: pa.Table, uids: U64) -> tuple[npt.NDArray[np.int64], U64]:
    """(row in the index, uid) of every selected (key, repeat), in the selection's order."""
    keys, repeats = selection.column("key").to_pylist(), _column(selection, "repeats").astype(np.int64)
    wanted = np.array([uid_of(key) for key in keys], dtype=np.uint64)
    marks, sought = _place_marks(uids, index), _place_marks(wanted, selection)
    order = np.argsort(marks, kind="stable")
    at = np.minimum(np.searchsorted(marks[order], sought), max(len(order) - 1, 0))
    rows = order[at] if len(order) else np.zeros(len(sought), dtype=np.int64)
    missing = np.flatnonzero(marks[rows] != sought) if len(order) else np.arange(len(sought))
    if len(missing):
        examples = ", ".join(keys[row] for row in missing[:3].tolist())
        raise Halt(
            ExitCode.MISMATCH,
            f"{len(missing)} images of selection {stage} have no latents, such as {examples}: "
            "run scripts/prepare.py latents",
        )
    first = np.repeat(wanted, repeats)
    number = np.arange(len(first)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    for place in np.flatnonzero(number).tolist():
        first[place] = uid_of(keys[int(np.searchsorted(np.cumsum(repeats), place, side="right"))], int(number[place]))
    if len(np.unique(first)) != len(first):
        raise Halt(ExitCode.MISMATCH, f"selection {stage}: two keys have the same uid, or one key stands there twice")
    return np.repeat(rows, repeats), first


def _place_marks(uids: U64, table: pa.Table) -> U64:
    """One number per (uid, bucket); of different pairs equal with the chance of two uids being equal."""
    width, height = (_column(table, name).astype(np.uint64) for name in ("bucket_w", "bucket_h"))
    size = (width << np.uint64(16)) | height
    marks: U64 = uids ^ (size * np.uint64(0x9E3779B97F4A7C15))  # odd, so different sizes stay different
    return marks


def _digests(index: pa.Table) -> tuple[U64, U64]:
    """Per row: digest of what the picture is, digest of what its caption says."""
    numbers = np.stack([_column(index, name).astype(np.int64) for name in _NUMBERS], axis=1)
    image = np.empty(len(index), dtype=np.uint64)
    for row, content in enumerate(index.column("content_hash").to_pylist()):
        image[row] = _short_hash(numbers[row].tobytes() + (content or "").encode())
    caption = np.empty(len(index), dtype=np.uint64)
    parts = [_tag_hashes(index.column(name).combine_chunks()) for name in CAPTION_COLUMNS]
    for row in range(len(index)):
        fixed, flex = (values[starts[row] : starts[row + 1]].tobytes() for starts, values in parts)
        caption[row] = _short_hash(fixed + b"|||" + flex)
    return image, caption


def _tag_hashes(column: pa.Array) -> tuple[npt.NDArray[np.int64], U64]:
    """(where each row starts, 64-bit hash of every tag), each distinct tag hashed once."""
    words = pc.list_flatten(column).dictionary_encode()
    hashes = np.array([_short_hash(word.encode()) for word in words.dictionary.to_pylist()], dtype=np.uint64)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    values: U64 = hashes[words.indices.to_numpy()] if len(words) else np.zeros(0, dtype=np.uint64)
    return starts, values


def _short_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _refuse_excluded(index: pa.Table) -> None:
    """The last of the three gates of the hard exclusions: no caption with such a tag is ever indexed.

    Fixed tags are count tags and names, which are not split into words; the gates before this one saw their kinds.
    A rule needs a tag that is refused on its own in an explicit record, so rows without one need no second look.
    """
    flex = index.column("flex_tags").combine_chunks()
    flat = pc.list_flatten(flex)
    suspects = [tag for tag in pc.unique(flat).to_pylist() if excluded_by(rating="e", tags=[tag]) is not None]
    hits = pc.is_in(flat, value_set=pa.array(suspects, flat.type)).to_numpy(zero_copy_only=False)
    rows = pa.array(np.unique(pc.list_parent_indices(flex).to_numpy()[hits]))
    columns = (index.column(name).take(rows).to_pylist() for name in ("key", "flex_tags", "gate_rating"))
    for key, tags, rating in zip(*columns, strict=True):
        rule = excluded_by(rating=rating, tags=tags)
        if rule is not None:
            raise Halt(
                ExitCode.MISMATCH,
                f"{key} is hard-excluded (rule {rule}) and was about to enter the index: run scripts/prepare.py select",
            )


def _source_hashes(folder: Path, stage: str | None) -> dict[str, str]:
    """Hashes of the tables an arrow file is made from."""
    names = ["index.parquet"] if stage is None else [f"select_{stage}.parquet"]
    found = {}
    for name in names:
        path = folder / name
        if path.is_file():
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if stage is None:
        labels = sorted(path.name for path in (folder / "labels").glob("*.parquet"))
        found["labels"] = hashlib.sha256("\n".join(labels).encode()).hexdigest()
    return found


def _require_fresh(folder: Path, stage: str, whole: Mapping[str, str], meta: Mapping[str, str]) -> None:
    if whole.get("version") != VERSION or meta.get("version") != VERSION:
        raise Halt(ExitCode.MISMATCH, f"{folder}: its index is of another version: run scripts/prepare.py latents")
    for found, wanted in ((whole, _source_hashes(folder, None)), (meta, _source_hashes(folder, stage))):
        changed = sorted(name for name, value in json.loads(found["sources"]).items() if wanted.get(name) != value)
        if changed:
            raise Halt(
                ExitCode.MISMATCH,
                f"{folder}: {', '.join(changed)} changed after the index was made: run scripts/prepare.py latents "
                "(seconds; nothing is encoded twice)",
            )
    state = read_json(folder / "dataset.json") or {}
    if re.fullmatch(r"\d+", str(state.get("schema_version", ""))) is None:
        raise Halt(ExitCode.MISMATCH, f"{folder}/dataset.json is damaged: run scripts/prepare.py latents")


def _map(path: Path) -> tuple[pa.Table, dict[str, str]]:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise Halt(ExitCode.MISMATCH, f"{path} is missing or damaged: run scripts/prepare.py latents") from error
    return table, {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    column: npt.NDArray[Any] = table.column(name).to_numpy()
    return column


def _write(path: Path, table: pa.Table, meta: Mapping[str, str]) -> None:
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    table = table.replace_schema_metadata(dict(meta))
    with pa.OSFile(str(tmp), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(len(table), 1))  # one chunk: its columns need no copy
    tmp.rename(path)
