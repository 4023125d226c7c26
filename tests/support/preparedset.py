"""A small folder of pictures with posts, a tiny VAE, and the settings that make a dataset of them. Also run as a
script: `python tests/support/preparedset.py FOLDER SEED KILLS` kills `prepare all` at random moments until it is done."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch
from oddimages import drawn, encoded

from train.config.dataset import DatasetConfig, load_settings

SIZES = ((90, 120), (120, 90), (100, 100), (96, 128), (200, 60))


def write_posts(folder: Path, count: int, *, first: int = 0) -> None:
    """Danbooru-style posts with a picture each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        width, height = SIZES[number % len(SIZES)]
        kind, ending = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))[number % 3]
        (folder / f"{number}.{ending}").write_bytes(encoded(drawn(width, height, seed=number), kind))
        post = {
            "id": number, "file_ext": ending, "rating": "gsqe"[number % 4], "score": number * 7 % 60, "image_width": width,
            "image_height": height, "created_at": f"20{10 + number % 12}-05-05T10:00:00.000+00:00",
            "tag_string_general": f"solo smile tag_{number % 6}", "tag_string_character": f"someone_{number % 3}",
            "tag_string_copyright": "original", "tag_string_artist": f"artist_{number % 4}", "tag_string_meta": "highres",
        }  # fmt: skip
        (folder / f"{number}.json").write_text(json.dumps(post))


def write_vae(folder: Path) -> Path:
    """An untrained KL autoencoder of SDXL's shape, 8x, in a VAE folder."""
    from diffusers import AutoencoderKL

    generator = torch.Generator().manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    for parameter in vae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.02)
    vae.save_pretrained(folder)
    return folder


def settings_of(folder: Path, **overrides: Any) -> DatasetConfig:
    """Everything below `folder`: source in pictures/, VAE in vae/, dataset in data/set/."""
    plain = {
        "name": "set", "root": str(folder / "data"), "seed": 5, "workers": 0, "latents.vae": str(folder / "vae"),
        "buckets.area_px": 16384, "buckets.min_px": 64, "buckets.max_px": 256, "buckets.step_px": 32,
        "max_quarantine_fraction": 1.0, "latents.batch": 4, "report.fail_if.quarantine_errors": 1.0,
        "report.fail_if.crop_loss": 1.0,  # so few sizes cut more than the recipe's
    }  # fmt: skip
    text = folder / "dataset.yaml"
    if not text.exists():
        text.write_text(
            f"sources:\n  - {{name: booru, adapter: danbooru, path: {folder / 'pictures'}}}\n"
            "select:\n  pretrain: {min_bucket: 2}\n"
            "  ft1: {where: ['rating in [g, s]', 'area > 5000'], caps: {artist: 4}, min_bucket: 4, merge_crop: 1.0}\n"
        )
    return load_settings([text], [f"{key}={value}" for key, value in (plain | overrides).items()])


def prepare(settings: DatasetConfig, *steps: str) -> None:
    """Run steps (default: all) in this process."""
    import importlib

    from train.config.dataset import STEPS

    for step in steps or STEPS:
        importlib.import_module(f"train.prepare.{step}").run(settings)


def kill_until_done(folder: Path, seed: int, kills: int) -> int:
    """`prepare all` in forked processes, 1 or 2 of them, killed at random moments; returns the kills that hit."""
    import train.prepare.latents
    import train.prepare.report  # noqa: F401  (imported once, here, so that the children start at once)

    chance = random.Random(seed)
    settings = settings_of(folder)
    hits = 0
    for attempt in range(kills + 1):
        world = chance.choice((1, 2))
        children = [_start(settings, rank, world) for rank in range(world)]
        if attempt < kills:
            time.sleep(chance.uniform(0.0, 1.2) ** 2)
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        hits += any(code == -signal.SIGKILL for code in codes)
        if attempt == kills:
            assert codes == [0] * world, codes
    return hits


def _start(settings: DatasetConfig, rank: int, world: int) -> int:
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        try:
            prepare(settings)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"hits": kill_until_done(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))}))
