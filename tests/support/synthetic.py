"""A prepared dataset and a base model for trainer tests, made in a second: real files, drawn latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from train.data.index_writer import build_index
from train.data.shards import write_shard
from train.observe.times import OF_THE_MACHINE
from train.prepare.tables.schemas import SELECT
from train.recipe import rng

BUCKETS = ((128, 128), (96, 160), (160, 96))
TAGS = ("smile", "red hair", "blue hair", "outdoors", "hat", "solo", "k-on!", "masterpiece", "safe", "newest")


def make_dataset(
    folder: Path,
    counts: Sequence[int] = (30, 18, 16),
    *,
    stages: Sequence[str] = ("pretrain", "ft1", "ft2"),
    seed: int = 0,
    buckets: Sequence[tuple[int, int]] = BUCKETS,
) -> Path:
    """`folder` with latents, index and one selection of everything per stage; `counts` images per bucket."""
    (folder / "latents").mkdir(parents=True)
    (folder / "labels").mkdir()
    rows: list[dict[str, Any]] = []
    for (width, height), count in zip(buckets, counts, strict=False):
        shard = f"latents/{width}x{height}-00000.safetensors"
        generator = torch.Generator().manual_seed(seed + width)
        latents = torch.randn(count, 4, height // 8, width // 8, generator=generator) / 0.13025
        write_shard(folder / shard, latents.half(), {"vae_id": "test"})
        for row in range(count):
            key = f"test:{width}x{height}/{row}"
            tags = rng.shuffled(TAGS, seed, rng.uid_of(key), 0)
            rows.append({
                "key": key, "uid": rng.uid_of(key), "orig_w": width * 2 + row, "orig_h": height * 2, "bucket_w": width,
                "bucket_h": height, "resized_w": width + row % 3, "resized_h": height, "crop_top": 0, "crop_left": row % 2,
                "shard": shard, "row": row, "content_hash": f"{key}", "gate_rating": "g",
                "fixed_tags": ["1girl", "miku"], "flex_tags": tags[: 3 + row % 6], "quality": "masterpiece",
                "rating_tags": ["safe"], "year": "newest", "aesthetic": None,
            })  # fmt: skip
    rows.sort(key=lambda r: (r["key"], r["bucket_w"], r["bucket_h"]))
    index = pa.Table.from_pylist(rows, schema=_schema())
    chosen = [{"key": r["key"], "repeats": 1, "bucket_w": r["bucket_w"], "bucket_h": r["bucket_h"], "why": "all"} for r in rows]
    selection = pa.Table.from_pylist(chosen, schema=SELECT)
    pq.write_table(index, folder / "index.parquet")
    for stage in stages:
        pq.write_table(selection, folder / f"select_{stage}.parquet")
    build_index(folder, index, dict.fromkeys(stages, selection), {"vae_id": "", "content": "sample", "buckets": "t"})
    (folder / "dataset.json").write_text(json.dumps({"schema_version": 1, "fingerprint": "test"}))
    return folder


def _schema() -> pa.Schema:
    texts, small = pa.list_(pa.string()), pa.int16()
    return pa.schema([
        ("key", pa.string()), ("uid", pa.uint64()), ("orig_w", pa.int32()), ("orig_h", pa.int32()), ("bucket_w", small),
        ("bucket_h", small), ("resized_w", pa.int32()), ("resized_h", pa.int32()), ("crop_top", pa.int32()),
        ("crop_left", pa.int32()), ("shard", pa.string()), ("row", pa.int32()), ("content_hash", pa.string()),
        ("gate_rating", pa.string()), ("fixed_tags", texts), ("flex_tags", texts), ("quality", pa.string()),
        ("rating_tags", texts), ("year", pa.string()), ("aesthetic", pa.string()),
    ])  # fmt: skip


def stage_yaml(
    path: Path, *, data: Path, model: Path | str, output: Path, stage: str = "pretrain", **changes: str
) -> Path:
    """A stage config for the tiny model: 8 x 2 images per update, fp32, `changes` as key__inner=value text."""
    trains = stage == "pretrain"
    optimizer = (
        "{name: adamw, unet_lr: 1e-3, text_encoder_lr: 5e-4, weight_decay: 0.01}"
        if trains else "{name: adafactor, unet_lr: 3e-4}"
    )  # fmt: skip
    schedule = (
        "{name: cosine_restarts, min_lr: 1e-4, decay: 0.9}" if trains else "{name: constant_with_warmup, warmup_steps: 2}"
    )
    path.write_text(
        f"stage: {stage}\nseed: 31\noutput_dir: {output}\nepochs: 3\nprecision: fp32\n"
        f"model: {{init_from: {model}, train_text_encoders: {str(trains).lower()}, gradient_checkpointing: none}}\n"
        f"data: {{path: {data}, workers: 0}}\nbatch: {{micro: 4, effective: 16}}\n"
        f"optimizer: {optimizer}\nschedule: {schedule}\nnoise: {{offset: {0.0 if trains else 0.0357}}}\n"
        "checkpoint: {every_steps: 4, background: false}\nexport: {license: Apache-2.0}\ntracking: {trace: true}\n"
    )
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: value for k, value in line.items() if k not in OF_THE_MACHINE} for line in lines]


def weights_hash(run: Path) -> str:
    """sha256 of parameters and optimizer state of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return str(np.char.add(manifest["files"]["model.safetensors"]["sha256"],
                           manifest["files"]["optimizer.safetensors"]["sha256"]))  # fmt: skip
