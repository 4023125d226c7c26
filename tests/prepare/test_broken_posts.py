"""One broken post in a file of many costs that post: the others are read, and ids that tables made fractions of are ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config.dataset import SourceConfig
from train.prepare.formats.jsonstream import Malformed, iter_members, iter_values
from train.prepare.formats.mapping import mapped_post
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost
from train.prepare.sources.danbooru import post_number
from train.prepare.tables.schemas import REST_UNREAD, Quarantine

BREAK = {
    "NaN": ('"score": 2', '"score": NaN'), "infinity": ('"score": 2', '"score": -Infinity'),
    "no comma": ('"score": 2, ', '"score": 2 '), "single quotes": ('"score": 2', "'score': 2"),
    "no quote": ('"tags": "b"', '"tags": "b'), "Python": ('"score": 2', '"score": None'),
    "cut inside": ('"score": 2, "tags": "b", "list": [{"name": "x", "category": 0}]}', '"score": }'),
}  # fmt: skip


def posts(count: int = 4) -> list[dict[str, Any]]:
    """The third is the one that gets broken; each has an object inside that looks like a list of others."""
    return [
        {"id": number, "rating": "g", "score": number, "tags": "abcdefgh"[number - 1 : number], "list": [{"name": "x", "category": 0}]}
        for number in range(1, count + 1)
    ]


def forms() -> dict[str, str]:
    all_ = posts()
    return {
        "array": json.dumps(all_), "pretty array": json.dumps(all_, indent=1), "page": json.dumps({"posts": all_}),
        "gelbooru page": json.dumps({"@attributes": {"limit": 4}, "post": all_}),
        "page with more": json.dumps({"posts": all_, "more": [1]}),
        "pages": json.dumps(all_[:2]) + "\n" + json.dumps(all_[2:]), "lines": "\n".join(map(json.dumps, all_)),
        "pretty objects": "\n".join(json.dumps(post, indent=1) for post in all_),
    }  # fmt: skip


def ids(path: Path) -> tuple[list[int], list[str]]:
    found = [value for _, value in iter_values(path)]
    return [v["id"] for v in found if isinstance(v, dict)], [v.message for v in found if isinstance(v, Malformed)]


@pytest.mark.parametrize("form", forms())
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    (tmp_path / "posts.json").write_text("\ufeff" + forms()[form])
    assert ids(tmp_path / "posts.json") == ([1, 2, 3, 4], [])


@pytest.mark.parametrize("form", ["array", "page", "gelbooru page", "page with more", "pages", "lines"])
@pytest.mark.parametrize("kind", BREAK)
def test_a_broken_post_loses_itself_alone(tmp_path: Path, kind: str, form: str) -> None:
    text = forms()[form].replace(*BREAK[kind])
    assert text != forms()[form]
    (tmp_path / "posts.json").write_text(text)
    good, reports = ids(tmp_path / "posts.json")
    assert (good, len(reports)) == ([1, 3, 4], 1)
    assert REST_UNREAD not in reports[0]


@pytest.mark.parametrize("number", [1, 4])
def test_the_first_and_the_last_post_may_be_the_broken_one(tmp_path: Path, number: int) -> None:
    for form in ("array", "page", "pretty array"):
        text = forms()[form].replace(f'"score": {number},', f'"score": {number}')
        (tmp_path / "posts.json").write_text(text)
        good, reports = ids(tmp_path / "posts.json")
        assert (good, len(reports)) == ([n for n in (1, 2, 3, 4) if n != number], 1), form
        assert REST_UNREAD not in reports[0]


def test_objects_that_follow_each_other_lose_only_the_broken_one(tmp_path: Path) -> None:
    (tmp_path / "posts.json").write_text(forms()["pretty objects"].replace('"score": 2,', '"score": 2'))
    good, reports = ids(tmp_path / "posts.json")
    assert (good, len(reports)) == ([1, 3, 4], 1)


def test_a_file_of_thousands_with_one_broken_post(tmp_path: Path) -> None:
    many = [json.dumps({"id": n, "rating": "g", "tags": "x" * 500, "score": n}) for n in range(3000)]
    many[1500] = many[1500].replace('"score"', "'score'")
    (tmp_path / "posts.json").write_text("[" + ",\n".join(many) + "]")
    good, reports = ids(tmp_path / "posts.json")
    assert (good, len(reports)) == ([n for n in range(3000) if n != 1500], 1)


def test_a_cut_file_is_named_as_one(tmp_path: Path) -> None:
    for form in ("array", "page"):
        (tmp_path / "posts.json").write_text(forms()[form][:-30])
        good, reports = ids(tmp_path / "posts.json")
        assert good == [1, 2, 3]
        assert REST_UNREAD in reports[0]


def test_utf_16_is_named(tmp_path: Path) -> None:
    (tmp_path / "posts.json").write_bytes(forms()["array"].encode("utf-16"))
    good, (report,) = ids(tmp_path / "posts.json")
    assert (good, "UTF-16: save it as UTF-8" in report, REST_UNREAD in report) == ([], True, True)


def test_a_broken_member_of_sd_scripts_metadata(tmp_path: Path) -> None:
    text = json.dumps({f"{n}.png": {"caption": f"a {n}", "train_resolution": [64, n]} for n in range(1, 5)})
    for broken in (text.replace('"caption": "a 2"', '"caption": NaN'), text.replace('"caption": "a 2",', '"caption": "a 2"')):
        (tmp_path / "meta.json").write_text(broken)
        found = list(iter_members(tmp_path / "meta.json"))
        assert [name for name, value in found if not isinstance(value, Malformed)] == ["1.png", "3.png", "4.png"]
        assert len(found) == 4


def test_ids_as_tables_leave_them() -> None:
    assert [post_number(value) for value in (7, "7", 7.0, "7.0", 1e3, " 12 ", "5.")] == [7, 7, 7, 7, 1000, 12, 5]
    for bad in (1.5, "1.5", -1, -1.0, True, None, 1e30, 2.0**60, float("inf"), float("nan"), "1e3", "seven", [7], 10**30):
        with pytest.raises(ValueError, match="id is"):
            post_number(bad)


def test_ids_of_mapped_rows(tmp_path: Path) -> None:
    source = SourceConfig("s", "table", str(tmp_path), columns={"id": "id", "uri": "path"})
    found = [mapped_post(source, {"id": value, "path": "a.png"}, "row", tmp_path).id for value in (7, 7.0, "7.0", "7", "a.0")]
    assert found == ["7", "7", "7", "7", "a.0"]


def test_the_broken_one_is_quarantined_and_its_neighbours_are_records(tmp_path: Path) -> None:
    (tmp_path / "posts.json").write_text(forms()["array"].replace('"score": 2', '"score": NaN').replace('"id": 3', '"id": 3.0'))
    found = list(read_source(SourceConfig("s", "danbooru", str(tmp_path / "posts.json"))))
    assert [post.id for post in found if isinstance(post, RawPost)] == ["1", "3", "4"]
    assert [(entry.reason, "NaN is not JSON" in entry.message) for entry in found if isinstance(entry, Quarantine)] == [
        ("bad_record", True)
    ]
