"""Dry run of a stage: updates, learning rates, memory, disk, time and cost. Nothing is trained; exit 7 = cannot fit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from train.base.errors import ExitCode, Halt

if TYPE_CHECKING:
    from train.tools.estimate.estimate import Request


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", metavar="YAML", help="may be repeated: later wins")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="YAML", help="one per stage, in place of --config: all of them, and their sum")
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
    parser.add_argument("overrides", nargs="*", metavar="[STAGE:]key=value", help="with --recipe for every stage, or for one, as ft1:batch.micro=12")
    arguments = parser.parse_intermixed_args()
    # `--recipe a b key=value`: argparse gives everything to --recipe, so the overrides are told apart by "=".
    arguments.overrides = [word for word in (*arguments.recipe, *arguments.overrides) if "=" in word]
    arguments.recipe = [word for word in arguments.recipe if "=" not in word]
    if bool(arguments.config) == bool(arguments.recipe):
        parser.error("name a stage with --config, or several with --recipe")
    return arguments


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
    if arguments.recipe:
        return _of_recipe(arguments, request)
    config = load_stage(arguments.config, arguments.overrides)
    plan = estimate.plan_stage(config.start, request) | {"finished": page.finished_before(config.start)}
    out = arguments.out or (Path(config.output_dir) if arguments.write else None)
    if out is not None:
        page.write_files(out, config.rates, plan)
    print(json.dumps(plan) if arguments.json else page.describe(plan))
    return _ends_with(page.problems(plan))


def _of_recipe(arguments: argparse.Namespace, request: Request) -> int:
    """All stages, each from its predecessor, and their sum."""
    from train.config.stage import load_stage, overrides_of
    from train.tools.estimate import page, recipe

    own = overrides_of(arguments.recipe, arguments.overrides)
    stages = [load_stage([config], its) for config, its in zip(arguments.recipe, own, strict=True)]
    plans = recipe.plan_stages([stage.start for stage in stages], request)
    total = recipe.total(plans)
    for stage, plan in zip(stages, plans, strict=True):
        out = arguments.out / stage.identity.stage if arguments.out else Path(stage.identity.output_dir) if arguments.write else None
        if out is not None:
            page.write_files(out, stage.rates, plan)
    print(json.dumps({"stages": plans, "total": total}) if arguments.json else "\n".join([*map(page.describe, plans), *recipe.lines(total)]))
    return _ends_with([*(f"{plan['stage']}: {problem}" for plan in plans for problem in page.problems(plan)), *recipe.problems(total)])


def _ends_with(problems: list[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return ExitCode.MISMATCH if problems else ExitCode.DONE
