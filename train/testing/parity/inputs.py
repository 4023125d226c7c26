"""What both sides are given: sizes, captions, texts, timesteps, noise, tensors for an optimizer. The same in every run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.config.shipped import find
from train.config.stage import DataConfig, ModelConfig, NoiseConfig, OptimizerConfig, ScheduleConfig, load_stage
from train.model import clip_tokens
from train.model.text import TagTokenizer
from train.recipe import buckets

BUCKETS = {"side_px": 1024, "min_px": 512, "max_px": 2048, "step_px": 64}  # notebook
TIMESTEPS = (0, 1, 10, 50, 100, 250, 500, 600, 700, 750, 900, 999)
LENGTHS = (0, 1, 2, 74, 75, 76, 77, 149, 150, 151, 224, 225, 300)  # content tokens: around every edge of the chunks
UPDATES = 40_951  # of which learning rates are compared: nine restarts, four and a half epochs
SEED, UID = 31, 1 << 40  # of the noise; any number would do
LATENT = (4, 16, 24)  # of one picture, as small as shows a mistaken axis
BATCH = 4

TAGS = (
    "1girl", "solo", "long hair", "blue eyes", "k-on!", "hatsune miku", "school uniform", "outdoors", "cherry blossoms",
    "re:zero kara hajimeru isekai seikatsu", "girls' frontline", "fate/grand order", ":d", "...", "@_@", "3d", "2010s",
    "very aesthetic", "masterpiece", "absurdres", "looking at viewer", "umbrella", "rain", "night sky", "nier:automata",
)  # fmt: skip


@dataclass(frozen=True)
class Switches:
    """What of a stage's config is compared; the finetunes' optimizer and schedule beside it."""

    model: ModelConfig
    data: DataConfig
    noise: NoiseConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    finetune_optimizer: OptimizerConfig
    finetune_schedule: ScheduleConfig


def switches(config: str | Path, changes: Sequence[str] = ()) -> Switches:
    """Of a stage's file with changes. Raises the Halts of loading it."""
    stage, finetune = load_stage([find(config)], changes), load_stage([find("configs/ft1.yaml")])
    return Switches(
        stage.model, stage.data, stage.noise, stage.optimizer, stage.schedule, finetune.optimizer, finetune.schedule
    )


def sizes(count: int = 560) -> list[tuple[int, int]]:
    """Picture sizes: every bucket and its border, the recipe page's examples, the rest log-uniform in 1:4 to 4:1."""
    table = buckets.make_buckets()
    found = [*table, (1500, 2000), (1920, 1080), (2480, 3508), (1000, 1000), (3000, 1000), (4096, 512)]
    found += [(w + dw, h) for w, h in table for dw in (-1, 1, 33)]
    draw = random.Random(0)
    while len(found) < count:
        aspect, side = 4 ** draw.uniform(-1, 1), 2 ** draw.uniform(8, 12)
        found.append((max(round(side * aspect**0.5), 1), max(round(side / aspect**0.5), 1)))
    return found[:count]


def captions(count: int = 32) -> list[dict[str, Any]]:
    """Captions with and without fixed tags, spaces and separator; shuffled, and unshuffled at a step of a warmup."""
    draw = random.Random(1)
    found = []
    for number in range(count):
        tags = draw.sample(TAGS, draw.randint(2, len(TAGS)))
        fixed = number % 4
        comma = (", ", ",", " , ")[number % 3]
        text = comma.join(tags) if not fixed else f"{comma.join(tags[:fixed])}, ||| {comma.join(tags[fixed:])}"
        shuffle = number % 2 == 0
        step, steps = ((5, 1), (0, 100), (50, 100), (99, 100), (100, 100))[number % 5]
        found.append({"text": text, "shuffle": shuffle, "warmup_min": 1, "warmup_steps": 0 if shuffle else steps, "step": step})
    return found


ODD_CAPTIONS = (  # what we read otherwise, and docs/as_run.md says so
    {"text": "1girl, smile,, outdoors,", "shuffle": False, "warmup_min": 1, "warmup_steps": 1, "step": 5},
    {"text": "1girl ||| smile", "shuffle": False, "warmup_min": 1, "warmup_steps": 0, "step": 5},
)


def texts(tokenizer: TagTokenizer) -> list[str]:
    """One text for each of LENGTHS: tags of the real vocabulary, filled up with a word that is one token."""
    found = []
    for length in LENGTHS:
        tags: list[str] = []
        for number in range(length):
            longer = [*tags, TAGS[number % len(TAGS)]]
            if len(tokenizer.content_ids(longer)) > length - 2:
                break
            tags = longer
        left = length - len(tokenizer.content_ids([*tags, ""])) if tags else length
        words = " ".join(["girl"] * left)
        found.append(", ".join([*tags, words] if words else tags))
        assert len(tokenizer.content_ids(found[-1].split(", "))) == length, (length, found[-1])
    return found


def write_tokenizers(folder: Path) -> Path:
    """CLIP's vocabulary as the trainer's tokenizer cache holds it, both models; from the shipped list of merges."""
    vocabulary = clip_tokens.tokenizer("tokenizer").get_vocab()
    lines = ["#version: 0.2", *(" ".join(pair) for pair in clip_tokens.merges())]
    special = {"bos_token": clip_tokens.BOS, "eos_token": clip_tokens.EOS, "unk_token": clip_tokens.EOS, "pad_token": clip_tokens.EOS}
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        place = folder / name
        place.mkdir(parents=True)
        (place / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        (place / "merges.txt").write_text("\n".join(lines) + "\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        (place / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def pictures() -> dict[str, np.ndarray]:
    """uint8 [H,W,3]: smaller and larger than its bucket, and one that is neither (so nothing is resized)."""
    draw = np.random.default_rng(0)
    found = {}
    for name, (width, height) in {"shrunk": (1500, 2000), "enlarged": (500, 480), "as it is": (896, 1152)}.items():
        coarse = draw.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
        smooth = np.kron(coarse, np.ones((20, 20, 1), np.uint8))[:height, :width]
        found[name] = np.clip(smooth.astype(int) + draw.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    return found


SHAPES = ((7, 5), (2, 3, 3, 3), (9,), (5,), (3, 11))  # of an optimizer's tensors: matrix, convolution, bias, norm, embedding
STEPS = 3


def optimizer_tensors(shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    """`start.N` and `gradient.<step>.N`, fp32, of the sizes that weights and clipped gradients have."""
    draw = np.random.default_rng(7)
    found = {f"start.{n}": draw.normal(0, 0.1, shape) for n, shape in enumerate(shapes)}
    found |= {
        f"gradient.{step}.{n}": draw.normal(0, 1e-3, shape) for step in range(STEPS) for n, shape in enumerate(shapes)
    }
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in found.items()}
