"""What values a stage config may hold, key by key and together; every problem is one sentence with the key's name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from train.config.dataset_rules import MAX_NAME
from train.config.schema import flatten
from train.config.source_rules import separator_problem

if TYPE_CHECKING:
    from train.config.stage import OptimizerConfig, StageConfig

_AT_LEAST = {  # key: smallest allowed value
    "seed": 0, "epochs": 1, "max_updates": 1,
    "data.caption_dropout_every_epochs": 0, "data.token_warmup_min": 0, "data.token_warmup_steps": 0,
    "data.workers": 0, "data.prefetch": 1, "batch.micro": 1, "batch.accumulation": 1, "batch.effective": 1,
    "batch.min_bucket": 1, "optimizer.unet_lr": 0, "optimizer.text_encoder_lr": 0,
    "optimizer.weight_decay": 0, "optimizer.max_grad_norm": 0, "schedule.cycles": 1, "schedule.min_lr": 0,
    "schedule.warmup_steps": 0, "schedule.processes": 1, "noise.offset": 0, "noise.multires_iterations": 0,
    "noise.input_perturbation": 0, "ema.every_steps": 1, "checkpoint.every_steps": 1, "checkpoint.keep": 2,
    "checkpoint.permanent_every_steps": 1, "sampling.every_steps": 0, "validation.every_steps": 0,
    "validation.images": 1, "launch.grace_s": 0,
}  # fmt: skip
_ABOVE_ZERO = (
    "schedule.decay", "optimizer.clip_threshold", "loss.huber_c", "loss.min_snr_gamma",
    "data.worker_timeout_s", "launch.collective_timeout_s",
)  # fmt: skip
_SHARES = ("data.tag_dropout", "data.caption_dropout", "validation.share", "ema.decay")


def stage_problems(config: StageConfig) -> list[str]:
    """Every problem of a loaded stage config; empty where there is none."""
    return _range_problems(config) + _cross_problems(config)


def _range_problems(config: StageConfig) -> list[str]:
    flat = flatten(config)
    problems = []
    for key, value in flat.items():
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))):
            problems.append(f"{key} is {value}, must be finite")
    for key, least in _AT_LEAST.items():
        if flat[key] is not None and not flat[key] >= least:
            problems.append(f"{key} is {flat[key]}, must be at least {least}")
    for key in _ABOVE_ZERO:
        if flat[key] is not None and not flat[key] > 0:
            problems.append(f"{key} is {flat[key]}, must be above 0")
    for key in _SHARES:
        if flat[key] is not None and not 0 <= flat[key] < 1:
            problems.append(f"{key} is {flat[key]}, must be in [0, 1)")
    for key in ("schedule.cycle_steps", "batch.split"):
        if isinstance(flat[key], int) and flat[key] < 1:
            problems.append(f"{key} is {flat[key]}, must be at least 1")
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            problems.append(f"optimizer.betas holds {beta}, each must be in [0, 1)")
    return problems


def _cross_problems(config: StageConfig) -> list[str]:
    model, data, batch, optimizer = config.model, config.data, config.batch, config.optimizer
    low, high = config.noise.timesteps
    strict = batch.determinism == "strict"
    stage_ok = 0 < len(config.stage) <= MAX_NAME and config.stage.replace("_", "").replace("-", "").isalnum()
    rules = [
        (not stage_ok, f"stage is {config.stage!r}: letters, digits, - and _ only, at most {MAX_NAME}, it names files"),
        (batch.micro > 0 and batch.effective % batch.micro != 0,
         f"batch.effective {batch.effective} is no multiple of batch.micro {batch.micro}"),
        (isinstance(batch.split, int) and batch.micro % max(int(batch.split), 1) != 0,
         f"batch.split {batch.split} does not divide batch.micro {batch.micro}"),
        (model.train_text_encoders and optimizer.text_encoder_lr is None,
         "model.train_text_encoders needs optimizer.text_encoder_lr"),
        (not model.train_text_encoders and optimizer.text_encoder_lr is not None,
         "optimizer.text_encoder_lr is set but model.train_text_encoders is false: remove one"),
        (not 0 <= low < high <= 1000, f"noise.timesteps is [{low}, {high}], must satisfy 0 <= low < high <= 1000"),
        (config.noise.zero_terminal_snr and config.loss.prediction != "v",
         "noise.zero_terminal_snr needs loss.prediction: v (epsilon carries no signal at snr 0)"),
        (config.loss.min_snr_gamma is not None and config.noise.zero_terminal_snr,
         "loss.min_snr_gamma gives the terminal step weight 0 with noise.zero_terminal_snr, so that it is never learnt: "
         "remove one"),
        (config.loss.min_snr_gamma is not None and config.loss.debiased,
         "loss.min_snr_gamma and loss.debiased are two weightings: choose one"),
        (optimizer.relative_step, "optimizer.relative_step: true discards the learning rate; leave it false"),
        (optimizer.warmup_init, "optimizer.warmup_init needs relative_step, which is refused; leave it false"),
        (strict and "auto" in (model.gradient_checkpointing, batch.split),
         "batch.determinism: strict refuses auto in model.gradient_checkpointing and batch.split, "
         "because what it picks depends on free memory: name a value"),
        (model.weights == "bf16" and config.precision != "bf16", "model.weights: bf16 needs precision: bf16"),
        (strict and model.attention == "cudnn",
         "batch.determinism: strict refuses model.attention: cudnn, whose gradients may differ from run to run; "
         "use auto, flash or math"),
        (strict and model.weights == "bf16", "batch.determinism: strict refuses model.weights: bf16"),
        (config.schedule.unit == "optimizer_step" and config.schedule.processes != 1,
         "schedule.processes needs schedule.unit: process_step"),
        (data.separator is not None and separator_problem(data.separator) is not None,
         f"data.separator is {data.separator!r}: {separator_problem(data.separator or '')}"),
        (batch.remainder != "carry" and strict, "batch.determinism: strict needs batch.remainder: carry"),
        (config.validation.every_steps > 0 and config.validation.share == 0,
         "validation.every_steps needs validation.share, such as 0.02: with 0 no image is held out"),
        (config.ema.device == "cpu" and not config.ema.decay, "ema.device: cpu without ema.decay keeps no average: set both"),
    ]  # fmt: skip
    return [message for broken, message in rules if broken] + _eps_problems(optimizer) + _unread_problems(optimizer)


def _unread_problems(optimizer: OptimizerConfig) -> list[str]:
    unread = ("betas",) if optimizer.name == "adafactor" else ("scale_parameter", "clip_threshold", "decay_rate")
    return [f"optimizer.{key} is {getattr(optimizer, key)}, but optimizer.name {optimizer.name} does not read it: leave it out"
            for key in unread if getattr(optimizer, key) != getattr(type(optimizer), key)]  # fmt: skip


def _eps_problems(optimizer: OptimizerConfig) -> list[str]:
    eps = optimizer.eps
    if eps is None:
        return []
    if optimizer.name == "adafactor":
        good = isinstance(eps, list | tuple) and len(eps) == 2 and all(isinstance(e, float | int) for e in eps)
        return [] if good else ["optimizer.eps of adafactor is a pair such as [1e-30, 1e-3]"]
    good = isinstance(eps, float | int) and not isinstance(eps, bool) and eps > 0
    return [] if good else [f"optimizer.eps is {eps!r}, must be a number above 0"]
