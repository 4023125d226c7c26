"""Checkpoints made by hand, and what reading a damaged one says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from train.config.stage import CheckpointConfig
from train.storage import checkpoint, manifest
from train.storage.checkpoint import Progress
from train.storage.resume import Expectations

KEEP2 = CheckpointConfig(keep=2)


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    model = {"w": torch.randn(4, 3, generator=g), "b": torch.randn(5, generator=g)}
    return {"model": model, "optimizer": {f"{n}/exp_avg": t * 2 for n, t in model.items()}}


def save_steps(run, *steps, settings=KEEP2, permanent=()):
    for step in steps:
        progress = Progress(step, step, 0, step * 4)
        checkpoint.save(run, progress, some_tensors(step), expect().to_state(), settings, permanent=step in permanent)


def expect(**changes) -> Expectations:
    base = {
        "stage": "pretrain",
        "config": {"seed": 31, "batch.micro": 4, "data.workers": 2, "epochs": 3},
        "facts": {"plan": "p", "dataset": "d"},
    }
    return Expectations(**{**base, **changes})


def signed(folder: Path, name: str, data: bytes, **changes: Any) -> None:
    """Replace a file and sign it: damage that no checksum finds."""
    (folder / name).write_bytes(data)
    found = manifest.read(folder)
    count = changes.pop("tensors", found.files[name].tensors)
    record = manifest.FileRecord(len(data), hashlib.sha256(data).hexdigest(), count)
    files = {**found.files, name: record}
    (folder / manifest.NAME).write_bytes(manifest.encode(manifest.Manifest(found.run_id, found.step, False, files)))
