"""Words that only say that there is none, and texts that nobody reads, are counted instead of trained or dropped."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from ingests import config, run
from sixposts import picture

from train.base.errors import ExitCode, Halt
from train.config.dataset import SelectConfig, load_settings
from train.config.stage import load_stage
from train.prepare.select import check_filters


@pytest.mark.parametrize("cell", ["nan", "None", "NULL", "<NA>"])
def test_a_printed_missing_caption_is_none(cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        picture(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "table.csv").write_text(f"file,text\n0.png,\"1girl, hat\"\n1.png,{cell}\n")
    columns = {"uri": "file", "caption": "text"}
    records, _ = run(config(tmp_path, tmp_path / "in" / "table.csv", "table", columns=columns))
    assert [row["caption"] for row in records.values()] == ["1girl, hat", None]
    assert f"1 cells hold a printed missing value and count as empty (such as {cell!r} in caption)" in capsys.readouterr().out


def test_html_escapes_in_danbooru_posts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in" / "1.png")
    post = {"id": 1, "file_ext": "png", "rating": "g", "score": 1, "created_at": "2024-01-01T00:00:00Z", "tag_string": "1girl girls&#039;_frontline"}  # fmt: skip
    (tmp_path / "in" / "posts.json").write_text(json.dumps([post]))
    run(config(tmp_path, tmp_path / "in" / "posts.json", "danbooru"))
    assert "1 posts have HTML escapes in their tags" in capsys.readouterr().out


def test_a_text_that_a_mapped_json_outdoes_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    drawn = picture(tmp_path / "drawn" / "a.png")
    members = {"a.png": drawn, "a.txt": b"a hat", "a.json": json.dumps({"prompt": "1girl, hat"}).encode()}
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as archive:
        for name, data in members.items():
            (tmp_path / "drawn" / name).write_bytes(data)
            archive.add(tmp_path / "drawn" / name, name)
    records, _ = run(config(tmp_path, tmp_path / "in", "webdataset", columns={"caption": "prompt"}))
    assert [row["caption"] for row in records.values()] == ["1girl, hat"]
    assert "1 texts in tars are not read, since columns.caption takes the captions" in "".join(capsys.readouterr())


def test_a_config_of_another_kind_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    for load, file, told in (
        (load_stage, "configs/dataset.yaml", "this is a dataset config, which scripts/prepare.py takes"),
        (load_settings, "configs/ft1.yaml", "this is a stage config, which train/run.py"),
        (load_stage, "configs/prompts.yaml", "this is a prompts file"),
        (load_stage, str(tmp_path), "is a folder"),
    ):
        with pytest.raises(Halt, match=told) as halt:
            load([file])
        assert halt.value.code == ExitCode.USAGE
        assert halt.value.message.count("unknown key") == 0


def test_a_filter_of_an_unknown_column_names_its_stage_before_any_work(tmp_path: Path) -> None:
    plain = config(tmp_path, tmp_path, "sidecar")
    settings = replace(plain, select={"ft1": SelectConfig(where=["qualty == best"])})
    with pytest.raises(Halt, match=r"select\.ft1\.where: there is no column 'qualty', did you mean quality\?"):
        check_filters(settings)
