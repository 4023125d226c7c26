"""Forward diffusion: the noise schedule, the noise of a slot, and adding it.

What is random is drawn in data workers as a function of (seed, uid, epoch), in numpy; adding is torch on the device.
Shape legend: B images, C latent channels, H W latent rows and columns, T timesteps (1000).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from train import rng
from train.config import NoiseConfig
from train.rng import Stream

BETA_START, BETA_END, TIMESTEPS = 0.00085, 0.012, 1000  # SDXL's scheduler config

F32 = npt.NDArray[np.float32]


def alphas_cumprod(zero_terminal_snr: bool = False) -> torch.Tensor:
    """a_t, float64 [1000]: cumulative products of 1 - beta_t, betas linear in their square root.

    With zero terminal snr the last one is 0 (Lin et al., arXiv 2305.08891, algorithm 1).
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    alphas_T = torch.cumprod(1.0 - betas, dim=0)
    if not zero_terminal_snr:
        return alphas_T
    root = alphas_T.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def slot_noise(
    config: NoiseConfig,
    seed: int,
    uid: int,
    epoch: int,
    shape: Sequence[int],
    *,
    latent_mean: npt.NDArray[np.floating] | None = None,
) -> tuple[F32, F32]:
    """(noise of the target, noise that is added), both float32 [C,H,W]; they differ with input perturbation only.

    `shape` is (C,H,W); `latent_mean` [C], of the scaled latent, is read by the adaptive offset.
    """
    noise = rng.normals(seed, Stream.NOISE, uid, epoch, shape)
    if config.multires_iterations:
        noise = _pyramid(noise, config, seed, uid, epoch)
    if config.offset or config.offset_adaptive:
        noise = noise + _offset(config, seed, uid, epoch, shape, latent_mean)
    if not config.input_perturbation:
        return noise, noise
    extra = rng.normals(seed, Stream.INPUT_PERTURBATION, uid, epoch, shape)
    return noise, noise + np.float32(config.input_perturbation) * extra


def _offset(
    config: NoiseConfig,
    seed: int,
    uid: int,
    epoch: int,
    shape: Sequence[int],
    latent_mean: npt.NDArray[np.floating] | None,
) -> F32:
    """One normal per channel, scaled; not renormalised, so the variance grows to 1 + offset^2 (crosslabs.org, 2023).

    The adaptive part adds `offset_adaptive` x |mean of the latent's channel| to the scale.
    """
    channels = shape[0]
    scale = np.full(channels, config.offset, dtype=np.float32)
    if config.offset_adaptive:
        if latent_mean is None:
            raise ValueError("noise.offset_adaptive needs the latent's channel means")
        scale = np.maximum(scale + config.offset_adaptive * np.abs(latent_mean), 0.0).astype(np.float32)
    normals = rng.normals(seed, Stream.NOISE_OFFSET, uid, epoch, (channels,))
    return (scale * normals).reshape(channels, 1, 1)


def _pyramid(noise: F32, config: NoiseConfig, seed: int, uid: int, epoch: int) -> F32:
    """Noise plus ever coarser noise, weighted discount^i and brought back to unit deviation (multi-resolution noise).

    Each level is about half to a quarter of the one before, its ratio drawn from the stream as well.
    """
    channels, height, width = noise.shape
    drawn = rng.words(seed, Stream.MULTIRES, uid, epoch, 4)
    ratios = 2.0 + 2.0 * drawn.astype(np.float64) / 2**32
    total, used = noise.astype(np.float32), 4
    for level in range(config.multires_iterations):
        ratio = ratios[level % 4] ** (level + 1)
        h, w = max(1, int(height / ratio)), max(1, int(width / ratio))
        flat = rng.normals(seed, Stream.MULTIRES, uid, epoch, (used + channels * h * w,))[used:]
        used += channels * h * w
        coarse = torch.from_numpy(flat.reshape(1, channels, h, w).copy())
        grown = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0].numpy()
        total = total + grown * np.float32(config.multires_discount ** (level + 1))
        if h == 1 or w == 1:
            break
    return (total / total.std()).astype(np.float32)


def add_noise(
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    alphas_T: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al., arXiv 2006.11239, eq. 4), in fp32.

    a_t rounded to half precision is wrong by up to 7 % in sigma at small t, so the recipe's networks get their input
    cast afterwards. `dtype` names the half type in which the original computed, to reproduce exactly that.
    """
    a_B111 = alphas_T[timesteps_B].view(-1, 1, 1, 1)
    if dtype is None:
        return a_B111.sqrt().float() * latents_BCHW + (1.0 - a_B111).sqrt().float() * noise_BCHW
    a_B111 = a_B111.float().to(dtype)
    signal, sigma = a_B111**0.5, (1.0 - a_B111) ** 0.5
    return (signal * latents_BCHW.to(dtype) + sigma * noise_BCHW.to(dtype)).to(dtype)
