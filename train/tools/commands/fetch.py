"""Weights to start from, at one commit: the recipe's own, a model of the hub, an address."""

from __future__ import annotations

import argparse
from pathlib import Path

from train.base.errors import ExitCode


def main() -> int:
    """Parse, fetch one after another, say what lies where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="+", metavar="WHAT",
        help="base, vae, tokenizers, owner/name[@REVISION][:FILE], or the address of a .safetensors; what lies there already is held to its hash",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for it (default: models)")
    arguments = parser.parse_args()
    from train.tools.fetch import fetch

    for what in arguments.what:
        for line in fetch(what, arguments.out):
            print(line, flush=True)
    return ExitCode.DONE
