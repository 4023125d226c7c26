#!/usr/bin/env python
"""The stages of a recipe in order, finished ones skipped; of a folder by new.py everything, from prepare to report."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.recipe import main

if __name__ == "__main__":
    run_cli(main)
