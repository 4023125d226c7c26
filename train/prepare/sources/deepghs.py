"""DeepGHS sets: parquet files whose rows are Danbooru posts, images in tars numbered id % 1000.

The columns are the site's own (`tag_string_general`, `rating`, `score`, ...); one with another name is mapped by
`columns`. Images lie in `images/0000.tar`, `images/data-0000.tar`, `original/data-0000.tar`, or as files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root
from train.prepare.formats.columns import check_header
from train.prepare.posts.normalise import REFUSALS, RawPost
from train.prepare.sources.danbooru import danbooru_post
from train.prepare.sources.danbooru2023 import find_place
from train.prepare.sources.table import parquet_rows, refused, table_files
from train.prepare.tables.schemas import Quarantine


def read(source: SourceConfig) -> Iterator[RawPost | Quarantine]:
    """Every row of the source's parquet files."""
    path, root = require_source(source), source_root(source)
    for name, file in table_files(source, path):
        if isinstance(file, Quarantine):
            yield file
            continue
        if file.suffix.lower() != ".parquet":
            continue
        try:
            names = pq.read_schema(file).names
        except (OSError, pa.ArrowInvalid) as error:
            yield refused(source, name, 0, error)
            continue
        check_header(source, name, names)
        every = dataclasses.replace(source, columns={column: column for column in names if column != "image"})
        for number, row in parquet_rows(every, name, file):
            if isinstance(row, Quarantine):
                yield row
                continue
            try:
                post = danbooru_post(source, f"{name} row {number}", row, "", None)
                if not post.uri:
                    post.uri, post.member = find_place(root, int(post.id), post.fields)
                yield post
            except REFUSALS as error:
                yield refused(source, name, number, error)
