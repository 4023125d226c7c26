#!/usr/bin/env python
"""Dry run of a stage: updates, learning rates, memory, disk, time and cost. Nothing is trained; exit 7 = cannot fit."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.plan import main

if __name__ == "__main__":
    run_cli(main)
