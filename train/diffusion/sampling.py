"""Pictures from the networks in training or from a finished model, with diffusers' schedulers: what users will run.

Noise is a function of (prompt seed, prompt index) alone: the start comes from the PREVIEW stream, the draws of Euler
ancestral from a CPU generator that it seeds. No global generator is read or written, so a run with previews trains the
same bits as one without.

Shape legend: B batch, C latent channels, H W latent rows and columns, N text chunks, L context length, D width,
P pooled width. Lower case h w are the picture's.
"""

from __future__ import annotations

import logging
import warnings
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
from train.config.derived import TrainedAs
from train.config.prompts import Prompt, PromptsFile, Sampler
from train.diffusion.noise import BETA_END, BETA_START, TIMESTEPS
from train.model import speed, text
from train.model.networks import embedding_as
from train.model.vae_file import LatentScale
from train.recipe import captions, rng
from train.recipe.captions import plain_tags

log = logging.getLogger("anix")


RECIPE = TrainedAs()
# Rectified flow: noise levels sigma = t / 1000 from 0.999 down, shifted. diffusers' Euler schedulers do not know them, its
# DPM-Solver++ does, and of first order that solver is Euler: as an ODE x + (sigma' - sigma) v, as an SDE the ancestral
# step (Lu et al., arXiv 2211.01095, eq. 9 and appendix A; with sigma / alpha in the place of Karras' sigma it is that of
# k-diffusion, eta 1).
FLOW = {"num_train_timesteps": TIMESTEPS, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SAMPLERS: dict[Sampler, dict[str, Any]] = {
    "euler_a": {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}, "euler": {"solver_order": 1}, "dpmpp_2m": {},
}  # fmt: skip


def sample_images(
    components: Any,
    prompts: Sequence[Prompt],
    *,
    sampler: Sampler = "euler_a",
    steps: int = 28,
    guidance: float = 7.0,
    guidance_rescale: float = 0.0,
    negative: str = "",
    prefix: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trained_as: TrainedAs = RECIPE,
    stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One picture per prompt, in order; fewer when `stop()` came true, which is asked before every network call.

    `components` has unet, text_encoder, text_encoder_2, vae, tokenizer (train.model.networks.Components), on `device`
    already (text encoders may lie elsewhere and come there while they run); they are put back into the mode they were in. `dtype` other than fp32 runs them under autocast.
    Raises Halt(USAGE) for a size the VAE cannot make.
    """
    device = torch.device(device)
    encoders = (components.text_encoder, components.text_encoder_2)
    tokens = text.TagTokenizer(components.tokenizer, getattr(components, "tokenizer_2", None))
    images: list[Image.Image] = []
    networks = (components.unet, *encoders, components.vae)
    embedding = embedding_as(components.unet, trained_as.timestep_embedding)
    with without_training(networks), embedding, _autocast(device, dtype):
        for prompt in prompts:
            if stop():
                break
            shown = captions_text(prompt.text, prefix)
            texts = [shown] if guidance == 1 else [negative, shown]
            with lent(encoders, device):
                condition = _condition(tokens, encoders, texts, prompt, device, trained_as)
            latents_1CHW = denoise(
                partial(_guided, components.unet, told=condition, guidance=guidance, rescale=guidance_rescale),
                picture_noise(prompt, components.vae).to(device),
                steps=steps,
                sampler=sampler,
                prediction=trained_as.prediction,
                zero_terminal_snr=trained_as.zero_terminal_snr,
                flow_shift=trained_as.flow_shift,
                generators=[step_generator(prompt)],
                stop=stop,
            )
            if latents_1CHW is None:
                break
            images.append(decode(components.vae, latents_1CHW)[0])
    return images


def sample_file(components: Any, settings: PromptsFile, **how: Any) -> list[Image.Image]:
    """`sample_images` of every prompt of a file, with its settings; `how` are the other arguments."""
    return sample_images(
        components, settings.prompts, sampler=settings.sampler, steps=settings.steps, guidance=settings.guidance,
        guidance_rescale=settings.guidance_rescale, negative=settings.negative, prefix=settings.quality_prefix, **how,
    )  # fmt: skip


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


def _guided(unet: Any, scaled_1CHW: Tensor, timestep: float, *, told: Condition, guidance: float, rescale: float) -> Tensor:
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
    return rescaled(negative_1CHW + guidance * (positive_1CHW - negative_1CHW), positive_1CHW, rescale)


def rescaled(guided_BCHW: Tensor, positive_BCHW: Tensor, share: float) -> Tensor:
    """The guided prediction, by `share` with the deviation of the unguided one (Lin et al., arXiv 2305.08891, eq. 15, 16)."""
    if not share:
        return guided_BCHW
    deviations = [one_BCHW.std(dim=(1, 2, 3), keepdim=True) for one_BCHW in (positive_BCHW, guided_BCHW)]
    alike_BCHW = guided_BCHW * (deviations[0] / deviations[1])
    return share * alike_BCHW + (1 - share) * guided_BCHW


def denoise(
    predict: Callable[[Tensor, float], Tensor],
    noise_BCHW: Tensor,
    *,
    steps: int,
    sampler: Sampler = "euler_a",
    prediction: str = "epsilon",
    zero_terminal_snr: bool = False,
    flow_shift: float = 1.0,
    generators: Sequence[torch.Generator] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Latents [B,C,H,W] in fp32 at training scale; None when stopped on the way.

    `predict(scaled latents, timestep)` is the network, `noise_BCHW` the start, `generators` one per picture, on the CPU,
    from which Euler ancestral draws the noise of its steps.
    """
    scheduler = scheduler_of(
        sampler, steps, prediction=prediction, zero_terminal_snr=zero_terminal_snr, flow_shift=flow_shift
    )
    draws = {"generator": list(generators)} if sampler == "euler_a" else {}
    x_BCHW = noise_BCHW * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        if stop():
            return None
        predicted_BCHW = predict(scheduler.scale_model_input(x_BCHW, timestep), float(timestep))
        x_BCHW = scheduler.step(predicted_BCHW, timestep, x_BCHW, return_dict=False, **draws)[0]
    return x_BCHW


def scheduler_of(
    sampler: Sampler, steps: int, *, prediction: str = "epsilon", zero_terminal_snr: bool = False, flow_shift: float = 1.0
) -> Any:
    """diffusers' scheduler of a sampler, its timesteps and noise levels set.

    Timesteps are spread evenly over the trained range from 999 on, as A1111 spreads them. (The "leading" spacing in SDXL's
    folders starts at 946 with 28 steps and never shows the network pure noise.) With zero terminal snr they have the
    "trailing" spacing that our exports name: 999, then every 1000/steps. Flow has noise levels of its own.
    """
    from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

    kinds: dict[Sampler, Any] = {
        "euler_a": EulerAncestralDiscreteScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler,
    }  # fmt: skip
    with warnings.catch_warnings():  # diffusers' own use of numpy
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        if prediction == "flow":
            scheduler = DPMSolverMultistepScheduler(**FLOW, flow_shift=flow_shift, **FLOW_SAMPLERS[sampler])
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(0)
            return scheduler
        scheduler = kinds[sampler](
            num_train_timesteps=TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear",
            prediction_type="v_prediction" if prediction == "v" else "epsilon", rescale_betas_zero_snr=zero_terminal_snr,
            # under "linspace" one step would stand at t = 0
            timestep_spacing="trailing" if zero_terminal_snr or steps == 1 else "linspace",
        )  # fmt: skip
        if sampler == "dpmpp_2m" and not zero_terminal_snr:
            # its own "linspace" would end at t = 999/steps, in one long last step
            scheduler.set_timesteps(timesteps=np.linspace(TIMESTEPS - 1, 0, steps).round().tolist())
        else:
            scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) > steps:  # "trailing" of 61 steps, and of some others, rounds to one more, at t = -1
        scheduler.timesteps = scheduler.timesteps[:steps]
        scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
    scheduler.set_begin_index(0)
    return scheduler


def picture_noise(prompt: Prompt, vae: Any) -> Tensor:
    """The noise that a picture starts from, fp32 [1,C,H,W] on the CPU; it does not depend on the file's other prompts."""
    config = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    if prompt.width % factor or prompt.height % factor:
        raise Halt(
            ExitCode.USAGE,
            f"prompts[{prompt.index}]: {prompt.width}x{prompt.height} px is no multiple of this VAE's factor {factor}",
        )
    shape = (1, config.latent_channels, prompt.height // factor, prompt.width // factor)
    return torch.from_numpy(rng.normals(prompt.seed, rng.Stream.PREVIEW, max(prompt.index, 0), 0, shape))


def step_generator(prompt: Prompt) -> torch.Generator:
    """Where the noise of a picture's steps comes from: on the CPU, so that a picture is the same on every device."""
    low, high = rng.words(prompt.seed, rng.Stream.PREVIEW, max(prompt.index, 0), 1, 2).tolist()
    return torch.Generator().manual_seed(low | high << 32)


def decode(vae: Any, latents_BCHW: Tensor) -> list[Image.Image]:
    """Pictures of latents at training scale, outside autocast; a half VAE that must not run in half runs in fp32."""
    stored = next(vae.parameters()).dtype
    used = torch.float32 if stored == torch.float16 and vae.config.get("force_upcast") else stored
    with torch.autocast(latents_BCHW.device.type, enabled=False):
        nn.Module.to(vae, used)  # past the library's own .to, which warns at every dtype
        scaled_BCHW = LatentScale.of(vae.config).to_vae(latents_BCHW).to(used)
        pixels_B3hw = vae.decode(scaled_BCHW, return_dict=False)[0].float()
        nn.Module.to(vae, stored)  # exact: fp16 to fp32 and back
    if not torch.isfinite(pixels_B3hw).all():
        log.warning("the VAE gave values that are not finite; they are shown black")
        pixels_B3hw = torch.nan_to_num(pixels_B3hw, nan=-1.0)
    levels_Bhw3 = ((pixels_B3hw.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in levels_Bhw3]


@contextmanager
def lent(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules on `device` inside, and afterwards where they lay: what a small card cannot keep beside the U-Net.

    One that lies there stays untouched: "cpu" to "cpu:0" is a copy to torch, of gradients too, and those of a training
    lie in buffers of their own.
    """
    homes = [next(module.parameters()).device for module in modules]
    away = [(module, home) for module, home in zip(modules, homes, strict=True) if _place(home) != _place(device)]
    for module, _ in away:
        nn.Module.to(module, device)  # past the library's own .to, which warns at every dtype
    try:
        yield
    finally:
        for module, home in away:
            nn.Module.to(module, home)


def _place(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


@contextmanager
def without_training(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, eval mode, nothing compiled; the training finds its modules, and its graphs, as it left them."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad(), speed.uncompiled():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _autocast(device: torch.device, dtype: torch.dtype) -> Any:
    # Without autocast's cache: it would keep a half copy of every master weight until the last picture.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
