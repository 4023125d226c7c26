"""Bars that know how far they are, and folders without leftovers of killed or failed runs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.base.errors import Halt
from train.config.dataset import DatasetConfig, SourceConfig
from train.prepare import ingest
from train.prepare.folders.unchanged import sources_mark
from train.prepare.tables import progress, units
from train.prepare.tables.schemas import QUARANTINE
from train.prepare.tables.workers import Peers

POST = {"tag_string_general": "smile " * 300, "rating": "g", "score": 1}
COUNT = 400


def _array(folder: Path) -> SourceConfig:
    folder.joinpath("posts.json").write_text(json.dumps([POST | {"id": n} for n in range(COUNT)]))
    return SourceConfig("s", "danbooru", str(folder))


def _lines(folder: Path) -> SourceConfig:
    folder.joinpath("posts.jsonl").write_text("\n".join(json.dumps(POST | {"id": n}) for n in range(COUNT)))
    return SourceConfig("s", "danbooru", str(folder / "posts.jsonl"))


def _parquet(folder: Path) -> SourceConfig:
    rows = [{"id": n, "tags": ["smile"]} for n in range(COUNT * 10)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "posts.parquet")
    return SourceConfig("s", "table", str(folder), columns={"id": "id", "tags": "tags"})


def _csv(folder: Path) -> SourceConfig:
    folder.joinpath("posts.csv").write_text("id,tags\n" + "".join(f"{n},{'smile ' * 100}\n" for n in range(COUNT)))
    return SourceConfig("s", "table", str(folder), columns={"id": "id", "tags": "tags"}, tag_separator=" ")


def _sidecars(folder: Path) -> SourceConfig:
    for number in range(40):
        folder.joinpath(f"{number}.png").touch()
        folder.joinpath(f"{number}.txt").write_text("smile, hat")
    return SourceConfig("s", "sidecar", str(folder))


def _tars(folder: Path) -> SourceConfig:
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number in range(40):
            for ending in ("png", "txt"):
                (folder / f"{number}.{ending}").write_bytes(b"x" * 3000)
                archive.add(folder / f"{number}.{ending}", f"{number}.{ending}")
    return SourceConfig("s", "webdataset", str(folder / "0.tar"))


@pytest.mark.parametrize("make", [_array, _lines, _parquet, _csv, _sidecars, _tars])
def test_ingest_knows_how_much_there_is(
    tmp_path: Path, make: Callable[[Path], SourceConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(progress, "tqdm", lambda **options: _Bar(options, seen))
    settings = DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[source], max_quarantine_fraction=1)
    _, sizes = sources_mark(settings.sources, "")
    assert sizes[0] > 0
    (tmp_path / "spill").mkdir()
    ingest._parse(settings, sizes, tmp_path / "spill")
    total = seen[-1][1]
    assert total == sizes[0]
    assert total * 0.9 <= seen[-1][0] <= total  # at the end nearly all was read, never more
    assert len({done for done, _ in seen}) > 1, "moves in between, too"


class _Bar:
    def __init__(self, options: dict[str, object], seen: list[tuple[float, float]]) -> None:
        self.total, self.n, self.seen = int(str(options["total"])), 0, seen
        assert options["disable"] in (self.total == 0, False)

    def update(self, count: int = 1) -> None:
        self.n += count
        self.seen.append((self.n, self.total))

    def close(self) -> None: ...

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_only_the_first_process_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert progress.bar(10, "x").disable
    monkeypatch.setenv("RANK", "0")
    with progress.bar(10, "x") as shown:
        assert not shown.disable


def test_nothing_is_left_of_killed_ranks_or_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _lines(tmp_path)
    out = tmp_path / "out" / "d"
    for name in (".parsed-0", ".parsed-1", ".parsed-7"):
        (out / name).mkdir(parents=True)
        (out / name / "00000.arrow").write_bytes(b"half")
    settings = DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[source])
    ingest.run(settings)
    assert not list(out.glob(".parsed-*"))
    (out / ".parsed-3").mkdir()
    ingest.run(settings)  # with nothing to do
    assert not list(out.glob(".parsed-*"))

    def broken(_: SourceConfig) -> None:
        raise Halt(2, "the disk is gone")  # type: ignore[arg-type]

    monkeypatch.setattr(ingest, "read_source", broken)
    (tmp_path / "posts.jsonl").write_text("{}")
    with pytest.raises(Halt, match="the disk is gone"):
        ingest.run(settings)
    assert not list(out.glob(".parsed-*"))


def test_half_written_files_and_dead_heartbeats_are_swept(tmp_path: Path) -> None:
    names = [".quarantine.parquet.7.9.tmp", "index.arrow.7.tmp", "probe/.00000-x.parquet.7.9.tmp",
             "latents/8x8-00000.safetensors.7.tmp", "quarantine/probe/.00000-x.parquet.7.9.tmp"]  # fmt: skip
    for name in [*names, ".peers/1-of-2", "probe/00000-x.parquet"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    units.sweep(tmp_path)
    with Peers(tmp_path, 0, 1):
        pass
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00000-x.parquet"]
    assert not (tmp_path / ".peers").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(units.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        units.write_parquet(tmp_path / "a.parquet", QUARANTINE.empty_table())
    assert not list(tmp_path.iterdir())
