"""The stages of a recipe in order, finished ones skipped; of a folder by new.py everything, from prepare to report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse and run; stops at the first failing part with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", default=[], metavar="DIR | [STAGE:]key=value", help="folder of new.py; settings for every stage, or for one, as ft1:batch.micro=12")
    parser.add_argument("--configs", nargs="+", type=Path, default=[], metavar="YAML", help="one per stage, in place of DIR")
    parser.add_argument("--launch", type=Path, help="accelerate config, e.g. configs/launch/two_gpus.yaml")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine, without --launch")
    arguments = parser.parse_intermixed_args()
    # `--configs a b key=value`: argparse gives everything to --configs, so the overrides are told apart by "=".
    overrides = [word for word in (*map(str, arguments.configs), *arguments.words) if "=" in word]
    folders = [Path(word) for word in arguments.words if "=" not in word]
    configs = [config for config in arguments.configs if "=" not in str(config)]
    if len(folders) + bool(configs) != 1:
        parser.error("name one folder that new.py wrote, or --configs with a YAML per stage")

    from train.tools.folder import run_folder
    from train.tools.stages import run_stages

    if folders:
        sample = "anix sample" if Path(sys.argv[0]).name.startswith("anix") else "python scripts/sample.py"
        return run_folder(folders[0].absolute(), overrides, arguments.launch, arguments.processes, sample)
    return run_stages(configs, overrides, arguments.launch, arguments.processes)
