"""DeepGHS sets: parquet files whose rows are Danbooru posts, images in tars numbered id % 1000.

The columns are the site's own (`tag_string_general`, `rating`, `score`, ...); one with another name is mapped by
`columns`. Images lie in `images/0000.tar`, `images/data-0000.tar`, `original/data-0000.tar`, or as files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.posts.normalise import Found
from train.prepare.sources.danbooru import danbooru_post
from train.prepare.sources.danbooru2023 import find_place
from train.prepare.sources.table import Row, each_parquet, parquet_rows, row_posts


def read(source: SourceConfig) -> Iterator[Found]:
    """Every row of the source's parquet files."""

    def posts_of(name: str, file: Path, schema: pa.Schema) -> Iterator[Found]:
        def post(number: int, row: Row) -> Found:
            made = danbooru_post(source, f"{name} row {number}", row, "", None)
            if not made.uri:
                made.uri, made.member = find_place(source_root(source), int(made.id), made.fields)
            return made

        every = dataclasses.replace(source, columns={column: column for column in schema.names if column != "image"})
        return row_posts(source, name, parquet_rows(every, name, file), post)

    yield from each_parquet(source, posts_of)
