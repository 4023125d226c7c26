"""The forward of a batch and its loss: noise added, prediction, how errors count and how timesteps are weighted.

Reduction: mean over channels, rows and columns per image; the update sums images and divides by their number.
Shape legend: B images, C H W latent, N chunks of 77 tokens, T timesteps (1000).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from train.config.stage import LossConfig, NoiseConfig
from train.diffusion import noise
from train.model import speed
from train.recipe.order import Tile
from train.storage.state_files import PRECISIONS


@dataclass(frozen=True)
class Batch:
    """A tile, or a part of one. Tensors first; the rest says where it came from."""

    latents_BCHW: torch.Tensor  # fp32, scaled as the U-Net sees them
    noise_BCHW: torch.Tensor  # fp32, the target's noise (offset included)
    input_noise_BCHW: torch.Tensor | None  # fp32, what is added: only with input perturbation, else the noise itself
    timesteps_B: torch.Tensor  # int64
    ids_1_BN77: torch.Tensor  # int64, encoder 1
    ids_2_BN77: torch.Tensor  # int64, encoder 2
    size_B6: torch.Tensor  # fp32: original h w, crop top left, target h w
    slots_B: torch.Tensor  # int64, place of each image in its update
    step: int  # plan step
    tile: Tile
    tags_dropped: int  # cut at the token limit
    weights_B: torch.Tensor | None = None  # fp32, of each image's loss; None where all weigh 1
    masks_B1HW: torch.Tensor | None = None  # fp32 in 0..1, of each place's error; None where all counts
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

    def kernels(self) -> AbstractContextManager[None]:
        """The context of every forward, and of its backward: what is tried, trained and looked at runs the same attention."""
        return speed.pin_attention(self.attention, self.alphas_T.device.type, deterministic=self.deterministic)


def image_losses(model: nn.Module, part: Batch, diffusion: Diffusion) -> torch.Tensor:
    """Weighted loss of each image [B], fp32, times the image's own weight where it has one."""
    dtype = PRECISIONS[diffusion.precision]
    half = dtype if diffusion.noise.dtype == "compute" and dtype != torch.float32 else None
    target_noise_BCHW = noise.as_drawn(part.noise_BCHW, diffusion.noise, half)
    perturbed_BCHW = part.input_noise_BCHW
    input_noise_BCHW = target_noise_BCHW if perturbed_BCHW is None else noise.as_drawn(perturbed_BCHW, diffusion.noise, half)
    if diffusion.loss.prediction == "flow":
        noisy_BCHW = noise.add_flow_noise(part.latents_BCHW, input_noise_BCHW, part.timesteps_B)
    else:
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
    losses_B = per_image(
        prediction_BCHW.float(),
        part.latents_BCHW,
        target_noise_BCHW.float(),
        part.timesteps_B,
        diffusion.alphas_T,
        diffusion.loss,
        part.masks_B1HW,
    )
    return losses_B if part.weights_B is None else losses_B * part.weights_B


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Every forward of the training runs in this."""
    dtype = PRECISIONS[precision]
    # No cache: every weight is used once per forward, and cached casts would hold 5 GiB until it ends.
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def per_image(
    prediction_BCHW: torch.Tensor,
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    alphas_T: torch.Tensor,
    config: LossConfig,
    masks_B1HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted loss of each image, fp32 [B]. All inputs fp32, `alphas_T` float64.

    A mask multiplies the errors; the mean is still over all places, so a picture that is half masked counts half.
    """
    target_BCHW = target(latents_BCHW, noise_BCHW, timesteps_B, alphas_T, config.prediction)
    difference = prediction_BCHW - target_BCHW
    if config.type == "huber":
        c_B111 = huber_c(timesteps_B, alphas_T, config).view(-1, 1, 1, 1).to(difference.dtype)
        errors = pseudo_huber(difference, c_B111)
    else:
        errors = difference.square()
    if masks_B1HW is not None:
        errors = errors * masks_B1HW
    return errors.mean(dim=(1, 2, 3)) * weights(timesteps_B, alphas_T, config).to(errors.dtype)


def target(
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    alphas_T: torch.Tensor,
    prediction: str,
) -> torch.Tensor:
    """What the network has to say, fp32 [B,C,H,W].

    epsilon: the noise (Ho et al., arXiv 2006.11239). v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho, arXiv
    2202.00512). flow: noise - x_0, the velocity dx/dsigma of the straight path, at every timestep the same (Liu et al.,
    arXiv 2209.03003, eq. 1, with time running from the picture to the noise as in Esser et al., arXiv 2403.03206).
    """
    if prediction == "epsilon":
        return noise_BCHW
    if prediction == "flow":
        return noise_BCHW - latents_BCHW
    a_B111 = alphas_T[timesteps_B].view(-1, 1, 1, 1)
    return a_B111.sqrt().float() * noise_BCHW - (1.0 - a_B111).sqrt().float() * latents_BCHW


def snr(timesteps_B: torch.Tensor, alphas_T: torch.Tensor) -> torch.Tensor:
    """a / (1 - a), float64 [B]."""
    a_B = alphas_T[timesteps_B]
    return a_B / (1.0 - a_B)


def weights(timesteps_B: torch.Tensor, alphas_T: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Weight of each image's loss, float64 [B]; 1 in the recipe."""
    if config.min_snr_gamma is not None:
        return min_snr_weights(snr(timesteps_B, alphas_T), config.min_snr_gamma, config.prediction)
    if config.debiased:
        return debiased_weights(snr(timesteps_B, alphas_T), config.prediction)
    return torch.ones_like(timesteps_B, dtype=torch.float64)


def min_snr_weights(snr_B: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """min(snr, gamma) / snr, for v over snr + 1 (Hang et al., arXiv 2303.09556)."""
    return snr_B.clamp(max=gamma) / (snr_B if prediction == "epsilon" else snr_B + 1.0)


def debiased_weights(snr_B: torch.Tensor, prediction: str) -> torch.Tensor:
    """1 / sqrt(min(snr, 1000)), for v 1 / (min(snr, 1000) + 1) (Yu et al., arXiv 2310.08442; the bound is sd-scripts')."""
    bounded_B = snr_B.clamp(max=1000.0)
    return bounded_B.rsqrt() if prediction == "epsilon" else 1.0 / (bounded_B + 1.0)


def pseudo_huber(difference: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """2c (sqrt(d^2 + c^2) - c): d^2 near zero, 2c|d| far away (Charbonnier et al.)."""
    squared = difference.square()
    # the same value without the subtraction, in which an fp32 d below 1e-4 c would vanish
    return 2.0 * c * squared / ((squared + c.square()).sqrt() + c)


def huber_c(timesteps_B: torch.Tensor, alphas_T: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """c of each image, float64 [B]: constant, or falling from 1 towards `huber_c` (arXiv 2403.16728)."""
    c = config.huber_c
    if config.huber_schedule == "constant":
        return torch.full_like(timesteps_B, c, dtype=torch.float64)
    if config.huber_schedule == "exponential":
        return torch.exp(timesteps_B.double() * math.log(c) / 1000.0)
    a_B = alphas_T[timesteps_B]
    return (1.0 - c) / (1.0 + ((1.0 - a_B) / a_B).sqrt()).square() + c
