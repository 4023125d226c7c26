"""Posts that carry categories of their own use them, in whichever form a site or its downloader wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config.dataset import SourceConfig
from train.prepare.ingest import read_source
from train.prepare.posts import census
from train.prepare.posts.normalise import RawPost
from train.prepare.posts.tag_groups import tag_groups
from train.prepare.tables.schemas import Quarantine

BY_GROUP = {
    "general": ["1girl", "long_hair"], "artist": ["someone"], "character": ["hero_(title)"], "copyright": ["title"],
    "meta": ["highres", "absurdres"],
}  # fmt: skip
WORDS = {"general": "general", "artist": "artist", "character": "character", "copyright": "copyright", "meta": "metadata"}
NUMBERS = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5}
FLAT = " ".join(tag for tags in BY_GROUP.values() for tag in sorted(tags))
ENTRIES = [{"tag": tag, "type": WORDS[group], "count": 3} for group, tags in BY_GROUP.items() for tag in tags]
FORMS: dict[str, dict[str, Any]] = {
    "gallery-dl texts": {"tags": FLAT, **{f"tags_{WORDS[group]}": " ".join(tags) for group, tags in BY_GROUP.items()}},
    "gallery-dl lists": {"tags": FLAT.split(), **{f"tags_{WORDS[group]}": tags for group, tags in BY_GROUP.items()}},
    "only the categories": {f"tags_{WORDS[group]}": " ".join(tags) for group, tags in BY_GROUP.items()},
    "tag_info": {"tags": FLAT, "tag_info": ENTRIES},
    "objects by word": {"tags": ENTRIES},
    "objects by number": {"tags": [{"name": t, "category": NUMBERS[g]} for g, tags in BY_GROUP.items() for t in tags]},
    "objects by number as text": {"tags": [{"name": t, "type": str(NUMBERS[g])} for g, tags in BY_GROUP.items() for t in tags]},
    "tag strings": {"tag_string": FLAT, **{f"tag_string_{group}": " ".join(tags) for group, tags in BY_GROUP.items()}},
    "both forms of one": {"tags_meta": ["highres"], "tags_metadata": ["absurdres", "highres"], "tag_string_meta": "highres",
                          **{f"tags_{g}": tags for g, tags in BY_GROUP.items() if g != "meta"}},
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["danbooru", "gelbooru"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_categories(tmp_path: Path, adapter: str, form: str) -> None:
    (tmp_path / "posts.json").write_text(json.dumps([{"id": 1, "rating": "general"} | FORMS[form]]))
    (post,) = read_source(SourceConfig("s", adapter, str(tmp_path / "posts.json")))  # type: ignore[arg-type]
    assert isinstance(post, RawPost), post
    assert dict(post.tags) == BY_GROUP


def test_flat_tags_without_a_category_have_the_dictionarys(tmp_path: Path) -> None:
    post = {"tags": "someone someone_else 1girl k-on&#039;s", "tags_artist": "someone", "tags_copyright": "k-on&#039;s"}
    (tmp_path / "posts.json").write_text(json.dumps([{"id": 1} | post]))
    (tmp_path / "tags.csv").write_text("someone_else,1,5,\n")
    source = SourceConfig("s", "gelbooru", str(tmp_path / "posts.json"), dictionary=str(tmp_path / "tags.csv"))
    (found,) = read_source(source)
    assert isinstance(found, RawPost)
    assert dict(found.tags) == {"artist": ["someone", "someone_else"], "copyright": ["k-on's"], "general": ["1girl"]}


def test_moebooru_circles_are_artists_and_an_unknown_category_is_counted() -> None:
    with census.Census(SourceConfig("s", "gelbooru", "x")).open() as counted:
        groups = tag_groups({"tags_circle": "a_circle", "tags_faults": "scan", "tags_mood": "calm", "tags_count": 3})
    assert groups == {"artist": ["a_circle"], "meta": ["scan"], "general": ["calm"]}
    assert [line for line in counted.lines() if "tags_mood" in line]


def test_a_category_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "posts.json").write_text(json.dumps([{"id": 1, "tags": [{"tag": "x", "type": "colour"}]}, {"id": 2, "tags": 7}]))
    one, two = read_source(SourceConfig("s", "gelbooru", str(tmp_path / "posts.json")))
    assert isinstance(one, Quarantine)
    assert isinstance(two, Quarantine)
    assert "'colour'" in one.message
    assert "tags are 7" in two.message
