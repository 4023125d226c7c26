"""Row A8 of benchmark A: the tagging policy over synthetic records, on one core, in a process of its own.

873,504 records, or as many as asked for (`scripts/bench.py cpu --only A8 --rows 10000000`): records are written unit by
unit, so neither side ever holds the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from train.prepare.tables import units
from train.prepare.tables.schemas import RECORDS, ROW_GROUP_ROWS
from train.testing.timing import Timing, row

CARD_IMAGES = 873_504
_DRAWN_UNITS = 4  # differing units; a larger table repeats their posts under keys of its own
_MEAN_TAGS = {"general": 28.0, "character": 1.2, "copyright": 1.1, "artist": 1.0, "meta": 2.5, "species": 0.0}
_CHILD = """
import json, os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from train.prepare import label
from train.config.dataset import DatasetConfig, PolicyConfig, QualityConfig, SourceConfig
folder = Path(sys.argv[1])
policy = PolicyConfig(quality=QualityConfig(source=sys.argv[2]))
settings = DatasetConfig(
    name=folder.name, root=str(folder.parent), sources=[SourceConfig("b", "danbooru", ".")], policy=policy
)
wall, cpu = time.perf_counter(), time.process_time()
label.run(settings)
# Not ru_maxrss, which a child inherits from the process that started it.
peak_kb = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "rss_mb": int(peak_kb) / 1024}
print(json.dumps(found))
"""


def label_rows(folder: Path, rows: int = CARD_IMAGES) -> list[dict[str, Any]]:
    """Seconds of CPU for the step `label` over `rows` records with its peak memory: fixed table, then percentiles."""
    dataset = folder / "labels"
    write_records(dataset, rows)
    found = []
    for quality in ("table", "empirical"):
        told = label_seconds(dataset, quality)
        what = f"labels of {rows:,} records, quality.source {quality}, one core"
        notes = {"peak RSS, MB": round(told["rss_mb"]), "records per CPU second": round(rows / told["cpu_s"])}
        timings = {"ours": Timing([told["cpu_s"]], [told["wall_s"]])}
        found.append(row("A8", what, "873,504 in <= 60 s; <= 2 GB at any size", timings, rows, notes=notes))
    return found


def label_seconds(dataset: Path, quality: str = "table") -> dict[str, float]:
    """wall_s, cpu_s and rss_mb of the step, run by a process that does nothing else."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _CHILD, str(dataset.resolve()), quality]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_records(dataset: Path, rows: int, seed: int = 0) -> None:
    """A finished table of records: as many tags per post as real ones have, few of them common, most of them rare."""
    draw = np.random.default_rng(seed)
    vocabulary = pa.array(["1girl", "solo", "1boy", *(f"tag_number_{n}" for n in range(40_000))])
    names = pa.array([f"hero_{n}_(series)" for n in range(60_000)])
    step, files, drawn = units.Step(dataset, "records", RECORDS, "bench"), [], []
    for number, start in enumerate(range(0, rows, ROW_GROUP_ROWS)):
        size = min(ROW_GROUP_ROWS, rows - start)
        if number < _DRAWN_UNITS:
            drawn.append(_unit(draw, ROW_GROUP_ROWS, vocabulary, names))
        part = drawn[number % _DRAWN_UNITS].slice(0, size)
        keys = pa.array([f"b:{n:09d}" for n in range(start, start + size)])
        for name in ("key", "uri", "raw_hash"):
            part = part.set_column(part.schema.get_field_index(name), RECORDS.field(name), keys)
        files.append(f"{number:05d}-{0:016x}.parquet")
        units.write_parquet(step.folder / files[-1], part)
    units.finalize(step, files)


def _unit(draw: np.random.Generator, size: int, vocabulary: pa.Array, names: pa.Array) -> pa.Table:
    columns = {field.name: pa.nulls(size, field.type) for field in RECORDS}
    columns |= dict.fromkeys(("key", "uri", "raw_hash"), pa.repeat(pa.scalar(""), size))  # set per unit
    columns |= {"source": pa.repeat(pa.scalar("b"), size), "file_ext": pa.repeat(pa.scalar("jpg"), size)}
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
