#!/usr/bin/env python
"""From raw images to a training set: one step, or all of them."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.prepare import main

if __name__ == "__main__":
    run_cli(main)
