#!/usr/bin/env python
"""A page to draw with in the browser: the base's words and prompts, several stages side by side from one seed (extra: demo)."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.demo import main

if __name__ == "__main__":
    run_cli(main)
