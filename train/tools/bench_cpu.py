"""All rows of benchmark A in one run, and which of them met their goal."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
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
    started, rows = time.perf_counter(), []
    where = bench.machine()
    with tempfile.TemporaryDirectory(prefix="anix-bench-") as temporary:
        folder = Path(temporary)
        if "A1" in only:
            rows += bench_data.index_rows(folder / "index", max(2, repeats - 2))  # a reference takes 10 s each time
        if "A2" in only:
            if tokenizers is None:
                write_model(folder / "model")
            rows += bench_data.caption_rows(folder, tokenizers or folder / "model", max(2, repeats - 2))
        if "A3" in only:
            rows += bench_data.latent_rows(folder / "latents", repeats)
        if "A4" in only:
            rows.append(bench_loop.loop_row(folder / "loop", repeats))
        if "A5" in only:
            rows.append(bench_loop.sync_row(folder / "sync"))
        if "A6" in only:
            rows.append(bench_loop.checkpoint_row(folder / "save"))
        if "A7" in only:
            rows += bench_images.image_rows(max(2, repeats - 2))
        if "A9" in only:
            rows.append(bench_hooks.hooks_row(folder / "hooks", repeats))
        if "A8" in only:
            rows += bench_labels.label_rows(folder / "records", records or bench_labels.CARD_IMAGES)
    return {"machine": where, "rows": rows, "seconds": round(time.perf_counter() - started, 1)}
