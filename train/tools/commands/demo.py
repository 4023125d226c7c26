"""A page to draw with in the browser: the base's words and prompts, several stages side by side from one seed (extra: demo)."""

from __future__ import annotations

import argparse


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="run directories, diffusers folders or .safetensors")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="adapter to add to every model, a file or its folder (repeatable)")
    parser.add_argument("--prompts", metavar="FILE", help="prompts file whose settings and prompts the page offers (default: that of the first run, else the shipped one)")
    parser.add_argument("--vocabulary", default="animagine31", help="whose words for quality, rating, year and aesthetic: a name in configs/vocabularies or a YAML file (default: animagine31)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--tokenizers", help="folder with tokenizer/ and tokenizer_2/ (default: each model's; of single files CLIP's)")
    parser.add_argument("--out", help="folder for the pictures (default: a temporary one)")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="little memory, as on 8 GB: VAE in tiles (default: below 10 GiB free)")
    arguments = parser.parse_args()

    from train.tools.demo import serve

    options = {name: value for name, value in vars(arguments).items() if name not in ("model", "lora")}
    serve(arguments.model, loras=arguments.lora, **options)
