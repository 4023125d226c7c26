"""What values of a stage config do not go together; every problem is one sentence with the keys' names.

Types and ranges stand at the keys (`train/config/stage.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from train.config import adapter, combinations
from train.config.dataset_rules import MAX_NAME
from train.config.key import default_of
from train.config.sound import judged
from train.config.source_rules import separator_problem

if TYPE_CHECKING:
    from train.config.stage import NoiseConfig, OptimizerConfig, ScheduleConfig, StageConfig


def stage_problems(config: StageConfig) -> Iterator[str]:
    """Every pair of keys that does not go together; keys that are unsound by themselves are left out."""
    yield from judged(config, _RULES)


def _strict(config: StageConfig) -> bool:
    return config.batch.determinism == "strict"


def _eps(optimizer: OptimizerConfig) -> str | None:
    eps = optimizer.eps
    if eps is None:
        return None
    if optimizer.name in ("lion", "lion8bit", "came"):
        return f"optimizer.eps is {eps!r}, but optimizer.name {optimizer.name} does not read it: leave it out"
    if optimizer.name == "adafactor":
        good = isinstance(eps, list | tuple) and len(eps) == 2 and all(isinstance(e, float | int) for e in eps)
        return None if good else "optimizer.eps of adafactor is a pair such as [1e-30, 1e-3]"
    good = isinstance(eps, float | int) and not isinstance(eps, bool) and eps > 0
    return None if good else f"optimizer.eps is {eps!r}, must be a number above 0"


def _unread(optimizer: OptimizerConfig) -> str | None:
    unread = ("betas",) if optimizer.name == "adafactor" else ("scale_parameter", "clip_threshold", "decay_rate")
    held = {field.name: (getattr(optimizer, field.name), default_of(field)) for field in fields(optimizer) if field.name in unread}
    told = [f"optimizer.{key} is {value}, but optimizer.name {optimizer.name} does not read it: leave it out"
            for key, (value, plain) in held.items() if value != plain]  # fmt: skip
    return "; ".join(told) or None


def _groups(optimizer: OptimizerConfig) -> str | None:
    patterns = [group.match for group in optimizer.groups]
    told = [f"optimizer.groups has {pattern!r} twice: only the last would count" for pattern in set(patterns) if patterns.count(pattern) > 1]
    told += [f"optimizer.groups {group.match!r}: lr 0 freezes for the whole run, until says nothing then: remove one"
             for group in optimizer.groups if group.lr == 0 and group.until is not None]  # fmt: skip
    told += [f"optimizer.groups {group.match!r} has neither lr nor until: give one"
             for group in optimizer.groups if group.lr is None and group.until is None]  # fmt: skip
    return "; ".join(told) or None


# What of each class is an argument here: neither a key of its own, nor what changes which state it keeps.
ARGS: dict[str, tuple[str, ...]] = {
    "lion": ("weight_decouple", "fixed_decay"),
    "prodigy": ("beta3", "d0", "d_coef", "growth_rate", "weight_decouple", "fixed_decay", "bias_correction", "safeguard_warmup"),
    "came": ("beta3", "clip_threshold", "eps1", "eps2", "weight_decouple", "fixed_decay"),
    "schedulefree": ("r", "weight_lr_power"),
}


def _args(optimizer: OptimizerConfig) -> str | None:
    known = ARGS.get(optimizer.name, ())
    told = f"accepted are {', '.join(known)}" if known else "it accepts none; its arguments are keys of optimizer"
    flags = ("weight_decouple", "fixed_decay", "bias_correction", "safeguard_warmup")
    wrong = [f"optimizer.args.{name} is nothing that optimizer.name {optimizer.name} reads: {told}" for name in optimizer.args if name not in known]
    for name, value in optimizer.args.items():
        if name in known and (isinstance(value, bool) != (name in flags) or not isinstance(value, int | float)):
            wrong.append(f"optimizer.args.{name} is {value!r}, must be {'true or false' if name in flags else 'a number'}")
        elif name in known and name not in flags and value <= 0:
            wrong.append(f"optimizer.args.{name} is {value!r}, must be above 0")
        elif name == "beta3" and value >= 1:
            wrong.append(f"optimizer.args.beta3 is {value!r}, must be below 1")
    return "; ".join(wrong) or None


def _prodigy(config: StageConfig) -> str | None:
    """Its step size is one number over all that trains, times the first group's rate: what asks for more is refused."""
    optimizer = config.optimizer
    own = {optimizer.unet_lr, *(lr for lr in (optimizer.text_encoder_lr, optimizer.text_encoder_2_lr) if lr is not None)}
    found = {
        "different learning rates (optimizer.unet_lr, text_encoder_lr)": len(own) > 1,
        "optimizer.groups other than lr 0": any(group.lr != 0 for group in optimizer.groups),
        f"optimizer.sharding: {optimizer.sharding}": optimizer.sharding != "none",
        "model.weights: bf16": config.model.weights == "bf16",
    }
    told = [name for name, set_so in found.items() if set_so]
    return f"optimizer.name prodigy finds one step size for all that trains and refuses {' and '.join(told)}" if told else None


def _schedule_free(config: StageConfig) -> str | None:
    """It keeps an average, which goes on moving where a rate is 0, and numbers of each group."""
    optimizer = config.optimizer
    found = {
        "ema.decay (it keeps an average of its own, which is exported)": config.ema.decay is not None,
        "optimizer.groups with until (the average goes on moving)": any(group.until is not None for group in optimizer.groups),
        f"optimizer.sharding: {optimizer.sharding}": optimizer.sharding != "none",
        "model.weights: bf16": config.model.weights == "bf16",
        "optimizer.betas whose first is 0": optimizer.betas[0] == 0,
    }
    told = [name for name, set_so in found.items() if set_so]
    return f"optimizer.name schedulefree refuses {' and '.join(told)}" if told else None


# What a schedule reads of the keys that only some read; `unit`, `processes` and the keys of the cycle stand at their
# defaults where they say nothing, and older configs may hold them beside constant and constant_with_warmup.
_SCHEDULE_READS = {
    "cosine_restarts": {"min_lr", "decay", "cycles", "cycle_steps", "first_step_at_min", "unit"},
    "constant": {"unit", "cycle_steps", "first_step_at_min"},
    "constant_with_warmup": {"warmup_steps", "unit", "cycle_steps", "first_step_at_min"},
    "cosine": {"min_lr", "warmup_steps"},
    "linear": {"min_lr", "warmup_steps"},
    "wsd": {"min_lr", "warmup_steps", "cooldown_steps"},
}


def _unread_schedule(schedule: ScheduleConfig) -> str | None:
    some = set().union(*_SCHEDULE_READS.values()) - _SCHEDULE_READS[schedule.name]
    told = [
        f"schedule.{field.name} is {getattr(schedule, field.name)}, but schedule.name {schedule.name} does not read it: leave it out"
        for field in fields(schedule)
        if field.name in some and getattr(schedule, field.name) != default_of(field)
    ]
    return "; ".join(told) or None


def _whole_steps(config: StageConfig) -> str | None:
    """A number of steps is whole from 1 on; below it is a share."""
    steps = {
        "schedule.warmup_steps": config.schedule.warmup_steps, "schedule.cooldown_steps": config.schedule.cooldown_steps,
        "data.token_warmup_steps": config.data.token_warmup_steps,
    }  # fmt: skip
    told = [f"{key} is {value}: a whole number of updates, or a share below 1" for key, value in steps.items()
            if value >= 1 and value != int(value)]  # fmt: skip
    return "; ".join(told) or None


_KINDS = ("tags", "tags_prose", "prose")


def _mix(mix: Mapping[str, float]) -> str | None:
    if unknown := sorted(set(mix) - set(_KINDS)):
        return f"data.mix names {', '.join(unknown)}: it holds shares of {', '.join(_KINDS)}"
    return "data.mix holds no share above 0" if mix and not sum(mix.values()) > 0 else None


def _law(noise: NoiseConfig) -> str | None:
    """What noise.law is told by noise.law_args."""
    given, numbers = noise.law_args, all(isinstance(one, int | float) and not isinstance(one, bool) for one in noise.law_args)
    fits, wanted = {
        "uniform": (not given, "nothing"),
        "logit_normal": (numbers and len(given) in (0, 2) and (not given or given[1] > 0), "[mean, deviation], the deviation above 0"),
        "beta": (numbers and len(given) == 2 and min(given) > 0, "[a, b], both above 0"),
        "file": (len(given) == 1 and isinstance(given[0], str), "[path of the file]"),
    }[noise.law]
    return None if fits else f"noise.law_args is {list(given)}: noise.law {noise.law} takes {wanted}"


def _not_with_flow(config: StageConfig) -> str | None:
    """Settings whose equations are those of epsilon and v: each says why.

    min-SNR, debiased and huber's c by snr weigh by a(t) / (1 - a(t)) of SDXL's schedule, which flow does not have.
    Offset and coarse noise were made because that schedule keeps some of the picture's brightness at its last timestep
    (crosslabs.org 2023; Lin et al., arXiv 2305.08891). Flow's last timestep is noise alone, and sampling starts from
    plain noise: trained on anything else, it would start from what the network never saw. Neither Liu et al.
    (arXiv 2209.03003) nor Esser et al. (arXiv 2403.03206) have them.
    """
    noise, loss = config.noise, config.loss
    found = {
        "loss.min_snr_gamma (a weight by the snr of SDXL's schedule)": loss.min_snr_gamma is not None,
        "loss.debiased (a weight by the snr of SDXL's schedule)": loss.debiased,
        "loss.huber_schedule: snr (use constant or exponential)": loss.type == "huber" and loss.huber_schedule == "snr",
        "noise.zero_terminal_snr (flow ends in noise alone by itself)": noise.zero_terminal_snr,
        "noise.offset (sampling starts from noise without it)": noise.offset != 0,
        "noise.offset_adaptive (sampling starts from noise without it)": noise.offset_adaptive != 0,
        "noise.multires_iterations (sampling starts from noise without it)": noise.multires_iterations != 0,
        "noise.input_perturbation (its equations are of epsilon)": noise.input_perturbation != 0,
        "noise.dtype: compute (rounds a(t) as the released run did)": noise.dtype != "fp32",
    }
    told = [name for name, set_so in found.items() if set_so]
    return f"loss.prediction: flow refuses {', '.join(told)}" if loss.prediction == "flow" and told else None


_RULES: tuple[Callable[[StageConfig], str | None], ...] = (
    lambda c: None if 0 < len(c.stage) <= MAX_NAME and c.stage.replace("_", "").replace("-", "").isalnum() else
    f"stage is {c.stage!r}: letters, digits, - and _ only, at most {MAX_NAME}, it names files",
    lambda c: f"batch.effective {c.batch.effective} is no multiple of batch.micro {c.batch.micro}"
    if c.batch.effective % c.batch.micro else None,
    lambda c: f"batch.split {c.batch.split} does not divide batch.micro {c.batch.micro}"
    if isinstance(c.batch.split, int) and c.batch.micro % c.batch.split else None,
    lambda c: "model.train_text_encoders needs optimizer.text_encoder_lr"
    if c.model.train_text_encoders and c.optimizer.text_encoder_lr is None else None,
    lambda c: "optimizer.text_encoder_lr is set but model.train_text_encoders is false: remove one"
    if not c.model.train_text_encoders and c.optimizer.text_encoder_lr is not None else None,
    lambda c: "optimizer.text_encoder_2_lr is set but model.train_text_encoders is false: remove one"
    if not c.model.train_text_encoders and c.optimizer.text_encoder_2_lr is not None else None,
    lambda c: _groups(c.optimizer),
    lambda c: _args(c.optimizer),
    lambda c: _prodigy(c) if c.optimizer.name == "prodigy" else None,
    lambda c: _schedule_free(c) if c.optimizer.name == "schedulefree" else None,
    lambda c: f"optimizer.paged is true, but optimizer.name {c.optimizer.name} has no 8-bit state: leave it out"
    if c.optimizer.paged and not c.optimizer.name.endswith("8bit") else None,
    lambda c: f"noise.timesteps is {list(c.noise.timesteps)}, must satisfy 0 <= low < high <= 1000"
    if not 0 <= c.noise.timesteps[0] < c.noise.timesteps[1] <= 1000 else None,
    lambda c: "noise.zero_terminal_snr needs loss.prediction: v (epsilon carries no signal at snr 0)"
    if c.noise.zero_terminal_snr and c.loss.prediction == "epsilon" else None,
    _not_with_flow,
    lambda c: _law(c.noise),
    lambda c: "loss.min_snr_gamma gives the terminal step weight 0 with noise.zero_terminal_snr, so that it is never "
    "learnt: remove one" if c.loss.min_snr_gamma is not None and c.noise.zero_terminal_snr else None,
    lambda c: "loss.min_snr_gamma and loss.debiased are two weightings: choose one"
    if c.loss.min_snr_gamma is not None and c.loss.debiased else None,
    lambda c: "optimizer.relative_step: true discards the learning rate; leave it false" if c.optimizer.relative_step else None,
    lambda c: "optimizer.warmup_init needs relative_step, which is refused; leave it false" if c.optimizer.warmup_init else None,
    lambda c: "batch.determinism: strict refuses auto in model.gradient_checkpointing and batch.split, because what it "
    "picks depends on free memory: name a value"
    if _strict(c) and "auto" in (c.model.gradient_checkpointing, c.batch.split) else None,
    lambda c: "model.compile with batch.remainder: keep compiles new graphs for every size of a short tile until the compiler's "
    "limit ends the run: use carry or drop, or leave model.compile off" if c.model.compile and c.batch.remainder == "keep" else None,
    lambda c: "model.weights: bf16 needs precision: bf16" if c.model.weights == "bf16" and c.precision != "bf16" else None,
    lambda c: "batch.determinism: strict refuses model.attention: cudnn, whose gradients may differ from run to run; use "
    "auto, flash or math" if _strict(c) and c.model.attention == "cudnn" else None,
    lambda c: "schedule.processes needs schedule.unit: process_step"
    if c.schedule.unit == "optimizer_step" and c.schedule.processes != 1 else None,
    lambda c: f"data.separator is {c.data.separator!r}: {why}"
    if c.data.separator is not None and (why := separator_problem(c.data.separator)) else None,
    lambda c: _mix(c.data.mix),
    lambda c: "batch.determinism: strict needs batch.remainder: carry" if c.batch.remainder != "carry" and _strict(c) else None,
    lambda c: "validation.every_steps needs validation.share, such as 0.02: with 0 no image is held out"
    if c.validation.every_steps > 0 and c.validation.share == 0 else None,
    lambda c: "ema.device: cpu without ema.decay keeps no average: set both" if c.ema.device == "cpu" and not c.ema.decay else None,
    lambda c: "optimizer.gather: bf16 needs optimizer.sharding: fsdp2 or hsdp, and precision: bf16"
    if c.optimizer.gather == "bf16" and (c.optimizer.sharding not in ("fsdp2", "hsdp") or c.precision != "bf16") else None,
    lambda c: "optimizer.shard_group needs optimizer.sharding: hsdp"
    if c.optimizer.shard_group is not None and c.optimizer.sharding != "hsdp" else None,
    lambda c: "sampling.loras refuses adapter.base: nf4: nothing can be added to matrices in 4 bit"
    if c.sampling.loras and c.adapter.type != "none" and c.adapter.base == "nf4" else None,
    adapter.problems,
    *combinations.RULES,
    lambda c: "export.merged needs adapter.type: a stage without an adapter leaves the whole model anyway"
    if c.export.merged and c.adapter.type == "none" else None,
    lambda c: _eps(c.optimizer),
    lambda c: _unread(c.optimizer),
    lambda c: _unread_schedule(c.schedule),
    _whole_steps,
)  # fmt: skip
