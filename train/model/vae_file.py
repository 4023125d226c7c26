"""A VAE wherever one is asked for: its folder, a model that has one, or a file in any of its three layouts.

The layouts of a file: diffusers' names (as in the folder), the first release's names alone, and the same names behind
`first_stage_model.`, alone or in a whole checkpoint. Whose latents nobody here could read is refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.model import folder as model_folder
from train.model import layouts, other_kinds, prediction, sdxl
from train.storage import tensor_files
from train.storage.tensor_files import Blob

if TYPE_CHECKING:
    from torch import Tensor

_WAYS = "name a VAE folder, a model folder with vae/, or a .safetensors file"


@dataclass(frozen=True)
class Vae:
    """A VAE on this machine, its weights not read yet."""

    config: Mapping[str, Any]
    weights: model_folder.Weights  # by canonical name, "vae.quant_conv.weight"
    file: Path
    notes: tuple[str, ...] = ()  # what was passed over or adapted


@dataclass(frozen=True)
class LatentScale:
    """How a VAE's latents z become what the U-Net sees: (z - mean) * scale / deviation, by channel.

    From its config: `scaling_factor`; `shift_factor` is the mean of all channels (as SD3's pipelines read it), and
    `latents_mean` with `latents_std` are given by channel (as SDXL's pipeline reads them).
    """

    scale: float
    mean: tuple[float, ...] = ()  # () = 0
    deviation: tuple[float, ...] = ()  # () = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentScale:
        """Of a VAE's config as `sdxl.checked_vae` left it."""
        shift, channels = config.get("shift_factor") or 0.0, config.get("latent_channels", 4)
        mean = tuple(config.get("latents_mean") or ())
        mean = mean or ((float(shift),) * channels if shift else ())
        return cls(float(config["scaling_factor"]), mean, tuple(config.get("latents_std") or ()))

    def to_model(self, latents_BCHW: Tensor) -> Tensor:
        """What the U-Net sees, of the VAE's own latents."""
        if self.mean:
            latents_BCHW = latents_BCHW - _by_channel(self.mean, latents_BCHW)
        scaled_BCHW = latents_BCHW * self.scale
        return scaled_BCHW / _by_channel(self.deviation, latents_BCHW) if self.deviation else scaled_BCHW

    def to_vae(self, latents_BCHW: Tensor) -> Tensor:
        """The VAE's own latents, of what the U-Net sees."""
        if self.deviation:
            latents_BCHW = latents_BCHW * _by_channel(self.deviation, latents_BCHW)
        own_BCHW = latents_BCHW / self.scale
        return own_BCHW + _by_channel(self.mean, latents_BCHW) if self.mean else own_BCHW

    def mark(self) -> str:
        """For a model's identity, such as `0.13025`."""
        parts = [self.scale, *([self.mean] if self.mean or self.deviation else []), *([self.deviation] if self.deviation else [])]
        return "/".join(",".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts)


def _by_channel(values: tuple[float, ...], like_BCHW: Tensor) -> Tensor:
    return like_BCHW.new_tensor(values).view(1, -1, 1, 1)


def open_vae(path: Path, asked_by: str, like: Mapping[str, Any] | None = None) -> Vae:
    """The VAE at `path`, complete; `asked_by` is the key or option that names it.

    `like` is the config of the VAE whose place it takes in a model, None where it stands for itself.
    A file says nothing of its config: it is that of the config.json beside it, or of its metadata, else `like`
    where the shapes are the same, else SDXL's.
    Raises Halt: USAGE (no such path), MISMATCH (no VAE of SDXL's kind; says what it is).
    """
    if not path.exists():
        raise Halt(ExitCode.USAGE, f"{asked_by} {path} does not exist: {_WAYS}")
    file = path if path.is_file() else _file_in(path, asked_by)
    source = tensor_files.open_file(file)
    beside = read_json(file.parent / "config.json") or {}
    stored = prediction.configs_of(source.metadata, source.blobs, str(file))["vae"]
    if str(beside.get("_class_name", "")).startswith(("Autoencoder", "Asymmetric", "VQ", "Consistency")):
        config: Mapping[str, Any] = beside
    elif like is not None and sdxl.CONFIGS_KEY not in source.metadata and _fits(source, like):
        config = like
    else:
        config = stored
    config = sdxl.checked_vae(config, f"{asked_by} {path}")
    if like is not None:
        refuse_other_scale(config, like, f"{asked_by} {path}")
    other_kinds.refuse_as_vae(file, source.blobs, asked_by)
    reading = read_weights(source, config)
    return Vae(config, reading.weights, file, reading.notes)


def refuse_other_scale(config: Mapping[str, Any], like: Mapping[str, Any], whose: str) -> None:
    """Halt(MISMATCH) for Stable Diffusion 1's VAE in the place of SDXL's: of the same shapes, with other latents."""
    if config["scaling_factor"] == sdxl.SD1_SCALE != like.get("scaling_factor", sdxl.SD1_SCALE):
        raise Halt(
            ExitCode.MISMATCH,
            f"{whose}: its scaling_factor is {sdxl.SD1_SCALE} (or not set, which means that), that of Stable Diffusion 1's "
            f"VAE; the model's own is {like['scaling_factor']}. Name SDXL's VAE; if this is one, set scaling_factor in its config.json",
        )


def read_weights(source: tensor_files.Tensors, config: Mapping[str, Any]) -> layouts.Reading:
    """The VAE of `config` in a file's tensors, behind a prefix or not. Raises Halt(MISMATCH) as `layouts.read`."""
    behind_prefix = any(layouts.placed(name)[0] == "vae" for name in source.blobs)
    configs = {**sdxl.STANDARD, "vae": config}
    return layouts.read(source.path, source.blobs, configs, ("vae",), alone=not behind_prefix)


def _fits(source: tensor_files.Tensors, config: Mapping[str, Any]) -> bool:
    try:
        read_weights(source, config)
    except Halt:
        return False
    return True


def _file_in(folder: Path, asked_by: str) -> Path:
    """The weights file in a VAE's folder, in a model's, or in a finished run's model."""
    for place in (folder / "vae", folder / "model" / "vae", folder):
        if place != folder and place.is_dir():
            return layouts.weight_files(place)[0]
    if (folder / "model_index.json").is_file():
        raise Halt(ExitCode.MISMATCH, f"{asked_by} {folder} is a model folder without vae/: {_WAYS}")
    found = sorted(folder.glob("*.safetensors"))
    if not found and not (folder / "config.json").is_file():
        raise Halt(ExitCode.USAGE, f"{asked_by} {folder} holds no VAE (no config.json, no .safetensors): {_WAYS}")
    return layouts.weight_files(folder)[0]


def identity(weights: Mapping[str, Blob]) -> str:
    """sha256 over weights rounded to fp16: the same for a model, its fp16 export and its single file."""
    digest = hashlib.sha256()
    for name, blob in sorted(weights.items()):
        digest.update(f"{name} {list(blob.shape)}\n".encode())
        for piece in _rounded(name, blob):
            digest.update(piece)
    return digest.hexdigest()


def _rounded(name: str, blob: Blob) -> Iterator[memoryview]:
    return tensor_files.cast(blob, "F16", name).pieces()
