"""Every optimizer and every schedule: stopped in the middle and resumed, the run is the straight one to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages import Stage, result, weights

from train.base.errors import ExitCode

ALIKE = ("optimizer.unet_lr=1e-3", "optimizer.text_encoder_lr=1e-3")
CASES = {
    "prodigy": ("optimizer.name=prodigy", "optimizer.unet_lr=1", "optimizer.text_encoder_lr=1", "optimizer.args={d_coef: 2, safeguard_warmup: true}"),
    "lion": ("optimizer.name=lion", *ALIKE),
    "lion8bit": ("optimizer.name=lion8bit", *ALIKE),
    "adamw8bit": ("optimizer.name=adamw8bit", *ALIKE),
    "came": ("optimizer.name=came", *ALIKE, "optimizer.args={clip_threshold: 0.5}"),
    "came in bf16": ("optimizer.name=came", *ALIKE, "precision=bf16", "model.weights=bf16"),
    **{name: (f"schedule.name={name}", "schedule.decay=1", "schedule.warmup_steps=0.2", *ALIKE) for name in ("cosine", "linear", "wsd")},
}
RUN = [pytest.param(name, marks=pytest.mark.slow if name == "prodigy" else pytest.mark.long) for name in CASES]


@pytest.mark.parametrize("case", RUN)
def test_stopped_and_resumed_is_the_straight_run(case: str, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    straight, stopped = Stage(tmp_path / "a", dataset, base_model), Stage(tmp_path / "b", dataset, base_model)
    assert straight.run(*CASES[case]) == ExitCode.DONE, straight.message
    assert stopped.run(*CASES[case], ANIX_FAULT="control@6:term") == ExitCode.STOPPED
    assert stopped.run(*CASES[case]) == ExitCode.DONE, stopped.message
    assert result(stopped.output) == result(straight.output)
    state = weights(straight.output, "optimizer")
    assert ("groups/d" in state) == (case == "prodigy")
    if case == "prodigy":
        assert float(state["groups/d"]) > 1e-6  # d0: it has grown
        assert int(state["groups/step"]) > 1
        assert not torch.equal(state["unet.conv_in.weight/p0"], weights(straight.output)["unet.conv_in.weight"])


@pytest.mark.parametrize(("changes", "told"), [
    (("optimizer.name=lion", "optimizer.args={d_coef: 1}"), "accepted are weight_decouple, fixed_decay"),
    (("optimizer.name=adamw", "optimizer.args={amsgrad: true}"), "it accepts none"),
    (("optimizer.name=prodigy", "optimizer.args={d_coef: true}"), "must be a number"),
    (("optimizer.name=prodigy", "optimizer.text_encoder_lr=1e-4", "optimizer.unet_lr=1"), "one step size for all that trains"),
    (("optimizer.name=prodigy", "optimizer.sharding=zero1", *ALIKE), "optimizer.sharding: zero1"),
    (("optimizer.name=came", "optimizer.sharding=fsdp2"), "refuses optimizer.name: came"),
    (("optimizer.name=came", "optimizer.eps=1e-8"), "does not read it"),
])  # fmt: skip
def test_what_an_optimizer_does_not_take_is_refused_by_name(
    changes: tuple[str, ...], told: str, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(*changes) == ExitCode.USAGE
    assert told in stage.message
