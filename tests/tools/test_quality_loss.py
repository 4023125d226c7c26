"""quality.py loss: the run's own held-out losses again, pairs and their standard error, what is told and refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import Stage

from train.base.errors import ExitCode, Halt
from train.config.stage import LossConfig
from train.diffusion.noise import add_noise, alphas_cumprod
from train.diffusion.objective import per_image
from train.observe.validation import band_of
from train.tools.commands import quality as command
from train.tools.quality import loss


@pytest.fixture(scope="module")
def looked(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 updates that measured its held-out loss at its end."""
    stage = Stage(tmp_path_factory.mktemp("looked"), dataset, base_model)
    changes = ("validation.share=0.3", "validation.every_steps=3", "max_updates=3")
    assert stage.run(*changes) == 0, stage.message
    return stage.output


def test_a_run_gets_the_losses_that_it_logged_itself(looked: Path, dataset: Path) -> None:
    own = json.loads((looked / "validation.jsonl").read_text().splitlines()[-1])
    record = loss.measure([str(looked)], dataset)
    found = record["models"]["pretrain"]
    assert found["losses"] == pytest.approx(own["losses"], rel=1e-6)
    assert (record["selection"], record["share"], record["images"], record["notes"]) == ("pretrain", 0.3, len(own["losses"]), [])
    assert (found["loss"], found["interval"]) == pytest.approx((own["loss"], own["interval"]), rel=1e-6)
    for name, stratum in own["strata"].items():
        assert found["strata"][name]["loss"] == pytest.approx(stratum["loss"], rel=1e-6)
    bands = [one["images"] for name, one in found["strata"].items() if name.startswith("timestep/")]
    assert sum(bands) == record["images"]


def test_every_kind_of_file_side_by_side(looked: Path, dataset: Path, base_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folder, single file and checkpoint of one run differ by the rounding to fp16; its start lies further off."""
    last = max((looked / "checkpoints").iterdir())
    models = [f"run={looked}", str(last), f"file={looked / 'pretrain.safetensors'}", f"start={base_model}"]
    out = tmp_path / "loss.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", "loss", *models, "--data", str(dataset), "--out", str(out), "--tokenizers", str(base_model)])
    command.main()
    record = json.loads(out.read_text())
    same, rounded, start = record["changes"]
    assert (same["from"], same["to"], same["loss"], same["se"]) == ("run", last.name, 0.0, 0.0)
    assert 0 < abs(rounded["loss"]) < abs(start["loss"])
    assert start["loss"] > 0, "training lowers it"
    differences = [record["models"]["start"]["losses"][uid] - value for uid, value in record["models"]["run"]["losses"].items()]
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    assert (start["loss"], start["se"]) == pytest.approx((mean, spread), rel=1e-9)
    assert record["notes"] == ["start: no config lies beside it, so whether it saw these images is not known"]
    printed = capsys.readouterr().out
    assert "run -> start, image by image" in printed
    assert f"  all{' ' * 25}+{start['loss']:.5f} ± {start['se']:.5f} ({start['images']})" in printed


def test_without_a_share_all_images_are_measured_and_that_is_said(base_model: Path, dataset: Path) -> None:
    with pytest.raises(Halt, match=r"ft1, ft2, pretrain.*--select") as caught:
        loss.measure([str(base_model)], dataset)
    assert caught.value.code == ExitCode.USAGE
    record = loss.measure([str(base_model)], dataset, select="ft1", images=5)
    assert record["images"] == 5
    assert "seen in training or not" in record["notes"][0]
    with pytest.raises(Halt, match="not a prepared dataset"):
        loss.measure([str(base_model)], base_model)
    with pytest.raises(Halt, match=r"^nowhere does not exist: give a finished run"):
        loss.measure([str(base_model), "nowhere"], base_model)  # said before anything is measured, even the set
    with pytest.raises(Halt, match="two models are called a"):
        loss.named([f"a={base_model}", f"a={dataset}"])


def test_a_smaller_share_than_measured_is_told(looked: Path, dataset: Path) -> None:
    record = loss.measure([str(looked)], dataset, share=0.6)
    assert record["notes"] == ["pretrain: trained with a validation.share below 0.6, so it may have seen some of these images"]


def pair(one: dict[str, Any], two: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    common: dict[str, Any] = {"prediction": "epsilon", "zero_terminal_snr": False}
    uids = list(one["losses"])
    times = {uid: 100 + 200 * number for number, uid in enumerate(uids)}
    found = loss.Images(None, "", 0.0, {uid: [band_of(times[uid])] for uid in uids}, times)  # type: ignore[arg-type]
    notes: list[str] = []
    return loss._change("a", "b", {"a": common | one, "b": common | two}, found, notes), notes


def test_v_and_epsilon_are_compared_as_epsilon_losses() -> None:
    """v loss x a(t) is the epsilon loss of the same output, by the definition of both; nobody compares raw numbers."""
    generator = torch.Generator().manual_seed(0)
    latents, noise, output = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    times, alphas = torch.tensor([100, 300, 500]), alphas_cumprod()
    noisy = add_noise(latents, noise, times, alphas)
    a = alphas[times].view(-1, 1, 1, 1)
    as_epsilon = (a.sqrt() * output + (1 - a).sqrt() * noisy).float()
    by_v = per_image(output, latents, noise, times, alphas, LossConfig(prediction="v")).tolist()
    by_epsilon = per_image(as_epsilon, latents, noise, times, alphas, LossConfig()).tolist()
    uids = ["0", "1", "2"]
    one, two = ({"losses": dict(zip(uids, values, strict=True))} for values in (by_epsilon, by_v))
    change, notes = pair(one, {**two, "prediction": "v"})
    assert change is not None
    assert change["loss"] == pytest.approx(0.0, abs=1e-5)
    assert change["se"] == pytest.approx(0.0, abs=1e-5)
    assert "a(t)" in notes[0]
    assert abs(sum(by_v) - sum(by_epsilon)) > 0.1, "the raw numbers differ"
    assert set(change["strata"]) == {"timestep/000-249", "timestep/250-499", "timestep/500-749"}
    none, notes = pair(one, {**two, "prediction": "v", "zero_terminal_snr": True})
    assert none is None
    assert "zero terminal SNR" in notes[0]


def test_a_v_file_is_measured_as_v(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """Its marks decide: the same tensors with and without have other losses."""
    v = tmp_path / "v"
    shutil.copytree(base_model, v)
    scheduler = json.loads((v / "scheduler/scheduler_config.json").read_text())
    (v / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}))
    record = loss.measure([f"e={base_model}", f"v={v}"], dataset, select="ft1", images=4)
    e, found = record["models"]["e"], record["models"]["v"]
    assert (e["prediction"], found["prediction"]) == ("epsilon", "v")
    assert e["loss"] != found["loss"]
    change = record["changes"][0]
    assert change["loss"] != pytest.approx(found["loss"] - e["loss"], rel=1e-3)


@pytest.mark.parametrize(("t", "name"), [(0, "timestep/000-249"), (249, "timestep/000-249"), (250, "timestep/250-499"), (999, "timestep/750-999")])
def test_bands(t: int, name: str) -> None:
    assert band_of(t) == name
