"""Duplicate groups against comparisons of every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from train.config.dataset import DatasetConfig, DedupeConfig, SourceConfig
from train.prepare import dedupe
from train.prepare.tables import units
from train.prepare.tables.schemas import PROBE, RECORDS

near = st.lists(st.tuples(st.sampled_from([0, (1 << 64) - 1, 0x0F0F << 24]), st.lists(st.integers(0, 63), max_size=5)), max_size=14)


@given(near, st.integers(0, 4))
def test_near_groups_are_exact(drawn: list[tuple[int, list[int]]], distance: int) -> None:
    hashes = []
    for value, flipped in drawn:
        for bit in flipped:
            value ^= 1 << bit
        hashes.append(value)
    groups = [{i} for i in range(len(hashes))]
    for i, one in enumerate(hashes):
        for j, other in enumerate(hashes):
            if (one ^ other).bit_count() <= distance and groups[i] is not groups[j]:
                groups[i] |= groups[j]
                for member in groups[i]:
                    groups[member] = groups[i]
    wanted = {frozenset(group) for group in groups if len(group) > 1}
    found = dedupe.near_groups(np.array(hashes, dtype=np.uint64), distance)
    assert {frozenset(group) for group in found} == wanted
    assert all(group == sorted(group) for group in found)


def test_thousands_of_equal_hashes_are_one_group() -> None:
    hashes = np.array([7] * 50_000 + [6, 0xFFFF << 40], dtype=np.uint64)  # pair by pair this would take hours
    assert dedupe.near_groups(hashes, 3) == [list(range(50_001))]


def _world(folder: Path, rows: list[dict[str, Any]], phash: str) -> DatasetConfig:
    plain: dict[str, Any] = dict.fromkeys(RECORDS.names, None) | {
        "source": "s", "uri": "u", "file_ext": "png", "raw_hash": "r", "is_deleted": False, "is_banned": False,
        "is_pending": False, "has_children": False, **{name: [] for name in RECORDS.names if name.startswith("tags_")},
    }  # fmt: skip
    schema = pa.schema([f.with_type(pa.string()) if f.name == "rating" else f for f in RECORDS])
    records = [plain | {"key": row["key"], "score": row["score"]} for row in rows]
    probe = [dict.fromkeys(PROBE.names) | {"status": "ok", **{k: v for k, v in row.items() if k != "score"}} for row in rows]
    dataset = folder / "d"
    units.write_parquet(dataset / "records" / "0.parquet", pa.Table.from_pylist(records, schema=schema).cast(RECORDS))
    units.finalize(units.Step(dataset, "records", RECORDS, "c"), ["0.parquet"])
    units.write_parquet(dataset / "probe" / "0.parquet", pa.Table.from_pylist(probe, schema=PROBE))
    units.finalize(units.Step(dataset, "probe", PROBE, "c", ("records",)), ["0.parquet"])
    return DatasetConfig(
        name="d", root=str(folder), sources=[SourceConfig("s", "danbooru", ".")], dedupe=DedupeConfig(phash=phash)  # type: ignore[arg-type]
    )


def _row(key: str, side: int, score: int | None, sha: str, pixel: str, phash: int | None) -> dict[str, Any]:
    return {"key": key, "width": side, "height": 10, "score": score, "sha256": sha, "pixel_hash": pixel, "phash": phash}


ROWS = [
    _row("s:1", 10, 5, "same", "p1", 0), _row("s:2", 10, 9, "same", "p1", 0), _row("s:3", 10, None, "same", "p1", 0),
    _row("s:4", 10, None, "a", "shared", 0xFF00), _row("s:5", 10, None, "b", "shared", 0xFF00),
    _row("s:6", 30, -3, "c", "p6", 0b111), _row("s:7", 20, 99, "d", "p7", 0xFFFF << 48), _row("s:8", 20, 1, "e", "p8", 0xFFFE << 48),
]  # fmt: skip


def test_the_largest_then_the_best_then_the_first_is_kept(tmp_path: Path) -> None:
    for phash in ("report", "drop"):
        settings = _world(tmp_path / phash, ROWS, phash)
        dedupe.run(settings)
        rows = units.read_table(tmp_path / phash / "d", "dupes").to_pylist()
        kept = {method: {row["key"] for row in rows if row["method"] == method and row["keep"]} for method in
                ("sha256", "pixel", "phash")}  # fmt: skip
        groups: dict[str, dict[int, set[str]]] = {"sha256": {}, "pixel": {}, "phash": {}}
        for row in rows:
            groups[row["method"]].setdefault(row["group_id"], set()).add(row["key"])
        assert list(groups["sha256"].values()) == [{"s:1", "s:2", "s:3"}]
        assert list(groups["pixel"].values()) == [{"s:4", "s:5"}]
        assert sorted(map(sorted, groups["phash"].values())) == [["s:2", "s:6"], ["s:7", "s:8"]]  # s:1, s:3 are out already
        assert kept["sha256"] == {"s:2"}
        assert kept["pixel"] == {"s:4"}
        assert kept["phash"] == ({"s:6", "s:7"} if phash == "drop" else {"s:2", "s:6", "s:7", "s:8"})
        assert rows == sorted(rows, key=lambda row: (row["key"], row["method"]))
        assert len({(row["group_id"]) for row in rows}) == 4
