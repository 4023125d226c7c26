"""Files of scores and tags: keys that match nothing are shown beside a record's, cells of any print are read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, ScoreConfig, SourceConfig, TagConfig, dataset_dir
from train.prepare import ingest, label, score, tag
from train.prepare.posts.normalise import BadRecord
from train.prepare.tables.units import read_table


def world(folder: Path, **more: Any) -> DatasetConfig:
    """Three pictures without captions, one of them in a folder, after ingest."""
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / name).write_bytes(b"x")
    source = SourceConfig("s", "sidecar", str(folder / "in"), on_missing_caption="take")
    config = DatasetConfig(name="d", root=str(folder / "out"), sources=[source], workers=0, max_quarantine_fraction=1.0, **more)
    ingest.run(config)
    return config


def scored(folder: Path, text: str | bytes, column: str = "score", name: str = "f.csv") -> dict[str, float | None]:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    config = world(folder, score=ScoreConfig("column", path=str(folder / name), column=column))
    score.run(config)
    return {row["key"]: row["score"] for row in read_table(dataset_dir(config), "aesthetic").to_pylist()}


def tagged(folder: Path, values: Any, **options: Any) -> dict[str, list[tuple[str, int, float]]]:
    keys = ["s:a.png", "s:sub/b.png", "s:sub/c.png"][: len(values)]
    pq.write_table(pa.table({"key": keys, "tags": values}), folder / "f.parquet")
    config = world(folder, tag=TagConfig("column", path=str(folder / "f.parquet"), **options))
    tag.run(config)
    rows = read_table(dataset_dir(config), "tags").to_pylist()
    return {row["key"]: [(one["tag"], one["category"], round(one["prob"], 3)) for one in row["tags"]] for row in rows}


@pytest.mark.parametrize(
    ("key", "record", "fix"),
    [("a.png", "s:a.png", "write s: before each"), ("sub\\b.png", "s:sub/b.png", "write keys as"), ("b", "s:sub/b.png", "write keys as"),
     ("other:a.png", "s:a.png", "write keys as"), ("C:\\pics\\sub\\c.png", "s:sub/c.png", "write keys as"), ("zz", "s:a.png", "write keys as")],
)  # fmt: skip
def test_keys_that_match_nothing_are_shown_beside_a_records(tmp_path: Path, key: str, record: str, fix: str) -> None:
    with pytest.raises(Halt) as stopped:
        scored(tmp_path, f"key,score\n{key},0.5\n")
    assert stopped.value.code == ExitCode.MISMATCH
    for words in (f"there {key!r}", f"in the records {record!r}", fix, "none of its 1 keys"):
        assert words in stopped.value.message
    (tmp_path / "tags.csv").write_text(f"key,tags\n{key},hat\n")
    with pytest.raises(Halt, match="none of its 1 keys"):
        tag.run(world(tmp_path, tag=TagConfig("column", path=str(tmp_path / "tags.csv"))))


def test_keys_that_match_in_part_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scored(tmp_path, "key,score\ns:a.png,0.5\nb.png,0.6\nzz,0.7\n") == {"s:a.png": 0.5}
    assert "2 of its 3 keys belong to no record, such as 'b.png' (a record's key: 's:sub/b.png')" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["key;score\ns:a.png;0.5\n", "\ufeffkey,score\r\ns:a.png,0.5\r\n", 'key, score\n"s:a.png", 0.5\n', "n,key,score\n0,s:a.png,0.5\n",
     "key,score\ns:a.png,0.5\ns:sub/b.png,None\n"],
)  # fmt: skip
def test_scores_of_a_spreadsheet(tmp_path: Path, text: str) -> None:
    assert scored(tmp_path, text)["s:a.png"] == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [("key;score\ns:a.png;0,85\n", "write 0.85"), ("key,score\ns:a.png,[0.85]\n", "a collection, write its number alone"),
     ('key,score\ns:a.png,"{\'aesthetic\': 0.85}"\n', "a collection, write its number alone"), ("key,score\ns:a.png,87%\n", "s:a.png has '87%'"),
     ("key,Score\ns:a.png,1\n", "did you mean Score?"), ("file,score\na.png,1\n", "has no key"), ("key,score\ns:a.png\n", "row 0: 1 columns"),
     ("key,score\ns:a.png,1\ns:a.png,2\n", "stands there twice: 's:a.png'")],
)  # fmt: skip
def test_scores_that_cannot_be_read_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Halt) as stopped:
        scored(tmp_path, text)
    assert stopped.value.code == ExitCode.USAGE
    assert words in stopped.value.message
    assert "f.csv" in stopped.value.message


def test_scores_as_lists_in_parquet_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["s:a.png"], "score": [[0.5]]}), tmp_path / "f.parquet")
    with pytest.raises(Halt, match=r"s:a\.png has \[0\.5\] \(list"):
        score.run(world(tmp_path, score=ScoreConfig("column", path=str(tmp_path / "f.parquet"))))


HAT = [("long hair", 0, 1.0), ("hat", 0, 1.0)]


@pytest.mark.parametrize(
    "value", ["long hair, hat", "['long hair', 'hat']", '["long hair","hat"]', "['long hair' 'hat']", '{"long hair",hat}', "('long hair', 'hat')"]
)
def test_tags_of_any_print(tmp_path: Path, value: str) -> None:
    assert tagged(tmp_path, [value]) == {"s:a.png": HAT}


def test_probabilities_go_through_the_thresholds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tagged(tmp_path, ["{'hat': 0.9, 'coat': 0.2, 'x': 0.01}", json.dumps([["hat", 0.5]])]) == {
        "s:a.png": [("hat", 0, 0.9), ("coat", 0, 0.2)], "s:sub/b.png": [("hat", 0, 0.5)],
    }  # fmt: skip
    assert "2 rows give probabilities: tag.general_threshold" in capsys.readouterr().out
    config = world(tmp_path, tag=TagConfig("column", path=str(tmp_path / "f.parquet"), general_threshold=0.6))
    label.run(config)
    labels = {row["key"]: row["flex_tags"] for row in read_table(dataset_dir(config), "labels").to_pylist()}
    assert ("hat" in labels["s:a.png"], "coat" in labels["s:a.png"], "hat" in labels["s:sub/b.png"]) == (True, False, False)


def test_maps_of_parquet_and_our_own_table(tmp_path: Path) -> None:
    maps = pa.array([[("hat", 0.9)]], pa.map_(pa.string(), pa.float32()))
    assert tagged(tmp_path, maps) == {"s:a.png": [("hat", 0, 0.9)]}
    assert tagged(tmp_path, [[{"tag": "hero", "category": 4, "prob": 0.9}]]) == {"s:a.png": [("hero", 4, 0.9)]}


@pytest.mark.parametrize(
    ("value", "words"),
    [("{'hat': 95}", "between 0 and 1"), ("['hat', 3]", "expected texts"), ("['hat', 'co", "cut off"), ({"general": ["hat"]}, "general"),
     ("1girl long_hair hat", "would be one tag"), (["a, b"], "has the tag 'a, b'"), (5, "expected tags")],
)  # fmt: skip
def test_tags_that_cannot_be_read_are_named(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(Halt) as stopped:
        tagged(tmp_path, [value])
    assert stopped.value.code == ExitCode.USAGE
    assert words in stopped.value.message


def test_rows_of_pictures_that_have_tags_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("1girl")
    assert tagged(tmp_path, [["hat"], ["coat"]]) == {"s:sub/b.png": [("coat", 0, 1.0)]}
    assert "1 rows belong to records that have tags already (tag.use: all adds to them)" in capsys.readouterr().out


def test_a_cell_that_is_nothing_is_no_tag() -> None:
    assert tag.column_tags(None, "tags") == tag.column_tags("", "tags") == tag.column_tags("[]", "tags") == []
    with pytest.raises(BadRecord):
        tag.column_tags(True, "tags")
