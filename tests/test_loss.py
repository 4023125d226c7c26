"""Losses against literal numbers and straight-line formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config import LossConfig
from train.loss import debiased_weights, huber_c, min_snr_weights, per_image, pseudo_huber, snr, target, weights
from train.noise import alphas_cumprod

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
    assert debiased_weights(value, "v").item() == pytest.approx(1 / (ratio + 1))


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
