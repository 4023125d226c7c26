"""Sources in a store become files of this machine: the same set as from the folder, changes followed, faults outlived."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from objectstore import BUCKET, Faulty, served
from oddimages import drawn, encoded

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, load_settings
from train.prepare.folders.bringing import brought
from train.storage.objects import Store


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    monkeypatch.setattr(Store.__init__, "__defaults__", ((0.01,) * 4,))
    with served(monkeypatch) as proxy:
        yield proxy


def settings(tmp_path: Path, path: str, adapter: str = "sidecar") -> DatasetConfig:
    yaml = tmp_path / "dataset.yaml"
    yaml.write_text(f"name: s\nroot: {tmp_path}/data\nsources:\n  - {{name: mine, adapter: {adapter}, path: '{path}'}}\n")
    return load_settings([yaml])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "10_hero").mkdir(parents=True)
    for number in range(3):
        (folder / "10_hero" / f"{number}.png").write_bytes(encoded(drawn(64, 96, seed=number), "PNG"))
        (folder / "10_hero" / f"{number}.txt").write_text(f"hero, smile, tag {number}")
    return folder


def put(folder: Path, url: str) -> Store:
    store = Store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path, str(path.relative_to(folder)))
    return store


def files(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_buckets_folder_is_brought_once_and_followed(server: Faulty, pictures: Path, tmp_path: Path) -> None:
    store = put(pictures, f"s3://{BUCKET}/raw")
    asked = settings(tmp_path, store.url)
    with pytest.raises(Halt, match=r"was not brought here yet: run scripts/prepare\.py ingest"):
        brought(asked, fetch=False)
    said: list[str] = []
    server.share = 0.3
    here = brought(asked, fetch=True, say=said.append).sources[0].path
    assert files(here) == files(pictures) and said[0].startswith(f"sources mine: 6 objects of {store.url}") and "6 fetched" in said[0]
    assert len(server.faults) >= 2
    server.share = 0.0
    server.asked.clear()
    assert brought(asked, fetch=True, say=said.append).sources[0].path == here and "0 fetched" in said[-1] and not any("hero" in name for name in server.asked)
    (pictures / "10_hero/1.txt").write_text("hero, frown, tag 1")  # as long as before: the store's own time tells
    store.put(pictures / "10_hero/1.txt", "10_hero/1.txt")
    brought(asked, fetch=True, say=said.append)
    assert "1 fetched" in said[-1] and files(here) == files(pictures)
    assert brought(asked, fetch=False).sources[0].path == here


def test_one_object_and_nothing(server: Faulty, pictures: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for path in sorted((pictures / "10_hero").iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            archive.addfile(info, io.BytesIO(path.read_bytes()))
    Store(f"s3://{BUCKET}/tars").put(tmp_path / "00000.tar", "00000.tar")
    here = brought(settings(tmp_path, f"s3://{BUCKET}/tars/00000.tar", "webdataset"), fetch=True, say=lambda _: None).sources[0].path
    assert Path(here).name == "00000.tar" and Path(here).read_bytes() == (tmp_path / "00000.tar").read_bytes()
    with pytest.raises(Halt, match=f"sources mine: nothing lies at s3://{BUCKET}/absent") as caught:
        brought(settings(tmp_path, f"s3://{BUCKET}/absent"), fetch=True)
    assert caught.value.code == ExitCode.MISMATCH


def test_a_single_file_by_http(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}/10_hero/1.png"
        here = brought(settings(tmp_path, url), fetch=True, say=lambda _: None).sources[0].path
        web.shutdown()
    assert Path(here).read_bytes() == (pictures / "10_hero/1.png").read_bytes()


def test_what_does_not_fit_is_not_begun(server: Faulty, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(pictures, f"s3://{BUCKET}/raw")
    monkeypatch.setattr("train.prepare.folders.bringing.free_bytes", lambda _: 10)
    with pytest.raises(Halt, match="do not fit beside") as caught:
        brought(settings(tmp_path, f"s3://{BUCKET}/raw"), fetch=True)
    assert caught.value.code == ExitCode.CANNOT_WRITE
