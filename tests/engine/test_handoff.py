"""The predecessor opened by several processes: one of them reads its files for their hashes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks
from safetensors.torch import load_file, save_file
from stages import Stage

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.engine import handoff, processes, setup
from train.model import networks
from train.model import source as model_source
from train.optim.fsdp2 import full, local


def opened_by(rank: int, world: int, yaml: str, vae: str, pin: str) -> dict[str, Any]:
    config = load_stage([yaml], ["data.max_tokens=75", f"model.vae={vae}", *([f"model.init_sha256={pin}"] if pin else [])])
    read: list[str] = []
    plain = model_source.file_sha256
    model_source._sha256_while.cache_clear()
    model_source.file_sha256 = lambda path: read.append(Path(path).name) or plain(path)  # type: ignore[assignment, func-returns-value]
    try:
        with processes.watching(rank, world) as watch:
            source, _ = handoff.open_source(config.origin, watch)
    finally:
        model_source.file_sha256 = plain
    return {"read": sorted(read), "sha256": source.sha256, "vae_sha256": source.vae_sha256}


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


def trained_on(rank: int, world: int, yaml: str, sharding: str) -> dict[str, Any]:
    """Tensors of the U-Net and the encoders read from files, and the sums of what each parameter then holds."""
    config = load_stage([yaml], ["data.max_tokens=75", "batch.micro=2", "batch.effective=8", "optimizer.sharding=" + sharding])
    read: list[str] = []
    plain = networks.to_tensor
    networks.to_tensor = lambda blob: read.append(str(blob.shape)) or plain(blob)  # type: ignore[func-returns-value]
    try:
        machine = setup.open_machine(config.batch, config.launch)
        with processes.watching(rank, world) as watch:
            source, components = handoff.open_source(config.origin, watch)
            before = sum(p.numel() for p in components.unet.parameters() if not p.is_meta)
            data = setup.open_data(config.images, source)
            model = setup.open_model(config.running, config.objective, machine, data.plan, source, components)
    finally:
        networks.to_tensor = plain
    held = dict(model.networks.named_parameters())
    sums = {name: full(p.detach()).double().square().sum().item() for name, p in held.items()}
    ids = [name for name, buffer in model.networks.named_buffers() if name.endswith("position_ids") and buffer.flatten().tolist() != list(range(buffer.numel()))]
    return {"read": len(read), "before": before, "here": sum(local(p).numel() for p in held.values()), "sums": sums, "ids": ids}


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_main_process_reads_the_weights_and_the_others_receive_them(
    sharding: str, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    first, second = run_ranks(2, trained_on, tmp_path / "ranks", str(stage.yaml), sharding)
    components = networks.build(model_source.open_folder(base_model))
    parts = (("unet", components.unet), ("text_encoder", components.text_encoder), ("text_encoder_2", components.text_encoder_2))
    whole = {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}
    assert first["sums"] == second["sums"] == {name: p.detach().double().square().sum().item() for name, p in whole.items()}
    vae = len(list(components.vae.parameters()))
    assert first["read"] in (len(whole), len(whole) + vae)  # the VAE where pictures are drawn
    assert second["read"] == 0
    assert first["before"] == second["before"] == 0  # nothing lies whole on any process before it is cut
    assert first["ids"] == second["ids"] == []
    assert first["here"] + second["here"] == sum(p.numel() for p in whole.values()) * (2 if sharding == "none" else 1)


def test_weights_that_are_not_finite_stop_every_process_and_the_main_one_names_them(
    base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(base_model, damaged)
    file = next((damaged / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    said = run_ranks(2, _halted, tmp_path / "ranks", str(Stage(tmp_path, dataset, damaged).yaml))
    assert [code for code, _ in said] == [int(ExitCode.MISMATCH)] * 2
    assert name in said[0][1]
    assert "as the main process says" in said[1][1]


def _halted(rank: int, world: int, yaml: str) -> tuple[int, str]:
    with pytest.raises(Halt) as halted:
        trained_on(rank, world, yaml, "none")
    return int(halted.value.code), halted.value.message
