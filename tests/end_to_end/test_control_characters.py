"""Control characters and floods of tags: refused at ingest, or stripped where the source says so."""

from __future__ import annotations

from typing import Any

import pytest

from train.config.dataset import SourceConfig
from train.prepare.posts.normalise import MAX_TAGS, RawPost, to_record
from train.prepare.tables.schemas import Quarantine


def record(on_bad_tag: Any = "error", **post: Any) -> dict[str, Any] | str:
    """The record, or the reason why it is refused."""
    source = SourceConfig(name="s", adapter="danbooru", path=".", on_bad_tag=on_bad_tag, assume_rating="g")
    row = to_record(RawPost(id="1", place="p", uri="1.png", **post), source)
    return row.reason if isinstance(row, Quarantine) else row


@pytest.mark.parametrize("mark", ["\0", "\a", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"])
def test_control_characters(mark: str) -> None:
    assert record(tags={"general": [f"a{mark}b"]}) == "bad_record"
    assert record(caption=f"1girl, a{mark}b ||| solo") == "bad_caption"
    stripped = record("drop", tags={"general": [f"a{mark}b", "c"]}, caption=f"1girl, a{mark}b")
    assert isinstance(stripped, dict)
    assert stripped["tags_general"] == ["c"]
    assert stripped["caption"] == "1girl, ab"


def test_white_space_that_breaks_no_line_stays() -> None:
    mark = "\t\u3000\u00a0"
    row = record(caption=f"1girl,{mark} solo")
    assert isinstance(row, dict)
    assert row["caption"] == f"1girl,{mark} solo"


def test_a_flood_of_tags() -> None:
    tags = [f"tag_{number}" for number in range(MAX_TAGS)]
    assert isinstance(record(tags={"general": tags}, caption=", ".join(tags[:3000])), dict)
    assert record(tags={"general": [*tags, "one_more"]}) == "bad_record"
    assert record(caption="a," * MAX_TAGS) == "bad_caption"
