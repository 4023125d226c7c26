"""From raw images to a training set: one step, or all of them."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.config.dataset import STEPS, check_paths, dataset_dir, load_settings
from train.prepare.folders import bringing
from train.prepare.tables.quarantine import Complaint


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: STEP, --config (repeatable, later wins), key=value overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[*STEPS, "all"], metavar="STEP", help=f"{', '.join(STEPS)}, or all")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="dataset YAML; later wins")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the files")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Run the steps in order, up to the first that fails; each prints one line with its counts."""
    arguments = parse()
    settings = load_settings(arguments.config, arguments.overrides)
    settings = bringing.brought(settings, fetch=arguments.step in ("ingest", "all"))
    if arguments.step == "all":
        check_paths(settings)
        importlib.import_module("train.prepare.select").check_filters(settings)
    started = time.monotonic()
    signals.install(orphan=True)
    steps = STEPS if arguments.step == "all" else (arguments.step,)
    for number, step in enumerate(steps):
        try:
            signals.raise_if_asked(step)
            importlib.import_module(f"train.prepare.{step}").run(settings)
        except Halt as halt:
            raise Halt(halt.code, halt.message + _not_run(step, steps[number + 1 :], halt)) from halt
    print(f"{arguments.step}: finished in {time.monotonic() - started:.1f} s: {dataset_dir(settings)}")
    if (page := dataset_dir(settings) / "report.html").exists():
        print(f"look at it: {page}  (in a browser: pictures, captions, and what to correct in them)")
    return 0


def _not_run(step: str, later: Sequence[str], halt: Halt) -> str:
    """What stopping at a step means for those after it."""
    if not later or halt.code == ExitCode.STOPPED:
        return ""
    by_hand = f" Its table is written: to go on all the same, run {later[0]} and the others one by one." if isinstance(halt, Complaint) else ""
    return f"\nall: stopped at {step}; not run: {', '.join(later)}. What is finished is not done twice when run again.{by_hand}"
