"""Resumable units of work: a table is a folder of parquet files, one per unit, that any number of processes fill.

A unit's result is `<table>/<unit>-<fingerprint>.parquet`, written under a temporary name, synced and renamed; a name
that exists is not made again. Units are cut from sorted input, never from ranks, and unit n belongs to process
n % WORLD_SIZE, so tables are byte-identical for any number of processes and any interruption. There is no process
group: a process that has done its own units watches the folder, and takes over what a silent peer left undone.
`manifest.json` names the units that make up the finished table; files of other fingerprints move to `stale/`, where
rows whose input did not change are still copied from.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base import signals
from train.base.errors import ExitCode, Halt
from train.base.files import replacing
from train.prepare.tables.schemas import LABELS, QUARANTINE, RECORDS, ROW_GROUP_ROWS, Quarantine, quarantine_table
from train.prepare.tables.workers import Peers

MANIFEST = "manifest.json"
Work = Callable[[pa.Table], tuple[pa.Table, list[Quarantine]]]


@dataclass(frozen=True)
class Step:
    """The table that a step writes, and everything but its input rows that decides the content."""

    dataset: Path
    table: str
    schema: pa.Schema
    config: str  # hash of the step's config, model id and code version: `config_id`
    inputs: tuple[str, ...] = ()  # tables read; their fingerprints go into the manifest

    @property
    def folder(self) -> Path:
        """Where the unit files lie."""
        return self.dataset / self.table


@dataclass(frozen=True)
class Unit:
    """A slice of the sorted input: `hashes` uint64[n] covers all that the step reads of each row."""

    number: int
    rows: pa.Table  # has `key`
    hashes: np.ndarray


def config_id(**parts: Any) -> str:
    """Hash of anything JSON can say about a step: config sections, model id, code version."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def row_hash(*parts: object) -> int:
    """64-bit hash of the values that one row's result depends on."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def cut(rows: pa.Table, hashes: Sequence[int] | np.ndarray, unit_rows: int) -> list[Unit]:
    """Units of `unit_rows` rows, in order."""
    values = np.asarray(hashes, dtype=np.uint64)
    starts = range(0, len(rows), unit_rows)
    return [
        Unit(number, rows.slice(start, unit_rows), values[start : start + unit_rows])
        for number, start in enumerate(starts)
    ]


def run_units(step: Step, units: Sequence[Unit], work: Work, peers: Peers) -> None:
    """Make every unit that is missing, wait for (or take over) the peers' units, and write the manifest.

    `work` gets only rows that cannot be copied from a stale unit, and returns one row for each, in order.
    Raises OSError from writing; Halt(UNEXPECTED) when a result does not match its input.
    """
    names = [unit_name(step, unit) for unit in units]
    reuse = functools.cache(lambda: _Reuse(step, set(names)))  # looks into all old files
    fill(step, names, lambda number: _make(step, units[number], names[number], work, reuse()), peers,
         rows=[len(unit.rows) for unit in units])  # fmt: skip
    finalize(step, names)


def fill(step: Step, names: Sequence[str], make: Callable[[int], None], peers: Peers, *, rows: Sequence[int] | None = None) -> None:
    """`make` every unit that is not there: this process's own, and then those of peers that are gone.

    The bar counts units, or the `rows` of each, less what `make` has told by `peers.tick`.
    """
    step.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number, name in enumerate(names) if not (step.folder / name).exists()]
    sizes = [1] * len(names) if rows is None else rows
    total = sum(sizes[number] for number in missing if peers.owns(number))
    with peers.progress(total, step.table, "units" if rows is None else "rows") as bar:

        def one(number: int) -> None:
            if not (step.folder / names[number]).exists():
                before = bar.n
                make(number)
                bar.update(sizes[number] - (bar.n - before))

        for number in filter(peers.owns, missing):
            one(number)
        peers.wait_for([(number, step.folder / names[number]) for number in missing], one)


def take_rows(step: Step, rows: pa.Table, hashes: Sequence[int]) -> None:
    """A table whose rows are given as they are."""
    with Peers(step.dataset) as peers:
        run_units(step, cut(rows, hashes, ROW_GROUP_ROWS), lambda part: (part.cast(step.schema), []), peers)


def write_refused(dataset: Path, table: str, entries: Sequence[Quarantine], mark: str) -> None:
    """What a step set aside beside its own table: the keys as `table`, the reasons as its quarantine."""
    step, name = Step(dataset, table, pa.schema([pa.field("key", pa.string())]), mark), f"00000-{mark}.parquet"
    write_parquet(_parts(step) / name, quarantine_table(entries))
    write_parquet(step.folder / name, pa.table([sorted({entry.key for entry in entries})], schema=step.schema))
    finalize(step, [name])


def unit_name(step: Step, unit: Unit) -> str:
    """`<number>-<fingerprint>.parquet`; the fingerprint covers the input rows and the step's config."""
    digest = hashlib.sha256(step.config.encode())
    digest.update(np.ascontiguousarray(unit.hashes, dtype="<u8").tobytes())
    return f"{unit.number:05d}-{digest.hexdigest()[:16]}.parquet"


def run_whole(step: Step, make: Callable[[], tuple[pa.Table, list[Quarantine]]], peers: Peers) -> None:
    """A table made in one piece from the tables in `step.inputs`, as unit 0; its keys may repeat."""
    mark = config_id(config=step.config, inputs=[table_fingerprint(step.dataset, table) for table in step.inputs])
    name = f"00000-{mark}.parquet"

    def write(_: int) -> None:
        table, entries = make()
        write_parquet(_parts(step) / name, quarantine_table(entries))
        write_parquet(step.folder / name, table.cast(step.schema), {"config": step.config})

    fill(step, [name], write, peers)
    finalize(step, [name], unique=False)


def finalize(step: Step, names: Sequence[str], *, unique: bool = True) -> None:
    """Check that every unit is there, name them in the manifest, set stale files aside.

    Keys must rise from unit to unit; with `unique` false they may repeat.
    """
    last, rows = pa.array([], pa.string()), 0
    for name in names:
        try:
            keys = pq.read_table(step.folder / name, columns=["key"]).column("key").combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            (step.folder / name).unlink(missing_ok=True)
            raise Halt(
                ExitCode.MISMATCH, f"{step.folder / name} was unreadable ({error}) and is removed: run again"
            ) from error
        joined = pa.concat_arrays([last, keys])
        rising = (pc.less if unique else pc.less_equal)(joined[:-1], joined[1:])
        if not pc.all(rising, min_count=0).as_py():
            key = joined[pc.index(rising, False).as_py() + 1].as_py()
            raise Halt(ExitCode.MISMATCH, f"{step.folder / name}: key {key} is repeated or out of order")
        last, rows = joined[len(joined) - 1 :], rows + len(keys)
    fingerprint = hashlib.sha256("\n".join([step.config, *names]).encode()).hexdigest()[:16]
    manifest = {
        "fingerprint": fingerprint, "config": step.config, "rows": rows, "units": list(names),
        "inputs": {table: table_fingerprint(step.dataset, table) for table in step.inputs},
    }  # fmt: skip
    write_text(step.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for folder in (step.folder, _parts(step)):
        _set_aside(folder, set(names))


def _set_aside(folder: Path, current: set[str]) -> None:
    if not folder.is_dir():
        return
    old = [path for path in sorted(folder.glob("*.parquet")) if path.name not in current]
    for path in old:
        (folder / "stale").mkdir(exist_ok=True)
        try:
            os.replace(path, folder / "stale" / path.name)
        except FileNotFoundError:  # a peer was faster
            continue
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _parts(step: Step) -> Path:
    return step.dataset / "quarantine" / step.table


def _make(step: Step, unit: Unit, name: str, work: Work, reuse: _Reuse) -> None:
    keys = unit.rows.column("key").to_pylist()
    copies, copied_entries = reuse.find(unit)
    copied = {key for table in copies for key in table.column("key").to_pylist()}
    wanted = np.array([key not in copied for key in keys], dtype=bool)
    fresh, entries = work(unit.rows.filter(pa.array(wanted))) if wanted.any() else (step.schema.empty_table(), [])
    if len(fresh) != int(wanted.sum()):
        raise Halt(ExitCode.UNEXPECTED, f"{step.table}: {len(fresh)} results for {int(wanted.sum())} rows")
    if copies:
        fresh = pa.concat_tables([fresh.cast(step.schema), *copies]).combine_chunks().sort_by("key")
    if fresh.column("key").to_pylist() != keys:
        raise Halt(ExitCode.UNEXPECTED, f"{step.table}: results of unit {unit.number} are not those of its rows")
    metadata = {
        "config": step.config, "first": keys[0], "last": keys[-1],
        "hashes": base64.b64encode(unit.hashes.astype("<u8").tobytes()).decode(),
    }  # fmt: skip
    # The quarantine goes first: the table's rename is what makes the unit exist.
    write_parquet(_parts(step) / name, quarantine_table([*entries, *copied_entries]))
    write_parquet(step.folder / name, fresh.cast(step.schema), metadata)


class _Reuse:
    """Rows of units made under other boundaries from the same config: copied when their input is unchanged."""

    def __init__(self, step: Step, current: set[str]) -> None:
        self.step = step
        self.files: list[tuple[str, str, Path]] = []
        paths = [*sorted(step.folder.glob("*.parquet")), *sorted((step.folder / "stale").glob("*.parquet"))]
        for path in paths:
            metadata = _metadata(path)
            known = path.parent == step.folder and path.name in current
            if metadata.get("config") == step.config and not known and "hashes" in metadata:
                self.files.append((metadata["first"], metadata["last"], path))

    def find(self, unit: Unit) -> tuple[list[pa.Table], list[Quarantine]]:
        """Tables of copied rows, no key twice, and their quarantine rows."""
        keys = unit.rows.column("key").to_pylist()
        wanted = dict(zip(keys, unit.hashes.tolist(), strict=True))
        found: list[pa.Table] = []
        entries: list[Quarantine] = []
        for first, last, path in self.files:
            if wanted and first <= keys[-1] and last >= keys[0]:
                self._copy(path, wanted, found, entries)
        return found, entries

    def _copy(self, path: Path, wanted: dict[str, int], found: list[pa.Table], out: list[Quarantine]) -> None:
        try:
            table = pq.read_table(path)
            part = _parts(self.step) / path.relative_to(self.step.folder)
            quarantined = pq.read_table(part).to_pylist() if part.exists() else []
        except (OSError, pa.ArrowInvalid):  # moved by a peer, or damaged: made again
            return
        hashes = np.frombuffer(base64.b64decode(_metadata(path)["hashes"]), dtype="<u8").tolist()
        old_keys = table.column("key").to_pylist()
        rows = [row for row, key in enumerate(old_keys) if wanted.get(key) == hashes[row]]
        taken = {old_keys[row] for row in rows}
        for key in taken:
            del wanted[key]
        if rows:
            found.append(table.take(rows).cast(self.step.schema))
        out += [Quarantine.of(row) for row in quarantined if row["key"] in taken]


def _metadata(path: Path) -> dict[str, str]:
    try:
        raw = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return {}
    return {key.decode(): value.decode() for key, value in raw.items() if not key.startswith(b"ARROW")}


def read_manifest(dataset: Path, table: str) -> dict[str, Any] | None:
    """The manifest of a finished table, None when the step has not finished."""
    try:
        return dict(json.loads((dataset / table / MANIFEST).read_text()))
    except FileNotFoundError:
        return None


def table_fingerprint(dataset: Path, table: str) -> str | None:
    """Changes whenever the table's content may have changed; None where there is no such table."""
    manifest = read_manifest(dataset, table)
    return manifest["fingerprint"] if manifest else None


_STEP_OF = {"records": "ingest", "probe": "probe", "aesthetic": "score", "tags": "tag", "dupes": "dedupe",
            "labels": "label"}  # fmt: skip


def require_table(dataset: Path, table: str) -> list[Path]:
    """Files of a finished table in key order. Raises Halt(MISMATCH) naming the step to run."""
    manifest = read_manifest(dataset, table)
    step = _STEP_OF.get(table, table)
    if manifest is None:
        raise Halt(ExitCode.MISMATCH, f"{dataset / table} is not there: run scripts/prepare.py {step}")
    for name, fingerprint in manifest["inputs"].items():
        if table_fingerprint(dataset, name) != fingerprint:
            raise Halt(
                ExitCode.MISMATCH, f"{dataset / table} was made from other {name}: run scripts/prepare.py {step}"
            )
    return [dataset / table / name for name in manifest["units"]]


def read_table(dataset: Path, table: str, columns: list[str] | None = None) -> pa.Table:
    """A finished table, sorted by key. Raises Halt(MISMATCH) naming the step to run."""
    parts = list(stream_table(dataset, table, columns))
    return pa.concat_tables(parts) if parts else pa.table({})


def stream_table(dataset: Path, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The units of a finished table one after the other. Columns that an older version did not write are null."""
    schema = {"labels": LABELS, "records": RECORDS}.get(table, pa.schema([]))
    for path in require_table(dataset, table):
        there = set(pq.read_schema(path).names)
        missing = [name for name in columns or () if name not in there and name in schema.names]
        part = pq.read_table(path, columns=columns and [name for name in columns if name not in missing])
        for name in missing:
            part = part.append_column(name, pa.nulls(len(part), schema.field(name).type))
        yield part


def has_table(dataset: Path, table: str) -> bool:
    """Whether the step that writes `table` has finished."""
    return read_manifest(dataset, table) is not None


def write_parquet(path: Path, table: pa.Table, metadata: dict[str, str] | None = None) -> None:
    """Write through a temporary name, sync, rename. Same rows and metadata, same bytes.

    Every step comes by here often, and what is finished is kept: the place to heed a signal, Halt(STOPPED).
    """
    signals.raise_if_asked(path.parent.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = table.replace_schema_metadata(metadata or None).combine_chunks()

    def save(file: Any) -> None:
        pq.write_table(plain, file, compression="zstd", row_group_size=ROW_GROUP_ROWS)

    _write(path, save)


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name, sync, rename; an equal file is left alone."""
    if not path.exists() or path.read_text() != text:
        _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, save: Callable[[Any], object]) -> None:
    with replacing(path, peers=True) as partial, open(partial, "wb") as file:
        save(file)


def sweep(dataset: Path) -> None:
    """Remove what killed processes left half-written. A peer that is still at it finds its file gone, and goes on."""
    for path in [*dataset.glob("*.tmp"), *dataset.glob(".*.tmp"), *dataset.glob("*/*.tmp"), *dataset.glob("*/.*.tmp"),
                 *dataset.glob("quarantine/*/.*.tmp")]:  # fmt: skip
        path.unlink(missing_ok=True)


def merge_quarantine(dataset: Path) -> pa.Table:
    """`quarantine.parquet`: the refused rows of every finished table, by key. Returns it."""
    parts = [
        pq.read_table(dataset / "quarantine" / folder.name / name)
        for folder in sorted((dataset / "quarantine").glob("*/"))
        if (manifest := read_manifest(dataset, folder.name)) is not None
        for name in manifest["units"]
        if (dataset / "quarantine" / folder.name / name).exists()
    ]
    merged = pa.concat_tables([QUARANTINE.empty_table(), *parts])
    order = [(name, "ascending") for name in ("key", "step", "reason", "message")]
    merged = merged.sort_by(order)
    write_parquet(dataset / "quarantine.parquet", merged)
    return merged
