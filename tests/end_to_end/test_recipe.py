"""The shipped stage configs against the model card's tables, typed from the card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.config.dataset import load_settings
from train.config.stage import StageConfig, load_stage
from train.recipe.order import Plan, tiles_per_update
from train.recipe.schedule import lr_at

ROOT = Path(__file__).resolve().parents[2]

# Model card of Animagine XL 3.1, "Hyperparameters": epochs, U-Net lr, trains text encoders, batch size, gradient
# accumulation, GPUs, noise offset, optimizer, schedule.
CARD = {
    "pretrain": (10, 1e-5, True, 16, 3, 2, 0.0, "adamw", "cosine_restarts"),
    "ft1": (10, 2e-6, False, 48, 1, 1, 0.0357, "adafactor", "constant_with_warmup"),
    "ft2": (15, 1e-6, False, 48, 1, 1, 0.0357, "adafactor", "constant_with_warmup"),
}


def shipped(name: str) -> StageConfig:
    return load_stage([ROOT / "configs" / f"{name}.yaml"])


@pytest.mark.parametrize("stage", CARD)
def test_card_row(stage: str) -> None:
    epochs, lr, encoders, micro, accumulation, gpus, offset, optimizer, schedule = CARD[stage]
    config = shipped(stage)
    assert config.stage == stage
    assert config.epochs == epochs
    assert config.optimizer.unet_lr == lr
    assert config.model.train_text_encoders is encoders
    assert config.optimizer.text_encoder_lr == (1e-5 if encoders else None)
    assert (config.batch.micro, config.batch.effective) == (micro, micro * accumulation * gpus)
    assert tiles_per_update(config.batch.micro, config.batch.effective, gpus) == (accumulation * gpus, accumulation)
    assert config.noise.offset == offset
    assert config.optimizer.name == optimizer
    assert config.schedule.name == schedule


def test_pretraining_arguments() -> None:
    """Card: weight decay 0.1, betas (0.9, 0.99); 10 cycles, min lr 1e-6, decay 0.9, first cycle 9,099 steps."""
    config = shipped("pretrain")
    assert config.optimizer.weight_decay == 0.1
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.schedule.cycles == 10
    assert config.schedule.min_lr == 1e-6
    assert config.schedule.decay == 0.9
    assert config.schedule.cycle_steps == "epoch"
    assert config.schedule.unit == "optimizer_step"


@pytest.mark.parametrize("stage", ["ft1", "ft2"])
def test_adafactor_arguments(stage: str) -> None:
    """The card's 3.0 column: scale_parameter, relative_step, warmup_init all False; 100 warmup steps."""
    config = shipped(stage)
    arguments = config.optimizer
    assert (arguments.scale_parameter, arguments.relative_step, arguments.warmup_init) == (False, False, False)
    assert config.schedule.warmup_steps == 100


# Model card of Animagine XL 3.0 and its released config: starts from, images, U-Net lr, encoders' lr, micro-batch, effective
# batch, noise offset; 10 epochs, Adafactor, constant with 100 warmup steps, max_grad_norm 0 throughout.
PREVIOUS = {
    "pretrain": ("models/animagine-xl-2.0.safetensors", 1_271_990, 7.5e-6, 3.75e-6, 48, 96, 0.0),
    "ft1": ("runs/animagine_3_0/pretrain", 2_500, 2e-6, None, 48, 48, 0.0357),
    "ft2": ("runs/animagine_3_0/ft1", 3_500, 1e-6, None, 48, 48, 0.0357),
}
PREVIOUS_UPDATES = {"pretrain": 132_490, "ft1": 520, "ft2": 720}  # about 132,590, 521 and 729, short batches counted


@pytest.mark.parametrize("stage", PREVIOUS)
def test_the_released_3_0(stage: str) -> None:
    config = shipped(f"animagine_3_0/{stage}")
    start, images, lr, encoder_lr, micro, effective, offset = PREVIOUS[stage]
    assert (config.stage, config.model.init_from, config.output_dir) == (stage, start, f"runs/animagine_3_0/{stage}")
    assert (config.optimizer.unet_lr, config.optimizer.text_encoder_lr) == (lr, encoder_lr)
    assert config.model.train_text_encoders == (encoder_lr is not None)
    assert (config.batch.micro, config.batch.effective, config.epochs) == (micro, effective, 10)
    assert (config.optimizer.name, config.optimizer.max_grad_norm, config.precision) == ("adafactor", 0.0, "fp16")
    assert not (config.optimizer.scale_parameter or config.optimizer.relative_step or config.optimizer.warmup_init)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("constant_with_warmup", 100)
    assert (config.noise.offset, config.data.separator, config.data.max_tokens) == (offset, "|||", 225)
    assert images // effective * config.epochs == PREVIOUS_UPDATES[stage]


def test_stages_follow_each_other() -> None:
    pretrain, ft1, ft2 = (shipped(stage) for stage in CARD)
    assert ft1.model.init_from == pretrain.output_dir
    assert ft2.model.init_from == ft1.output_dir
    assert len({pretrain.seed, ft1.seed, ft2.seed}) == 3
    assert all(c.data.separator == "|||" and c.data.shuffle_tags and c.data.max_tokens == 225 for c in (pretrain, ft1, ft2))
    assert all(c.precision == "fp16" for c in (pretrain, ft1, ft2))
    # Notebook; the finetunes as 3.0's released config, the only Adafactor config of the lab.
    assert [c.optimizer.max_grad_norm for c in (pretrain, ft1, ft2)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("folder", ["", "as_run/"])
def test_shipped_selections_fit_their_stages(folder: str) -> None:
    """A dataset prepared by the shipped dataset.yaml is never refused for small buckets by the shipped stage."""
    selections = load_settings([ROOT / f"configs/{folder}dataset.yaml"]).select
    for stage in CARD if not folder else ["pretrain"]:
        batch = shipped(folder + stage).batch
        assert selections[stage].min_bucket >= (batch.min_bucket or batch.micro), stage


def test_one_cycle_is_one_epoch() -> None:
    """873,504 images / 96 = 9,099 updates, exactly one cycle of the schedule; 90,990 in all."""
    config = shipped("pretrain")
    images = 873_504
    plan = Plan(
        np.arange(images, dtype=np.uint64),
        np.full(images, 1024, dtype=np.int16),
        np.full(images, 1024, dtype=np.int16),
        seed=config.seed,
        tile_images=config.batch.micro,
        tiles_per_update=config.images.order.tiles_per_update,
        epochs=config.epochs,
    )
    assert (plan.updates_per_epoch, plan.total_updates) == (9_099, 90_990)
    lr = [
        lr_at(k, peak=config.optimizer.unet_lr, config=config.schedule, cycle_updates=plan.updates_per_epoch, total_updates=plan.total_updates)
        for k in (1, 9_098, 9_099, 90_989)
    ]
    assert lr == pytest.approx([9.99999973e-06, 1.00000027e-06, 9e-06, 1.00000009e-06], rel=1e-8)


def test_every_number_of_a_stage_names_its_source() -> None:
    for name in (*CARD, *(f"animagine_3_0/{stage}" for stage in PREVIOUS)):
        for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines():
            value = line.split("#")[0].partition(":")[2].strip()
            if value and value.strip("[]").replace(".", "").replace(",", "").replace(" ", "").replace("e-", "").isdigit():
                assert any(f"# {word}" in line for word in ("card", "notebook", "config", "ours", "assumption")), (name, line)


def test_stage_files_are_short() -> None:
    for name in CARD:
        assert len((ROOT / "configs" / f"{name}.yaml").read_text().splitlines()) <= 60
