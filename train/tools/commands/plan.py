"""Dry run of a stage: updates, learning rates, memory, disk, time and cost. Nothing is trained; exit 7 = cannot fit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from train.base.errors import ExitCode, Halt


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", required=True, metavar="YAML", help="may be repeated: later wins")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--updates", default="", metavar="0,1,4549", help="updates whose learning rate to print")
    parser.add_argument("--images", type=int, help="plan for this many images instead of the prepared dataset")
    parser.add_argument("--gpu", help="for example A100-80GB, H200, RTX-4090; default: the one present")
    parser.add_argument("--memory-gib", type=float, help="free memory of one GPU, replaces the known figure")
    parser.add_argument("--world", type=int, default=1, help="number of GPUs")
    parser.add_argument("--images-per-s", type=float, help="measured speed of one GPU")
    parser.add_argument("--bench", type=Path, help="JSON of scripts/bench.py gpu, instead of --images-per-s")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU")
    parser.add_argument("--disk-gb", type=float, help="free disk; default: this machine's, if planned for its GPU")
    parser.add_argument("--out", type=Path, help="folder for plan.json and lr.svg")
    parser.add_argument("--write", action="store_true", help="write both into the stage's output_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def numbers(text: str) -> tuple[int, ...]:
    """`0,1,4549` as integers."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise Halt(ExitCode.USAGE, f"--updates {text}: whole numbers separated by commas, please") from error


def main() -> int:
    """Plan, print, and say by the exit code whether it fits."""
    arguments = parse()
    from train.config.stage import load_stage
    from train.tools.estimate import estimate, page

    request = estimate.Request(
        updates=numbers(arguments.updates),
        images=arguments.images,
        gpu=arguments.gpu,
        memory_gib=arguments.memory_gib,
        world=arguments.world,
        images_per_s=arguments.images_per_s,
        bench=arguments.bench,
        price_per_hour=arguments.price_per_hour,
        disk_gb=arguments.disk_gb,
    )
    config = load_stage(arguments.config, arguments.overrides)
    plan = estimate.plan_stage(config.start, request) | {"finished": page.finished_before(config.start)}
    out = arguments.out or (Path(config.output_dir) if arguments.write else None)
    if out is not None:
        page.write_files(out, config.rates, plan)
    print(json.dumps(plan) if arguments.json else page.describe(plan))
    problems = page.problems(plan)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return ExitCode.MISMATCH if problems else ExitCode.DONE
