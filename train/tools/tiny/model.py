"""A tiny SDXL with the real classes: U-Net with text_time conditioning, two CLIP encoders, KL VAE, CLIP tokenizers.

Same block types, same conditioning, same folder layout as SDXL's; only narrower. U-Net and encoders get their first
weights from a generator of their own, the VAE its trained ones from `assets/`. Nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import nn

from train.base.errors import ExitCode, Halt
from train.base.files import file_sha256, replace_file
from train.tools.tiny.tokenizer import EOS, build_vocabulary, write_tokenizer

MODEL_VERSION = 3  # raise it when the architecture or the first weights change
LICENSE = "Apache-2.0"  # of these weights; exports inherit it
_STAMP = "tiny.json"
_WIDTH_1, _WIDTH_2 = 32, 64  # of the text encoders; SDXL 768 and 1280
_TIME_WIDTH = 32  # per number of the size embedding; SDXL 256
_EMBEDDING_STD = 4.0  # CLIP's 0.02 belongs to trained encoders; attention finds a word sooner among loud ones
UNET = {
    "sample_size": 8,  # 64 px, the square of configs/tiny/dataset.yaml: what diffusers draws where no size is given
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 4, 4),  # diffusers' name; the values are numbers of heads, as in SDXL's config
    "use_linear_projection": True,
    "norm_num_groups": 16,
    "cross_attention_dim": _WIDTH_1 + _WIDTH_2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": _TIME_WIDTH,
    "projection_class_embeddings_input_dim": _WIDTH_2 + 6 * _TIME_WIDTH,
}


SCALING_FACTOR = 0.13025  # SDXL's
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 2,  # more would make it instance norm, which forgets colour
    "sample_size": 128,
    "scaling_factor": SCALING_FACTOR,
    "force_upcast": False,
}
VAE_WEIGHTS = Path(__file__).with_name("assets") / "tiny_vae.safetensors"  # of tests/support/make_tiny_vae.py


def write_model(folder: Path, seed: int = 5) -> bool:
    """Build the model folder; False when the same one is there already.

    Raises Halt(MISMATCH) when `folder` holds something else.
    """
    stamp = {"version": MODEL_VERSION, "seed": seed, "vae_sha256": file_sha256(VAE_WEIGHTS)}
    if folder.exists():
        found = json.loads((folder / _STAMP).read_text()) if (folder / _STAMP).is_file() else None
        if found != stamp:
            raise Halt(ExitCode.MISMATCH, f"{folder} holds another model ({found}); delete it or choose another --out")
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as temporary:
        partial = Path(temporary) / "model"
        _save(partial, seed)
        (partial / _STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        partial.rename(folder)
    return True


def _save(folder: Path, seed: int) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name, pad_token in (("tokenizer", EOS), ("tokenizer_2", "!")):  # as SDXL's folder declares them
        write_tokenizer(folder / name, pad_token)
    unet, text_encoder, text_encoder_2 = build_trainable(seed)
    with torch.random.fork_rng(devices=[]):
        vae = build_vae()
    vae.load_state_dict({name: value.float() for name, value in load_file(VAE_WEIGHTS).items()})
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        prediction_type="epsilon", steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    tokenizers = [CLIPTokenizer.from_pretrained(str(folder / name)) for name in ("tokenizer", "tokenizer_2")]
    written = {name: (folder / name, Path(shutil.copytree(folder / name, folder / f".{name}")))
               for name in ("tokenizer", "tokenizer_2")}
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=unet, scheduler=scheduler, add_watermarker=False,
    ).save_pretrained(str(folder), safe_serialization=True)  # fmt: skip
    for target, kept in written.values():  # save_pretrained leaves vocab.json and merges.txt out
        shutil.rmtree(target)
        kept.rename(target)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model",
                 "text_encoder_2/model"):
        _rewrite(folder / f"{name}.safetensors")


def _rewrite(path: Path) -> None:
    """Add the licence, and the `text_model.` prefix that transformers 5 leaves out and 4.x needs; usual file mode."""
    tensors: Mapping[str, torch.Tensor] = load(path.read_bytes())
    if path.parent.name.startswith("text_encoder"):
        tensors = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": value
                   for name, value in tensors.items()}
    replace_file(path, deterministic_file(dict(tensors), {"format": "pt", "modelspec.license": LICENSE}))


def build_vae() -> Any:
    """The network with whatever weights torch's generator gives."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def deterministic_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes depend on the arguments alone: the library writes metadata in random order."""
    plain = save(tensors)
    length = int.from_bytes(plain[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items()))} | json.loads(plain[8 : 8 + length])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + plain[8 + length :]


def build_trainable(seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(U-Net, encoder 1, encoder 2) with first weights that depend on `seed` alone."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, _ = build_vocabulary()
    common = {"vocab_size": len(vocabulary), "max_position_embeddings": 77, "bos_token_id": len(vocabulary) - 2,
              "eos_token_id": len(vocabulary) - 1}
    config_1 = CLIPTextConfig(hidden_size=_WIDTH_1, intermediate_size=4 * _WIDTH_1, num_hidden_layers=2,
                              num_attention_heads=2, hidden_act="quick_gelu", projection_dim=_WIDTH_1,
                              pad_token_id=len(vocabulary) - 1, **common)
    config_2 = CLIPTextConfig(hidden_size=_WIDTH_2, intermediate_size=4 * _WIDTH_2, num_hidden_layers=3,
                              num_attention_heads=4, hidden_act="gelu", projection_dim=_WIDTH_2, pad_token_id=0,
                              **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**UNET)
        encoders = CLIPTextModel(config_1), CLIPTextModelWithProjection(config_2)
        for encoder in encoders:
            for name, parameter in encoder.named_parameters():
                if "token_embedding" in name or "position_embedding" in name:
                    nn.init.normal_(parameter, std=_EMBEDDING_STD * (1.0 if "token" in name else 0.3))
    return unet, *encoders
