"""SimpleTuner's parquet metadata: one row per image, its file name with or without extension, its caption.

`columns` says what its `parquet` section said: `uri` for `filename_column`, `caption` for `caption_column`,
`fallback_caption` for `fallback_caption_column`, `width` and `height`. Unmapped: `filename` (or `id`) and `caption`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.formats.cells import lines_in
from train.prepare.formats.columns import Columns, check_caption, with_defaults
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.normalise import BadRecord, Found, is_missing
from train.prepare.sources.sd_scripts import find_stem
from train.prepare.sources.table import Row, captioned, each_parquet, parquet_rows, row_posts

_DEFAULTS = {"uri": ("filename", "file_name", "id"), "caption": ("caption",), "width": ("width",), "height": ("height",)}


def read(source: SourceConfig) -> Iterator[Found]:
    """Every image that a row of the source's parquet files names."""
    root = source_root(source)

    def posts_of(name: str, file: Path, schema: pa.Schema) -> Iterator[Found]:
        check_caption(source, name, Columns.of_schema(schema), "caption")
        mapped = with_defaults(source, schema.names, _DEFAULTS)

        def post(number: int, row: Row) -> Found:
            stem = row.get(mapped.columns.get("uri", ""))
            if is_missing(stem):
                raise BadRecord("no file name: map it with columns.uri")
            made = mapped_post(mapped, row, f"{name} row {number}", root, find_stem(root, str(stem)))
            fallback = row.get(mapped.columns.get("fallback_caption", ""))
            if not made.caption and not is_missing(fallback):
                made.caption = lines_in(fallback, mapped.columns["fallback_caption"])
            return captioned(source, name, number, made)

        return row_posts(source, name, parquet_rows(mapped, name, file), post)

    yield from each_parquet(source, posts_of)
