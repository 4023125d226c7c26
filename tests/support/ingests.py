"""Small sources with good and bad posts, and what ingest makes of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare import ingest
from train.prepare.tables.quarantine import Complaint
from train.prepare.tables.units import read_table

GOOD = {"id": 1, "rating": "g", "score": 3, "tag_string_general": "1girl smile", "file_ext": "png"}


def config(folder: Path, path: Path, adapter: str = "danbooru", **options: Any) -> DatasetConfig:
    source = SourceConfig("s", adapter, str(path), **options)  # type: ignore[arg-type]
    return DatasetConfig(name="d", root=str(folder / "out"), sources=[source], max_quarantine_fraction=1.0)


def run(config_: DatasetConfig, *, cut: bool = False) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(records by key, quarantine rows); `cut`: a file of the source cannot be read to the end."""
    with pytest.raises(Complaint, match="to the end") if cut else contextlib.nullcontext():
        ingest.run(config_)
    records = read_table(dataset_dir(config_), "records").to_pylist()
    return {row["key"]: row for row in records}, pq.read_table(dataset_dir(config_) / "quarantine.parquet").to_pylist()

BAD_POSTS: dict[str, Any] = {
    "no id": {"tag_string": "x"},
    "id is text": GOOD | {"id": "twelve"},
    "id is negative": GOOD | {"id": -1},
    "id is true": GOOD | {"id": True},
    "id is huge": GOOD | {"id": 10**30},
    "id is a fraction": GOOD | {"id": 1.5},
    "score is text": GOOD | {"id": 2, "score": "many"},
    "score is a list": GOOD | {"id": 2, "score": [1]},
    "score too large": GOOD | {"id": 2, "score": 2**40},
    "width is a fraction": GOOD | {"id": 2, "image_width": 10.5},
    "no tags at all": {"id": 2, "rating": "g"},
    "tags are a number": {"id": 2, "tags": 7},
    "tag without name": {"id": 2, "tags": [{"category": 0}]},
    "unknown category": {"id": 2, "tags": [{"name": "x", "category": 9}]},
    "comma in a tag": GOOD | {"id": 2, "tag_string_general": "a foo,_bar"},
    "separator in a tag": GOOD | {"id": 2, "tag_string_general": "a|||b"},
    "nul in a tag": GOOD | {"id": 2, "tags_meta": ["a\0b"]},
    "line break in a tag": GOOD | {"id": 2, "tags_meta": ["a\nb"]},
    "tag is a number": GOOD | {"id": 2, "tags_meta": [3]},
    "half a surrogate": GOOD | {"id": 2, "tags_meta": ["\ud800"]},
    "flag is no flag": GOOD | {"id": 2, "is_deleted": "perhaps"},
    "path climbs": GOOD | {"id": 2, "file_name": "../../secret.png"},
    "path is absolute": GOOD | {"id": 2, "file_name": "/etc/passwd.png"},
    "path of a drive": GOOD | {"id": 2, "file_name": "C:\\secret.png"},
    "path with nul": GOOD | {"id": 2, "file_name": "a\0.png"},
    "path with line break": GOOD | {"id": 2, "file_name": "a\nb.png"},
    "a list": [1, 2],
    "a number": 5,
    "null": None,
}

BAD_LINES = {
    "no json": b"{'id': 2}", "cut": b'{"id": 2, "tag_str', "not utf-8": b'{"id": 2, "tag_string": "\xff\xfe"}',
    "two values": b'{"id": 2} {"id": 3}', "nan": b'{"id": 2, "tag_string": "x", "score": NaN}',
    "deep": b"[" * 100_000, "long number": b'{"id": ' + b"9" * 5000 + b"}", "nul": b"\0\0\0",
    "too long": b'{"id": 2, "tag_string": "' + b"x " * (5 << 20) + b'"}',
}  # fmt: skip


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, format="PNG")

BAD_CAPTIONS = {
    "utf-8": b"1girl, \xff", "utf-16": "1girl".encode("utf-16"), "nul": b"1girl\0", "long": b"x" * 65_537,
    "two separators": b"a ||| b ||| c",
}  # fmt: skip
