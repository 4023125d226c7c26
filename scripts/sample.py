#!/usr/bin/env python
"""Pictures from a trained model with the card's settings: Euler ancestral, CFG 7, 28 steps, its negative prompt."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.sample import main

if __name__ == "__main__":
    run_cli(main)
