"""Pictures from a trained model with the card's settings: Euler ancestral, CFG 7, 28 steps, its negative prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.config import shipped


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="run directory, checkpoint, diffusers folder or .safetensors file")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="adapter to add to the model, a file or its folder (repeatable)")
    parser.add_argument("--out", required=True, type=Path, help="folder for NN.png and grid.png")
    parser.add_argument("--prompts", type=Path, default=shipped.folder() / "prompts.yaml", help="prompts file (default: the shipped configs/prompts.yaml)")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts in place of the file's prompts")
    parser.add_argument("--size", metavar="WxH", help="for every picture (default: as in the file, texts 832x1216)")
    parser.add_argument("--seed", type=int, help="for every picture; pictures of one call still differ")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 = without")
    parser.add_argument("--guidance-rescale", type=float, help="0 to 1: share of the guided prediction brought back to the unguided one's deviation")
    parser.add_argument("--sampler", choices=["euler_a", "euler", "dpmpp_2m"])
    parser.add_argument("--negative", help="negative prompt (default: the card's)")
    parser.add_argument("--quality-prefix", help='put before every prompt (default: the card\'s; "" = nothing)')
    parser.add_argument("--tokenizers", help="folder with tokenizer/ and tokenizer_2/ (default: the model's; of a single file CLIP's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="little memory, as on 8 GB: VAE in tiles (default: below 10 GiB free)")
    return parser.parse_args()


def main() -> None:
    """Parse, draw, print the paths."""
    arguments = parse()
    from train.config.prompts import load_prompts
    from train.observe.inference import adjusted, draw, open_model
    from train.observe.pictures import require_folder, write_pictures

    changes = {name: getattr(arguments, name) for name in ("size", "seed", "steps", "guidance", "guidance_rescale", "sampler", "negative", "quality_prefix")}
    settings = adjusted(load_prompts(arguments.prompts), texts=arguments.prompt, **changes)
    require_folder(arguments.out)
    options = {name: getattr(arguments, name) for name in ("device", "tokenizers", "small")}
    model = open_model(arguments.model, loras=arguments.lora, **options)
    images = draw(model, settings)
    for file in write_pictures({"": images}, settings, arguments.out, model_name=model.name, model_hash=model.sha256):
        print(file)
