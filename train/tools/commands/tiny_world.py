"""Draws the tiny world: pictures with booru posts, and a tiny SDXL to start from. Nothing is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.base.errors import ExitCode, Halt


def main() -> None:
    """Parse and draw, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/tiny_world"), help="folder to write")
    parser.add_argument("--images", type=int, help="pictures to draw (default: 640)")
    parser.add_argument("--seed", type=int, default=1, help="another seed is another world")
    parser.add_argument("--character", type=Path, metavar="DIR", help="draw somebody new instead, with a text beside each picture (40 without --images)")
    parser.add_argument("--summary", type=Path, metavar="RUNS", help="draw nothing: print losses and tag following")
    options = parser.parse_args()
    if options.summary:
        from train.tools.tiny.check import summary

        print(summary(options.summary))
        return
    images = options.images if options.images is not None else 40 if options.character else 640
    if images < 1:
        raise Halt(ExitCode.USAGE, f"--images is {images}, must be at least 1")
    if options.character:
        from train.tools.tiny.character import write_character

        new = write_character(options.character, images, options.seed)
        print(f"{options.character}: {images} pictures with their texts, {new} drawn now")
        return
    from train.tools.tiny.world import write_world  # after --help, which needs no Pillow

    drawn = write_world(options.out, images, options.seed)
    print(f"{options.out / 'images'}: {images} pictures {'drawn' if drawn else 'are there already'}")
    from train.tools.tiny.model import write_model

    built = write_model(options.out / "model")
    print(f"{options.out / 'model'}: tiny SDXL {'built' if built else 'is there already'}")
