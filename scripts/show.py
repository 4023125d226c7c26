#!/usr/bin/env python
"""Look inside: a caption, an image's bucket, a dataset and what it set aside, a checkpoint, a model, an update, the keys."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.show import main

if __name__ == "__main__":
    run_cli(main)
