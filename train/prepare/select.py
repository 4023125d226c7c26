"""Step `select`: what each stage trains on, and in which bucket.

Filters in a fixed order, the count after each printed and stored in the file. Candidates are ordered by a hash of
(seed, key), caps and quotas take from the front: the same inputs give the same bytes, and one more image never
reshuffles the rest. Hard-excluded records cannot be brought back: the gate here looks at the final tags.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import MAX_REPEATS, DatasetConfig, SelectConfig, dataset_dir
from train.prepare.choosing.balance import Mixed, balanced, boosted, told_of
from train.prepare.choosing.candidates import Candidates, known_column
from train.prepare.choosing.filters import by_quota, capped, where
from train.prepare.choosing.merging import Cost, merge, told
from train.prepare.choosing.predicates import parse
from train.prepare.tables import units
from train.prepare.tables.progress import bar
from train.prepare.tables.quarantine import Complaint, judge
from train.prepare.tables.schemas import SELECT, TAG_GROUPS, Quarantine
from train.prepare.tables.workers import Peers
from train.recipe.buckets import Size, tables_of
from train.recipe.exclusions import EXCLUSIONS_VERSION

SELECT_VERSION = 2
INPUTS = ("records", "probe", "dupes", "labels", "aesthetic")
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


def run(settings: DatasetConfig) -> None:
    """Write select_<stage>.parquet for every stage. Raises Complaint(MISMATCH) when one is left without images."""
    dataset = dataset_dir(settings)
    check_filters(settings)
    marks = {stage: selection_mark(settings, stage) for stage in settings.select}
    with Peers(dataset) as peers:
        if peers.owns(0) or any(stored(dataset, stage).get("mark") != mark for stage, mark in marks.items()):
            candidates: Candidates | None = None
            with bar(len(marks), "select", "stages") as shown:
                for stage, mark in marks.items():
                    if stored(dataset, stage).get("mark") != mark:
                        candidates = candidates or _candidates(settings)
                        _select(settings, stage, candidates, mark)
                    shown.update()
    said = {stage: stored(dataset, stage) for stage in settings.select}
    filters = {stage: ", ".join(f"{name} {count}" for name, count in said[stage]["counts"]) for stage in said}
    for stage, counts in filters.items():
        print(f"select {stage}: {counts}; {selection_visits(dataset, stage)} visits an epoch")
        if areas := said[stage]["areas"]:
            print(f"select {stage}: " + ", ".join(f"{count} pictures in sizes of {area} px" for area, count in areas.items()))
        config, cost = settings.select[stage], said[stage]["merging"]
        if (line := told_of(Mixed(**(said[stage]["mixed"] or {"before": 0, "after": 0})))):
            print(f"select {stage}: {line}")
        if cost is not None and (line := told(Cost(**cost), config.min_bucket, config.merge_crop)):
            print(f"select {stage}: {line}")
    for note in all_notes(dataset, filters):
        print(note)
    units.merge_quarantine(dataset)
    judge(settings, "select")
    empty = [stage for stage in filters if pq.read_metadata(selection_path(dataset, stage)).num_rows == 0]
    if empty:  # the other stages can be trained all the same
        why = [f"select.{stage} leaves no image: {filters[stage]}" for stage in empty]
        raise Complaint(ExitCode.MISMATCH, "; ".join([*why, *all_notes(dataset, empty)]))


def check_filters(settings: DatasetConfig) -> None:
    """Before any work, also of earlier steps: a typing error is found at once. Raises Halt(USAGE)."""
    for stage, config in settings.select.items():
        named = {"where": config.where} | {f"boost[{number}].where": boost.where for number, boost in enumerate(config.boost)}
        columns = [(name, lambda text=text: parse(text).column) for name, texts in named.items() for text in texts]
        if config.balance is not None and config.balance.by not in TAG_GROUPS:
            columns.append(("balance.by", lambda by=config.balance.by: by))
        for name, column in columns:
            try:
                known_column(column())
            except Halt as halt:
                raise Halt(halt.code, halt.message.replace("select.where", f"select.{stage}.{name}")) from halt
        _keys(config.allow, f"select.{stage}.allow")
        _keys(config.deny, f"select.{stage}.deny")


def selection_path(dataset: Path, stage: str) -> Path:
    """The table of a stage."""
    return dataset / f"select_{stage}.parquet"


def stored(dataset: Path, stage: str) -> dict[str, Any]:
    """What a stage's table says of itself: rows after each filter (`counts`), which small buckets were merged into which
    (`merged`), the Cost of that (`merging`), what boost and balance made of the visits (`mixed`), the pictures of each set of
    sizes (`areas`; these three None where there is nothing to say, or in an older table), filters that do nothing (`notes`), and its `mark`.

    Empty where the table is not there.
    """
    try:
        found = pq.read_metadata(selection_path(dataset, stage)).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    told = {name: json.loads(found.get(name.encode(), b"null")) for name in ("counts", "merged", "merging", "mixed", "areas", "notes")}
    return told | {"mark": found.get(b"mark", b"").decode()}


def all_notes(dataset: Path, stages: Iterable[str]) -> list[str]:
    """What was to be said of filters that do nothing, once for all stages that it holds for."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for note in stored(dataset, stage)["notes"] or []:
            found.setdefault(note, []).append(stage)
    return [f"select.{', '.join(names)}: {note}" for note, names in found.items()]


def selection_visits(dataset: Path, stage: str) -> int:
    """How many pictures an epoch shows, each as often as it is repeated."""
    column = pq.read_table(selection_path(dataset, stage), columns=["repeats"]).column("repeats")
    return int(pc.sum(column.cast("int64")).as_py() or 0)


def selection_mark(settings: DatasetConfig, stage: str) -> str:
    """Changes when anything does that decides the selection."""
    dataset = dataset_dir(settings)
    config = settings.select[stage]
    lists = [_keys(config.allow, f"select.{stage}.allow"), _keys(config.deny, f"select.{stage}.deny")]
    # Only where a source says so: what was selected before there was such a key stays what it is.
    repeats = {source.name: source.repeats for source in settings.sources if source.repeats != 1}
    chosen = {name: value for name, value in asdict(config).items() if name not in ("boost", "balance") or value}
    return units.config_id(
        inputs=[units.table_fingerprint(dataset, table) for table in INPUTS], select=chosen, lists=lists,
        buckets=asdict(settings.buckets), seed=settings.seed, code=[SELECT_VERSION, EXCLUSIONS_VERSION],
        assume={source.name: source.assume_rating for source in settings.sources},
        **({"repeats": repeats} if repeats else {}),
    )  # fmt: skip


def _candidates(settings: DatasetConfig) -> Candidates:
    """What may be selected at all; writes the gate's refusals as the step's quarantine."""
    dataset = dataset_dir(settings)
    candidates = Candidates(settings)
    entries = [Quarantine(key, "select", "excluded_tag", rule) for key, rule in candidates.refused]
    mark = units.config_id(inputs=[units.table_fingerprint(dataset, table) for table in INPUTS], code=EXCLUSIONS_VERSION)
    units.write_refused(dataset, "select", entries, mark)
    return candidates


def _select(settings: DatasetConfig, stage: str, candidates: Candidates, mark: str) -> None:
    config = settings.select[stage]
    counts = list(candidates.counts)
    keys = candidates.keys
    allowed = _marked(_keys(config.allow, "allow"), candidates, f"select.{stage}.allow")
    denied = _marked(_keys(config.deny, "deny"), candidates, f"select.{stage}.deny")
    kept = ~denied
    if config.deny:
        counts.append(("deny", int(kept.sum())))
    visits = candidates.visits() * config.repeats
    kept &= visits > 0
    if not visits.all():
        counts.append(("folders of 0 repeats", int(kept.sum())))
    kept, filtered, notes = where(candidates, config.where, kept, allowed)
    counts += filtered
    seed = settings.seed if config.seed is None else config.seed
    order = np.flatnonzero(kept)
    hashes = np.fromiter((units.row_hash(seed, key) for key in _texts(keys, order)), np.uint64, len(order))
    order = order[np.argsort(hashes, kind="stable")]  # equal hashes stay in the order of their keys
    for name, limit in config.caps.items():
        order, found = capped(candidates, name, order, limit)
        counts, notes = [*counts, (f"caps.{name}", len(order))], notes + found
    if config.quota is not None:
        order, found = by_quota(candidates, order, config.quota)
        counts, notes = [*counts, ("quota", len(order))], notes + found
    repeats, mixed, found = _mixed(config, candidates, order, visits[order])
    notes += found
    _check_visits(stage, candidates, order, repeats)
    rising = np.argsort(order)
    _write(
        settings, stage, candidates, order[rising], allowed, repeats=repeats[rising],
        counts=counts, mark=mark, notes=notes, mixed=mixed,
    )  # fmt: skip


def _mixed(config: SelectConfig, candidates: Candidates, order: Rows, visits: Rows) -> tuple[Rows, Mixed | None, list[str]]:
    """(visits of the rows in `order`, what boost and balance did, None without them, what is to be said)."""
    if not config.boost and config.balance is None:
        return visits, None, []
    now, boosts, notes = boosted(candidates, config.boost, order, visits)
    balance = None
    if config.balance is not None:
        now, balance, found = balanced(candidates, config.balance, order, now)
        notes += found
    return now, Mixed(int(visits.sum()), int(now.sum()), boosts, balance), notes


def _check_visits(stage: str, candidates: Candidates, rows: Rows, visits: Rows) -> None:
    """Halt(MISMATCH) naming a picture that would be visited more often than the table can say."""
    if (visits > MAX_REPEATS).any():
        first = int(np.argmax(visits))
        key = candidates.keys[int(rows[first])].as_py()
        raise Halt(
            ExitCode.MISMATCH,
            f"select.{stage}.repeats x the source's repeats x boost and balance make {visits[first]} visits of {key}, "
            f"{MAX_REPEATS} at most: set one of them lower",
        )


def _write(
    settings: DatasetConfig, stage: str, candidates: Candidates, rows: Rows, allowed: Mask, *,
    counts: list[tuple[str, int]], mark: str, repeats: Rows, notes: list[str], mixed: Mixed | None,
) -> None:  # fmt: skip
    config, sizes = settings.select[stage], settings.buckets
    tables = tables_of(sizes.area_px, sizes.min_px, sizes.max_px, sizes.step_px)
    buckets, into, cost = merge(
        candidates.widths[rows].tolist(), candidates.heights[rows].tolist(), repeats.tolist(),
        tables, least=config.min_bucket, crop=config.merge_crop,
    )  # fmt: skip
    table = pa.table(
        {
            "key": candidates.keys.take(pa.array(rows)),
            "repeats": repeats,
            "bucket_w": [width for width, _ in buckets],
            "bucket_h": [height for _, height in buckets],
            "why": np.where(allowed[rows], "allow", "where" if config.where else "all"),
        },
        schema=SELECT,
    )
    merged = {f"{a[0]}x{a[1]}": f"{b[0]}x{b[1]}" for a, b in into.items()}
    metadata = {
        "mark": mark, "counts": json.dumps(counts), "merged": json.dumps(merged),
        "merging": json.dumps(asdict(cost)), "notes": json.dumps(notes),
        **({"areas": json.dumps(_by_area(buckets, tables))} if len(tables) > 1 else {}),
        **({"mixed": json.dumps(asdict(mixed))} if mixed is not None else {}),  # else the bytes of earlier sets
    }  # fmt: skip
    units.write_parquet(selection_path(dataset_dir(settings), stage), table, metadata)


def _by_area(buckets: list[Size], tables: Sequence[Sequence[Size]]) -> dict[str, int]:
    """Pictures in each set of sizes, by its largest area in px."""
    counts = Counter(buckets)
    found: dict[str, int] = {}
    for table in tables:
        found[str(max(width * height for width, height in table))] = sum(counts.pop(size, 0) for size in table)
    return found


def _keys(path: str | None, name: str) -> list[str]:
    """Keys of an allow or deny file, one a line; blank lines and lines that begin with # are skipped."""
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Halt(ExitCode.USAGE, f"{name}: {path} cannot be read: {error}") from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _texts(keys: pa.StringArray, rows: Rows) -> Iterator[str]:
    for start in range(0, len(rows), 50_000):
        yield from keys.take(pa.array(rows[start : start + 50_000])).to_pylist()


def _marked(wanted: list[str], candidates: Candidates, name: str) -> Mask:
    """bool[N] of the keys named; a key that no record has is an error, one that is not selectable is no match."""
    at = pc.index_in(pa.array(wanted, pa.string()), value_set=candidates.keys).to_pylist() if wanted else []
    strange = [key for key, row in zip(wanted, at, strict=True) if row is None]
    unknown = sorted(set(strange) - candidates.known(strange))
    if unknown:
        shown = ", ".join(unknown[:20]) + (" ..." if len(unknown) > 20 else "")
        raise Halt(ExitCode.USAGE, f"{name} names {len(unknown)} unknown keys: {shown}")
    marked = np.zeros(len(candidates.keys), dtype=bool)
    marked[[row for row in at if row is not None]] = True
    return marked
