#!/usr/bin/env python
"""From raw images to a training set: one step, or all of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib
import time

from train import signals
from train.exits import run_cli
from train.prepare.judge import Complaint
from train.prepare.settings import STEPS, check_paths, dataset_dir, load_settings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: STEP, --config (repeatable, later wins), key=value overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "all"], metavar="STEP", help=f"{', '.join(STEPS)}, or all")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="dataset YAML; later wins")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the files")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the steps in order; each prints one line with its counts."""
    arguments = parse()
    settings = load_settings(arguments.config, arguments.overrides)
    if arguments.step == "all":
        check_paths(settings)
    started = time.monotonic()
    complaints = []
    signals.install(orphan=True)
    for step in STEPS if arguments.step == "all" else [arguments.step]:
        try:
            signals.raise_if_asked(step)
            importlib.import_module(f"train.prepare.{step}").run(settings)
        except Complaint as complaint:  # the step is finished; what it found shows in the report
            print(f"error: {complaint.message}", file=sys.stderr)
            complaints.append(complaint.code)
    print(f"{arguments.step}: finished in {time.monotonic() - started:.1f} s: {dataset_dir(settings)}")
    return int(complaints[0]) if complaints else 0


if __name__ == "__main__":
    run_cli(main)
