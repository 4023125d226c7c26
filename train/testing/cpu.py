"""All rows of benchmark A in one run, and which of them met their goal."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.testing import timing
from train.tools.tiny.model import write_model

ROWS = ("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10")


def command(arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], object]) -> tuple[dict[str, Any], str]:
    """(result, its text) of `bench.py cpu`. Raises Halt(USAGE) for an unknown row."""
    only = arguments.only.split(",")
    if unknown := sorted(set(only) - set(ROWS)):
        raise Halt(ExitCode.USAGE, f"--only {unknown[0]} is no row; choose from {', '.join(ROWS)}")
    result = run(only, arguments.repeats, arguments.tokenizers, arguments.rows)
    return result, timing.describe(result)


def run(
    only: Sequence[str] = ROWS, repeats: int = timing.REPEATS, tokenizers: Path | None = None, records: int | None = None
) -> dict[str, Any]:
    """{"machine": ..., "rows": [...]}; at most five minutes on two idle cores. References come from the environment.

    tokenizers: folder with tokenizer/ and tokenizer_2/; None = the tiny world's, on both sides. records: to label in
    row A8; None = the card's 873,504.
    """
    from train.testing import data, hooks, images, labels, loop

    warnings.simplefilter("ignore")  # of libraries, about the references' old calls
    logging.getLogger("anix").setLevel(logging.ERROR)
    started = time.perf_counter()
    where = timing.machine()
    fewer = max(2, repeats - 2)  # where a reference takes 10 s each time
    with tempfile.TemporaryDirectory(prefix="anix-bench-") as temporary:
        folder = Path(temporary)
        if tokenizers is None and "A2" in only:
            write_model(folder / "model")
        makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "A1": lambda: data.index_rows(folder / "index", repeats),
            "A2": lambda: data.caption_rows(folder, tokenizers or folder / "model", fewer),
            "A3": lambda: data.latent_rows(folder / "latents", repeats),
            "A4": lambda: [loop.loop_row(folder / "loop", repeats)],
            "A5": lambda: [loop.sync_row(folder / "sync")],
            "A6": lambda: [loop.checkpoint_row(folder / "save")],
            "A7": lambda: images.image_rows(fewer),
            "A8": lambda: labels.label_rows(folder / "records", records or labels.CARD_IMAGES),
            "A9": lambda: [hooks.hooks_row(folder / "hooks", repeats)],
            "A10": lambda: [loop.optimizer_row(repeats)],
        }
        rows, seconds = list[dict[str, Any]](), dict[str, float]()
        for name, make in makers.items():
            if name in only:
                began = time.perf_counter()
                rows += make()
                seconds[name] = round(time.perf_counter() - began, 1)
    seconds["all"] = round(time.perf_counter() - started, 1)
    return {"machine": where, "rows": rows, "seconds": seconds}
