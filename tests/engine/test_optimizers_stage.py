"""Every optimizer and every schedule: stopped in the middle and resumed, the run is the straight one to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import Stage, result, weights

from train.base.errors import ExitCode
from train.tools.quality.loss import measure

ALIKE = ("optimizer.unet_lr=1e-3", "optimizer.text_encoder_lr=1e-3")
CASES = {
    "prodigy": ("optimizer.name=prodigy", "optimizer.unet_lr=1", "optimizer.text_encoder_lr=1", "optimizer.args={d_coef: 2, safeguard_warmup: true}"),
    "lion": ("optimizer.name=lion", *ALIKE),
    "lion8bit": ("optimizer.name=lion8bit", *ALIKE),
    "adamw8bit": ("optimizer.name=adamw8bit", *ALIKE),
    "came": ("optimizer.name=came", *ALIKE, "optimizer.args={clip_threshold: 0.5}"),
    "came in bf16": ("optimizer.name=came", *ALIKE, "precision=bf16", "model.weights=bf16"),
    "schedulefree": ("optimizer.name=schedulefree", *ALIKE, "schedule.name=constant_with_warmup", "schedule.warmup_steps=2", "schedule.min_lr=0",
                     "schedule.decay=1"),
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


@pytest.mark.slow
def test_the_schedule_free_average_is_looked_at_and_exported_and_training_never_notices(
    base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    blind, looking = (Stage(tmp_path / name, dataset, base_model) for name in ("blind", "looking"))
    changes = (*CASES["schedulefree"], "validation.share=0.3", "max_updates=4", "export.dtype=fp32")
    look = ("validation.every_steps=2", "sampling.every_steps=2", f"sampling.prompts={prompts}")
    assert blind.run(*changes) == ExitCode.DONE, blind.message
    assert looking.run(*changes, *look) == ExitCode.DONE, looking.message
    assert result(looking.output) == result(blind.output)
    state, name = weights(blind.output, "optimizer"), "unet.conv_in.weight"
    y, z = state[f"{name}/y"], state[f"{name}/z"]
    average = (y - 0.1 * z) / 0.9  # y = beta1 x + (1 - beta1) z
    exported = load_file(blind.output / "model/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    torch.testing.assert_close(exported, average, rtol=1e-5, atol=1e-7)
    assert not torch.equal(exported, y)
    assert json.loads((blind.output / "lineage.json").read_text())["weights"] == "the average of schedule-free AdamW"
    # the held-out loss of the last update is that of the exported model
    told = json.loads((looking.output / "validation.jsonl").read_text().splitlines()[-1])
    again = measure([str(looking.output / "model")], dataset, select="pretrain", share=0.3, device="cpu")
    assert next(iter(again["models"].values()))["loss"] == pytest.approx(told["loss"], rel=1e-5)


@pytest.mark.parametrize(("changes", "told"), [
    (("optimizer.name=lion", "optimizer.args={d_coef: 1}"), "accepted are weight_decouple, fixed_decay"),
    (("optimizer.name=adamw", "optimizer.args={amsgrad: true}"), "it accepts none"),
    (("optimizer.name=prodigy", "optimizer.args={d_coef: true}"), "must be a number"),
    (("optimizer.name=prodigy", "optimizer.text_encoder_lr=1e-4", "optimizer.unet_lr=1"), "one step size for all that trains"),
    (("optimizer.name=prodigy", "optimizer.sharding=zero1", *ALIKE), "optimizer.sharding: zero1"),
    (("optimizer.name=came", "optimizer.sharding=fsdp2"), "refuses optimizer.name: came"),
    (("optimizer.name=came", "optimizer.eps=1e-8"), "does not read it"),
    (("optimizer.name=schedulefree", "ema.decay=0.9"), "schedulefree refuses ema.decay"),
    (("optimizer.name=schedulefree", "optimizer.sharding=zero1"), "schedulefree refuses optimizer.sharding: zero1"),
    (("optimizer.name=schedulefree", "optimizer.groups=[{match: 'unet.*', until: 0.5}]"), "schedulefree refuses optimizer.groups with until"),
    (("optimizer.name=adamw", "optimizer.paged=true"), "optimizer.name adamw has no 8-bit state"),
])  # fmt: skip
def test_what_an_optimizer_does_not_take_is_refused_by_name(
    changes: tuple[str, ...], told: str, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(*changes) == ExitCode.USAGE
    assert told in stage.message
