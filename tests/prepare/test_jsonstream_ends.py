"""Nothing that stands behind the last bracket of a JSON file is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.prepare.formats.jsonstream import Malformed, iter_members, iter_values


def values(path: Path, text: str) -> list[object]:
    path.write_text(text)
    return [value.message if isinstance(value, Malformed) else value for _, value in iter_values(path)]


@pytest.mark.parametrize("name", ["pages.json", "pages.jsonl"])
@pytest.mark.parametrize("between", ["", "\n", " \r\n\r\n" * 40_000])
def test_arrays_that_follow_each_other(tmp_path: Path, name: str, between: str) -> None:
    pages = [[{"id": 1}, {"id": 2}], [], [{"id": 3}], [{"id": 4, "text": "x" * 70_000}]]
    text = between.join(map(json.dumps, pages)) + between
    assert values(tmp_path / name, text) == [post for page in pages for post in page]


@pytest.mark.parametrize("behind", ["GARBAGE", '{"id": 2}', "]", " " * 70_000 + "x"])
def test_other_text_behind_an_array(tmp_path: Path, behind: str) -> None:
    first, report = values(tmp_path / "posts.json", '[{"id": 1}]' + behind)
    assert first == {"id": 1}
    assert "after the array" in str(report)


def test_text_behind_an_object_of_objects(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"a.png": {"tags": "x"}}\n{"b.png": {"tags": "y"}}')
    (name, value), (_, report) = iter_members(tmp_path / "meta.json")
    assert (name, value) == ("a.png", {"tags": "x"})
    assert isinstance(report, Malformed)
    (tmp_path / "meta.json").write_text('{"a.png": {"tags": "x"}}' + "\n" * 70_000)
    assert [name for name, _ in iter_members(tmp_path / "meta.json")] == ["a.png"]
