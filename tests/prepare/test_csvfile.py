"""CSV as spreadsheets and people write it: read as meant and said, or refused with the way to save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import REST_UNREAD, Quarantine

COLUMNS = {"uri": "file_name", "caption": "text"}


def read(path: Path, **options: Any) -> list[Any]:
    found = read_source(SourceConfig("s", "table", str(path), columns=COLUMNS, **options))
    return [(one.uri, one.caption) if isinstance(one, RawPost) else one for one in found]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", 'file_name,text\na.png,"1girl, hat"\n', ""),
        ("a.csv", "file_name;text\na.png;1girl, hat\n", "semicolons"),
        ("a.csv", "file_name\ttext\na.png\t1girl, hat\n", "tabs"),
        ("a.tsv", "file_name\ttext\na.png\t1girl, hat\n", ""),
        ("a.tsv", 'file_name,text\na.png,"1girl, hat"\n', "commas"),
        ("a.csv", "file_name|text\na.png|1girl, hat\n", "bars"),
        ("a.csv", "sep=;\r\nfile_name;text\r\na.png;1girl, hat\r\n", "semicolons"),
        ("a.csv", '\ufefffile_name,text\r\na.png,"1girl, hat"\r\n', ""),
        ("a.csv", 'file_name, text\na.png, "1girl, hat"\n', ""),
        ("a.csv", '"file_name";" text "\na.png;"1girl, hat"\n', "semicolons"),
        ("a.csv", ',file_name,text\n0,a.png,"1girl, hat"\n', ""),
    ],
)
def test_a_table_is_read_as_it_was_meant(tmp_path: Path, name: str, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == [("a.png", "1girl, hat")]
    out = capsys.readouterr().out
    assert (f"{name} divides its columns by {said}" in out) == bool(said)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("file_name\ttext\na.png\t1girl\n".encode(encoding))
    with pytest.raises(Halt, match=r"a\.csv is UTF-16, not UTF-8: save it as `CSV UTF-8`") as stopped:
        read(tmp_path / "a.csv")
    assert stopped.value.code == ExitCode.USAGE
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "1girl"}\n'.encode(encoding))
    (tmp_path / "a.csv").unlink()
    with pytest.raises(Halt, match=r"metadata\.jsonl is UTF-16"):
        list(read_source(SourceConfig("s", "imagefolder", str(tmp_path))))


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("file_name,text,artist\na.png,caf\xe9,x\nb.png,hat,\xe9\n".encode("cp1252"))
    refused, taken = read(tmp_path / "a.csv")
    assert "not UTF-8: save the file as `CSV UTF-8`" in refused.message
    assert taken == ("b.png", "hat")  # what is not mapped is not read


def test_a_workbook_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK\3\4\0\0")
    with pytest.raises(Halt, match="adapter table cannot read"):
        read(tmp_path / "a.xlsx")
    (tmp_path / "a.csv").write_bytes(b"PK\3\4\0\0")
    with pytest.raises(Halt, match="is no text"):
        read(tmp_path / "a.csv")


def test_a_column_that_stands_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name,text,text\na.png,1girl,hat\n")
    with pytest.raises(Halt, match=r"columns\.caption: a\.csv has 2 columns 'text'"):
        read(tmp_path / "a.csv")


def test_line_breaks_and_quotes_in_captions(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('file_name,text\na.png,"1girl\nsecond, ""line"""\nb.png,hat\n')
    assert read(tmp_path / "a.csv") == [("a.png", '1girl\nsecond, "line"'), ("b.png", "hat")]


def test_a_caption_without_its_quotes_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name,text\na.png,1girl, hat\nb.png,hat\n")
    refused, taken = read(tmp_path / "a.csv")
    assert "a.csv row 0" in refused.message
    assert "stands in quotes" in refused.message
    assert taken == ("b.png", "hat")


def test_a_quote_that_is_not_closed_never_swallows_rows_in_silence(tmp_path: Path) -> None:
    rows = "".join(f"{n}.png,hat\n" for n in range(50))
    (tmp_path / "a.csv").write_text('file_name,text\na.png,hat\nb.png,"1girl\n' + rows)
    taken, refused = read(tmp_path / "a.csv")
    assert taken == ("a.png", "hat")
    assert isinstance(refused, Quarantine)
    assert "lines 3 to 53" in refused.message
    assert REST_UNREAD in refused.message  # which ends the step with exit 7, whatever the share
