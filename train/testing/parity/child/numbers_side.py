"""The trainer's side of the arithmetic: embeddings, noise, weights of the loss, optimizers, schedule."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch

from train.testing.parity.child.options import of_notebook
from train.testing.parity.loader import Peer

Answer = tuple[dict[str, torch.Tensor], dict[str, Any]]


def numbers(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Embeddings, noise, tables and weights for what is given."""
    out = _embeddings(peer, tensors)
    out |= _tables(peer, tensors["timesteps"])
    for name, options in given["noises"].items():
        out |= _noise(peer, tensors, name, options)
    return out, {}


class _Caught(Exception):
    """Carries the embedding out of the U-Net's forward."""


def _embeddings(peer: Peer, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the U-Net's own forward makes of the timesteps, and the function for both shifts; the sizes' vector."""
    unet = peer.module("sdxl_original_unet")

    class Rest:
        model_channels = 320

        def time_embed(self, embedded: torch.Tensor) -> None:
            raise _Caught(embedded)

    timesteps, x = tensors["timesteps"], torch.zeros(len(tensors["timesteps"]), 4, 8, 8)
    caught = None
    try:
        unet.SdxlUNet2DConditionModel.forward(Rest(), x, timesteps, None, None)
    except _Caught as found:
        caught = found.args[0]
    by_shift = {f"embedding.{s}": unet.get_timestep_embedding(timesteps, 320, downscale_freq_shift=s) for s in (0, 1)}
    sizes = tensors["sizes"]
    vector = peer.module("sdxl_train_util").get_size_embeddings(sizes[:, :2], sizes[:, 2:4], sizes[:, 4:], "cpu")
    return {"embedding.unet": caught, "size_embedding": vector, **by_shift}


def scheduler_of(peer: Peer, *, zero_snr: bool = False) -> Any:
    """The noise scheduler as sdxl_train.py makes it."""
    from diffusers import DDPMScheduler

    custom = peer.module("custom_train_functions")
    made = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False
    )
    custom.prepare_scheduler_for_custom_training(made, torch.device("cpu"))
    if zero_snr:
        custom.fix_noise_scheduler_betas_for_zero_terminal_snr(made)
    return made


def _tables(peer: Peer, timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cumulative alphas with and without zero terminal SNR, and the weights of the loss at each timestep."""
    custom, plain = peer.module("custom_train_functions"), scheduler_of(peer)
    ones = torch.ones(len(timesteps))
    out = {
        "alphas": plain.alphas_cumprod,
        "alphas.zero_snr": scheduler_of(peer, zero_snr=True).alphas_cumprod,
        "min_snr": custom.apply_snr_weight(ones, timesteps, plain, 5.0),
        "min_snr.v": custom.apply_snr_weight(ones, timesteps, plain, 5.0, True),
        "debiased": custom.apply_debiased_estimation(ones, timesteps, plain),
    }
    if "v_prediction" in inspect.signature(custom.apply_debiased_estimation).parameters:
        out["debiased.v"] = custom.apply_debiased_estimation(ones, timesteps, plain, True)
    return out


@contextlib.contextmanager
def drawing(normals: torch.Tensor, offsets: torch.Tensor, timesteps: torch.Tensor) -> Iterator[None]:
    """The three draws of the noise function give what we drew: per value, per channel, timesteps."""
    draws: dict[str, Any] = {
        "randn_like": lambda like, **_: normals.to(like.dtype),
        "randn": lambda *_, **__: offsets,
        "randint": lambda *_, **__: timesteps,
    }
    kept = {name: getattr(torch, name) for name in draws}
    for name, draw in draws.items():
        setattr(torch, name, draw)
    try:
        yield
    finally:
        for name, draw in kept.items():
            setattr(torch, name, draw)


def _noise(peer: Peer, tensors: dict[str, torch.Tensor], name: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`noise.<name>` and `noisy.<name>` by the trainer's function, in the type that `dtype` names."""
    options = dict(options)
    latents = tensors["latents"].to(getattr(torch, options.pop("dtype")))
    with drawing(tensors["normals"], tensors["offsets"], tensors["timesteps"][: len(latents)]):
        found = peer.module("train_util").get_noise_noisy_latents_and_timesteps(
            of_notebook(**options), scheduler_of(peer), latents
        )
    return {f"noise.{name}": found[0], f"noisy.{name}": found[1]}


def optimizers(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Parameters after each step, `<optimizer>.<step>.<name>`, from `start.<name>` and `gradient.<step>.<name>`."""
    out: dict[str, torch.Tensor] = {}
    names = [name.removeprefix("start.") for name in tensors if name.startswith("start.")]
    for kind, options in given["kinds"].items():
        members = {name: torch.nn.Parameter(tensors[f"start.{name}"].clone()) for name in names}
        arguments = of_notebook(optimizer_type=kind, optimizer_args=options["arguments"])
        groups = [{"params": list(members.values()), "lr": options["lr"]}]
        optimizer = peer.module("train_util").get_optimizer(arguments, trainable_params=groups)[2]
        for step in range(given["steps"]):
            for name, parameter in members.items():
                parameter.grad = tensors[f"gradient.{step}.{name}"].clone()
            optimizer.step()
            out |= {f"{kind}.{step}.{name}": parameter.detach().clone() for name, parameter in members.items()}
    return out, {}


def schedule(peer: Peer, tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Answer:
    """Learning rate of every update, float64, by the scheduler that the options name, prepared by accelerate.

    With WORLD_SIZE set this is one of several processes, as the released run was.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(1))
    arguments = of_notebook(**given["options"])
    optimizer: Any = torch.optim.AdamW([{"params": [parameter], "lr": given["peak"]}])
    try:
        made = peer.module("train_util").get_scheduler_fix(arguments, optimizer, accelerator.num_processes)
    except ImportError as error:
        return {}, {"missing": str(error)}
    optimizer, moved = accelerator.prepare(optimizer, made)
    rates = torch.empty(given["updates"], dtype=torch.float64)
    for update in range(given["updates"]):
        rates[update] = optimizer.param_groups[0]["lr"]
        parameter.grad = torch.zeros(1)
        optimizer.step()
        moved.step()
        optimizer.zero_grad()
    facts = {"processes": accelerator.num_processes, "rank": int(os.environ.get("RANK", "0"))}
    return {"rates": rates}, facts
