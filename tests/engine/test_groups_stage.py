"""Frozen groups of a stage: bits unchanged, no gradient, no state, and part of a checkpoint's identity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from stages import Stage, opened, result, weights

from train.base.errors import ExitCode
from train.model.networks import trained_parameters

FROZEN, SLOW = "unet.down_blocks.*.attentions.*", "text_encoder_2.*"
GROUPS = f'optimizer.groups=[{{match: "{FROZEN}", lr: 0}},{{match: "{SLOW}", lr: 2e-4, until: 0.5}}]'


def test_frozen_tensors_have_no_gradient_no_state_and_their_bits(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    with opened(stage, GROUPS, "max_updates=20", "epochs=9") as session:
        networks = session.trained.gradients.model
        frozen = [n for n, p in networks.named_parameters() if n.startswith("unet.down_blocks.") and ".attentions." in n and not p.requires_grad]
        assert frozen
        assert not set(frozen) & set(trained_parameters(networks))
        assert {group["name"] for group in session.trained.optimizer.param_groups} == {"unet", "text_encoder", SLOW}
        held = sum(len(group["params"]) for group in session.trained.optimizer.param_groups)
        assert held == len(session.trained.parameters)
        rates = [session.trained.rates_at(update)[SLOW] for update in (9, 10)]
        assert rates[0] > 0
        assert rates[1] == 0
    assert stage.run(GROUPS, "max_updates=20", "epochs=9", "ema.decay=0.9") == ExitCode.DONE, stage.message
    assert not set(frozen) & weights(stage.output).keys()
    exported = next(stage.output.rglob("unet")).parent
    found, base = (unet_of(folder) for folder in (exported, base_model))
    for name in found:
        same = torch.equal(found[name].half(), base[name].half())
        assert same == (f"unet.{name}" in frozen) or not base[name].any(), name


def unet_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next((folder / "unet").glob("*.safetensors")))


def test_a_change_of_what_is_frozen_is_refused_by_its_pattern(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(GROUPS, "max_updates=2") == ExitCode.DONE, stage.message
    shutil.rmtree(stage.output / "export", ignore_errors=True)
    other = GROUPS.replace("lr: 0}", "lr: 1e-4}")
    assert stage.run(other, "max_updates=3") == ExitCode.MISMATCH
    assert FROZEN in stage.message
    assert SLOW not in stage.message.split("now [")[1]
    assert stage.run('optimizer.groups=[{match: "unet.downblocks.*", lr: 0}]', "max_updates=2", f"output_dir={tmp_path / 'new'}") == ExitCode.USAGE
    assert "nearest is 'unet.down_blocks." in stage.message


@pytest.mark.slow
def test_killed_and_resumed_with_groups_is_the_straight_run(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    straight, cut = Stage(tmp_path / "a", dataset, base_model), Stage(tmp_path / "b", dataset, base_model)
    assert straight.run(GROUPS) == ExitCode.DONE, straight.message
    assert cut.run(GROUPS, ANIX_FAULT="control@6:term") == ExitCode.STOPPED
    assert cut.run(GROUPS) == ExitCode.DONE, cut.message
    assert result(straight.output) == result(cut.output)
