"""Pictures from the networks in training or from a finished model: Euler ancestral and two deterministic samplers.

Noise comes from the PREVIEW stream alone, a function of (prompt seed, prompt index): no global generator is read
or written, so a run with previews trains the same bits as one without.

Shape legend: B batch, C latent channels, H W latent rows and columns, S noise draws, N text chunks, L context
length, D width, P pooled width. Lower case h w are the picture's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from train.base.errors import ExitCode, Halt
from train.config.prompts import Prompt, Sampler
from train.diffusion.noise import TIMESTEPS, alphas_cumprod
from train.model import text
from train.recipe import captions, rng
from train.recipe.captions import plain_tags

log = logging.getLogger("anix")


@dataclass(frozen=True)
class TrainedAs:
    """Conventions of the training that inference must share; the defaults are the recipe's."""

    max_tokens: int = 225
    context: text.Context = "stitched"
    pooled_projection: text.PooledProjection = "correct"
    prediction: str = "epsilon"  # or v
    zero_terminal_snr: bool = False


RECIPE = TrainedAs()


def sample_images(
    components: Any,
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler = "euler_a",
    steps: int = 28,
    guidance: float = 7.0,
    negative: str = "",
    prefix: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trained_as: TrainedAs = RECIPE,
    stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One picture per prompt, in order; fewer when `stop()` came true, which is asked before every network call.

    `components` has unet, text_encoder, text_encoder_2, vae, tokenizer (train.model.networks.Components), on `device`
    already; they are put back into the mode they were in. `dtype` other than fp32 runs them under autocast.
    Raises Halt(USAGE) for a size the VAE cannot make.
    """
    device = torch.device(device)
    encoders = (components.text_encoder, components.text_encoder_2)
    tokens = text.TagTokenizer(components.tokenizer, getattr(components, "tokenizer_2", None))
    images: list[Image.Image] = []
    with without_training((components.unet, *encoders, components.vae)), _autocast(device, dtype):
        for prompt in prompts:
            if stop():
                break
            shown = captions_text(prompt.text, prefix)
            texts = [shown] if guidance == 1 else [negative, shown]
            condition = _condition(tokens, encoders, texts, prompt, device, trained_as)
            latents_1CHW = denoise(
                partial(_guided, components.unet, told=condition, guidance=guidance),
                picture_noise(prompt, steps, components.vae).to(device),
                sampler=sampler,
                prediction=trained_as.prediction,
                zero_terminal_snr=trained_as.zero_terminal_snr,
                stop=stop,
            )
            if latents_1CHW is None:
                break
            images.append(decode(components.vae, latents_1CHW)[0])
    return images


def captions_text(prompt: str, prefix: str) -> str:
    """The prompt as it is encoded: prefix first, separators gone, tags joined with ", "."""
    return captions.join([*plain_tags(prefix), *plain_tags(prompt)])


@dataclass(frozen=True)
class Condition:
    """What the U-Net is told: B = 1 (no guidance) or 2 (negative first)."""

    context_BLD: Tensor
    added: dict[str, Tensor]  # text_embeds [B,P], time_ids [B,6]


def _condition(
    tokens: text.TagTokenizer,
    encoders: tuple[Any, Any],
    texts: Sequence[str],
    prompt: Prompt,
    device: torch.device,
    trained_as: TrainedAs,
) -> Condition:
    pairs = []
    for one in texts:
        content, cut = tokens.fit([], plain_tags(one), trained_as.max_tokens)
        if cut:
            log.warning("prompt %d: %d tags do not fit into %d tokens", prompt.index, cut, trained_as.max_tokens)
        pairs.append(tokens.chunk_ids(content, trained_as.max_tokens))
    ids_1_BN77, ids_2_BN77 = (torch.from_numpy(np.stack(ids)).to(device) for ids in zip(*pairs, strict=True))
    context_BLD, pooled_BP = text.encode(
        *encoders,
        ids_1_BN77,
        ids_2_BN77,
        context=trained_as.context,
        pooled_projection=trained_as.pooled_projection,
    )
    # A picture made on purpose is whole and of its own size: original = target, crop 0,0.
    size = text.size_vector(prompt.width, prompt.height, 0, 0, prompt.width, prompt.height)
    size_B6 = torch.tensor([size] * len(texts), dtype=torch.float32, device=device)
    return Condition(context_BLD, {"text_embeds": pooled_BP, "time_ids": size_B6})


def _guided(unet: Any, scaled_1CHW: Tensor, timestep: float, *, told: Condition, guidance: float) -> Tensor:
    """Classifier-free guidance from one call with the negative prompt in front, fp32."""
    dtype = next(unet.parameters()).dtype
    batch = told.context_BLD.shape[0]
    predicted_BCHW = unet(
        scaled_1CHW.to(dtype).expand(batch, -1, -1, -1),
        torch.full((batch,), timestep, device=scaled_1CHW.device),
        encoder_hidden_states=told.context_BLD.to(dtype),
        added_cond_kwargs={key: value.to(dtype) for key, value in told.added.items()},
        return_dict=False,
    )[0].float()
    if batch == 1:
        return predicted_BCHW
    negative_1CHW, positive_1CHW = predicted_BCHW.chunk(2)
    return negative_1CHW + guidance * (positive_1CHW - negative_1CHW)


def denoise(
    predict: Callable[[Tensor, float], Tensor],
    noise_S1CHW: Tensor,
    *,
    sampler: Sampler = "euler_a",
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Latents [1,C,H,W] in fp32 at training scale, after S - 1 steps; None when stopped on the way.

    `predict(x / sqrt(sigma^2 + 1), timestep)` is the network; `noise_S1CHW` the start and one draw per step.
    """
    sigmas, timesteps = noise_levels(len(noise_S1CHW) - 1, zero_terminal_snr=zero_terminal_snr)
    x_1CHW = noise_S1CHW[0] * sigmas[0]
    previous: tuple[Tensor, float] | None = None
    for step, timestep in enumerate(timesteps):
        if stop():
            return None
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        predicted_1CHW = predict(x_1CHW / (sigma**2 + 1) ** 0.5, timestep)
        clean_1CHW = to_clean(x_1CHW, predicted_1CHW, sigma, prediction)
        if sampler == "dpmpp_2m":
            x_1CHW, previous = dpmpp_2m_step(x_1CHW, clean_1CHW, sigma, sigma_next, previous), (clean_1CHW, sigma)
        else:
            drawn_1CHW = noise_S1CHW[step + 1] if sampler == "euler_a" else None
            x_1CHW = euler_step(x_1CHW, clean_1CHW, sigma, sigma_next, drawn_1CHW)
    return x_1CHW


def noise_levels(steps: int, *, zero_terminal_snr: bool = False) -> tuple[list[float], list[float]]:
    """(steps + 1 noise levels, falling, the last 0; steps timesteps from 999 on).

    sigma = sqrt((1 - a) / a) at timesteps spread evenly over the trained range down to 0, as A1111's Euler a does. (The
    "leading" spacing in SDXL's folders starts at 946 with 28 steps and never shows the network pure noise.) With zero
    terminal snr they are those of the "trailing" spacing that our exports name: 999, then every 1000/steps.
    """
    alphas = alphas_cumprod(zero_terminal_snr).numpy()
    if zero_terminal_snr:
        alphas[-1] = 2.0**-24  # an infinite noise level has no next one; as in diffusers
    timesteps = np.linspace(TIMESTEPS - 1, 0, steps)
    if zero_terminal_snr:
        timesteps = np.round(TIMESTEPS - np.arange(steps) * (TIMESTEPS / steps)) - 1
    sigmas = np.interp(timesteps, np.arange(TIMESTEPS), np.sqrt((1 - alphas) / alphas))
    return [*sigmas.tolist(), 0.0], timesteps.tolist()


def picture_noise(prompt: Prompt, steps: int, vae: Any) -> Tensor:
    """All noise of one picture, fp32 [steps + 1, 1, C, H, W] on the CPU: the start, then one draw per step.

    The start does not depend on `steps`, nor any of it on the other prompts of the file.
    """
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    if prompt.width % factor or prompt.height % factor:
        raise Halt(
            ExitCode.USAGE,
            f"prompts[{prompt.index}]: {prompt.width}x{prompt.height} px is no multiple of this VAE's factor {factor}",
        )
    shape = (steps + 1, 1, config.latent_channels, prompt.height // factor, prompt.width // factor)
    return torch.from_numpy(rng.normals(prompt.seed, rng.Stream.PREVIEW, max(prompt.index, 0), 0, shape))


def to_clean(x: Tensor, predicted: Tensor, sigma: float, prediction: str) -> Tensor:
    """The clean latents that a prediction at noise level `sigma` means; x = clean + sigma * noise."""
    if prediction == "v":
        return x / (sigma**2 + 1) - predicted * (sigma / (sigma**2 + 1) ** 0.5)
    return x - sigma * predicted


def euler_step(x: Tensor, clean: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
    """One Euler step from `sigma` to `sigma_next`; ancestral when `noise` (of x's shape) is given.

    Karras et al. 2022, algorithm 2 with the churn of k-diffusion's ancestral sampler: go down to sigma_down,
    add noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    up = 0.0
    if noise is not None:
        up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    down = (sigma_next**2 - up**2) ** 0.5
    stepped = x + (x - clean) / sigma * (down - sigma)
    return stepped if noise is None else stepped + noise * up


def dpmpp_2m_step(
    x: Tensor, clean: Tensor, sigma: float, sigma_next: float, previous: tuple[Tensor, float] | None
) -> Tensor:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); `previous` = (clean, sigma) of the step before."""
    if sigma_next == 0:
        return clean
    ratio = sigma_next / sigma
    if previous is None:
        return ratio * x + (1 - ratio) * clean
    previous_clean, previous_sigma = previous
    # Step lengths in log-SNR; r = the last one over this one.
    r = np.log(previous_sigma / sigma) / np.log(sigma / sigma_next)
    extrapolated = clean + (clean - previous_clean) / (2 * float(r))
    return ratio * x + (1 - ratio) * extrapolated


def decode(vae: Any, latents_BCHW: Tensor) -> list[Image.Image]:
    """Pictures of latents at training scale, outside autocast; a half VAE that must not run in half runs in fp32."""
    stored = next(vae.parameters()).dtype
    used = torch.float32 if stored == torch.float16 and vae.config.get("force_upcast") else stored
    with torch.autocast(latents_BCHW.device.type, enabled=False):
        nn.Module.to(vae, used)  # past the library's own .to, which warns at every dtype
        scaled_BCHW = (latents_BCHW / vae.config.scaling_factor).to(used)
        pixels_B3hw = vae.decode(scaled_BCHW, return_dict=False)[0].float()
        nn.Module.to(vae, stored)  # exact: fp16 to fp32 and back
    if not torch.isfinite(pixels_B3hw).all():
        log.warning("the VAE gave values that are not finite; they are shown black")
        pixels_B3hw = torch.nan_to_num(pixels_B3hw, nan=-1.0)
    levels_Bhw3 = ((pixels_B3hw.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in levels_Bhw3]


@contextmanager
def without_training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, eval mode; the training finds its modules as it left them."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    # Without autocast's cache: it would keep a half copy of every master weight until the last picture.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
