"""Making the files that `train.data.index` opens: encoded captions, digests, and the last gate of the hard exclusions."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.base.files import replacing
from train.data.index import (
    CAPTION_COLUMNS,
    FLIP_COLUMNS,
    INDEX,
    LABEL_COLUMNS,
    MASK,
    MORE_COLUMNS,
    NUMBERS,
    U64,
    VERSION,
    WEIGHT,
    column_of,
    selection_fingerprint,
    source_hashes,
)
from train.recipe.captions import SEPARATOR, read_variant
from train.recipe.exclusions import excluded_by
from train.recipe.rng import uid_of

_CHUNK_ROWS = 50_000
_CONSTANT = ("vae_id", "dtype", "content", "preproc_hash", "uid", "policy_hash")  # in the header, or derived


def build_index(
    dataset_dir: Path, index: pa.Table, selections: Mapping[str, pa.Table], meta: Mapping[str, str]
) -> None:
    """Write index.arrow and one index_<stage>.arrow per selection, atomically.

    `index` has the index table's columns sorted by (key, bucket), with captions and labels joined to it, the file's
    sha256 as `content_hash` and the rating, or the one its source declares, as `gate_rating`, and as
    `gate_fixed` whether the fixed tags are a caption's, not names (no column: never); `meta` holds vae_id, content and
    buckets. Columns of MORE_COLUMNS, `weight` and `mask` may be there; of MORE_COLUMNS those that say nothing are
    not written. Raises Halt(MISMATCH) for two keys with one uid, for a selected image without latents, and for a row that the hard exclusions refuse.
    """
    index = index.drop_columns([name for name in MORE_COLUMNS if _says_nothing(index, name)])
    more = [name for name in MORE_COLUMNS if name in index.column_names]
    for name in (*CAPTION_COLUMNS, *more, *LABEL_COLUMNS, "shard", *(n for n in FLIP_COLUMNS[:1] if n in index.column_names)):
        column = encoded(index.column(name).combine_chunks())
        index = index.set_column(index.schema.get_field_index(name), name, column)
    _refuse_excluded(index)
    image, caption = _digests(index)
    left_out = [name for name in ("content_hash", "gate_rating", "gate_fixed", *_CONSTANT) if name in index.column_names]
    table = index.drop_columns(left_out)
    table = table.append_column("image_digest", pa.array(image)).append_column("caption_digest", pa.array(caption))
    whole = {"version": VERSION, **meta, "sources": json.dumps(source_hashes(dataset_dir, None))}
    write_arrow(dataset_dir / INDEX, table.combine_chunks(), whole)
    uids = _uids(index)
    _refuse_equal_uids(uids, index)
    for stage, selection in selections.items():
        rows, stage_uids = _select_rows(stage, selection, index, uids)
        columns = pa.table({"row": pa.array(rows, pa.int32()), "uid": pa.array(stage_uids, pa.uint64())})
        stage_meta = {
            "version": VERSION,
            "sources": json.dumps(source_hashes(dataset_dir, stage)),
            "fingerprint": selection_fingerprint(stage_uids, image[rows], caption[rows], meta),
        }
        write_arrow(dataset_dir / f"index_{stage}.arrow", columns, stage_meta)


def _says_nothing(index: pa.Table, name: str) -> bool:
    """Whether a column of lists that may be left out is there and holds none."""
    return name in index.column_names and not pc.sum(pc.list_value_length(index.column(name))).as_py()


def encoded(column: pa.Array) -> pa.Array:
    """Strings, or lists of strings, by number: each word once, a quarter of the size."""
    if pa.types.is_list(column.type) and not pa.types.is_dictionary(column.type.value_type):
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
    keys, repeats = selection.column("key"), column_of(selection, "repeats").astype(np.int64)
    wanted = _uids(selection)
    marks, sought = _place_marks(uids, index), _place_marks(wanted, selection)
    order = np.argsort(marks, kind="stable")
    at = np.minimum(np.searchsorted(marks[order], sought), max(len(order) - 1, 0))
    rows = order[at] if len(order) else np.zeros(len(sought), dtype=np.int64)
    missing = np.flatnonzero(marks[rows] != sought) if len(order) else np.arange(len(sought))
    if len(missing):
        examples = ", ".join(keys[row].as_py() for row in missing[:3].tolist())
        raise Halt(
            ExitCode.MISMATCH,
            f"{len(missing)} images of selection {stage} have no latents, such as {examples}: "
            "run scripts/prepare.py latents",
        )
    first = np.repeat(wanted, repeats)
    number = np.arange(len(first)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    ends = np.cumsum(repeats)
    for place in np.flatnonzero(number).tolist():
        key = keys[int(np.searchsorted(ends, place, side="right"))].as_py()
        first[place] = uid_of(key, int(number[place]))
    if len(np.unique(first)) != len(first):
        raise Halt(ExitCode.MISMATCH, f"selection {stage}: two keys have the same uid, or one key stands there twice")
    return np.repeat(rows, repeats), first


def _uids(table: pa.Table) -> U64:
    """uint64[n]; keys are strings of Python for some thousands of rows at a time."""
    texts = (key for batch in table.select(["key"]).to_batches(_CHUNK_ROWS) for key in batch["key"].to_pylist())
    return np.fromiter(map(uid_of, texts), np.uint64, len(table))


def _place_marks(uids: U64, table: pa.Table) -> U64:
    """One number per (uid, bucket); of different pairs equal with the chance of two uids being equal."""
    width, height = (column_of(table, name).astype(np.uint64) for name in ("bucket_w", "bucket_h"))
    size = (width << np.uint64(16)) | height
    marks: U64 = uids ^ (size * np.uint64(0x9E3779B97F4A7C15))  # odd, so different sizes stay different
    return marks


def _digests(index: pa.Table) -> tuple[U64, U64]:
    """Per row: digest of what the picture is, digest of what its caption says."""
    image, at = np.empty(len(index), dtype=np.uint64), 0
    weights, masks = (column_of(index, name) if name in index.column_names else None for name in (WEIGHT, MASK))
    for batch in index.select([*NUMBERS, "content_hash"]).to_batches(_CHUNK_ROWS):
        numbers = np.stack([batch[name].to_numpy().astype(np.int64) for name in NUMBERS], axis=1)
        for row, content in enumerate(batch["content_hash"].to_pylist()):
            weight = b"" if weights is None or weights[at] == 1 else weights[at].tobytes()
            mask = b"" if masks is None or masks[at] == 0 else b"mask" + masks[at].tobytes()
            image[at] = _short_hash(numbers[row].tobytes() + (content or "").encode() + weight + mask)
            at += 1
    caption = np.empty(len(index), dtype=np.uint64)
    parts = [tag_hashes(index.column(name).combine_chunks()) for name in CAPTION_COLUMNS]
    more = [tag_hashes(index.column(name).combine_chunks()) for name in MORE_COLUMNS if name in index.column_names]
    for row in range(len(index)):
        fixed, flex = (values[starts[row] : starts[row + 1]].tobytes() for starts, values in parts)
        others = [values[starts[row] : starts[row + 1]].tobytes() for starts, values in more]
        # A caption without these parts keeps the digest of version 1.
        rest = (SEPARATOR.encode() + other for other in others) if any(others) else ()
        caption[row] = _short_hash(b"".join([fixed, SEPARATOR.encode(), flex, *rest]))
    return image, caption


def tag_hashes(column: pa.Array) -> tuple[npt.NDArray[np.int64], U64]:
    """(where each row starts, 64-bit hash of every tag), each distinct tag hashed once."""
    words = pc.list_flatten(column)
    hashes = np.array([_short_hash(word.encode()) for word in words.dictionary.to_pylist()], dtype=np.uint64)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    values: U64 = hashes[words.indices.to_numpy()] if len(words) else np.zeros(0, dtype=np.uint64)
    return starts, values


def _short_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _refuse_excluded(index: pa.Table) -> None:
    """The last of the three gates of the hard exclusions: no caption with such a tag is ever indexed.

    Fixed tags are count tags and names, which are not split into words; the gates before this one saw their kinds. Those
    of a caption may be anything. A rule needs a tag that is refused on its own in an explicit record, so rows without one
    need no second look.
    """
    marked = index.column("gate_fixed").to_numpy() if "gate_fixed" in index.column_names else np.zeros(len(index), bool)
    more = [name for name in MORE_COLUMNS if name in index.column_names]
    fixed_rows, flex_rows = (suspicious_rows(index.column(name).combine_chunks()) for name in CAPTION_COLUMNS)
    found = [suspicious_rows(index.column(name).combine_chunks(), prose=name != "tail_tags") for name in more]
    rows = pa.array(functools.reduce(np.union1d, [fixed_rows[marked[fixed_rows]], flex_rows, *found]))
    names = ("key", "gate_rating", *CAPTION_COLUMNS, *more)
    for row, captioned in zip(index.select(names).take(rows).to_pylist(), marked[rows.to_numpy()], strict=True):
        tags, texts = [*(row["flex_tags"] or []), *(row.get("tail_tags") or [])], [*(row.get("prose") or [])]
        for fixed, flex, tail in map(read_variant, row.get("tag_variants") or []):
            tags += [*flex, *tail, *(fixed if captioned else [])]
        if captioned:
            tags += row["fixed_tags"] or []
        rule = excluded_by(rating=row["gate_rating"], tags=tags, caption="\n".join(texts) or None)
        if rule is not None:
            raise Halt(
                ExitCode.MISMATCH,
                f"{row['key']} is hard-excluded (rule {rule}) and was about to enter the index: run scripts/prepare.py select",
            )


def suspicious_rows(flex: pa.Array, *, prose: bool = False) -> npt.NDArray[np.int64]:
    """Rows of an `encoded` list column with a tag that the hard exclusions refuse on its own in an explicit record.

    `prose`: the column's texts are read for every word and phrase in them.
    """
    flat = pc.list_flatten(flex)
    words = enumerate(flat.dictionary.to_pylist())
    suspects = [
        number for number, text in words
        if excluded_by(rating="e", tags=[] if prose else [text], caption=text if prose else None) is not None
    ]  # fmt: skip
    hits = np.isin(flat.indices.to_numpy(), suspects)
    rows: npt.NDArray[np.int64] = np.unique(pc.list_parent_indices(flex).to_numpy()[hits]).astype(np.int64)
    return rows


def write_arrow(path: Path, table: pa.Table, meta: Mapping[str, str]) -> None:
    """One Arrow file in one chunk, through a temporary name."""
    table = table.replace_schema_metadata(dict(meta))
    with replacing(path, peers=True) as tmp, pa.OSFile(str(tmp), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(len(table), 1))  # one chunk: its columns need no copy
