"""A tiny SDXL folder with random weights, in variants of the architecture, written with the stock libraries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from cliptokens import small_tokenizer
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from train.config.stage import ModelConfig
from train.model import clip_tokens, networks, source

VARIANTS: dict[str, dict[str, Any]] = {
    "like SDXL": {
        "block_out_channels": (16, 32, 32), "layers_per_block": 2, "transformer_layers_per_block": (1, 1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4, 4),
    },
    "two levels": {
        "block_out_channels": (16, 32), "layers_per_block": 1, "transformer_layers_per_block": (1, 3),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
    },
    "least": {
        "block_out_channels": (8, 16), "layers_per_block": 1, "transformer_layers_per_block": (1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 2),
    },
}  # fmt: skip


def build(variant: str = "two levels", seed: int = 0, *, clip: bool = False) -> StableDiffusionXLPipeline:
    """The stock pipeline over random weights; with CLIP's whole vocabulary where `clip`."""
    if clip:
        tokenizer, tokenizer_2 = clip_tokens.tokenizer("tokenizer"), clip_tokens.tokenizer("tokenizer_2")
    else:
        tokenizer, tokenizer_2 = small_tokenizer(), small_tokenizer("!")
    tokenizer.model_max_length = tokenizer_2.model_max_length = 77
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, norm_num_groups=8, use_linear_projection=True, cross_attention_dim=48,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 48,
            **VARIANTS[variant],
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.13025,
        )  # fmt: skip
        shape = {"num_attention_heads": 2, "num_hidden_layers": 3, **ids}
        one = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=32, projection_dim=16, **shape))
        two = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=32, intermediate_size=64, projection_dim=32, **shape)
        )
        for module in (unet, vae, one, two):
            for parameter in module.parameters():  # biases and norms too: a swapped constant would not show
                torch.nn.init.normal_(parameter, std=0.05)
    with warnings.catch_warnings():  # diffusers 0.42's schedulers on numpy 2.4
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler = EulerAncestralDiscreteScheduler()
    return StableDiffusionXLPipeline(
        vae=vae.eval(), text_encoder=one.eval(), text_encoder_2=two.eval(), tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=unet.eval(), scheduler=scheduler,
        add_watermarker=False,
    )  # fmt: skip


def write(
    folder: Path, variant: str = "two levels", seed: int = 0, dtype: torch.dtype = torch.float32, *, clip: bool = False
) -> Path:
    """`folder`, holding the model as the stock libraries save it."""
    build(variant, seed, clip=clip).to(dtype).save_pretrained(folder)
    return folder


def load_components(path: str | Path, *, with_vae: bool = True, tokenizers: str | None = None) -> networks.Components:
    """The components of a model path: run directory, diffusers folder or single file."""
    return networks.build(source.resolve(ModelConfig(init_from=str(path), tokenizers=tokenizers)), with_vae=with_vae)
