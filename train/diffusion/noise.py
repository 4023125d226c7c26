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

from train.config.stage import NoiseConfig
from train.recipe import rng
from train.recipe.rng import Stream

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


def needs_means(config: NoiseConfig) -> bool:
    """Whether the noise of an image depends on the means of its latent's channels."""
    return bool(config.offset_adaptive)


def tile_noise(
    config: NoiseConfig,
    seed: int,
    uids: Sequence[int],
    epochs: Sequence[int],
    shape: Sequence[int],
    *,
    latent_means_BC: npt.NDArray[np.floating] | None = None,
) -> tuple[F32, F32]:
    """(noise of the target, noise that is added), both float32 [B,C,H,W]: one array but for input perturbation.

    A slot's noise depends on its own (uid, epoch) alone. `shape` is (C,H,W); `latent_means_BC`, of the scaled latents,
    are read by the adaptive offset. Offset before multi-resolution, as in the original trainer.
    """
    noise_BCHW = rng.normals_many(seed, Stream.NOISE, uids, epochs, shape)
    if config.offset or config.offset_adaptive:
        noise_BCHW = noise_BCHW + _offset(config, seed, uids, epochs, shape, latent_means_BC)
    if config.multires_iterations:
        slots = zip(noise_BCHW, uids, epochs, strict=True)
        noise_BCHW = np.stack([_pyramid(noise, config, seed, uid, epoch) for noise, uid, epoch in slots])
    if not config.input_perturbation:
        return noise_BCHW, noise_BCHW
    # Ning et al., arXiv 2301.11706: the network sees more noise than it has to name
    extra = rng.normals_many(seed, Stream.INPUT_PERTURBATION, uids, epochs, shape)
    return noise_BCHW, noise_BCHW + np.float32(config.input_perturbation) * extra


def _offset(
    config: NoiseConfig,
    seed: int,
    uids: Sequence[int],
    epochs: Sequence[int],
    shape: Sequence[int],
    latent_means_BC: npt.NDArray[np.floating] | None,
) -> F32:
    """One normal per channel, scaled; not renormalised, so the variance grows to 1 + offset^2 (crosslabs.org, 2023).

    The adaptive part adds `offset_adaptive` x |mean of the latent's channel| to the scale. float32 [B,C,1,1].
    """
    channels = shape[0]
    scale = np.full((len(uids), channels), config.offset, dtype=np.float32)
    if needs_means(config):
        if latent_means_BC is None:
            raise ValueError("noise.offset_adaptive needs the latents' channel means")
        scale = np.maximum(scale + config.offset_adaptive * np.abs(latent_means_BC), 0.0).astype(np.float32)
    normals_BC = rng.normals_many(seed, Stream.NOISE_OFFSET, uids, epochs, (channels,))
    return (scale * normals_BC)[:, :, None, None]


def _pyramid(noise: F32, config: NoiseConfig, seed: int, uid: int, epoch: int) -> F32:
    """Noise plus coarser and coarser noise, level i weighted discount^i, brought back to unit deviation.

    Level i has 1 / r^i of the rows and columns, r drawn from [2, 4) for each level, so level 0 is of full size; the
    last is the one that reaches a single row or column (J. Whitaker, "Multi-resolution noise", 2023). The original
    divides by the deviation of the whole batch, we by the image's own, so that a slot depends on nothing else.
    """
    levels = config.multires_iterations
    reserved = -(-levels // 4) * 4  # words of the ratios: whole blocks, so that no normal shares them
    ratios = 2.0 + 2.0 * rng.words(seed, Stream.MULTIRES, uid, epoch, levels) / 2.0**32
    channels, height, width = noise.shape
    sizes = _level_sizes(height, width, ratios.tolist())
    count = channels * sum(h * w for h, w in sizes)
    drawn = torch.from_numpy(rng.normals_float64(seed, Stream.MULTIRES, uid, epoch, reserved + count)[reserved:])
    total = torch.from_numpy(noise).double()
    for level, (h, w) in enumerate(sizes):
        coarse, drawn = drawn[: channels * h * w].view(1, channels, h, w), drawn[channels * h * w :]
        grown = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0]
        total += grown * config.multires_discount**level
    return (total / total.std()).float().numpy()


def _level_sizes(height: int, width: int, ratios: Sequence[float]) -> list[tuple[int, int]]:
    """(rows, columns) of each level of a pyramid, up to the first with a single row or column."""
    sizes: list[tuple[int, int]] = []
    for level, ratio in enumerate(ratios):
        sizes.append((max(1, int(height / ratio**level)), max(1, int(width / ratio**level))))
        if 1 in sizes[-1]:
            break
    return sizes


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
    cast afterwards. `dtype` names the half type in which the original computed: a_t and latents are rounded to it and
    the noise taken as it comes (see `as_drawn`), so fp32 noise gives an fp32 sum from a half a_t.
    """
    a_B111 = alphas_T[timesteps_B].view(-1, 1, 1, 1)
    if dtype is None:
        return a_B111.sqrt().float() * latents_BCHW.float() + (1.0 - a_B111).sqrt().float() * noise_BCHW.float()
    a_B111 = a_B111.float().to(dtype)
    return a_B111**0.5 * latents_BCHW.to(dtype) + (1.0 - a_B111) ** 0.5 * noise_BCHW


def add_flow_noise(latents_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - sigma) x_0 + sigma noise with sigma = t / 1000, in fp32: the straight path of rectified flow.

    Liu et al., arXiv 2209.03003, eq. 1; Esser et al., arXiv 2403.03206, eq. 13. The network is told t = 1000 sigma, which
    is what diffusers' schedulers with flow sigmas pass it.
    """
    sigma_B111 = (timesteps_B.double() / TIMESTEPS).view(-1, 1, 1, 1)
    return (1.0 - sigma_B111).float() * latents_BCHW.float() + sigma_B111.float() * noise_BCHW.float()


def as_drawn(noise_BCHW: torch.Tensor, config: NoiseConfig, dtype: torch.dtype | None) -> torch.Tensor:
    """The noise in the type that the original drew: `dtype`, its half type, unless an offset made the sum fp32.

    None leaves it in fp32. (The original's draw below an fp32 offset was rounded to half too; ours is not.)
    """
    if dtype is None or config.offset or config.offset_adaptive:
        return noise_BCHW
    return noise_BCHW.to(dtype)
