"""Aliases of tags: one tag for all its names, wherever a record says one; and nothing that they bring back or let in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import preparedset
import pyarrow.parquet as pq
import pytest
from oddimages import drawn, encoded

from train.base.errors import ExitCode, Halt
from train.config.dataset import DatasetConfig
from train.prepare.posts import normalise
from train.prepare.tables.units import stream_table
from train.prepare.tagging.aliases import read_aliases
from train.recipe.exclusions import R1_WORDS

R1 = sorted(R1_WORDS)[0]
TEXTS = {
    "plain": "miku ||| headgear, long_hair_tag ||| grainy_picture\nA headgear lies on the table, and she looks at it.\nx ||| headgear",
    "other": "miku ||| hat",
}


def world(folder: Path, texts: dict[str, str], table: str, **options: Any) -> DatasetConfig:
    (folder / "texts").mkdir(exist_ok=True)
    for number, (name, text) in enumerate(texts.items()):
        (folder / f"texts/{name}.png").write_bytes(encoded(drawn(100, 100, seed=number), "PNG"))
        (folder / f"texts/{name}.txt").write_text(text)
    (folder / "aliases.csv").write_text(table)
    said = "".join(f", {key}: {value}" for key, value in options.items())
    (folder / "dataset.yaml").write_text(
        f"sources:\n  - {{name: t, adapter: sidecar, path: {folder / 'texts'}, on_second_separator: tail, caption_lines: variants{said}}}\n"
        f"aliases: {folder / 'aliases.csv'}\nselect:\n  pretrain: {{min_bucket: 1, where: ['tags has_any [hat]']}}\n"
    )
    return preparedset.settings_of(folder)


def labels(settings: DatasetConfig) -> dict[str, dict[str, Any]]:
    folder = Path(settings.root) / settings.name
    return {row["key"]: row for part in stream_table(folder, "labels") for row in part.to_pylist()}


def test_every_part_but_sentences_has_the_tag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = world(tmp_path, TEXTS, "alias,tag\nHeadgear,hat\nlong_hair_tag,long_hair\nmiku,hatsune_miku\ngrainy picture,grainy\n", assume_rating="g")
    preparedset.prepare(settings, "ingest", "probe", "dedupe", "label", "select")
    row = labels(settings)["t:plain.png"]
    assert (row["fixed_tags"], row["flex_tags"], row["tail_tags"]) == (["hatsune miku"], ["hat", "long hair"], ["grainy"])
    assert row["prose"] == ["A headgear lies on the table, and she looks at it."]
    assert row["tag_variants"] == ["x\nhat\n"]
    said = capsys.readouterr().out
    assert "label: aliases: 4 names; 2 records have one and are told by its tag" in said
    selected = pq.read_table(tmp_path / "data/set/select_pretrain.parquet")["key"].to_pylist()
    assert selected == ["t:other.png", "t:plain.png"], "filters go by the tag"
    first = {path.name for path in (tmp_path / "data/set/labels").glob("*.parquet")}
    (tmp_path / "aliases.csv").write_text("headgear,cap\n")
    preparedset.prepare(settings, "label")
    assert {path.name for path in (tmp_path / "data/set/labels").glob("*.parquet")} != first
    assert labels(settings)["t:plain.png"]["flex_tags"] == ["cap", "long hair tag"]


@pytest.mark.parametrize("table", [f"{R1},girl\nheadgear,{R1}\n", f"{R1},girl\nheadgear,{R1}s\n{R1}s,girl\n"])
def test_no_alias_brings_a_record_back_or_an_excluded_word_in(tmp_path: Path, table: str) -> None:
    """Renamed away after ingest saw it, or the tag of an alias, or a name on the way: out, whichever part it stands in."""
    parts = (f"{R1}, hat", "girl ||| standing, headgear", "girl ||| standing ||| headgear", "headgear ||| standing", "hat\nheadgear, x")
    settings = world(tmp_path, {**dict(zip("abcde", parts, strict=True)), "good": "hat"}, table, assume_rating="g")
    preparedset.prepare(settings, "ingest", "probe", "dedupe", "label")
    assert set(labels(settings)) == {"t:good.png"}


def test_both_forms_are_seen_together(tmp_path: Path) -> None:
    """A word of R2, which an alias takes away, in a record whose rating another alias brings."""
    settings = world(tmp_path, {"bad": "a child, grown_up", "good": "a child, standing"}, "a child,person\ngrown_up,nsfw\n", assume_rating="g")
    preparedset.prepare(settings, "ingest", "probe", "dedupe", "label")
    assert set(labels(settings)) == {"t:good.png"}


def test_the_second_gate_sees_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first gate gone, select refuses what has such a word in any part."""
    whole = {"fixed": "girl", "flex": "tie", "tail": "grainy", "prose": "She has a hat on her head.", "variant": "cap"}
    texts = {}
    for part in whole:
        said = whole | {part: f"She has a {R1} on her head." if part == "prose" else R1}
        texts[part] = f"{said['fixed']} ||| {said['flex']}, hat ||| {said['tail']}\n{said['prose']}\n{said['variant']}, hat"
    settings = world(tmp_path, texts | {"good": "hat"}, "", assume_rating="g", keep_tokens=1)
    monkeypatch.setattr(normalise, "excluded_by", lambda **_: None)
    preparedset.prepare(settings, "ingest", "probe", "dedupe", "label", "select")
    assert set(labels(settings)) == {f"t:{name}.png" for name in (*texts, "good")}, "the mutant let them pass"
    row = labels(settings)
    assert R1 in row["t:fixed.png"]["fixed_tags"] and R1 in row["t:tail.png"]["tail_tags"] and R1 in row["t:prose.png"]["prose"][0]
    selected = pq.read_table(tmp_path / "data/set/select_pretrain.parquet")["key"].to_pylist()
    assert selected == ["t:good.png"]


def test_tables_of_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("name,category,count,aliases\nhat,0,12,\"headgear, hats\"\nmiku,4,3,\nlong_hair,0,5,Long-Hair\n")
    found = read_aliases(str(path))
    assert found.tags == {"headgear": "hat", "hats": "hat", "long-hair": "long_hair"}
    path.write_text("\ufeffa,b\nb,c\nB,c\nx,X\n", encoding="utf-8")
    assert (read_aliases(str(path)).tags, read_aliases(str(path)).between) == ({"a": "c", "b": "c"}, {"a": ["b"]})
    assert read_aliases(None).identity is None


@pytest.mark.parametrize(("table", "told"), [
    ("a,b\nb,a\n", "is an alias of itself"), ("x,a\na,b\nb,a\n", "is an alias of itself"), ("a,b\na,c\n", "row 2: 'a' is an alias of 'b' and of 'c'"), ("a,b,c\n", "row 1 has 3 cells"),
    ("a,\n", "row 1: 'a' and '' are no two tags"), ('a,"b, c"\n', "no two tags"), ("a,b|||c\n", "no two tags"),
])  # fmt: skip
def test_what_is_no_table_is_named(tmp_path: Path, table: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(Halt) as halted:
        read_aliases(str(tmp_path / "a.csv"))
    assert halted.value.code == ExitCode.USAGE
    assert told in halted.value.message
    with pytest.raises(Halt, match="cannot be read"):
        read_aliases(str(tmp_path / "none.csv"))
