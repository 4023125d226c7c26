"""All rows of benchmark A in one run, and which of them met their goal."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.tools import bench
from train.tools.tiny_model import write_model

ROWS = ("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9")


def run(
    only: Sequence[str] = ROWS, repeats: int = bench.REPEATS, tokenizers: Path | None = None, records: int | None = None
) -> dict[str, Any]:
    """{"machine": ..., "rows": [...]}; at most five minutes on two idle cores. References come from the environment.

    tokenizers: folder with tokenizer/ and tokenizer_2/; None = the tiny world's, on both sides. records: to label in
    row A8; None = the card's 873,504.
    """
    from train.tools import (  # torch and diffusers, some seconds
        bench_data,
        bench_hooks,
        bench_images,
        bench_labels,
        bench_loop,
    )

    warnings.simplefilter("ignore")  # of libraries, about the references' old calls
    logging.getLogger("anix").setLevel(logging.ERROR)
    started = time.perf_counter()
    where = bench.machine()
    fewer = max(2, repeats - 2)  # where a reference takes 10 s each time
    with tempfile.TemporaryDirectory(prefix="anix-bench-") as temporary:
        folder = Path(temporary)
        if tokenizers is None and "A2" in only:
            write_model(folder / "model")
        makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "A1": lambda: bench_data.index_rows(folder / "index", repeats),
            "A2": lambda: bench_data.caption_rows(folder, tokenizers or folder / "model", fewer),
            "A3": lambda: bench_data.latent_rows(folder / "latents", repeats),
            "A4": lambda: [bench_loop.loop_row(folder / "loop", repeats)],
            "A5": lambda: [bench_loop.sync_row(folder / "sync")],
            "A6": lambda: [bench_loop.checkpoint_row(folder / "save")],
            "A7": lambda: bench_images.image_rows(fewer),
            "A8": lambda: bench_labels.label_rows(folder / "records", records or bench_labels.CARD_IMAGES),
            "A9": lambda: [bench_hooks.hooks_row(folder / "hooks", repeats)],
        }
        rows, seconds = list[dict[str, Any]](), dict[str, float]()
        for name, make in makers.items():
            if name in only:
                began = time.perf_counter()
                rows += make()
                seconds[name] = round(time.perf_counter() - began, 1)
    seconds["all"] = round(time.perf_counter() - started, 1)
    return {"machine": where, "rows": rows, "seconds": seconds}
