"""The predecessor opened by several processes: one of them reads its files for their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from stages import Stage

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine import handoff, processes
from train.model import source as model_source


def opened_by(rank: int, world: int, yaml: str, vae: str, pin: str) -> dict[str, Any]:
    config = load_stage([yaml], ["data.max_tokens=75", f"model.vae={vae}", *([f"model.init_sha256={pin}"] if pin else [])])
    read: list[str] = []
    plain = model_source.file_sha256
    model_source._sha256_while.cache_clear()
    model_source.file_sha256 = lambda path: read.append(Path(path).name) or plain(path)  # type: ignore[assignment, func-returns-value]
    try:
        with processes.watching(rank, world) as watch:
            source, components = handoff.open_source(config.origin, watch)
    finally:
        model_source.file_sha256 = plain
    weights = sum(p.detach().double().sum().item() for p in components.unet.parameters())
    return {"read": sorted(read), "sha256": source.sha256, "vae_sha256": source.vae_sha256, "weights": weights}


def test_the_main_process_alone_reads_the_files_for_their_hashes(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage, vae = Stage(tmp_path, dataset, base_model), str(base_model / "vae")
    alone = opened_by(0, 1, str(stage.yaml), vae, "")
    first, second = run_ranks(2, opened_by, tmp_path / "ranks", str(stage.yaml), vae, "")
    assert len(alone["sha256"]) == len(alone["vae_sha256"]) == 64
    assert first == {**alone, "read": first["read"]}
    assert second == {**alone, "read": []}
    assert len(first["read"]) == 4, "U-Net, both encoders, VAE"


def test_a_pinned_hash_is_held_against_what_each_process_reads(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage, vae = Stage(tmp_path, dataset, base_model), str(base_model / "vae")
    pin = model_source.model_sha256(base_model)
    found = run_ranks(2, opened_by, tmp_path / "ranks", str(stage.yaml), vae, pin)
    assert [one["sha256"] for one in found] == [pin, pin]
    with pytest.raises(Halt, match=r"model\.init_sha256 says") as halted:
        opened_by(0, 1, str(stage.yaml), vae, "f" * 64)
    assert halted.value.code == ExitCode.MISMATCH
