"""Names of caption files: any case, other endings, the whole name of the picture, texts that are not read."""

from __future__ import annotations

import csv
import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingests import config, run, write_picture

from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.caption_text import _listed, caption_rules
from train.prepare.posts.normalise import RawPost, to_record
from train.recipe.captions import read_stored, split
from train.recipe.exclusions import R1_WORDS


def found(folder: Path, **options: Any) -> dict[str, Any]:
    """Caption by picture, or the message of its refusal."""
    source = SourceConfig("s", "sidecar", str(folder), **options)
    return {
        post.id if isinstance(post, RawPost) else post.key.removeprefix("s:"):
        post.caption if isinstance(post, RawPost) else post.message for post in read_source(source)
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_picture(tmp_path / "in" / "b" / "a.png")
    return tmp_path / "in"


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.Txt"])
def test_the_ending_counts_in_any_case(folder: Path, name: str) -> None:
    (folder / "b" / name).write_text("1girl")
    assert found(folder) == {"b/a.png": "1girl"}


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("a.caption", (".caption", "caption", ".CAPTION")), ("a.png.txt", (".txt", "txt", ".png.txt", "png.txt")),
        ("a.tags", (".tags",)), ("a.png.TAGS", (".tags", "png.tags")), ("a.Cap", ("cap",)),
    ],
)  # fmt: skip
def test_a_named_ending_is_taken_and_another_is_named(folder: Path, name: str, endings: tuple[str, ...]) -> None:
    (folder / "b" / name).write_text("1girl")
    message = found(folder)["b/a.png"]
    assert f"b/a.txt does not exist, but b/{name} does: set caption_ext: ." in message
    assert "on_missing_caption" not in message
    advised = message.split("caption_ext: ")[1].split(" ")[0]
    for ending in (*endings, advised):
        assert found(folder, caption_ext=ending) == {"b/a.png": "1girl"}


def test_nothing_beside_names_the_setting(folder: Path) -> None:
    assert found(folder) == {"b/a.png": "b/a.txt does not exist: see on_missing_caption"}
    assert found(folder, caption_ext=".caption") == {"b/a.png": "b/a.caption does not exist: see on_missing_caption"}
    (folder / "b" / "a.b.txt").write_text("of another picture")
    assert found(folder) == {"b/a.png": "b/a.txt does not exist: see on_missing_caption"}


def test_two_captions_of_one_picture_are_refused_unless_equal(folder: Path) -> None:
    (folder / "b" / "a.txt").write_text("1girl")
    (folder / "b" / "a.png.txt").write_text("1girl")
    assert found(folder, caption_ext=".txt") == {"b/a.png": "1girl"}
    (folder / "b" / "a.png.txt").write_text("2girls")
    message = found(folder, caption_ext=".txt")["b/a.png"]
    assert "b/a.txt and b/a.png.txt are two captions" in message
    assert found(folder) == {"b/a.png": "1girl"}
    assert found(folder, caption_ext=".png.txt") == {"b/a.png": "2girls"}


def test_what_is_not_read_is_said(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b" / "a.caption").write_text("1girl")
    run(config(tmp_path, folder, "sidecar", on_missing_caption="take"))
    assert "1 pictures are taken without a caption but have a .caption beside them" in capsys.readouterr().out
    (folder / "b" / "a.txt").write_text("1girl")
    run(config(tmp_path, folder, "sidecar"))
    assert "1 pictures have a .caption beside them, which is not read" in capsys.readouterr().out


def test_names_that_look_alike_are_alike(tmp_path: Path) -> None:
    write_picture(tmp_path / "caf\u00e9.png")
    (tmp_path / "cafe\u0301.txt").write_text("1girl")
    assert list(found(tmp_path).values()) == ["1girl"]


def test_texts_apart_from_the_pictures(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "texts" / "b").mkdir(parents=True)
    (tmp_path / "texts" / "b" / "a.txt").write_text("1girl")
    assert found(tmp_path / "texts", images=str(folder)) == {"b/a.png": "1girl"}


LINES = "1girl, miku\n### smile,\r\n\r\nred hair"


def _written(folder: Path) -> dict[str, SourceConfig]:
    """The picture 1.png with LINES as its caption, as every layout that has captions keeps it."""
    folder.mkdir()
    write_picture(folder / "1.png")
    (folder / "1.txt").write_bytes(LINES.encode())
    row = {"file_name": "1.png", "text": LINES}
    pq.write_table(pa.Table.from_pylist([row]), folder / "table.parquet")
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([row.keys(), row.values()])
    (folder / "plain").mkdir()
    write_picture(folder / "plain" / "1.png")
    (folder / "plain" / "metadata.jsonl").write_text(json.dumps(row))
    (folder / "sd.json").write_text(json.dumps({"1.png": {"caption": "1girl, miku", "tags": LINES.partition("\n")[2]}}))
    (folder / "whole.json").write_text(json.dumps({"1": {"tags": LINES}}))
    with tarfile.open(folder / "0.tar", "w") as archive:
        archive.add(folder / "1.png", "1.png")
        archive.add(folder / "1.txt", "1.txt")
    columns, images = {"uri": "file_name", "caption": "text"}, str(folder)
    return {
        "sidecar": SourceConfig("s", "sidecar", str(folder)),
        "parquet": SourceConfig("s", "table", str(folder / "table.parquet"), columns=columns),
        "csv": SourceConfig("s", "table", str(folder / "table.csv"), columns=columns),
        "imagefolder": SourceConfig("s", "imagefolder", str(folder / "plain")),
        "caption and tags": SourceConfig("s", "sd_scripts", str(folder / "sd.json")),
        "tags alone": SourceConfig("s", "sd_scripts", str(folder / "whole.json")),
        "webdataset": SourceConfig("s", "webdataset", str(folder / "0.tar")),
        "simpletuner": SourceConfig("s", "simpletuner", str(folder / "table.parquet"), images=images, columns={"caption": "text"}),
    }


@pytest.mark.parametrize(
    ("options", "separator", "wanted"),
    [
        ({}, "###", (["1girl", "miku"], ["smile", "red hair"])),
        ({}, "|||", ([], ["1girl", "miku", "### smile", "red hair"])),
        ({"keep_tokens": 1}, "|||", (["1girl"], ["miku", "### smile", "red hair"])),
        ({"tag_separator": " "}, "###", (["1girl", "miku"], ["smile", "red", "hair"])),
    ],
)
def test_every_layout_gives_the_same_caption(
    tmp_path: Path, options: dict[str, Any], separator: str, wanted: tuple[list[str], list[str]]
) -> None:
    for name, plain in _written(tmp_path / "in").items():
        source = dataclasses.replace(plain, **options)
        posts = [post for post in read_source(source) if isinstance(post, RawPost) and post.uri in ("1.png", "0.tar")]
        rows = [to_record(post, source, caption_rules(source, separator)) for post in posts]
        assert [split(row["caption"]) for row in rows if isinstance(row, dict)] == [wanted], name


def test_class_tokens_are_the_caption_of_pictures_without_one(tmp_path: Path) -> None:
    """As sd-scripts has it: a folder's own caption; `kohya` = the nearest folder's name behind its number."""
    folder = tmp_path / "in"
    for name in ("10_red_cat/a.png", "10_red_cat/b.png", "3_blue dog/deep/c.png", "loose/d.png"):
        write_picture(folder / name)
    (folder / "10_red_cat/a.txt").write_text("a cat of its own")

    def read(**keys: object) -> dict[str, str | None]:
        source = SourceConfig("s", "sidecar", str(folder), on_missing_caption="take", **keys)  # type: ignore[arg-type]
        return {row["uri"]: row["caption"] for post in read_source(source) if isinstance(row := to_record(post, source), dict)}

    assert read() == {"10_red_cat/a.png": "a cat of its own", "10_red_cat/b.png": None, "3_blue dog/deep/c.png": None, "loose/d.png": None}
    assert read(class_tokens="1girl, solo")["loose/d.png"] == "1girl, solo"
    assert read(class_tokens="kohya") == {
        "10_red_cat/a.png": "a cat of its own", "10_red_cat/b.png": "red cat", "3_blue dog/deep/c.png": "blue dog", "loose/d.png": None,
    }  # fmt: skip


def test_several_files_of_one_picture(folder: Path) -> None:
    for name, text in (("a.txt", "1girl, hat"), ("a.Caption", "She has a hat."), ("a.png.tags", "girl, headwear")):
        (folder / "b" / name).write_text(text)
    assert found(folder, caption_ext=[".txt", "caption", "tags"]) == {"b/a.png": ["1girl, hat", "She has a hat.", "girl, headwear"]}
    assert found(folder, caption_ext=["tags", ".txt"]) == {"b/a.png": ["girl, headwear", "1girl, hat"]}
    assert found(folder, caption_ext=["cap", ".txt"]) == {"b/a.png": ["1girl, hat"]}  # those that are there
    assert found(folder, caption_ext=["cap", "prompt"])["b/a.png"].startswith("b/a.cap nor .prompt does not exist, but b/a.")
    (folder / "b/a.png.txt").write_text("another")
    assert "are two captions of one picture" in found(folder, caption_ext=[".txt", ".caption"])["b/a.png"]


@pytest.mark.parametrize(("lines", "tags", "prose", "variants"), [
    ("join", "1girl, hat, girl, headwear", ["She has a hat."], []),
    ("first", "1girl, hat, girl, headwear", ["She has a hat."], []),
    ("variants", "1girl, hat", ["She has a hat."], ["girl, headwear"]),
])  # fmt: skip
@pytest.mark.parametrize("form", ["files", "list"])
def test_texts_of_one_picture_as_caption_lines_says(folder: Path, form: str, lines: str, tags: str, prose: list[str], variants: list[str]) -> None:
    texts = {"a.txt": "1girl, hat", "a.caption": "She has a hat.", "a.tags": "girl, headwear"}
    options: dict[str, Any] = {"caption_lines": lines, "caption_ext": ["txt", "caption", "tags"]}
    for name, text in texts.items() if form == "files" else {"a.txt": json.dumps(list(texts.values()))}.items():
        (folder / "b" / name).write_text(text)
    source = SourceConfig("s", "sidecar", str(folder), **options)
    [post] = read_source(source)
    assert isinstance(post, RawPost)
    record = to_record(post, source)
    assert isinstance(record, dict)
    ways, told = read_stored(record["caption"])
    assert [", ".join(flex) for _, flex, _ in ways] == [tags, *variants]
    assert told == prose


@pytest.mark.parametrize("form", ["files", "list"])
@pytest.mark.parametrize("lines", ["join", "first", "variants"])
def test_the_hard_exclusions_see_each_of_several_texts(folder: Path, form: str, lines: str) -> None:
    word = sorted(R1_WORDS)[0]
    for place in range(3):
        texts = ["1girl", "She has a hat.", "girl"]
        texts[place] = f"{texts[place]}, {word}" if place != 1 else f"She has a {word}."
        names = ("a.txt", "a.caption", "a.tags")
        for name, text in zip(names, texts if form == "files" else [json.dumps(texts)], strict=False):
            (folder / "b" / name).write_text(text)
        source = SourceConfig("s", "sidecar", str(folder), caption_lines=lines, caption_ext=["txt", "caption", "tags"])  # type: ignore[arg-type]
        [post] = read_source(source)
        assert isinstance(post, RawPost)
        record = to_record(post, source)
        assert isinstance(record, dict) and record["hard_exclusion"] == "R1"


def test_what_begins_like_a_list_is_none() -> None:
    for text in ("[artist name], hat", "[]", "[1, 2]", '["a", 3]', "[" * 3000):
        assert _listed(text) == [text]
    assert _listed(' ["a, b", "c"]\n') == ["a, b", "c"]
