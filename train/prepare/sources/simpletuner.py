"""SimpleTuner's parquet metadata: one row per image, its file name with or without extension, its caption.

`columns` says what its `parquet` section said: `uri` for `filename_column`, `caption` for `caption_column`,
`fallback_caption` for `fallback_caption_column`, `width` and `height`. Unmapped: `filename` (or `id`) and `caption`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.formats.cells import lines_in
from train.prepare.formats.columns import Columns, check_caption, with_defaults
from train.prepare.formats.mapping import mapped_post
from train.prepare.posts.normalise import BadRecord, RawPost, is_missing
from train.prepare.sources.sd_scripts import find_stem
from train.prepare.sources.table import Row, captioned, parquet_files, parquet_rows, row_posts
from train.prepare.tables.schemas import Quarantine

_DEFAULTS = {"uri": ("filename", "file_name", "id"), "caption": ("caption",), "width": ("width",), "height": ("height",)}


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every image that a row of the source's parquet files names."""
    for found in parquet_files(source):
        if isinstance(found, Quarantine):
            yield found
            continue
        name, file, schema = found
        check_caption(source, name, Columns.of_schema(schema), "caption")
        mapped = with_defaults(source, schema.names, _DEFAULTS)
        yield from row_posts(source, name, parquet_rows(mapped, name, file), partial(_post, source, mapped, name))


def _post(source: SourceConfig, mapped: SourceConfig, name: str, number: int, row: Row) -> RawPost | Quarantine:
    root = source_root(source)
    stem = row.get(mapped.columns.get("uri", ""))
    if is_missing(stem):
        raise BadRecord("no file name: map it with columns.uri")
    post = mapped_post(mapped, row, f"{name} row {number}", root, find_stem(root, str(stem)))
    if not post.caption:
        fallback = row.get(mapped.columns.get("fallback_caption", ""))
        post.caption = post.caption if is_missing(fallback) else lines_in(fallback, mapped.columns["fallback_caption"])
    return captioned(source, name, number, post)
