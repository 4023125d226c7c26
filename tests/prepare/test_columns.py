"""Columns that are called otherwise, misspelt or missing are asked about at ingest, with what is there and what to set."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.formats.columns import LOOK_ROWS
from train.prepare.ingest import read_source
from train.prepare.posts.census import Census
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import Quarantine


def read(path: Path, adapter: str = "imagefolder", **options: Any) -> list[RawPost | Quarantine]:
    return list(read_source(SourceConfig("s", adapter, str(path), **options)))  # type: ignore[arg-type]


def captions(path: Path, adapter: str = "imagefolder", **options: Any) -> list[str | None]:
    found = read(path, adapter, **options)
    assert all(isinstance(post, RawPost) for post in found), found
    return [post.caption for post in found if isinstance(post, RawPost)]


def asked(path: Path, adapter: str = "imagefolder", **options: Any) -> str:
    with pytest.raises(Halt) as stopped:
        read(path, adapter, **options)
    assert stopped.value.code == ExitCode.USAGE
    return stopped.value.message


def metadata(folder: Path, form: str, rows: list[dict[str, Any]], name: str = "metadata") -> Path:
    """A metadata file of the form, beside a picture for each of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if isinstance(row.get("file_name"), str) and not {"/", "\\"} & set(row["file_name"]):
            (folder / row["file_name"]).write_bytes(b"x")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    elif form == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    else:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


FORMS = ["jsonl", "csv", "parquet"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("column", "setting"),
    [("caption", "columns.caption: caption"), ("prompt", "columns.caption: prompt"), ("Text", "columns.caption: Text"),
     ("tags", "columns.tags: tags"), ("additional_feature", "columns.caption: additional_feature")],
)  # fmt: skip
def test_captions_in_another_column_are_asked_about(tmp_path: Path, form: str, column: str, setting: str) -> None:
    metadata(tmp_path, form, [{"file_name": f"{n}.png", "id": n, column: "1girl, hat"} for n in range(2)])
    message = asked(tmp_path)
    assert setting in message
    assert f"metadata.{form}" in message
    assert f"It has file_name, id, {column}" in message


@pytest.mark.parametrize("form", FORMS)
def test_a_misspelt_column_is_named(tmp_path: Path, form: str) -> None:
    metadata(tmp_path, form, [{"file_name": "0.png", "caption": "1girl"}])
    assert "columns.caption is 'captoin': no such column in metadata." in asked(tmp_path, columns={"caption": "captoin"})
    assert "did you mean caption?" in asked(tmp_path, columns={"caption": "Caption"})
    assert captions(tmp_path, columns={"caption": "caption"}) == ["1girl"]


@pytest.mark.parametrize("form", FORMS)
def test_a_column_of_names_that_is_called_otherwise_is_named(tmp_path: Path, form: str) -> None:
    metadata(tmp_path, form, [{"filename": "0.png", "text": "1girl"}])
    if form == "parquet":  # without file_name it may be one with embedded pictures
        with pytest.raises(Halt, match=r"columns\.uri"):
            read(tmp_path)
    else:
        assert "no column 'file_name' with the names of the pictures: set columns.uri, did you mean filename?" in asked(tmp_path)
        assert "columns.uri is 'flename': no such column" in asked(tmp_path, columns={"uri": "flename"})
        assert captions(tmp_path, columns={"uri": "filename"}) == ["1girl"]


@pytest.mark.parametrize("form", FORMS)
def test_pictures_without_captions_are_taken_where_that_is_said(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    metadata(tmp_path, form, [{"file_name": "0.png", "width": 8}])
    (refused,) = read(tmp_path)
    assert isinstance(refused, Quarantine)
    assert refused.reason == "missing_caption"
    assert captions(tmp_path, on_missing_caption="take") == [None]
    assert "without captions are taken" in capsys.readouterr().out
    metadata(tmp_path, form, [{"file_name": "0.png", "prompt": "hat"}])
    assert captions(tmp_path, on_missing_caption="take") == [None]
    assert "its column 'prompt' is not read" in capsys.readouterr().out


def test_lines_are_asked_about_long_before_the_end(tmp_path: Path) -> None:
    rows = [{"file_name": "0.png", "prompt": "1girl"}] * (LOOK_ROWS + 5)
    metadata(tmp_path, "jsonl", rows)
    found = read_source(SourceConfig("s", "imagefolder", str(tmp_path)))
    assert len(list(itertools.islice(found, LOOK_ROWS - 1))) == LOOK_ROWS - 1
    with pytest.raises(Halt, match="prompt"):
        next(found)


def test_a_key_that_few_lines_have_is_a_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"file_name": f"{n}.png", "text": "1girl"} for n in range(4)]
    rows[3]["parent"] = 7
    metadata(tmp_path / "a", "jsonl", rows)
    metadata(tmp_path / "b", "jsonl", rows[:2])
    assert len(captions(tmp_path, columns={"parent_id": "parent"})) == 6
    assert "columns.rating is 'ratting': no such column in any row" in asked(tmp_path, columns={"rating": "ratting"})


def test_one_file_of_a_folder_without_the_column_is_named(tmp_path: Path) -> None:
    metadata(tmp_path / "a", "jsonl", [{"file_name": "0.png", "text": "1girl"}])
    metadata(tmp_path / "b", "csv", [{"file_name": "0.png", "caption": "1girl"}])
    assert "b/metadata.csv" in asked(tmp_path)


def test_a_row_without_its_caption_is_refused_alone(tmp_path: Path) -> None:
    metadata(tmp_path, "jsonl", [{"file_name": "0.png", "text": "1girl"}, {"file_name": "1.png", "text": None}, {"file_name": "2.png"}])
    found = read(tmp_path)
    assert [one.reason if isinstance(one, Quarantine) else one.caption for one in found] == ["1girl", "missing_caption", "missing_caption"]
    assert "metadata.jsonl row 1" in found[1].message  # type: ignore[union-attr]


def test_pictures_that_no_metadata_names_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata(tmp_path, "jsonl", [{"file_name": "0.png", "text": "1girl"}])
    assert captions(tmp_path) == ["1girl"]
    assert "not in the metadata" not in capsys.readouterr().out
    (tmp_path / "more.png").write_bytes(b"x")
    assert captions(tmp_path) == ["1girl"]
    assert "1 of 2 pictures are not in the metadata files and are not taken, such as more.png" in capsys.readouterr().out


def test_a_folder_of_pictures_alone_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"x")
    with pytest.raises(Halt, match=r"1 pictures, and no metadata\.jsonl.*sidecar") as stopped:
        read(tmp_path)
    assert stopped.value.code == ExitCode.MISMATCH


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.json"])
def test_metadata_of_another_name_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.png").write_bytes(b"x")
    (tmp_path / name).write_text('{"file_name": "0.png", "text": "1girl"}\n')
    with pytest.raises(Halt, match=f"{name} has another name"):
        read(tmp_path)
    if name.endswith(".jsonl"):
        assert captions(tmp_path / name) == ["1girl"]


def test_cells_that_are_one_tag_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,tags\na.png,1girl long_hair\nb.png,hatsune miku\nc.png,1girl\n")
    config = SourceConfig("s", "table", str(tmp_path / "t.csv"), columns={"uri": "file", "tags": "tags"}, tag_separator=", ")
    with Census(config).open() as census:
        assert len(list(read_source(config))) == 3
    assert census.counts["one_tag"] == 1
    assert "'1girl long_hair'): see tag_separator" in census.lines()[0]


IMAGE = {"bytes": b"\x89PNG", "path": "a.png"}


def embedded(path: Path, image: Any, column: str = "image", **more: Any) -> Path:
    pq.write_table(pa.table({column: image, **(more or {"text": ["1girl"]})}), path / "train.parquet")
    return path


def refused_by_column(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(Halt) as stopped:
        read(path, **options)
    assert stopped.value.code == ExitCode.MISMATCH
    assert all(word in stopped.value.message for word in words), stopped.value.message


def test_embedded_pictures_in_each_form(tmp_path: Path) -> None:
    assert captions(embedded(tmp_path, [IMAGE])) == ["1girl"]
    assert captions(embedded(tmp_path, pa.array([b"\x89PNG"], pa.large_binary()))) == ["1girl"]
    assert captions(embedded(tmp_path, [b"\x89PNG"], "jpg"), columns={"image": "jpg"}) == ["1girl"]


def test_a_picture_column_that_holds_none_is_named(tmp_path: Path) -> None:
    refused_by_column(embedded(tmp_path, [IMAGE], "img"), "columns.image: img", "It has img, text")
    refused_by_column(embedded(tmp_path, ["a.png"]), "column image is string", "columns.uri")
    refused_by_column(embedded(tmp_path, [[IMAGE]]), "column image is list")
    refused_by_column(embedded(tmp_path, [{"path": "a.png"}]), "column image is struct")
    nothing = pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    refused_by_column(embedded(tmp_path, nothing), "no image bytes, only the path")


def test_captions_of_embedded_pictures_are_asked_about(tmp_path: Path) -> None:
    assert "columns.caption: caption" in asked(embedded(tmp_path, [IMAGE], caption=["1girl"]))
    assert "columns.tags: tags" in asked(embedded(tmp_path, [IMAGE], tags=[["1girl"]]))
    assert captions(embedded(tmp_path, [IMAGE], caption=[["a girl", "a hat"]]), columns={"caption": "caption"}) == ["a girl\na hat"]
    (refused,) = read(embedded(tmp_path, [IMAGE], text=pa.array([None], pa.string())))
    assert isinstance(refused, Quarantine)
    assert refused.reason == "missing_caption"


def test_simpletuner_and_deepghs_check_what_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pq.write_table(pa.table({"filename": ["a.png"], "prompt": ["1girl"]}), tmp_path / "meta.parquet")
    assert "columns.caption: prompt" in asked(tmp_path, "simpletuner")
    assert "did you mean prompt" in asked(tmp_path, "simpletuner", columns={"caption": "promt"})
    assert captions(tmp_path, "simpletuner", columns={"caption": "prompt"}) == ["1girl"]
    assert "columns.md5 is 'hash'" in asked(tmp_path, "deepghs", columns={"md5": "hash"})


def test_our_column_and_theirs_the_wrong_way_round(tmp_path: Path) -> None:
    metadata(tmp_path, "csv", [{"file_name": "0.png", "prompt": "1girl"}])
    assert "did you mean caption: prompt?" in asked(tmp_path, columns={"prompt": "caption"})
    assert "did you mean caption?" in asked(tmp_path, columns={"captoin": "prompt"})


def test_a_table_without_captions_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("file,caption\na.png,1girl\n")
    assert captions(tmp_path / "t.csv", "table", columns={"uri": "file"}) == [None]
    assert "neither captions nor tags of t.csv are mapped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "uri"),
    [("a.png", "a.png"), ("./a.png", "a.png"), ("sub\\a.png", "sub/a.png"), ("sub/../a.png", "a.png"), ("{root}/sub/a.png", "sub/a.png")],
)
def test_paths_as_tables_write_them(tmp_path: Path, written: str, uri: str) -> None:
    (tmp_path / "t.csv").write_text(f"file,text\n{written.format(root=tmp_path)},1girl\n")
    (post,) = read(tmp_path / "t.csv", "table", columns={"uri": "file", "caption": "text"})
    assert isinstance(post, RawPost)
    assert post.uri == uri
    folder = metadata(tmp_path / "hf", "jsonl", [{"file_name": written.format(root=tmp_path / "hf"), "text": "1girl"}])
    (post,) = read(folder)
    assert isinstance(post, RawPost)
    assert post.uri == uri


@pytest.mark.parametrize(
    ("written", "reason", "words"),
    [("https://a.example/a.png", "bad_record", "nothing is downloaded"), ("C:\\pics\\a.png", "outside_root", "set images"),
     ("/elsewhere/a.png", "outside_root", "set images")],
)  # fmt: skip
def test_paths_of_another_disk_are_refused_with_the_fix(tmp_path: Path, written: str, reason: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(f"file,text\n{written},1girl\n")
    (post,) = read(tmp_path / "t.csv", "table", columns={"uri": "file", "caption": "text"})
    assert isinstance(post, Quarantine)
    assert post.reason == reason
    assert words in post.message
    assert "t.csv row 0" in post.message
