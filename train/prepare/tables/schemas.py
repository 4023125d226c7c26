"""Schemas of every table of a prepared dataset, and the rows of the quarantine.

Tables are parquet (zstd, row groups of at most 50,000 rows), sorted by `key`, each written by one step, joined
on `key`. `key` is `<source name>:<id>`; for files the id is the path inside the source including the extension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 2  # 2: tail, prose and variants of captions, weights, masks and flips
ROW_GROUP_ROWS = 50_000
REST_UNREAD = "the rest of the file is not read"  # in the message of a refusal that stands for unknown many rows
TAG_GROUPS = ("general", "character", "copyright", "artist", "meta", "species")

ErrorReason = Literal[
    "missing_file", "zero_bytes", "unidentified", "truncated", "too_many_pixels", "animated", "too_small",
    "aspect_ratio", "unsupported_format", "unsupported_mode", "bad_caption", "missing_caption", "bad_record",
    "outside_root", "decode_timeout", "nan_latent", "damaged",
]  # fmt: skip
ExcludedReason = Literal["excluded_tag", "deleted_post", "banned_post", "duplicate", "not_a_picture"]

_TEXTS = pa.list_(pa.string())


def _table(*columns: tuple[str, pa.DataType] | tuple[str, pa.DataType, bool]) -> pa.Schema:
    """Columns as (name, type) required, or (name, type, True) nullable."""
    return pa.schema([pa.field(column[0], column[1], nullable=len(column) == 3) for column in columns])


RECORDS = _table(
    ("key", pa.string()),
    ("source", pa.string()),
    ("source_id", pa.int64(), True),
    ("uri", pa.string()),  # file below the source root; for a member, the container
    ("member", pa.string(), True),  # name inside a tar, row inside a table with embedded images
    ("file_ext", pa.string()),
    ("md5", pa.string(), True),
    ("file_size", pa.int64(), True),
    ("width", pa.int32(), True),
    ("height", pa.int32(), True),
    ("created_at", pa.string(), True),  # as written
    ("created_year", pa.int16(), True),
    ("media_year", pa.int16(), True),
    ("rating", pa.dictionary(pa.int8(), pa.string()), True),  # g s q e
    ("score", pa.int32(), True),
    ("score_real", pa.float64(), True),  # only sources with fractions
    ("up_score", pa.int32(), True),
    ("down_score", pa.int32(), True),
    ("fav_count", pa.int32(), True),
    ("is_deleted", pa.bool_()),
    ("is_banned", pa.bool_()),
    ("is_pending", pa.bool_()),
    ("parent_id", pa.int64(), True),
    ("has_children", pa.bool_()),
    *((f"tags_{group}", _TEXTS) for group in TAG_GROUPS),  # raw, underscored, in source order
    ("caption", pa.string(), True),
    ("pixel_hash_src", pa.string(), True),
    ("hard_exclusion", pa.string(), True),  # rule id; no later step opens the file
    ("raw_hash", pa.string()),  # of the content, not of uri and member
    ("weight", pa.float64(), True),  # of the picture's loss, beside its source's
)

PROBE = _table(
    ("key", pa.string()),
    ("status", pa.string()),  # ok | quarantined
    ("reason", pa.string(), True),
    ("width", pa.int32(), True),  # upright, after EXIF
    ("height", pa.int32(), True),
    ("mode", pa.string(), True),
    ("has_alpha", pa.bool_(), True),
    ("n_frames", pa.int32(), True),
    ("exif_orientation", pa.int8(), True),
    ("ext_mismatch", pa.bool_(), True),
    ("size_mismatch", pa.bool_(), True),
    ("sha256", pa.string(), True),
    ("pixel_hash", pa.string(), True),  # of the decoded RGB
    ("phash", pa.uint64(), True),
    ("file_size", pa.int64(), True),
    ("mtime_ns", pa.int64(), True),
)

AESTHETIC = _table(
    ("key", pa.string()),
    ("model", pa.string()),
    ("preproc_hash", pa.string()),
    ("score", pa.float64(), True),
)

TAGS = _table(
    ("key", pa.string()),
    ("model", pa.string()),
    ("tags", pa.list_(pa.struct([("tag", pa.string()), ("category", pa.int8()), ("prob", pa.float32())]))),
)

DUPES = _table(
    ("key", pa.string()),
    ("group_id", pa.int64()),
    ("keep", pa.bool_()),
    ("method", pa.string()),  # sha256 | pixel | phash
)

LABELS = _table(
    ("key", pa.string()),
    ("policy_hash", pa.string()),
    ("fixed_tags", _TEXTS),
    ("flex_tags", _TEXTS),
    ("quality", pa.string(), True),
    ("rating_tags", _TEXTS),
    ("year", pa.string(), True),
    ("aesthetic", pa.string(), True),
    ("n_tokens", pa.int16(), True),  # null without tokenizers
    ("tail_tags", _TEXTS, True),  # from here on of version 2, null in what version 1 wrote
    ("prose", _TEXTS, True),  # sentences, whole; several: one of them is drawn
    ("tag_variants", _TEXTS, True),  # further captions of tags: lines of fixed, flexible and tail tags
)

SELECT = _table(
    ("key", pa.string()),
    ("repeats", pa.int16()),
    ("bucket_w", pa.int16()),  # small buckets already merged
    ("bucket_h", pa.int16()),
    ("why", pa.string()),
)

INDEX = _table(  # one row per (key, bucket, flip): two stages may merge small buckets differently
    ("key", pa.string()),
    ("uid", pa.uint64()),
    ("orig_w", pa.int32()),
    ("orig_h", pa.int32()),
    ("bucket_w", pa.int16()),
    ("bucket_h", pa.int16()),
    ("resized_w", pa.int32()),
    ("resized_h", pa.int32()),
    ("crop_top", pa.int32()),
    ("crop_left", pa.int32()),
    ("shard", pa.string()),
    ("row", pa.int32()),
    ("vae_id", pa.string()),
    ("dtype", pa.string()),
    ("content", pa.string()),
    ("preproc_hash", pa.string()),
    ("flip", pa.bool_()),  # of the mirror image
)

QUARANTINE = _table(
    ("key", pa.string()),  # of a row without a readable id: `<source name>:<file>#<row>`
    ("step", pa.string()),
    ("kind", pa.string()),  # error | excluded
    ("reason", pa.string()),
    ("exception", pa.string(), True),
    ("message", pa.string()),
)


@dataclass(frozen=True)
class Quarantine:
    """One record that a step refused, or excluded by a rule."""

    key: str
    step: str
    reason: ErrorReason | ExcludedReason
    message: str  # names the file and, where there is one, the row
    exception: str | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Quarantine:
        """What stands in a row of the table."""
        return cls(row["key"], row["step"], row["reason"], row["message"], row["exception"])

    @property
    def kind(self) -> str:
        """`excluded` for what a rule left out, `error` for what is broken."""
        return "excluded" if self.reason in ExcludedReason.__args__ else "error"  # type: ignore[attr-defined]

    def row(self) -> dict[str, Any]:
        """The row of the quarantine table."""
        return {
            "key": self.key, "step": self.step, "kind": self.kind, "reason": self.reason,
            "exception": self.exception, "message": self.message,
        }  # fmt: skip


def quarantine_table(rows: Sequence[Quarantine]) -> pa.Table:
    """The rows as a table, sorted by key, then step, reason and message."""
    ordered = sorted(rows, key=lambda entry: (entry.key, entry.step, entry.reason, entry.message))
    return pa.Table.from_pylist([entry.row() for entry in ordered], schema=QUARANTINE)
