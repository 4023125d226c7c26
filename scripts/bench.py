#!/usr/bin/env python
"""Benchmarks: `cpu` beside reference trainers found by environment variable, `gpu` of the full-size training step,
`step` of one such update on this machine, ours in turn with diffusers' and sd-scripts'."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import importlib
import json
from typing import Any

from train.base.console import run_cli
from train.base.errors import ExitCode, Halt
from train.base.files import write_json

ROOMS = {"cpu": "train.testing.cpu", "gpu": "train.testing.gpu.driver", "step": "train.testing.step"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    cpu = kinds.add_parser("cpu", help="data path, loop, checkpoints; about five minutes, no network")
    cpu.add_argument("--only", default="A1,A2,A3,A4,A5,A6,A7,A8,A9,A10", help="rows to run")
    cpu.add_argument("--repeats", type=int, default=5)
    cpu.add_argument(
        "--tokenizers", type=Path, help="folder with tokenizer/ and tokenizer_2/; default: the tiny world's"
    )
    cpu.add_argument("--rows", type=int, metavar="N", help="records labelled in A8, for example 10000000; default: 873,504")
    gpu = kinds.add_parser("gpu", help="training step on a card in two calls, 7 and 3 minutes; random weights, 832x1216")
    gpu.add_argument("--call", type=int, choices=(1, 2), default=1, help="of the plan that --dry-run prints; default 1")
    gpu.add_argument("--only", help="variants to run instead of a call's, for example plain,cl_compile")
    gpu.add_argument("--probe", action="store_true", help="versions, memory and the card's two ceilings, nothing else")
    gpu.add_argument("--budget", type=float, help="seconds, default that of the call; what no longer fits is skipped and said so")
    gpu.add_argument("--earlier", type=Path, metavar="F.json", help="rows of an earlier call, for ratios across calls")
    gpu.add_argument(
        "--tiny", action="store_true", help="tiny model on any device: checks the driver, measures nothing"
    )
    gpu.add_argument("--dry-run", action="store_true", help="the plan of both calls with its seconds; with --only, predictions")
    step = kinds.add_parser("step", help="one real full-size update here, ours beside two neighbours'; 14 GB, minutes")
    step.add_argument("--size", default="512x512", metavar="WxH", help="of the images, in pixels")
    step.add_argument("--images", type=int, default=1, help="of the update")
    step.add_argument("--rounds", type=int, default=3, help="turns of every side")
    step.add_argument("--tiny", action="store_true", help="tiny model: checks the driver, measures nothing")
    for command in (cpu, gpu, step):
        command.add_argument("--out", type=Path, help="JSON file")
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    """Run, write, print."""
    arguments = parse()
    if arguments.out is not None:  # before minutes are spent that could not be kept
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.open("a").close()
        except OSError as error:
            raise Halt(ExitCode.CANNOT_WRITE, f"--out {arguments.out} cannot be written: {error.strerror}") from error
    keep = functools.partial(_keep, arguments.out)
    result, text = importlib.import_module(ROOMS[arguments.kind]).command(arguments, keep)
    print(json.dumps(result) if arguments.json else text, flush=True)
    keep(result)
    return ExitCode.DONE


def _keep(out: Path | None, result: dict[str, Any]) -> None:
    """Write what there is; called after every row, so that a run that is cut loses the one in progress."""
    if out is not None:
        write_json(out, result)


if __name__ == "__main__":
    run_cli(main)
