"""Bad input: a message that names the key or file, the right exit code, and nothing written over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import synthetic
import tinysdxl
from safetensors.torch import load_file, save_file
from stages import Stage, result, tree

from train.base.errors import ExitCode
from train.storage.rundir import open_run_dir

# What a refused start may write: why it ended.
NOTES = {"exit.json", ".lock", "attempts.json"}


# What a killed run left, and what is the user's: a refused start removes neither.
BESIDE = ("checkpoints/step-00000009.tmp", "checkpoints/step-00000001.del", "config.yaml.tmp", "notes.tmp")


def kept(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name not in NOTES}


@pytest.fixture(scope="module")
def stopped(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run that was stopped after update 3."""
    stage = Stage(tmp_path_factory.mktemp("stopped"), dataset, base_model)
    assert stage.run(ANIX_FAULT="control@2:term") == ExitCode.STOPPED
    for name in BESIDE:
        (stage.output / name).write_text("left over")
    return stage


@pytest.fixture(scope="module")
def bad(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that must be refused."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    synthetic.make_dataset(folder / "changed", (12, 8, 6), seed=1, buckets=((64, 64), (64, 96), (96, 64)))
    synthetic.make_dataset(folder / "fewer", (12, 8, 5), buckets=((64, 64), (64, 96), (96, 64)))
    synthetic.make_dataset(folder / "sparse", (12, 8, 1), buckets=((64, 64), (64, 96), (96, 64)))
    synthetic.make_dataset(folder / "unselected", (12, 8, 6), stages=("ft1",), buckets=((64, 64), (64, 96), (96, 64)))
    (folder / "model.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 64)
    (folder / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00." + b"\0" * 64)
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 4)
    tinysdxl.write(folder / "other", "least", seed=1)
    shutil.copytree(base_model, folder / "infinite")
    unet = folder / "infinite" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    tensors["conv_in.bias"][0] = float("inf")
    save_file(tensors, unet)
    return folder


CASES = {
    "unknown key": (("modle.init_from=x",), 2, "model"),
    "misspelt key": (("batch.mirco=2",), 2, "micro"),
    "wrong type": (("epochs=three",), 2, "epochs"),
    "wrong type of a list": (("optimizer.betas=0.9",), 2, "optimizer.betas"),
    "wrong choice": (("precision=fp8",), 2, "precision"),
    "out of range": (("data.tag_dropout=1.5",), 2, "data.tag_dropout"),
    "missing init_from": (("model.init_from=BAD/nowhere",), 2, "init_from"),
    "no licence": (("export.license=null",), 2, "license"),
    "no prompts file": (("sampling.every_steps=2", "sampling.prompts=BAD/no.yaml"), 2, "no.yaml"),
    "schedule that contradicts itself": (("schedule.min_lr=1",), 2, "schedule.min_lr"),
    "hub name without commit": (("model.init_from=someone/model@main",), 2, "commit"),
    "dataset not there": (("data.path=BAD/nowhere",), 7, "prepare"),
    "dataset not prepared": (("data.path=BAD/empty",), 7, "prepare"),
    "dataset without this selection": (("data.path=BAD/unselected",), 7, "select"),
    "bucket smaller than asked for": (("data.path=BAD/sparse", "batch.min_bucket=2"), 7, "batch.min_bucket=null"),
    "captions changed": (("data.path=BAD/changed",), 7, "data"),
    "image removed": (("data.path=BAD/fewer",), 7, "data"),
    "other seed": (("seed=5",), 7, "seed"),
    "other learning rate": (("optimizer.unet_lr=2e-3",), 7, "optimizer.unet_lr"),
    "other batch": (("batch.effective=4",), 7, "batch.effective"),
    "other optimizer": (("optimizer.name=adafactor",), 7, "optimizer.name"),
    "other precision": (("precision=bf16",), 7, "precision"),
    "average switched on": (("ema.decay=0.9",), 7, "ema"),
    "encoders frozen": (("model.train_text_encoders=false", "optimizer.text_encoder_lr=null"), 7, "train_text"),
    "accumulation that does not fit": (("batch.accumulation=3",), 7, "batch.accumulation"),
    "stage of another directory": (("stage=ft1",), 7, "output_dir"),
    "pickle": (("model.init_from=BAD/model.ckpt",), 7, "pickle"),
    "pickle under a wrong name": (("model.init_from=BAD/pickle.safetensors",), 7, "pickle"),
    "damaged file": (("model.init_from=BAD/noise.safetensors",), 7, "noise.safetensors"),
    "folder that is no model": (("model.init_from=BAD/empty",), 7, "empty"),
    "other base model": (("model.init_from=BAD/other",), 7, "model.init_from"),
    "weights that are not finite": (("model.init_from=BAD/infinite",), 7, "unet.conv_in.bias"),
    "pinned hash": (("model.init_sha256=" + "a" * 64,), 7, "init_sha256"),
    "unknown acceptance": (("resume.accept=[dta]",), 2, "data"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, stopped: Stage, bad: Path) -> None:
    changes, code, word = CASES[name]
    before = kept(stopped.output)
    found = stopped.run(*(change.replace("BAD", str(bad)) for change in changes))
    assert found == code, stopped.message
    assert word in stopped.message
    assert len(stopped.message) < 2000
    assert kept(stopped.output) == before


@pytest.mark.parametrize(("world", "strict", "choices"), [
    ("3", False, "1, 2, 4"), ("8", False, "1, 2, 4"), ("3", True, "1, 2, 4"),
])  # fmt: skip
def test_a_batch_that_does_not_divide_is_refused_before_the_processes_meet(
    world: str, strict: bool, choices: str, stopped: Stage
) -> None:
    changes = ("batch.determinism=strict",) if strict else ()
    assert stopped.run(*changes, WORLD_SIZE=world) == ExitCode.MISMATCH
    assert choices in stopped.message


@pytest.mark.parametrize(("variable", "value", "word"), [
    ("ACCELERATE_USE_FSDP", "true", "add optimizer.sharding=fsdp2"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed, which is not built"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "model.compile"),
])  # fmt: skip
def test_a_launch_config_that_wraps_the_model_otherwise_is_refused_by_name(
    variable: str, value: str, word: str, stopped: Stage
) -> None:
    assert stopped.run(**{variable: value}) == ExitCode.USAGE
    assert word in stopped.message


def test_strict_refuses_a_world_that_is_no_power_of_two(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    changes = ("batch.determinism=strict", "batch.effective=12")
    assert stage.run(*changes, WORLD_SIZE="3") == ExitCode.MISMATCH
    assert "1, 2 processes" in stage.message


def test_a_locked_directory(stopped: Stage) -> None:
    before = kept(stopped.output)
    holder = open_run_dir(stopped.output, "pretrain")
    try:
        assert stopped.run() == ExitCode.LOCKED
    finally:
        holder.close()
    assert kept(stopped.output) == before


def test_a_place_that_cannot_be_written(stopped: Stage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert stopped.run(f"output_dir={tmp_path / 'file' / 'run'}") == ExitCode.CANNOT_WRITE
    assert "output_dir" in stopped.message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_missing_config_file(stopped: Stage, tmp_path: Path) -> None:
    stage = Stage.__new__(Stage)
    stage.yaml, stage.output = tmp_path / "none.yaml", tmp_path / "run"
    assert stage.run() == ExitCode.USAGE
    assert "none.yaml" in stage.message
    assert not stage.output.exists()


def test_a_refusal_is_recorded_and_a_first_start_can_be_repeated(
    dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(f"data.path={tmp_path / 'nowhere'}") == ExitCode.MISMATCH
    left = json.loads((stage.output / "exit.json").read_text())
    assert (left["code"], left["status"]) == (7, "failed")
    assert left["reason"] == stage.message
    assert stage.run("max_updates=1") == ExitCode.DONE


def test_a_disk_too_small_changes_nothing(stopped: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept(stopped.output)
    with monkeypatch.context() as patch:
        patch.setattr("train.storage.space.free_bytes", lambda path: 1000)
        assert stopped.run("checkpoint.every_steps=3") == ExitCode.MISMATCH
    assert "the disk has 1 kB" in stopped.message
    assert kept(stopped.output) == before


def test_after_all_that_the_run_still_ends_as_it_should(stopped: Stage, straight: Path) -> None:
    assert all((stopped.output / name).exists() for name in BESIDE)
    assert stopped.run() == ExitCode.DONE, stopped.message
    assert result(stopped.output) == result(straight)
    assert [name for name in BESIDE if (stopped.output / name).exists()] == ["notes.tmp"]
