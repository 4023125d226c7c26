"""What is promised on a CUDA device: the same bits twice, and after a stop. Skipped without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from stages import Stage, result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
UPDATES = int(os.environ.get("ANIX_GPU_UPDATES", "20"))  # 200 take a card of a quarter of an hour too long
LONG = (f"max_updates={UPDATES}", "epochs=100", "schedule.cycles=100", "schedule.min_lr=0", "tracking.trace=true")


def strict(precision: str, *more: str) -> tuple[str, ...]:
    """A stage of UPDATES updates that promises its bits."""
    return (*LONG, "batch.determinism=strict", f"precision={precision}", *more)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_two_runs_of_one_seed_end_in_the_same_bits(
    precision: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("one", "two"):
        stage = Stage(tmp_path / name, dataset, base_model)
        assert stage.run(*strict(precision)) == 0, stage.message
        found.append(result(stage.output))
    assert found[0] == found[1]
    assert len(found[0]["metrics"]) == UPDATES


def test_a_stopped_run_goes_on_to_the_same_bits(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    straight, stopped = (Stage(tmp_path / name, dataset, base_model) for name in ("straight", "stopped"))
    assert straight.run(*strict("fp16")) == 0, straight.message
    assert stopped.run(*strict("fp16"), ANIX_FAULT=f"optimizer@{UPDATES // 2 - 3}:term") == 85, stopped.message
    assert stopped.run(*strict("fp16")) == 0, stopped.message
    assert result(stopped.output) == result(straight.output)
