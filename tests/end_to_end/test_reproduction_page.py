"""docs/reproduction.md: its learning rates are those of the shipped configs, its commands those that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from train.config.stage import load_stage
from train.recipe.schedule import lr_at

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reproduction.md").read_text()
EPOCH, UPDATES = 9099, 90990
ROWS = re.findall(r"^\| (?:-|\d+) \| ([\d,]+) \| ([\d.]+) \| (\S+) \| (\S+) \|", PAGE, re.MULTILINE)


def rate(update: int, config: str) -> float:
    stage = load_stage([ROOT / config])
    return lr_at(update, peak=stage.optimizer.unet_lr, config=stage.schedule, cycle_updates=EPOCH, total_updates=UPDATES)


def test_rates_are_those_of_the_shipped_configs() -> None:
    assert len(ROWS) == 17
    for update, epoch, card, as_run in ROWS:
        number = int(update.replace(",", ""))
        assert float(epoch) == pytest.approx(number / EPOCH, abs=0.0051)
        assert float(card) == pytest.approx(rate(number, "configs/pretrain.yaml"), rel=1e-3), update
        assert float(as_run) == pytest.approx(rate(number, "configs/as_run/pretrain.yaml"), rel=1e-3), update


def test_means_over_the_run() -> None:
    for config, told in (("configs/pretrain.yaml", "3.757e-06"), ("configs/as_run/pretrain.yaml", "2.696e-06")):
        stage = load_stage([ROOT / config])
        rates = (
            lr_at(k, peak=stage.optimizer.unet_lr, config=stage.schedule, cycle_updates=EPOCH, total_updates=UPDATES)
            for k in range(UPDATES)
        )
        assert float(f"{sum(rates) / UPDATES:.3e}") == float(told)
        assert told in PAGE
