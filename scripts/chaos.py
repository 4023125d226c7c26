#!/usr/bin/env python
"""Kill a tiny run at random moments on 1 and 2 processes; its result must equal a straight run's to the last bit."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import tempfile

# Before torch is loaded: its threads would not survive the forks, and their number decides last bits.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from train.base.console import run_cli
from train.base.errors import ExitCode


def main() -> int:
    """Exit code 1 when any promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="interruptions in all (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="decides moments, signals and world sizes (default 0)")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 2], choices=(1, 2, 4), help="processes of a launch (default 1 2)"
    )
    parser.add_argument("--work", type=Path, help="keep world, runs and logs here (default: a temporary directory)")
    arguments = parser.parse_args()

    from train.testing.chaos.kills import run_chaos

    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        tally = run_chaos(
            arguments.kills,
            arguments.seed,
            work,
            lambda line: print(line, file=sys.stderr, flush=True),
            arguments.worlds,
        )
    print("\n".join(tally.lines()))
    return ExitCode.UNEXPECTED if tally.problems else ExitCode.DONE


if __name__ == "__main__":
    run_cli(main)
