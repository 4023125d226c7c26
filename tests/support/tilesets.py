"""A TileDataset over a prepared set, as a stage opens it."""

from __future__ import annotations

from pathlib import Path

from cliptokens import small_tokenizer

from train.config.stage import DataConfig, NoiseConfig
from train.data.dataset import TileDataset
from train.data.index import Index
from train.data.shards import ShardReader
from train.model.text import TagTokenizer
from train.model.vae_file import LatentScale
from train.recipe.order import Plan

SEED = 31


def make(
    data: Path, micro: int = 2, tiles: int = 4, *, noise: NoiseConfig | None = None,
    scale: LatentScale | None = None, **settings: object
) -> TileDataset:
    """The dataset of a plan of `tiles` tiles of `micro` images."""
    index = Index.open(data, "pretrain")
    plan = Plan(index.uids, index.bucket_w, index.bucket_h, seed=SEED, tile_images=micro, tiles_per_update=tiles, epochs=3)
    return TileDataset(
        index, plan, ShardReader(data), TagTokenizer(small_tokenizer()), seed=SEED,
        data=DataConfig(path=str(data), **settings),  # type: ignore[arg-type]
        noise=noise or NoiseConfig(), scale=scale or LatentScale(0.13025), total_updates=plan.total_updates,
    )  # fmt: skip
