"""DeepGHS sets: parquet files whose rows are Danbooru posts, images in tars numbered id % 1000.

The columns are the site's own (`tag_string_general`, `rating`, `score`, ...); one with another name is mapped by
`columns`. Images lie in `images/0000.tar`, `images/data-0000.tar`, `original/data-0000.tar`, or as files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from train.config.dataset import SourceConfig
from train.prepare.folders.files import source_root
from train.prepare.posts.normalise import RawPost
from train.prepare.sources.danbooru import danbooru_post
from train.prepare.sources.danbooru2023 import find_place
from train.prepare.sources.table import Row, parquet_files, parquet_rows, row_posts
from train.prepare.tables.schemas import Quarantine


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every row of the source's parquet files."""
    root = source_root(source)
    for found in parquet_files(source):
        if isinstance(found, Quarantine):
            yield found
            continue
        name, file, schema = found

        def post(number: int, row: Row, name: str = name) -> RawPost:
            made = danbooru_post(source, f"{name} row {number}", row, "", None)
            if not made.uri:
                made.uri, made.member = find_place(root, int(made.id), made.fields)
            return made

        every = dataclasses.replace(source, columns={column: column for column in schema.names if column != "image"})
        yield from row_posts(source, name, parquet_rows(every, name, file), post)
