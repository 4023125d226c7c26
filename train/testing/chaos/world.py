"""The smallest stage that is still the real thing: a random SDXL of 0.2 M parameters, 64 drawn latents, one YAML.

What fault tests and `scripts/chaos.py` train: real classes, real files, an update in hundredths of a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from train.data.index_writer import build_index
from train.data.shards import write_shard
from train.prepare.tables.schemas import SELECT
from train.recipe import rng
from train.tools.tiny.tokenizer import EOS, build_vocabulary, write_tokenizer

BUCKETS = {(64, 64): 32, (64, 96): 20, (96, 64): 12}  # bucket: images
TAGS = ("smile", "red hair", "blue hair", "outdoors", "hat", "solo", "night", "rain", "closed eyes")
UPDATES = 20
EVERY_STEPS = 4
STAGE = f"""\
stage: pretrain
seed: 31
epochs: 3
max_updates: {UPDATES}
precision: fp32
batch: {{micro: 2, effective: 8, determinism: strict}}
optimizer: {{name: adamw, unet_lr: 1e-3, text_encoder_lr: 5e-4, weight_decay: 0.01}}
schedule: {{name: cosine_restarts, min_lr: 1e-4, decay: 0.9}}
noise: {{offset: 0.0357}}
checkpoint: {{every_steps: {EVERY_STEPS}}}
export: {{license: Apache-2.0}}
tracking: {{trace: true}}
launch: {{collective_timeout_s: 30}}
"""


def write_chaos_world(folder: Path) -> Path:
    """Model, dataset and `stage.yaml` under `folder`; the YAML's path. `output_dir` is left to the caller."""
    yaml = folder / "stage.yaml"
    if not yaml.is_file():
        write_small_model(folder / "model")
        write_small_dataset(folder / "data")
        more = f"output_dir: {folder / 'run'}\n"
        more += f"model: {{init_from: {folder / 'model'}, train_text_encoders: true, gradient_checkpointing: none}}\n"
        yaml.write_text(STAGE + more + f"data: {{path: {folder / 'data'}, workers: 0}}\n")
    return yaml


def write_small_model(folder: Path) -> None:
    """A diffusers folder with random weights from a seed of its own."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder.mkdir(parents=True)
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, pad)
    vocabulary = len(build_vocabulary()[0])
    ids = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    shape: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2, **ids}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        unet = UNet2DConditionModel(
            sample_size=8, norm_num_groups=8, use_linear_projection=True, cross_attention_dim=40, layers_per_block=1,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 48,
            block_out_channels=(16, 32), transformer_layers_per_block=(1, 1), attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        one = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=32, projection_dim=16, **shape))
        two = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=24, intermediate_size=48, projection_dim=24, **shape)
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.13025,
        )  # fmt: skip
    tokenizers = [CLIPTokenizer.from_pretrained(str(folder / name)) for name in ("tokenizer", "tokenizer_2")]
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=one, text_encoder_2=two, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet,
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    ).save_pretrained(str(folder), safe_serialization=True)  # fmt: skip
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):  # save_pretrained leaves vocab.json and merges.txt out
        write_tokenizer(folder / name, pad)


def write_small_dataset(folder: Path) -> None:
    """A prepared dataset without pictures: latents from a generator, captions from a handful of tags."""
    (folder / "latents").mkdir(parents=True)
    (folder / "labels").mkdir()
    rows = sorted(_rows(folder), key=lambda row: (row["key"], row["bucket_w"], row["bucket_h"]))
    texts, whole, small = pa.list_(pa.string()), pa.int32(), pa.int16()
    types = {"uid": pa.uint64(), "fixed_tags": texts, "flex_tags": texts, "rating_tags": texts, "row": whole}
    types |= dict.fromkeys(("orig_w", "orig_h", "crop_top", "crop_left"), whole)
    types |= dict.fromkeys(("bucket_w", "bucket_h", "resized_w", "resized_h"), small)
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
    index = pa.Table.from_pylist(rows, schema=schema)
    names = ("key", "bucket_w", "bucket_h")
    chosen = [{name: row[name] for name in names} | {"repeats": 1, "why": "all"} for row in rows]
    selection = pa.Table.from_pylist(chosen, schema=SELECT)
    pq.write_table(index, folder / "index.parquet")
    pq.write_table(selection, folder / "select_pretrain.parquet")
    meta = {"vae_id": "", "content": "sample", "buckets": "chaos"}  # of no VAE: nothing was encoded
    build_index(folder, index, {"pretrain": selection}, meta)
    (folder / "dataset.json").write_text(json.dumps({"schema_version": 1, "fingerprint": "chaos"}))


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (width, height), count in BUCKETS.items():
        shard = f"latents/{width}x{height}-00000.safetensors"
        generator = torch.Generator().manual_seed(width * 1000 + height)
        latents_NCHW = torch.randn(count, 4, height // 8, width // 8, generator=generator) / 0.13025
        write_shard(folder / shard, latents_NCHW.half(), {"vae_id": "chaos"})
        for row in range(count):
            key = f"chaos:{width}x{height}/{row}"
            flex = rng.shuffled(list(TAGS), 1, rng.uid_of(key), 0)[: 3 + row % 6]
            rows.append(
                {
                    "key": key, "uid": rng.uid_of(key), "orig_w": 2 * width, "orig_h": 2 * height, "bucket_w": width,
                    "bucket_h": height, "resized_w": width, "resized_h": height, "crop_top": 0, "crop_left": 0,
                    "shard": shard, "row": row, "content_hash": key, "gate_rating": "g", "fixed_tags": ["1girl"],
                    "flex_tags": flex, "quality": "masterpiece", "rating_tags": ["safe"], "year": "newest",
                    "aesthetic": None,
                }
            )  # fmt: skip
    return rows
