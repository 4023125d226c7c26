"""What the health report says of captions: lengths, empty ones, equal texts, and the last look for hard exclusions."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig, dataset_dir
from train.data.index_writer import encoded, suspicious_rows, tag_hashes
from train.prepare.choosing.facts import among
from train.prepare.label import token_counter
from train.prepare.tables.units import stream_table
from train.recipe.captions import read_variant, render
from train.recipe.exclusions import excluded_by

Facts = dict[str, Any]
TOKEN_EDGES = (0, 25, 50, 75, 100, 125, 150, 175, 200, 225, 300, 1 << 15)
LIMITS = (75, 150, 225)
EXAMPLES = 5  # of captions over each limit
_PARTS = ("fixed_tags", "flex_tags", "tail_tags", "prose")
_COLUMNS = ["key", *_PARTS, "tag_variants", "n_tokens"]


def caption_facts(settings: DatasetConfig, stages: dict[str, pa.Table]) -> Facts:
    """Counts over the captions of every selected image, unit by unit."""
    keys = _selected(stages)
    empty = no_fixed = excluded = fixed_over = 0
    marks, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    longest: dict[int, list[tuple[int, str, str]]] = {limit: [] for limit in LIMITS}
    count_tokens, _ = token_counter(settings.tokenizers)
    for part in stream_table(dataset_dir(settings), "labels", _COLUMNS):
        part = among(part, keys)
        columns = {name: encoded(part.column(name).combine_chunks()) for name in (*_PARTS, "tag_variants")}
        sizes = [pc.fill_null(pc.list_value_length(columns[name]), 0).to_numpy() for name in _PARTS]
        no_fixed += int((sizes[0] == 0).sum())
        empty += int((sum(sizes) == 0).sum())
        marks.append(_text_marks([columns[name] for name in _PARTS]))
        excluded += _excluded(settings, part, columns)
        tokens = part.column("n_tokens").drop_null().to_numpy().astype(np.int64)
        lengths.append(tokens)
        if len(tokens):
            _add_longest(longest, part)
        if count_tokens is not None:
            over = part.filter(pc.fill_null(pc.greater(part.column("n_tokens"), 225), False))
            for tags in over.column("fixed_tags").to_pylist():
                fixed_over += sum(count_tokens(tag + ",") for tag in tags[:-1]) + sum(map(count_tokens, tags[-1:])) > 225
    _, repeats = np.unique(np.concatenate(marks), return_counts=True)
    return {
        "rows": len(keys), "empty": empty, "no_fixed_part": no_fixed,
        "tokens": _tokens(np.concatenate(lengths), longest, fixed_over),
        "texts_that_repeat": int(repeats[repeats > 1].sum()), "hard_excluded": excluded,
    }  # fmt: skip


def _selected(stages: dict[str, pa.Table]) -> pa.Array:
    """Keys of all stages, each once, rising."""
    every = pa.chunked_array([chunk for t in stages.values() for chunk in t.column("key").chunks], pa.string())
    unique = pc.unique(every)
    return unique.take(pc.sort_indices(unique))


def _tokens(lengths: np.ndarray, longest: dict[int, list[tuple[int, str, str]]], fixed_over: int) -> Facts | None:
    if len(lengths) == 0:
        return None
    histogram, _ = np.histogram(lengths, bins=TOKEN_EDGES)
    return {
        "rows": len(lengths), "mean": round(float(lengths.mean()), 1), "max": int(lengths.max()),
        "histogram": [[low, high - 1, int(n)] for (low, high), n in
                      zip(itertools.pairwise(TOKEN_EDGES), histogram, strict=True)],
        **{f"over_{limit}": int((lengths > limit).sum()) for limit in LIMITS},
        "fixed_over_225": fixed_over,
        "examples": {str(limit): [{"key": key, "n_tokens": -number, "text": text} for number, key, text in rows]
                     for limit, rows in longest.items()},
    }  # fmt: skip


def _add_longest(longest: dict[int, list[tuple[int, str, str]]], part: pa.Table) -> None:
    """The longest captions between each limit and the next."""
    numbers = part.column("n_tokens").fill_null(0).to_numpy().astype(np.int64)
    for low, high in zip(LIMITS, [*LIMITS[1:], 1 << 16], strict=True):
        mine = np.flatnonzero((numbers > low) & (numbers <= high))
        best = mine[np.argsort(-numbers[mine], kind="stable")[:EXAMPLES]]
        rows = part.take(pa.array(best)).to_pylist()
        new = [(-row["n_tokens"], row["key"], render(row["fixed_tags"], row["flex_tags"], row["tail_tags"] or ())) for row in rows]
        longest[low] = heapq.nsmallest(EXAMPLES, [*longest[low], *new])


def _text_marks(columns: Sequence[pa.Array]) -> np.ndarray:
    """uint64 per caption, equal for equal texts."""
    parts = [tag_hashes(column) for column in columns]
    marks = np.empty(len(columns[0]), np.uint64)
    for row in range(len(marks)):
        pair = tuple(values[starts[row] : starts[row + 1]].tobytes() for starts, values in parts)
        marks[row] = hash(pair) & 0xFFFFFFFFFFFFFFFF
    return marks


def _excluded(settings: DatasetConfig, part: pa.Table, columns: dict[str, pa.Array]) -> int:
    """Captions that the hard exclusions refuse: none, unless a gate failed. Fixed tags may be names."""
    read = {"flex_tags": False, "tail_tags": False, "prose": True, "tag_variants": True}  # whether as text
    hits = np.unique(np.concatenate([suspicious_rows(columns[name], prose=text) for name, text in read.items()]))
    rows = part.take(pa.array(hits, pa.int64())).select(["key", *read]).to_pylist()
    if not rows:
        return 0
    wanted = pa.array([row["key"] for row in rows], pa.string())
    assumed = {source.name: source.assume_rating for source in settings.sources}
    ratings: dict[str, str | None] = {}
    for records in stream_table(dataset_dir(settings), "records", ["key", "source", "rating"]):
        for row in records.filter(pc.is_in(records.column("key"), value_set=wanted)).to_pylist():
            ratings[row["key"]] = row["rating"] or assumed.get(row["source"])
    found = 0
    for row in rows:
        tags = [*row["flex_tags"], *(row["tail_tags"] or ())]
        tags += [tag for variant in map(read_variant, row["tag_variants"] or ()) for some in variant[1:] for tag in some]
        caption = "\n".join(row["prose"] or ()) or None
        found += excluded_by(rating=ratings.get(row["key"]), tags=tags, caption=caption) is not None
    return found
