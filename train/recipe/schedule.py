"""Learning rate as a closed form of the updates applied so far: no scheduler object, nothing to save or restore.

The caller writes it to each parameter group before the optimizer steps. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from train.base.errors import ExitCode, Halt
from train.config.stage import OVER_THE_RUN
from train.recipe import groups

if TYPE_CHECKING:
    from train.config.stage import GroupConfig, OptimizerConfig, ScheduleConfig


def lr_at(updates: int, *, peak: float, config: ScheduleConfig, cycle_updates: int, total_updates: int) -> float:
    """Learning rate of the next update when `updates` have been applied, for a group whose peak is P = `peak`.

    With m = min_lr, w the warmup and T = `total_updates` in updates, n = updates * u, where u = 1, or with unit
    `process_step` the number of processes of the run to reproduce: its scheduler was advanced once per process, and
    its schedule did not stretch to match.
    cosine_restarts: m + (top - m) * (1 + cos(pi * s / N)) / 2 in cycle c, where N = `cycle_updates`,
    c, s = divmod(n, N), top = P * decay^c. Source: notebook, checked against the class it names.
    All others climb as P * n / w while n < w. Then constant and constant_with_warmup stay at P; the rest fall to m:
    cosine: m + (P - m) * (1 + cos(pi * x)) / 2 and linear: m + (P - m) * (1 - x), with x = (n - w) / (T - w);
    wsd (warmup, stable, decay: Hu et al. 2024, arXiv 2404.06395): P until n = T - cooldown, then linear to m.
    These three are checked against the functions of the same names in transformers.
    """
    ticks = updates * ticks_per_update(config)
    if config.name == "cosine_restarts":
        return _restarts(updates, ticks, peak, config, cycle_updates)
    warmup, cooldown = spans(config, total_updates)
    if ticks < warmup:
        return peak * ticks / warmup
    if config.name not in OVER_THE_RUN:
        return peak
    start = total_updates - cooldown if config.name == "wsd" else warmup
    gone = min(max(ticks - start, 0) / max(total_updates - start, 1), 1.0)
    left = (1 + math.cos(math.pi * gone)) / 2 if config.name == "cosine" else 1 - gone
    return config.min_lr + (peak - config.min_lr) * left


def _restarts(updates: int, ticks: int, peak: float, config: ScheduleConfig, cycle_updates: int) -> float:
    if updates == 0 and config.first_step_at_min:  # the original's constructor writes the floor into the group
        return config.min_lr
    cycle, inside = divmod(ticks, cycle_updates)
    top = peak * config.decay**cycle
    return config.min_lr + (top - config.min_lr) * (1 + math.cos(math.pi * inside / cycle_updates)) / 2


def spans(config: ScheduleConfig, total_updates: int) -> tuple[int, int]:
    """Updates of the warmup and of wsd's cooldown; below 1 a share of all updates."""
    return steps_of(config.warmup_steps, total_updates), steps_of(config.cooldown_steps, total_updates)


def steps_of(steps: float, total_updates: int) -> int:
    """Updates that a key in steps means, such as `data.token_warmup_steps`: below 1 a share of all, rounded down."""
    return int(steps * total_updates) if steps < 1 else int(steps)


def ticks_per_update(config: ScheduleConfig) -> int:
    """By how much an update moves the schedule."""
    return config.processes if config.unit == "process_step" else 1


def facts(config: ScheduleConfig, *, cycle_updates: int) -> dict[str, Any]:
    """What plan.json says of the schedule; the numbers of a cycle are None where nothing restarts."""
    restarts = config.name == "cosine_restarts"
    return {
        "name": config.name,
        "cycle_updates": cycle_updates if restarts else None,
        "updates_per_restart": cycle_updates / ticks_per_update(config) if restarts else None,
        "unit": config.unit,
    }


def cycle_length(config: ScheduleConfig, *, epoch_updates: int) -> int:
    """`schedule.cycle_steps` in updates; an epoch is `epoch_updates`, such as `Plan.cycle_updates`."""
    return epoch_updates if config.cycle_steps == "epoch" else config.cycle_steps


def rates_at(
    updates: int, *, peaks: Mapping[str, float], config: ScheduleConfig, cycle_updates: int, total_updates: int,
    rules: Sequence[GroupConfig] = (),
) -> dict[str, float]:  # fmt: skip
    """Learning rate of every parameter group after `updates` applied updates; `peaks` as from `peaks`, `rules`: optimizer.groups.

    A group with a rate of its own gets the U-Net's curve times its rate / the U-Net's, the floor too; past its `until` 0.
    """
    own, ends, unet = {rule.match for rule in rules if rule.lr is not None}, groups.ends(rules), peaks.get("unet", 0)
    found = {}
    for group, peak in peaks.items():
        told = replace(config, min_lr=config.min_lr * peak / unet) if group in own and unet else config
        over = group in ends and updates >= ends[group] * total_updates
        found[group] = 0.0 if over else lr_at(updates, peak=peak, config=told, cycle_updates=cycle_updates, total_updates=total_updates)
    return found


def long_warmup(config: ScheduleConfig, *, total_updates: int) -> str | None:
    """One line where the warmup outlasts the run, so that the peak is never reached; None where it does not."""
    last = max(total_updates - 1, 0) * ticks_per_update(config)
    warmup, _ = spans(config, total_updates)
    if last >= warmup:
        return None
    return (
        f"schedule.warmup_steps {warmup} is longer than the run, {total_updates} updates: the learning rate "
        f"gets to {last / warmup:.0%} of optimizer.unet_lr and no further"
    )


def check(
    config: ScheduleConfig, peaks: Mapping[str, float], *, cycle_updates: int, total_updates: int, epochs: int
) -> None:
    """Refuse a schedule that means something else than it says; `peaks` maps a config key to its peak.

    Raises Halt(USAGE) when a peak of the run, or one announced by `schedule.cycles` (null: `epochs`), would lie
    below `schedule.min_lr`, or when warmup and cooldown together are longer than the run.
    """
    warmup, cooldown = spans(config, total_updates)
    if config.name == "wsd" and warmup + cooldown > total_updates:
        raise Halt(
            ExitCode.USAGE,
            f"schedule.warmup_steps {warmup} and schedule.cooldown_steps {cooldown} together are longer than the run, "
            f"{total_updates} updates: shorten one, or give both as shares below 1",
        )
    ticks = max(total_updates - 1, 0) * ticks_per_update(config)
    restarts = config.name == "cosine_restarts"
    last = max(ticks // cycle_updates, (config.cycles or epochs) - 1) if restarts else 0
    for key, peak in peaks.items():
        for cycle in range(last + 1):
            top = peak * config.decay**cycle
            if top < config.min_lr:
                raise Halt(
                    ExitCode.USAGE,
                    f"{key} {peak:g} x schedule.decay {config.decay:g} ^ {cycle} = {top:.3g} is the peak of cycle "
                    f"{cycle} and lies below schedule.min_lr {config.min_lr:g}: raise the peak or the decay, lower "
                    f"min_lr, or run fewer than {cycle + 1} cycles (schedule.cycles, epochs)"
                    if restarts else
                    f"{key} {peak:g} is the peak and lies below schedule.min_lr {config.min_lr:g}: raise it or lower min_lr",
                )  # fmt: skip


def peak_keys(config: OptimizerConfig) -> dict[str, float]:
    """Config key to peak learning rate of the networks. The encoders have one if and only if they train; `config/` sees to that."""
    found = {"optimizer.unet_lr": config.unet_lr}
    if config.text_encoder_lr is not None:
        found["optimizer.text_encoder_lr"] = config.text_encoder_lr
    if config.text_encoder_2_lr is not None:
        found["optimizer.text_encoder_2_lr"] = config.text_encoder_2_lr
    return found


def peaks(config: OptimizerConfig) -> dict[str, float]:
    """Parameter group to peak learning rate."""
    networks = {"unet": config.unet_lr}
    if config.text_encoder_lr is not None:
        second = config.text_encoder_lr if config.text_encoder_2_lr is None else config.text_encoder_2_lr
        networks |= {"text_encoder": config.text_encoder_lr, "text_encoder_2": second}
    return groups.peaks(config, networks)
