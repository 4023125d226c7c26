"""Rows of an index typed by hand, and the set built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.data.index_writer import build_index
from train.prepare.tables.schemas import SELECT

META = {"vae_id": "v", "content": "sample", "buckets": "b"}


def row(key: str, **changes: Any) -> dict[str, Any]:
    return {
        "key": key, "orig_w": 300, "orig_h": 200, "bucket_w": 128, "bucket_h": 96, "resized_w": 144, "resized_h": 96,
        "crop_top": 0, "crop_left": 8, "shard": "latents/128x96-00000.safetensors", "row": 3, "content_hash": "c",
        "gate_rating": "g", "fixed_tags": ["1girl"], "flex_tags": ["smile", "hat"], "quality": "best quality",
        "rating_tags": ["safe"], "year": None, "aesthetic": None,
    } | changes  # fmt: skip


def index_of(rows: list[dict[str, Any]]) -> pa.Table:
    texts = pa.list_(pa.string())
    kinds = {"fixed_tags": texts, "flex_tags": texts, "rating_tags": texts, "year": pa.string(), "aesthetic": pa.string(),
             "bucket_w": pa.int16(), "bucket_h": pa.int16()}  # fmt: skip
    names = list(row("x"))
    fields = [(name, kinds.get(name, pa.string() if isinstance(row("x")[name], str) else pa.int32())) for name in names]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def selection_of(*picked: tuple[str, int, int, int]) -> pa.Table:
    names = ("key", "repeats", "bucket_w", "bucket_h")
    rows = [dict(zip(names, one, strict=True)) | {"why": "all"} for one in picked]
    return pa.Table.from_pylist(rows, schema=SELECT)


def built(folder: Path, rows: list[dict[str, Any]], **selections: pa.Table) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text('{"schema_version": 1}')
    pq.write_table(index_of(rows), folder / "index.parquet")
    for stage, table in selections.items():
        pq.write_table(table, folder / f"select_{stage}.parquet")
    build_index(folder, index_of(rows), selections, META)
    return folder
