"""Usable files of epochs: what they hold, that a kill or a full disk loses none of them for good, that none is written over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import Stage, clean_process, opened, result

from train.base.errors import ExitCode, Halt
from train.engine import export, usable
from train.model import layouts
from train.model.adapters import reading
from train.model.source import open_single_file
from train.recipe.order import Plan
from train.storage import state_files

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EVERY = "export.every_epochs=1"
# 26 images in tiles of 2, 4 tiles an update: 13 tiles an epoch, so epochs end with updates 4 and 7; the third with the stage.
ENDS = {4: "e0001", 7: "e0002"}
LORA = ("adapter.type=lora", "adapter.rank=2", "model.train_text_encoders=false", "optimizer.text_encoder_lr=null")


@pytest.fixture(scope="module")
def run(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = Stage(tmp_path_factory.mktemp("epochs"), dataset, base_model)
    assert stage.run(EVERY, "ema.decay=0.9", "tracking.trace=true") == 0, stage.message
    return stage.output


def files(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*-e[0-9]*.safetensors"))


def seen(output: Path) -> dict[str, tuple[int, int]]:
    return {name: (os.stat(output / name).st_ino, os.stat(output / name).st_mtime_ns) for name in files(output)}


def test_when_epochs_end() -> None:
    def plan(images: int, **more: Any) -> Plan:
        sizes = [64] * images
        return Plan(range(images), sizes, sizes, seed=1, tile_images=2, tiles_per_update=2, **{"epochs": 4, **more})

    assert plan(8).ends_of(None) == {}
    assert plan(8).ends_of(1) == {2: 1, 4: 2, 6: 3}, "the fourth is the stage's own end"
    assert plan(8).ends_of(2) == {4: 2}
    assert plan(8).ends_of(4) == plan(8).ends_of(9) == {}
    assert plan(10).ends_of(1) == {3: 1, 5: 2}, "2.5 updates an epoch, 8 in all: the third ends with the stage's last update"
    assert plan(8, max_updates=5).ends_of(1) == {2: 1, 4: 2}
    assert plan(3, remainder="keep", epochs=3).ends_of(1) == {1: 1, 2: 2}
    for images in range(4, 40):
        some = plan(images)
        for done, epoch in some.ends_of(1).items():
            tiles = [tile for s in range(done) for tile in some.update(s)]
            visits = sum(int((tile.epochs < epoch).sum()) for tile in tiles)
            assert visits >= epoch * images - (epoch * images) % 2, "all but what fills no tile"


def test_each_epoch_leaves_a_whole_model_of_its_weights(run: Path, base_model: Path) -> None:
    assert files(run) == sorted(f"pretrain{kind}-{name}.safetensors" for name in ENDS.values() for kind in ("", "-ema"))
    for step, name in ENDS.items():
        for kind, group in (("", "model"), ("-ema", "ema")):
            trained = load_file(run / f"checkpoints/step-{step:08d}/{group}.safetensors")
            model = open_single_file(run / f"pretrain{kind}-{name}.safetensors")
            for tensor, value in trained.items():
                assert torch.equal(state_files.to_tensor(model.weights[tensor]), value.half()), (name, kind, tensor)
            assert model.lineage is not None
            assert (model.lineage["updates"], model.lineage["images"], model.lineage["stage"]) == (step, 8 * step, "pretrain")
    title = export.read_metadata(run / "pretrain-ema-e0001.safetensors")["modelspec.title"]
    assert title.endswith(" (EMA)")


@pytest.mark.long
def test_the_training_is_the_same_with_and_without(run: Path, base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run("ema.decay=0.9", "tracking.trace=true") == 0, stage.message
    assert files(stage.output) == []
    ours, theirs = result(run), result(stage.output)
    assert {key: ours[key] for key in ours if key != "metrics"} == {key: theirs[key] for key in theirs if key != "metrics"}
    assert [line["loss"] for line in ours["metrics"]] == [line["loss"] for line in theirs["metrics"]]


def test_killed_while_a_file_is_written(run: Path, base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start makes it from the checkpoint of that epoch, the same; those that are there are not touched."""
    stage, real, calls = Stage(tmp_path, dataset, base_model), export.write_single, []

    def killed(path: Path, *more: Any) -> str:
        calls.append(path.name)
        if path.name == "pretrain-ema-e0002.safetensors":
            raise KeyboardInterrupt
        return real(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_single", killed)
        with pytest.raises(KeyboardInterrupt), clean_process({}):
            stage.run(EVERY, "ema.decay=0.9")
    assert files(stage.output) == ["pretrain-e0001.safetensors", "pretrain-e0002.safetensors", "pretrain-ema-e0001.safetensors"]
    before = seen(stage.output)
    assert stage.run(EVERY, "ema.decay=0.9") == 0, stage.message
    assert {name: seen(stage.output)[name] for name in before} == before
    assert files(stage.output) == files(run)
    for name in files(run):
        ours, theirs = load_file(run / name), load_file(stage.output / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_stage_that_goes_on_leaves_its_first_end_too(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    """Asked for later: made of the checkpoints that are there. What lies there of other weights stays, and that is told."""
    stage, lasting = Stage(tmp_path, dataset, base_model), "schedule.name=constant"
    few = ("optimizer.name=adamw", lasting, "schedule.min_lr=0", "schedule.decay=1.0")
    assert stage.run(*few, "max_updates=4") == 0, stage.message
    (stage.output / "pretrain-e0002.safetensors").write_bytes(b"somebody's")
    assert stage.run(*few, "max_updates=8", EVERY) == 0, stage.message
    assert files(stage.output) == ["pretrain-e0001.safetensors", "pretrain-e0002.safetensors"]
    assert (stage.output / "pretrain-e0002.safetensors").read_bytes() == b"somebody's"
    assert open_single_file(stage.output / "pretrain-e0001.safetensors").lineage["updates"] == 4  # type: ignore[index]


def test_an_adapter_leaves_its_own_file(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(EVERY, *LORA) == 0, stage.message
    assert files(stage.output) == [f"pretrain-lora-{name}.safetensors" for name in ENDS.values()]
    last = reading.open_adapter(stage.output / "pretrain-lora.safetensors", layouts.read_configs(base_model))
    first = reading.open_adapter(stage.output / "pretrain-lora-e0001.safetensors", layouts.read_configs(base_model))
    assert first.layers.keys() == last.layers.keys()
    assert first.bases == last.bases
    assert first.metadata["ss_output_name"] == "pretrain-lora-e0001"
    assert int(first.metadata["ss_steps"]) == 4
    assert (stage.output / "pretrain-lora-e0001.safetensors").stat().st_size < (base_model / "unet/diffusion_pytorch_model.safetensors").stat().st_size


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def write(path: Path, *_: Any) -> str:
        raise Halt(ExitCode.CANNOT_WRITE, f"{path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_single", write)
        yield


@pytest.mark.parametrize(("then", "code", "update"), [("skip", 8, 9), pytest.param("stop", 8, 4, marks=pytest.mark.long)])
def test_a_full_disk(then: str, code: int, update: int, base_model: Path, dataset: Path, tmp_path: Path, full_disk: None) -> None:
    """With skip the training goes on to its end, where the stage's own file cannot be written either."""
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(EVERY, f"checkpoint.on_full_disk={then}") == code
    assert max(path.name for path in (stage.output / "checkpoints").iterdir()) == f"step-{update:08d}"


def test_the_disk_check_counts_them(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    values = sum(p.numel() for path in base_model.glob("*/*.safetensors") for p in load_file(path).values())
    for more, size in (((), 2 * values), (("export.dtype=fp32",), 4 * values), (("ema.decay=0.9",), 4 * values)):
        with opened(stage, EVERY, *more) as session:
            parameters, average = session.trained.parameters.values(), session.trained.ema is not None
            counted = usable.missing_bytes(stage.output, session.run.files, parameters, average=average)
            assert counted == 2 * size
            (stage.output / "pretrain-e0001.safetensors").touch()
            assert usable.missing_bytes(stage.output, session.run.files, parameters, average=average) == size
            (stage.output / "pretrain-e0001.safetensors").unlink()
