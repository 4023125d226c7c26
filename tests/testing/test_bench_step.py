"""`bench.py step`: sides share weights and inputs, take turns, and are judged by pairs; no time is asserted."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from train.base.errors import Halt
from train.testing import peers, step, timing
from train.testing.counts import SDXL_UNET


def test_all_sides_do_the_same_work_on_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = step.open_bench((64, 64), 1, tiny=True)
    before = {name: weight.detach().clone() for name, weight in bench.networks.named_parameters()}
    losses = [bench.ours("full"), bench.ours("none"), bench.diffusers(), bench.ours("partial")]
    assert losses[0] == losses[1] == losses[3]  # what is recomputed changes no bit
    assert losses[2] == pytest.approx(losses[0], rel=step.AGREE)
    assert all(torch.equal(before[name], weight) for name, weight in bench.networks.named_parameters())
    assert bench.trained.optimizer.state  # it was really stepped
    with torch.no_grad():  # a side whose loss is of something else is seen
        bench.networks.unet.conv_out.weight.add_(1.0)
    assert not step.judged({"a": step.Turns([1.0], [1.0], [0.1], [1.0], losses[:1]),
                            "b": step.Turns([1.0], [1.0], [0.1], [1.0], [bench.diffusers()])})["agree"]  # fmt: skip


def test_sides_take_turns_and_every_turn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDSCRIPTS_DIR", raising=False)
    order: list[str] = []

    def side(name: str) -> Any:
        def run(bench: step.Bench, *_: Any) -> float:
            order.append(name)
            bench.marks["gradients"] = 0.0
            return 1.0

        return run

    monkeypatch.setattr(step.Bench, "ours", lambda bench, mode: side(mode)(bench))
    monkeypatch.setattr(step.Bench, "diffusers", side("diffusers"))
    heard: list[dict[str, Any]] = []
    result = step.run((64, 128), 1, 2, tiny=True, told=heard.append)
    assert order == ["full", "full", "partial", "none", "diffusers", "partial", "none", "diffusers", "full"]  # the first is not counted
    assert len(heard) == 8
    assert {len(side["turns"]["cpu_s"]) for side in result["sides"].values()} == {2}
    shown = step.describe(result)
    assert "losses agree" in shown and "sd-scripts: skipped" in shown


def test_ratios_are_of_pairs() -> None:
    turns = {"a": step.Turns([1.0, 4.0], [1, 1], [1, 1], [1, 1], [2.0, 2.0]), "b": step.Turns([3.0, 8.0, 9.0], [1] * 3, [1] * 3, [1] * 3, [2.0] * 3)}
    found = step.judged(turns)["ratios"]["a / b"]["cpu_s"]  # the third turn of b has no partner
    assert found == {"median": 2.5, "least": 2.0, "most": 3.0}


def test_what_cannot_be_measured_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDSCRIPTS_DIR", raising=False)
    peer, why = peers.sd_scripts({})
    assert peer is None
    assert why == "set SDSCRIPTS_DIR to a checkout of kohya-ss/sd-scripts"
    with pytest.raises(Halt, match="multiples of 32"):
        step.run((100, 100), 1, 1, tiny=True)


@pytest.mark.skipif("SDSCRIPTS_DIR" not in os.environ or importlib.util.find_spec("einops") is None, reason="needs SDSCRIPTS_DIR and einops")
def test_sd_scripts_own_network_holds_our_very_parameters() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    peer, why = peers.sd_scripts(step._by_single_name(unet))
    assert peer is not None, why
    assert {id(one) for one in peer.unet.parameters()} == {id(one) for one in unet.parameters()}
    assert timing.find_checkout("SDSCRIPTS_DIR") is not None
