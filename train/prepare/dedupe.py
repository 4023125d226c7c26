"""Step `dedupe`: equal files and equal pictures reduced to one, similar ones found.

Exact duplicates (sha256, then decoded pixels) are always dropped but one: the largest, then the highest score, then
the smallest key. Perceptual ones, within 3 bits of 64, are reported, and dropped only on request.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from train.prepare.peers import Peers
from train.prepare.probe import ok_files
from train.prepare.records import DUPES, Quarantine
from train.prepare.settings import DatasetConfig, dataset_dir
from train.prepare.units import Step, config_id, merge_quarantine, read_table, run_whole

DEDUPE_VERSION = 1
_PROBE_COLUMNS = ("key", "width", "height", "sha256", "pixel_hash", "phash")


def run(settings: DatasetConfig) -> None:
    """Make the table of duplicate groups."""
    dataset = dataset_dir(settings)
    config = config_id(phash=settings.dedupe.phash, distance=settings.dedupe.phash_distance, code=DEDUPE_VERSION)
    step = Step(dataset, "dupes", DUPES, config, ("records", "probe"))
    with Peers(dataset) as peers:
        run_whole(step, lambda: _find(settings), peers)
    merge_quarantine(dataset)


def _find(settings: DatasetConfig) -> tuple[pa.Table, list[Quarantine]]:
    probe = ok_files(settings, _PROBE_COLUMNS)
    records = read_table(dataset_dir(settings), "records", ["key", "score"])
    scores = dict(zip(records.column("key").to_pylist(), records.column("score").to_pylist(), strict=True))
    keys = probe.column("key").to_pylist()
    area = (probe.column("width").to_numpy().astype(np.int64) * probe.column("height").to_numpy()).tolist()
    unknown = -(1 << 40)  # below every real score
    points = [unknown if (score := scores.get(key)) is None else score for key in keys]
    rank = [(-area[i], -points[i], key) for i, key in enumerate(keys)]
    rows: list[dict[str, object]] = []
    quarantine: list[Quarantine] = []
    gone: set[int] = set()
    for method, column in (("sha256", "sha256"), ("pixel", "pixel_hash")):
        values = probe.column(column).to_pylist()
        groups = _equal([i for i in range(len(keys)) if i not in gone], values)
        _record(groups, method, True, keys, rank, rows, quarantine, gone)
    left = np.array([i for i in range(len(keys)) if i not in gone], dtype=np.int64)
    hashes = np.array([value or 0 for value in probe.column("phash").to_pylist()], dtype=np.uint64)
    groups = [[int(left[i]) for i in group] for group in near_groups(hashes[left], settings.dedupe.phash_distance)]
    _record(groups, "phash", settings.dedupe.phash == "drop", keys, rank, rows, quarantine, gone)
    rows.sort(key=lambda row: (str(row["key"]), str(row["method"])))
    return pa.Table.from_pylist(rows, schema=DUPES), quarantine


def _equal(candidates: Iterable[int], values: Sequence[str]) -> list[list[int]]:
    by_value: dict[str, list[int]] = {}
    for i in candidates:
        by_value.setdefault(values[i], []).append(i)
    return [group for group in by_value.values() if len(group) > 1]


def _record(
    groups: Iterable[list[int]],
    method: str,
    drop: bool,
    keys: Sequence[str],
    rank: Sequence[tuple[int, int, str]],
    rows: list[dict[str, object]],
    quarantine: list[Quarantine],
    gone: set[int],
) -> None:
    ordered = sorted((sorted(group, key=lambda i: rank[i]) for group in groups), key=lambda group: keys[group[0]])
    start = len({row["group_id"] for row in rows})
    for number, group in enumerate(ordered, start):
        best = keys[group[0]]
        for i in group:
            keep = i == group[0] or not drop
            rows.append({"key": keys[i], "group_id": number, "keep": keep, "method": method})
            if not keep:
                gone.add(i)
                quarantine.append(Quarantine(keys[i], "dedupe", "duplicate", f"{method}: {best} is kept"))


def near_groups(hashes: npt.NDArray[np.uint64], distance: int) -> list[list[int]]:
    """Groups of positions connected by hashes that differ in at most `distance` (0..4) bits.

    Exact: of 4 bands of 16 bits one must be equal when at most 3 bits differ (5 bands for 4).
    """
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    bands = distance + 1
    edges = np.linspace(0, 64, max(bands, 4) + 1).astype(int) if distance else np.array([0, 64])
    for low, high in itertools.pairwise(edges):
        mask = (1 << int(high - low)) - 1
        band = (hashes >> np.uint64(low)) & np.uint64(mask)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        for members in np.split(order, starts[1:]):
            for position, i in enumerate(members.tolist()):
                others = members[position + 1 :]
                close = others[np.bitwise_count(hashes[others] ^ hashes[i]) <= distance]
                for j in close.tolist():
                    parent[root(j)] = root(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(hashes)):
        groups.setdefault(root(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
