"""Our side held against values that the original trainer's own code gave (tests/golden/sd_scripts, by parity.py --record).

Numbers, not code: each file names the repository and the commit that they come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.testing.parity import data_rows, golden, inputs, number_rows

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "tests/golden/sd_scripts").glob("*.json"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    assert len(found["commit"]) == 40 and found["origin"]
    return found


@pytest.fixture(scope="module")
def config() -> inputs.Switches:
    return inputs.switches(ROOT / "configs/as_run/pretrain.yaml")


@pytest.fixture(scope="module")
def data(recorded: dict[str, Any], config: inputs.Switches) -> data_rows.Data:
    return golden.our_data(recorded, config)


def test_something_is_recorded() -> None:
    assert FILES


@pytest.mark.parametrize(("embedding", "shift"), [("correct", "0"), ("sd_scripts", "1")])
def test_embedding_of_twelve_timesteps(recorded: dict[str, Any], embedding: Any, shift: str) -> None:
    assert recorded["timesteps"] == list(inputs.TIMESTEPS)
    mine = torch.tensor(golden.embedding(number_rows.timestep_embedding(embedding)))
    torch.testing.assert_close(mine, torch.tensor(recorded["embedding"][shift]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["2 processes", "1 process", "constant with warmup"])
def test_forty_learning_rates(recorded: dict[str, Any], config: inputs.Switches, name: str) -> None:
    curve = number_rows.curves(config)[name]
    updates = recorded["updates"]
    mine = number_rows.our_rates(curve.settings, curve.peak, max(updates) + 1)[updates]
    assert len(updates) == 40
    torch.testing.assert_close(mine, torch.tensor(recorded["rates"][name], dtype=torch.float64), rtol=1e-14, atol=0)


def test_placements(recorded: dict[str, Any], data: data_rows.Data) -> None:
    assert len(recorded["placements"]) == 560
    mine = [[*size, *placed] for size, placed in zip(inputs.sizes(), data.placed, strict=True)]
    assert [pair for pair in zip(mine, recorded["placements"], strict=True) if pair[0] != pair[1]] == []


def test_captions(recorded: dict[str, Any]) -> None:
    assert len(recorded["captions"]) == 32
    assert [one for one in recorded["captions"] if not data_rows.same_caption(one, data_rows.drawn(one), one["theirs"])] == []


def test_ids_of_thirteen_lengths(recorded: dict[str, Any], data: data_rows.Data) -> None:
    assert len(recorded["ids"]) == 13
    assert data.ids_1.tolist() == [one["ids_1"] for one in recorded["ids"]]
    assert data.ids_2.tolist() == [one["ids_2"] for one in recorded["ids"]]


@pytest.mark.parametrize("name", ["offset", "adaptive", "plain", "fp16", "bf16"])
def test_noise_with_and_without_offset(recorded: dict[str, Any], config: inputs.Switches, name: str) -> None:
    target, noisy = number_rows.our_noise(number_rows.NOISES[name], number_rows.given(), config.noise.dtype)
    for kind, values in (("noise", target), ("noisy", noisy)):
        if name in recorded[kind]:
            theirs = torch.tensor(recorded[kind][name])
            half = name in ("fp16", "bf16")
            torch.testing.assert_close(torch.tensor(golden.corner(values)), theirs, rtol=0, atol=0 if half else 5e-6)


@pytest.mark.parametrize("kind", ["AdamW", "Adafactor"])
def test_three_optimizer_steps(recorded: dict[str, Any], config: inputs.Switches, kind: str) -> None:
    tensors = {name: torch.tensor(values) for name, values in recorded["optimizer_inputs"].items()}
    mine = number_rows.optimizer_steps(number_rows.optimizer_kinds(config)[kind], tensors)
    assert len(mine) == 3 * len(inputs.SHAPES)
    for name, value in mine.items():
        torch.testing.assert_close(value, torch.tensor(recorded["optimizers"][f"{kind}.{name}"]), rtol=0, atol=3e-8)
