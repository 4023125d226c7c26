"""Learning rate as a closed form of the updates applied so far: no scheduler object, nothing to save or restore.

The caller writes it to each parameter group before the optimizer steps. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.base.errors import ExitCode, Halt

if TYPE_CHECKING:
    from train.config.stage import OptimizerConfig, ScheduleConfig


def lr_at(updates: int, *, peak: float, config: ScheduleConfig, cycle_updates: int) -> float:
    """Learning rate of the next update when `updates` have been applied, for a group whose peak is `peak`.

    cosine_restarts: m + (P - m) * (1 + cos(pi * s / N)) / 2 in cycle c, where N = `cycle_updates`, n = updates * u,
    c, s = divmod(n, N), P = peak * decay^c. u = 1, or with unit `process_step` the number of processes of the run to
    reproduce: its scheduler was advanced once per process, and this schedule did not stretch N to match.
    constant_with_warmup: peak * min(1, n / warmup_steps). Source: notebook, checked against the class it names.
    """
    ticks = updates * ticks_per_update(config)
    if config.name == "constant":
        return peak
    if config.name == "constant_with_warmup":
        return peak * min(1.0, ticks / config.warmup_steps) if config.warmup_steps else peak
    if updates == 0 and config.first_step_at_min:  # the original's constructor writes the floor into the group
        return config.min_lr
    cycle, inside = divmod(ticks, cycle_updates)
    top = peak * config.decay**cycle
    return config.min_lr + (top - config.min_lr) * (1 + math.cos(math.pi * inside / cycle_updates)) / 2


def ticks_per_update(config: ScheduleConfig) -> int:
    """By how much an update moves the schedule."""
    return config.processes if config.unit == "process_step" else 1


def cycle_length(config: ScheduleConfig, *, epoch_updates: int) -> int:
    """`schedule.cycle_steps` in updates; an epoch is `epoch_updates`, such as `Plan.cycle_updates`."""
    return epoch_updates if config.cycle_steps == "epoch" else config.cycle_steps


def rates_at(
    updates: int, *, peaks: Mapping[str, float], config: ScheduleConfig, cycle_updates: int
) -> dict[str, float]:
    """Learning rate of every parameter group after `updates` applied updates; `peaks` as from `peaks`."""
    return {group: lr_at(updates, peak=peak, config=config, cycle_updates=cycle_updates) for group, peak in peaks.items()}


def long_warmup(config: ScheduleConfig, *, total_updates: int) -> str | None:
    """One line where the warmup outlasts the run, so that the peak is never reached; None where it does not."""
    last = max(total_updates - 1, 0) * ticks_per_update(config)
    if config.name != "constant_with_warmup" or last >= config.warmup_steps:
        return None
    return (
        f"schedule.warmup_steps {config.warmup_steps} is longer than the run, {total_updates} updates: the learning rate "
        f"gets to {last / config.warmup_steps:.0%} of optimizer.unet_lr and no further"
    )


def check(
    config: ScheduleConfig, peaks: Mapping[str, float], *, cycle_updates: int, total_updates: int, epochs: int
) -> None:
    """Refuse a schedule that means something else than it says; `peaks` maps a config key to its peak.

    Raises Halt(USAGE) when a cycle of the run, or one announced by `schedule.cycles` (null: `epochs`), would peak
    below `schedule.min_lr`, or when a key is set that the chosen schedule does not read.
    """
    if config.name != "constant_with_warmup" and config.warmup_steps:
        raise Halt(
            ExitCode.USAGE,
            f"schedule.warmup_steps is {config.warmup_steps}, but schedule.name {config.name} has no warmup: "
            "set it to 0 or use constant_with_warmup",
        )
    if config.name != "cosine_restarts":
        _check_constant(config)
        return
    ticks = max(total_updates - 1, 0) * ticks_per_update(config)
    last = max(ticks // cycle_updates, (config.cycles or epochs) - 1)
    for key, peak in peaks.items():
        for cycle in range(last + 1):
            top = peak * config.decay**cycle
            if top < config.min_lr:
                raise Halt(
                    ExitCode.USAGE,
                    f"{key} {peak:g} x schedule.decay {config.decay:g} ^ {cycle} = {top:.3g} is the peak of cycle "
                    f"{cycle} and lies below schedule.min_lr {config.min_lr:g}: raise the peak or the decay, lower "
                    f"min_lr, or run fewer than {cycle + 1} cycles (schedule.cycles, epochs)",
                )


def _check_constant(config: ScheduleConfig) -> None:
    for key, unused in (("min_lr", 0), ("decay", 1), ("cycles", None)):
        if getattr(config, key) != unused:
            raise Halt(
                ExitCode.USAGE,
                f"schedule.{key} is {getattr(config, key)}, but schedule.name {config.name} does not read it",
            )


_GROUPS = {"optimizer.unet_lr": ("unet",), "optimizer.text_encoder_lr": ("text_encoder", "text_encoder_2")}


def peak_keys(config: OptimizerConfig) -> dict[str, float]:
    """Config key to peak learning rate. The encoders have one if and only if they train; `config/` sees to that."""
    peaks = {"optimizer.unet_lr": config.unet_lr}
    return peaks if config.text_encoder_lr is None else peaks | {"optimizer.text_encoder_lr": config.text_encoder_lr}


def peaks(config: OptimizerConfig) -> dict[str, float]:
    """Parameter group to peak learning rate."""
    return {group: peak for key, peak in peak_keys(config).items() for group in _GROUPS[key]}
