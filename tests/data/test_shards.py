"""Packed shards: what goes in comes out, and whatever is damaged is refused by name, never read as zeros."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from train.base.errors import ExitCode, Halt
from train.data.shards import ShardReader, read_meta, write_shard

NAME = "latents/64x48-00000.safetensors"


def written(folder: Path, dtype: torch.dtype = torch.float16, images: int = 5) -> torch.Tensor:
    (folder / "latents").mkdir(exist_ok=True)
    latents = torch.randn(images, 4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_shard(folder / NAME, latents, {"vae_id": "v"})
    return latents


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = written(tmp_path, dtype)
    read = ShardReader(tmp_path).read([NAME, NAME, NAME], [4, 0, 4])
    assert read.dtype == torch.float32
    assert torch.equal(read, latents[[4, 0, 4]].float())
    with safe_open(tmp_path / NAME, framework="pt") as file:  # the library agrees on what the file is
        assert torch.equal(file.get_tensor("latents"), latents)
    assert read_meta(tmp_path / NAME) == {"vae_id": "v"}


def test_same_latents_same_bytes(tmp_path: Path) -> None:
    written(tmp_path)
    before = (tmp_path / NAME).read_bytes()
    written(tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    assert [path.name for path in (tmp_path / "latents").iterdir()] == [Path(NAME).name]


def test_reader_travels_to_workers(tmp_path: Path) -> None:
    latents = written(tmp_path)
    reader = ShardReader(tmp_path)
    reader.read([NAME], [0])
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(again.read([NAME], [2]), latents[2:3].float())


@pytest.mark.parametrize("size", [0, 4, 8, 60, 200, 1000, -1, -200])
def test_cut_off(tmp_path: Path, size: int) -> None:
    written(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:size])
    with pytest.raises(Halt, match="missing or damaged") as halt:
        ShardReader(tmp_path).read([NAME], [0])
    assert halt.value.code == ExitCode.MISMATCH
    assert NAME in halt.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_named(tmp_path: Path, value: float) -> None:
    latents = written(tmp_path)
    latents[3, 2, 1, 1] = value
    write_shard(tmp_path / NAME, latents, {})
    reader = ShardReader(tmp_path)
    assert reader.read([NAME], [2]).isfinite().all()
    with pytest.raises(Halt, match="row 3 is not finite"):
        reader.read([NAME, NAME], [2, 3])


def test_missing_row_shard_and_mixed_shapes(tmp_path: Path) -> None:
    written(tmp_path)
    write_shard(tmp_path / "latents/other.safetensors", torch.zeros(1, 4, 8, 8, dtype=torch.float16), {})
    reader = ShardReader(tmp_path)
    with pytest.raises(Halt, match="has 5 rows, row 5"):
        reader.read([NAME], [5])
    with pytest.raises(Halt, match="missing or damaged"):
        reader.read(["latents/none.safetensors"], [0])
    with pytest.raises(Halt, match="different shapes"):
        reader.read([NAME, "latents/other.safetensors"], [0, 0])
    with pytest.raises(Halt, match="outside"):
        reader.read(["../secret.safetensors"], [0])


def test_many_shards_stay_open(tmp_path: Path) -> None:
    """A card-sized set has 870 shards and a process may open 1,024 files: maps must not hold descriptors."""
    latents = written(tmp_path)
    reader = ShardReader(tmp_path)
    for number in range(1100):
        name = f"latents/link-{number:05d}.safetensors"
        os.link(tmp_path / NAME, tmp_path / name)
        assert torch.equal(reader.read([name], [1]), latents[1:2].float())
    held = len(list(Path("/proc/self/fd").iterdir()))
    assert held < 200, f"{held} descriptors are open"


def test_other_vae_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "dataset.json").write_text('{"latents": {"vae_id": "another"}}')
    with pytest.raises(Halt, match="made by VAE v, the dataset is of another"):
        ShardReader(tmp_path).read([NAME], [0])


@pytest.mark.parametrize("change", ["cut", "emptied", "deleted", "longer"])
def test_a_shard_that_changes_under_its_map_is_refused_not_read(tmp_path: Path, change: str) -> None:
    shard = tmp_path / "a.safetensors"
    write_shard(shard, torch.ones(512, 4, 16, 16, dtype=torch.float16), {"vae_id": ""})
    reader = ShardReader(tmp_path)
    reader.read(["a.safetensors"], [0])
    if change == "deleted":
        shard.unlink()
    else:
        os.truncate(shard, {"cut": 5000, "emptied": 0, "longer": shard.stat().st_size + 8}[change])
    with pytest.raises(Halt, match=r"a\.safetensors") as caught:
        reader.read(["a.safetensors"], [500])
    assert caught.value.code == ExitCode.MISMATCH
