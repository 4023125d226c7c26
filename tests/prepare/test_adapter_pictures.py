"""Which picture belongs to a post: never the one that only shares the name of the file with all posts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts.normalise import RawPost


def pictures(path: Path, adapter: str) -> dict[str, str]:
    posts = read_source(SourceConfig(name="s", adapter=adapter, path=str(path)))  # type: ignore[arg-type]
    return {post.id: post.uri for post in posts if isinstance(post, RawPost)}


def post(adapter: str, number: int) -> dict[str, Any]:
    if adapter == "e621":
        return {"id": number, "tags": {"general": ["x"]}, "file": {"ext": "jpg"}}
    return {"id": number, "tags": "x", "file_ext": "jpg"}


@pytest.mark.parametrize("adapter", ["danbooru", "gelbooru", "e621"])
@pytest.mark.parametrize("form", ["array", "lines", "page"])
def test_a_page_and_a_picture_of_the_same_name(tmp_path: Path, adapter: str, form: str) -> None:
    for number in (1, 2):  # the third has no picture
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    posts = [post(adapter, number) for number in (1, 2, 3)]
    texts = {"array": json.dumps(posts), "lines": "\n".join(map(json.dumps, posts)), "page": json.dumps({"posts": posts})}
    (tmp_path / "1.json").write_text(texts[form])
    assert pictures(tmp_path, adapter) == {"1": "1.jpg", "2": "2.jpg", "3": "3.jpg"}


def test_a_post_alone_in_its_file_has_the_picture_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sub.d").mkdir()
    for name in ("some name.png", "sub.d/other.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "some name.json").write_text(json.dumps(post("danbooru", 7)))
    (tmp_path / "sub.d" / "other.png.json").write_text(json.dumps([post("danbooru", 8)]))
    assert pictures(tmp_path, "danbooru") == {"7": "some name.png", "8": "sub.d/other.png"}
