"""Judges the samples of stages: aesthetic score, CLIP, tagger; with intervals, paired over equal prompts and seeds.

The models are folders of your own; nothing is downloaded. STAGE is a run directory (its newest samples) or NAME=DIR
with pictures by scripts/sample.py. An interval wants many prompts: fifty or more. `report.py --quality` shows the file.
`--model M --lora FILE:0.8` draws M and M with the adapters first, from the same prompts and seeds, beside --out.

`loss MODEL ... --data SET` measures the held-out loss of model files instead (its own --help).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from train.base.errors import ExitCode, Halt


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="run directory or NAME=DIR, in the recipe's order")
    parser.add_argument("--model", metavar="MODEL", help="with --lora: run, checkpoint, diffusers folder or .safetensors file that is drawn with and without the adapters")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="adapter added to --model (repeatable)")
    parser.add_argument("--prompts", type=Path, metavar="F", help="with --lora: prompts file of those pictures (default: the shipped configs/prompts.yaml)")
    parser.add_argument("--tokenizers", metavar="DIR", help="with --lora: of a single file, a folder with tokenizer/ and tokenizer_2/ (default: CLIP's)")
    parser.add_argument("--aesthetic", metavar="DIR", help="image-classification model of transformers")
    parser.add_argument("--aesthetic-label", default="hq", help="class whose probability is the score (default: hq)")
    parser.add_argument("--clip", metavar="DIR", help="CLIP model of transformers")
    parser.add_argument(
        "--tagger", metavar="DIR",
        help="WD tagger v3 (model.onnx; extra: tag) or image-classification model; tiny_world = the drawn world's rule",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.35, help="above it a tag is seen (default: 0.35)")
    parser.add_argument("--character-threshold", type=float, default=0.85, help="for characters (default: 0.85)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    return parser.parse_args()


def parse_loss() -> argparse.Namespace:
    """The command line of `loss`."""
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} loss",
        description="Held-out loss of model files by stratum: the same images, noise and timesteps for all; differences from the first.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint, diffusers folder or .safetensors file; or NAME=one of them")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:weight]", help="adapter with which the first MODEL is measured once more (repeatable)")
    parser.add_argument("--data", type=Path, required=True, metavar="SET", help="prepared dataset")
    parser.add_argument("--select", metavar="STAGE", help="its selection (default: the one that the last model's stage measured)")
    parser.add_argument("--share", type=float, help="images held out by validation.share (default: the smallest that the models' stages state, else all)")
    parser.add_argument("--images", type=int, default=256, help="at most so many, those with the lowest hashes (default: 256)")
    parser.add_argument("--micro", type=int, default=4, help="images per forward (default: 4)")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--tokenizers", metavar="DIR", help="of single files: a folder with tokenizer/ and tokenizer_2/ (default: CLIP's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", type=Path, default=Path("loss.json"))
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    arguments = parser.parse_args(sys.argv[2:])
    for name in ("images", "micro"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments


def loss() -> None:
    """Parse, measure, write, print."""
    arguments = parse_loss()
    from train.tools.quality import loss as held_out_loss
    from train.tools.quality import record as quality_record

    options = {name: getattr(arguments, name) for name in ("select", "share", "images", "micro", "precision", "device", "tokenizers")}
    record = held_out_loss.measure(arguments.models, arguments.data, loras=arguments.lora, **options)
    quality_record.write_quality(arguments.out, record)
    print(json.dumps(record) if arguments.json else f"{held_out_loss.as_text(record)}\n{arguments.out}")


def main() -> None:
    """Parse, judge, write, print."""
    if sys.argv[1:2] == ["loss"]:
        return loss()
    arguments = parse()
    if not (arguments.aesthetic or arguments.clip or arguments.tagger):
        raise Halt(ExitCode.USAGE, "name at least one model: --aesthetic DIR, --clip DIR or --tagger DIR")
    from train.tools.quality import judges, quality
    from train.tools.quality import record as quality_record

    device, limits = arguments.device, (arguments.threshold, arguments.character_threshold)
    stages = quality.stage_pictures(arguments.stages)
    if arguments.lora or arguments.model:
        if not (arguments.lora and arguments.model):
            raise Halt(ExitCode.USAGE, "--model and --lora FILE[:weight] go together: the model is drawn with and without the adapters")
        from train.tools.quality import drawn

        place = arguments.out.with_name(f"{arguments.out.stem}-samples")
        found = drawn.with_and_without(arguments.model, arguments.lora, arguments.prompts, place, device=device, tokenizers=arguments.tokenizers)
        stages = quality.joined(stages, found)
    if not stages:
        raise Halt(ExitCode.USAGE, "name a STAGE whose pictures are judged, or --model with --lora")
    label = arguments.aesthetic_label
    record = quality.measure(
        stages,
        aesthetic=judges.open_aesthetic(arguments.aesthetic, label, device) if arguments.aesthetic else None,
        clip=judges.open_clip(arguments.clip, device) if arguments.clip else None,
        tagger=judges.open_tagger(arguments.tagger, *limits, device) if arguments.tagger else None,
    )
    quality_record.write_quality(arguments.out, record)
    print(json.dumps(record) if arguments.json else f"{quality_record.as_text(record)}\n{arguments.out}")
