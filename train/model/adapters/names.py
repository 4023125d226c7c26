"""What an adapter's file may call a module, in every spelling that trainers write, and what its tensors are called.

One table for all of them: a name is cut into module and tensor, the module flattened (dots to underscores) and looked
up. It holds SDXL's modules under the names of both layouts, so kohya's files (the U-Net in the single file's words),
OneTrainer's (and with dots, OMI's), ai-toolkit's and older ones (in diffusers' words, flattened) and diffusers' and peft's (with dots) all meet in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from train.model import sdxl

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# Prefixes of a flattened name; the longer ones first, since text_encoder is the head of text_encoder_2.
_PREFIXES = (
    ("text_encoder_2", ("lora_te2_", "te2_", "text_encoder_2_", "lora_text_encoder_2_", "clip_g_", "lycoris_text_encoder_2_")),
    ("text_encoder", ("lora_te1_", "te1_", "text_encoder_", "lora_text_encoder_", "clip_l_", "lycoris_text_encoder_")),
    ("unet", ("lora_unet_", "unet_", "diffusion_model_", "model_diffusion_model_", "lycoris_unet_")),
)  # fmt: skip
_PEFT = re.compile(r"^(base_model\.model\.)+")
_SLOT = r"(?:\.[A-Za-z0-9_-]+)?"  # peft names the adapter in between: lora_A.default.weight
# The tensors of an adapter by the end of their names: (kind, part). The form of the end is the whole of it.
_ENDS = tuple(
    (re.compile(rf"^(?P<module>.+?){form}$"), kind, part)
    for form, kind, part in (
        (r"[._]lora[._]down\.weight", "lora", "down"), (r"[._]lora[._]up\.weight", "lora", "up"),
        (r"\.lora_linear_layer\.down\.weight", "lora", "down"), (r"\.lora_linear_layer\.up\.weight", "lora", "up"),
        (rf"\.lora_A{_SLOT}\.weight", "lora", "down"), (rf"\.lora_B{_SLOT}\.weight", "lora", "up"),
        (r"\.lora_mid\.weight", "lora", "mid"), (r"\.dora_scale", "any", "dora"),
        (rf"\.lora_magnitude_vector{_SLOT}(?:\.weight)?", "any", "magnitude"), (r"\.magnitude", "any", "magnitude"), (r"\.alpha", "any", "alpha"),
        (r"\.diff", "full", "diff"), (r"\.w_norm", "full", "diff"), (r"\.b_norm", "full", "bias"), (r"\.diff_b", "any", "bias"),
        *((rf"\.hada_{part}{_SLOT}", "loha", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *((rf"\.lokr_{part}{_SLOT}", "lokr", part) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    )
)  # fmt: skip
_LYCORIS = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "dora": "dora_scale", "diff": "diff", "bias": "diff_b"}
_NORM = {"diff": "w_norm", "bias": "b_norm"}


@dataclass(frozen=True)
class Module:
    """A module that an adapter can reach: its weight's shape (a norm's is a vector), and its names."""

    name: str  # canonical, without ".weight": unet.conv_in
    shape: tuple[int, ...]
    bias: bool  # it has one
    kohya: str  # lora_unet_input_blocks_0_0
    usual: bool  # sd-scripts trains it, so every program that reads its files knows it


class Names:
    """The modules of one architecture, and who is meant by a name in a file."""

    def __init__(self, configs: sdxl.Configs) -> None:
        self.modules = {module.name: module for module in _modules(configs)}
        self._flat: dict[str, str] = {}
        for module in self.modules.values():
            network, _, key = module.name.partition(".")
            inner = module.kohya.removeprefix(f"{KOHYA[network]}_")
            for spelling in (_flattened(key), inner, inner.removeprefix("text_model_")):
                self._flat[f"{network}/{spelling}"] = module.name

    def module(self, name: str, network: str | None = None) -> str | None:
        """The canonical module that is meant by a module's name in a file; None for what SDXL does not have.

        network: whose the file is, where its names do not say.
        """
        flat = _flattened(_PEFT.sub("", name).replace(".processor.", "."))
        told = [(of, flat.removeprefix(p)) for of, prefixes in _PREFIXES for p in prefixes if flat.startswith(p)]
        for of, inner in [*told, *([(network, flat)] if network else [])]:
            for spelling in (inner, f"{inner}_0"):  # old attention processors say to_out where the layer is to_out.0
                if (found := self._flat.get(f"{of}/{spelling}")) is not None:
                    return found
        return None


@lru_cache(maxsize=8)
def _cached(configs: str) -> Names:
    import json

    return Names(json.loads(configs))


def names_of(configs: sdxl.Configs) -> Names:
    """The names for an architecture, made once for each."""
    import json

    return _cached(json.dumps({network: dict(configs[network]) for network in NETWORKS}, sort_keys=True, default=str))


def split(name: str) -> tuple[str, str, str] | None:
    """(module, kind, part) of a tensor's name in a file; None where it has no ending of an adapter's."""
    for form, kind, part in _ENDS:
        if (match := form.match(name)) is not None:
            return match["module"], kind, part
    return None


def kohya_key(module: Module, kind: str, part: str) -> str:
    """What kohya's and LyCORIS' files call a part: lora_unet_....lora_down.weight, ....hada_w1_a, ....lokr_w2, ....alpha."""
    if len(module.shape) == 1:
        return f"{module.kohya}.{_NORM[part]}"
    prefix = {"loha": "hada_", "lokr": "lokr_"}.get(kind, "")
    return f"{module.kohya}.{_LYCORIS.get(part, part if part == 'alpha' else prefix + part)}"


def _flattened(name: str) -> str:
    return name.replace(".", "_")


def _modules(configs: sdxl.Configs) -> Iterator[Module]:
    """Every matrix, convolution and norm; embeddings are none."""
    every = sdxl.folder_shapes(configs, networks=NETWORKS)
    for link in sdxl.links(configs, NETWORKS):
        for name in link.folder:
            shape = every[name]
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or len(shape) not in (1, 2, 4) or "embeddings." in name:
                continue
            network, _, key = module.partition(".")
            inner = link.single.removeprefix(sdxl.PREFIXES["unet"]).removesuffix(".weight") if network == "unet" else key
            usual = is_usual(module) and len(shape) > 1
            yield Module(module, tuple(shape), f"{module}.bias" in every, f"{KOHYA[network]}_{_flattened(inner)}", usual)


def is_usual(name: str) -> bool:
    """Whether sd-scripts trains a canonical module, so that every program that reads its files knows it."""
    network, _, key = name.partition(".")
    if network == "unet":
        return any(part in key for part in ("attentions.", "resnets.", "downsamplers.", "upsamplers."))
    return ".self_attn." in key or ".mlp." in key
