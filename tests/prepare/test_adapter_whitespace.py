"""Never two tags out of one: only the declared separator parts a joined text, whatever white space a tag holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.tables.schemas import Quarantine


def general(path: Path, adapter: str, **options: Any) -> list[list[str] | str]:
    """Tags of each post, or the reason why it is refused."""
    source = SourceConfig(name="s", adapter=adapter, path=str(path), **options)  # type: ignore[arg-type]
    found: list[list[str] | str] = []
    for post in read_source(source):
        assert isinstance(post, RawPost)
        row = to_record(post, source)
        found.append(row.reason if isinstance(row, Quarantine) else row["tags_general"])
    return found


@pytest.mark.parametrize("separator", ["\t", "\n", ", ", " | "])
def test_tags_with_spaces_survive_any_other_separator(tmp_path: Path, separator: str) -> None:
    tags = ["long hair", "1girl", "k-on!"]
    pq.write_table(pa.table({"id": [1], "tags": [separator.join(tags)]}), tmp_path / "posts.parquet")
    columns = {"id": "id", "tags": "tags"}
    assert general(tmp_path / "posts.parquet", "table", columns=columns, tag_separator=separator) == [tags]


@pytest.mark.parametrize("space", ["\u3000", "\u00a0", "\u2003"])
def test_other_spaces_stay_inside_a_tag(tmp_path: Path, space: str) -> None:
    text, tags = f" 1girl  a{space}b solo\n", ["1girl", f"a{space}b", "solo"]
    pq.write_table(pa.table({"id": [1], "tags": [text]}), tmp_path / "posts.parquet")
    assert general(tmp_path / "posts.parquet", "table", columns={"id": "id", "tags": "tags"}, tag_separator=" ") == [tags]
    for adapter, post in (("danbooru", {"tag_string_general": text}), ("danbooru", {"tags": text}), ("gelbooru", {"tags": text})):
        (tmp_path / "posts.json").write_text(json.dumps([{"id": 1, **post}]))
        assert general(tmp_path / "posts.json", adapter) == [tags]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\x85", "\u2028"])
def test_a_line_break_inside_a_text_is_refused(tmp_path: Path, line_break: str) -> None:
    (tmp_path / "posts.json").write_text(json.dumps([{"id": 1, "tag_string_general": f"1girl a{line_break}b"}]))
    assert general(tmp_path / "posts.json", "danbooru") == ["bad_record"]
