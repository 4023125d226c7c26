"""The end of a stage, and what a resume compares by content: paths may move, what they hold may not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lab import UPDATES, Lab
from safetensors.torch import load_file, save_file

from train.base.errors import ExitCode
from train.base.files import file_sha256
from train.config.stage import ModelConfig
from train.model import source
from train.storage import resume
from train.testing.chaos import kills


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def half(lab: Lab, name: str, *overrides: str) -> None:
    assert lab.run(name, *overrides, fault="forward@5:exit=1") == [1], lab.last.text()


def spoil(file: Path, prefix: str) -> None:
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.startswith(prefix))
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})


# --- the end -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_stage_ends_with_a_checkpoint_of_its_own_last_step(lab: Lab) -> None:
    for name, settings, fault in (
        ("odd", ("checkpoint.every_steps=3",), ""),
        ("busy", ("checkpoint.every_steps=3",), "save.write@9:sleep=1"),
        ("missed", ("checkpoint.every_steps=3",), "save.write@9:enospc"),
    ):
        assert lab.run(name, *settings, fault=fault) == [0], lab.last.text()
        assert max(kills.steps_of(lab.folder / name)) == UPDATES
        assert kills.compare_runs(lab.reference, lab.folder / name) == []
        assert json.loads((lab.folder / name / "DONE").read_text())["step"] == UPDATES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_of_a_later_step_does_not_spoil_a_shorter_run(lab: Lab) -> None:
    assert lab.run("shorter", fault="forward@9:exit=1") == [1]
    folder = lab.folder / "shorter" / "checkpoints"
    assert max(kills.steps_of(lab.folder / "shorter")) == 8
    (folder / "step-00000008" / "manifest.json").write_text("")
    assert lab.run("shorter", "max_updates=6") == [0], lab.last.text()
    assert (folder / "step-00000008").is_dir(), "what is damaged is left for its owner to look at"
    model = source.resolve(ModelConfig(init_from=str(lab.folder / "shorter")))
    assert model.sha256 == json.loads((lab.folder / "shorter" / "lineage.json").read_text())["weights_sha256"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_was_accepted_stands_in_the_lineage_however_often_the_run_was_resumed(lab: Lab) -> None:
    half(lab, "accepted")
    accepting = ("optimizer.unet_lr=2e-3", "resume.accept=[optimizer.unet_lr]")
    assert lab.run("accepted", *accepting, fault="forward@9:exit=1") == [1]
    assert lab.run("accepted", "optimizer.unet_lr=2e-3") == [0], lab.last.text()  # nothing left to accept
    record = json.loads((lab.folder / "accepted" / "lineage.json").read_text())
    assert record["accepted"] == ["step 4: optimizer.unet_lr: checkpoint 0.001, now 0.002"]
    newest = max((lab.folder / "accepted" / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["accepted"] == record["accepted"]
    assert "accepted" not in json.loads((lab.reference / "lineage.json").read_text())


# --- what paths hold -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_model_vae_and_data_may_move(lab: Lab) -> None:
    for kind in ("model", "data"):
        shutil.copytree(lab.folder / kind, lab.folder / f"{kind}2")
    shutil.copytree(lab.folder / "model" / "vae", lab.folder / "vae2")
    half(lab, "moved", f"model.vae={lab.folder / 'model' / 'vae'}")
    moved = (
        f"model.vae={lab.folder / 'vae2'}", f"model.init_from={lab.folder / 'model2'}", f"data.path={lab.folder / 'data2'}",
    )  # fmt: skip
    assert lab.run("moved", *moved) == [0], lab.last.text()
    assert kills.compare_runs(lab.reference, lab.folder / "moved") == []
    half(lab, "named")
    pin = f"model.vae_sha256={file_sha256(lab.folder / 'vae2' / 'diffusion_pytorch_model.safetensors')}"
    lab.must_equal_reference("named", 1, f"model.vae={lab.folder / 'vae2'}", pin)  # the model's own, under a name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("key", "folder", "file", "prefix"),
    [
        ("model.vae", "vae", "diffusion_pytorch_model.safetensors", "decoder"),
        ("model.vae", "vae", "config.json", ""),
        ("model.init_from", "model", "unet/diffusion_pytorch_model.safetensors", ""),
        ("model.init_from", "model", "vae/diffusion_pytorch_model.safetensors", "encoder"),
    ],
)
def test_other_content_under_the_same_path_is_another_run(
    key: str, folder: str, file: str, prefix: str, lab: Lab, request: pytest.FixtureRequest
) -> None:
    name = f"same-path-{request.node.callspec.indices['key']}"
    copy = lab.folder / f"{name}-{folder}"
    shutil.copytree(lab.folder / "model" / ("vae" if folder == "vae" else ""), copy)
    half(lab, name, f"{key}={copy}")
    if prefix or file.startswith("unet"):
        spoil(copy / file, prefix)
    else:
        settings: dict[str, Any] = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(settings | {"scaling_factor": 0.2}))
    assert lab.run(name, f"{key}={copy}") == [ExitCode.MISMATCH], lab.last.text()
    assert "(content)" in lab.exit(name)["reason"] or "another VAE" in lab.exit(name)["reason"]


def test_the_parent_has_two_names() -> None:
    def now(model: str, accept: tuple[str, ...] = ()) -> resume.Expectations:
        return resume.Expectations(
            "s", {"model.init_from": "m"}, {"model.init_from": model}, {"parent": model}, accept=accept
        )

    saved = now("a").to_state()
    assert len(resume.compare(saved, now("b")).refused) == 2
    for name in ("parent", "model.init_from", "model"):
        assert resume.compare(saved, now("b", (name,))).refused == (), name
