"""Counts over captions in the health report, against numbers counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from train.config.dataset import DatasetConfig, SourceConfig
from train.prepare.choosing.facts import between
from train.prepare.health import captions
from train.prepare.health.captions import caption_facts
from train.prepare.health.page import counted, table
from train.prepare.tables import units
from train.prepare.tables.schemas import LABELS, RECORDS


def _labels(dataset: Path, rows: list[dict[str, Any]], per_unit: int) -> None:
    blank = {"policy_hash": "p", "quality": None, "rating_tags": [], "year": None, "aesthetic": None}
    step, names = units.Step(dataset, "labels", LABELS, "c"), []
    for number, start in enumerate(range(0, len(rows), per_unit)):
        names.append(f"{number:05d}-x.parquet")
        table_ = pa.Table.from_pylist([blank | row for row in rows[start : start + per_unit]], schema=LABELS)
        units.write_parquet(dataset / "labels" / names[-1], table_)
    units.finalize(step, names)


def _records(dataset: Path, ratings: dict[str, str | None]) -> None:
    plain: dict[str, Any] = dict.fromkeys(RECORDS.names, None) | {
        "source": "s", "uri": "u", "file_ext": "png", "raw_hash": "r", "is_deleted": False, "is_banned": False,
        "is_pending": False, "has_children": False, **{name: [] for name in RECORDS.names if name.startswith("tags_")},
    }  # fmt: skip
    rows = [plain | {"key": key, "rating": rating} for key, rating in ratings.items()]
    schema = pa.schema([f.with_type(pa.string()) if f.name == "rating" else f for f in RECORDS])
    units.write_parquet(dataset / "records" / "0.parquet", pa.Table.from_pylist(rows, schema=schema).cast(RECORDS))
    units.finalize(units.Step(dataset, "records", RECORDS, "c"), ["0.parquet"])


@pytest.mark.parametrize("per_unit", [2, 10])
def test_captions_are_counted(tmp_path: Path, per_unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # one token per letter, comma included
    monkeypatch.setattr(captions, "token_counter", lambda folder: (len, "letters"))
    rows = [
        {"key": "s:1", "fixed_tags": ["a" * 100, "b" * 125], "flex_tags": ["c"], "n_tokens": 228},  # 101 + 125 = 226
        {"key": "s:2", "fixed_tags": ["a" * 100, "b" * 124], "flex_tags": ["c" * 9], "n_tokens": 235},  # 225: fits
        {"key": "s:3", "fixed_tags": [], "flex_tags": [], "n_tokens": 0},
        {"key": "s:4", "fixed_tags": [], "flex_tags": ["x" * 80], "n_tokens": 80},
        {"key": "s:5", "fixed_tags": ["hat"], "flex_tags": ["smile"], "n_tokens": 9},
        {"key": "s:6", "fixed_tags": ["hat"], "flex_tags": ["smile"], "n_tokens": 9},
        {"key": "s:7", "fixed_tags": ["hat", "smile"], "flex_tags": [], "n_tokens": 9},
        {"key": "s:8", "fixed_tags": [], "flex_tags": ["loli"], "n_tokens": 4},  # a gate that failed
        {"key": "s:9", "fixed_tags": [], "flex_tags": ["not selected"], "n_tokens": 300},
        # parts of version 2: a caption of prose alone is none without words, and gates that failed for a tail and a text
        {"key": "s:a", "fixed_tags": [], "flex_tags": [], "prose": ["A hat."], "n_tokens": 0},
        {"key": "s:b", "fixed_tags": ["hat"], "flex_tags": [], "tail_tags": ["loli"], "n_tokens": 0},
        {"key": "s:c", "fixed_tags": ["hat"], "flex_tags": [], "prose": ["A hat.", "A loli."], "n_tokens": 0},
        {"key": "s:d", "fixed_tags": ["hat"], "flex_tags": [], "tag_variants": ["a\nloli\n"], "n_tokens": 0},
        {"key": "s:e", "fixed_tags": ["hat"], "flex_tags": ["smile"], "tail_tags": ["grainy"], "n_tokens": 9},  # no repeat
    ]
    _labels(tmp_path / "d", rows, per_unit)
    _records(tmp_path / "d", {row["key"]: "g" for row in rows})
    settings = DatasetConfig(name="d", root=str(tmp_path), sources=[SourceConfig("s", "danbooru", ".")])
    stages = {
        "one": pa.table({"key": ["s:1", "s:2", "s:3", "s:4", "s:5"]}),
        "two": pa.table({"key": ["s:5", "s:6", "s:7", "s:8", "s:a", "s:b", "s:c", "s:d", "s:e"]}),
    }
    found = caption_facts(settings, stages)
    tokens = found.pop("tokens")
    assert found == {"rows": 13, "empty": 1, "no_fixed_part": 4, "texts_that_repeat": 2, "hard_excluded": 4}
    assert (tokens["over_75"], tokens["over_150"], tokens["over_225"], tokens["fixed_over_225"]) == (3, 2, 2, 1)
    assert tokens["max"] == 235
    assert [row["key"] for row in tokens["examples"]["225"]] == ["s:2", "s:1"]
    assert [(row["key"], row["n_tokens"]) for row in tokens["examples"]["75"]] == [("s:4", 80)]
    assert tokens["examples"]["75"][0]["text"] == ", ||| " + "x" * 80


def test_between_keeps_all_that_a_unit_can_meet() -> None:
    keys = pa.array(["a", "c", "e", "g"])
    for part in (["a"], ["b", "d"], ["c", "e"], ["0"], ["h", "i"], ["0", "z"]):
        kept = between(keys, pa.chunked_array([pa.array(part)])).to_pylist()
        assert set(part) & {"a", "c", "e", "g"} <= set(kept)
        assert all(key <= part[-1] for key in kept)
    assert len(between(keys, pa.chunked_array([], pa.string()))) == 0


def test_shares_stand_to_the_right_and_one_is_not_many() -> None:
    html = table(["name", "share"], [["a", "3.5 %"], ["b", "10.0 %"]])
    assert html.count('<td class="n">') == 2
    assert table(["name"], [["3 of 4"]]).count('class="n"') == 0
    assert [counted(n, "picture is", "pictures are") for n in (1, 2000)] == ["1 picture is", "2,000 pictures are"]
