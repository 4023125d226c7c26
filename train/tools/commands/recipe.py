"""The stages of the recipe in order, each from its predecessor; finished stages are skipped."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> int:
    """Parse and run; stops at the first failing stage with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", type=Path, required=True, metavar="YAML", help="one per stage")
    parser.add_argument("--launch", type=Path, help="accelerate config, e.g. configs/launch/two_gpus.yaml")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, without --launch")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for every stage")
    arguments, unknown = parser.parse_known_args()
    # `--configs a b key=value`: argparse gives everything to --configs, so the overrides are told apart by "=".
    overrides = [str(c) for c in arguments.configs if "=" in str(c)] + arguments.overrides
    if unknown:
        parser.error(f"unknown arguments {unknown}")
    configs = [config for config in arguments.configs if "=" not in str(config)]

    from train.tools.stages import run_stages

    return run_stages(configs, overrides, arguments.launch, arguments.processes)
