"""What belongs to which picture in a tar: by name, in any order, and never to two."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.census import Census
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import Quarantine

Members = list[tuple[str, bytes]]
PNG = b"\x89PNG"


def tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read(tmp_path: Path, members: Members, **options: Any) -> tuple[dict[str, str | None], dict[str, Quarantine]]:
    """(caption by picture, what was refused by name) of one tar."""
    tar(tmp_path / "0.tar", members)
    found = list(read_source(SourceConfig("s", "webdataset", str(tmp_path / "0.tar"), **options)))
    taken = {str(one.member): one.caption for one in found if isinstance(one, RawPost)}
    return taken, {one.key.removeprefix("s:0.tar/"): one for one in found if isinstance(one, Quarantine)}


def pairs(**texts: str) -> Members:
    return [member for name, text in texts.items() for member in ((f"{name}.png", PNG), (f"{name}.txt", text.encode()))]


def test_names_with_dots_keep_their_own_captions(tmp_path: Path) -> None:
    members = pairs(**{"x.v1": "red", "x.v2": "blue", "22.05": "sky", "22.06": "sea", "d.1/0.a": "one", "d.1/0.b": "two"})
    taken, refused = read(tmp_path, members)
    assert taken == {"x.v1.png": "red", "x.v2.png": "blue", "22.05.png": "sky", "22.06.png": "sea", "d.1/0.a.png": "one", "d.1/0.b.png": "two"}
    assert not refused


def test_the_order_inside_a_tar_does_not_matter(tmp_path: Path) -> None:
    members = pairs(**{"a": "1", "b": "2", "x.v1": "3", "x.v2": "4", "d/a": "5", "only.left": "6"})
    members = [(name.replace("only.left.txt", "only.txt"), data) for name, data in members]
    expected, _ = read(tmp_path, members)
    assert set(expected.values()) == set("123456")
    for seed in range(8):
        random.Random(seed).shuffle(members)
        assert read(tmp_path, members) == (expected, {})


def test_posts_are_never_shared(tmp_path: Path) -> None:
    def post(number: int) -> bytes:
        return json.dumps({"id": number, "tag_string_general": f"tag_{number}", "rating": "g"}).encode()

    members = [(f"p.{n}.{ext}", data) for n in (1, 2) for ext, data in (("png", PNG), ("json", post(n)))]
    tar(tmp_path / "0.tar", members)
    found = list(read_source(SourceConfig("s", "webdataset", str(tmp_path / "0.tar"))))
    assert {one.member: one.id for one in found if isinstance(one, RawPost)} == {"p.1.png": "1", "p.2.png": "2"}
    taken, refused = read(tmp_path, [("q.1.png", PNG), ("q.2.png", PNG), ("q.json", post(3))])
    assert not taken
    assert set(refused) == {"q.1.png", "q.2.png"}
    assert "q.json would belong to q.1.png and q.2.png" in refused["q.1.png"].message


@pytest.mark.parametrize(
    "pictures", [("pair.left.png", "pair.right.png"), ("pair.png", "pair.jpg"), ("./pair.png", "pair.png")]
)
def test_two_pictures_never_share_a_caption(tmp_path: Path, pictures: tuple[str, str]) -> None:
    for members in itertools.permutations([(pictures[0], PNG), (pictures[1], PNG), ("pair.txt", b"2boys")]):
        taken, refused = read(tmp_path, list(members))
        assert not taken
        assert {entry.reason for entry in refused.values()} == {"bad_record"}
        assert "would belong to" in refused[pictures[0]].message


def test_a_text_of_the_sample_goes_to_its_only_picture(tmp_path: Path) -> None:
    assert read(tmp_path, [("a.left.png", PNG), ("a.txt", b"hat")]) == ({"a.left.png": "hat"}, {})
    taken, refused = read(tmp_path, [*pairs(**{"x.v1": "red"}), ("x.v2.png", PNG), ("x.txt", b"which?")])
    assert taken == {"x.v1.png": "red"}
    assert "may be its text or that of the whole sample" in refused["x.v2.png"].message


def test_parts_of_a_sample_beside_its_picture_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [("a.seg.png", PNG), ("a.cls", b"5"), ("a.tags.txt", b"x"), ("._a.png", PNG), ("__MACOSX/a.png", PNG)]
    with Census(SourceConfig("s", "webdataset", str(tmp_path))).open() as census:
        taken, refused = read(tmp_path, [*pairs(a="hat"), *parts])
    assert census.counts["litter"] == 2
    assert taken == {"a.png": "hat"}
    assert not refused
    out = capsys.readouterr().out
    assert "1 pictures beside that of their sample, without a text, are passed over, such as 0.tar/a.seg.png" in out
    assert "1 texts in tars have the name of no picture" in out
    taken, _ = read(tmp_path, [*pairs(a="hat"), *parts], on_missing_caption="take")
    assert taken == {"a.png": "hat", "a.seg.png": None}


@pytest.mark.parametrize("ending", [".caption", ".caption.txt", ".cls"])
def test_a_caption_with_another_ending_is_named_and_taken_where_it_is_said(tmp_path: Path, ending: str) -> None:
    members = [("a.png", PNG), (f"a{ending}", b"hat")]
    taken, refused = read(tmp_path, members)
    assert not taken
    assert refused["a.png"].reason == "missing_caption"
    assert f"a{ending} does: set caption_ext: {ending}" in refused["a.png"].message
    assert read(tmp_path, members, caption_ext=ending.upper().lstrip(".")) == ({"a.png": "hat"}, {})


@pytest.mark.parametrize("name", ["a.png", "a.txt"])
def test_a_name_that_stands_in_the_tar_twice_is_refused(tmp_path: Path, name: str) -> None:
    taken, refused = read(tmp_path, [*pairs(a="hat", b="coat"), (name, b"other")])
    assert taken == {"b.png": "coat"}
    assert f"{name} stands in the tar more than once" in refused["a.png"].message


def test_json_that_is_no_post_is_mapped_or_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.dumps({"caption": "a hat", "url": "u", "width": 3}).encode()
    taken, refused = read(tmp_path, [("a.jpg", PNG), ("a.json", about)])
    assert not taken
    assert "columns.caption: caption. It has caption, url, width" in refused["a.jpg"].message
    _, refused = read(tmp_path, [("a.jpg", PNG), ("a.json", b'{"caption": "hat", "tags": ["hat"]}')])
    assert "is read through columns" in refused["a.jpg"].message
    assert read(tmp_path, [("a.jpg", PNG), ("a.json", about), ("a.txt", b"hat")]) == ({"a.jpg": "hat"}, {})
    assert "1 members .json are no posts" in capsys.readouterr().out
    assert read(tmp_path, [("a.jpg", PNG), ("a.json", about)], columns={"caption": "caption"}) == ({"a.jpg": "a hat"}, {})
    with pytest.raises(Halt, match=r"columns\.caption is 'captoin': no such column in any \.json.* did you mean caption\?") as stopped:
        read(tmp_path, [("a.jpg", PNG), ("a.json", about)], columns={"caption": "captoin"})
    assert stopped.value.code == ExitCode.USAGE


def test_a_sample_that_is_a_video_is_no_picture(tmp_path: Path) -> None:
    taken, refused = read(tmp_path, [*pairs(a="hat"), ("v.mp4", b"x"), ("v.txt", b"moves"), ("v.json", b"{}")])
    assert taken == {"a.png": "hat"}
    assert {name: entry.reason for name, entry in refused.items()} == {"v.mp4": "not_a_picture"}


def test_compressed_tars_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(tmp_path / "0.tar", pairs(a="hat"))
    (tmp_path / "1.tar.gz").write_bytes(b"x")
    assert len(list(read_source(SourceConfig("s", "webdataset", str(tmp_path))))) == 1
    assert "1 compressed tars are not read (unpack them to .tar), such as 1.tar.gz" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [600, 1100, 1600, 2100])
def test_a_tar_that_is_cut_off_gives_no_half_caption(tmp_path: Path, cut: int) -> None:
    tar(tmp_path / "0.tar", [("a.png", PNG), ("a.txt", b"hat" * 200)])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:cut])
    found = list(read_source(SourceConfig("s", "webdataset", str(tmp_path / "0.tar"))))
    assert [one.caption for one in found if isinstance(one, RawPost)] in ([], ["hat" * 200])
