"""A finished stage started again: the same settings, other ones, more updates; and what its children say of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from stages import Stage, result, state, tree

from train.base.errors import ExitCode, Halt
from train.config.stage import load_stage
from train.model.folder import new_folder
from train.tools import stages
from train.tools.estimate import page

TRY_OUT = ("max_updates=5",)


@pytest.fixture(scope="module")
def try_out(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A stage finished after 5 of its 9 updates."""
    stage = Stage(tmp_path_factory.mktemp("try_out"), dataset, base_model)
    assert stage.run(*TRY_OUT) == ExitCode.DONE, stage.message
    return stage


def copied(stage: Stage, folder: Path, dataset: Path, model: Path) -> Stage:
    """The same run under another output_dir, to be changed."""
    shutil.copytree(stage.output, folder / "runs" / "pretrain")
    return Stage(folder, dataset, model)


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ((), 0, ""), (("data.workers=1", "checkpoint.every_steps=2"), 0, "data.workers"), (("export.dtype=fp32",), 0, "export.dtype"),
        (("optimizer.unet_lr=2e-3",), 7, "optimizer.unet_lr"), (("noise.offset=0.1", "seed=5"), 7, "seed"),
        (("model.attention=math",), 7, "model.attention"), (("max_updates=4",), 7, "max_updates"),
        (("resume.accept=[noise.offset]", "noise.offset=0.1"), 0, ""), (("resume.accept=[nose]",), 2, "nose"),
    ],
)  # fmt: skip
def test_other_settings_are_named(
    changes: tuple[str, ...], code: int, told: str, try_out: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(try_out.output)
    assert try_out.run(*TRY_OUT, *changes) == code
    said = try_out.message + capsys.readouterr().err
    assert told in said
    assert ("already done" in said) is (code == 0)
    assert tree(try_out.output) == before


def test_a_try_out_becomes_the_run(
    try_out: Stage, straight: Path, dataset: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = copied(try_out, tmp_path, dataset, base_model)
    early = json.loads((stage.output / "lineage.json").read_text())
    assert stage.run() == ExitCode.DONE, stage.message
    assert "goes on to 9" in capsys.readouterr().err
    assert result(stage.output) == result(straight)
    done = json.loads((stage.output / "DONE").read_text())
    assert (done["step"], done["updates"]) == (9, 9)
    late = json.loads((stage.output / "lineage.json").read_text())
    assert late["extended"] == ["finished after update 5, then max_updates: checkpoint 5, now null"]
    assert "extended" not in early
    assert late["weights_sha256"] != early["weights_sha256"]
    assert (stage.output / "checkpoints" / "step-00000005").is_dir(), "the end of the try-out is kept"
    assert stage.run() == ExitCode.DONE  # and now it is done
    assert stage.run(*TRY_OUT) == ExitCode.MISMATCH  # it cannot become shorter


def test_a_longer_run_that_is_stopped_goes_on_and_is_until_then_what_it_was(
    try_out: Stage, straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = copied(try_out, tmp_path, dataset, base_model)
    before = {name: (stage.output / name).read_bytes() for name in ("DONE", "lineage.json", "pretrain.safetensors")}
    model = tree(stage.output / "model")
    assert stage.run("max_updates=7", ANIX_FAULT="control@5:term") == ExitCode.STOPPED
    assert {name: (stage.output / name).read_bytes() for name in before} == before
    assert tree(stage.output / "model") == model
    child = Stage(tmp_path / "child", dataset, stage.output, "ft1")
    assert child.run("max_updates=1") == ExitCode.DONE, child.message  # the finished weights are whole
    with pytest.raises(KeyError):
        stage.run("max_updates=7", ANIX_FAULT="export@*:raise=KeyError")
    assert {name: (stage.output / name).read_bytes() for name in before} == before
    assert stage.run("max_updates=null") == ExitCode.DONE, stage.message
    assert result(stage.output) == result(straight)
    # its parent is another one now
    assert child.run("max_updates=1") == ExitCode.MISMATCH
    assert "parent" in child.message
    assert child.run("max_updates=2") == ExitCode.MISMATCH
    assert "parent" in child.message


def test_a_longer_run_with_another_past_is_refused(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    cosine = ("schedule.name=cosine", "schedule.decay=1")
    assert stage.run("max_updates=2", *cosine) == ExitCode.DONE, stage.message
    before = tree(stage.output)
    assert stage.run("max_updates=4", *cosine) == ExitCode.MISMATCH
    assert "now 4 (schedule.name would have been another up to here)" in stage.message
    assert tree(stage.output) == before
    assert stage.run("max_updates=4", "resume.accept=[max_updates]", *cosine) == ExitCode.DONE, stage.message
    assert "finished after update 2, then max_updates" in (stage.output / "lineage.json").read_text()


def test_without_its_last_checkpoint_a_stage_is_done_and_cannot_go_on(
    try_out: Stage, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = copied(try_out, tmp_path, dataset, base_model)
    shutil.rmtree(stage.output / "checkpoints")
    assert stage.run(*TRY_OUT) == ExitCode.DONE  # compared with config.yaml
    assert stage.run(*TRY_OUT, "seed=8") == ExitCode.MISMATCH
    assert stage.run() == ExitCode.MISMATCH
    assert "checkpoint of that update is gone" in stage.message
    (stage.output / "config.yaml").unlink()
    assert stage.run(*TRY_OUT, "seed=8") == ExitCode.DONE  # nothing says otherwise


def test_moved_or_missing_data_is_no_other_setting_and_changed_data_is(
    try_out: Stage, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    import synthetic

    moved, model = tmp_path / "moved", tmp_path / "model"
    shutil.copytree(dataset, moved)
    shutil.copytree(base_model, model)
    assert try_out.run(*TRY_OUT, f"data.path={moved}", f"model.init_from={model}") == ExitCode.DONE, try_out.message
    other = synthetic.make_dataset(tmp_path / "other", (12, 8, 8), buckets=((64, 64), (64, 96), (96, 64)))
    assert try_out.run(*TRY_OUT, f"data.path={other}") == ExitCode.MISMATCH
    assert "dataset" in try_out.message
    shutil.rmtree(moved)
    stage = Stage(tmp_path / "gone", dataset, base_model)
    shutil.copytree(dataset, moved)
    assert stage.run("max_updates=1", f"data.path={moved}") == ExitCode.DONE, stage.message
    shutil.rmtree(moved)
    assert stage.run("max_updates=1", f"data.path={moved}") == ExitCode.DONE  # what was made of it stands
    assert stage.run("max_updates=2", f"data.path={moved}") == ExitCode.MISMATCH  # and cannot go on without it
    assert "data.path" in stage.message


def test_recipe_and_plan_agree(try_out: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    small = try_out.arguments(*TRY_OUT)[2:]
    assert stages.run_stages([try_out.yaml], small, None, 1) == 0
    assert "already done" in capsys.readouterr().err
    with pytest.raises(Halt, match=r"seed.*\n(.*\n)*.*were not started") as halted:
        stages.run_stages([try_out.yaml], [*small, "seed=9"], None, 1)
    assert halted.value.code == ExitCode.MISMATCH
    for more, wanted in (((), (True, False)), (("max_updates=null",), (True, True)), (("seed=9",), (False, False))):
        found = page.finished_before(load_stage([try_out.yaml], [*small, *more]))
        assert found is not None
        assert (found["allowed"], found["goes_on"]) == wanted
    assert page.finished_before(load_stage([try_out.yaml], [*small, "output_dir=elsewhere"])) is None


def test_the_states_of_a_stage_tell_what_went_before(try_out: Stage) -> None:
    assert state(try_out.output)["extended"] == []
    assert "max_updates" in state(try_out.output)["set"], "it is not at its default"
    assert "noise.offset" not in state(try_out.output)["set"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_renewed_folder_takes_the_place_of_the_earlier_one_which_is_whole_until_then(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:  # a system, or a file system, that cannot exchange two names
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    out = tmp_path / "model"
    for text in ("first", "second"):
        with new_folder(out, renew=True) as new:
            (new / text).write_text(text)
            assert [path.name for path in out.glob("*")] == (["first"] if text == "second" else [])
        assert [path.name for path in out.iterdir()] == [text]
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyError), new_folder(out, renew=True):
        raise KeyError
    assert [path.name for path in out.iterdir()] == ["second"]
