"""What lies in a source's folder beside sound pictures: every one is met, none stops the walk."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

from train.config.dataset import ProbeConfig, SourceConfig
from train.prepare.folders.walking import walk
from train.prepare.images.decode import Refused
from train.prepare.images.looks import Look, probe_one
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost
from train.prepare.tables.schemas import Quarantine


def source(path: Path) -> SourceConfig:
    return SourceConfig(name="s", adapter="sidecar", path=str(path))


def test_a_link_to_itself_is_reported_and_the_walk_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "b.png").symlink_to("c.png")
    (tmp_path / "c.png").symlink_to("b.png")
    (tmp_path / "d.png").write_bytes(b"x")
    found = list(walk(source(tmp_path), tmp_path))
    assert found[3] == "d.png"
    assert [entry.key for entry in found[:3] if isinstance(entry, Quarantine)] == ["s:a.png", "s:b.png", "s:c.png"]


def test_pictures_of_other_kinds_are_opened_and_refused_by_reason(tmp_path: Path) -> None:
    contents = {
        "a.psd": b"8BPS\0\1", "b.ico": b"\0\0\1\0", "c.SVG": b"<svg/>", "d.heic": b"\0\0\0\x18ftypheic", "e.tga": b"\0\0\2",
        "f.jp2": b"\0\0\0\x0cjP  ", "g.ppm": b"P6 1 1 255 ",
    }  # fmt: skip
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name[:1]).with_suffix(".txt").write_text("1girl")
    reasons = {}
    for post in read_source(source(tmp_path)):
        assert isinstance(post, RawPost)
        result = probe_one(Look(source(tmp_path), ProbeConfig(), post.uri, None))
        assert isinstance(result, Refused)
        reasons[post.uri] = result.reason
    other, strange = "unsupported_format", "unidentified"
    assert reasons == dict(zip(contents, [other, other, strange, other, strange, other, strange], strict=True))


def test_pictures_without_captions_are_taken_where_the_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("1girl")
    refused, taken = read_source(source(tmp_path))
    assert isinstance(refused, Quarantine)
    assert (refused.reason, "on_missing_caption" in refused.message) == ("missing_caption", True)
    assert isinstance(taken, RawPost)
    posts = list(read_source(dataclasses.replace(source(tmp_path), on_missing_caption="take")))
    assert [(post.uri, post.caption) for post in posts if isinstance(post, RawPost)] == [("a.png", None), ("b.png", "1girl")]


def test_tar_members_without_captions_are_taken_where_the_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    config = SourceConfig(name="s", adapter="webdataset", path=str(tmp_path / "0.tar"))
    assert [found.reason for found in read_source(config) if isinstance(found, Quarantine)] == ["missing_caption"]
    (post,) = read_source(dataclasses.replace(config, on_missing_caption="take"))
    assert isinstance(post, RawPost)
    assert (post.member, post.caption) == ("a.png", None)
