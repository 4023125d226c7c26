"""The loop around the updates: when it saves by the clock, and when it looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import UPDATES, Lab
from stages import Stage, opened, result

from train.engine import loop
from train.testing.chaos import kills


def test_garbage_is_looked_for_at_the_same_updates_everywhere_and_nowhere_between(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GARBAGE_STEPS", 2)
    found: list[int] = []
    with opened(Stage(tmp_path, dataset, base_model), "max_updates=5") as session:

        def noted(phase: str, _: dict[str, Any]) -> None:
            if phase == "start":
                found.append(session.run.progress.step)

        def littering() -> Iterator[None]:
            for _ in range(20000):  # many times what makes Python look by itself
                litter: list[Any] = []
                litter.append(litter)
            yield

        real = loop.log_update
        monkeypatch.setattr(loop, "log_update", lambda *a: (list(littering()), real(*a)))
        gc.callbacks.append(noted)
        try:
            loop.train(session)
        finally:
            gc.callbacks.remove(noted)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert [step for step in found if step < 5] == [0, 2, 4]  # at the end Python looks by itself again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_save_by_the_clock_of_the_main_one_at_the_same_updates(tmp_path: Path) -> None:
    """Every save compares the replicas, a collective: had they not agreed, they would hang. The restart loses no bit."""
    lab = Lab(tmp_path)
    often = ("checkpoint.every_minutes=0.005", "checkpoint.keep=20")
    seldom = ("checkpoint.every_minutes=600", "checkpoint.every_steps=1")
    assert lab.run("seldom", *seldom, world=2, fault="forward@7:0:exit=1")[0] == 1
    assert set(kills.steps_of(lab.folder / "seldom")) <= {7}, "only what a failure leaves"
    fault = "forward@*:0:sleep=0.2;forward@8:0:exit=1"
    assert lab.run("often", *often, world=2, fault=fault)[0] == 1
    steps = kills.steps_of(lab.folder / "often")
    assert len(steps) >= 3 and max(steps) < UPDATES, steps
    lab.must_equal_reference("often", 2, *often)


def test_by_the_clock_nothing_else_is_saved(base_model: Path, dataset: Path, tmp_path: Path, straight: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("checkpoint.every_minutes=600", "checkpoint.every_steps=1", "checkpoint.keep=20") == 0, stage.message
    assert [path.name for path in (stage.output / "checkpoints").iterdir()] == [result(straight)["checkpoint"]]
    assert result(stage.output) == result(straight)
