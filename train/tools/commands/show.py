"""Look inside: a caption, an image's bucket, a dataset and what it set aside, a checkpoint, a model, an update, the keys."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from train.base import environment

environment.settle()  # as train/run.py: another number of threads, other last digits

from train.config import combinations
from train.recipe.captions import SEPARATOR
from train.tools.show.dispatch import report_of, show
from train.tools.show.keys import markdown


def main() -> int:
    """Parse, ask the tool, print; with --json one JSON object on stdout and nothing else."""
    arguments = parse()
    if arguments.what == "keys" and arguments.markdown:
        print(markdown(), end="")
        return 0
    if arguments.what == "combinations":
        print(combinations.markdown(), end="")
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print must not break the JSON
        report = report_of(arguments)
    show(report, as_json=arguments.json)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on stdout")
    kinds = parser.add_subparsers(dest="what", required=True)

    add_caption(kinds.add_parser("caption", parents=[common], help="parts, draws, ids per chunk, what is cut: of a text, a set's picture, an update"))
    buckets = kinds.add_parser("buckets", parents=[common], help="placement of one image; without --size the table")
    buckets.add_argument("--size", help="WxH in px")
    for name, value in (("area", 1024 * 1024), ("min", 512), ("max", 2048), ("step", 64)):
        several = "+" if name == "area" else None  # areas: a picture goes to the largest that it fills
        buckets.add_argument(f"--{name}-px", type=int, default=value, nargs=several)
    for name, what in (
        ("dataset", "prepared dataset"),
        ("checkpoint", "step-* directory or run"),
        ("model", "any model"),
    ):
        kinds.add_parser(name, parents=[common], help=what).add_argument("path", type=Path)
    pair = kinds.add_parser("compare", parents=[common], help="how far two models lie apart, block by block")
    for name, told in (("a", "run, checkpoint, folder or .safetensors file"), ("b", "what it is held against")):
        pair.add_argument(name, type=Path, metavar=name.upper(), help=told)
    pair.add_argument("--base", type=Path, metavar="C", help="compare what each moved from this one")
    aside = kinds.add_parser("quarantine", parents=[common], help="what preparing set aside, and why")
    aside.add_argument("path", type=Path, metavar="DATASET")
    aside.add_argument("--step", help="only what this step of prepare.py set aside")
    aside.add_argument("--reason", help="only for this reason")
    step = kinds.add_parser("step", parents=[common], help="tiles, images, timesteps and losses of one update")
    step.add_argument("path", type=Path, metavar="RUN")
    step.add_argument("--update", type=int, required=True)
    step.add_argument("--recompute", action="store_true", help="run the update again from the checkpoint before it")
    keys = kinds.add_parser("keys", parents=[common], help="every key: default, values, meaning, what a resume may do")
    keys.add_argument("pattern", nargs="?", help="part of a key, or a pattern such as '*.every_steps'")
    keys.add_argument("--markdown", action="store_true", help="all of them as the page docs/keys.md")
    kinds.add_parser("combinations", help="which settings go together, and why others do not, as the page docs/combinations.md")
    return parser.parse_args()


def add_caption(caption: argparse.ArgumentParser) -> None:
    """The arguments of `caption`; those of texts and sets have no default here: a run has its own."""
    caption.add_argument("path", type=Path, nargs="?", metavar="RUN_OR_SET", help="a run (with --update), or a prepared set (with --key)")
    caption.add_argument("--text", help="a caption, read as a caption file is")
    caption.add_argument("--key", help="one picture, <source>:<id>; of a run with its ids")
    caption.add_argument("--update", type=int, help="of a run: what its pictures got in this update, counted from 0")
    caption.add_argument("--tokenizers", type=Path, help="folder with tokenizer/ and tokenizer_2/ (default: CLIP's)")
    caption.add_argument("--draws", type=int, default=0, help="also as shuffled in the epochs 0 .. DRAWS-1")
    caption.add_argument("--separator", help=f"default: {SEPARATOR}")
    caption.add_argument("--max-tokens", type=int, choices=(75, 150, 225), help="default: 225")
    caption.add_argument("--overflow", choices=("tag", "token"), help="default: tag")
    caption.add_argument("--seed", type=int, help="default: 0")
