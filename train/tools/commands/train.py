"""One stage, train/run.py under its launcher; the exit code is the trainer's. After `--`: options of the launcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse and run one stage."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s --config YAML ... [key=value ...] [-- OPTION ...]")
    parser.add_argument("--config", action="append", required=True, type=Path, metavar="YAML", help="stage YAML; later ones win")
    parser.add_argument("--launch", type=Path, help="accelerate config, e.g. launch/two_gpus.yaml")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, without --launch (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the files")
    arguments = parser.parse_intermixed_args(words[:end])

    from train.tools.stages import run_stage

    return run_stage(arguments.config, arguments.overrides, arguments.launch, arguments.processes, words[end + 1 :])
