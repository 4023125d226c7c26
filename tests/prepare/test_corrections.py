"""Corrections change the captions they name, and nothing else; what the hard exclusions took out stays out."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparedset import prepare, settings_of, write_posts, write_vae

from train.base.errors import ExitCode, Halt
from train.data.index import Index
from train.prepare.tables import units
from train.prepare.tagging.corrections import Change, Corrections, read_corrections
from train.prepare.tagging.matching import GROUP_COLUMNS
from train.recipe.captions import read_stored, stored

COUNT = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write_posts(folder / "pictures", COUNT)
    write_vae(folder / "vae")
    prepare(settings_of(folder))
    return folder


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Path:
    """A finished dataset, to be changed."""
    shutil.copytree(finished, tmp_path / "c", copy_function=shutil.copy2)
    (tmp_path / "c" / "dataset.yaml").unlink()
    settings_of(tmp_path / "c")
    return tmp_path / "c"


def labels(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in units.read_table(folder / "data/set", "labels").to_pylist()}


def latents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted((folder / "data/set/latents").glob("*.safetensors"))
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def corrected(folder: Path, text: str, *steps: str, **overrides: Any) -> dict[str, Any]:
    """Prepare with corrections; what dataset.json says they did."""
    (folder / "corrections.csv").write_text(text)
    prepare(settings_of(folder, corrections=str(folder / "corrections.csv"), **overrides), *steps)
    found: dict[str, Any] = json.loads((folder / "data/set/dataset.json").read_text())["label"]["corrections"]
    return found


def test_only_the_captions_that_are_named_change(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, shards, index = labels(made), latents(made), Index.open(made / "data/set", "pretrain")
    text = "key,tag,change\nbooru:1,smile,drop\nbooru:2,smile,drop\nbooru:2,red_scarf,add\nbooru:2,SOLO,drop\n"
    told = corrected(made, text)
    after = labels(made)
    assert {key for key in before if before[key] != after[key]} == {"booru:1", "booru:2"}
    assert after["booru:1"]["flex_tags"] == [tag for tag in before["booru:1"]["flex_tags"] if tag != "smile"]
    kept = [tag for tag in before["booru:2"]["flex_tags"] if tag not in ("smile", "solo")]
    assert sorted(after["booru:2"]["flex_tags"]) == sorted([*kept, "red scarf"])
    assert latents(made) == shards
    assert told == {"dropped": 3, "added": 1, "captions": 2, "of_excluded": 0, "idle": []}
    assert "3 tags dropped and 1 added, in 2 captions" in capsys.readouterr().out
    again = Index.open(made / "data/set", "pretrain")
    assert again.fingerprint != index.fingerprint
    assert len(again) == len(index)
    prepare(settings_of(made))
    assert labels(made) == before
    assert Index.open(made / "data/set", "pretrain").fingerprint == index.fingerprint
    assert "corrections" not in json.loads((made / "data/set/dataset.json").read_text())["label"]


def test_what_changes_nothing_is_counted_and_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = labels(made)
    told = corrected(made, "booru:1,no such tag,drop\nbooru:3,smile,add\nbooru:99,smile,drop\nbooru:4,solo,drop\n", "label")
    said = capsys.readouterr().out
    assert "3 change nothing: booru:1 has no 'no such tag'; booru:3 has 'smile'; there is no record booru:99" in said
    assert told["idle"] == [["booru:1", "no such tag", "drop"], ["booru:3", "smile", "add"], ["booru:99", "smile", "drop"]]
    after = labels(made)
    assert {key for key in before if before[key] != after[key]} == {"booru:4"}


def test_corrections_count_in_filters(made: Path) -> None:
    """`tag_1` is on 1 and 7; the drop takes the one out of its filter, the add brings 2 in."""
    where = {"select.ft1.where": "['tags_general has_any [tag_1]']", "select.ft1.min_bucket": 1}
    corrected(made, "key,tag,op\nbooru:7,tag 1,drop\nbooru:2,tag_1,add\n", "label", "select", **where)
    assert pq.read_table(made / "data/set/select_ft1.parquet")["key"].to_pylist() == ["booru:1", "booru:2"]


def test_no_correction_brings_an_excluded_record_back(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    post = json.loads((made / "pictures/8.json").read_text())
    post["tag_string_general"] += " loli"
    (made / "pictures/8.json").write_text(json.dumps(post))
    told = corrected(made, "key,tag,op\nbooru:8,loli,drop\n")
    assert (told["of_excluded"], told["dropped"], told["idle"]) == (1, 0, [])
    said = capsys.readouterr().out
    assert "1 are of excluded records, which stay out" in said
    assert "booru:8" not in said
    assert "booru:8" not in labels(made)
    index = Index.open(made / "data/set", "pretrain")
    assert "booru:8" not in {index.key(row) for row in range(len(index))}
    assert "booru:8" not in (made / "data/set/report.html").read_text()


def test_an_added_tag_can_exclude(made: Path) -> None:
    """Rule R2 in a record rated explicit; in one rated general the same tag is a tag."""
    told = corrected(made, "key,tag,op\nbooru:3,kid,add\nbooru:3,smile,drop\nbooru:4,kid,add\n")
    assert told["of_excluded"] == 2
    assert "booru:3" not in labels(made)
    assert "kid" in labels(made)["booru:4"]["flex_tags"]
    (row,) = [row for row in pq.read_table(made / "data/set/quarantine.parquet").to_pylist() if row["key"] == "booru:3"]
    assert (row["step"], row["reason"], row["message"]) == ("label", "excluded_tag", "R2")
    index = Index.open(made / "data/set", "pretrain")
    assert "booru:3" not in {index.key(row) for row in range(len(index))}


def test_aliases_come_first_and_hide_nothing_from_the_exclusions(made: Path) -> None:
    """A drop names the tag as the caption shows it; what an alias renamed still counts beside a tag that is added."""
    post = json.loads((made / "pictures/4.json").read_text())
    post["tag_string_general"] += " kid"
    (made / "pictures/4.json").write_text(json.dumps(post))
    (made / "aliases.csv").write_text("kid,person\nsmile,happy\n")
    told = corrected(made, "booru:4,nsfw,add\nbooru:5,happy,drop\nbooru:0,nsfw,add\n", "ingest", "label", aliases=str(made / "aliases.csv"))
    assert told == {"dropped": 1, "added": 1, "captions": 2, "of_excluded": 1, "idle": []}
    found = labels(made)
    assert "booru:4" not in found
    assert "nsfw" in found["booru:0"]["flex_tags"]
    assert not {"happy", "smile"} & set(found["booru:5"]["flex_tags"])


@pytest.mark.parametrize("seed", range(20))
def test_captions_lose_what_is_dropped_and_nothing_else(seed: int) -> None:
    """Every part of a stored caption, against the lists it was made of."""
    chance = random.Random(seed)

    def some(least: int = 0) -> list[str]:
        return chance.sample(["hat", "long hair", "a", "smile", "(x)", "b_c"], chance.randint(least, 4))

    wanted = [(some(), some(1), some()) for _ in range(chance.randint(1, 3))]
    prose = chance.sample(["A girl, smiling.", "Long hair.", "smile"], chance.randint(0, 3))
    text = stored([((", ".join(f) + ", ||| " if f else "") + ", ".join(x), t) for f, x, t in wanted], prose)
    assert read_stored(text) == (wanted, prose)
    empty = pa.array([[]], pa.list_(pa.string()))
    table = pa.table({"key": ["s:1"], **dict.fromkeys(GROUP_COLUMNS, empty), "caption": [text]})
    drop = {"smile": "smile", "long hair": "Long_Hair", "b c": "b c"}
    (found,) = Corrections({"s:1": Change(["new"], drop)}).applied(table).to_pylist()
    gone = {"smile", "long hair", "b_c"}
    assert read_stored(found["caption"])[0] == [tuple([tag for tag in part if tag not in gone] for part in one) for one in wanted]
    assert read_stored(found["caption"])[1] == [text for text in prose if text != "smile"]
    assert found["tags_general"] == ["new"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key,tag,op\ns:1,hat,remove\n", "'remove' is neither add nor drop"),
        ("key,tag,op\ns:1,,drop\n", "'' is no tag"),
        ('key,tag,op\ns:1,"a, b",add\n', "'a, b' is no tag"),
        ("key,tag,op\ns:1,hat,drop\ns:1,Hat,add\n", "both added to s:1 and dropped from it"),
        ("name,tag,op\ns:1,hat,drop\n", "it needs key, tag and add or drop"),
        ("key,tag,op\ns:1,hat\n", "2 columns, the header has 3"),
    ],
)
def test_what_is_no_correction_is_refused_by_its_row(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(Halt, match="corrections: ") as caught:
        read_corrections(str(tmp_path / "c.csv"))
    assert caught.value.code == ExitCode.USAGE
    assert told in caught.value.message


def test_files_as_spreadsheets_write_them(tmp_path: Path) -> None:
    rows = [("s:1", "hat", "drop"), ("s:1", "red scarf", "add"), ("s:2", "x, y.", "drop")]
    for text in (
        '\ufeffkey,tag,change\r\ns:1,hat,drop\r\ns:1,red scarf,ADD\r\ns:2,"x, y.",drop\r\n',
        'Change;Key;Tag\ndrop;s:1;hat\nadd;s:1;red scarf\ndrop;s:2;"x, y."\n',
        's:1,hat,drop\ns:1,red scarf,add\ns:1,red_scarf,add\ns:2,"x, y.",drop\n',
    ):
        (tmp_path / "c.csv").write_text(text)
        assert read_corrections(str(tmp_path / "c.csv")).rows() == rows
    (tmp_path / "c.csv").write_text("")
    assert read_corrections(str(tmp_path / "c.csv")).rows() == read_corrections(None).rows() == []
    with pytest.raises(Halt, match="cannot be read"):
        read_corrections(str(tmp_path / "none.csv"))
