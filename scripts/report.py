#!/usr/bin/env python
"""One self-contained HTML page about one or several runs: curves, held-out loss, samples, configs, lineage."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.report import main

if __name__ == "__main__":
    run_cli(main)
