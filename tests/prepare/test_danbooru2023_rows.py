"""Rows of the danbooru2023 database that are not as they should be: each is refused alone, none stops the others."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost


def found(path: Path) -> dict[str, Any]:
    """Tags by id, and the message by key of what is refused."""
    posts = read_source(SourceConfig(name="s", adapter="danbooru2023", path=str(path)))
    return dict((post.id, post.tags) if isinstance(post, RawPost) else (post.key, post.message) for post in posts)


def database(path: Path, ids: list[Any], pairs: list[tuple[Any, int]]) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE post (id, rating, score, file_ext)")
    connection.execute("CREATE TABLE tag (id INTEGER PRIMARY KEY, name, type)")
    connection.execute("CREATE TABLE posttagrelation (post_id, tag_id)")
    connection.execute("INSERT INTO tag VALUES (7, 'solo', 0)")
    connection.executemany("INSERT INTO post VALUES (?, 0, 1, 'png')", [(one,) for one in ids])
    connection.executemany("INSERT INTO posttagrelation VALUES (?, ?)", pairs)
    connection.commit()
    return connection


def test_sqlite_ids_of_other_types(tmp_path: Path) -> None:
    database(tmp_path / "d.db", [1, None, 3, "4", "x"], [(1, 7), (None, 7), ("x", 7), (3, 7)]).close()
    rows = found(tmp_path / "d.db")
    assert (rows.pop("1"), rows.pop("3")) == ({"general": ["solo"]}, {"general": ["solo"]})
    assert len(rows) == 3
    assert all("expected a whole number" in message for message in rows.values())


def test_parquet_ids_of_other_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, None, 3], "rating": [0, 0, 0]}), tmp_path / "post.parquet")
    pq.write_table(pa.table({"id": [7], "name": ["solo"], "type": [0]}), tmp_path / "tag.parquet")
    pq.write_table(pa.table({"post_id": [1, None, 3], "tag_id": [7, 7, 7]}), tmp_path / "posttagrelation.parquet")
    rows = found(tmp_path)
    assert (rows.pop("1"), rows.pop("3")) == ({"general": ["solo"]}, {"general": ["solo"]})
    assert ["None" in message for message in rows.values()] == [True]
    pq.write_table(pa.table({"number": [1], "rating": [0]}), tmp_path / "post.parquet")
    assert len(found(tmp_path)) == 1


def test_rows_that_only_the_journal_holds_are_not_passed_over(tmp_path: Path) -> None:
    connection = database(tmp_path / "d.db", [1], [(1, 7)])
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("INSERT INTO post VALUES (2, 0, 1, 'png')")
    connection.commit()
    with pytest.raises(Halt, match="PRAGMA wal_checkpoint") as stopped:
        found(tmp_path / "d.db")
    assert stopped.value.code == ExitCode.USAGE
    connection.close()
    assert sorted(found(tmp_path / "d.db")) == ["1", "2"]
