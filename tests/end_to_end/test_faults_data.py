"""The fault matrix where data, model or numbers are at fault: F16, F17, F20, F23, F26, F34 on real runs.

F18 and F19 stand in test_faults_end_to_end.py and test_feed.py, F21 and F22 in test_decode.py and
test_prepare_steps.py, F24 in test_prepare_steps.py, F31 in test_tracking_run.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from lab import UPDATES, Lab
from safetensors.torch import load_file, save_file
from stages import Stage, result, tree

from train.base.errors import ExitCode
from train.engine import session
from train.optim.loss_scale import LossScale
from train.testing.chaos import kills

SHARD = "latents/64x96-00000.safetensors"
Rows = list[dict[str, Any]]


# --- F16: the data changed -----------------------------------------------------------------------------


def edited(dataset: Path, folder: Path, change: Callable[[Rows], None]) -> Path:
    """A copy of the dataset with other rows, prepared anew as the last step would."""
    shutil.copytree(dataset, folder)
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    change(rows)
    rows.sort(key=lambda row: (row["key"], row["bucket_w"], row["bucket_h"]))
    index = pa.Table.from_pylist(rows, schema=synthetic._schema())
    names = ("key", "bucket_w", "bucket_h")
    chosen = [{name: row[name] for name in names} | {"repeats": 1, "why": "all"} for row in rows]
    selection = pa.Table.from_pylist(chosen, schema=synthetic.SELECT)
    pq.write_table(index, folder / "index.parquet")
    pq.write_table(selection, folder / "select_pretrain.parquet")
    meta = {"vae_id": "", "content": "sample", "buckets": "t"}
    for old in folder.glob("index*.arrow"):
        old.unlink()
    synthetic.build_index(folder, index, {"pretrain": selection}, meta)
    return folder


def rename(row: dict[str, Any], key: str) -> None:
    row["key"], row["uid"] = key, synthetic.rng.uid_of(key)  # content_hash stays: the same picture


def add(rows: Rows) -> None:
    for number in range(3):
        row = dict(rows[number], content_hash=f"new {number}")
        rename(row, f"test:new/{number}")
        rows.append(row)


def remove(rows: Rows) -> None:
    del rows[:2]


def edit_captions(rows: Rows) -> None:
    for row in rows[:4]:
        row["flex_tags"] = ["night", *row["flex_tags"]]


def rename_some(rows: Rows) -> None:
    for number in (0, 5, 9):
        rename(rows[number], f"test:elsewhere/{number}")


def replace_picture(rows: Rows) -> None:
    rows[7]["content_hash"] = "other bytes"


def all_of_them(rows: Rows) -> None:
    edit_captions(rows[10:14])
    replace_picture(rows)
    rename(rows[6], "test:elsewhere/6")
    del rows[:2]
    add(rows)


CHANGES = {
    "added": (add, "3 images added"),
    "removed": (remove, "2 images removed"),
    "edited": (edit_captions, "4 captions edited"),
    "renamed": (rename_some, "3 images renamed"),
    "replaced": (replace_picture, "1 images changed"),
    "all": (
        all_of_them,
        "3 images added, 2 images removed, 1 images renamed, 1 images changed, 4 captions edited",
    ),
}


def kept(folder: Path) -> dict[str, str]:
    """Every file but the notes of the last start."""
    return {name: digest for name, digest in tree(folder).items() if name not in ("exit.json", ".lock")}


@pytest.fixture(scope="module")
def stopped(dataset: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("f16"), dataset, base_model)
    assert stage.run(ANIX_FAULT="control@2:term") == ExitCode.STOPPED
    return stage


@pytest.mark.parametrize("kind", CHANGES)
def test_f16_changed_data_is_refused_with_counts_per_kind(
    kind: str, stopped: Stage, dataset: Path, tmp_path: Path
) -> None:
    change, counts = CHANGES[kind]
    before = kept(stopped.output)
    data = edited(dataset, tmp_path / "set", change)
    assert stopped.run(f"data.path={data}") == ExitCode.MISMATCH
    assert f"The dataset changed: {counts}\n" in stopped.message + "\n"
    assert "refuse    data.path (content)" in stopped.message
    assert kept(stopped.output) == before


def test_f16_a_moved_dataset_is_the_same_and_an_accepted_change_is_recorded(
    dataset: Path, base_model: Path, straight: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, dataset, base_model)
    assert stage.run(ANIX_FAULT="control@2:term") == ExitCode.STOPPED
    moved = shutil.copytree(dataset, tmp_path / "moved")
    assert stage.run(f"data.path={moved}", ANIX_FAULT="control@5:term") == ExitCode.STOPPED, stage.message
    shutil.copytree(stage.output, tmp_path / "kept")
    assert stage.run(f"data.path={moved}") == ExitCode.DONE
    assert result(stage.output) == result(straight)
    data = edited(dataset, tmp_path / "set", edit_captions)
    other = f"output_dir={tmp_path / 'kept'}"
    assert stage.run(f"data.path={data}", other, "resume.accept=[data]") == ExitCode.DONE, stage.message
    state = json.loads((max((tmp_path / "kept/checkpoints").glob("step-*")) / "state.json").read_text())
    assert any("data.path" in line for line in state["accepted"])


# --- F23: latents damaged after they were prepared -----------------------------------------------------


def wrong_shape(data: Path) -> None:
    rewrite(data, lambda latents: torch.zeros(len(latents), 4, 8, 8, dtype=latents.dtype))


def not_a_number(data: Path) -> None:
    def spoil(latents: torch.Tensor) -> torch.Tensor:
        latents[5, 0, 3, 3] = float("nan")
        return latents

    rewrite(data, spoil)


def other_vae(data: Path) -> None:
    state = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(state | {"latents": {"vae_id": "a" * 64}}))


def truncated(data: Path) -> None:
    shard = data / SHARD
    shard.write_bytes(shard.read_bytes()[:-64])


def rewrite(data: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    latents = load_file(data / SHARD)["latents"]
    synthetic.write_shard(data / SHARD, change(latents), {"vae_id": "test"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (wrong_shape, ("64x96", "[8, 8]")),
        (not_a_number, (SHARD, "row 5", "not finite")),
        (other_vae, ("was made by VAE test", "aaaa")),
        (truncated, (SHARD, "damaged")),
    ],
)
def test_f23_damaged_latents_end_the_run_named_and_never_become_zeros(
    damage: Callable[[Path], None], words: tuple[str, ...], dataset: Path, base_model: Path, straight: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(dataset, tmp_path / "set")
    whole = (data / SHARD).read_bytes(), (data / "dataset.json").read_bytes()
    damage(data)
    stage = Stage(tmp_path, data, base_model)
    assert stage.run() == ExitCode.MISMATCH
    for word in words:
        assert word in stage.message.replace("(8, 8)", "[8, 8]"), stage.message
    done = len(synthetic.metrics(stage.output))
    left = json.loads((stage.output / "exit.json").read_text())
    assert (left["code"], left["update"]) == (7, done)
    assert kills.steps_of(stage.output) == ([done] if done else [])  # what was completed is saved
    (data / SHARD).write_bytes(whole[0])
    (data / "dataset.json").write_bytes(whole[1])
    assert stage.run() == ExitCode.DONE, stage.message
    assert result(stage.output) == result(straight)


# --- F34: the base model is bad ------------------------------------------------------------------------


def in_unet(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        file = model / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return make


def missing_and_misshapen(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["conv_in.bias"], tensors["conv_out.bias"]
    tensors["conv_in.weight"] = torch.zeros(3, 3)
    tensors["surplus"] = torch.zeros(1)


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.bias"][0] = float("nan")
    tensors["conv_out.bias"][0] = float("inf")


def pickled(model: Path) -> None:
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({"conv_in.bias": torch.zeros(2)}, file.with_suffix(".bin"))


BASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing, foreign and misshapen tensors, all in one message": (
        in_unet(missing_and_misshapen),
        (
            "2 tensors are missing: unet.conv_in.bias, unet.conv_out.bias",
            "1 tensors are foreign: surplus",
            "conv_in.weight is [3, 3], not",
        ),
    ),
    "weights that are not finite": (in_unet(not_finite), ("unet.conv_in.bias", "unet.conv_out.bias")),
    "pickle": (pickled, ("diffusion_pytorch_model.bin is a pickle",)),
    "missing network": (lambda model: shutil.rmtree(model / "text_encoder_2"), ("text_encoder_2",)),
    "wrong sha256": (lambda model: None, ("init_sha256", "b" * 64)),
}


@pytest.mark.parametrize("kind", BASES)
def test_f34_a_bad_base_model_is_refused_with_the_whole_list(
    kind: str, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    spoil, words = BASES[kind]
    model = shutil.copytree(base_model, tmp_path / "model")
    spoil(model)
    before = tree(model)
    stage = Stage(tmp_path, dataset, model)
    pin = ("model.init_sha256=" + "b" * 64,) if kind == "wrong sha256" else ()
    assert stage.run(*pin) == ExitCode.MISMATCH
    for word in words:
        assert word in stage.message, stage.message
    assert set(tree(stage.output)) == {".lock", "run.json", "exit.json"}  # no config, no metrics, no checkpoint
    assert tree(model) == before


# --- on several processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("determinism", ["strict", "fast"])
def test_f17_other_numbers_of_processes_between_restarts(lab: Lab, determinism: str) -> None:
    name, mode = f"f17-{determinism}", f"batch.determinism={determinism}"
    for world, stop in ((1, 1), (2, 4), (1, 6), (4, 8), (2, None)):
        fault = f"control@{stop}:0:term" if stop is not None else ""
        assert lab.run(name, mode, world=world, fault=fault) == [85 if fault else 0] * world, lab.last.text()
    folder = lab.folder / name
    history = json.loads((max((folder / "checkpoints").glob("step-*")) / "state.json").read_text())["history"]
    assert history == [[0, 1], [2, 2], [5, 1], [7, 4], [9, 2]]
    if determinism == "strict":
        assert kills.compare_runs(lab.reference, folder) == []
        return
    assert (folder / "trace.txt").read_text() == (lab.reference / "trace.txt").read_text()  # the same slots
    newest = f"checkpoints/step-{UPDATES:08d}/model.safetensors"
    ours, theirs = load_file(folder / newest), load_file(lab.reference / newest)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 1e-5
    for one, other in zip(kills.metrics(folder), kills.metrics(lab.reference), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_f20_without_shared_memory_there_are_fewer_workers_and_the_same_result(lab: Lab) -> None:
    assert lab.run("f20", "data.workers=2", world=2, fault="worker@*:raise=OSError") == [0, 0]
    assert "lack shared memory" in lab.last.text(0)
    assert "no workers from here on" in lab.last.text(1)
    assert kills.compare_runs(lab.reference, lab.folder / "f20") == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_f26_fp16_overflow_is_skipped_by_all_and_twenty_in_a_row_end_the_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children inherit the first scale: 2^40 overflows everywhere; 2^33 comes down to what fits, then trains."""
    first = {"scale": 2.0**40}
    real = session.loss_scale
    monkeypatch.setattr(session, "loss_scale", lambda kind, state: real(kind, state) if state else LossScale(**first))
    more = ("precision=fp16", "max_updates=30", "epochs=5")
    assert lab.run("f26", *more, world=2) == [4, 4], lab.last.text()
    lines = kills.metrics(lab.folder / "f26")
    assert [line["loss_scale"] for line in lines] == [2.0 ** (39 - n) for n in range(19)]  # the 20th is the end
    assert [(line["update"], line["skipped"]) for line in lines] == [(0, n) for n in range(1, 20)]
    assert len({line["lr_unet"] for line in lines}) == 1
    assert "update 19: the gradient" in lab.exit("f26")["reason"]
    state = json.loads((lab.folder / "f26/checkpoints/step-00000020/state.json").read_text())
    assert (state["updates"], state["skipped"], state["scaler"]["scale"]) == (0, 20, 2.0**20)
    assert lab.exit("f26")["code"] == lab.exit("f26", 1)["code"] == 4

    first["scale"] = 2.0**33
    assert lab.run("f26b", *more, world=2) == [0, 0], lab.last.text()
    lines = kills.metrics(lab.folder / "f26b")
    skips = lines[-1]["skipped"]
    assert 5 < skips < 20
    assert [line["skipped"] for line in lines] == [min(n, skips) for n in range(1, 31)]
    assert [line["update"] for line in lines] == [max(0, n - skips) for n in range(1, 31)]
    assert {line["loss_scale"] for line in lines[skips - 1 :]} == {2.0 ** (33 - skips)}
    rates = [line["lr_unet"] for line in lines]
    assert len(set(rates[: skips + 1])) == 1  # update 0's, until one was applied
    assert rates[skips + 1] != rates[skips]
