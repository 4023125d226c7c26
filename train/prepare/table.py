"""Parquet and CSV files with a column map."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.exits import ExitCode, Halt
from train.prepare.files import require_source, source_root
from train.prepare.mapped import mapped_post
from train.prepare.normalise import REFUSALS, BadRecord, RawPost, refusal
from train.prepare.progress import counted, read_so_far
from train.prepare.records import REST_UNREAD, Quarantine
from train.prepare.settings import SourceConfig
from train.prepare.walking import walk

_SUFFIXES = (".parquet", ".csv", ".tsv")
_BATCH_ROWS = 1000  # embedded images are large
Row = Mapping[str, Any]


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every row of the source's file, or of the files of its folder."""
    path = require_source(source)
    root = source_root(source)
    for name, file in table_files(source, path):
        if isinstance(file, Quarantine):
            yield file
        else:
            yield from _file(source, root, name, file)


def table_files(source: SourceConfig, path: Path) -> Iterator[tuple[str, Path | Quarantine]]:
    """(name relative to the source, file) of the tables of a file or folder."""
    if path.is_file():
        yield path.name, path
        return
    for found in walk(source, path):
        if isinstance(found, Quarantine):
            yield found.key, found
        elif found.lower().endswith(_SUFFIXES):
            yield found, path / found


def _check_header(source: SourceConfig, name: str, names: Sequence[str]) -> None:
    """Raises Halt(USAGE) for a mapped column that the file lacks: misspelt, it would empty the field of every row."""
    for ours, theirs in source.columns.items():
        if theirs not in names:
            close = difflib.get_close_matches(theirs, names, 1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise Halt(
                ExitCode.USAGE,
                f"sources {source.name}: columns.{ours} is {theirs!r}, and {name} has no such column{hint} "
                f"It has {', '.join(names)}",
            )


def _header(file: Path) -> list[str] | None:
    """Names of the columns; None where the file cannot be read, which is reported when its rows are."""
    try:
        if file.suffix.lower() == ".parquet":
            return list(pq.read_schema(file).names)
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            return next(_reader(file, lines), None)
    except (OSError, pa.ArrowInvalid, csv.Error):
        return None


def _file(source: SourceConfig, root: Path, name: str, file: Path) -> Iterator[RawPost | Quarantine]:
    if (names := _header(file)) is not None:
        _check_header(source, name, names)
    rows = parquet_rows(source, name, file) if file.suffix.lower() == ".parquet" else csv_rows(source, name, file)
    image = source.columns.get("image")
    for number, row in rows:
        if isinstance(row, Quarantine):
            yield row
            continue
        place = f"{name} row {number}"
        try:
            if image is not None:
                uri = file.relative_to(root).as_posix() if file.is_relative_to(root) else name
                yield mapped_post(source, row, place, root, uri, f"row:{number}:{image}", f"{name}#{number}")
            else:
                yield mapped_post(source, row, place, root)
        except REFUSALS as error:
            yield refused(source, name, number, error)


def refused(source: SourceConfig, name: str, number: int, error: Exception) -> Quarantine:
    """The quarantine row of a table's row."""
    return refusal(f"{source.name}:{name}#{number}", f"{name} row {number}", error)


def parquet_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
    """(row number, row) of the mapped columns, without the pixels of embedded images."""
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            wanted = [column for ours, column in source.columns.items() if ours != "image"]
            present = [column for column in wanted if column in table.schema_arrow.names]
            share = file.stat().st_size / max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=present):
                read_so_far(share * batch.num_rows)
                for row in _plain(batch):
                    yield number, row
                    number += 1
                number += batch.num_rows if not present else 0
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        yield number, refused(source, name, number, BadRecord(f"{error}; {REST_UNREAD}"))


def _plain(batch: pa.RecordBatch) -> Iterator[Row]:
    """Rows as Python values; one whose text is not UTF-8 has None there."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            yield {name: _cell(batch.column(name), index) for name in batch.schema.names}


def _cell(column: pa.Array, index: int) -> Any:
    try:
        return column[index].as_py()
    except UnicodeDecodeError:
        return b"not UTF-8"  # no field takes bytes, so the row is refused


def _reader(file: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    return csv.reader(lines, dialect="excel-tab" if file.suffix.lower() == ".tsv" else "excel", strict=True)


def csv_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
    """(row number, row); quotes as in RFC 4180, so tags with quotes and line breaks survive."""
    # Bytes that are not UTF-8 become marks that the record's checks refuse, so only their row is lost.
    with io.TextIOWrapper(counted(file), "utf-8-sig", "surrogateescape", newline="") as lines:
        reader = _reader(file, lines)
        try:
            header = next(reader, [])
        except csv.Error as error:
            yield 0, refused(source, name, 0, error)
            return
        number = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, refused(source, name, number, error)
                number += 1
                continue
            if row and len(row) != len(header):
                problem = BadRecord(f"{len(row)} columns, the header has {len(header)}")
                yield number, refused(source, name, number, problem)
            elif row:
                yield number, dict(zip(header, row, strict=True))
            number += 1
