#!/usr/bin/env python
"""Diffusers folder <-> single file; an adapter in kohya's names <-> its folder; merge, extract, add; sd-scripts TOML -> YAML, and its options."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.convert import main

if __name__ == "__main__":
    run_cli(main)
