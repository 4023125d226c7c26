"""A stage from its first update to its files: interrupted, resumed, watched. Refusals: test_bad_input.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stages import Stage, losses, result, state, tree

from train.base import signals
from train.base.errors import ExitCode
from train.config.prompts import load_prompts
from train.observe.inference import draw, open_model
from train.testing.chaos.ranks import Ranks, warm_up


def test_a_finished_stage_holds_what_is_promised(straight: Path) -> None:
    names = {path.name for path in straight.iterdir() if not path.name.startswith(".")}
    assert names >= {"DONE", "config.yaml", "metrics.jsonl", "checkpoints", "model", "pretrain.safetensors",
                     "lineage.json", "trace.txt", "exit.json"}  # fmt: skip
    assert not names & {"bad_step.json", "attempts.json", "metrics.discarded.jsonl"}
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {"step", "update", "epoch", "images", "loss", "lr_unet", "lr_text_encoder", "grad_norm", "images_per_s"} <= (
        lines[0].keys()
    )
    assert lines[-1]["images"] == 72
    assert len((straight / "trace.txt").read_text().splitlines()) == 72
    assert json.loads((straight / "exit.json").read_text())["code"] == 0


def test_a_stop_and_a_rerun_equal_the_straight_run(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(ANIX_FAULT="control@6:term") == ExitCode.STOPPED
    left = json.loads((stage.output / "exit.json").read_text())
    assert (left["code"], left["status"], left["update"]) == (85, "stopped", 7)
    assert len(losses(stage.output)) == 7
    assert stage.run() == ExitCode.DONE
    assert result(stage.output) == result(straight)
    assert state(stage.output)["history"] == [[0, 1], [7, 1]]


@pytest.mark.slow
def test_a_crash_between_checkpoints_loses_only_what_was_not_saved(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    with pytest.raises(KeyError):  # no code of its own: it passes through, exit.json says 1
        stage.run(ANIX_FAULT="optimizer@6:raise=KeyError")
    assert json.loads((stage.output / "exit.json").read_text())["code"] == 1
    assert len(losses(stage.output)) == 6
    assert stage.run() == ExitCode.DONE
    assert result(stage.output) == result(straight)
    discarded = (stage.output / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in discarded] == [5, 6]


@pytest.mark.slow
def test_a_kill_loses_only_what_was_not_saved(straight: Path, dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    warm_up()
    # before the first checkpoint, after one, and inside a save
    for fault, saved in (("backward@2:kill", []), ("optimizer@6:kill", [4]), ("save.manifest@8:kill", [4])):
        launch = Ranks(stage.arguments(), tmp_path / "logs", env={"ANIX_FAULT": fault})
        assert launch.wait() == [-9], launch.text()
        found = [int(path.name[5:]) for path in (stage.output / "checkpoints").glob("step-????????")]
        assert found == saved
    assert stage.run() == ExitCode.DONE
    assert result(stage.output) == result(straight)


def test_a_finished_stage_is_left_alone(straight: Path, dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    stage.output = straight
    before = tree(straight)
    assert stage.run(f"output_dir={straight}") == ExitCode.DONE
    assert tree(straight) == before


@pytest.mark.parametrize("changes", [
    ("data.workers=1",), pytest.param(("data.workers=3", "data.prefetch=4"), marks=pytest.mark.slow),
    ("checkpoint.background=true", "checkpoint.every_steps=1", "checkpoint.when_busy=wait"),
])  # fmt: skip
def test_workers_and_savers_do_not_change_a_bit(
    changes: tuple[str, ...], straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(*changes) == ExitCode.DONE, stage.message
    assert result(stage.output) == result(straight)


@pytest.mark.slow
def test_previews_do_not_change_a_bit(straight: Path, dataset: Path, base_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("steps: 2\nprompts:\n  - {text: 1girl, width: 64, height: 64, seed: 3}\n")
    stage = Stage(tmp_path, dataset, base_model)
    looks = ("sampling.every_steps=4", "sampling.at_start=true", f"sampling.prompts={prompts}")
    assert stage.run(*looks) == ExitCode.DONE, stage.message
    assert result(stage.output) == result(straight)
    assert sorted(path.parent.name for path in (stage.output / "samples").glob("*/grid.png")) == [
        "step-00000000", "step-00000004", "step-00000008", "step-00000009"
    ]  # fmt: skip
    (of_the_base,) = draw(open_model(base_model, device="cpu"), load_prompts(prompts))
    with Image.open(stage.output / "samples/step-00000000/00.png") as first:
        assert first.tobytes() == of_the_base.tobytes(), "what the stage starts from"


@pytest.mark.slow
def test_validation_does_not_change_a_bit(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    plain, watched = (Stage(tmp_path / name, dataset, base_model) for name in ("plain", "watched"))
    assert plain.run("validation.share=0.2") == ExitCode.DONE, plain.message
    assert watched.run("validation.share=0.2", "validation.every_steps=4") == ExitCode.DONE, watched.message
    assert result(watched.output) == result(plain.output)
    lines = (watched.output / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 6]  # and at the end, which is no multiple


@pytest.mark.slow
def test_the_average_follows_its_formula_and_survives_a_stop(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    changes = ("ema.decay=0.75", "max_updates=6", "checkpoint.every_steps=1", "checkpoint.permanent_every_steps=1")
    stage = Stage(tmp_path / "a", dataset, base_model)
    assert stage.run(*changes) == ExitCode.DONE, stage.message
    steps = sorted((stage.output / "checkpoints").glob("step-????????"))
    assert len(steps) == 6
    average: dict[str, torch.Tensor] = {}
    for name in load_file(steps[0] / "model.safetensors"):
        network, _, key = name.partition(".")
        file = "diffusion_pytorch_model" if network == "unet" else "model"
        stored = load_file(base_model / network / f"{file}.safetensors")
        average[name] = stored[key if key in stored else key.removeprefix("text_model.")].double()
    for step in steps:
        for name, weight in load_file(step / "model.safetensors").items():
            average[name] = 0.75 * average[name] + 0.25 * weight.double()
    found = load_file(steps[-1] / "ema.safetensors")
    assert found.keys() == average.keys()
    assert all(torch.allclose(found[name].double(), average[name], rtol=1e-5, atol=1e-7) for name in average)
    exported = load_file(stage.output / "pretrain-ema.safetensors")
    plain = load_file(stage.output / "pretrain.safetensors")
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(exported[key], found["unet.conv_out.weight"].half())
    assert not torch.equal(exported[key], plain[key])

    stopped = Stage(tmp_path / "b", dataset, base_model)
    assert stopped.run(*changes, ANIX_FAULT="control@1:term") == ExitCode.STOPPED
    assert stopped.run(*changes) == ExitCode.DONE
    assert result(stopped.output) == result(stage.output)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("checkpoint.every_steps=3", ANIX_FAULT="control@6:term") == ExitCode.STOPPED
    newest = stage.output / "checkpoints" / "step-00000007" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert stage.run() == ExitCode.DONE
    assert "step-00000007" in capsys.readouterr().err
    assert result(stage.output) == result(straight)


def test_a_second_start_of_two_ranks_leaves_nothing_in_the_firsts_directory(
    dataset: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank 0 is refused the lock with 6; its rank 1 stops before it ever met rank 0."""
    stage = Stage(tmp_path, dataset, base_model)
    monkeypatch.setattr(signals, "orphaned", lambda: True)
    assert stage.run(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1") == ExitCode.STOPPED
    assert not list(stage.output.glob("exit*.json"))
