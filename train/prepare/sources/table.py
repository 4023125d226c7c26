"""Parquet and CSV files with a column map."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.folders.walking import each_file
from train.prepare.formats.columns import WORDS, Columns, check_header, listed, wants_caption
from train.prepare.formats.csvfile import cells, csv_form
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.caption_text import SURROGATE
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost, refusal
from train.prepare.tables.progress import read_so_far, say
from train.prepare.tables.schemas import REST_UNREAD, Quarantine

_BATCH_ROWS = 1000  # embedded images are large
Row = Mapping[str, Any]


def read(source: SourceConfig) -> Iterator[Found]:
    """Every row of the source's file, or of the files of its folder."""
    yield from each_file(source, partial(_file, source, source_root(source)))


def schema_of(file: Path) -> pa.Schema | None:
    """That of a parquet or Arrow file, None for other kinds. Raises OSError or ArrowInvalid."""
    if file.suffix.lower() == ".parquet":
        return pq.read_schema(file)
    return pa.ipc.open_stream(str(file)).schema if file.suffix.lower() == ".arrow" else None


def columns_of(source: SourceConfig, file: Path) -> Columns | None:
    """The columns of a file with a header; None where it cannot be read, which is reported when its rows are."""
    try:
        schema = schema_of(file)
        return Columns(csv_form(f"sources {source.name}", file).names) if schema is None else Columns.of_schema(schema)
    except (OSError, pa.ArrowInvalid, csv.Error):
        return None


def rows_of(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
    """(row number, row) of the mapped columns, without the pixels of embedded images."""
    return {".parquet": parquet_rows, ".arrow": arrow_rows}.get(file.suffix.lower(), csv_rows)(source, name, file)


def _file(source: SourceConfig, root: Path, name: str, file: Path) -> Iterator[Found]:
    if (columns := columns_of(source, file)) is not None:
        check_header(source, name, columns.names)
        if not any(ours in WORDS for ours in source.columns):
            say(f"sources {source.name}: neither captions nor tags of {name} are mapped, its pictures come without; it has {listed(columns.names)}")
    image = source.columns.get("image")
    if image is not None and columns is not None:
        check_pictures(source, name, file, image)
    uri = file.relative_to(root).as_posix() if file.is_relative_to(root) else name

    def post(number: int, row: Row) -> RawPost:
        place = f"{name} row {number}"
        if image is None:
            return mapped_post(source, row, place, root)
        return mapped_post(source, row, place, root, uri, f"row:{number}:{image}", f"{name}#{number}")

    yield from row_posts(source, name, rows_of(source, name, file), post)


def row_posts(
    source: SourceConfig, name: str, rows: Iterable[tuple[int, Row | Quarantine]], make: Callable[[int, Row], Found]
) -> Iterator[Found]:
    """What `make` makes of each (row number, row) of a file; a row that it refuses is lost alone."""
    for number, row in rows:
        if isinstance(row, Quarantine):
            yield row
            continue
        try:
            yield make(number, row)
        except REFUSALS as error:
            yield refused(source, name, number, error)


def captioned(source: SourceConfig, name: str, number: int, post: RawPost) -> Found:
    """The post, or why it is not taken where it has no caption and the source wants one."""
    if post.caption is not None or not wants_caption(source):
        return post
    column = source.columns.get("caption", "")
    message = f"{name} row {number}: no caption{f' in column {column!r}' if column else ''}: see columns.caption and on_missing_caption"
    return Quarantine(f"{source.name}:{name}#{number}", "ingest", "missing_caption", message)


def each_parquet(source: SourceConfig, read: Callable[[str, Path, pa.Schema], Iterator[Found]]) -> Iterator[Found]:
    """What `read` makes of (name, file, schema) of the source's parquet files, their mapped columns checked."""

    def one(name: str, file: Path) -> Iterator[Found]:
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            yield refused(source, name, 0, error)
            return
        check_header(source, name, schema.names)
        yield from read(name, file, schema)

    yield from each_file(source, one)


def check_pictures(source: SourceConfig, name: str, file: Path, image: str) -> None:
    """Raises Halt(MISMATCH) where the column `image` of a parquet or Arrow file cannot hold embedded pictures."""
    where = f"sources {source.name}: {name}"
    if (schema := schema_of(file)) is None:
        raise Halt(ExitCode.MISMATCH, f"{where} holds no pictures: map a column of file names to columns.uri, not columns.image")
    bytes_of = [field.name for field in schema if _holds_pictures(field.type)]
    if image not in schema.names:
        hint = f"columns.image: {' or '.join(bytes_of[:5])}" if bytes_of else "columns.image"
        files = "; pictures that lie beside it as files: adapter table, columns.uri" if not bytes_of else ""
        raise Halt(ExitCode.MISMATCH, f"{where} has no column {image} with images: set {hint}? It has {listed(schema.names)}{files}")
    if image not in bytes_of:
        raise Halt(
            ExitCode.MISMATCH,
            f"{where}: column {image} is {schema.field(image).type}, no embedded picture (bytes, or a struct with bytes): "
            "set columns.image to one that is, or map a column of file names to columns.uri (adapter table)",
        )
    if file.suffix.lower() == ".parquet" and _all_null(file, f"{image}.bytes"):
        raise Halt(
            ExitCode.MISMATCH,
            f"{where}: column {image} holds no image bytes, only the path of each: save the set with its pictures embedded",
        )


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_pictures(kind.field(place).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _all_null(file: Path, path: str) -> bool:
    """Whether a parquet file's statistics say that a nested column holds nothing."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    parts = [group.column(at) for group in groups for at in range(group.num_columns) if group.column(at).path_in_schema == path]
    known = [part.statistics for part in parts if part.statistics is not None and part.statistics.has_null_count]
    return 0 < metadata.num_rows == sum(part.null_count for part in known)


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


def arrow_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
    """Rows of an Arrow stream as `datasets` saves it, without the pixels."""
    number = 0
    wanted = {theirs for ours, theirs in source.columns.items() if ours != "image"}
    try:
        with pa.memory_map(str(file)) as data, pa.ipc.open_stream(data) as stream:
            columns = [column for column in stream.schema.names if column in wanted]
            for batch in stream:
                read_so_far(batch.nbytes)
                for row in batch.select(columns).to_pylist() if columns else [{}] * batch.num_rows:
                    yield number, row
                    number += 1
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
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


def csv_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
    """(row number, row); quotes as in RFC 4180, so tags with quotes and line breaks survive."""
    try:
        form = csv_form(f"sources {source.name}", file)
    except (OSError, csv.Error) as error:
        yield 0, refused(source, name, 0, error)
        return
    for number, row in cells(form, file):
        if isinstance(row, str):
            yield number, refused(source, name, number, BadRecord(row))
        elif any(SURROGATE.search(row.get(column, "")) for column in source.columns.values()):
            problem = BadRecord("not UTF-8: save the file as `CSV UTF-8`, or convert it")
            yield number, refused(source, name, number, problem)
        else:
            yield number, row
