"""Noise schedule and noise of a slot against literal numbers, formulas and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config.stage import NoiseConfig
from train.diffusion.noise import add_noise, alphas_cumprod, as_drawn, tile_noise
from train.recipe import rng
from train.recipe.rng import Stream

UID = rng.uid_of("danbooru:6814120")
SHAPE = (4, 16, 24)


def slot_noise(config: NoiseConfig, seed: int, uid: int, epoch: int, shape: tuple[int, ...], latent_mean=None):
    """`tile_noise` of one slot: both float32 [C,H,W]; `latent_mean` [C]."""
    means_BC = None if latent_mean is None else latent_mean[None]
    target_BCHW, added_BCHW = tile_noise(config, seed, [uid], [epoch], shape, latent_means_BC=means_BC)
    return target_BCHW[0], added_BCHW[0]


@pytest.mark.parametrize(
    ("t", "a", "sigma"),
    [(0, 0.999150, 0.029155), (1, 0.998296, 0.041279), (10, 0.990431, 0.097820), (100, 0.894223, 0.325233),
     (250, 0.673793, 0.571146), (500, 0.276333, 0.850686), (750, 0.056170, 0.971509), (999, 0.004660, 0.997667)],
)  # fmt: skip
def test_schedule(t: int, a: float, sigma: float) -> None:
    alphas = alphas_cumprod()
    assert alphas.dtype == torch.float64
    assert float(alphas[t]) == pytest.approx(a, abs=5e-7)
    assert float((1 - alphas[t]).sqrt()) == pytest.approx(sigma, abs=5e-7)


def test_schedule_is_the_one_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(alphas_cumprod().float(), theirs, rtol=2e-6, atol=0)


def test_zero_terminal_snr() -> None:
    alphas = alphas_cumprod(zero_terminal_snr=True)
    assert float(alphas[0]) == pytest.approx(0.99915, abs=1e-6)
    assert float(alphas[500]) == pytest.approx(0.2410, abs=5e-5)
    assert float(alphas[999]) == 0.0
    assert (alphas.diff() < 0).all()


def test_noise_is_the_stream_and_nothing_else() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    target, added = slot_noise(NoiseConfig(), 31, UID, 0, SHAPE)
    assert np.shares_memory(target, added)
    assert np.array_equal(target, rng.normals(31, Stream.NOISE, UID, 0, SHAPE))
    assert [f"{x.view(np.uint32):08x}" for x in target.flatten()[:4]] == [
        "3e8c9c40",
        "3e476e84",
        "bff79054",
        "3eab7f83",
    ]
    assert not np.array_equal(target, slot_noise(NoiseConfig(), 31, UID, 1, SHAPE)[0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_offset_is_one_number_per_channel() -> None:
    plain, _ = slot_noise(NoiseConfig(), 31, UID, 0, SHAPE)
    shifted, added = slot_noise(NoiseConfig(offset=0.0357), 31, UID, 0, SHAPE)
    assert np.array_equal(shifted, added)
    difference = (shifted - plain).reshape(4, -1)
    expected = np.float32(0.0357) * rng.normals(31, Stream.NOISE_OFFSET, UID, 0, (4,))
    np.testing.assert_allclose(difference, np.repeat(expected[:, None], difference.shape[1], axis=1), atol=3e-7)


def test_offset_variance_is_one_plus_its_square() -> None:
    """1 + 0.0357^2 = 1.001274: not renormalised. Measured on an offset large enough to see."""
    draws = [slot_noise(NoiseConfig(offset=0.5), 1, uid, 0, (4, 4, 4))[0] for uid in range(4000)]
    assert np.var(draws) == pytest.approx(1 + 0.5**2, rel=0.03)
    assert pytest.approx(1.001274, abs=1e-6) == 1 + 0.0357**2


def test_adaptive_offset_follows_the_latent() -> None:
    config = NoiseConfig(offset=0.1, offset_adaptive=0.5)
    mean = np.array([0.0, 1.0, -2.0, 0.2], dtype=np.float32)
    plain, _ = slot_noise(NoiseConfig(), 31, UID, 0, SHAPE)
    shifted, _ = slot_noise(config, 31, UID, 0, SHAPE, latent_mean=mean)
    normals = rng.normals(31, Stream.NOISE_OFFSET, UID, 0, (4,))
    np.testing.assert_allclose((shifted - plain)[:, 0, 0], (0.1 + 0.5 * np.abs(mean)) * normals, rtol=1e-4, atol=1e-6)


def test_input_perturbation_changes_the_input_only() -> None:
    target, added = slot_noise(NoiseConfig(input_perturbation=0.1), 31, UID, 0, SHAPE)
    assert np.array_equal(target, slot_noise(NoiseConfig(), 31, UID, 0, SHAPE)[0])
    extra = rng.normals(31, Stream.INPUT_PERTURBATION, UID, 0, SHAPE)
    np.testing.assert_allclose(added, target + np.float32(0.1) * extra)


@settings(max_examples=20, deadline=None)
@given(
    uid=st.integers(0, 2**64 - 1),
    iterations=st.integers(1, 9),
    discount=st.floats(0.1, 0.9),
    offset=st.sampled_from([0, 0.1]),
)
def test_multires_against_the_loop_it_cites(uid: int, iterations: int, discount: float, offset: float) -> None:
    """Level by level with its own draws: sizes from one drawn ratio each, stopping at a single row or column."""
    config = NoiseConfig(multires_iterations=iterations, multires_discount=discount, offset=offset)
    found, _ = slot_noise(config, 31, uid, 0, (4, 24, 16))
    words = rng.words(31, Stream.MULTIRES, uid, 0, 12)
    used = -(-iterations // 4) * 4
    total = torch.from_numpy(slot_noise(NoiseConfig(offset=offset), 31, uid, 0, (4, 24, 16))[0].copy())[None]
    upsample = torch.nn.Upsample(size=(24, 16), mode="bilinear")
    for i in range(iterations):
        r = float(words[i]) / 2**32 * 2 + 2
        h, w = max(1, int(24 / r**i)), max(1, int(16 / r**i))
        level = rng.normals(31, Stream.MULTIRES, uid, 0, (used + 4 * h * w,))[used:].reshape(1, 4, h, w)
        used += 4 * h * w
        total = total + upsample(torch.from_numpy(level.copy())) * discount**i
        if h == 1 or w == 1:
            break
    expected = total / total.std()
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-4, atol=2e-6)


def test_multires_is_coarser_with_unit_deviation() -> None:
    noise, _ = slot_noise(NoiseConfig(multires_iterations=6, multires_discount=0.8), 31, UID, 0, (4, 64, 64))
    assert noise.dtype == np.float32
    assert noise.std(ddof=1) == pytest.approx(1.0, abs=1e-5)
    assert (noise[:, :, 1:] * noise[:, :, :-1]).mean() > 0.1


def test_adding_is_fp32_and_half_differs_as_measured() -> None:
    """a_t rounded to fp16 gives sigma(0) = 0.03125, 7 % too much; to bf16 it gives 0 at t = 0 and 1."""
    alphas = alphas_cumprod()
    latents, noise = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    t = torch.tensor([0, 1])
    exact = add_noise(latents, noise, t, alphas)
    assert exact.dtype == torch.float32
    assert exact[:, 0, 0, 0].tolist() == pytest.approx([0.029155, 0.041279], abs=5e-7)
    half = add_noise(latents, noise.half(), t, alphas, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert float(half[0, 0, 0, 0]) == pytest.approx(0.03125, abs=1e-6)
    assert add_noise(latents, noise.bfloat16(), t, alphas, dtype=torch.bfloat16).abs().max() == 0


@pytest.mark.parametrize(
    ("dtype", "above", "count"), [(torch.float16, 0.01, 8), (torch.bfloat16, 0.05, 12), (torch.bfloat16, 0.01, 52)]
)
def test_timesteps_with_a_wrong_sigma_in_half(dtype: torch.dtype, above: float, count: int) -> None:
    t = torch.arange(1000)
    zeros, ones = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    exact = add_noise(zeros, ones, t, alphas_cumprod()).flatten()
    rounded = add_noise(zeros, ones.to(dtype), t, alphas_cumprod(), dtype=dtype).flatten().float()
    assert int(((rounded / exact - 1).abs() > above).sum()) == count


@pytest.mark.parametrize("offset", [0.0, 0.0357])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compute_mode_is_bit_equal_to_diffusers_in_half(dtype: torch.dtype, offset: float) -> None:
    """What the original called: DDPMScheduler.add_noise on half latents, with half noise or, offset, fp32 noise."""
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(1000, 4, 2, 3, generator=generator) for _ in range(2))
    drawn = as_drawn(noise, NoiseConfig(offset=offset, dtype="compute"), dtype)
    assert drawn.dtype == (torch.float32 if offset else dtype)
    t = torch.arange(1000)
    found = add_noise(latents, drawn, t, alphas_cumprod(), dtype=dtype)
    expected = theirs.add_noise(latents.to(dtype), drawn, t)
    assert found.dtype == expected.dtype
    different = (found != expected).flatten(1).any(dim=1).nonzero().flatten().tolist()
    # their a_t is a product of fp32 numbers and rounds to the other half number at two timesteps
    assert set(different) <= ({722, 768} if dtype == torch.float16 else set())


def test_fp32_mode_leaves_the_draw_alone() -> None:
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    assert as_drawn(noise, NoiseConfig(), None) is noise


@given(t=st.integers(0, 999))
def test_adding_against_the_formula(t: int) -> None:
    a = float(alphas_cumprod()[t])
    latents = torch.linspace(-3, 3, 64).reshape(1, 4, 4, 4)
    noise = latents.flip(0, 1, 2, 3) * 0.7
    expected = a**0.5 * latents + (1 - a) ** 0.5 * noise
    torch.testing.assert_close(
        add_noise(latents, noise, torch.tensor([t]), alphas_cumprod()), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "config",
    [
        NoiseConfig(),
        NoiseConfig(offset=0.0357, input_perturbation=0.1),
        NoiseConfig(offset_adaptive=0.05, multires_iterations=3),
    ],
)
@pytest.mark.parametrize("shape", [(4, 16, 24), (4, 152, 104), (3, 5, 7)])  # many slots at once, one by one, odd
def test_a_tile_is_its_slots(config: NoiseConfig, shape: tuple[int, int, int]) -> None:
    uids, epochs = [UID + number for number in range(5)], [0, 3, 3, 1, 70_000]
    means_BC = np.random.default_rng(0).standard_normal((5, shape[0]))
    together = tile_noise(config, 31, uids, epochs, shape, latent_means_BC=means_BC)
    for number, (uid, epoch) in enumerate(zip(uids, epochs, strict=True)):
        alone = slot_noise(config, 31, uid, epoch, shape, latent_mean=means_BC[number])
        base = rng.normals(31, Stream.NOISE, uid, epoch, shape)
        for many, one in zip(together, alone, strict=True):
            assert many.dtype == np.float32
            np.testing.assert_array_equal(many[number], one)
        if config == NoiseConfig():
            np.testing.assert_array_equal(together[0][number], base)
