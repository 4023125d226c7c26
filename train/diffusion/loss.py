"""The training loss of an image: what the network should say, how errors count, how timesteps are weighted.

Reduction: mean over channels, rows and columns per image; the update sums images and divides by their number.
Shape legend: B images, C H W latent, T timesteps (1000).
"""

from __future__ import annotations

import math

import torch

from train.config.stage import LossConfig


def per_image(
    prediction_BCHW: torch.Tensor,
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    alphas_T: torch.Tensor,
    config: LossConfig,
) -> torch.Tensor:
    """Weighted loss of each image, fp32 [B]. All inputs fp32, `alphas_T` float64."""
    target_BCHW = target(latents_BCHW, noise_BCHW, timesteps_B, alphas_T, config.prediction)
    difference = prediction_BCHW - target_BCHW
    if config.type == "huber":
        c_B111 = huber_c(timesteps_B, alphas_T, config).view(-1, 1, 1, 1).to(difference.dtype)
        errors = pseudo_huber(difference, c_B111)
    else:
        errors = difference.square()
    return errors.mean(dim=(1, 2, 3)) * weights(timesteps_B, alphas_T, config).to(errors.dtype)


def target(
    latents_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    timesteps_B: torch.Tensor,
    alphas_T: torch.Tensor,
    prediction: str,
) -> torch.Tensor:
    """The noise, or v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho, arXiv 2202.00512)."""
    if prediction == "epsilon":
        return noise_BCHW
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
    """1 / sqrt(min(snr, 1000)), for v 1 / (snr + 1) (Yu et al., arXiv 2310.08442)."""
    return snr_B.clamp(max=1000.0).rsqrt() if prediction == "epsilon" else 1.0 / (snr_B + 1.0)


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
