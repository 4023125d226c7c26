"""Hugging Face layouts already on disk: imagefolder with metadata files, parquet with embedded images, saved datasets.

`file_name` is relative to the metadata file. Columns are mapped by `columns`; `text` is the caption unless mapped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.prepare.files import require_source, source_root
from train.prepare.jsonstream import Malformed, iter_values
from train.prepare.mapped import mapped_post
from train.prepare.normalise import REFUSALS, BadRecord, RawPost
from train.prepare.progress import read_so_far
from train.prepare.records import REST_UNREAD, Quarantine
from train.prepare.settings import SourceConfig
from train.prepare.table import Row, csv_rows, parquet_rows, refused
from train.prepare.walking import walk

_EMBEDDED = (".parquet", ".arrow")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every image of the folder's metadata files, parquet files and Arrow files."""
    require_source(source)
    root = source_root(source)
    path = Path(source.path)
    for found in walk(source, root) if path.is_dir() else [path.name]:
        if isinstance(found, Quarantine):
            yield found
        elif _is_metadata(found, alone=path.is_file()) and not _embedded(root / found):
            yield from _metadata(source, root, found)
        elif found.lower().endswith(_EMBEDDED) and not _left_by_datasets(root / found):
            yield from _embedded_rows(source, root, found)


def _is_metadata(name: str, *, alone: bool) -> bool:
    """Whether a file may list pictures: by its name, or any kind but Arrow where the user named it."""
    return PurePosixPath(name).name in _METADATA or (alone and not name.lower().endswith(".arrow"))


def _left_by_datasets(file: Path) -> bool:
    """Whether `datasets` cached a result of its own (`map`, `filter`) beside the data files that it saved."""
    try:
        state = json.loads((file.parent / "state.json").read_text(encoding="utf-8"))
        return file.suffix == ".arrow" and file.name not in [part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _with_defaults(source: SourceConfig, names: list[str]) -> SourceConfig:
    """The source with the layout's own column names filled in where the map leaves them out."""
    columns = dict(source.columns)
    for ours, theirs in (("caption", "text"), ("uri", "file_name"), ("image", "image")):
        if theirs in names:
            columns.setdefault(ours, theirs)
    return dataclasses.replace(source, columns=columns)


def _metadata(source: SourceConfig, root: Path, name: str) -> Iterator[RawPost | Quarantine]:
    source = _with_defaults(source, ["text", "file_name"])
    for number, row in _metadata_rows(source, name, root / name):
        try:
            if isinstance(row, Quarantine):
                yield row
                continue
            if isinstance(row, Malformed):
                raise BadRecord(row.message)
            file = row.get(source.columns["uri"]) if isinstance(row, dict) else None
            if not isinstance(file, str) or not file:
                raise BadRecord("no file_name")
            uri = str(PurePosixPath(name).parent / file)
            yield mapped_post(source, row, f"{name} row {number}", root, uri)
        except REFUSALS as error:
            yield refused(source, name, number, error)


def _metadata_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Any]]:
    if name.endswith(".jsonl"):
        return iter_values(file)
    return csv_rows(source, name, file) if name.endswith(".csv") else parquet_rows(source, name, file)


def _embedded(file: Path) -> bool:
    if file.suffix != ".parquet":
        return False
    try:
        return "file_name" not in pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid):
        return False


def _embedded_rows(source: SourceConfig, root: Path, name: str) -> Iterator[RawPost | Quarantine]:
    file = root / name
    try:
        names = pq.read_schema(file).names if file.suffix == ".parquet" else pa.ipc.open_stream(str(file)).schema.names
    except (OSError, pa.ArrowInvalid) as error:
        yield refused(source, name, 0, error)
        return
    source = _with_defaults(source, names)
    image = source.columns.get("image", "image")
    if image not in names:
        yield refused(source, name, 0, BadRecord(f"no column {image} with images: set columns.image"))
        return
    source = dataclasses.replace(source, columns={k: v for k, v in source.columns.items() if k != "uri"})
    rows = parquet_rows(source, name, file) if file.suffix == ".parquet" else _arrow_rows(source, name, file)
    for number, row in rows:
        if isinstance(row, Quarantine):
            yield row
            continue
        try:
            member = f"row:{number}:{image}"
            yield mapped_post(source, row, f"{name} row {number}", root, name, member, f"{name}#{number}")
        except REFUSALS as error:
            yield refused(source, name, number, error)


def _arrow_rows(source: SourceConfig, name: str, file: Path) -> Iterator[tuple[int, Row | Quarantine]]:
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
