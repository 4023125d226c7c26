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

from train.prepare.decode import DECODE_VERSION, Refused
from train.prepare.judge import judge
from train.prepare.layouts import tried
from train.prepare.peers import Peers
from train.prepare.pictures import Look, file_stamp, probe_one
from train.prepare.pool import Lost, Pool
from train.prepare.progress import bar
from train.prepare.records import PROBE, Quarantine
from train.prepare.settings import DatasetConfig, ExcludeConfig, SourceConfig, dataset_dir
from train.prepare.units import Step, config_id, cut, merge_quarantine, read_table, row_hash, run_units, stream_table

PROBE_VERSION = 2  # 2: damage that decoders pass over, PNGs with large texts
UNIT_FILES = 2000
_COLUMNS = [
    "key", "source", "source_id", "uri", "member", "file_ext", "md5", "width", "height", "is_deleted", "is_banned",
    "hard_exclusion", "raw_hash",
]  # fmt: skip
_TAG_COLUMNS = ["tags_general", "tags_character", "tags_copyright", "tags_artist", "tags_meta", "tags_species"]
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
    hashes = [row_hash(*parts) for parts in zip(marks, stamps, left_out, strict=True)]
    rules = {key: value for key, value in asdict(settings.probe).items() if key != "timeout_s"}
    config = config_id(probe=rules, code=[PROBE_VERSION, DECODE_VERSION])
    step = Step(dataset, "probe", PROBE, config, ("records",))
    limit = 512 * 2**20 + 14 * settings.probe.max_pixels  # RGBA, its copy, RGB and room for one more channel set
    with Peers(dataset) as peers, Pool(settings.workers, probe_one, settings.probe.timeout_s, limit) as pool:
        run_units(step, cut(rows, hashes, UNIT_FILES), lambda part: _probe(part, settings, sources, pool, peers), peers)
    merge_quarantine(dataset)
    judge(settings, "probe")


def ok_files(settings: DatasetConfig, columns: Sequence[str]) -> pa.Table:
    """Rows of the probe table whose file is sound."""
    table = read_table(dataset_dir(settings), "probe", [*dict.fromkeys([*columns, "status"])])
    return table.filter(pc.equal(table.column("status"), "ok")).select(list(columns))


def _wanted(settings: DatasetConfig) -> pa.Table:
    """Records that are not hard-excluded, with the reason of `exclude` that leaves a record out."""
    columns = _COLUMNS + (_TAG_COLUMNS if settings.exclude.tags else [])
    parts = []
    for table in stream_table(dataset_dir(settings), "records", columns):
        kept = table.filter(pc.is_null(table.column("hard_exclusion")))
        reasons = [_left_out(row, settings.exclude) for row in _columns(kept, *columns)]
        kept = kept.select(_COLUMNS).append_column("left_out", pa.array(reasons, pa.string()))
        parts.append(kept)
    return pa.concat_tables(parts)


def _columns(table: pa.Table, *names: str) -> Iterator[Row]:
    for values in zip(*(table.column(name).to_pylist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _left_out(record: Row, exclude: ExcludeConfig) -> str | None:
    if record["is_deleted"] and exclude.deleted:
        return "deleted_post"
    if record["is_banned"] and exclude.banned:
        return "banned_post"
    unwanted = set(exclude.tags)
    hit = next((tag for name in _TAG_COLUMNS if unwanted for tag in record[name] if tag in unwanted), None)
    return f"excluded_tag:{hit}" if hit is not None else None


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
