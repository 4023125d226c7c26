"""Step `dedupe`: equal files and equal pictures reduced to one, similar ones found.

Exact duplicates (sha256, then decoded pixels) are always dropped but one: the largest, then the highest score, then
the smallest key. Perceptual ones, within 3 bits of 64, are reported, and dropped only on request.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig, dataset_dir
from train.prepare.probe import ok_files
from train.prepare.tables.progress import bar
from train.prepare.tables.schemas import DUPES, Quarantine
from train.prepare.tables.units import Step, config_id, merge_quarantine, run_whole, stream_table
from train.prepare.tables.workers import Peers

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
    """Only rows with a double become Python values: of a million pictures, few."""
    probe = ok_files(settings, _PROBE_COLUMNS).combine_chunks()
    area = probe.column("width").to_numpy().astype(np.int64) * probe.column("height").to_numpy()
    rows: list[dict[str, object]] = []
    quarantine: list[Quarantine] = []
    alive = np.ones(len(probe), dtype=bool)
    with bar(3, "dedupe", "methods") as shown:
        for method, column in (("sha256", "sha256"), ("pixel", "pixel_hash")):
            groups = _ranked(_equal(probe.column(column), alive), settings, probe, area)
            _record(groups, method, True, rows, quarantine, alive)
            shown.update()
        left = np.flatnonzero(alive)
        hashes = pc.fill_null(probe.column("phash"), 0).to_numpy()[left]
        near = [left[group] for group in near_groups(hashes, settings.dedupe.phash_distance)]
        groups = _ranked(near, settings, probe, area)
        _record(groups, "phash", settings.dedupe.phash == "drop", rows, quarantine, alive)
        shown.update()
    rows.sort(key=lambda row: (str(row["key"]), str(row["method"])))
    return pa.Table.from_pylist(rows, schema=DUPES), quarantine


def _equal(values: pa.ChunkedArray, alive: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """Positions that share a value, among those alive."""
    codes = values.combine_chunks().dictionary_encode().indices.to_numpy()
    rows = np.flatnonzero(alive)
    rows = rows[np.bincount(codes[rows], minlength=1)[codes[rows]] > 1] if len(rows) else rows
    rows = rows[np.argsort(codes[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1) if len(rows) else []


def _ranked(
    groups: Sequence[npt.NDArray[np.int64]], settings: DatasetConfig, probe: pa.Table, area: npt.NDArray[np.int64]
) -> list[list[tuple[int, str]]]:
    """(position, key) of each group: the one to keep first, groups by its key."""
    members = np.concatenate([np.zeros(0, np.int64), *groups])
    keys = probe.column("key").take(pa.array(members)).combine_chunks()
    scores: dict[str, int | None] = {}
    for part in stream_table(dataset_dir(settings), "records", ["key", "score"]):
        mine = part.filter(pc.is_in(part.column("key"), value_set=keys))
        scores |= zip(mine.column("key").to_pylist(), mine.column("score").to_pylist(), strict=True)
    names = dict(zip(members.tolist(), keys.to_pylist(), strict=True))
    unknown = -(1 << 40)  # below every real score

    def rank(at: int) -> tuple[int, int, str]:
        score = scores.get(names[at])
        return -int(area[at]), -(unknown if score is None else score), names[at]

    ordered = (sorted(group.tolist(), key=rank) for group in groups)
    return sorted(([(at, names[at]) for at in group] for group in ordered), key=lambda group: group[0][1])


def _record(
    groups: Sequence[Sequence[tuple[int, str]]], method: str, drop: bool, rows: list[dict[str, object]],
    quarantine: list[Quarantine], alive: npt.NDArray[np.bool_],
) -> None:  # fmt: skip
    start = len({row["group_id"] for row in rows})
    for number, group in enumerate(groups, start):
        best, best_key = group[0]
        for at, key in group:
            keep = at == best or not drop
            rows.append({"key": key, "group_id": number, "keep": keep, "method": method})
            if not keep:
                alive[at] = False
                quarantine.append(Quarantine(key, "dedupe", "duplicate", f"{method}: {best_key} is kept"))


def near_groups(hashes: npt.NDArray[np.uint64], distance: int) -> list[list[int]]:
    """Groups of positions connected by hashes that differ in at most `distance` (0..4) bits.

    Exact: of 4 bands of 16 bits one must be equal when at most 3 bits differ (5 bands for 4).
    """
    # Equal hashes are one point: thousands of plain pictures share one, and every pair of them would be looked at.
    points, point_of = np.unique(hashes, return_inverse=True)
    near = _near_points(points, distance)
    mates: dict[int, list[int]] = {}
    counts = np.bincount(point_of, minlength=len(points))
    for position, point in enumerate(point_of.tolist()):
        if counts[point] > 1 or point in near:
            mates.setdefault(near.get(point, point), []).append(position)
    return list(mates.values())


def _near_points(hashes: npt.NDArray[np.uint64], distance: int) -> dict[int, int]:
    """{position: a position that stands for its group} of distinct hashes that are near another one."""
    parent = list(range(len(hashes)))
    linked: set[int] = set()

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
                    linked |= {i, j}
    return {i: root(i) for i in linked}
