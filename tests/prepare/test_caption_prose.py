"""Sentences, tails and several captions of one picture, from the files to the labels; every gate reads each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ingests import config, run, write_picture

from train.config.dataset import SourceConfig
from train.prepare.posts.caption_remarks import CaptionTally, remarks
from train.prepare.posts.caption_text import caption_rules
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.tables.schemas import Quarantine
from train.prepare.tables.units import read_table
from train.prepare.tagging.matching import caption_lists
from train.recipe.captions import read_stored

TOLD = "A girl is standing on the beach, smiling."


def record(text: str | list[str], **options: Any) -> dict[str, Any]:
    of = SourceConfig("s", "sidecar", "x", assume_rating="g", **options)
    row = to_record(RawPost(id="1", place="p", uri="1.png", caption=text), of, caption_rules(of, "|||"))
    assert not isinstance(row, Quarantine), row.message
    return row


def read(text: str | list[str], **options: Any) -> Any:
    return read_stored(record(text, **options)["caption"])


def test_sentences_are_kept_whole_beside_tags() -> None:
    assert read(f"1girl, solo\n{TOLD}") == ([([], ["1girl", "solo"], [])], [TOLD])
    assert read(f"1girl ||| solo, hat, {TOLD}") == ([(["1girl"], ["solo", "hat"], [])], [TOLD])
    assert read(f"{TOLD}\nThe sky is blue, and it is calm.") == ([([], [], [])], [f"{TOLD} The sky is blue, and it is calm."])
    assert read(TOLD, prose="none") == ([([], ["A girl is standing on the beach", "smiling."], [])], [])
    assert read("1girl, smile", prose="all") == ([([], [], [])], ["1girl, smile"])


def test_what_follows_a_second_separator_is_the_tail() -> None:
    caption = "1girl ||| smile, hat ||| masterpiece, best"
    assert read(caption, on_second_separator="tail") == ([(["1girl"], ["smile", "hat"], ["masterpiece", "best"])], [])
    told = read(f"{caption}\n{TOLD}", on_second_separator="tail")
    assert told == ([(["1girl"], ["smile", "hat"], ["masterpiece", "best"])], [TOLD])


def test_every_line_is_a_caption_of_its_own_where_it_is_said() -> None:
    assert read(f"1girl, hat\n2girls ||| solo\n{TOLD}\n{TOLD[:-1]} too.", caption_lines="variants") == (
        [([], ["1girl", "hat"], []), (["2girls"], ["solo"], [])], [TOLD, f"{TOLD[:-1]} too."],
    )  # fmt: skip
    assert read(["a, b", "c"], caption_lines="variants") == ([([], ["a", "b"], []), ([], ["c"], [])], [])


@pytest.mark.parametrize("text", ["kid ||| hat ||| x", "x ||| kid ||| x", "x ||| hat ||| kid", "x\nA kid is here, smiling at the sea."])
@pytest.mark.parametrize("options", [{}, {"caption_lines": "variants"}, {"caption_lines": "first"}, {"prose": "all"}])
def test_the_first_gate_sees_every_part(text: str, options: dict[str, Any]) -> None:
    assert record(f"{text}, nsfw", on_second_separator="tail", **options)["hard_exclusion"] == "R2"


def test_what_is_prose_is_said_once() -> None:
    of, tally = SourceConfig("s", "sidecar", "x"), CaptionTally()
    for text in ("1girl, hat", f"1girl, {TOLD}", TOLD):
        to_record(RawPost(id="1", place="p", uri="1.png", caption=text), of, caption_rules(of, "|||"), tally)
    (line,) = remarks(tally, of, "|||")
    assert "2 of 3 captions hold sentences (1 of them beside tags on one line), 2 texts in all" in line


def test_labels_hold_all_parts_and_a_filter_finds_them(tmp_path: Path) -> None:
    from train.config.dataset import dataset_dir
    from train.prepare import label

    write_picture(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "1.txt").write_text(f"1girl ||| long_hair ||| best\nhat\n{TOLD}")
    settings = config(tmp_path, tmp_path / "in", "sidecar", assume_rating="g", on_second_separator="tail", caption_lines="variants")
    run(settings)
    label.run(settings)
    (row,) = read_table(dataset_dir(settings), "labels").to_pylist()
    assert (row["fixed_tags"], row["flex_tags"], row["tail_tags"], row["prose"]) == (["1girl"], ["long hair"], ["best"], [TOLD])
    assert row["tag_variants"] == ["\nhat\n"]
    (words,) = caption_lists(read_table(dataset_dir(settings), "records")["caption"].combine_chunks()).to_pylist()
    assert {"1girl", "long_hair", "best", "hat"} <= {word.strip() for word in words}
