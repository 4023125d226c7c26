"""A stage from its first update to its files: interrupted, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stages import Stage, losses, result

from train.exits import ExitCode


def test_a_stop_and_a_rerun_equal_the_straight_run(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(ANIX_FAULT="control@5:term") == ExitCode.STOPPED
    left = json.loads((stage.output / "exit.json").read_text())
    assert (left["code"], left["status"], left["update"]) == (85, "stopped", 7)
    assert len(losses(stage.output)) == 7
    assert stage.run() == ExitCode.DONE
    assert result(stage.output) == result(straight)
