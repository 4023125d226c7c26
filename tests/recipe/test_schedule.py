"""Learning rates: the recipe's literal values, and a stateful class of the original's kind at every update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.base.errors import ExitCode, Halt
from train.config.stage import OptimizerConfig, ScheduleConfig
from train.recipe.schedule import check, cycle_length, lr_at, peak_keys, peaks

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
    return lr_at(updates, peak=1e-5, config=config, cycle_updates=9099)


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
    assert lr_at(update, peak=2e-6, config=WARMUP, cycle_updates=1) == pytest.approx(lr, rel=1e-12)


def test_warmup_counted_per_process_is_half_as_long():
    halved = replace(WARMUP, unit="process_step", processes=2)
    assert lr_at(25, peak=2e-6, config=halved, cycle_updates=1) == 1e-6
    assert lr_at(50, peak=2e-6, config=halved, cycle_updates=1) == 2e-6


def test_constant_and_no_warmup():
    assert lr_at(0, peak=2e-6, config=ScheduleConfig(name="constant"), cycle_updates=1) == 2e-6
    assert lr_at(0, peak=2e-6, config=replace(WARMUP, warmup_steps=0), cycle_updates=1) == 2e-6


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(1e-6, 1e-3), st.floats(0.5, 1))
def test_cosine_stays_between_floor_and_the_cycles_peak(update, cycle, peak, decay):
    config = replace(COSINE, min_lr=0, decay=decay)
    lr = lr_at(update, peak=peak, config=config, cycle_updates=cycle)
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


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (replace(COSINE, warmup_steps=5), "warmup_steps"),
        (ScheduleConfig(name="constant", warmup_steps=5), "warmup_steps"),
        (replace(WARMUP, min_lr=1e-7), "min_lr"),
        (replace(WARMUP, decay=0.9), "decay"),
        (ScheduleConfig(name="constant", cycles=3), "cycles"),
    ],
)
def test_keys_that_the_schedule_does_not_read_are_refused(config, key):
    with pytest.raises(Halt, match=rf"schedule\.{key}") as caught:
        run_check(config)
    assert caught.value.code == ExitCode.USAGE
