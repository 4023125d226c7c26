#!/usr/bin/env python
"""Weights to start from, at one commit: the recipe's own, a model of the hub, an address."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.fetch import main

if __name__ == "__main__":
    run_cli(main)
