"""Overlays and launch files: they load, they fit the card they are named after, and accelerate understands them."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config.schema import flatten
from train.config.stage import load_stage
from train.model import memory
from train.recipe.buckets import make_buckets
from train.recipe.order import share_of
from train.tools.estimate.machines import GPUS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FITS = {  # overlay: card, stages
    "24gb": ("RTX-4090", ("ft1", "ft2")),
    "24gb_pretrain": ("RTX-4090", ("pretrain",)),
    "24gb_16bit": ("RTX-4090", ("ft1", "ft2")),
    "48gb": ("L40S", ("ft1", "ft2")),
    "48gb_pretrain": ("L40S", ("pretrain",)),
    "80gb": ("A100-80GB", ("pretrain", "ft1", "ft2")),
    "141gb": ("H200", ("pretrain", "ft1", "ft2")),
}
KEEPS_THE_RESULT = ("24gb", "24gb_pretrain", "48gb", "80gb", "141gb")
FREE = {"model.gradient_checkpointing", "model.channels_last", "model.compile", "batch.split", "optimizer.offload"}
# Overlay of a small card: GiB that it has free, images at once and GiB predicted in stage 1 and in a finetune.
SMALL = {"12gb": (11.6, (2, 10.3), (2, 10.0)), "16gb": (15.0, (4, 12.1), (6, 13.5)), "24gb": (23.0, (8, 15.8), (12, 18.7))}


SEVERAL = (  # stage, overlay, card, processes, GiB predicted on each: nothing is held twice because they are several
    ("pretrain", None, "A100-80GB", 2, 67.1),
    ("pretrain", "141gb", "H200", 2, 127.8),
    ("pretrain", "8x80gb", "H100-80GB", 8, 70.5),
    ("ft1", "8x80gb", "H100-80GB", 8, 62.0),
    ("ft2", "8x80gb", "H100-80GB", 8, 62.0),
)


# Overlay of an adapter's stage: GiB that such a card has free, images at once, GiB predicted.
ADAPTERS = {"lora_8gb": (7.6, 2, 6.8), "lora_12gb": (11.6, 1, 9.9), "lora_16gb": (15.0, 4, 12.5)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_overlay_of_an_adapter_fits_its_card(name: str) -> None:
    free_gib, at_once, gib = ADAPTERS[name]
    config = load_stage([CONFIGS / "lora.yaml", CONFIGS / "memory" / f"{name}.yaml"])
    choice = memory.settle(config.running, int(free_gib * memory.GIB), make_buckets())
    assert config.batch.micro // choice.split == at_once
    assert choice.prediction.total / memory.GIB == pytest.approx(gib, abs=0.1)
    adapter = memory.setup_of(config.running).adapter
    assert adapter is not None
    # Rank 16 over SDXL's attention and feed-forward: 16 x (inputs + outputs) of 722 matrices.
    assert adapter.values == 42_557_440 and choice.prediction.optimizer == pytest.approx(8 * adapter.values, rel=1e-3)
    assert choice.prediction.frozen == adapter.base_bytes < 6_770_368_009


@pytest.mark.parametrize("name", SMALL)
def test_overlay_of_a_small_card_keeps_the_recipe(name: str) -> None:
    """fp32 masters in host memory, the stage's own precision, batch and optimizer: only where things lie is another."""
    free_gib, *told = SMALL[name]
    for stage, (at_once, gib) in zip(("pretrain", "ft1"), told, strict=True):
        plain, config = (load_stage([CONFIGS / f"{stage}.yaml", *more]) for more in ([], [CONFIGS / f"memory/{name}.yaml"]))
        choice = memory.settle(config.running, int(free_gib * memory.GIB), make_buckets())
        assert config.batch.micro // choice.split == at_once
        assert choice.prediction.total / memory.GIB == pytest.approx(gib, abs=0.05)
        before, after = flatten(plain), flatten(config)
        assert {key for key in after if after[key] != before[key]} <= FREE and config.optimizer.offload == "host"


def test_every_overlay_is_known() -> None:
    assert {path.stem for path in CONFIGS.glob("memory/*.yaml")} == {*FITS, *SMALL, *ADAPTERS, "8x80gb"}


@pytest.mark.parametrize(("stage", "overlay", "gpu", "world", "gib"), SEVERAL)
def test_several_cards_fit_and_share_the_update(
    stage: str, overlay: str | None, gpu: str, world: int, gib: float
) -> None:
    files = [CONFIGS / f"{stage}.yaml", *([CONFIGS / "memory" / f"{overlay}.yaml"] if overlay else [])]
    config = load_stage(files)
    accumulation, _ = share_of(config.batch, world)
    assert config.batch.micro * accumulation * world == config.batch.effective
    choice = memory.settle(config.running, int(GPUS[gpu].free_gib * memory.GIB), make_buckets(), world)
    assert choice.prediction.total / memory.GIB == pytest.approx(gib, abs=0.05)
    assert choice.prediction.total < choice.usable_bytes
    plain, changed = flatten(load_stage(files[:1])), flatten(config)
    touched = {key for key, value in changed.items() if value != plain[key]}
    assert touched <= {*FREE, "batch.micro", "optimizer.sharding", "checkpoint.every_minutes"}


@pytest.mark.parametrize("name", FITS)
def test_overlay_fits_its_card(name: str) -> None:
    gpu, stages = FITS[name]
    for stage in stages:
        config = load_stage([CONFIGS / f"{stage}.yaml", CONFIGS / "memory" / f"{name}.yaml"])
        choice = memory.settle(config.running, int(GPUS[gpu].free_gib * memory.GIB), make_buckets())
        assert config.batch.micro // choice.split >= 8, "kernels of fewer images leave the card idle"
        plain, changed = flatten(load_stage([CONFIGS / f"{stage}.yaml"])), flatten(config)
        touched = {key for key, value in changed.items() if value != plain[key]}
        assert "batch.micro" not in touched
        if name in KEEPS_THE_RESULT:
            assert touched <= FREE


@pytest.mark.parametrize(("name", "world"), [("one_gpu", 1), ("two_gpus", 2), ("multi_node", 6), ("eight_gpus", 8)])
def test_launch_files(name: str, world: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(CONFIGS / "launch" / f"{name}.yaml"))
    assert loaded.num_processes == world
    assert loaded.mixed_precision == "no"
    overlay = [CONFIGS / "memory/8x80gb.yaml"] if world == 8 else []
    config = load_stage([CONFIGS / "pretrain.yaml", *overlay])
    assert config.running.tiles_per_update % world == 0
