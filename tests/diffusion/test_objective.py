"""Losses against literal numbers and straight-line formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config.stage import LossConfig, NoiseConfig
from train.diffusion.noise import add_noise, alphas_cumprod, tile_noise
from train.diffusion.objective import (
    debiased_weights,
    huber_c,
    min_snr_weights,
    per_image,
    pseudo_huber,
    snr,
    target,
    weights,
)
from train.recipe import rng
from train.recipe.rng import Stream

ALPHAS = alphas_cumprod()


@pytest.mark.parametrize(
    ("t", "ratio", "min_snr", "debiased"),
    [(0, 1175.4, 0.0042536, 0.0316228), (1, 585.86, 0.0085344, 0.0413144), (10, 103.51, 0.0483057, 0.0982911),
     (100, 8.45386, 0.591443, 0.343931), (250, 2.06553, 1, 0.695799), (500, 0.381850, 1, 1.61828),
     (750, 0.0595126, 1, 4.09916), (999, 0.00468191, 1, 14.6146)],
)  # fmt: skip
def test_table(t: int, ratio: float, min_snr: float, debiased: float) -> None:
    step = torch.tensor([t])
    assert snr(step, ALPHAS).item() == pytest.approx(ratio, rel=1e-4)  # the table is rounded
    assert weights(step, ALPHAS, LossConfig(min_snr_gamma=5.0)).item() == pytest.approx(min_snr, rel=2e-5)
    assert weights(step, ALPHAS, LossConfig(debiased=True)).item() == pytest.approx(debiased, rel=2e-5)
    assert weights(step, ALPHAS, LossConfig()).item() == 1.0


@given(ratio=st.floats(1e-3, 2000))
def test_v_weights(ratio: float) -> None:
    value = torch.tensor([ratio], dtype=torch.float64)
    assert min_snr_weights(value, 5.0, "v").item() == pytest.approx(min(ratio, 5) / (ratio + 1))
    assert debiased_weights(value, "v").item() == pytest.approx(1 / (min(ratio, 1000) + 1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("exponential", (1.0, 0.3162, 0.1002)), ("snr", (0.9497, 0.2313, 0.1037)), ("constant", (0.1, 0.1, 0.1))],
)
def test_huber_c(schedule: str, expected: tuple[float, ...]) -> None:
    config = LossConfig(type="huber", huber_schedule=schedule)  # type: ignore[arg-type]
    found = huber_c(torch.tensor([0, 500, 999]), ALPHAS, config)
    assert found.tolist() == pytest.approx(expected, abs=6e-5)


@given(d=st.floats(-50, 50), c=st.floats(0.01, 2))
def test_pseudo_huber(d: float, c: float) -> None:
    difference, width = torch.tensor([d], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)
    found = pseudo_huber(difference, width).item()
    assert found == pytest.approx(2 * c * (math.sqrt(d * d + c * c) - c), abs=1e-9)
    assert found <= d * d + 1e-9


def test_pseudo_huber_keeps_small_differences_in_fp32() -> None:
    found = pseudo_huber(torch.tensor([1e-5]), torch.tensor([1.0])).item()
    assert found == pytest.approx(1e-10, rel=1e-5)  # written with a subtraction it is 0


def test_v_target_is_the_velocity() -> None:
    latents, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    a = ALPHAS[t].view(-1, 1, 1, 1)
    expected = (a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double()).float()
    torch.testing.assert_close(target(latents, noise, t, ALPHAS, "v"), expected, rtol=1e-6, atol=1e-6)
    assert target(latents, noise, t, ALPHAS, "epsilon") is noise


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_per_image_against_a_straight_line(prediction: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    predicted, latents, noise = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(3))
    t = torch.tensor([3, 333, 987])
    config = LossConfig(prediction=prediction, type=kind, min_snr_gamma=5.0)  # type: ignore[arg-type]
    found = per_image(predicted, latents, noise, t, ALPHAS, config)
    for image in range(3):
        a = float(ALPHAS[t[image]])
        total = 0.0
        for p, x, n in zip(*(part[image].flatten().tolist() for part in (predicted, latents, noise)), strict=True):
            goal = n if prediction == "epsilon" else a**0.5 * n - (1 - a) ** 0.5 * x
            if kind == "l2":
                total += (p - goal) ** 2
            else:
                c = 0.9 / (1 + ((1 - a) / a) ** 0.5) ** 2 + 0.1
                total += 2 * c * (((p - goal) ** 2 + c * c) ** 0.5 - c)
        ratio = a / (1 - a)
        weight = min(ratio, 5) / (ratio if prediction == "epsilon" else ratio + 1)
        assert found[image].item() == pytest.approx(total / (4 * 6 * 5) * weight, rel=1e-5)


def toy_unet(weight_CC: np.ndarray) -> Callable[..., torch.Tensor]:
    """A network of one matrix over channels that reads latents and timesteps as the U-Net does."""
    weight = torch.from_numpy(weight_CC).float()
    return lambda noisy, t, *rest: torch.einsum("dc,bchw->bdhw", weight, noisy) + 1e-3 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_training_step_oracle(prediction: str) -> None:
    """An update's loss from the slots' draws on, against numpy float64 written from the recipe's formulas."""
    seed, uids, epochs, shape = 31, [11, 12, 13, 2**63], [0, 0, 4, 5], (4, 12, 10)
    latents = np.stack([rng.normals(1, 1, uid, 0, shape) for uid in uids]) * np.float32(0.13025)
    weight = np.arange(16, dtype=np.float64).reshape(4, 4) / 16 - 0.4
    noise_config = NoiseConfig(offset=0.0357)
    t = torch.from_numpy(rng.timesteps(seed, uids, epochs, 0, 1000))
    target_noise, input_noise = map(torch.from_numpy, tile_noise(noise_config, seed, uids, epochs, shape))
    noisy = add_noise(torch.from_numpy(latents), input_noise, t, ALPHAS)
    predicted = toy_unet(weight)(noisy, t)
    config = LossConfig(prediction=prediction)  # type: ignore[arg-type]
    found = per_image(predicted, torch.from_numpy(latents), target_noise, t, ALPHAS, config).double().mean().item()

    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    products = np.cumprod(1 - betas)
    total = 0.0
    for x0, uid, epoch, step in zip(latents.astype(np.float64), uids, epochs, t.tolist(), strict=True):
        eps = rng.normals_float64(seed, Stream.NOISE, uid, epoch, x0.size).reshape(shape)
        eps = eps + 0.0357 * rng.normals_float64(seed, Stream.NOISE_OFFSET, uid, epoch, 4).reshape(4, 1, 1)
        a = products[step]
        x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
        said = np.tensordot(weight, x_t, 1) + 1e-3 * step
        goal = eps if prediction == "epsilon" else math.sqrt(a) * eps - math.sqrt(1 - a) * x0
        total += ((said - goal) ** 2).mean()
    assert found == pytest.approx(total / 4, rel=1e-6)
