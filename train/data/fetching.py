"""The process that fetches whole shards of a published set behind the training. Started as a file; loads no torch.

A process of its own: a download needs no share of the trainer's interpreter, and a thread with open connections would be
copied half into every data worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from train.base.console import EXIT_NOTE, run_cli
from train.base.errors import ExitCode
from train.data.index import Index
from train.data.published import Published
from train.data.selection import in_plan_order
from train.recipe.order import Plan


class Fetching:
    """Owner of that process. What it has fetched is found by the readers; without it they read image by image."""

    def __init__(self, folder: str, shards: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name != EXIT_NOTE}
        self._process = subprocess.Popen([sys.executable, __file__, folder], stdin=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write("\n".join(shards))

    def close(self) -> None:
        """End it, wherever it is: a file gets its name only when it is whole."""
        self._process.terminate()
        self._process.wait()


def fetching(folder: str, kept: Index, held_out: Index, plan: Plan, first_step: int) -> Fetching | None:
    """The process for these images of a set in a store, on the first rank of a machine."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    return Fetching(folder, in_plan_order(kept, held_out, plan, first_step))


def main() -> int:
    """`fetching.py FOLDER`, shards on standard input; says once how many lie here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the trainer's, which ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent, shards = os.getppid(), sys.stdin.read().split("\n")
    published = Published.of(Path(sys.argv[1]))
    if published is not None:
        kept = published.keep(shards, still=lambda: os.getppid() == parent)
        if kept < len(shards):
            print(f"data.cache_gb: {kept} of {len(shards)} shards are kept whole, images of the others are read one by one", file=sys.stderr)
    return ExitCode.DONE


if __name__ == "__main__":
    run_cli(main)
