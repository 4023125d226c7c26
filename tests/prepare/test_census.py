"""What ingest counts over a source and says once: records without a year, ratings of which only the user knows the scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare import ingest
from train.prepare.tables.units import read_table


def dataset(tmp_path: Path, posts: list[dict[str, Any]], adapter: str = "danbooru", **options: Any) -> DatasetConfig:
    (tmp_path / "posts.jsonl").write_text("\n".join(json.dumps({"id": n, "tags": "x"} | post) for n, post in enumerate(posts)))
    source = SourceConfig("s", adapter, str(tmp_path / "posts.jsonl"), **options)  # type: ignore[arg-type]
    return DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[source])


OLD = [{"rating": "sqe"[n % 3], "created_at": "2015-05-05"} for n in range(30)]


def test_a_dump_from_before_2022_is_asked_about_and_never_relabelled(tmp_path: Path) -> None:
    with pytest.raises(Halt, match=r"rating_scheme: sqe .* or gsqe") as stopped:
        ingest.run(dataset(tmp_path, OLD))
    assert stopped.value.code == ExitCode.USAGE
    assert "10 e, 10 q, 10 s" in stopped.value.message
    assert not (tmp_path / "out" / "d" / "records").exists()
    for scheme, letters in (("sqe", {"g", "q", "e"}), ("gsqe", {"s", "q", "e"})):
        settings = dataset(tmp_path, OLD, rating_scheme=scheme)
        ingest.run(settings)
        assert set(read_table(dataset_dir(settings), "records").column("rating").to_pylist()) == letters


@pytest.mark.parametrize(
    ("posts", "said"),
    [
        (OLD[:6], True),  # too few to tell: said, not asked
        ([{"rating": "s", "created_at": "2015-05-05"}] * 20, True),
        ([*OLD, {"rating": "g"}], False),
        ([*OLD, {"rating": "s", "created_at": "2023-05-05"}], False),  # rated when there were four
        ([post | {"rating": {"s": "safe", "q": "questionable", "e": "explicit"}[post["rating"]]} for post in OLD], False),
        ([{"rating": "e", "created_at": "2015-05-05"}] * 30, False),
    ],
)
def test_what_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str], posts: list[dict[str, Any]], said: bool) -> None:
    ingest.run(dataset(tmp_path, posts))
    assert ("rating_scheme: sqe" in capsys.readouterr().out) == said


def test_a_source_of_three_ratings_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest.run(dataset(tmp_path, OLD, "gelbooru"))
    assert "rating_scheme" not in capsys.readouterr().out


def test_a_folder_of_s_alone_is_asked_when_it_is_large(tmp_path: Path) -> None:
    with pytest.raises(Halt, match="rating_scheme"):
        ingest.run(dataset(tmp_path, [{"rating": "s"}] * 60))


def test_records_without_a_year_are_counted_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dates = ["2015-05-05", "soon", "0000-00-00 00:00:00", None, {"$date": "never"}, {"$date": 1430784000000}]
    settings = dataset(tmp_path, [{"rating": "g", "created_at": value} for value in dates])
    ingest.run(settings)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no year" in line]
    assert line.startswith("ingest s: 4 of 6 records have no year")
    assert "1 have no created_at, 3 have one that cannot be read (created_at 'soon' of s:1)" in line
    years = read_table(dataset_dir(settings), "records").column("created_year").to_pylist()
    assert years == [2015, None, None, None, None, 2015]


def test_folders_without_any_date_are_not_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    (tmp_path / "in" / "a.txt").write_text("1girl")
    ingest.run(DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[SourceConfig("s", "sidecar", str(tmp_path / "in"))]))
    assert "year" not in capsys.readouterr().out
