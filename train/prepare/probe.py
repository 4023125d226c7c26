"""Step `probe`: every file opened and decoded once; what is sound, how large, and what it looks like.

One pass reports every bad file with its reason and goes on. Files are only read. Hard-excluded records are not in the
table and their files are never opened; those left out by `exclude` stand in it as quarantined, unopened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare.folders.layouts import tried
from train.prepare.images.decode import DECODE_VERSION, Refused
from train.prepare.images.looks import Look, file_stamp, probe_one
from train.prepare.tables import units
from train.prepare.tables.pool import Lost, Pool
from train.prepare.tables.progress import bar
from train.prepare.tables.quarantine import judge
from train.prepare.tables.schemas import PROBE, Quarantine
from train.prepare.tables.workers import Peers
from train.prepare.tagging.matching import GROUP_COLUMNS, occurring, record_lists, tagged

PROBE_VERSION = 2  # 2: damage that decoders pass over, PNGs with large texts
UNIT_FILES = 2000
_COLUMNS = [
    "key", "source", "source_id", "uri", "member", "file_ext", "md5", "width", "height", "is_deleted", "is_banned",
    "hard_exclusion", "raw_hash",
]  # fmt: skip
Row = dict[str, Any]


def run(settings: DatasetConfig) -> None:
    """Make the probe table from the records. Raises Halt(MISMATCH) after finishing when too many files are bad."""
    dataset = dataset_dir(settings)
    sources = {source.name: source for source in settings.sources}
    rows = _wanted(settings)
    stamps = []
    with bar(len(rows), "probe: look for the files", "files") as shown:
        for row in _columns(rows, "source", "uri"):
            stamps.append(file_stamp(sources[row["source"]], row["uri"]))
            shown.update()
    left_out = rows.column("left_out").to_pylist()
    marks = rows.column("raw_hash").to_pylist()
    hashes = [units.row_hash(*parts) for parts in zip(marks, stamps, left_out, strict=True)]
    rules = {key: value for key, value in asdict(settings.probe).items() if key != "timeout_s"}
    config = units.config_id(probe=rules, code=[PROBE_VERSION, DECODE_VERSION])
    step = units.Step(dataset, "probe", PROBE, config, ("records",))
    with Peers(dataset) as peers, Pool.of_pictures(probe_one, settings) as pool:
        units.run_units(step, units.cut(rows, hashes, UNIT_FILES), lambda part: _probe(part, settings, sources, pool, peers), peers)
    units.merge_quarantine(dataset)
    judge(settings, "probe")


def ok_files(settings: DatasetConfig, columns: Sequence[str]) -> pa.Table:
    """Rows of the probe table whose file is sound."""
    table = units.read_table(dataset_dir(settings), "probe", [*dict.fromkeys([*columns, "status"])])
    return table.filter(pc.equal(table.column("status"), "ok")).select(list(columns))


def _wanted(settings: DatasetConfig) -> pa.Table:
    """Records that are not hard-excluded, with the reason of `exclude` that leaves a record out."""
    unwanted = settings.exclude.tags
    columns = _COLUMNS + ([*GROUP_COLUMNS, "caption"] if unwanted else [])
    parts, met = [], set[str]()
    for table in units.stream_table(dataset_dir(settings), "records", columns):
        kept = table.filter(pc.is_null(table.column("hard_exclusion"))).combine_chunks()
        reasons = pa.nulls(len(kept), pa.string())
        if unwanted:
            lists = record_lists(kept, "tags")
            hits = tagged(lists, unwanted)
            reasons = pa.array([f"excluded_tag:{tag}" for tag in unwanted]).take(pa.array(hits, mask=hits < 0))
            met |= occurring(lists, unwanted)
        for column, wanted, reason in (("is_banned", settings.exclude.banned, "banned_post"),
                                       ("is_deleted", settings.exclude.deleted, "deleted_post")):  # fmt: skip
            if wanted:
                reasons = pc.if_else(kept.column(column), reason, reasons)
        parts.append(kept.select(_COLUMNS).append_column("left_out", reasons))
    later = ""
    if settings.tag.source != "none":
        later = "; what the step tag finds comes later: name it in select.<stage>.where, `tags has_none [...]`"
    for tag in unwanted:
        if tag not in met:
            print(f"probe: exclude.tags: no picture has {tag!r}{later}")
    return pa.concat_tables(parts)


def _columns(table: pa.Table, *names: str) -> Iterator[Row]:
    for values in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _probe(
    rows: pa.Table, settings: DatasetConfig, sources: Mapping[str, SourceConfig], pool: Pool[Look, Any],
    peers: Peers,
) -> tuple[pa.Table, list[Quarantine]]:
    records = rows.to_pylist()
    opened = [record for record in records if record["left_out"] is None]
    jobs = [
        Look(sources[r["source"]], settings.probe, r["uri"], r["member"], (r["width"], r["height"])) for r in opened
    ]
    results = {}
    for record, result in zip(opened, pool.map(jobs), strict=True):
        results[record["key"]] = result
        peers.tick()
    probed, quarantine = [], []
    for record in records:
        row = _row(record, results.get(record["key"]), sources)
        entry = row.pop("entry")
        probed.append(row)
        if entry is not None:
            quarantine.append(entry)
    return pa.Table.from_pylist(probed, schema=PROBE), quarantine


def _row(record: Row, result: Any, sources: Mapping[str, SourceConfig]) -> Row:
    """The record's row of the table; `entry` is its quarantine row or None."""
    key = record["key"]
    size, mtime_ns = file_stamp(sources[record["source"]], record["uri"])
    blank: Row = dict.fromkeys(PROBE.names) | {"key": key, "entry": None}
    if size >= 0:
        blank |= {"file_size": size, "mtime_ns": mtime_ns}
    if isinstance(result, dict):
        return blank | result
    if record["left_out"] is not None:
        reason, _, tag = record["left_out"].partition(":")
        message = f"exclude.tags: {tag}" if tag else f"exclude.{reason.removesuffix('_post')}"
        entry = Quarantine(key, "probe", reason, message)
    elif isinstance(result, Lost):
        entry = Quarantine(key, "probe", "decode_timeout", f"{record['uri']}: {result.message}")
    else:
        assert isinstance(result, Refused)
        message = result.message if record["uri"] in result.message else f"{record['uri']}: {result.message}"
        if size < 0 and result.reason == "missing_file":
            message = tried(sources[record["source"]], record)
        entry = Quarantine(key, "probe", result.reason, message, result.exception)
    return blank | {"status": "quarantined", "reason": entry.reason, "entry": entry}
