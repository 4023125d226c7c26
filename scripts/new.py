#!/usr/bin/env python
"""Your pictures to a recipe: looks at folder, base and card, decides, and writes a folder whose every line has its reason."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.new import main

if __name__ == "__main__":
    run_cli(main)
