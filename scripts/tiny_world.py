#!/usr/bin/env python
"""Draws the tiny world: pictures with booru posts, and a tiny SDXL to start from. Nothing is downloaded."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.tiny_world import main

if __name__ == "__main__":
    run_cli(main)
