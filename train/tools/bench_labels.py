"""Row A8 of benchmark A: the tagging policy over 873,504 synthetic records, on one core, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from train.prepare import units
from train.prepare.records import RECORDS, ROW_GROUP_ROWS
from train.tools.bench import Timing, row

CARD_IMAGES = 873_504
_MEAN_TAGS = {"general": 28.0, "character": 1.2, "copyright": 1.1, "artist": 1.0, "meta": 2.5, "species": 0.0}
_CHILD = """
import json, os, resource, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from train.prepare import label
from train.prepare.settings import DatasetConfig, SourceConfig
folder = Path(sys.argv[1])
settings = DatasetConfig(name=folder.name, root=str(folder.parent), sources=[SourceConfig("b", "danbooru", ".")])
wall, cpu = time.perf_counter(), time.process_time()
label.run(settings)
found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
         "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
print(json.dumps(found))
"""


def label_row(folder: Path, rows: int = CARD_IMAGES) -> dict[str, Any]:
    """One row: seconds of CPU for the step `label` over `rows` records, with its peak memory."""
    write_records(folder / "labels", rows)
    found = label_seconds(folder / "labels")
    what = f"labels of {rows:,} records, one core, CPU seconds"
    timing = Timing([found["cpu_s"]], [found["wall_s"]])
    return row("A8", what, "<= 60 s, <= 2 GB", {"ours": timing}, rows, notes={"peak RSS, MB": round(found["rss_mb"])})


def label_seconds(dataset: Path) -> dict[str, float]:
    """wall_s, cpu_s and rss_mb of the step, run by a process that does nothing else."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(dataset.resolve())], cwd=root, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_records(dataset: Path, rows: int, seed: int = 0) -> None:
    """A finished table of records: as many tags per post as real ones have, few of them common, most of them rare."""
    draw = np.random.default_rng(seed)
    vocabulary = pa.array(["1girl", "solo", "1boy", *(f"tag_number_{n}" for n in range(40_000))])
    names = pa.array([f"hero_{n}_(series)" for n in range(60_000)])
    keys = pa.array(np.sort([f"b:{n}" for n in range(rows)]))
    step, files = units.Step(dataset, "records", RECORDS, "bench"), []
    for number, start in enumerate(range(0, rows, ROW_GROUP_ROWS)):
        part = keys[start : start + ROW_GROUP_ROWS]
        files.append(f"{number:05d}-{0:016x}.parquet")
        units.write_parquet(step.folder / files[-1], _unit(draw, part, vocabulary, names))
    units.finalize(step, files)


def _unit(draw: np.random.Generator, keys: pa.Array, vocabulary: pa.Array, names: pa.Array) -> pa.Table:
    size = len(keys)
    columns = {field.name: pa.nulls(size, field.type) for field in RECORDS}
    for name in ("key", "source", "uri", "file_ext", "raw_hash"):
        columns[name] = keys
    for name in ("is_deleted", "is_banned", "is_pending", "has_children"):
        columns[name] = pa.array(np.zeros(size, bool))
    columns["rating"] = pa.array(draw.choice(list("gsqe"), size)).dictionary_encode()
    columns["score"] = pa.array(draw.geometric(0.04, size))
    columns["created_year"] = pa.array(draw.integers(2005, 2025, size))
    for group, mean in _MEAN_TAGS.items():
        lengths = draw.poisson(mean, size)
        total = int(lengths.sum())
        words = vocabulary if group in ("general", "meta") else names
        # a long tail for general tags, as on the boards; names are spread evenly
        common = group in ("general", "meta")
        chosen = np.minimum(draw.zipf(1.3, total), len(words)) - 1 if common else draw.integers(0, len(words), total)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns[f"tags_{group}"] = pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(chosen)))
    return pa.table({field.name: columns[field.name] for field in RECORDS}).cast(RECORDS)
