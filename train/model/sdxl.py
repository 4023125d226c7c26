"""What an SDXL model is: the published configs, and how its tensors are called in both file layouts.

Two layouts hold the same numbers. The diffusers folder has one file per network with the libraries' names; the
original single file has the names of the first SDXL release, which every inference program opens. Here stands the
translation; nothing is read or written. It follows the U-Net's config, so it holds for smaller models of the family.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from train.base.errors import ExitCode, Halt

NETWORKS = ("unet", "text_encoder", "text_encoder_2", "vae")
PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
LOGIT_SCALE = PREFIXES["text_encoder_2"] + "logit_scale"  # in the single file only; no consumer reads it
LOGIT_SCALE_DEFAULT = 4.6052  # ln 100, where CLIP's training clips it
CONFIGS_KEY = "anix.configs"  # metadata of a single file whose architecture is not SDXL's own

SD1_SCALE = 0.18215  # also what diffusers takes where a VAE's config says nothing

# Empty tensors by which inference programs tell a v-prediction model, and one with zero terminal snr, from SDXL's own.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"

Configs = Mapping[str, Mapping[str, Any]]
Operation = Literal["copy", "join", "transpose", "to_conv"]

_CLIP = {
    "attention_dropout": 0.0, "dropout": 0.0, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    "initializer_factor": 1.0, "initializer_range": 0.02, "layer_norm_eps": 1e-5, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "vocab_size": 49408,
}  # fmt: skip
STANDARD: Configs = {  # stabilityai/stable-diffusion-xl-base-1.0
    "unet": {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
    },
    "text_encoder": {
        **_CLIP, "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": 768,
        "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
    },
    "text_encoder_2": {
        **_CLIP, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
        "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        # A file does not say whether its VAE survives fp16; upcasting is right for both kinds.
        "force_upcast": True, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "out_channels": 3, "sample_size": 1024, "scaling_factor": 0.13025,
    },
    "scheduler": {
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
        "timestep_spacing": "leading",
    },
}  # fmt: skip


def checked_vae(config: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """A VAE's config with its scaling_factor said, and a shift said as stock SDXL pipelines read it too: by channel.

    Raises Halt(MISMATCH) for a VAE whose latents are not SDXL's: what its config says and nobody here would apply.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise Halt(ExitCode.MISMATCH, f"{whose} is a VAE of the class {ascii(str(kind))[1:-1][:200]}; SDXL's is an AutoencoderKL")
    channels = config.get("latent_channels", 4)
    if channels != 4:
        raise Halt(ExitCode.MISMATCH, f"{whose} is a VAE of {channels} channels (SD3's and Flux's have 16); SDXL's has 4")
    factor = config.get("scaling_factor", SD1_SCALE)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e6:
        raise Halt(ExitCode.MISMATCH, f"{whose}: scaling_factor of its VAE config is no positive number")
    _check_shift(config, channels, whose)
    shift = config.get("shift_factor")  # read by SD3's pipelines alone
    told = {"latents_mean": [shift] * channels, "latents_std": [1.0] * channels} if shift else {}
    return {"scaling_factor": factor, **config, **told}


def _check_shift(config: Mapping[str, Any], channels: int, whose: str) -> None:
    """Halt(MISMATCH) for a shift that cannot be applied: one number, or one per channel with its deviation."""
    shift, mean, deviation = (config.get(key) for key in ("shift_factor", "latents_mean", "latents_std"))
    wrong = None if shift is None or _is_number(shift) else "shift_factor is no number"
    for key, values in (("latents_mean", mean), ("latents_std", deviation)):
        good = isinstance(values, list | tuple) and len(values) == channels and all(map(_is_number, values))
        if values is not None and not (good and (key == "latents_mean" or min(values) > 0)):
            wrong = f"{key} must be {channels} numbers{'' if key == 'latents_mean' else ' above 0'}"
    if (mean is None) != (deviation is None):
        wrong = wrong or "latents_mean and latents_std are given together"
    elif mean is not None and shift and list(mean) != [shift] * channels:
        wrong = wrong or "shift_factor and latents_mean say two things"
    if wrong:
        found = ascii(str({"shift_factor": shift, "latents_mean": mean, "latents_std": deviation}))[1:-1][:200]
        raise Halt(ExitCode.MISMATCH, f"{whose}: its VAE config: {wrong}; it says {found}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along a side (SDXL: 8)."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def drawn_at(unet: Mapping[str, Any], side_px: int, factor: int = 8) -> dict[str, Any]:
    """A U-Net config by which diffusers draws squares of that side where a call names no size; decides nothing else."""
    return {**unet, "sample_size": max(side_px // factor, 1)}


@dataclass(frozen=True)
class Link:
    """One tensor of the single file and the tensor, or for "join" the three, of the folder that it holds."""

    single: str
    folder: tuple[str, ...]  # canonical names, "unet.conv_in.weight"
    operation: Operation
    shape: tuple[int, ...]  # in the single file


def links(configs: Configs, networks: Sequence[str] = NETWORKS) -> list[Link]:
    """Every tensor of the model, or of some of its networks, in both layouts; logit_scale excepted.

    The folder's names and shapes come from the libraries' own classes, built without memory.
    """
    shapes = folder_shapes(configs, networks=networks)
    found = []
    for name, shape in shapes.items():
        network, _, key = name.partition(".")
        if ".q_proj." in key and network == "text_encoder_2":
            parts = tuple(name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
            joined = (3 * shape[0], *shape[1:])
            found.append(Link(_single_name(network, key, configs), parts, "join", joined))
        elif network == "text_encoder_2" and re.search(r"\.[kv]_proj\.", key):
            continue  # inside the join of its q_proj
        elif name == "text_encoder_2.text_projection.weight":
            found.append(Link(PREFIXES[network] + "text_projection", (name,), "transpose", (shape[1], shape[0])))
        elif network == "vae" and ".attentions." in key and len(shape) == 2:
            found.append(Link(_single_name(network, key, configs), (name,), "to_conv", (*shape, 1, 1)))
        else:
            found.append(Link(_single_name(network, key, configs), (name,), "copy", shape))
    return found


_NEEDED = {"unet": ("block_out_channels", "layers_per_block", "up_block_types"), "vae": ("block_out_channels",)}
_COUNTS = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
_MOST = 64  # layers, or levels of a network; SDXL's most is 32


def folder_shapes(
    configs: Configs, whose: str = "the model", networks: Sequence[str] = NETWORKS
) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the networks by canonical name.

    Raises Halt(MISMATCH) when the configs describe nothing that the libraries can build: files are not trusted.
    """
    for network in networks:
        for key in _NEEDED.get(network, ()):
            if key not in configs[network]:
                raise Halt(ExitCode.MISMATCH, f"{whose} is no SDXL model: its {network} config has no {key}")
        for key, value in configs[network].items():
            if not _moderate(value, _MOST if key in _COUNTS else None):
                raise Halt(ExitCode.MISMATCH, f"{whose} is no SDXL model: {key} of its {network} config is absurd")
    shapes: dict[str, tuple[int, ...]] = {}
    for network in networks:
        try:
            shapes |= _network_shapes(network, json.dumps(dict(configs[network])))
        except Exception as error:  # whatever the libraries' constructors raise at values they did not expect
            reason = ascii(str(error).partition("\n")[0][:200])
            raise Halt(
                ExitCode.MISMATCH,
                f"{whose} is no SDXL model: its configs cannot be built ({type(error).__name__}: {reason})",
            ) from error
    return shapes


def _moderate(value: Any, most: int | None) -> bool:
    """No list longer than a network has levels, and no number above `most`: building them would take for ever."""
    if isinstance(value, list | tuple):
        return len(value) <= _MOST and all(_moderate(inner, most) for inner in value)
    return most is None or not isinstance(value, int) or value <= most


@lru_cache(maxsize=16)  # a stage asks three times, and building SDXL takes seconds even without memory for it
def _network_shapes(network: str, config: str) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        model = make(network, json.loads(config))
    return {
        canonical(network, key): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if not key.endswith("position_ids")
    }


def make(network: str, config: Mapping[str, Any]) -> Any:
    """The libraries' module of one network, with whatever weights they begin with."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    own = copy.deepcopy(dict(config))  # they write into what they are given
    if network == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**own))
    if network == "text_encoder_2":
        return CLIPTextModelWithProjection(CLIPTextConfig(**own))
    return (UNet2DConditionModel if network == "unet" else AutoencoderKL).from_config(own)


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def canonical(network: str, key: str) -> str:
    """Name of a folder's tensor as we write it, whichever version of the libraries wrote the folder.

    transformers 5.6 dropped the `text_model.` prefix of encoder 1, and 4.x then fills the tensors it does not find
    with random numbers; so the prefix stays. Old VAE folders name their attention differently.
    """
    if network.startswith("text_encoder") and not key.startswith(("text_model.", "text_projection")):
        key = f"text_model.{key}"
    if network == "vae" and (match := re.search(r"\.attentions\.0\.(query|key|value|proj_attn)\.", key)):
        key = key.replace(f".{match[1]}.", f".{_OLD_VAE_ATTENTION[match[1]]}.")
    return f"{network}.{key}"


def canonical_name(name: str) -> str:
    """`canonical` of a parameter's name in a module that holds the networks ("unet.conv_in.weight")."""
    network, _, key = name.partition(".")
    return canonical(network, key) if network in NETWORKS else name


def _single_name(network: str, key: str, configs: Configs) -> str:
    if network == "unet":
        return PREFIXES[network] + _unet_name(key, configs["unet"])
    if network == "vae":
        return PREFIXES[network] + _vae_name(key, len(configs["vae"]["block_out_channels"]))
    if network == "text_encoder_2":
        return PREFIXES[network] + _open_clip_name(key)
    return PREFIXES[network] + key


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _unet_name(key: str, config: Mapping[str, Any]) -> str:
    """The original numbers its blocks through: conv_in is input block 0, then per level its resnets and a resize."""
    stem, _, leaf = key.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    side, rest = key.split(".", 1)
    if side == "mid_block":
        kind, number, inner = rest.split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_unet_inner(kind, inner)}"
    level_text, kind, number, inner = rest.split(".", 3)
    level = int(level_text)
    starts, resnets = _unet_starts(config, side)
    block = starts[level] + int(number)
    resize = starts[level] + resnets[level]
    if kind == "downsamplers":  # a block of its own
        return f"input_blocks.{resize}.0.op.{inner.removeprefix('conv.')}"
    if kind == "upsamplers":  # the last part of the level's last block, behind its attention if it has one
        attends = str(config["up_block_types"][level]).startswith("CrossAttn")
        return f"output_blocks.{resize - 1}.{2 if attends else 1}.{inner}"
    name = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{name}.{block}.{0 if kind == 'resnets' else 1}.{_unet_inner(kind, inner)}"


def _unet_starts(config: Mapping[str, Any], side: str) -> tuple[list[int], list[int]]:
    """(first block, resnets) of every level of one side."""
    levels = len(config["block_out_channels"])
    per_level = config["layers_per_block"]
    layers = [per_level] * levels if isinstance(per_level, int) else list(per_level)
    if side == "down_blocks":  # conv_in before; each level but the last ends in a downsampling block
        return [1 + sum(layers[:i]) + i for i in range(levels)], layers
    resnets = [count + 1 for count in reversed(layers)]
    return [sum(resnets[:i]) for i in range(levels)], resnets


def _unet_inner(kind: str, inner: str) -> str:
    if kind == "attentions":
        return inner
    part, leaf = inner.rsplit(".", 1)
    return f"{_UNET_RESNET[part]}.{leaf}"


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_name(key: str, levels: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if match := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", key):
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(.+)", key):
        return f"encoder.down.{match[1]}.{_vae_inner(match[2], 'downsample')}"
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(.+)", key):  # the original counts them from the picture's side
        return f"decoder.up.{levels - 1 - int(match[1])}.{_vae_inner(match[2], 'upsample')}"
    return key


def _vae_inner(inner: str, resize: str) -> str:
    return inner.replace("resnets.", "block.").replace(f"{resize}rs.0.", f"{resize}.")


_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.", "self_attn.q_proj.": "attn.in_proj_",
}  # fmt: skip


def _open_clip_name(key: str) -> str:
    if key in _OPEN_CLIP_ENDS:
        return _OPEN_CLIP_ENDS[key]
    number, inner = key.removeprefix("text_model.encoder.layers.").split(".", 1)
    for ours, theirs in _OPEN_CLIP_LAYER.items():
        if inner.startswith(ours):
            return f"transformer.resblocks.{number}.{theirs}{inner.removeprefix(ours)}"
    raise KeyError(key)
