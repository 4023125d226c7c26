"""Folders of real disks: links, litter, videos, other spellings and endings; each is read, or counted by name once."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare import ingest, probe
from train.prepare.folders.files import read_image
from train.prepare.folders.walking import walk
from train.prepare.tables.quarantine import Complaint
from train.prepare.tables.schemas import Quarantine
from train.prepare.tables.units import merge_quarantine, read_table


def picture(path: Path, caption: str | None = "1girl") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (len(str(path)) % 250, 2, 3)).save(path, format="PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def dataset(tmp_path: Path, path: Path, adapter: str = "sidecar", **options: Any) -> DatasetConfig:
    source = SourceConfig("s", adapter, str(path), assume_rating="g", **options)  # type: ignore[arg-type]
    return DatasetConfig(name="d", root=str(tmp_path / "out"), sources=[source], max_quarantine_fraction=1.0, workers=0)


def taken(settings: DatasetConfig) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, str, str]]]:
    """(records by id, {id: (kind, reason, message)} of the quarantine)."""
    ingest.run(settings)
    records = {row["key"][2:]: row for row in read_table(dataset_dir(settings), "records").to_pylist()}
    for row in records.values():
        assert read_image(settings.sources[0], row["uri"], row["member"])[:4] == b"\x89PNG"
    rows = merge_quarantine(dataset_dir(settings)).to_pylist()
    return records, {row["key"][2:]: (row["kind"], row["reason"], row["message"]) for row in rows}


# --- links ---------------------------------------------------------------------------------------------


def test_a_linked_folder_inside_the_source_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("real/a.png", "real/sub/b.png", ".store/c.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "again").symlink_to("real")
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "real" / "up").symlink_to("..")
    (tmp_path / "in" / "store").symlink_to(".store")  # its home is hidden: met here alone
    records, quarantine = taken(dataset(tmp_path, tmp_path / "in"))
    assert (set(records), quarantine) == ({"real/a.png", "real/sub/b.png", "store/c.png"}, {})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "linked folders" in line]
    assert line.startswith("ingest s: 3 linked folders lead to folders of the same source")


def outside(tmp_path: Path) -> Path:
    for name in ("far/x.png", "far/sub/y.png", "far/sub/z.png"):
        picture(tmp_path / name)
    (tmp_path / "far" / "sub" / "round").symlink_to(tmp_path / "far")
    picture(tmp_path / "alone" / "w.png")
    picture(tmp_path / "in" / "home.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "w.png").symlink_to(tmp_path / "alone" / "w.png")
    (tmp_path / "in" / "w.txt").write_text("1boy")
    return tmp_path / "in"


def test_a_link_that_leads_out_is_refused_picture_by_picture_and_names_the_key(tmp_path: Path) -> None:
    records, quarantine = taken(dataset(tmp_path, outside(tmp_path)))
    assert set(records) == {"home.png"}
    assert set(quarantine) == {"linked/x.png", "linked/sub/y.png", "linked/sub/z.png", "w.png"}
    for kind, reason, message in quarantine.values():
        assert (kind, reason, "follow_links: true" in message) == ("error", "outside_root", True)


def test_share_limits_see_every_picture_behind_a_link(tmp_path: Path) -> None:
    settings = dataclasses.replace(dataset(tmp_path, outside(tmp_path)), max_quarantine_fraction=0.02)
    with pytest.raises(Complaint, match="4 of 5") as stopped:
        ingest.run(settings)
    assert stopped.value.code == ExitCode.MISMATCH


def test_follow_links_reads_what_lies_outside_in_every_step(tmp_path: Path) -> None:
    settings = dataset(tmp_path, outside(tmp_path), follow_links=True)
    records, quarantine = taken(settings)
    assert (set(records), quarantine) == ({"home.png", "linked/x.png", "linked/sub/y.png", "linked/sub/z.png", "w.png"}, {})
    assert records["w.png"]["caption"] == "1boy"
    probe.run(settings)
    assert set(read_table(dataset_dir(settings), "probe").column("status").to_pylist()) == {"ok"}
    picture(tmp_path / "far" / "new.png")  # what changes behind a link is noticed
    assert "linked/new.png" in taken(settings)[0]


def test_a_captions_link_out_is_followed_where_told_so(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png", None)
    (tmp_path / "a.txt").write_text("from afar")
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "a.txt")
    assert taken(dataset(tmp_path, tmp_path / "in", follow_links=True))[0]["a.png"]["caption"] == "from afar"


def test_metadata_that_names_a_linked_picture(tmp_path: Path) -> None:
    folder = outside(tmp_path)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "linked/x.png", "text": "1girl"}))
    records, _ = taken(dataset(tmp_path, folder, "imagefolder", follow_links=True))
    assert set(records) == {"linked/x.png"}


# --- litter and what is no picture ---------------------------------------------------------------------

LITTER = ("__MACOSX/a.png", "._a.png", ".DS_Store", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "Thumbs.db", "desktop.ini", "#recycle/b.png",
          ".thumbnails/a.png", "a-masklabel.png", "@Recycle/a.png", "~$a.docx", "b.png.part", "c.png.crdownload",
          "Icon\r", ".~lock.a.odt#", "sub/.DS_Store", "$RECYCLE.BIN/x.png", ".trashed-1700-a.png", "a.png:Zone.Identifier")  # fmt: skip


def test_litter_is_passed_over_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "in" / "a.png")
    for name in LITTER:
        picture(tmp_path / "in" / name, None)
    records, quarantine = taken(dataset(tmp_path, tmp_path / "in"))
    assert (set(records), quarantine) == ({"a.png"}, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "leftovers" in line]
    assert [line.partition(" of desktops")[0] for line in lines] == [f"ingest s: {len(LITTER)} leftovers"]


def test_pictures_with_like_names_are_no_litter(tmp_path: Path) -> None:
    names = ("masklabel.png", "part.png", "thumbs.png", "a~b.png", "tmp.png", "#1.png", "@me.png", "$5.png")
    for name in names:
        picture(tmp_path / "in" / name)
    assert set(taken(dataset(tmp_path, tmp_path / "in"))[0]) == set(names)


OTHERS = ("a.mp4", "b.WEBM", "c.zip", "d.swf", "e.mkv", "f.rar", "g.7z", "h.mov")


def test_videos_and_archives_in_a_folder_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "x.png")
    for name in OTHERS:
        (tmp_path / "in" / name).write_bytes(b"x")
        (tmp_path / "in" / name).with_suffix(".txt").write_text("1girl, animated")
    settings = dataclasses.replace(dataset(tmp_path, tmp_path / "in"), max_quarantine_fraction=0.0)
    records, quarantine = taken(settings)
    assert (set(records), set(quarantine)) == ({"x.png"}, set(OTHERS))
    assert {entry[:2] for entry in quarantine.values()} == {("excluded", "not_a_picture")}
    probe.run(settings)


@pytest.mark.parametrize("adapter", ["danbooru", "gelbooru", "e621", "table", "imagefolder", "sd_scripts", "webdataset"])
def test_posts_that_are_no_pictures_are_left_out_by_name(tmp_path: Path, adapter: str) -> None:
    folder = tmp_path / "in"
    picture(folder / "1.png", "x" if adapter == "webdataset" else None)
    names = ["1.png", *(f"{number}.{name[2:]}" for number, name in enumerate(OTHERS, start=2))]
    options: dict[str, Any] = {"columns": {"uri": "file_name", "caption": "text"}} if adapter == "table" else {}
    if adapter in ("danbooru", "gelbooru", "e621"):
        posts = []
        for number, name in enumerate(names, start=1):
            extension = name.rpartition(".")[2]
            tags: Any = {"general": ["x"]} if adapter == "e621" else "x"
            posts.append({"id": number, "tags": tags, "rating": "g", "file_ext": extension, "file": {"ext": extension}})
        (folder / "posts.json").write_text(json.dumps(posts))
    elif adapter == "sd_scripts":
        (folder / "meta.json").write_text(json.dumps({name: {"caption": "x"} for name in names}))
    elif adapter == "imagefolder":
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": "x"}) for name in names))
    elif adapter == "table":
        (folder / "t.csv").write_text("file_name,text\n" + "\n".join(f"{name},x" for name in names))
    else:
        with tarfile.open(folder / "0.tar", "w") as archive:
            archive.add(folder / "1.png", "1.png")
            archive.add(folder / "1.txt", "1.txt")
            for number, name in enumerate(names[1:], start=2):
                archive.add(folder / "1.txt", name)
                archive.add(folder / "1.txt", f"{number}.txt")
            archive.add(folder / "1.png", "._1.png")
    records, quarantine = taken(dataset(tmp_path, folder, adapter, **options))
    assert len(records) == 1
    assert [entry[:2] for entry in quarantine.values()] == [("excluded", "not_a_picture")] * len(OTHERS)


def test_a_converted_ugoira_is_a_picture(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "5.webp", None)
    (tmp_path / "in" / "posts.json").write_text(json.dumps([{"id": 5, "tags": "x", "rating": "g", "file_ext": "zip"}]))
    assert taken(dataset(tmp_path, tmp_path / "in", "danbooru"))[0]["5"]["uri"] == "5.webp"


# --- names ---------------------------------------------------------------------------------------------

NAME = "がく été"  # composed and decomposed forms differ


@pytest.mark.parametrize(("disk", "text"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_composed_and_decomposed_names_find_one_another(tmp_path: Path, disk: str, text: str) -> None:
    there, named = unicodedata.normalize(disk, NAME), unicodedata.normalize(text, NAME)  # type: ignore[arg-type]
    assert there != named
    folder = tmp_path / "in"
    picture(folder / there / f"{there}.png", None)
    (folder / there / f"{named}.txt").write_text("1girl")
    assert taken(dataset(tmp_path, folder))[0][f"{there}/{there}.png"]["caption"] == "1girl"
    path = f"{named}/{named}.png"
    for adapter, name, content in (
        ("imagefolder", "metadata.jsonl", json.dumps({"file_name": path, "text": "x"})),
        ("sd_scripts", "meta.json", json.dumps({path: {"caption": "x"}})),
        ("sd_scripts", "meta.json", json.dumps({path[:-4]: {"caption": "x"}})),
        ("table", "t.csv", f"file_name,text\n{path},x\n"),
        ("danbooru", "posts.json", json.dumps({"id": 5, "tags": "x", "rating": "g", "file_name": path})),
    ):
        (folder / name).write_text(content)
        options: dict[str, Any] = {"columns": {"uri": "file_name", "caption": "text"}} if adapter == "table" else {}
        records, _ = taken(dataset(tmp_path, folder, adapter, **options))
        assert [row["uri"] for row in records.values()] == [f"{there}/{there}.png"], adapter
        (folder / name).unlink()


def test_other_endings_and_cases_are_found_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.PNG", "b.webp", "c.jpg", "c.webp", "Sub/d.png", "e.jpeg"):
        picture(tmp_path / "in" / name, None)
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "b.png", "c.png", "sub/D.png", "e.jpg")]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = dataset(tmp_path, tmp_path / "in", "imagefolder")
    ingest.run(settings)
    uris = read_table(dataset_dir(settings), "records").column("uri").to_pylist()
    assert uris == ["Sub/d.png", "a.PNG", "b.webp", "c.png", "e.jpeg"]  # of c two could be meant: none is guessed
    out = capsys.readouterr().out
    assert "2 names are spelt otherwise on the disk" in out
    assert "2 pictures have another ending on the disk" in out


MD5 = "0123456789abcdef" * 2
LAYOUTS = (f"{MD5}.png", f"01/23/{MD5}.png", f"01/{MD5}.png", f"images/{MD5}.png", f"original/01/23/{MD5}.png", "1005.png",
           "0005/1005.png", "original/0005/1005.png", f"{MD5}.PNG", f"{MD5.upper()}.png", f"01/23/{MD5}.webp", "1005.jpg",
           f"gelbooru_1005_{MD5}.png", f"danbooru_1005_{MD5}.png", f"e621_1005_{MD5}.png")  # fmt: skip


@pytest.mark.parametrize("adapter", ["danbooru", "gelbooru", "e621"])
def test_where_downloaders_put_pictures(tmp_path: Path, adapter: str) -> None:
    tags: Any = {"general": ["x"]} if adapter == "e621" else "x"
    post = {"id": 1005, "tags": tags, "rating": "g", "md5": MD5, "file_ext": "png", "file": {"ext": "png", "md5": MD5}}
    for number, layout in enumerate(LAYOUTS):
        folder = tmp_path / f"in{number}"
        picture(folder / layout, None)
        (folder / "posts.json").write_text(json.dumps([post, post | {"id": 7, "md5": None, "file": {}}]))
        found = {row.id: row.uri for row in ingest.read_source(dataset(tmp_path, folder, adapter).sources[0])}  # type: ignore[union-attr]
        assert found == {"1005": layout, "7": "7.png" if adapter != "e621" else "7.jpg"}, layout


def test_a_missing_picture_says_where_it_was_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    picture(folder / "1.png", None)
    posts = [{"id": 1, "tags": "x", "rating": "g"}, {"id": 1005, "tags": "x", "rating": "g", "md5": MD5, "file_ext": "png"}]
    (folder / "posts.json").write_text(json.dumps(posts))
    settings = dataset(tmp_path, folder, "danbooru")
    ingest.run(settings)
    probe.run(settings)
    (row,) = merge_quarantine(dataset_dir(settings)).to_pylist()
    assert (row["key"], row["reason"]) == ("s:1005", "missing_file")
    for part in (str(folder), "1005", "0005/1005", MD5, f"01/{MD5}", f"01/23/{MD5}", ".png"):
        assert part in row["message"], part


# --- what `path` may be --------------------------------------------------------------------------------


def places(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for name in ("a.png", "b.png"):
        picture(folder / name)
    for name in ("set.zip", "set.rar", "set.tar.gz", "clip.mp4", "notes.txt", "t.parquet", "t.csv", "m.json", "x.tar"):
        (folder / name).write_bytes(b"PK\3\4")
    return folder


@pytest.mark.parametrize("adapter", ["sidecar", "imagefolder", "webdataset", "table", "danbooru", "gelbooru", "e621", "sd_scripts",
                                     "deepghs", "simpletuner", "danbooru2023"])  # fmt: skip
@pytest.mark.parametrize("name", ["set.zip", "set.rar", "set.tar.gz", "clip.mp4", "a.png", "notes.txt"])
def test_a_path_of_the_wrong_kind_is_refused_with_the_fix(tmp_path: Path, adapter: str, name: str) -> None:
    if (adapter, name) in {("sidecar", "a.png"), ("danbooru2023", "notes.txt")}:
        return
    options = {"columns": {"uri": "x"}} if adapter == "table" else {}
    with pytest.raises(Halt, match=r"sources s: path .*(unpack it|name a folder)") as stopped:
        ingest.run(dataset(tmp_path, places(tmp_path) / name, adapter, **options))
    assert stopped.value.code == ExitCode.USAGE


def test_a_path_of_another_adapter_names_it(tmp_path: Path) -> None:
    for name, adapter in (("t.csv", "table"), ("x.tar", "webdataset"), ("m.json", "danbooru"), ("t.parquet", "table")):
        with pytest.raises(Halt, match=adapter):
            ingest.run(dataset(tmp_path, places(tmp_path) / name, "sidecar"))
    with pytest.raises(Halt, match=r"images .* is a file"):
        ingest.run(dataset(tmp_path, places(tmp_path), "sidecar", images=str(tmp_path / "in" / "a.png")))


@pytest.mark.parametrize("adapter", ["sidecar", "danbooru", "sd_scripts", "webdataset"])
def test_a_pipe_or_a_device_is_no_place(tmp_path: Path, adapter: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(Halt, match=r"sources s: path .* is a device or a pipe") as stopped:
            ingest.run(dataset(tmp_path, path, adapter))
        assert stopped.value.code == ExitCode.USAGE


def test_a_source_that_gives_nothing_is_told_though_others_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    settings = dataset(tmp_path, places(tmp_path))
    other = dataclasses.replace(settings.sources[0], name="other", path=str(tmp_path / "empty"))
    ingest.run(dataclasses.replace(settings, sources=[*settings.sources, other]))
    said = capsys.readouterr().out
    assert "sources other: no record is taken" in said and "sources s: no record" not in said


def test_one_picture_means_that_one_and_its_caption_is_watched(tmp_path: Path) -> None:
    settings = dataset(tmp_path, places(tmp_path) / "a.png")
    assert set(taken(settings)[0]) == {"a.png"}
    (tmp_path / "in" / "a.txt").write_text("1boy")
    assert taken(settings)[0]["a.png"]["caption"] == "1boy"


def test_one_metadata_file_or_one_tar_of_several_means_that_one(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("a.png", "sub/b.png"):
        picture(folder / name)
        rows = json.dumps({"file_name": Path(name).name, "text": "x"})
        (folder / name).with_name("metadata.jsonl").write_text(rows)
        with tarfile.open((folder / name).with_suffix(".tar"), "w") as archive:
            archive.add(folder / name, Path(name).name)
            archive.add((folder / name).with_suffix(".txt"), Path(name).with_suffix(".txt").name)
    assert set(taken(dataset(tmp_path, folder / "metadata.jsonl", "imagefolder"))[0]) == {"a.png"}
    assert set(taken(dataset(tmp_path, folder, "imagefolder"))[0]) == {"a.png", "sub/b.png"}
    assert set(taken(dataset(tmp_path, folder / "a.tar", "webdataset"))[0]) == {"a.tar/a.png"}
    pq.write_table(pa.table({"file_name": ["sub/b.png"], "text": ["x"]}), folder / "list.parquet")
    assert set(taken(dataset(tmp_path, folder / "list.parquet", "imagefolder"))[0]) == {"sub/b.png"}
    for number in range(2):
        image = [{"bytes": (folder / "a.png").read_bytes(), "path": None}]
        pq.write_table(pa.table({"image": image, "text": [f"{number}"]}), folder / f"train-{number}.parquet")
    assert set(taken(dataset(tmp_path, folder / "train-1.parquet", "imagefolder"))[0]) == {"train-1.parquet#0"}


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(Halt, match=r"no record.*adapter sidecar at") as stopped:
        ingest.run(dataset(tmp_path, tmp_path / "in"))
    assert stopped.value.code == ExitCode.MISMATCH


def test_links_and_pipes_in_walks_of_other_adapters(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").symlink_to("/dev/null")
    source = SourceConfig("s", "danbooru", str(tmp_path / "in"), follow_links=True)
    (found,) = walk(source, tmp_path / "in")
    assert isinstance(found, Quarantine)
    assert "not a regular file" in found.message


@pytest.mark.parametrize("adapter", ["danbooru", "sd_scripts", "webdataset", "deepghs"])
def test_captioned_pictures_under_another_adapter_are_told_which_one_reads_them(tmp_path: Path, adapter: str) -> None:
    """The shipped dataset.yaml with nothing but its path changed: `no record` alone would not say why."""
    for name, caption in (("a.png", "1girl"), ("sub/b.png", "1boy"), ("c.png", None)):
        picture(tmp_path / "in" / name, caption)
    with pytest.raises(Halt, match="where 3 pictures lie, 2 of them with a text beside them: adapter sidecar reads those") as halt:
        ingest.run(dataset(tmp_path, tmp_path / "in", adapter))
    assert halt.value.code == ExitCode.MISMATCH


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "out").write_text("a file in the place of the folder")
    with pytest.raises(Halt, match=r"root .*out: .* cannot be made") as halt:
        ingest.run(dataset(tmp_path, tmp_path / "in"))
    assert halt.value.code == ExitCode.CANNOT_WRITE
