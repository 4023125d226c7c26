#!/usr/bin/env python
"""Judges the samples of stages: aesthetic score, CLIP, tagger; with intervals, paired over equal prompts and seeds."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.quality import main

if __name__ == "__main__":
    run_cli(main)
