"""Trains the tiny world's VAE and writes the weights that the product keeps: `python tests/support/make_tiny_vae.py`.

A real `AutoencoderKL` (8x down, 4 channels), only narrow. It is trained once, on one CPU core in about ten minutes,
because a picture's hair can only follow its tag if the VAE has learnt colour. The kept weights: 3,500 updates of 8,000,
then `--start` from those with `--updates 1200 --lr 1.5e-3`. At the end the mean and scale of each
latent channel are folded into its 1x1 convolutions, so that latents times 0.13025, SDXL's factor, are standard normal.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from train.base.files import replace_file
from train.tools.tiny.draw import draw
from train.tools.tiny.model import SCALING_FACTOR, VAE_WEIGHTS, build_vae, deterministic_file
from train.tools.tiny.posts import make_post

# Shape legend: B batch, C channels, H height, W width (pixels in pictures, pixels / 8 in latents).
_WORLD_SEED = 0  # not the seed of any shipped world
_BATCH = 8
_KL_WEIGHT = 1e-3  # posterior deviation near 0.15 of the latents': the decoder then forgives a sampler's errors


@torch.no_grad()
def first_weights(vae: AutoencoderKL) -> None:
    """Start as a nearly linear resampler with little noise; from diffusers' defaults colour takes ten times longer."""
    for name, weight in vae.named_parameters():
        if name.endswith("conv2.weight") or "to_out.0.weight" in name:
            weight.zero_()  # every residual block begins as the identity
        elif "samplers" in name and name.endswith("weight"):
            weight.mul_(0.3).add_(torch.nn.init.dirac_(torch.empty_like(weight)))
        elif name.endswith(("conv_in.weight", "conv_shortcut.weight", "conv_out.weight")):
            weight.mul_(1.5)
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= 5
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] -= 4


def pictures(count: int) -> list[torch.Tensor]:
    """uint8 [3, H, W] pictures of a world of their own, at the area the tiny configs train at."""
    result = []
    for number in range(count):
        post = make_post(_WORLD_SEED, number + 1000, count + 1000)
        image = draw(post.look, post.width, post.height, number)
        scale = (128 * 160 / (post.width * post.height)) ** 0.5
        size = max(64, round(post.width * scale)), max(64, round(post.height * scale))
        array = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
        result.append(torch.from_numpy(array.copy()).permute(2, 0, 1))
    return result


def batch_of(source: list[torch.Tensor], size: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """float [size, 3, side, side] random crops in -1..1."""
    crops = []
    for number in torch.randint(len(source), (size,), generator=generator).tolist():
        _, height, width = source[number].shape
        top = int(torch.randint(height - side + 1, (1,), generator=generator))
        left = int(torch.randint(width - side + 1, (1,), generator=generator))
        crops.append(source[number][:, top : top + side, left : left + side])
    return torch.stack(crops).float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, pixels_BCHW: torch.Tensor, noise_BCHW: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(loss, mean absolute error): squares for colour, L1 on pixels and edges for sharpness, plus KL."""
    posterior = vae.encode(pixels_BCHW).latent_dist
    latents = posterior.mean + posterior.std * noise_BCHW
    rebuilt = vae.decode(latents).sample
    difference = rebuilt - pixels_BCHW
    error = difference.abs().mean()
    edges = sum(
        F.l1_loss(rebuilt.diff(dim=axis), pixels_BCHW.diff(dim=axis)) for axis in (2, 3)
    )
    variance = posterior.mean.square() + posterior.var - 1 - posterior.logvar
    loss = difference.square().mean() + 0.5 * error + 0.25 * edges + _KL_WEIGHT * 0.5 * variance.mean()
    return loss, float(error.detach())


@torch.no_grad()
def normalise(vae: AutoencoderKL, source: list[torch.Tensor]) -> None:
    """Fold each channel's mean and deviation into the 1x1 convolutions: latents x 0.13025 get mean 0, variance 1."""
    generator = torch.Generator().manual_seed(9)
    means = torch.cat([vae.encode(batch_of(source, 16, 64, generator)).latent_dist.sample(generator)
                       for _ in range(24)])
    scale_latents(vae, 1 / (means.std(dim=(0, 2, 3)) * SCALING_FACTOR), means.mean(dim=(0, 2, 3)))


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, factor_C: torch.Tensor, mean_C: torch.Tensor) -> None:
    """Replace the latents by (latents - mean) x factor, per channel; what the decoder makes of them stays the same."""
    channels = vae.config.latent_channels
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:channels] *= factor_C[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean_C) * factor_C
    out.bias[channels:] += 2 * factor_C.log()  # the second half is the log variance
    back.bias += (back.weight[:, :, 0, 0] * mean_C[None, :]).sum(dim=1)
    back.weight /= factor_C[None, :, None, None]


def train(updates: int, count: int, peak_lr: float, out: Path, start: Path | None) -> None:
    """Train from a fixed seed, or on from the weights `start`, and write fp16 weights to `out`."""
    torch.manual_seed(7)
    vae, source = build_vae(), pictures(count)
    if start is None:
        first_weights(vae)
    else:
        vae.load_state_dict({name: value.float() for name, value in load_file(start).items()})
        scale_latents(vae, torch.full((4,), SCALING_FACTOR), torch.zeros(4))
    generator = torch.Generator().manual_seed(8 if start is None else 10)
    optimizer = torch.optim.Adam(vae.parameters(), lr=peak_lr)
    for update in range(updates):
        rate = min(1.0, (update + 1) / 50) * 0.5 * (1 + np.cos(np.pi * update / updates))
        optimizer.param_groups[0]["lr"] = peak_lr * max(rate, 0.01)
        pixels = batch_of(source, _BATCH, 64, generator)
        loss, error = loss_of(vae, pixels, torch.randn(_BATCH, 4, 8, 8, generator=generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if update % 100 == 0 or update == updates - 1:
            print(f"{update} loss {loss.item():.4f} error {error:.4f} cpu {time.process_time():.0f} s", flush=True)
        if update % 500 == 499 or update == updates - 1:
            final = build_vae()
            final.load_state_dict(vae.state_dict())
            normalise(final, source)
            weights = {name: value.to(torch.float16).contiguous() for name, value in final.state_dict().items()}
            facts = {"modelspec.license": "Apache-2.0", "updates": str(update + 1)}
            replace_file(out, deterministic_file(weights, facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="go on from these weights instead of from scratch")
    parser.add_argument("--out", type=Path, default=VAE_WEIGHTS)
    options = parser.parse_args()
    train(options.updates, options.pictures, options.lr, options.out, options.start)
