"""Hugging Face layouts already on disk: imagefolder with metadata files, parquet with embedded images, saved datasets.

`file_name` is relative to the metadata file. Columns are mapped by `columns`; `text` is the caption unless mapped.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root
from train.prepare.folders.kinds import JSON, is_image
from train.prepare.folders.walking import walk
from train.prepare.formats import columns as header
from train.prepare.formats.columns import Columns, check_caption, check_header, with_defaults
from train.prepare.formats.csvfile import require_text
from train.prepare.formats.jsonstream import Malformed, iter_values
from train.prepare.formats.mapping import below, mapped_post
from train.prepare.posts.census import Census
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost
from train.prepare.sources.table import (
    Row,
    captioned,
    check_pictures,
    columns_of,
    refused,
    row_posts,
    rows_of,
    schema_of,
)
from train.prepare.tables.progress import say
from train.prepare.tables.schemas import Quarantine

_EMBEDDED = (".parquet", ".arrow")
_USUAL = {"caption": ("text",), "uri": ("file_name",), "image": ("image",)}  # our column: the layout's own name
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read(source: SourceConfig) -> Iterator[Found]:
    """Every image of the folder's metadata files, parquet files and Arrow files."""
    require_source(source)
    root = source_root(source)
    seen, pictures, named, files, other = Columns(), array("q"), array("q"), 0, None
    path = Path(source.path)
    for found in walk(source, root) if path.is_dir() else [path.name]:
        if isinstance(found, Quarantine):
            yield found
        elif lists_pictures(found, alone=path.is_file()) and not _embedded(root / found):
            files += 1
            for post in metadata_rows(source, root, found, seen):
                if isinstance(post, RawPost):
                    named.append(_mark(post.uri))
                yield post
        elif found.lower().endswith(_EMBEDDED) and not _left_by_datasets(root / found):
            files += 1
            yield from embedded_rows(source, root, found)
        elif is_image(found):
            pictures.append(_mark(found))
        elif other is None and found.lower().endswith((".jsonl", ".json", ".csv", ".tsv")):
            other = found
    if seen.rows:
        header.check_mapped(source, "any row of its .jsonl files", seen)
    if not files:
        hint = f"{other} has another name: name it in path, or rename it" if other else "Pictures with .txt beside them are adapter: sidecar"
        raise Halt(ExitCode.MISMATCH, f"sources {source.name}: {len(pictures)} pictures, and no {', '.join(_METADATA)} and no "
                   f"parquet or Arrow file: no record. {hint}")  # fmt: skip
    if len(named):
        _say_forgotten(source, root, pictures, named)


def _mark(uri: str) -> int:
    """A number for a path: names of millions of pictures would not fit into memory."""
    return hash(unicodedata.normalize("NFC", uri))


def _say_forgotten(source: SourceConfig, root: Path, pictures: array[int], named: array[int]) -> None:
    """Print how many pictures no metadata file names."""
    known = set(named)
    forgotten = sum(mark not in known for mark in pictures)
    if forgotten:
        names = (found for found in walk(source, root) if isinstance(found, str) and is_image(found))
        with Census(source).open():  # what the walk notes is counted already
            first = next(found for found in names if _mark(found) not in known)
        say(f"sources {source.name}: {forgotten} of {len(pictures)} pictures are not in the metadata files and are not taken, "
            f"such as {first}")  # fmt: skip


def lists_pictures(name: str, *, alone: bool = False) -> bool:
    """Whether a file may list pictures: by its name, or any kind but Arrow where the user named it."""
    return PurePosixPath(name).name in _METADATA or (alone and not name.lower().endswith(".arrow"))


def _left_by_datasets(file: Path) -> bool:
    """Whether `datasets` cached a result of its own (`map`, `filter`) beside the data files that it saved."""
    try:
        state = json.loads((file.parent / "state.json").read_text(encoding="utf-8"))
        return file.suffix == ".arrow" and file.name not in [part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def metadata_rows(source: SourceConfig, root: Path, name: str, seen: Columns) -> Iterator[Found]:
    """Posts of a metadata file; `seen` takes in the columns of one without header."""
    mapped = with_defaults(source, ["text", "file_name"], _USUAL)
    folder = str(PurePosixPath(name).parent)
    for number, row in _checked(source, mapped, name, root / name, seen):
        try:
            if isinstance(row, Quarantine):
                yield row
                continue
            if isinstance(row, Malformed):
                raise BadRecord(row.message)
            file = row.get(mapped.columns["uri"]) if isinstance(row, dict) else None
            if not isinstance(file, str) or not file:
                raise BadRecord(f"no {mapped.columns['uri']}: see columns.uri")
            post = mapped_post(mapped, row, f"{name} row {number}", root, below(root, file, folder))
            yield captioned(source, name, number, post)
        except REFUSALS as error:
            yield refused(source, name, number, error)


def _checked(
    source: SourceConfig, mapped: SourceConfig, name: str, file: Path, seen: Columns
) -> Iterator[tuple[int, Any]]:
    """(number, row) of a metadata file, whose columns are asked about before the end of its rows is met.

    Raises Halt(USAGE) where no column has the file names or the captions.
    """
    lines, asked = name.lower().endswith(JSON), False
    columns = (None if lines else columns_of(source, file)) or Columns()

    def ask() -> None:
        header.check_names(source, name, columns, "file_name")
        check_caption(source, name, columns, "text")

    if columns.words and not lines:
        check_header(source, name, columns.names)
    if lines:
        require_text(f"sources {source.name}", file)
    for number, row in iter_values(file) if lines else rows_of(mapped, name, file):
        if isinstance(row, dict) and not name.lower().endswith(_EMBEDDED):
            columns.add(row)
            if lines:
                seen.add(row)
        if not asked and columns.rows == header.LOOK_ROWS:
            ask()
            asked = True
        yield number, row
    if not asked and columns.words:
        ask()


def _embedded(file: Path) -> bool:
    if file.suffix.lower() != ".parquet":
        return False
    try:
        return "file_name" not in pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid):
        return False


def embedded_rows(
    source: SourceConfig, root: Path, name: str, labels: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Iterator[Found]:
    """Rows of a parquet or Arrow file that hold their pictures; `labels` are the names of columns that hold numbers of classes."""
    file, told = root / name, source
    try:
        schema = schema_of(file)
    except (OSError, pa.ArrowInvalid) as error:
        yield refused(source, name, 0, error)
        return
    assert schema is not None  # by its ending
    source = with_defaults(source, schema.names, _USUAL)
    image = source.columns.get("image", "image")
    check_pictures(source, name, file, image)
    check_header(told, name, schema.names)
    columns = Columns.of_schema(schema)
    columns.words |= dict.fromkeys(labels, True)
    check_caption(told, name, columns, "text")
    source = dataclasses.replace(source, columns={k: v for k, v in source.columns.items() if k != "uri"})

    def post(number: int, row: Row) -> Found:
        place, member = f"{name} row {number}", f"row:{number}:{image}"
        return captioned(told, name, number, mapped_post(source, with_labels(row, labels), place, root, name, member, f"{name}#{number}"))

    yield from row_posts(source, name, rows_of(source, name, file), post)


def with_labels(row: Row, labels: Mapping[str, Sequence[str]]) -> Row:
    """The row with names in the place of classes' numbers; -1 is no class. Raises BadRecord for a number without name."""
    if not labels:
        return row

    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, one) for one in value]
        if not isinstance(value, int) or value == -1:
            return None if value == -1 else value
        if not 0 <= value < len(labels[column]):
            raise BadRecord(f"{column} is {value}, and the set names {len(labels[column])} classes")
        return labels[column][value]

    return {**row, **{column: named(column, row[column]) for column in labels if column in row}}
