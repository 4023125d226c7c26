"""Captions as people write them: several lines, another separator, other signs between tags, the first N tags fixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingests import config, run, write_picture

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig, SourceConfig, dataset_dir
from train.prepare import tag
from train.prepare.folders.unchanged import sources_mark
from train.prepare.ingest import read_source
from train.prepare.posts import normalise
from train.prepare.posts.caption_remarks import CaptionTally, likely_separator, remarks
from train.prepare.posts.caption_text import caption_rules
from train.prepare.posts.normalise import RawPost, to_record
from train.prepare.tables.schemas import Quarantine
from train.recipe.captions import split


def source(path: str | Path = "x", adapter: str = "sidecar", **options: Any) -> SourceConfig:
    return SourceConfig("s", adapter, str(path), assume_rating="g", **options)  # type: ignore[arg-type]


def read(text: str | list[str], separator: str = "|||", **options: Any) -> tuple[list[str], list[str]] | str:
    """(fixed, flex) as every later step splits the stored caption, or why there is none."""
    of = source(**options)
    row = to_record(RawPost(id="1", place="p", uri="1.png", caption=text), of, caption_rules(of, separator))
    return row.message if isinstance(row, Quarantine) else split(row["caption"])


@pytest.mark.parametrize(
    ("text", "fixed", "flex"),
    [
        ("1girl\nsolo\nlong_hair\n", [], ["1girl", "solo", "long_hair"]),
        ("1girl, solo,\nlong hair,\r\nblue sky,\r\n", [], ["1girl", "solo", "long hair", "blue sky"]),
        ("\n\n 1girl, solo\n", [], ["1girl", "solo"]),
        ("1girl\r\rsolo", [], ["1girl", "solo"]),
        ("\ufeff1girl,\n,\n \nsolo", [], ["1girl", "solo"]),
        ("1girl, miku\n||| smile\nhat", ["1girl", "miku"], ["smile", "hat"]),
        ("1girl\n|||\nsmile", ["1girl"], ["smile"]),
        ("1girl,\nmiku |||", ["1girl", "miku"], []),
        ("||| smile\nhat", [], ["smile", "hat"]),
    ],
)
def test_lines_are_joined(text: str, fixed: list[str], flex: list[str]) -> None:
    assert read(text) == (fixed, flex)


def test_the_first_line_alone_where_it_is_set() -> None:
    assert read("\n1girl ||| solo\nlong hair", caption_lines="first") == (["1girl"], ["solo"])
    # sd-scripts' metadata: the caption's first line and all of the tags
    assert read(["a girl\nwho smiles", "1girl, hat"], caption_lines="first") == ([], ["a girl", "1girl", "hat"])
    assert read(["a girl\nwho smiles", "1girl, hat"]) == ([], ["a girl", "who smiles", "1girl", "hat"])


@pytest.mark.parametrize("options", [{}, {"caption_lines": "first"}, {"tag_separator": " "}, {"on_bad_tag": "drop", "tag_separator": ";"}])
def test_the_hard_exclusions_see_all_of_the_text(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(normalise, "excluded_by", lambda **found: seen.append(found["caption"]))
    read("one, two\nthree; four, five ||| six", **options)
    assert all(word in seen[0] for word in ("one", "two", "three", "four", "five", "six"))
    monkeypatch.undo()
    # what is taken out joins two words, and what was one word may have been two
    for hidden in ("1girl\x00nsfw\x00kid", "1girl, ns\x00fw, k\x00id", "1girl, nsfw, 'kid'", "1girl\x85nsfw\x85kid"):
        row = to_record(RawPost(id="1", place="p", uri="1.png", caption=hidden), source(**{"on_bad_tag": "drop", **options}))
        assert isinstance(row, dict) and row["hard_exclusion"] == "R2", hidden
    row = to_record(RawPost(id="1", place="p", uri="1.png", caption="1girl\nnsfw\nkid"), source(caption_lines="first"))
    assert isinstance(row, dict)
    assert (row["caption"], row["hard_exclusion"]) == ("1girl", "R2")


def test_what_was_joined_or_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(["a, b\nc", "a\nb\nc", "a, b", "\na, b\n"]):
        write_picture(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    run(config(tmp_path, tmp_path / "in", "sidecar"))
    line = 'ingest: sources s: 2 captions have several lines, which are joined with ", " (caption_lines: join)'
    assert line in capsys.readouterr().out
    first = config(tmp_path, tmp_path / "in", "sidecar", caption_lines="first")
    run(first)
    line = "ingest: sources s: 2 captions go on beyond line 1, which caption_lines: first does not read"
    assert line in capsys.readouterr().out
    run(first)
    assert line in capsys.readouterr().out, "a run with nothing to do says it again"
    assert json.loads((dataset_dir(first) / "dataset.json").read_text())["remarks"] == [line.removeprefix("ingest: ")]


@pytest.mark.parametrize("mark", ["###", "@@@", "|", "||||", "BREAK", "sep", "(*)", "::"])
def test_another_separator_gives_the_same_captions(mark: str) -> None:
    for text in ("1girl, miku ||| smile, hat", "1girl,|||,smile", "||| smile", "1girl, miku |||", "1girl\n||| smile\nhat", "1girl, a|b"):
        if mark != "|" or "a|b" not in text:
            assert read(text.replace("|||", mark), mark) == read(text), text
    for choice in ("fork", "suffix"):
        text = "a, b ||| c ||| d"
        assert read(text.replace("|||", mark), mark, on_second_separator=choice) == read(text, on_second_separator=choice)
    assert f"2 separators {mark}" in read(f"a {mark} b {mark} c", mark)
    assert f"2 separators {mark}" in read(f"a {mark} b\nc {mark} d", mark)


def test_a_separator_that_is_a_word_parts_only_as_one() -> None:
    assert read("separate, sepia sep smile, september", "sep") == (["separate", "sepia"], ["smile", "september"])


def test_our_own_separator_under_another_one_is_never_read_as_one() -> None:
    text = "1girl ### a|||b, hat"
    assert "a|||b" in read(text, "###")
    assert read(text, "###", on_bad_tag="drop") == (["1girl"], ["hat"])
    assert read(text, "###", on_bad_tag="replace") == (["1girl"], ["a_b", "hat"])
    assert "holds |||" in read("1girl ||| smile", "||")
    assert read("1girl ||| smile") == (["1girl"], ["smile"])


def test_a_tag_with_either_separator_is_a_bad_tag() -> None:
    for text in ("a###b", "a|||b"):
        of = source()
        row = to_record(RawPost(id="1", place="p", uri="1.png", tags={"general": [text]}), of, caption_rules(of, "###"))
        assert isinstance(row, Quarantine)
        assert "on_bad_tag" in row.message
        assert tag.bad_in_tag("###").search(text)
    fine = to_record(RawPost(id="1", place="p", uri="1.png", tags={"general": ["a###b"]}), source())
    assert isinstance(fine, dict)


def test_another_separator_reads_the_sources_again(tmp_path: Path) -> None:
    write_picture(tmp_path / "in" / "1.png")
    (tmp_path / "in" / "1.txt").write_text("1girl ### smile")
    plain = config(tmp_path, tmp_path / "in", "sidecar", assume_rating="g")
    assert run(plain)[0]["s:1.png"]["caption"] == "1girl ### smile"
    other = dataclasses.replace(plain, separator="###")
    assert run(other)[0]["s:1.png"]["caption"] == "1girl ||| smile"
    assert json.loads((dataset_dir(other) / "dataset.json").read_text())["separator"] == "###"
    assert sources_mark(plain.sources, "") == sources_mark(other.sources, "")


@pytest.mark.parametrize("number", [0, 1, 2, 3, 9])
def test_keep_tokens_fixes_the_first_tags_where_no_separator_does(number: int) -> None:
    tags = ["miku", "1girl", "smile"]
    assert read(", ".join(tags), keep_tokens=number) == (tags[:number], tags[number:])
    assert read("\n".join(tags), keep_tokens=number) == (tags[:number], tags[number:])
    assert read("a ||| b, c", keep_tokens=number) == (["a"], ["b", "c"])
    assert read("|||b, c", keep_tokens=number) == ([], ["b", "c"])
    assert read("", keep_tokens=number) == ([], [])


@pytest.mark.parametrize(
    ("mark", "text", "tags"),
    [
        (" ", "1girl long_hair ^_^ hatsune_miku_(cosplay)", ["1girl", "long_hair", "^_^", "hatsune_miku_(cosplay)"]),
        (" ", "1girl  long_hair\nsmile", ["1girl", "long_hair", "smile"]),
        (" ", "1girl, long_hair,smile", ["1girl", "long_hair", "smile"]),
        ("; ", "1girl; long hair;blue eyes;", ["1girl", "long hair", "blue eyes"]),
        (";", "1girl; long hair\nblue eyes", ["1girl", "long hair", "blue eyes"]),
        ("|", "1girl|long hair | blue eyes", ["1girl", "long hair", "blue eyes"]),
        ("\t", "1girl\tlong hair\t\tblue eyes", ["1girl", "long hair", "blue eyes"]),
        ("，", "1girl，long hair，blue eyes", ["1girl", "long hair", "blue eyes"]),
        ("，", "1girl，long hair, blue eyes", ["1girl", "long hair", "blue eyes"]),
        ("、", "1girl、long hair", ["1girl", "long hair"]),
        (", ", "1girl,long hair, smile", ["1girl", "long hair", "smile"]),
        (" and ", "one and a hand and two", ["one", "a hand", "two"]),
        ("\n", "1girl\nlong hair", ["1girl", "long hair"]),
    ],
)
def test_tags_are_parted_where_tag_separator_says(mark: str, text: str, tags: list[str]) -> None:
    assert read(text, tag_separator=mark) == ([], tags)
    assert read(f"{text} ||| {text}", tag_separator=mark) == (tags, tags)
    assert read(text, tag_separator=mark, keep_tokens=1) == (tags[:1], tags[1:])


def test_a_comma_inside_a_tag_is_a_bad_tag() -> None:
    assert "'hat, red' holds a comma" in read("1girl; hat, red", tag_separator=";")
    assert read("1girl; hat, red", tag_separator=";", on_bad_tag="drop") == ([], ["1girl"])
    assert read("1girl; hat, red", tag_separator=";", on_bad_tag="replace") == ([], ["1girl", "hat_ red"])


def test_tag_separator_belongs_to_the_columns_of_tags_where_there_are_any(tmp_path: Path) -> None:
    rows = {"uri": ["1.png"], "tags": ["long_hair smile"], "text": ["1girl, long hair"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    both = source(tmp_path / "a.parquet", "table", columns={"uri": "uri", "tags": "tags", "caption": "text"}, tag_separator=" ")
    (post,) = read_source(both)
    assert isinstance(post, RawPost)
    row = to_record(post, both)
    assert isinstance(row, dict)
    assert (row["tags_general"], split(row["caption"])) == (["long_hair", "smile"], ([], ["1girl", "long hair"]))


@pytest.mark.parametrize(
    ("text", "likely"),
    [
        ("1girl long_hair", " "), ("1girl solo smile", " "), ("1girl; hat", ";"), ("1girl|hat", "|"), ("1girl\that", "\t"),
        ("1girl，hat", "，"), ("a photo of a cat", None), ("1girl", None), ("red hair", None), ("", None),
    ],
)  # fmt: skip
def test_what_might_part_the_tags(text: str, likely: str | None) -> None:
    assert likely_separator(text) == likely


def said(texts: list[str], separator: str = "|||", **options: Any) -> list[str]:
    of, tally = source(**options), CaptionTally()
    for text in texts:
        to_record(RawPost(id="1", place="p", uri="1.png", caption=text), of, caption_rules(of, separator), tally)
    return list(remarks(tally, of, separator))


def test_captions_that_look_like_one_tag_are_pointed_out() -> None:
    (line,) = said(["1girl long_hair", "2girls blue_hair"] * 10)
    assert "20 of 20" in line
    assert "tag_separator: ' '" in line
    assert said(["1girl long_hair"] * 20, tag_separator=" ") == []
    assert "tag_separator: ';'" in said(["1girl; long hair"], tag_separator="|")[0]
    assert "tag_separator: ';'" in said(["1girl; hat ||| smile; solo"])[0]
    assert said(["1girl, long hair", "2girls, hat", "1girl"]) == []
    assert said(["1girl, hatsune_miku ||| smile", "1girl ||| hat_ribbon, smile"]) == []
    (line,) = said(["a girl who stands in the rain"] * 20)
    assert "20 of 20 captions hold sentences" in line
    assert said(["1girl long_hair"] * 8 + ["1girl, hat"] * 2) == []


def test_a_separator_nobody_uses_or_nobody_set_is_pointed_out() -> None:
    assert said(["1girl, hat", "2girls"], "###") == ["none of 2 captions holds the separator '###'"]
    (line,) = said(["1girl ### smile, hat", "2girls, ### solo, hat"])
    assert "separator: '###'" in line
    assert said(["1girl ### smile, hat", "2girls, ### solo, hat"], "###") == []
    assert said(["1girl, :), c++, !!, ...", "2girls, hat"]) == []


def test_a_key_that_changes_nothing_is_said() -> None:
    assert "keep_tokens changes nothing" in said(["a ||| b"], keep_tokens=1)[0]
    assert "no caption was found" in said([], keep_tokens=1, caption_lines="first")[0]
    assert said(["a, b"], keep_tokens=1) == []


@pytest.mark.slow
def test_other_separators_train_as_ours(tmp_path: Path) -> None:
    """Equal index, captions and fingerprint of two sets whose captions differ in the mark alone."""
    from oddimages import drawn, encoded
    from preparedset import prepare, settings_of, write_vae

    from train.data.index import Index

    write_vae(tmp_path / "vae")
    captions = ["1girl, miku ||| smile, red hair", "||| solo, hat", "1boy\n||| smile\nblue sky", "2girls"]
    (tmp_path / "dataset.yaml").write_text(
        f"sources:\n  - {{name: s, adapter: sidecar, assume_rating: g, path: {tmp_path / 'pictures'}}}\n"
        "select: {pretrain: {min_bucket: 1}}\nreport: {pictures: none}\n"
    )
    found = []
    for mark in ("|||", "###"):
        for number, caption in enumerate(captions):
            path = tmp_path / "pictures" / f"{number}.png"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(encoded(drawn(96, 128, seed=number), "PNG"))
            path.with_suffix(".txt").write_text(caption.replace("|||", mark))
        settings = settings_of(tmp_path, separator=json.dumps(mark), root=str(tmp_path / f"out{len(found)}"))
        prepare(settings, "ingest", "probe", "score", "tag", "dedupe", "label", "select", "latents")
        assert json.loads((dataset_dir(settings) / "dataset.json").read_text())["separator"] == mark
        index = Index.open(dataset_dir(settings), "pretrain")
        found.append((index.fingerprint, [(index.key(i), index.caption(i)) for i in range(len(index))]))
    assert found[0] == found[1]
    assert found[0][1][0] == ("s:0.png", (["1girl", "miku"], ["smile", "red hair"]))


def test_the_stage_names_the_separator_of_its_set_or_none(tmp_path: Path) -> None:
    from train.data.selection import refuse_other_separator

    for recorded, fine in (({}, "|||"), ({"separator": "###"}, "###")):
        (tmp_path / "dataset.json").write_text(json.dumps(recorded))
        for name in (None, fine):
            refuse_other_separator(str(tmp_path), name)
        other = {"|||": "###", "###": "|||"}[fine]
        with pytest.raises(Halt) as stopped:
            refuse_other_separator(str(tmp_path), other)
        assert stopped.value.code == ExitCode.MISMATCH
        assert all(word in stopped.value.message for word in (repr(fine), repr(other), "data.separator=null"))


def test_dataset_config_has_the_separator() -> None:
    assert DatasetConfig().separator == "|||"


@pytest.mark.parametrize(
    ("texts", "options", "told"),
    [
        (["A girl with long hair, smiling, stands in the rain."], {}, "1 of 1 captions hold sentences"),
        (["1girl, solo\nA girl stands in the rain. She holds an umbrella.", "1girl"], {}, "1 of 2 captions hold sentences"),
        (["1girl, ||| The hat of the girl is red!"], {}, "1 of 1 captions hold sentences"),
        (["1girl, dr. stone, solo.", "girl in the rain, hand on own hip"], {}, None),
        ([r"ganyu \(genshin impact\), 1girl"], {}, "1 captions hold backslashes before brackets"),
        ([r"ganyu \(genshin impact\), 1girl"], {"escaped": True}, None),
    ],
)
def test_sentences_and_escaped_brackets_are_pointed_out(texts: list[str], options: dict[str, Any], told: str | None) -> None:
    of, tally = source(**options), CaptionTally()
    for text in texts:
        to_record(RawPost(id="1", place="p", uri="1.png", caption=text), of, caption_rules(of), tally)
    said = [line for line in remarks(tally, of, "|||") if "sentences" in line or "backslashes" in line]
    assert [told] == [line[: len(told)] for line in said] if told else said == []
