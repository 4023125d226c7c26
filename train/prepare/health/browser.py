"""Captions with their pictures for the page to search and to correct: what the page is given, and its script.

Hard-excluded records are not among them, nor in the corrections that the page shows: their labels do not exist.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.choosing.facts import among
from train.prepare.label import token_counter
from train.prepare.probe import ok_files
from train.prepare.tables.units import read_table, row_hash, stream_table
from train.prepare.tagging.corrections import read_corrections
from train.recipe.captions import read_variant

_LABELS = ["key", "fixed_tags", "flex_tags", "tail_tags", "prose", "tag_variants", "quality", "rating_tags", "year", "aesthetic"]
Shown = dict[str, Any]


class Texts:
    """Numbers for the texts of captions, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, texts: Sequence[str] | None) -> list[int]:
        """The numbers of some texts, in order."""
        return [self.numbers.setdefault(text, len(self.numbers)) for text in texts or ()]


def browsed(settings: DatasetConfig, stages: Mapping[str, pa.Array]) -> Shown:
    """What the page's script reads, without thumbnails: texts and their tokens, pictures in order of keys, corrections.

    `stages`: the keys of each selection. Of more than `report.captions` pictures a draw that depends on seed and keys alone.
    """
    dataset, most = dataset_dir(settings), settings.report.captions
    sound = ok_files(settings, ["key"]).column("key").combine_chunks()
    refused = read_table(dataset, "select", ["key"]).column("key").combine_chunks()
    total, found = 0, list[tuple[int, str, Shown]]()
    for part in stream_table(dataset, "labels", _LABELS):
        part = among(part, sound)
        part = part.filter(pc.invert(pc.is_in(part["key"], value_set=refused)))
        total += len(part)
        marks = [(row_hash(settings.seed, "captions", key), row) for row, key in enumerate(part["key"].to_pylist())]
        best = heapq.nsmallest(most, marks)
        rows = part.take(pa.array([row for _, row in best], pa.int64())).to_pylist()
        found = heapq.nsmallest(most, [*found, *((mark, row["key"], row) for (mark, _), row in zip(best, rows, strict=True))])
    texts, near = Texts(), _alike(settings)
    members = {stage: set(keys.to_pylist()) for stage, keys in stages.items()}
    pictures = [_picture(row, texts, near, members) for _, _, row in sorted(found, key=lambda one: one[1])]
    tokens, bare = _tokens(settings, list(texts.numbers))
    return {
        "texts": list(texts.numbers), "tokens": tokens, "bare": bare, "stages": list(stages), "pictures": pictures,
        "separator": settings.separator, "of": total, "corrections": _corrections(settings),
    }  # fmt: skip


def _picture(row: Mapping[str, Any], texts: Texts, near: Mapping[str, int], members: Mapping[str, set[str]]) -> Shown:
    words = {row["quality"], row["year"], row["aesthetic"], *(row["rating_tags"] or ())} - {None}
    parts = {name: texts.of(row[column]) for name, column in (
        ("fixed", "fixed_tags"), ("flex", "flex_tags"), ("tail", "tail_tags"), ("prose", "prose"))}  # fmt: skip
    return {
        "key": row["key"], **parts,
        "variants": [[texts.of(part) for part in read_variant(text)] for text in row["tag_variants"] or ()],
        "policy": [texts.numbers[word] for word in sorted(words) if word in texts.numbers],
        "stages": [number for number, keys in enumerate(members.values()) if row["key"] in keys],
        "near": near.get(row["key"], 0),
    }  # fmt: skip


def _alike(settings: DatasetConfig) -> dict[str, int]:
    """Number, from 1, of the look-alikes that a key belongs to; the copies of one picture are among its own."""
    rows = read_table(dataset_dir(settings), "dupes", ["key", "method", "group_id"]).to_pylist()
    group_of: dict[str, int] = {}
    members: dict[int, list[str]] = {}
    by_group: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        by_group.setdefault((row["method"], row["group_id"]), []).append(row["key"])
    for number, keys in enumerate(by_group.values(), 1):
        joined = [key for old in {group_of[key] for key in keys if key in group_of} for key in members.pop(old)]
        members[number] = list(dict.fromkeys([*joined, *keys]))
        group_of |= dict.fromkeys(members[number], number)
    return group_of


def _tokens(settings: DatasetConfig, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """(tokens with the comma that follows, tokens of the text as the last): by the set's tokenizer, else CLIP's."""
    from train.model.text import load_tag_tokenizer

    count, _ = token_counter(settings.tokenizers)
    if count is None:
        tokenizer = load_tag_tokenizer(None)
        return tuple([len(tokenizer.content_ids([text + end])) for text in texts] for end in (",", ""))  # type: ignore[return-value]
    return [count(text + ",") for text in texts], [count(text) for text in texts]


def _corrections(settings: DatasetConfig) -> list[list[str]]:
    """Rows of the corrections in use, for the export to hold them too; without those of records that ingest excluded."""
    corrections = read_corrections(settings.corrections, settings.separator)
    if not corrections.changes:
        return []
    keys, gone = pa.array(sorted(corrections.changes), pa.string()), set[str]()
    for part in stream_table(dataset_dir(settings), "records", ["key", "hard_exclusion"]):
        gone |= set(among(part.filter(pc.is_valid(part["hard_exclusion"])), keys)["key"].to_pylist())
    return [list(row) for row in corrections.rows() if row[0] not in gone]
