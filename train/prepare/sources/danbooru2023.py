"""The danbooru2023 metadata database: sqlite, or its tables as parquet files.

Categories: 0 general, 1 artist, 2 CHARACTER, 3 COPYRIGHT, 4 meta, unlike the site's own numbers; ratings 0..3.
Images lie as `<id>.<ext>`, in folders or tars numbered id % 1000.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.folders.files import require_source, source_root, tar_members
from train.prepare.folders.layouts import find_image
from train.prepare.posts.normalise import REFUSALS, BadRecord, Found, RawPost
from train.prepare.sources.danbooru import post_number
from train.prepare.sources.table import refused
from train.prepare.tables.progress import read_so_far

CATEGORIES = ("general", "artist", "character", "copyright", "meta")
RATINGS = ("g", "s", "q", "e")
_COLUMNS = {  # ours: theirs
    "created_at": "created_at", "md5": "md5", "parent_id": "parent_id", "has_children": "has_children",
    "is_deleted": "is_deleted", "is_banned": "is_banned", "width": "image_width", "height": "image_height",
    "file_size": "file_size", "file_ext": "file_ext", "score": "score", "up_score": "up_score",
    "down_score": "down_score", "fav_count": "fav_count",
}  # fmt: skip
Row = Mapping[str, Any]
TagTable = Mapping[int, tuple[str, int]]  # id: (name, category)


def read(source: SourceConfig) -> Iterator[Found]:
    """Every post of the database, by id."""
    path = require_source(source)
    root = source_root(source)
    name = path.name
    try:
        tags, rows = _parquet(path) if path.is_dir() else _sqlite(path)
        for number, (row, tag_ids) in enumerate(rows):
            try:
                yield _post(root, f"{name} post {row.get('id')}", row, tag_ids, tags)
            except REFUSALS as error:
                yield refused(source, name, number, error)
    except (sqlite3.Error, pa.ArrowInvalid, OSError) as error:
        raise Halt(ExitCode.USAGE, f"sources {source.name}: {path} cannot be read: {error}") from error


def _post(root: Path, place: str, row: Row, tag_ids: list[int], tags: TagTable) -> RawPost:
    if not isinstance(row.get("id"), int):  # the tags are joined by number
        raise BadRecord(f"id is {row.get('id')!r}, expected a whole number")
    post_id = post_number(row["id"])
    fields = {ours: row.get(theirs) for ours, theirs in _COLUMNS.items()}
    rating = row.get("rating")
    if rating is not None:
        if not isinstance(rating, int) or not 0 <= rating < len(RATINGS):
            raise BadRecord(f"rating is {rating!r}, expected 0..3")
        fields["rating"] = RATINGS[rating]
    fields["source_id"] = post_id
    groups: dict[str, list[str]] = {}
    for tag_id in tag_ids:
        if tag_id not in tags:
            raise BadRecord(f"tag {tag_id} is not in the tag table")
        tag, category = tags[tag_id]
        if not 0 <= category < len(CATEGORIES):
            raise BadRecord(f"tag {tag!r} has category {category}, expected 0..{len(CATEGORIES) - 1}")
        groups.setdefault(CATEGORIES[category], []).append(tag)
    uri, member = find_place(root, post_id, fields)
    return RawPost(id=str(post_id), place=place, uri=uri, member=member, fields=fields, tags=groups)


def find_place(root: Path, post_id: int, fields: Row) -> tuple[str, str | None]:
    """(file, member) of the image: in the tar numbered id % 1000 where there is one, else a file."""
    for tar in _tars(str(root), post_id % 1000):
        for extension in dict.fromkeys([str(fields.get("file_ext") or "webp"), "webp", "jpg", "png"]):
            for member in (f"{post_id}.{extension}", f"./{post_id}.{extension}"):
                if member in tar_members(root / tar):
                    return tar, member
    return find_image(root, "", post_id, fields, {}), None


@lru_cache(maxsize=1000)
def _tars(root: str, shard: int) -> tuple[str, ...]:
    plain = (f"data-{shard:04d}.tar", f"{shard:04d}.tar")
    names = [f"{folder}{name}" for folder in ("", "original/", "images/") for name in plain]
    return tuple(name for name in names if (Path(root) / name).is_file())


def _sqlite(path: Path) -> tuple[TagTable, Iterator[tuple[Row, list[int]]]]:
    # immutable: no lock file or journal is written beside the user's database
    waiting = Path(f"{path}-wal")
    if waiting.is_file() and waiting.stat().st_size:
        raise Halt(
            ExitCode.USAGE,
            f"{path} has changes that still stand in {waiting.name}: close the program that writes it, or run "
            f"sqlite3 {path.name} 'PRAGMA wal_checkpoint(TRUNCATE)'",
        )
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    tags = {row[0]: (row[1], row[2]) for row in connection.execute("SELECT id, name, type FROM tag")}
    return tags, _sqlite_rows(connection, path)


def _sqlite_rows(connection: sqlite3.Connection, path: Path) -> Iterator[tuple[Row, list[int]]]:
    posts = connection.cursor()
    posts.execute("SELECT * FROM post ORDER BY id")
    names = [column[0] for column in posts.description]
    share = os.stat(path).st_size / max(connection.execute("SELECT count(*) FROM post").fetchone()[0], 1)
    pairs = _relation(connection)
    pending = next(pairs, None)
    for values in posts:
        read_so_far(share)
        row = dict(zip(names, values, strict=True))
        ids: list[int] = []
        while pending is not None and isinstance(row["id"], int) and pending[0] <= row["id"]:
            if pending[0] == row["id"]:
                ids.append(pending[1])
            pending = next(pairs, None)
        yield row, ids or listed_tags(row)


def _relation(connection: sqlite3.Connection) -> Iterator[tuple[int, int]]:
    """(post, tag) by post, from the table that links them; nothing where the posts list their tags themselves."""
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        quoted = '"' + table.replace('"', '""') + '"'
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({quoted})")]
        if {"post_id", "tag_id"} <= set(columns):
            order = "post_id, id" if "id" in columns else "post_id, rowid"
            # sqlite keeps any type in any column, and numbers sort before all others but NULL
            whole = "typeof(post_id) = 'integer'"
            yield from connection.execute(f"SELECT post_id, tag_id FROM {quoted} WHERE {whole} ORDER BY {order}")
            return


def listed_tags(row: Row) -> list[int]:
    """Tag ids that a post lists itself: numbers, or the older text of `$<base 36>#`."""
    found: list[int] = []
    columns = [name for name in row if name.startswith("tag_list_")] or ["tag_list"]
    for name in columns:
        value = row.get(name)
        if isinstance(value, str):
            found += [int(number, 36) for number in re.findall(r"\$([0-9A-Za-z]+)#", value)]
        elif isinstance(value, list):
            found += value
    return found


def _parquet(folder: Path) -> tuple[TagTable, Iterator[tuple[Row, list[int]]]]:
    files = {path.stem.lower().replace("_", ""): path for path in sorted(folder.glob("*.parquet"))}
    missing = [name for name in ("post", "tag") if name not in files]
    if missing:
        raise Halt(ExitCode.USAGE, f"{folder} has no {' and no '.join(name + '.parquet' for name in missing)}")
    table = pq.read_table(files["tag"], columns=["id", "name", "type"])
    columns = (table[name].to_pylist() for name in ("id", "name", "type"))
    tags = {number: (name, category) for number, name, category in zip(*columns, strict=True)}
    return tags, _parquet_rows(files["post"], files.get("posttagrelation"))


def _parquet_rows(posts: Path, relation: Path | None) -> Iterator[tuple[Row, list[int]]]:
    pairs = pq.read_table(relation, columns=["post_id", "tag_id"]) if relation else None
    if pairs is not None:
        pairs = pairs.take(pc.array_sort_indices(pairs["post_id"].combine_chunks())).combine_chunks()
    keys = pairs["post_id"].to_numpy() if pairs is not None else None
    with pq.ParquetFile(posts) as file:
        share = posts.stat().st_size / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=10_000):
            read_so_far(share * batch.num_rows)
            for row in batch.to_pylist():
                if isinstance(row.get("id"), float) and row["id"].is_integer():  # as pandas makes of a column with gaps
                    row["id"] = int(row["id"])
                ids: list[int] = []
                if pairs is not None and keys is not None and isinstance(row.get("id"), int):
                    start, end = keys.searchsorted(row["id"]), keys.searchsorted(row["id"], side="right")
                    ids = pairs["tag_id"].slice(start, end - start).to_pylist()
                yield row, ids or listed_tags(row)
