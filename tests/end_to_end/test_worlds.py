"""The same stage on several processes: the same samples, losses to the last digits, in strict mode the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launches import launch
from stages import Stage, losses, result, state, weights

from train.base.errors import ExitCode

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to all weights together: single ones without a gradient (a bias before a norm) follow rounding noise."""
    squares = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (squares / sum(float(b[name].double().square().sum()) for name in b)) ** 0.5


def test_two_processes_equal_one_fast(straight: Path, dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert launch(stage, 2) == [0, 0], stage.message
    assert result(stage.output)["trace"] == result(straight)["trace"]
    for one, two in zip(losses(straight), losses(stage.output), strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert distance(weights(stage.output), weights(straight)) < 1e-3


def test_strict_gives_the_same_bits_through_changes_of_the_world(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    alone, moved = (Stage(tmp_path / name, dataset, base_model) for name in ("alone", "moved"))
    strict = "batch.determinism=strict"
    assert alone.run(strict) == ExitCode.DONE
    assert launch(moved, 4, strict, fault="control@2:2:term") == [85] * 4, moved.message
    assert launch(moved, 2, strict, fault="control@5:1:term") == [85] * 2, moved.message
    assert moved.run(strict) == ExitCode.DONE, moved.message
    assert result(moved.output) == result(alone.output)
    assert state(moved.output)["history"] == [[0, 4], [3, 2], [6, 1]]
    assert result(alone.output)["trace"] == result(straight)["trace"]


def test_strict_adafactor_with_frozen_encoders_on_two_processes(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    alone, both = (Stage(tmp_path / name, dataset, base_model, "ft1") for name in ("alone", "both"))
    changes = ("batch.determinism=strict", "max_updates=5")
    assert alone.run(*changes) == ExitCode.DONE, alone.message
    assert launch(both, 2, *changes) == [0, 0], both.message
    assert result(both.output) == result(alone.output)


def test_torchrun_with_two_processes_equals_one_process_with_twice_the_accumulation(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    alone, both = (Stage(tmp_path / name, dataset, base_model) for name in ("alone", "both"))
    changes = ("epochs=7", "max_updates=20")
    assert alone.run(*changes, "batch.accumulation=4") == ExitCode.DONE, alone.message
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "train/run.py", *both.arguments(*changes, "batch.accumulation=2")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    one, two = losses(alone.output), losses(both.output)
    assert len(one) == 20
    worst = max(abs(b / a - 1) for a, b in zip(one, two, strict=True))
    assert worst < 1e-5, worst
    assert result(both.output)["trace"] == result(alone.output)["trace"]
    assert "Warning" not in done.stderr, "a launch should say nothing that is not ours"


@pytest.mark.long
def test_stratified_timesteps_are_the_same_on_1_2_and_4_processes_and_after_a_kill(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    alone, two, four, killed = (Stage(tmp_path / name, dataset, base_model) for name in ("alone", "two", "four", "killed"))
    changes = ("batch.determinism=strict", "noise.stratified=true", "noise.law=logit_normal")
    assert alone.run(*changes) == ExitCode.DONE, alone.message
    assert launch(two, 2, *changes) == [0, 0], two.message
    assert launch(four, 4, *changes) == [0] * 4, four.message
    assert launch(killed, 2, *changes, fault="control@6:1:kill") != [0, 0]
    assert not (killed.output / "DONE").exists()
    assert launch(killed, 4, *changes) == [0] * 4, killed.message
    assert state(killed.output)["history"][1][0] > 0  # it went on from a checkpoint
    assert result(two.output) == result(four.output) == result(killed.output) == result(alone.output)
    plain = Stage(tmp_path / "plain", dataset, base_model)
    assert plain.run(changes[0], changes[2]) == ExitCode.DONE, plain.message
    assert result(plain.output)["trace"] != result(alone.output)["trace"]
