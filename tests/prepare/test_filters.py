"""Filters on what people really bring: tags in captions, columns without values, small sets, kohya's folders."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from oddimages import drawn, encoded
from preparedset import prepare

from train.base.errors import ExitCode, Halt
from train.config.dataset import MAX_REPEATS, DatasetConfig, SourceConfig, load_settings
from train.prepare.choosing.predicates import evaluate, parse
from train.prepare.choosing.repeats import visits_of
from train.prepare.tables.quarantine import Complaint, too_many
from train.prepare.tagging.matching import caption_lists, joined_lists, occurring, plain_tag, tagged
from train.tools.show.inputs import quarantine as report

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("ingest", "probe", "score", "tag", "dedupe", "label", "select")
COMIC = "1girl, ai-generated, comic, long hair, some artist"


def pictures(folder: Path, captions: dict[str, str | None]) -> Path:
    """A picture of its own for each name, with its caption beside it."""
    for number, (name, caption) in enumerate(captions.items()):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(drawn(40, 60, seed=number), "PNG"))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
    return folder


def settings(folder: Path, *overrides: str, **source: Any) -> DatasetConfig:
    """The pictures of `folder`/in as a plain folder, all of them in the stage `pretrain`."""
    plain = {
        "name": "set", "root": str(folder), "workers": 0, "select": {"pretrain": {"min_bucket": 1}},
        "buckets": {"area_px": 6144, "min_px": 64, "max_px": 128, "step_px": 32},
        "sources": [{"name": "s", "adapter": "sidecar", "path": str(folder / "in")} | source],
    }  # fmt: skip
    (folder / "d.yaml").write_text(json.dumps(plain))
    return load_settings([folder / "d.yaml"], overrides)


def selected(folder: Path, stage: str = "pretrain") -> dict[str, int]:
    """Key without source: repeats."""
    rows = pq.read_table(folder / "set" / f"select_{stage}.parquet").to_pylist()
    return {row["key"].removeprefix("s:"): row["repeats"] for row in rows}


@pytest.fixture
def half_comic(tmp_path: Path) -> Path:
    pictures(tmp_path / "in", {f"{n}": COMIC if n < 5 else f"1girl, ||| smile, hat {n}" for n in range(10)})
    return tmp_path


@pytest.mark.parametrize(
    "filters",
    [
        ["exclude.tags=[comic]"], ["exclude.tags=[Long_Hair]"], ["exclude.tags=['long hair']"],
        ["select.pretrain.where=['tags_general has_none [comic]']"], ["select.pretrain.where=['tags has smile']"],
        ["select.pretrain.where=['tags_meta has_none [ai-generated]']"],
        ["select.pretrain.where=['tags_artist has_none [some_artist]']"],
        ["select.pretrain.where=['flex_tags has_none [long_hair]']"],
        ["select.pretrain.caps={general: 5}"],  # 1girl is one of their tags
    ],
)  # fmt: skip
def test_filters_see_captions(half_comic: Path, filters: list[str]) -> None:
    prepare(settings(half_comic, *filters), *STEPS)
    kept = set(selected(half_comic))
    assert len(kept) == 5
    assert "caps" in filters[0] or kept == {f"{n}.png" for n in range(5, 10)}


def with_metadata(folder: Path, adapter: str, captions: dict[str, str]) -> None:
    """The pictures of `folder`, captioned as the adapter's users have it."""
    rows = [{"file_name": f"{name}.png", "filename": name, "text": text, "caption": text} for name, text in captions.items()]
    if adapter == "imagefolder":
        (folder / "metadata.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("file_name", "text")}) + "\n" for row in rows))
    elif adapter == "sd_scripts":
        (folder / "meta.json").write_text(json.dumps({row["filename"]: {"tags": row["text"]} for row in rows}))
    elif adapter == "simpletuner":
        pq.write_table(pa.Table.from_pylist(rows).select(["filename", "caption"]), folder / "meta.parquet")
    else:
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name in [f"{row['filename']}.{ending}" for row in rows for ending in ("png", "txt")]:
                tar.add(folder / name, name)
        for file in folder.glob("*.png"):
            file.unlink()


@pytest.mark.parametrize("adapter", ["imagefolder", "sd_scripts", "simpletuner", "webdataset"])
def test_filters_see_captions_of_every_layout(tmp_path: Path, adapter: str) -> None:
    captions = {f"{n}": COMIC if n < 2 else f"1girl, smile {n}" for n in range(4)}
    with_metadata(pictures(tmp_path / "in", dict(captions)), adapter, captions)
    path = {"sd_scripts": "in/meta.json", "simpletuner": "in/meta.parquet"}.get(adapter, "in")
    prepare(settings(tmp_path, "exclude.tags=[long_hair]", adapter=adapter, path=str(tmp_path / path)), *STEPS)
    assert len(selected(tmp_path)) == 2
    assert report(tmp_path / "set", reason="excluded_tag")["set_aside"] == 2


def test_filters_see_what_a_tagger_found(half_comic: Path) -> None:
    rows = "".join(f's:{n}.png,"{"manga, 1girl" if n % 2 else "1girl"}"\n' for n in range(10))
    (half_comic / "tags.csv").write_text("key,tags\n" + rows)
    tagger = ["tag.source=column", f"tag.path={half_comic / 'tags.csv'}", "tag.use=all"]
    prepare(settings(half_comic, *tagger, "select.pretrain.where=['tags_general has_none [manga, comic]']"), *STEPS)
    assert set(selected(half_comic)) == {"6.png", "8.png"}


def test_a_set_of_posts_and_of_captions(half_comic: Path) -> None:
    """One filter, both forms of a tag; a cap counts them as one."""
    for number in (1, 2, 3):
        post = {"id": number, "tag_string_general": "long_hair" if number < 3 else "hat", "tag_string_artist": "some_artist",
                "rating": "g", "score": 1, "file_ext": "png"}  # fmt: skip
        (half_comic / "posts").mkdir(exist_ok=True)
        (half_comic / "posts" / f"{number}.json").write_text(json.dumps(post))
        (half_comic / "posts" / f"{number}.png").write_bytes(encoded(drawn(50, 50, seed=100 + number), "PNG"))
    settings(half_comic)
    more = f"sources=[{{name: s, adapter: sidecar, path: {half_comic / 'in'}}}, {{name: p, adapter: danbooru, path: {half_comic / 'posts'}}}]"
    for where, kept in (("tags has long_hair", 7), ("tags_general has 'long hair'", 7), ("tags_artist has 'some artist'", 8), ("rating == g", 3)):
        prepare(load_settings([half_comic / "d.yaml"], [more, f'select.pretrain.where=["{where}"]']), *STEPS)
        assert len(selected(half_comic)) == kept, where
    prepare(load_settings([half_comic / "d.yaml"], [more, "select.pretrain.caps={general: 1}"]), "select")
    assert len(selected(half_comic).keys() & {*(f"{n}.png" for n in range(5)), "p:1", "p:2"}) == 1, "long hair is long_hair"


def test_filters_that_do_nothing_are_named_once(half_comic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filters = ["exclude.tags=[comci, '3girls']", "select.pretrain.where=['tags_general has_none [comci, comic]', 'year not_in [oldest]']"]
    given = settings(half_comic, *filters, "select.pretrain.caps={artist: 1}", "select.second={where: ['tags_general has_none [comci, comic]']}")
    prepare(given, *STEPS)
    told = capsys.readouterr().out.splitlines()
    wanted = [
        "probe: exclude.tags: no picture has 'comci'", "probe: exclude.tags: no picture has '3girls'",
        "select.pretrain, second: where `tags_general has_none [comci, comic]`: no picture that may be selected has 'comci'",
        "select.pretrain: where `year not_in [oldest]`: leaves nothing out: no picture has any year (no record has a date in "
        "policy.year.ranges)",
        "select.pretrain: caps.artist: limits nothing: no picture has any artist (a caption does not say which of its tags are one)",
    ]  # fmt: skip
    assert [line for line in told if "no picture" in line] == wanted
    prepare(given, "select")  # nothing to do, and said all the same
    assert [line for line in capsys.readouterr().out.splitlines() if "no picture" in line] == wanted[2:]


def test_a_predicate_that_can_never_hold(half_comic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = "select.ft1={where: ['quality in [masterpiece]'], min_bucket: 1}"
    with pytest.raises(Complaint, match=r"select\.ft1 leaves no image.*`quality in \[masterpiece\]`: can never hold: no .*score and rating"):
        prepare(settings(half_comic, never), *STEPS)
    prepare(settings(half_comic, "select.ft1={where: ['quality in [masterpiece] if known'], min_bucket: 1}"), "select")
    assert "passed over: no picture has any quality" in capsys.readouterr().out
    assert len(selected(half_comic, "ft1")) == 10


def test_the_shipped_file_takes_a_plain_folder(half_comic: Path) -> None:
    """40 pictures or 10: every stage of it has images, and says what could not be filtered."""
    small = ["buckets.area_px=6144", "buckets.min_px=64", "buckets.max_px=128", "buckets.step_px=32", "workers=0"]
    source = ["sources.0.adapter=sidecar", f"sources.0.path={half_comic / 'in'}", "sources.0.name=s", "name=set"]
    prepare(load_settings([ROOT / "configs/dataset.yaml"], [*small, *source, f"root={half_comic}"]), *STEPS)
    sizes = {stage: len(selected(half_comic, stage)) for stage in ("pretrain", "ft1", "ft2")}
    assert sizes == {"pretrain": 10, "ft1": 5, "ft2": 5}


words = st.sampled_from(["a b", "a_b", "A b", "(a b:1.2)", "a\\_b", "c", "(c", "c:0.9)", "d d d", ""])


@examples(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no defect
@given(st.lists(st.one_of(st.none(), st.lists(words, max_size=5)), max_size=8), st.lists(words.filter(bool), min_size=1, max_size=3, unique_by=plain_tag))
def test_tags_against_plain_python(captions: list[list[str] | None], wanted: list[str]) -> None:
    texts = pa.array([None if tags is None else " ,".join(tags) for tags in captions], pa.string())
    lists = caption_lists(texts)
    forms = [plain_tag(tag) for tag in wanted]
    rows = [[plain_tag(tag) for tag in tags or []] for tags in captions]
    assert tagged(lists, wanted).tolist() == [min((n for n, form in enumerate(forms) if form in row), default=-1) for row in rows]
    assert occurring(lists, wanted) == {tag for tag, form in zip(wanted, forms, strict=True) if any(form in row for row in rows)}
    both = joined_lists([lists, lists]).to_pylist()
    assert both == [(one or []) * 2 for one in lists.to_pylist()]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("long_hair", "long hair"), ("(Long Hair:1.2)", "long hair"), ("((comic))", "comic"), ("[comic]", "comic"),
        ("(comic", "comic"), ("comic:1.3)", "comic"), ("miku_\\(vocaloid\\)", "miku (vocaloid)"), ("miku_(vocaloid)", "miku (vocaloid)"),
        ("ｃｏｍｉｃ", "comic"), ("rock &amp; roll", "rock & roll"), (":)", ":)"), (";_;", "; ;"), ("(o)_(o)", "(o) (o)"),
        ("_", "_"), ("re:zero", "re:zero"), ("6+girls", "6+girls"),
    ],
)  # fmt: skip
def test_how_tags_are_compared(text: str, plain: str) -> None:
    assert plain_tag(text) == plain


def test_values_that_do_not_occur() -> None:
    parts = [pa.array(["g", None, "s"]), pa.array(["g"])]
    outcome = evaluate(parse("rating in [g, e]"), parts)
    assert (outcome.holds.tolist(), outcome.known, outcome.absent) == ([True, False, False, True], 3, ("e",))
    nothing = evaluate(parse("rating == g"), [pa.nulls(2, pa.string())])
    assert (nothing.holds.tolist(), nothing.known) == ([False, False], 0)
    assert evaluate(parse("rating in [x]"), parts).absent == ("x",)
    lists = [pa.array([["a"], [], None], pa.list_(pa.string()))]
    assert evaluate(parse("x has_none [A, b]"), lists).absent == ("b",)
    assert evaluate(parse("x has_none [A, b]"), lists).known == 1


@pytest.mark.parametrize(
    ("count", "total", "share", "broken"),
    [
        (1, 14, 0.02, False), (1, 9, 0.02, True), (1, 2, 0.02, True), (1, 10, 0.02, False), (2, 20, 0.02, False), (2, 19, 0.02, True),
        (3, 40, 0.02, True), (2, 100, 0.02, False), (3, 100, 0.02, True), (20, 1000, 0.02, False), (21, 1000, 0.02, True),
        (1, 14, 0.0, True), (0, 14, 0.0, False), (0, 0, 0.02, False), (3, 4, 0.5, True), (14, 14, 1.0, False),
    ],
)  # fmt: skip
def test_shares_of_small_sets(count: int, total: int, share: float, broken: bool) -> None:
    assert too_many(count, total, share) == broken


def test_one_missing_caption_of_fourteen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "in", {f"{n}": None if n == 3 else f"tag {n}" for n in range(14)})
    prepare(settings(tmp_path), *STEPS)
    assert len(selected(tmp_path)) == 13
    assert "ingest: set aside: s:3.png: missing_caption: " in capsys.readouterr().out
    shown = report(tmp_path / "set")
    assert [(g["step"], g["kind"], g["reason"], g["count"], list(g["entries"])) for g in shown["groups"]] == [
        ("ingest", "error", "missing_caption", 1, ["s:3.png"])
    ]
    assert report(tmp_path / "set", step="ingest", reason="missing_caption")["set_aside"] == 1
    for wrong in ({"step": "probe"}, {"reason": "truncated"}):
        with pytest.raises(Halt, match="there is ") as halt:
            report(tmp_path / "set", **wrong)
        assert halt.value.code == ExitCode.USAGE


def test_quarantine_of_another_folder(tmp_path: Path) -> None:
    for folder, code in ((tmp_path / "none", ExitCode.USAGE), (tmp_path, ExitCode.MISMATCH)):
        with pytest.raises(Halt) as halt:
            report(folder)
        assert halt.value.code == code
    (tmp_path / "quarantine.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(Halt, match="cannot be read"):
        report(tmp_path)


def test_hard_exclusions_are_counted_not_listed(tmp_path: Path) -> None:
    rows = {"key": ["s:1", "s:2"], "step": ["ingest"] * 2, "kind": ["excluded"] * 2, "reason": ["excluded_tag"] * 2,
            "message": ["R1", "exclude.tags: comic"]}  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "quarantine.parquet")
    (group,) = report(tmp_path)["groups"]
    assert (group["count"], group["entries"]) == (2, {"s:2": "exclude.tags: comic"})


@pytest.mark.slow
def test_all_stops_at_the_step_that_fails(tmp_path: Path) -> None:
    pictures(tmp_path / "in", {"1": "a", "2": None, "3": "b"})
    (tmp_path / "vae").mkdir()
    settings(tmp_path)
    command = [sys.executable, str(ROOT / "scripts/prepare.py"), "all", "--config", str(tmp_path / "d.yaml"),
               f"latents.vae={tmp_path / 'vae'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == ExitCode.MISMATCH
    told = done.stderr.strip().splitlines()[-2:]
    assert told[0].startswith("error: ingest: 1 of 3 records are broken, more than")
    assert told[1].startswith("all: stopped at ingest; not run: probe, score, tag, dedupe, label, select, latents, report.")
    assert "probe" not in done.stdout
    assert not (tmp_path / "set/probe").exists()
    (tmp_path / "in/2.txt").write_text("c")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "all: stopped at latents; not run: report." in done.stderr, "it goes on to what fails next"


KOHYA = {"10_some one/0": "a, x", "10_some one/sub/1": "a, y", "1_others/2": "b", "plain/3": "c", "4": "d", "0_off/5": "e"}


def test_repeats_of_kohya_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "in", KOHYA)
    prepare(settings(tmp_path), *STEPS)
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "repeats: kohya" in line] == [
        "ingest s: 4 pictures lie in folders that begin with a number (10_some one, 0_off, 1_others): it is not read. If it is "
        "the repeats of kohya's layout, set `repeats: kohya` in this source"
    ]
    assert set(selected(tmp_path).values()) == {1}
    capsys.readouterr()
    prepare(settings(tmp_path, "select.pretrain.repeats=2", repeats="kohya"), *STEPS)
    told = capsys.readouterr().out
    assert "ingest: the sources are as they were" in told
    assert "repeats: kohya" not in told
    assert "folders of 0 repeats 5; 46 visits an epoch" in told
    assert selected(tmp_path) == {"10_some one/0.png": 20, "10_some one/sub/1.png": 20, "1_others/2.png": 2, "plain/3.png": 2, "4.png": 2}
    prepare(settings(tmp_path, repeats=7), "select")
    assert set(selected(tmp_path).values()) == {7}
    with pytest.raises(Halt, match=r"select\.pretrain\.repeats x .* 320000 visits of s:.*32767 at most"):
        prepare(settings(tmp_path, "select.pretrain.repeats=32000", repeats="kohya"), "select")


def test_folders_that_are_no_repeats(tmp_path: Path) -> None:
    source = SourceConfig("s", "sidecar", str(tmp_path / "5_all"), repeats="kohya")
    (tmp_path / "5_all").mkdir()
    uris = ["12_name.png", "x.tar", "a/7_b/c/1.png", "7_b/3_c/1.png", "_9_x/1.png", "10-x/1.png", "8_y.tar"]
    members = [None, "20_in/1.png", None, None, None, None, "1.png"]
    table = pa.table({"key": uris, "source": ["s"] * 7, "uri": uris, "member": pa.array(members, pa.string())})
    assert visits_of([source], table).tolist() == [5, 20, 7, 3, 5, 5, 5]
    far = table.set_column(2, "uri", pa.array(["20240101_trip/1.png", *uris[1:]]))
    with pytest.raises(Halt, match="20240101_trip") as halt:
        visits_of([source], far)
    assert halt.value.code == ExitCode.MISMATCH
    for repeats in (0, -1, MAX_REPEATS + 1):
        with pytest.raises(Halt, match=r"sources\[0\]\.repeats is -?\d+, must be in \[1, 32767\]"):
            settings(tmp_path, repeats=repeats)


def test_if_known_is_part_of_a_predicate() -> None:
    assert parse("quality in [a, b] if known").if_known
    assert not parse("quality in [a, b]").if_known
    assert parse("tags has 'a if known'").values == ("a if known",), "quoted words may hold it"
