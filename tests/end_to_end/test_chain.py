"""Three stages in a row: what is handed on, what the files are to others, and a predecessor that changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import Stage, opened, result, sha256, state, weights

from train.base.errors import ExitCode


@dataclass(frozen=True)
class Chain:
    """The run directories of the three stages."""

    pretrain: Path
    ft1: Path
    ft2: Path


@pytest.fixture(scope="module")
def chain(straight: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """pretrain -> ft1 -> ft2, the finetunes of 3 updates each."""
    folder = tmp_path_factory.mktemp("chain")
    parent = straight
    for name in ("ft1", "ft2"):
        stage = Stage(folder, dataset, parent, name)
        seed = {"ft1": 32, "ft2": 33}[name]
        assert stage.run("epochs=1", f"seed={seed}") == ExitCode.DONE, stage.message
        parent = stage.output
    return Chain(straight, folder / "runs" / "ft1", folder / "runs" / "ft2")


def lineage(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "lineage.json").read_text()))


def test_lineage_names_every_ancestor_by_hash(chain: Chain) -> None:
    last = lineage(chain.ft2)
    assert last["stage"] == "ft2"
    assert last["parent"]["stage"] == "ft1"  # type: ignore[index]
    parent = max((chain.ft1 / "checkpoints").glob("step-????????")) / "model.safetensors"
    assert last["parent"]["sha256"] == sha256(parent) == lineage(chain.ft1)["weights_sha256"]  # type: ignore[index]
    assert [record["stage"] for record in last["ancestors"]] == ["pretrain", "ft1"]  # type: ignore[attr-defined]
    assert lineage(chain.pretrain)["parent"]["stage"] is None  # type: ignore[index]
    assert (last["license"], last["seed"], last["updates"], last["images"]) == ("Apache-2.0", 33, 3, 24)
    assert json.loads((chain.ft2 / "model" / "lineage.json").read_text()).items() <= last.items()


def test_a_stage_takes_the_weights_in_fp32_and_nothing_else(chain: Chain, dataset: Path, tmp_path: Path) -> None:
    with opened(Stage(tmp_path, dataset, chain.pretrain, "ft1"), "epochs=1") as session:
        parent = weights(chain.pretrain)
        assert set(session.trained.parameters) == {name for name in parent if name.startswith("unet.")}
        assert all(torch.equal(p, parent[name]) for name, p in session.trained.parameters.items())
        assert any(not torch.equal(parent[n], parent[n].half().float()) for n in parent), "fp32, not the export"
        for network in ("text_encoder", "text_encoder_2"):
            module = getattr(session.trained.gradients.model, network)
            for name, p in module.named_parameters():
                full = f"{network}.{name}"
                key = full if full in parent else full.replace(f"{network}.", f"{network}.text_model.", 1)
                if key in parent:
                    assert torch.equal(p, parent[key])
        assert not session.trained.optimizer.state
        assert (session.run.progress.step, session.run.progress.updates) == (0, 0)
    assert (state(chain.ft1)["step"], state(chain.ft1)["updates"]) == (3, 3)


def test_finetunes_train_the_unet_alone(chain: Chain) -> None:
    for network in ("text_encoder", "text_encoder_2", "vae"):
        file = "diffusion_pytorch_model" if network == "vae" else "model"
        name = f"model/{network}/{file}.safetensors"
        before, after = load_file(chain.pretrain / name), load_file(chain.ft2 / name)
        assert all(torch.equal(before[key], after[key]) for key in before), network
    assert {name.partition(".")[0] for name in weights(chain.ft2)} == {"unet"}
    first, last = weights(chain.pretrain), weights(chain.ft2)
    moved = [name for name in last if not torch.equal(first[name], last[name])]
    assert len(moved) > 0.9 * len(last)
    kinds = {name.rpartition("/")[2] for name in weights(chain.ft2, "optimizer")}
    assert "exp_avg_sq_row" in kinds


def test_pretraining_moves_both_encoders_and_exports_them(chain: Chain, base_model: Path) -> None:
    for network in ("text_encoder", "text_encoder_2"):
        before = load_file(base_model / network / "model.safetensors")
        after = load_file(chain.pretrain / "model" / network / "model.safetensors")
        trained = {name: t for name, t in weights(chain.pretrain).items() if name.startswith(f"{network}.")}
        assert trained
        for name, tensor in trained.items():
            key = name.partition(".")[2]
            assert torch.equal(after[key], tensor.half())
            old = before[key if key in before else key.removeprefix("text_model.")]
            assert not torch.equal(old, tensor), name


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers, numpy 2
def test_stock_diffusers_opens_the_folder_and_the_single_file(chain: Chain) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = StableDiffusionXLPipeline.from_pretrained(chain.ft2 / "model", dtype=torch.float32)
    single = StableDiffusionXLPipeline.from_single_file(
        str(chain.ft2 / "ft2.safetensors"), config=str(chain.ft2 / "model"), local_files_only=True,
        dtype=torch.float32,
    )  # fmt: skip
    pictures = []
    for pipeline in (folder, single):
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline("1girl, miku", num_inference_steps=1, width=64, height=64, output_type="np",
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
        pictures.append(made.images[0])
    assert pictures[0].shape == (64, 64, 3)
    assert (pictures[0] == pictures[1]).all()


def test_an_unfinished_predecessor_is_refused(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    first = Stage(tmp_path, dataset, base_model)
    assert first.run(ANIX_FAULT="control@0:term") == ExitCode.STOPPED
    second = Stage(tmp_path, dataset, first.output, "ft1")
    assert second.run() == ExitCode.MISMATCH
    assert "DONE" in second.message


@pytest.mark.parametrize("change", ["flip", "retrained", "lineage lost", "checkpoint lost"])
def test_a_predecessor_that_changed_is_refused(change: str, chain: Chain, dataset: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(chain.pretrain, parent)
    newest = max((parent / "checkpoints").glob("step-????????"))
    if change == "flip":
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[-3] ^= 4
        (newest / "model.safetensors").write_bytes(data)
    elif change == "retrained":  # a sound checkpoint, not the one the stage ended with
        shutil.rmtree(newest)
    elif change == "lineage lost":
        (parent / "lineage.json").unlink()
    else:
        shutil.rmtree(parent / "checkpoints")
    stage = Stage(tmp_path, dataset, parent, "ft1")
    assert stage.run("epochs=1") == ExitCode.MISMATCH
    assert str(parent) in stage.message
    assert not (stage.output / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_predecessor_that_changed_under_a_started_run_is_refused(
    chain: Chain, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, chain.pretrain, "ft1")
    assert stage.run("epochs=1", ANIX_FAULT="control@0:term") == ExitCode.STOPPED
    other = Stage(tmp_path / "other", dataset, base_model)
    assert other.run("max_updates=1", "seed=7") == ExitCode.DONE
    assert stage.run("epochs=1", f"model.init_from={other.output}") == ExitCode.MISMATCH
    assert "model.init_from" in stage.message
    moved = tmp_path / "moved"  # another place, the same bytes: the same run
    shutil.copytree(chain.pretrain, moved)
    assert stage.run("epochs=1", "seed=31", f"model.init_from={moved}") == ExitCode.DONE, stage.message


@pytest.mark.slow
def test_an_export_that_was_interrupted_is_made_again(
    straight: Path, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    with pytest.raises(RuntimeError):
        stage.run(ANIX_FAULT="export@*")
    assert not (stage.output / "DONE").exists()
    assert stage.run() == ExitCode.DONE
    assert result(stage.output) == result(straight)
    same = ("model/unet/diffusion_pytorch_model.safetensors", "model/model_index.json")
    assert [sha256(stage.output / name) for name in same] == [sha256(straight / name) for name in same]
