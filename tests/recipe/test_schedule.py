"""Learning rates: the recipe's literal values, and a stateful class of the original's kind at every update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from train.base.errors import ExitCode, Halt
from train.config.stage import OptimizerConfig, ScheduleConfig, load_stage
from train.config.stage_rules import stage_problems
from train.recipe.schedule import check, cycle_length, lr_at, peak_keys, peaks, steps_of

COSINE = ScheduleConfig(name="cosine_restarts", min_lr=1e-6, decay=0.9)
PROCESS = replace(COSINE, unit="process_step", processes=2)
WARMUP = ScheduleConfig(name="constant_with_warmup", warmup_steps=100)
TOTAL = 90_990


class StatefulRestarts:
    """Cosine annealing with warm restarts as schedulers usually do it: counters that every call advances."""

    def __init__(self, peak: float, floor: float, decay: float, cycle: int) -> None:
        self.peak, self.floor, self.decay, self.cycle = peak, floor, decay, cycle
        self.restarts, self.inside, self.lr = 0, 0, floor

    def step(self) -> None:
        self.inside += 1
        if self.inside >= self.cycle:
            self.restarts, self.inside = self.restarts + 1, self.inside - self.cycle
        top = self.peak * self.decay**self.restarts
        self.lr = self.floor + (top - self.floor) * (1 + math.cos(math.pi * self.inside / self.cycle)) / 2


def cosine(updates: int, config: ScheduleConfig = COSINE) -> float:
    return lr_at(updates, peak=1e-5, config=config, cycle_updates=9099, total_updates=TOTAL)


@pytest.mark.parametrize(
    ("update", "optimizer_step", "process_step"),
    [
        (0, "1e-06", "1e-06"),
        (1, "9.99999973e-06", "9.99999893e-06"),
        (4549, "5.50077685e-06", "1.00000027e-06"),
        (4550, "5.49922315e-06", "8.99999976e-06"),
        (9098, "1.00000027e-06", "1.00000095e-06"),
        (9099, "9e-06", "8.1e-06"),
        (90989, "1.00000009e-06", "1.00000004e-06"),
    ],
)
def test_recipe_values(update, optimizer_step, process_step):
    assert f"{cosine(update):.9g}" == optimizer_step
    assert f"{cosine(update, PROCESS):.9g}" == process_step


@pytest.mark.parametrize("config", [COSINE, PROCESS], ids=["optimizer_step", "process_step"])
def test_closed_form_equals_the_stateful_class_at_every_update(config):
    reference = StatefulRestarts(1e-5, 1e-6, 0.9, 9099)
    for update in range(TOTAL):
        assert cosine(update, config) == reference.lr, update
        for _ in range(config.processes):
            reference.step()


def test_cycles_and_means_of_the_two_units():
    for config, restarts, last_peak, mean in ((COSINE, 10, 3.874e-6, 3.757e-6), (PROCESS, 20, 1.351e-6, 2.696e-6)):
        values = [cosine(update, config) for update in range(TOTAL)]
        rises = [update for update in range(2, TOTAL) if values[update] > values[update - 1]]
        assert len(rises) + 1 == restarts
        assert values[rises[-1]] == pytest.approx(last_peak, rel=1e-3)
        assert sum(values) / TOTAL == pytest.approx(mean, rel=2e-4)


def test_first_step_at_min_changes_update_zero_only():
    plain = replace(COSINE, first_step_at_min=False)
    assert cosine(0, plain) == 1e-5
    assert [cosine(update, plain) for update in range(1, 20_000)] == [cosine(update) for update in range(1, 20_000)]


@pytest.mark.parametrize(("update", "lr"), [(0, 0), (1, 2e-8), (50, 1e-6), (99, 1.98e-6), (100, 2e-6), (5000, 2e-6)])
def test_constant_with_warmup(update, lr):
    assert lr_at(update, peak=2e-6, config=WARMUP, cycle_updates=1, total_updates=TOTAL) == pytest.approx(lr, rel=1e-12)


def test_warmup_counted_per_process_is_half_as_long():
    halved = replace(WARMUP, unit="process_step", processes=2)
    assert lr_at(25, peak=2e-6, config=halved, cycle_updates=1, total_updates=TOTAL) == 1e-6
    assert lr_at(50, peak=2e-6, config=halved, cycle_updates=1, total_updates=TOTAL) == 2e-6


def test_constant_and_no_warmup():
    assert lr_at(0, peak=2e-6, config=ScheduleConfig(name="constant"), cycle_updates=1, total_updates=TOTAL) == 2e-6
    assert lr_at(0, peak=2e-6, config=replace(WARMUP, warmup_steps=0), cycle_updates=1, total_updates=TOTAL) == 2e-6


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(1e-6, 1e-3), st.floats(0.5, 1))
def test_cosine_stays_between_floor_and_the_cycles_peak(update, cycle, peak, decay):
    config = replace(COSINE, min_lr=0, decay=decay)
    lr = lr_at(update, peak=peak, config=config, cycle_updates=cycle, total_updates=TOTAL)
    assert 0 <= lr <= peak * decay ** (update // cycle) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("steps", "epoch", "length"), [("epoch", 9099, 9099), ("epoch", 1, 1), (9099, 1, 9099)]
)
def test_cycle_length(steps, epoch, length):
    assert cycle_length(replace(COSINE, cycle_steps=steps), epoch_updates=epoch) == length


def test_the_peaks_of_the_groups_are_those_of_the_keys():
    alone = OptimizerConfig(name="adamw", unet_lr=1e-5)
    assert peaks(alone) == {"unet": 1e-5}
    both = replace(alone, text_encoder_lr=2e-6)
    assert peaks(both) == {"unet": 1e-5, "text_encoder": 2e-6, "text_encoder_2": 2e-6}
    assert peak_keys(both) == {"optimizer.unet_lr": 1e-5, "optimizer.text_encoder_lr": 2e-6}


def run_check(config=COSINE, peak=1e-5, cycle=9099, total=TOTAL, epochs=10):
    check(config, {"optimizer.unet_lr": peak}, cycle_updates=cycle, total_updates=total, epochs=epochs)


def test_the_recipes_schedules_pass():
    run_check()
    run_check(PROCESS)
    run_check(WARMUP)
    run_check(ScheduleConfig(name="constant"))


@pytest.mark.parametrize(
    ("changes", "cycle"),
    [
        ({"config": replace(COSINE, cycles=22)}, None),
        ({"config": replace(COSINE, cycles=23)}, 22),
        ({"epochs": 23}, 22),
        ({"total": 22 * 9099}, None),
        ({"total": 22 * 9099 + 1}, 22),
        ({"config": PROCESS, "total": 11 * 9099}, None),
        ({"config": PROCESS, "total": 11 * 9099 + 1}, 22),
        ({"peak": 5e-7}, 0),
    ],
)
def test_a_peak_below_the_floor_is_refused(changes, cycle):
    if cycle is None:
        run_check(**changes)
        return
    with pytest.raises(Halt, match=rf"optimizer\.unet_lr .* peak of cycle {cycle} .*schedule\.min_lr") as caught:
        run_check(**changes)
    assert caught.value.code == ExitCode.USAGE


@pytest.mark.parametrize("peak", [1e-5, 2e-6])
@pytest.mark.parametrize(("warmup", "total"), [(0, 40), (7, 40), (0.1, 333), (100, 5000)])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("cosine", lambda o, w, t: get_cosine_schedule_with_warmup(o, w, t)),
        ("linear", lambda o, w, t: get_linear_schedule_with_warmup(o, w, t)),
        ("wsd", lambda o, w, t: get_wsd_schedule(o, w, int(0.2 * t), num_training_steps=t, decay_type="linear")),
    ],
)
def test_schedules_over_the_run_are_those_of_transformers(name, theirs, warmup, total, peak):
    config = ScheduleConfig(name=name, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    reference = theirs(optimizer, steps_of(warmup, total), total)
    for update in range(total):
        mine = lr_at(update, peak=peak, config=config, cycle_updates=1, total_updates=total)
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20), update
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("name", "update", "lr"),
    [  # peak 1.1e-5, floor 1e-6, warmup 10 of 110, cooldown 22
        ("cosine", 0, 0), ("cosine", 5, 5.5e-6), ("cosine", 10, 1.1e-5), ("cosine", 60, 6e-6), ("cosine", 110, 1e-6),
        ("linear", 5, 5.5e-6), ("linear", 35, 8.5e-6), ("linear", 85, 3.5e-6), ("linear", 110, 1e-6),
        ("wsd", 5, 5.5e-6), ("wsd", 10, 1.1e-5), ("wsd", 88, 1.1e-5), ("wsd", 99, 6e-6), ("wsd", 110, 1e-6),
    ],
)  # fmt: skip
def test_literal_rates_of_schedules_over_the_run(name, update, lr):
    config = ScheduleConfig(name=name, warmup_steps=10, min_lr=1e-6)
    assert lr_at(update, peak=1.1e-5, config=config, cycle_updates=1, total_updates=110) == pytest.approx(lr, rel=1e-12)


def test_warmup_and_cooldown_have_room_in_the_run():
    config = ScheduleConfig(name="wsd", warmup_steps=30, cooldown_steps=0.8)
    run_check(config, total=150)
    with pytest.raises(Halt, match=r"schedule\.warmup_steps 30 and schedule\.cooldown_steps 112 .* 140 updates"):
        run_check(config, total=140)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_peak_below_the_floor_of_a_run_is_refused(name):
    with pytest.raises(Halt, match=r"optimizer\.unet_lr 1e-05 is the peak .*schedule\.min_lr 2e-05"):
        run_check(ScheduleConfig(name=name, min_lr=2e-5))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (replace(COSINE, warmup_steps=5), "warmup_steps"),
        (ScheduleConfig(name="constant", warmup_steps=5), "warmup_steps"),
        (replace(WARMUP, min_lr=1e-7), "min_lr"),
        (replace(WARMUP, decay=0.9), "decay"),
        (ScheduleConfig(name="constant", cycles=3), "cycles"),
        (ScheduleConfig(name="cosine", decay=0.9), "decay"),
        (ScheduleConfig(name="linear", cycle_steps=9), "cycle_steps"),
        (ScheduleConfig(name="cosine", cooldown_steps=9), "cooldown_steps"),
        (ScheduleConfig(name="wsd", unit="process_step"), "unit"),
        (ScheduleConfig(name="wsd", first_step_at_min=False), "first_step_at_min"),
        (ScheduleConfig(name="wsd", warmup_steps=1.5), "warmup_steps"),
    ],
)
def test_keys_that_the_schedule_does_not_read_are_refused(config, key):
    told = list(stage_problems(replace(load_stage(["configs/ft1.yaml"]), schedule=config)))
    assert [key for sentence in told if f"schedule.{key} " in sentence] == [key], told
