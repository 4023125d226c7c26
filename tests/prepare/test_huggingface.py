"""Adapter huggingface: what `load_dataset` and `load_from_disk` open from local files, and what they do not."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from sixposts import COLUMNS, POSTS, api_post, flat_post, picture, pictures, records, same, source

from train.base.errors import ExitCode, Halt
from train.prepare.folders.files import read_image
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import Quarantine


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of the same posts as the adapters `danbooru` reads."""
    folder = tmp_path_factory.mktemp("posts")
    pictures(folder)
    (folder / "posts.json").write_text(json.dumps([api_post(post) for post in POSTS]))
    return records(source(folder / "posts.json", "danbooru"))


@pytest.fixture(autouse=True)
def no_network_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Nothing connects, and nothing is left in the cache of `datasets`."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    yield
    assert not cache.exists()


def embedded(posts: list[dict[str, Any]], folder: Path, **features: Any) -> datasets.Dataset:
    data = picture(folder / "drawn" / "one.png")
    found = datasets.Dataset.from_list([post | {"image": {"bytes": data, "path": None}} for post in posts])
    for column, feature in ({"image": datasets.Image()} | features).items():
        found = found.cast_column(column, feature)
    return found


def flat(post: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat_post(post).items() if name != "tags"}


def test_six_posts_in_parquet_and_in_a_saved_set(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    whole = embedded([flat(post) for post in POSTS], tmp_path)
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for number in range(2):
        whole.shard(2, number, contiguous=True).to_parquet(str(tmp_path / "parquet" / "data" / f"train-0000{number}-of-00002.parquet"))
    whole.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    datasets.DatasetDict({"train": whole.select(range(4)), "test": whole.select([4, 5])}).save_to_disk(str(tmp_path / "splits"))
    for place in (tmp_path / "parquet", tmp_path / "saved", tmp_path / "splits"):
        found = records(source(place, "huggingface", columns=COLUMNS))
        same(found, expected)
        assert {row["member"].rpartition(":")[2] for row in found} == {"image"}


def test_six_posts_in_files_that_name_their_pictures(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    """As text: a date keeps its zone and an md5 its zeros, which `datasets` itself would read as a time and a number."""
    rows = [flat(post) | {"file_name": f"{post['id']}.png"} for post in POSTS]
    for name in ("metadata.jsonl", "posts.jsonl", "posts.json", "metadata.csv"):
        folder = tmp_path / name.replace(".", "_")
        pictures(folder)
        if name.endswith(".csv"):
            with open(folder / name, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(
                    row | {column: json.dumps(value) for column, value in row.items() if isinstance(value, list)} for row in rows
                )
        else:
            (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
        named = folder if name.startswith("metadata") else folder / name
        same(records(source(named, "huggingface", columns=COLUMNS)), expected)


def test_six_posts_in_a_webdataset(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    pictures(tmp_path / "loose")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train-0000.tar", "w") as archive:
        for post in POSTS:
            (tmp_path / "loose" / f"{post['id']}.json").write_text(json.dumps(api_post(post)))
            for ending in ("png", "json"):
                archive.add(tmp_path / "loose" / f"{post['id']}.{ending}", f"{post['id']}.{ending}")
    same(records(source(tmp_path / "set", "huggingface")), expected)


def test_class_folders_ask_for_the_label_and_take_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("miku", "red fox"):
        for number in range(2):
            picture(tmp_path / "train" / name / f"{number}.png")
    with pytest.raises(Halt, match=r"columns\.caption: label\?") as caught:
        list(read_source(source(tmp_path, "huggingface")))
    assert caught.value.code == ExitCode.USAGE
    found = records(source(tmp_path, "huggingface", columns={"caption": "label"}))
    assert {row["uri"]: row["caption"] for row in found} == {
        "train/miku/0.png": "miku", "train/miku/1.png": "miku", "train/red fox/0.png": "red fox", "train/red fox/1.png": "red fox",
    }  # fmt: skip


def test_classes_are_named_in_tables_too(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"rating": n, "words": [n, 0]} for n in (0, 1)] + [{"rating": -1, "words": [1]}]
    kinds = {"rating": datasets.ClassLabel(names=["g", "e"]), "words": datasets.List(datasets.ClassLabel(names=["smile", "hat"]))}
    embedded(rows, tmp_path, **kinds).to_parquet(str(tmp_path / "train.parquet"))
    told = source(tmp_path / "train.parquet", "huggingface", columns={"rating": "rating", "tags": "words"})
    found = records(told)
    assert [(row["rating"], row["tags_general"]) for row in found] == [
        ("g", ["smile", "smile"]), ("e", ["hat", "smile"]), (None, ["hat"]),
    ]  # fmt: skip


def test_splits_and_files_outside_the_set_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = embedded([{"text": f"tag {n}"} for n in range(3)], tmp_path.parent / "pictures")
    for name in ("train-00000-of-00001", "test-00000-of-00001", "extra"):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    found = list(read_source(source(tmp_path, "huggingface")))
    assert len(found) == 6
    said = "".join(capsys.readouterr())
    assert "train (1 files), test (1 files)" in said
    assert "1 data files are no part of the set" in said
    assert "data/extra.parquet" in said


def test_several_columns_of_pictures_are_all_offered(tmp_path: Path) -> None:
    data = {"bytes": picture(tmp_path / "drawn" / "one.png"), "path": None}
    kinds = datasets.Features({"mask": datasets.Image(), "picture": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"mask": data, "picture": data, "text": "a"}]
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(str(tmp_path / "train.parquet"))
    assert re.search(r"columns\.image: (picture or mask|mask or picture)\?", refusal_of(tmp_path))


def test_one_broken_row_loses_that_row(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": "smile"}) for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([lines[0], '{"file_name": "1.png", "text": ', lines[2]]))
    found = list(read_source(source(tmp_path, "huggingface")))
    assert [type(one) for one in found] == [RawPost, Quarantine, RawPost]


def refusal_of(path: Path, **options: Any) -> str:
    with pytest.raises(Halt) as caught:
        list(read_source(source(path, "huggingface", **options)))
    return caught.value.message


def test_what_is_not_on_this_disk_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download owner/pictures --repo-type dataset" in refusal_of(Path("owner/pictures"))
    picture(tmp_path / "set" / "0.png")
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: https://example.org/a.parquet\n---\n")
    assert "README.md of" in refusal_of(tmp_path / "set")


def test_nothing_that_lies_there_is_run(tmp_path: Path) -> None:
    """Neither a loading script nor a pickle."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "set" / "a.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    assert "scripts are no longer supported" in refusal_of(tmp_path / "set")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "No (supported) data files" in refusal_of(tmp_path / "pickles")
    assert not (tmp_path / "ran").exists()


def test_several_configurations_are_asked_about(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: a.jsonl\n- config_name: large\n  data_files: b.jsonl\n---\n"
    )
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"file_name": f"{name}.png", "text": name}))
    assert "['small', 'large']" in refusal_of(tmp_path)
    (row,) = records(source(tmp_path / "b.jsonl", "huggingface"))
    assert (row["uri"], row["caption"]) == ("b.png", "b")


@pytest.mark.parametrize(("files", "words"), [
    ({}, "doesn't contain any data files"),
    ({"a.wav": b"RIFF"}, "audiofolder"),
    ({"0.png": None, "1.png": None}, "adapter: sidecar"),
    ({"state.json": b"{}"}, "cannot open"),
    ({"train.parquet": b"PAR1 and nothing else"}, ""),
    ({"0.txt": b"1girl", "1.txt": b"1girl", "0.png": None}, "adapter: sidecar"),
    ({"data.jsonl.gz": b"\x1f\x8b"}, "unpack"),
])  # fmt: skip
def test_what_holds_no_set_of_pictures_is_refused_with_words(files: dict[str, bytes | None], words: str, tmp_path: Path) -> None:
    for name, data in files.items():
        if data is None:
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
    if words:
        assert words in refusal_of(tmp_path)
    else:
        (one,) = read_source(source(tmp_path, "huggingface"))
        assert isinstance(one, Quarantine)


def test_a_link_that_leads_out_is_refused_unless_followed(tmp_path: Path) -> None:
    rows = embedded([{"text": "a"}], tmp_path)
    rows.to_parquet(str(tmp_path / "elsewhere.parquet"))
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "elsewhere.parquet", tmp_path / "set" / "train.parquet")
    (one,) = read_source(source(tmp_path / "set", "huggingface"))
    assert isinstance(one, Quarantine)
    assert one.reason == "outside_root"
    (row,) = records(source(tmp_path / "set", "huggingface", follow_links=True))
    assert row["caption"] == "a"


def test_an_ending_in_capitals_is_named_or_read(tmp_path: Path) -> None:
    embedded([{"text": "a"}], tmp_path / "drawn").to_parquet(str(tmp_path / "TRAIN.PARQUET"))
    assert "TRAIN.PARQUET" in refusal_of(tmp_path / "TRAIN.PARQUET")  # `datasets` opens none
    (row,) = records(source(tmp_path / "TRAIN.PARQUET", "imagefolder"))
    assert row["caption"] == "a"


def test_rows_keep_their_place(tmp_path: Path) -> None:
    """The n-th row's picture is the n-th row's caption's."""
    rows = []
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "one.png")
        rows.append({"image": {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}, "text": f"tag {number}"})
    whole = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    whole.select([4, 2, 0]).save_to_disk(str(tmp_path / "saved"))
    told = source(tmp_path / "saved", "huggingface")
    for number, post in zip((4, 2, 0), read_source(told), strict=True):
        assert isinstance(post, RawPost)
        assert post.caption == f"tag {number}"
        (tmp_path / "back.png").write_bytes(read_image(told, post.uri, post.member))
        with Image.open(tmp_path / "back.png") as image:
            assert image.getpixel((0, 0)) == (number, 0, 0)
