"""SimpleTuner's parquet metadata: one row per image, its file name with or without extension, its caption.

`columns` says what its `parquet` section said: `uri` for `filename_column`, `caption` for `caption_column`,
`fallback_caption` for `fallback_caption_column`, `width` and `height`. Unmapped: `filename` (or `id`) and `caption`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root
from train.prepare.formats.cells import lines_in
from train.prepare.formats.columns import Columns, check_caption, check_header, wants_caption
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.normalise import REFUSALS, BadRecord, RawPost, is_missing
from train.prepare.sources.sd_scripts import find_stem
from train.prepare.sources.table import captionless, parquet_rows, refused, table_files
from train.prepare.tables.schemas import Quarantine

_DEFAULTS = {"uri": ("filename", "file_name", "id"), "caption": ("caption",), "width": ("width",), "height": ("height",)}


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every image that a row of the source's parquet files names."""
    path, root = require_source(source), source_root(source)
    for name, file in table_files(source, path):
        if isinstance(file, Quarantine):
            yield file
            continue
        if file.suffix.lower() != ".parquet":
            continue
        try:
            schema = pq.read_schema(file)
        except (OSError, pa.ArrowInvalid) as error:
            yield refused(source, name, 0, error)
            continue
        check_header(source, name, schema.names)
        check_caption(source, name, Columns.of_schema(schema), "caption")
        mapped = _with_defaults(source, schema.names)
        plain = dataclasses.replace(mapped, columns={k: v for k, v in mapped.columns.items() if k != "fallback_caption"})
        for number, row in parquet_rows(mapped, name, file):
            if isinstance(row, Quarantine):
                yield row
                continue
            try:
                stem = row.get(mapped.columns.get("uri", ""))
                if is_missing(stem):
                    raise BadRecord("no file name: map it with columns.uri")
                post = mapped_post(plain, row, f"{name} row {number}", root, find_stem(root, str(stem)))
                if not post.caption:
                    fallback = row.get(mapped.columns.get("fallback_caption", ""))
                    post.caption = post.caption if is_missing(fallback) else lines_in(fallback, mapped.columns["fallback_caption"])
                yield post if post.caption is not None or not wants_caption(source) else captionless(source, name, number)
            except REFUSALS as error:
                yield refused(source, name, number, error)


def _with_defaults(source: SourceConfig, names: list[str]) -> SourceConfig:
    columns = dict(source.columns)
    for ours, candidates in _DEFAULTS.items():
        found = next((name for name in candidates if name in names), None)
        if found is not None:
            columns.setdefault(ours, found)
    return dataclasses.replace(source, columns=columns)
