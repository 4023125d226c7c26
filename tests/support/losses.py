"""A model that says what it is told to, and a batch of three images whose loss one can work out in the head."""

from __future__ import annotations

import numpy as np
import torch

from train.diffusion.objective import Batch
from train.recipe.order import Tile


class Says(torch.nn.Module):
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
