"""The networks of one stage: loading, the one module that accelerate wraps, and what of it is trained.

Shape legend: B images, C latent channels, H W latent rows and columns, N text chunks, L context vectors, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train import text
from train.exits import ExitCode, Halt

GROUPS = ("unet", "text_encoder", "text_encoder_2")  # parameter groups, in the order of the optimizer


@dataclass(frozen=True)
class Components:
    """Everything an SDXL folder holds. `vae` is None where only the denoiser is needed."""

    unet: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    vae: Any
    folder: Path  # where the configs, tokenizers and the scheduler of an export come from


def load_components(folder: str | Path, *, with_vae: bool = True, vae: str | Path | None = None) -> Components:
    """The components of a diffusers SDXL folder in fp32, on the CPU, in eval mode.

    `vae` names a folder that replaces the folder's own. Raises Halt(MISMATCH) naming the missing or broken part.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise Halt(ExitCode.MISMATCH, f"{folder} is no diffusers folder: it has no model_index.json")
    vae_folder = Path(vae) if vae is not None else folder / "vae"
    return Components(
        unet=_load(UNet2DConditionModel, folder / "unet"),
        text_encoder=_load(CLIPTextModel, folder / "text_encoder"),
        text_encoder_2=_load(CLIPTextModelWithProjection, folder / "text_encoder_2"),
        tokenizer=text.load_tokenizer(folder / "tokenizer"),
        tokenizer_2=text.load_tokenizer(folder / "tokenizer_2"),
        vae=_load(AutoencoderKL, vae_folder) if with_vae else None,
        folder=folder,
    )


def _load(kind: Any, folder: Path) -> Any:
    """One network in fp32. A missing tensor is an error: the libraries would fill it with random numbers."""
    if not (folder / "config.json").is_file():
        raise Halt(ExitCode.MISMATCH, f"{folder} has no config.json: not a complete diffusers folder")
    if not list(folder.glob("*.safetensors")):
        raise Halt(ExitCode.MISMATCH, f"{folder} holds no .safetensors weights (pickled weights are refused)")
    try:
        loaded, info = kind.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Halt(ExitCode.MISMATCH, f"{folder} cannot be loaded: {error}") from error
    missing = sorted(name for name in info["missing_keys"] if "position_ids" not in name)
    wrong = sorted(str(name) for name in info.get("mismatched_keys", []))
    if missing or wrong:
        raise Halt(
            ExitCode.MISMATCH, f"{folder} does not fit its config.json: missing {missing[:5]}, wrong {wrong[:5]}"
        )
    return loaded.eval()


class Networks(nn.Module):
    """U-Net and both text encoders as one module, so that DDP sees one model and syncs once per update."""

    def __init__(
        self, components: Components, *, train_text_encoders: bool, context: str, pooled_projection: str
    ) -> None:
        super().__init__()
        self.unet = components.unet
        self.text_encoder = components.text_encoder
        self.text_encoder_2 = components.text_encoder_2
        self.train_text_encoders = train_text_encoders
        self.context = context
        self.pooled_projection = pooled_projection
        self.requires_grad_(False)
        self.unet.requires_grad_(True)
        if train_text_encoders:
            self.text_encoder.requires_grad_(True)
            self.text_encoder_2.requires_grad_(True)
            _freeze_unused(self.text_encoder)

    def forward(
        self,
        noisy_BCHW: torch.Tensor,
        timesteps_B: torch.Tensor,
        ids_1_BN77: torch.Tensor,
        ids_2_BN77: torch.Tensor,
        size_B6: torch.Tensor,
    ) -> torch.Tensor:
        """The U-Net's prediction [B,C,H,W] for noisy latents, timesteps, token ids and the six size numbers."""
        with torch.set_grad_enabled(self.train_text_encoders and torch.is_grad_enabled()):
            context_BLD, pooled_BP = text.encode(
                self.text_encoder,
                self.text_encoder_2,
                ids_1_BN77,
                ids_2_BN77,
                context=self.context,
                pooled_projection=self.pooled_projection,
            )
        added = {"text_embeds": pooled_BP, "time_ids": size_B6}
        return self.unet(
            noisy_BCHW, timesteps_B, encoder_hidden_states=context_BLD, added_cond_kwargs=added, return_dict=False
        )[0]


def _freeze_unused(text_encoder: nn.Module) -> None:
    """Encoder 1 is read before its last layer, so that layer and the final norm get no gradient."""
    names = [name for name, _ in text_encoder.named_parameters() if "layers." in name]
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in names)
    for name, parameter in text_encoder.named_parameters():
        if f"layers.{last}." in name or "final_layer_norm" in name:
            parameter.requires_grad_(False)


def canonical(name: str) -> str:
    """Parameter name as it stands in our files, equal for every supported transformers version.

    transformers 5.6 dropped the `text_model.` prefix of encoder 1; files keep it, because older readers
    fill the tensors they do not find with random numbers.
    """
    head, _, rest = name.partition(".")
    if head in ("text_encoder", "text_encoder_2") and not rest.startswith(("text_model.", "text_projection")):
        return f"{head}.text_model.{rest}"
    return name


def trained_parameters(networks: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, trained ones only, in module order."""
    return {canonical(n): p for n, p in networks.named_parameters() if p.requires_grad}


def parameter_groups(networks: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by group; groups without any are left out."""
    trained = trained_parameters(networks)
    grouped = {g: {n: p for n, p in trained.items() if n.startswith(f"{g}.")} for g in GROUPS}
    return {group: parameters for group, parameters in grouped.items() if parameters}


def overlay(networks: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy named fp32 tensors (a checkpoint's model file) over the loaded parameters, in place."""
    own = {canonical(name): parameter for name, parameter in networks.named_parameters()}
    foreign = sorted(set(tensors) - set(own))
    wrong = sorted(n for n, t in tensors.items() if n in own and t.shape != own[n].shape)
    if foreign or wrong:
        raise Halt(ExitCode.MISMATCH, f"{source} is of another model: foreign {foreign[:5]}, wrong shape {wrong[:5]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def cast_frozen(networks: Networks, dtype: torch.dtype) -> None:
    """Frozen encoders run in the compute dtype; trained weights stay fp32 masters."""
    if not networks.train_text_encoders:
        networks.text_encoder.to(dtype)
        networks.text_encoder_2.to(dtype)


def set_train_mode(networks: Networks) -> None:
    """Trained parts in train mode; refuses dropout, because it would draw from the global generator."""
    networks.eval()
    networks.unet.train()
    if networks.train_text_encoders:
        networks.text_encoder.train()
        networks.text_encoder_2.train()
    dropping = [name for name, probability in _dropouts(networks) if probability > 0]
    if dropping:
        raise Halt(ExitCode.MISMATCH, f"the model uses dropout in {dropping[:3]}: set it to 0 in its config.json")


def _dropouts(networks: nn.Module) -> Iterator[tuple[str, float]]:
    for name, module in networks.named_modules():
        if isinstance(module, nn.Dropout):
            yield name, module.p
        elif hasattr(module, "config") and getattr(module.config, "attention_dropout", 0):
            yield name, float(module.config.attention_dropout)


def scaling_factor(folder: Path) -> float:
    """Factor between the VAE's latents and what the U-Net sees, from the VAE's config.json (SDXL: 0.13025)."""
    path = folder / "config.json"
    try:
        return float(json.loads(path.read_text())["scaling_factor"])
    except (OSError, KeyError, ValueError) as error:
        raise Halt(ExitCode.MISMATCH, f"{path} names no scaling_factor: {error}") from error
