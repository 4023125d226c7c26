"""A model made ready to draw: run directory, checkpoint, diffusers folder or single file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from train.base.errors import ExitCode, Halt
from train.config.derived import TrainedAs
from train.config.prompts import Prompt, PromptsFile, checked
from train.diffusion.sampling import sample_file
from train.model import networks
from train.model.networks import Components
from train.model.sdxl import vae_factor
from train.observe import anymodel

log = logging.getLogger("anix")


ROOMY_BYTES = 10 * 2**30  # 7.1 GiB of weights in half precision, and what a step and a whole decode of 1024x1024 need
TILE_PX = 512
SMALL_NOTE = (
    f"little memory: text encoders are on the card only while they run (same pictures), the VAE decodes in tiles of {TILE_PX} px "
    "(each normalised by itself and blended at its edges: colours and finest detail differ a little from a whole decode)"
)


@dataclass(frozen=True)
class Model:
    """Networks on their device, and what a picture's record says about them."""

    components: Components
    name: str
    sha256: str
    trained_as: TrainedAs
    device: torch.device
    dtype: torch.dtype


def open_model(
    path: str | Path, *, device: str = "auto", tokenizers: str | None = None, small: bool | None = None, loras: Sequence[str] = ()
) -> Model:
    """The model at `path`, in half precision on a GPU, in fp32 on the CPU; conventions as it was trained.

    small: with as little memory of the card as goes (None: where less than 10 GiB of it are free): the text encoders lie
    there only while they run, and the VAE decodes in tiles, which is told with what it changes. loras: adapters to add, FILE
    or FILE:weight each.

    Raises Halt: USAGE (no such path, unknown device), MISMATCH (damaged model, tokenizers of another).
    """
    place = open_device(device)
    dtype = torch.float16 if place.type == "cuda" else torch.float32
    local = anymodel.with_adapters(anymodel.open_any(path, tokenizers=tokenizers), loras)
    if local.note:
        log.info("%s", local.note)
    components = networks.build(local)
    if small is None:
        small = place.type == "cuda" and torch.cuda.mem_get_info(place)[0] < ROOMY_BYTES
    if small:
        in_tiles(components.vae)
        log.info("%s", SMALL_NOTE)
    encoders_at = torch.device("cpu") if small else place
    for network, at in ((components.unet, place), (components.text_encoder, encoders_at), (components.text_encoder_2, encoders_at)):
        nn.Module.to(network, at, dtype)  # past the library's own .to, which warns at every dtype
    nn.Module.to(components.vae, place, torch.float32 if components.vae.config.get("force_upcast") else dtype)
    told = anymodel.conventions(Path(path), local)
    name = str(local.metadata.get("modelspec.title") or name_of(path))
    return Model(components, name, local.sha256, told, place, dtype)


def in_tiles(vae: Any) -> None:
    """Let the VAE decode in tiles of TILE_PX. The library's own size is the config's, 1024: it would take that in one."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_PX, TILE_PX // vae_factor(vae.config)


def draw(model: Model, settings: PromptsFile, *, stop: Callable[[], bool] = lambda: False) -> list[Image.Image]:
    """One picture for each prompt of `settings`."""
    told = {"device": model.device, "dtype": model.dtype, "trained_as": model.trained_as}
    return sample_file(model.components, settings, **told, stop=stop)


def adjusted(settings: PromptsFile, **changes: Any) -> PromptsFile:
    """`settings` with what the command line gave; None changes nothing.

    texts: prompts in place of the file's; size "WxH" and seed: for every prompt; steps, guidance, negative,
    quality_prefix, sampler: as in the file. Raises Halt(USAGE) naming what is out of range.
    """
    texts, size, seed = (changes.pop(name, None) for name in ("texts", "size", "seed"))
    prompts = [Prompt(text=text) for text in texts] if texts else list(settings.prompts)
    if size is not None:
        width, _, height = str(size).lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise Halt(ExitCode.USAGE, f"--size {size} is not of the form 832x1216")
        prompts = [replace(prompt, width=int(width), height=int(height)) for prompt in prompts]
    if seed is not None:
        prompts = [replace(prompt, seed=seed) for prompt in prompts]
    given = {name: value for name, value in changes.items() if value is not None}
    return checked(replace(settings, prompts=prompts, **given))


def name_of(path: str | Path) -> str:
    """`ft2` for runs/ft2, runs/ft2/model and ft2.safetensors alike."""
    resolved = Path(path).resolve()
    if resolved.name == "model":
        return resolved.parent.name
    # The end of a directory's name is no file type: animagine-xl-3.1.
    return resolved.stem if resolved.suffix == ".safetensors" else resolved.name


def open_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda[:N]` as a device. Raises Halt(USAGE) for anything else or a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Halt(ExitCode.USAGE, f"--device {name} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Halt(ExitCode.USAGE, f"--device {name}: this machine has no usable GPU; --device cpu works")
    return device
