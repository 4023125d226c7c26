"""The weight of an image's loss: from its source to the index, the batch and the loss, and nothing of it where all weigh 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
import torch
from indexes import META, index_of, row, selection_of
from launches import launch
from losses import Says, batch
from oddimages import drawn, encoded
from preparedset import prepare, settings_of, write_vae
from stages import Stage, opened, result
from tilesets import make
from updates import gradients, one_update, relative

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig
from train.config.stage import LossConfig, NoiseConfig
from train.data.index import Index
from train.data.index_writer import build_index
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.prepare.tables.schemas import SELECT


def test_the_loss_is_multiplied_and_its_parts_keep_their_weights() -> None:
    # predicted 0, 2 and 3 where the noise is 1: squares 1, 1 and 4
    model = Says(torch.tensor([0.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2))
    diffusion = Diffusion(alphas_cumprod(), NoiseConfig(), LossConfig(), "fp32")
    assert image_losses(model, batch(None), diffusion).tolist() == [1.0, 1.0, 4.0]
    assert image_losses(model, batch([0.0, 2.5, 0.5]), diffusion).tolist() == [0.0, 2.5, 2.0]
    weighed = [part.weights_B for part in batch([0.0, 2.5, 0.5]).parts(2)]
    assert [part.tolist() for part in weighed if part is not None] == [[0.0], [2.5, 0.5]]
    assert all(part.weights_B is None for part in batch(None).parts(2))


def built(folder: Path, weights: list[float] | None) -> Path:
    """Three images, the second visited three times, the third not at all."""
    folder.mkdir()
    (folder / "dataset.json").write_text('{"schema_version": 1}')
    table = index_of([row(f"s:{n}", row=n) for n in range(3)])
    pq.write_table(table, folder / "index.parquet")
    chosen = selection_of(("s:0", 1, 128, 96), ("s:1", 3, 128, 96))
    pq.write_table(chosen, folder / "select_pretrain.parquet")
    if weights is not None:
        table = table.append_column("weight", pa.array(weights, pa.float32()))
    build_index(folder, table, {"pretrain": chosen}, META)
    return folder


def test_every_visit_has_the_weight_of_its_image(tmp_path: Path) -> None:
    index = Index.open(built(tmp_path / "a", [0.5, 2.0, 7.0]), "pretrain")
    assert index.weights is not None and index.weights.tolist() == [0.5, 2.0, 2.0, 2.0]
    later = index.select(np.array([False, True, True, False])).weights
    assert later is not None and later.tolist() == [2.0, 2.0]
    plain = Index.open(built(tmp_path / "b", None), "pretrain")
    assert plain.weights is None
    assert plain.fingerprint == Index.open(built(tmp_path / "c", [1.0, 1.0, 7.0]), "pretrain").fingerprint != index.fingerprint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_a_weight_that_would_spoil_an_update_is_refused(tmp_path: Path, bad: float) -> None:
    with pytest.raises(Halt, match="a weight is not a finite number of at least 0") as told:
        Index.open(built(tmp_path / "a", [1.0, bad, 1.0]), "pretrain")
    assert told.value.code == ExitCode.MISMATCH


def settings(folder: Path, **weights: Any) -> DatasetConfig:
    sources = [{"name": name, "adapter": "sidecar", "path": str(folder / name)} for name in ("a", "b")]
    text = {"sources": [source | ({"weight": weights[source["name"]]} if source["name"] in weights else {}) for source in sources],
            "select": {"pretrain": {"min_bucket": 1}}}  # fmt: skip
    (folder / "dataset.yaml").write_text(json.dumps(text))
    return settings_of(folder)


def test_from_the_source_to_the_batch_and_nothing_is_encoded_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vae(tmp_path / "vae")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(drawn(128, 128, seed=number + 10 * (name == "b")), "PNG"))
            (tmp_path / name / f"{number}.txt").write_text("1girl, solo")
    data = tmp_path / "data/set"
    prepare(settings(tmp_path))
    before = (data / "index.arrow").read_bytes()
    shards = {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.safetensors")}
    prepare(settings(tmp_path, a=1.0))
    assert (data / "index.arrow").read_bytes() == before
    capsys.readouterr()
    prepare(settings(tmp_path, b=0.25))
    assert "4 pictures of b weigh 0.25 in the loss" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (data / "latents").glob("*.safetensors")} == shards
    assert json.loads((data / "report.json").read_text())["counts"]["weights"] == {"b": 0.25}
    tiles = make(data)
    for step in range(tiles.plan.total_updates):
        found = tiles[step, 0]
        assert isinstance(found, Batch) and found.weights_B is not None
        keys = [tiles.index.key(row) for row in found.tile.rows.tolist()]
        assert found.weights_B.tolist() == [0.25 if key.startswith("b:") else 1.0 for key in keys]


def test_a_column_of_weights_multiplies_the_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_vae(tmp_path / "vae")
    (tmp_path / "a").mkdir()
    cells = ["0.5", "", "2", "-1", "many"]
    for number in range(len(cells)):
        (tmp_path / "a" / f"{number}.png").write_bytes(encoded(drawn(128, 128, seed=number), "PNG"))
    (tmp_path / "a.csv").write_text("file,text,how much\n" + "".join(f'{n}.png,"1girl, solo",{cell}\n' for n, cell in enumerate(cells)))
    source = {"name": "a", "adapter": "table", "path": str(tmp_path / "a.csv"), "images": str(tmp_path / "a"),
              "columns": {"uri": "file", "caption": "text", "id": "file"}}  # fmt: skip
    shown = {}
    for name, more in (("plain", {}), ("own", {"columns": {**source["columns"], "weight": "how much"}, "weight": 3.0})):
        text = {"sources": [source | more], "select": {"pretrain": {"min_bucket": 1}}, "max_quarantine_fraction": 0.9}
        (tmp_path / "dataset.yaml").write_text(json.dumps(text))
        capsys.readouterr()
        prepare(settings_of(tmp_path))
        index = Index.open(tmp_path / "data/set", "pretrain")
        shown[name] = None if index.weights is None else dict(zip(map(index.key, range(len(index))), index.weights.tolist(), strict=True))
    assert shown == {"plain": None, "own": {"a:0.png": 1.5, "a:1.png": 3.0, "a:2.png": 6.0}}
    assert "3 pictures of a weigh 1.5 to 6 in the loss" in capsys.readouterr().out
    refused = pq.read_table(tmp_path / "data/set/quarantine.parquet").to_pylist()
    assert {row["key"] for row in refused if "weight is" in row["message"]} == {f"a:{n}.png" for n in (3, 4)}
    assert json.loads((tmp_path / "data/set/report.json").read_text())["counts"]["weights"] == {"a": "1.5 to 6"}


def weighted(dataset: Path, folder: Path) -> Path:
    """The tests' set with a weight for every picture, some of them 0."""
    shutil.copytree(dataset, folder)
    index = pq.read_table(folder / "index.parquet")
    chosen = pq.read_table(folder / "select_pretrain.parquet").cast(SELECT)
    index = index.append_column("weight", pa.array([(n % 5) / 2 for n in range(len(index))], pa.float32()))
    synthetic.build_index(folder, index, {"pretrain": chosen}, {"vae_id": "", "content": "sample", "buckets": "t"})
    return folder


def test_an_updates_loss_is_the_sum_of_weighted_losses_over_all_its_images(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    data = weighted(dataset, tmp_path / "set")
    found = {}
    for name, folder in (("plain", dataset), ("weighted", data)):
        with opened(Stage(tmp_path / name, folder, base_model)) as session:
            tiles, index = session.data.plan.update(0), session.data.loader.dataset.index
            outcome = one_update(session)
            found[name] = outcome, gradients(session)
            if name == "weighted":
                assert index.weights is not None
                weights = [float(index.weights[row]) for tile in tiles for row in tile.rows]
    plain, ours = found["plain"][0], found["weighted"][0]
    expected = [weight * loss for weight, loss in zip(weights, plain.losses_G.tolist(), strict=True)]
    assert ours.losses_G.tolist() == pytest.approx(expected, rel=1e-6)
    assert ours.mean_loss == pytest.approx(sum(expected) / 8, rel=1e-6)  # of 8 images, not of the sum of weights
    assert relative(found["weighted"][1], found["plain"][1]) > 0.1


@pytest.mark.long
def test_weights_on_two_processes_and_after_a_kill(dataset: Path, base_model: Path, tmp_path: Path) -> None:
    data = weighted(dataset, tmp_path / "set")
    alone, both = (Stage(tmp_path / name, data, base_model) for name in ("alone", "both"))
    strict = "batch.determinism=strict"
    assert alone.run(strict) == ExitCode.DONE, alone.message
    assert launch(both, 2, strict, fault="control@6:1:kill") != [0, 0]
    assert launch(both, 2, strict) == [0, 0], both.message
    assert result(both.output) == result(alone.output)


@pytest.mark.parametrize("weight", [-1, "much"])
def test_a_source_cannot_weigh_less_than_nothing(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(Halt, match=r"sources\[0\]\.weight") as told:
        settings(tmp_path, a=weight)
    assert told.value.code == ExitCode.USAGE
