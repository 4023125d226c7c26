"""The forward of a batch and its loss: noise added, prediction, error of each image.

Shape legend: B images, C H W latent, N chunks of 77 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from train.config.stage import LossConfig, NoiseConfig
from train.diffusion import loss, noise
from train.model import speed
from train.recipe.order import Tile
from train.storage.state_files import PRECISIONS


@dataclass(frozen=True)
class Batch:
    """A tile, or a part of one. Tensors first; the rest says where it came from."""

    latents_BCHW: torch.Tensor  # fp32, scaled as the U-Net sees them
    noise_BCHW: torch.Tensor  # fp32, the target's noise (offset included)
    input_noise_BCHW: torch.Tensor  # fp32, what is added; differs from noise only with input perturbation
    timesteps_B: torch.Tensor  # int64
    ids_1_BN77: torch.Tensor  # int64, encoder 1
    ids_2_BN77: torch.Tensor  # int64, encoder 2
    size_B6: torch.Tensor  # fp32: original h w, crop top left, target h w
    slots_B: torch.Tensor  # int64, place of each image in its update
    step: int  # plan step
    tile: Tile
    tags_dropped: int  # cut at the token limit
    substituted: tuple[str, ...] = ()  # keys that could not be read and were replaced

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; asynchronous from pinned memory."""
        return self._with({n: t.to(device, non_blocking=True) for n, t in self.tensors().items()})

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader on CUDA machines)."""
        return self._with({name: tensor.pin_memory() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name to tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def _with(self, tensors: dict[str, Any]) -> Batch:
        return replace(self, **tensors)

    def parts(self, count: int) -> list[Batch]:
        """The tile cut into `count` equal runs of images, in order (a short tile: as equal as it goes)."""
        if count == 1:
            return [self]
        images = len(self.slots_B)
        bounds = [images * i // count for i in range(count + 1)]
        pieces = [
            self._with({name: tensor[a:b] for name, tensor in self.tensors().items()})
            for a, b in zip(bounds, bounds[1:], strict=False)
            if b > a
        ]
        # What is counted per tile is carried by its first piece alone.
        return [pieces[0], *(replace(piece, tags_dropped=0, substituted=()) for piece in pieces[1:])]




@dataclass(frozen=True)
class Diffusion:
    """What forward and loss need beside the batch."""

    alphas_T: torch.Tensor  # float64, cumulative products of 1 - beta
    noise: NoiseConfig
    loss: LossConfig
    precision: str
    split: int = 1  # parts in which a tile is executed
    attention: str = "auto"  # kernel of scaled-dot-product attention
    deterministic: bool = False  # only kernels that give the same bits every time
    channels_last: bool = False


def image_losses(model: nn.Module, part: Batch, diffusion: Diffusion) -> torch.Tensor:
    """Weighted loss of each image [B], fp32."""
    dtype = PRECISIONS[diffusion.precision]
    half = dtype if diffusion.noise.dtype == "compute" and dtype != torch.float32 else None
    target_noise_BCHW = noise.as_drawn(part.noise_BCHW, diffusion.noise, half)
    input_noise_BCHW = noise.as_drawn(part.input_noise_BCHW, diffusion.noise, half)
    noisy_BCHW = noise.add_noise(
        part.latents_BCHW, input_noise_BCHW, part.timesteps_B, diffusion.alphas_T, dtype=half
    )
    noisy_BCHW = noisy_BCHW.to(dtype)
    if diffusion.channels_last:
        noisy_BCHW = speed.as_channels_last(noisy_BCHW)
    with autocast(part.latents_BCHW.device.type, diffusion.precision):
        prediction_BCHW = model(
            noisy_BCHW, part.timesteps_B, part.ids_1_BN77, part.ids_2_BN77, part.size_B6
        )
    return loss.per_image(
        prediction_BCHW.float(),
        part.latents_BCHW,
        target_noise_BCHW.float(),
        part.timesteps_B,
        diffusion.alphas_T,
        diffusion.loss,
    )


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Every forward of the training runs in this."""
    dtype = PRECISIONS[precision]
    # No cache: every weight is used once per forward, and cached casts would hold 5 GiB until it ends.
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
