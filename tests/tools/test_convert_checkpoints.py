"""A checkpoint as a model: converted, opened, reported and refused; the weights as they were trained or, named, their average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import Stage

from train.base.errors import ExitCode, Halt
from train.model import layouts
from train.model.adapters import reading
from train.model.source import open_folder, open_single_file
from train.observe import anymodel, runs
from train.storage import state_files
from train.tools import demo
from train.tools.convert import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def run(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped by its length after 4 updates, with an average, and epochs' files."""
    stage = Stage(tmp_path_factory.mktemp("run"), dataset, base_model)
    more = ("max_updates=6", "ema.decay=0.9", "export.every_epochs=1", "schedule.name=constant", "schedule.min_lr=0", "schedule.decay=1.0")
    assert stage.run(*more) == 0, stage.message
    return stage.output


@pytest.mark.parametrize(("which", "group"), [("", "model"), ("/model.safetensors", "model"), ("/ema.safetensors", "ema")])
def test_a_checkpoint_becomes_what_its_stage_would_have_left(which: str, group: str, run: Path, tmp_path: Path) -> None:
    place = run / "checkpoints/step-00000004"
    told = list(checkpoints.convert(Path(f"{place}{which}"), tmp_path / "out.safetensors"))
    assert ("average of the weights" in told[0]) == (group == "ema")
    assert any("ema.safetensors OUT" in line for line in told) == (group == "model"), "that there is an average is said"
    list(checkpoints.convert(Path(f"{place}{which}"), tmp_path / "folder"))
    trained, single, folder = load_file(place / f"{group}.safetensors"), open_single_file(tmp_path / "out.safetensors"), open_folder(tmp_path / "folder")
    assert all(torch.equal(state_files.to_tensor(single.weights[name]), value.half()) for name, value in trained.items())
    assert {n: b.read() for n, b in folder.weights.items()} == {n: b.read() for n, b in single.weights.items()}
    assert single.lineage is not None
    assert folder.lineage is not None
    assert (single.lineage["stage"], single.lineage["updates"], single.license) == ("pretrain", 4, "Apache-2.0")
    assert single.lineage["weights_sha256"] == folder.lineage["weights_sha256"]
    left = open_single_file(run / f"pretrain{'-ema' if group == 'ema' else ''}-e0001.safetensors")
    assert {n: b.read() for n, b in left.weights.items()} == {n: b.read() for n, b in single.weights.items()}
    drawn, opened = load_file(place / f"{group}.safetensors"), anymodel.open_any(f"{place}{which}")
    assert all(torch.equal(state_files.to_tensor(opened.weights[name]), value) for name, value in drawn.items())
    assert opened.metadata["modelspec.title"] == f"pretrain at update 4{' (EMA)' if group == 'ema' else ''}"
    assert opened.note is not None
    with pytest.raises(Halt, match="exists"):
        list(checkpoints.convert(place, tmp_path / "out.safetensors"))


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    place = copied / "checkpoints/step-00000004"
    with open(place / "model.safetensors", "r+b") as file:
        file.seek(-8, 2)
        file.write(b"damaged!")
    with pytest.raises(Halt) as halted:
        list(checkpoints.convert(place, tmp_path / "out.safetensors"))
    assert halted.value.code == ExitCode.MISMATCH
    shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "alone/step-00000004")
    with pytest.raises(Halt, match="without its run"):
        list(checkpoints.convert(tmp_path / "alone/step-00000004", tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


def test_report_and_demo_take_one(run: Path) -> None:
    place = run / "checkpoints/step-00000004"
    demo.require_model(str(place))
    runs.check_run(place)
    half, whole = runs.read_run(place), runs.read_run(run)
    assert [line["step"] for line in half.metrics] == [1, 2, 3, 4]
    assert len(whole.metrics) == 6
    assert (half.name, half.ending, half.lineage) == ("pretrain at update 4", "a checkpoint", {})
    assert half.epoch_of(4) == "epoch 1 of 3"
    assert half.epoch_of(5) == ""
    assert [one.name for one in runs.told_apart([half, whole])] == ["pretrain at update 4", "pretrain"]


@pytest.mark.long
def test_of_an_adapter_the_adapter(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    lora = ("adapter.type=lora", "adapter.rank=2", "model.train_text_encoders=false", "optimizer.text_encoder_lr=null")
    assert stage.run("export.every_epochs=1", *lora) == 0, stage.message
    place = stage.output / "checkpoints/step-00000004"
    list(checkpoints.convert(place, tmp_path / "one.safetensors"))
    list(checkpoints.convert(place, tmp_path / "folder"))
    configs = layouts.read_configs(base_model)
    one, two, left = (reading.open_adapter(path, configs) for path in (tmp_path / "one.safetensors", tmp_path / "folder", stage.output / "pretrain-lora-e0001.safetensors"))
    for name, layer in one.layers.items():
        for part, blob in layer.parts.items():
            assert blob.read() == two.layers[name].parts[part].read() == left.layers[name].parts[part].read()
    assert json.loads((tmp_path / "folder/lineage.json").read_text())["updates"] == 4
