"""Step `ingest`: every source into one sorted table of records.

Reads metadata only, no pixels. Posts are parsed into spill files, then cut from the sorted whole into units of 50,000
rows, so memory holds the keys and one unit, whatever the size. A unit's name comes from its rows alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.base.files import read_json
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare.choosing.repeats import tell_unread_folders
from train.prepare.folders.kinds import check_place, is_image
from train.prepare.folders.unchanged import sources_mark
from train.prepare.folders.walking import walk
from train.prepare.formats.mapping import check_columns
from train.prepare.posts.caption_remarks import CaptionTally, remarks
from train.prepare.posts.caption_text import caption_endings, caption_rules
from train.prepare.posts.census import Census
from train.prepare.posts.normalise import RawPost, printable, to_record
from train.prepare.tables import units
from train.prepare.tables.progress import bar, reading, say
from train.prepare.tables.quarantine import Complaint, weigh
from train.prepare.tables.schemas import (
    RECORDS,
    REST_UNREAD,
    ROW_GROUP_ROWS,
    SCHEMA_VERSION,
    Quarantine,
    quarantine_table,
)
from train.recipe.exclusions import EXCLUSIONS_VERSION

INGEST_VERSION = 3  # 2: links, spellings, layouts, dates and categories of dumps; 3: sentences, tails, variants
_MARK = "sources.json"
_SPILL_ROWS = 50_000
_SPILL_SCHEMA = pa.schema(
    [field.with_type(pa.string()) if field.name == "rating" else field for field in RECORDS]
    + [pa.field("place", pa.string())]
)


def run(settings: DatasetConfig) -> None:
    """Write `records/` and the step's quarantine.

    Raises Complaint(MISMATCH) after finishing, when more than `max_quarantine_fraction` of the posts are errors.
    """
    dataset = _opened(settings)
    config = units.config_id(code=INGEST_VERSION, schema=SCHEMA_VERSION, exclusions=EXCLUSIONS_VERSION)
    step = units.Step(dataset, "records", RECORDS, config)
    mark, sizes = sources_mark(settings.sources, f"{config} {settings.separator}")  # taken first: what changes meanwhile is met by the next run
    spill = _spill_folder(dataset)
    before = _finished(step, mark)
    if before is not None:
        print("ingest: the sources are as they were, nothing to do")
        _say((read_json(dataset / "dataset.json") or {}).get("remarks", []))
        tell_unread_folders(settings)
        report_and_judge(settings, "ingest", *before)
        return
    # Every process does the whole, with equal results: none waits for another that may never come.
    spill.mkdir(parents=True)
    try:
        batches, refused, said = _parse(settings, sizes, spill)
    finally:
        shutil.rmtree(spill, ignore_errors=True)  # what is mapped stays readable without a name
    order, doubles, repeated = _sorted_rows(batches)
    refused += doubles + _excluded(batches, order)
    names = _write_units(step, batches, order)
    units.write_parquet(dataset / "quarantine" / "records" / names[0], quarantine_table(refused))
    units.finalize(step, names)
    units.merge_quarantine(dataset)
    _write_facts(dataset, settings, len(order), repeated, refused, said)
    units.write_text(step.folder / _MARK, json.dumps({"mark": mark, "units": names}, indent=1) + "\n")
    tell_unread_folders(settings)
    report_and_judge(settings, "ingest", len(order), refused)


def _opened(settings: DatasetConfig) -> Path:
    dataset = dataset_dir(settings)
    try:
        dataset.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"root {settings.root}: {dataset} cannot be made ({error.strerror})") from error
    return dataset


def _spill_folder(dataset: Path) -> Path:
    """Where this process parses to; what killed processes left there, and those of larger groups, is removed."""
    mine, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    for old in dataset.glob(".parsed-*"):
        if not old.name[8:].isdigit() or int(old.name[8:]) == mine or int(old.name[8:]) >= world:
            shutil.rmtree(old, ignore_errors=True)
    return dataset / f".parsed-{mine}"


def _finished(step: units.Step, mark: str) -> tuple[int, list[Quarantine]] | None:
    """(records, what was refused) of a finished ingest of the same sources, else None."""
    manifest = units.read_manifest(step.dataset, step.table)
    path = step.folder / _MARK
    if manifest is None or not path.exists():
        return None
    known = json.loads(path.read_text())
    if known != {"mark": mark, "units": manifest["units"]}:
        return None
    entries = step.dataset / "quarantine" / "records" / manifest["units"][0]
    if not entries.exists() or not all((step.folder / name).exists() for name in manifest["units"]):
        return None
    return manifest["rows"], [Quarantine.of(row) for row in pq.read_table(entries).to_pylist()]


def report_and_judge(settings: DatasetConfig, step: str, kept: int, refused: list[Quarantine]) -> None:
    """Print the counts per reason. Raises Complaint(MISMATCH) when errors exceed the limit, or a file is cut off."""
    counts = Counter(entry.reason for entry in refused)
    print(f"{step}: {kept} records" + "".join(f", {number} {reason}" for reason, number in sorted(counts.items())))
    errors = [entry for entry in refused if entry.kind == "error"]
    if kept == 0:
        seen = errors or refused
        places = ", ".join(
            f"{source.name} is adapter {source.adapter} at {source.path}{_plain_folder(source)}" for source in settings.sources
        )
        first = f": {seen[0].key}: {seen[0].reason}: {seen[0].message}" if seen else ""
        raise Halt(ExitCode.MISMATCH, f"{step}: no record, {len(refused)} in quarantine{first}: check sources ({places})")
    cut = [entry for entry in errors if REST_UNREAD in entry.message]
    if cut:  # one entry each, whatever is lost: no share can judge that
        raise Complaint(
            ExitCode.MISMATCH,
            f"{step}: {len(cut)} of the files could not be read to the end: mend or remove; the first: {cut[0].message}",
        )
    weigh(settings, step, errors, kept + len(errors))


def _plain_folder(source: SourceConfig) -> str:
    """What lies at a source that gave nothing, where it is pictures with a text beside each: the commonest of all."""
    if source.adapter == "sidecar" or not Path(source.path).is_dir():
        return ""
    names = [found for found in walk(dataclasses.replace(source, images=None), Path(source.path)) if isinstance(found, str)]
    texts = {os.path.splitext(name)[0] for name in names if name.lower().endswith(caption_endings(source))}
    shown = [name for name in names if is_image(name)]
    beside = sum(os.path.splitext(name)[0] in texts or name in texts for name in shown)
    if not shown:
        return ""
    return f", where {len(shown)} pictures lie, {beside} of them with a text beside them: adapter sidecar reads those"


def read_source(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """What the source's adapter finds."""
    check_columns(source)
    check_place(source)
    adapter = importlib.import_module(f"train.prepare.sources.{source.adapter}")
    yield from adapter.read(source)


def _parse(
    settings: DatasetConfig, sizes: Sequence[int], spill: Path
) -> tuple[list[pa.RecordBatch], list[Quarantine], list[str]]:
    """Spilled batches, memory-mapped, what was refused, and what is to be said of the sources.

    Raises Halt(USAGE) where only the user can know a meaning.
    """
    said: list[str] = []
    refused: list[Quarantine] = []
    waiting: list[dict[str, Any]] = []
    files: list[Path] = []
    questions = []
    for source, size in zip(settings.sources, sizes, strict=True):
        rules, tally = caption_rules(source, settings.separator), CaptionTally()
        with reading(size, f"ingest {source.name}"), Census(source).open() as census:
            for found in read_source(source):
                if isinstance(found, Quarantine):
                    refused.append(found)
                    continue
                tally.add_picture(found.beside, taken_without=found.caption is None)
                row = to_record(found, source, rules, tally)
                if isinstance(row, Quarantine):
                    refused.append(row)
                    continue
                census.see(found.fields, found.scheme, row)
                waiting.append(row | {"place": printable(found.place)})
                if len(waiting) == _SPILL_ROWS:
                    files.append(_spill(waiting, spill / f"{len(files):05d}.arrow"))
                    waiting = []
        if census.records == 0:
            said.append(f"sources {source.name}: no record is taken: nothing at {source.path} is one for adapter {source.adapter}")
        said += [f"sources {source.name}: {remark}" for remark in remarks(tally, source, settings.separator)]
        for line in census.lines():
            say(line)
        questions.append(census.question())
    if any(questions):
        raise Halt(ExitCode.USAGE, "; ".join(filter(None, questions)))
    if waiting:
        files.append(_spill(waiting, spill / f"{len(files):05d}.arrow"))
    _say(said)
    return [pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0) for path in files], refused, said


def _say(remarks_: Sequence[str]) -> None:
    for remark in remarks_:
        print(f"ingest: {remark}")


def _spill(rows: list[dict[str, Any]], path: Path) -> Path:
    batch = pa.RecordBatch.from_pylist(rows, schema=_SPILL_SCHEMA)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SPILL_SCHEMA) as writer:
        writer.write_batch(batch)
    return path


def _sorted_rows(batches: list[pa.RecordBatch]) -> tuple[np.ndarray, list[Quarantine], int]:
    """(row numbers in key order, quarantine rows of contradicting doubles, number of equal doubles left out)."""
    if not batches:
        return np.zeros(0, np.int64), [], 0
    columns = pa.Table.from_batches([batch.select(["key", "raw_hash", "place"]) for batch in batches])
    order = pc.sort_indices(columns, sort_keys=[("key", "ascending"), ("place", "ascending")])
    order = order.to_numpy().astype(np.int64)
    keys = columns["key"].take(pa.array(order))
    same = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1)).to_numpy()
    if not same.any():
        return order, [], 0
    keep = np.ones(len(order), bool)
    refused, repeated = [], 0
    starts = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]]))
    for start in starts.tolist():
        end = start + 1
        while end < len(order) and same[end - 1]:
            end += 1
        group = columns.take(pa.array(order[start:end])).to_pylist()
        if len({row["raw_hash"] for row in group}) == 1:
            keep[start + 1 : end] = False
            repeated += end - start - 1
            continue
        keep[start:end] = False
        for row in group:
            others = ", ".join(sorted({other["place"] for other in group} - {row["place"]})) or row["place"]
            message = f"{row['place']}: same id with other content in {others}"
            refused.append(Quarantine(row["key"], "ingest", "bad_record", message, "BadRecord"))
    return order[keep], refused, repeated


def take_rows(batches: list[pa.RecordBatch], rows: np.ndarray) -> pa.Table:
    """The rows in this order. Taken batch by batch: a take over all batches would first copy all of them."""
    sizes = np.cumsum([0] + [batch.num_rows for batch in batches])
    owner = np.searchsorted(sizes, rows, side="right") - 1
    parts, places = [], []
    for number in np.unique(owner).tolist():
        mine = np.flatnonzero(owner == number)
        parts.append(batches[number].take(pa.array(rows[mine] - sizes[number])))
        places.append(mine)
    back = np.argsort(np.concatenate(places), kind="stable")
    return pa.Table.from_batches(parts).combine_chunks().take(pa.array(back)).combine_chunks()


def _write_units(step: units.Step, batches: list[pa.RecordBatch], order: np.ndarray) -> list[str]:
    """Names of the units, each written unless it is there already."""
    names = []
    starts = range(0, len(order), ROW_GROUP_ROWS) if len(order) else [0]
    shown = bar(len(starts), "ingest records", "units")
    for unit, start in enumerate(starts):
        rows = order[start : start + ROW_GROUP_ROWS]
        table = take_rows(batches, rows) if len(rows) else _SPILL_SCHEMA.empty_table()
        content = [table[name].to_pylist() for name in ("key", "raw_hash", "uri", "member", "hard_exclusion")]
        name = f"{unit:05d}-{units.config_id(config=step.config, content=content)}.parquet"
        names.append(name)
        if not (step.folder / name).exists():
            units.write_parquet(step.folder / name, table.select(RECORDS.names).cast(RECORDS))
        shown.update()
    shown.close()
    return names


def _excluded(batches: list[pa.RecordBatch], order: np.ndarray) -> list[Quarantine]:
    """Quarantine rows of the hard exclusions; the records stay in the table, marked, and no later step opens them."""
    kept = np.zeros(sum(batch.num_rows for batch in batches), bool)
    kept[order] = True
    rows, start = [], 0
    for batch in batches:
        columns = batch.select(["key", "hard_exclusion"])
        mine = pc.and_(pc.is_valid(columns["hard_exclusion"]), pa.array(kept[start : start + batch.num_rows]))
        rows += [
            Quarantine(row["key"], "ingest", "excluded_tag", row["hard_exclusion"])
            for row in columns.filter(mine).to_pylist()
        ]
        start += batch.num_rows
    return rows


def _write_facts(
    dataset: Path, settings: DatasetConfig, kept: int, repeated: int, refused: list[Quarantine], said: list[str]
) -> None:
    sources = [
        {
            "name": source.name, "adapter": source.adapter, "rating_scheme": source.rating_scheme,
            "assume_rating": source.assume_rating, "escaped": source.escaped, "on_bad_tag": source.on_bad_tag,
            "on_second_separator": source.on_second_separator, "on_missing_caption": source.on_missing_caption,
        }
        for source in settings.sources
    ]  # fmt: skip
    counts = Counter[str](entry.reason for entry in refused)
    counts |= Counter({"records": kept, "repeated": repeated})
    facts = {
        "schema_version": SCHEMA_VERSION, "name": settings.name, "hard_exclusion_version": EXCLUSIONS_VERSION,
        "sources": sources, "ingest": dict(sorted(counts.items())), "separator": settings.separator, "remarks": said,
    }  # fmt: skip
    update_dataset_json(dataset, facts)


def update_dataset_json(dataset: Path, facts: dict[str, Any]) -> None:
    """Set top-level keys of `dataset.json`, keeping the others."""
    path = dataset / "dataset.json"
    present = json.loads(path.read_text()) if path.exists() else {}
    units.write_text(path, json.dumps(present | facts, indent=1, sort_keys=True) + "\n")
