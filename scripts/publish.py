#!/usr/bin/env python
"""A finished run or a prepared set to a page of the hub, or to an object store, with a card made from its records; a dry run unless --go."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.base.console import run_cli
from train.tools.commands.publish import main

if __name__ == "__main__":
    run_cli(main)
