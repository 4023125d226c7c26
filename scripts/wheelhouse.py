#!/usr/bin/env python
"""Collects the wheels that a machine without network lacks, checks that nothing is missing, prints the install line."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from train.exits import run_cli


def main() -> None:
    """Parse, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="of the target machine")
    parser.add_argument("--have", type=Path, required=True, metavar="LIST.txt", help="`pip list` of the target machine")
    parser.add_argument("--out", type=Path, default=Path("wheels"))
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="also torchao, bitsandbytes, ...")
    parser.add_argument(
        "--pins", type=Path, default=Path("constraints.txt"), help="constraints file that decides versions"
    )
    arguments = parser.parse_args()
    from train.tools import wheelhouse

    wheels = wheelhouse.collect(arguments.out, arguments.have, arguments.python, arguments.extra, arguments.pins)
    for wheel in wheels:
        print(f"{wheel.path.stat().st_size / 2**20:8.2f} MiB  {wheel.path.name}")
    print(f"{sum(wheel.path.stat().st_size for wheel in wheels) / 2**20:8.2f} MiB in {len(wheels)} wheels")
    print(wheelhouse.install_line(arguments.out))


if __name__ == "__main__":
    run_cli(main)
