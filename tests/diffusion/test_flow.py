"""Rectified flow against literal arithmetic and diffusers' own schedulers; guidance brought back to its deviation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.base.errors import ExitCode, Halt
from train.config.prompts import Sampler
from train.config.stage import LossConfig, load_stage
from train.diffusion.noise import add_flow_noise, alphas_cumprod
from train.diffusion.objective import per_image, target
from train.diffusion.sampling import denoise, rescaled, scheduler_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_path_target_and_loss() -> None:
    latents, noise = torch.full((3, 1, 1, 2), 2.0), torch.tensor([3.0, -1.0]).expand(3, 1, 1, 2)
    times = torch.tensor([0, 250, 999])
    noisy = add_flow_noise(latents, noise, times)
    expected = [[2.0, 2.0], [0.75 * 2 + 0.25 * 3, 0.75 * 2 - 0.25], [0.001 * 2 + 0.999 * 3, 0.001 * 2 - 0.999]]
    torch.testing.assert_close(noisy.flatten(1), torch.tensor(expected))
    velocity = target(latents, noise, times, alphas_cumprod(), "flow")
    assert velocity.flatten(1).tolist() == [[1.0, -3.0]] * 3
    said = torch.zeros(3, 1, 1, 2)
    losses = per_image(said, latents, noise, times, alphas_cumprod(), LossConfig(prediction="flow"))
    assert losses.tolist() == [5.0] * 3  # (1 + 9) / 2, at every timestep the same


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_euler_step_is_the_velocity_times_the_way(shift: float) -> None:
    asked: list[float] = []

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        asked.append(timestep)
        return 0.3 * x + timestep / 1000

    start = torch.linspace(-1, 1, 8).view(1, 2, 2, 2)
    ours = denoise(predict, start, steps=5, sampler="euler", prediction="flow", flow_shift=shift)
    assert ours is not None
    plain = [0.999 * (5 - i) / 5 for i in range(6)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in plain]
    x = start.clone()
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        x = x + (after - now) * (0.3 * x + int(1000 * now) / 1000)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    assert asked == [int(1000 * sigma + 1e-3) for sigma in sigmas[:-1]]  # the U-Net is told what the training told it


def test_euler_ancestral_is_the_posterior_of_the_path() -> None:
    """y = x / alpha, s = sigma / alpha: y' = x_0 + s'^2 / s e + s' sqrt(1 - s'^2 / s^2) n, whose variance is s'^2."""
    clean, steps = 0.5, 4
    scheduler = scheduler_of("euler_a", steps, prediction="flow")
    sigmas = scheduler.sigmas.double().tolist()
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = iter(sigmas)

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return (x - clean) / next(levels)  # noise - picture of a network that knows the picture

    ours = denoise(predict, start, steps=steps, sampler="euler_a", prediction="flow", generators=[torch.Generator().manual_seed(4)])
    assert ours is not None
    torch.testing.assert_close(ours, torch.full_like(ours, clean), rtol=1e-4, atol=1e-4)
    now, after = sigmas[0], sigmas[1]
    one = scheduler.step((start - clean) / now, scheduler.timesteps[0], start, generator=torch.Generator().manual_seed(4))[0]
    drawn = torch.randn(start.shape, generator=torch.Generator().manual_seed(4))
    s, t = now / (1 - now), after / (1 - after)
    y = clean + (t**2 / s**2) * (start / (1 - now) - clean) + t * (1 - t**2 / s**2) ** 0.5 * drawn
    torch.testing.assert_close(one, (1 - after) * y.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler_a", "euler", "dpmpp_2m"])
def test_a_point_is_reached_by_every_sampler(sampler: Sampler) -> None:
    """All pictures are one: the velocity is (x - picture) / sigma."""
    sigmas = scheduler_of(sampler, 20, prediction="flow", flow_shift=2.5).sigmas.tolist()
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    levels = iter(sigmas)
    end = denoise(lambda x, t: (x + 1.5) / next(levels), start, steps=20, sampler=sampler, prediction="flow", flow_shift=2.5,
                  generators=[torch.Generator().manual_seed(1)])  # fmt: skip
    assert end is not None
    torch.testing.assert_close(end, torch.full_like(end, -1.5), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(share: float) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    guided, positive = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(3)).unbind(0)
    torch.testing.assert_close(rescaled(3 * guided, positive, share), rescale_noise_cfg(3 * guided, positive, share))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("loss.min_snr_gamma=5", "loss.min_snr_gamma"), ("loss.debiased=true", "loss.debiased"),
        ("loss.type=huber", "loss.huber_schedule: snr"), ("noise.zero_terminal_snr=true", "noise.zero_terminal_snr"),
        ("noise.offset=0.0357", "noise.offset "), ("noise.offset_adaptive=0.1", "noise.offset_adaptive"),
        ("noise.multires_iterations=6", "noise.multires_iterations"), ("noise.input_perturbation=0.1", "noise.input_perturbation"),
        ("noise.dtype=compute", "noise.dtype"),
    ],
)  # fmt: skip
def test_what_flow_does_not_have_is_refused_by_name(setting: str, named: str) -> None:
    def load(*more: Any) -> Any:
        return load_stage([ROOT / "configs/pretrain.yaml"], ["data.path=d", "model.init_from=m", *more])

    with pytest.raises(Halt, match=f"loss.prediction: flow refuses {named}") as caught:
        load("loss.prediction=flow", setting)
    assert caught.value.code == ExitCode.USAGE
    load("loss.prediction=flow", "loss.type=huber", "loss.huber_schedule=exponential", "noise.stratified=true")
