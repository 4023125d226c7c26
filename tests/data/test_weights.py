"""The weight of an image's loss: from its source to the index, the batch and the loss, and nothing of it where all weigh 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from indexes import META, index_of, row, selection_of
from oddimages import drawn, encoded
from preparedset import prepare, settings_of, write_vae
from tilesets import make

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig
from train.config.stage import LossConfig, NoiseConfig
from train.data.index import Index
from train.data.index_writer import build_index
from train.diffusion.noise import alphas_cumprod
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.recipe.order import Tile


class _Says(torch.nn.Module):
    """A model that predicts what it is told to."""

    def __init__(self, prediction_BCHW: torch.Tensor) -> None:
        super().__init__()
        self.prediction_BCHW = prediction_BCHW

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        return self.prediction_BCHW


def batch(weights: list[float] | None) -> Batch:
    rows = np.arange(3)
    return Batch(
        latents_BCHW=torch.zeros(3, 4, 2, 2), noise_BCHW=torch.ones(3, 4, 2, 2), input_noise_BCHW=None,
        timesteps_B=torch.tensor([1, 500, 999]), ids_1_BN77=torch.zeros(3, 1, 77), ids_2_BN77=torch.zeros(3, 1, 77),
        size_B6=torch.zeros(3, 6), slots_B=torch.arange(3), step=0, tile=Tile(16, 16, 0, rows, rows.astype(np.uint64), rows),
        tags_dropped=0, weights_B=None if weights is None else torch.tensor(weights),
    )  # fmt: skip


def test_the_loss_is_multiplied_and_its_parts_keep_their_weights() -> None:
    # predicted 0, 2 and 3 where the noise is 1: squares 1, 1 and 4
    model = _Says(torch.tensor([0.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 2, 2))
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


@pytest.mark.parametrize("weight", [-1, "much"])
def test_a_source_cannot_weigh_less_than_nothing(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(Halt, match=r"sources\[0\]\.weight") as told:
        settings(tmp_path, a=weight)
    assert told.value.code == ExitCode.USAGE
