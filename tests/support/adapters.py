"""Adapters with random values for the tiny SDXL, made by peft itself or written by hand in any trainer's names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from train.model.adapters.names import Names

TARGETS = r".*(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|conv1|conv2|conv_shortcut|time_emb_proj)$"
PEFT = {"lora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}


def injected(network: torch.nn.Module, kind: str, *, seed: int = 0, targets: str = TARGETS, **options: Any) -> torch.nn.Module:
    """`network` with peft's adapter of a kind, all its values random so that it changes something."""
    rank = {"lora": {"lora_alpha": 3}, "loha": {"alpha": 3}, "lokr": {"alpha": 3}}[kind]
    inject_adapter_in_model(PEFT[kind](**{"r": 2, "target_modules": targets, **rank, **options}), network)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    return network


def peft_folder(folder: Path, network: torch.nn.Module) -> Path:
    """What peft's own `save_pretrained` leaves of an injected network."""
    folder.mkdir()
    config = network.peft_config["default"]
    state = get_peft_model_state_dict(network, adapter_name="default")
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(told, default=str))
    return folder


def deltas(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What peft's layers add to their weights, by module."""
    found = {}
    for name, module in network.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach()
    return found


def kohya(known: Names, modules: Iterable[str], rank: int = 2, alpha: float | None = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA in kohya's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        module = known.modules[name]
        kernel = module.shape[2:]
        tensors[f"{module.kohya}.lora_down.weight"] = torch.randn(rank, *module.shape[1:], generator=generator) * 0.2
        tensors[f"{module.kohya}.lora_up.weight"] = torch.randn(module.shape[0], rank, *[1] * len(kernel), generator=generator) * 0.2
        if alpha is not None:
            tensors[f"{module.kohya}.alpha"] = torch.tensor(alpha)
    return tensors
