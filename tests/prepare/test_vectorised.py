"""The vectorised policy against the policy of one post, and the step that writes labels."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onepost import Post, label_post, percentile_thresholds

from train.base.errors import ExitCode, Halt
from train.config.dataset import AestheticConfig, DatasetConfig, PolicyConfig, QualityConfig, SourceConfig, dataset_dir
from train.prepare import ingest, label
from train.prepare.tables.schemas import LABELS, TAG_GROUPS
from train.prepare.tables.units import read_table
from train.prepare.tagging.policy import counted_thresholds
from train.prepare.tagging.vectorised import Inputs, label_table
from train.recipe.captions import split
from train.recipe.tag_policy import COUNT_TAGS, LabelError, Policy, preset

TAGS = [
    *COUNT_TAGS[:4], "solo", "long_hair", "long hair", "^_^", "(o)_(o)", "", " ", "highres", "commentary_request",
    "bad_anatomy", "banned_artist", "painter", "aesthetic_fashion", "safe", "newest", "é_è_ê", "hero_(title)",
]  # fmt: skip
EDGES = [0.71, 0.45, 0.27, 0.9, 0.5, 0.1, None]
maybe_year = st.one_of(st.none(), st.integers(1999, 2030))
posts = st.builds(
    Post,
    rating=st.sampled_from(["g", "s", "q", "e", None]),
    score=st.one_of(st.none(), st.integers(-5, 320), st.sampled_from([3.5, 19.25])),
    created_year=maybe_year,
    media_year=maybe_year,
    age_days=st.one_of(st.none(), st.integers(0, 200)),
    aesthetic_score=st.sampled_from(EDGES),
    **{group: st.lists(st.sampled_from(TAGS), max_size=4) for group in TAG_GROUPS},
    caption_fixed=st.lists(st.sampled_from(["hero", "1girl", "a_b_c"]), max_size=2),
    caption_flex=st.lists(st.sampled_from(["smile", "safe", "x y"]), max_size=2),
)
policies = st.builds(
    dataclasses.replace,
    st.sampled_from([preset("default"), preset("animagine31")]),
    meta_blacklist=st.sampled_from(["per_tag", "whole_group"]),
    year_source=st.sampled_from(["media_or_post", "media"]),
    year_fallback=st.sampled_from(["none", "early"]),
    aesthetic_edges=st.sampled_from(["lower_bin", "very_displeasing"]),
    aesthetic_skip_substring=st.booleans(),
    banned_artist=st.sampled_from(["drop", "keep"]),
    missing_rating_or_score=st.just("omit"),
    empty_tags=st.sampled_from(["remove", "keep"]),
    duplicate_tags=st.sampled_from(["first", "all"]),
    quality=st.booleans(),
    quality_by_year=st.booleans(),
    quality_thresholds=st.sampled_from(
        [preset("default").quality_thresholds, {"g/2020": (1.0,) * 6, "*": (0.0, 2.0, 4.0, 8.0, 16.0, 32.0)}, {}]
    ),
    quality_min_age_days=st.sampled_from([0, 90]),
    year_before=st.sampled_from(["none", "clamp"]),
    year_after=st.sampled_from(["none", "clamp"]),
    underscore=st.sampled_from(["len3", "kaomoji"]),
)


def as_records(rows: list[Post]) -> tuple[pa.Table, Inputs]:
    def caption(post: Post) -> str | None:
        if not post.caption_fixed and not post.caption_flex:
            return None
        return f"{', '.join(post.caption_fixed)}, ||| {', '.join(post.caption_flex)}"

    def floats(name: str) -> np.ndarray:
        values = [getattr(post, name) for post in rows]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    columns: dict[str, Any] = {
        "key": [f"s:{number}" for number in range(len(rows))],
        "caption": pa.array([caption(post) for post in rows], pa.string()),
    }
    columns |= {
        f"tags_{group}": pa.array([list(getattr(post, group)) for post in rows], pa.list_(pa.string()))
        for group in TAG_GROUPS
    }
    codes = [-1 if post.rating is None else "gsqe".index(post.rating) for post in rows]
    return pa.table(columns), Inputs(
        np.array(codes, np.int64), floats("score"), floats("created_year"), floats("media_year"), floats("age_days"),
        floats("aesthetic_score"),
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(posts, min_size=1, max_size=12), policies)
def test_equal_to_the_oracle(rows: list[Post], policy: Policy) -> None:
    records, inputs = as_records(rows)
    columns = label_table(records, inputs, policy)
    for number, post in enumerate(rows):
        labels = label_post(post, policy)
        for name in ("fixed_tags", "flex_tags", "rating_tags"):
            assert columns[name][number].as_py() == list(getattr(labels, name)), name
        for name in ("quality", "year", "aesthetic"):
            assert columns[name][number].as_py() == getattr(labels, name), name


def test_missing_values_raise_with_the_key() -> None:
    for post, word in ((Post(rating="g"), "score"), (Post(score=1), "rating")):
        records, inputs = as_records([Post(rating="g", score=1), post])
        with pytest.raises(LabelError, match=f"s:1 has no {word}"):
            label_table(records, inputs, preset("animagine31"))


def test_tokens_count_the_comma_with_its_tag() -> None:
    records, inputs = as_records([Post(general=["aa", "bbb"]), Post(), Post(rating="g", general=["1girl"])])
    counts = label_table(records, inputs, preset("default"), count_tokens=len)["n_tokens"].to_pylist()
    assert counts == [3 + 3, 0, len("1girl,") + len("safe")]


def _world(folder: Path, number: int = 300, seed: int = 0, **more: Any) -> DatasetConfig:
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "posts.jsonl", "w") as file:
        for index in range(number):
            post = {
                "id": index, "rating": draw.choice("gs"), "score": int(draw.expovariate(0.05)),
                "created_at": f"{draw.choice((2012, 2022))}-05-01T00:00:00Z", "file_ext": "png",
                "tag_string_general": "1girl smile long_hair",
            }  # fmt: skip
            file.write(json.dumps(post) + "\n")
    sources = [SourceConfig("s", "danbooru", str(folder / "posts.jsonl"))]
    return DatasetConfig(name="d", root=str(folder / "data"), sources=sources, **more)


def _labels(config: DatasetConfig) -> list[dict[str, Any]]:
    return read_table(dataset_dir(config), "labels").to_pylist()


def test_step_writes_the_schema_and_equals_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _world(tmp_path)
    ingest.run(config)
    label.run(config)
    assert "tokenizers is null" in capsys.readouterr().out
    table = read_table(dataset_dir(config), "labels")
    assert table.schema.equals(LABELS)
    records = read_table(dataset_dir(config), "records").to_pylist()
    for record, row in zip(records, table.to_pylist(), strict=True):
        fixed, flex = split(record["caption"] or "")
        post = Post(
            rating=record["rating"], score=record["score"], created_year=record["created_year"],
            general=record["tags_general"], caption_fixed=fixed, caption_flex=flex,
        )  # fmt: skip
        labels = label_post(post, preset("default"))
        assert (row["key"], tuple(row["flex_tags"])) == (record["key"], labels.flex_tags)
    facts = json.loads((dataset_dir(config) / "dataset.json").read_text())
    assert facts["policy_hash"] == preset("default").hash()
    assert facts["label"]["without_aesthetic"] == 300


def test_a_threshold_rewrites_labels_only(tmp_path: Path) -> None:
    config = _world(tmp_path)
    ingest.run(config)
    label.run(config)
    before = {path: path.stat().st_mtime_ns for path in dataset_dir(config).rglob("*.parquet")}
    label.run(config)
    assert {path: path.stat().st_mtime_ns for path in before if "labels" in path.parts} == {
        path: time for path, time in before.items() if "labels" in path.parts
    }
    edited = dataclasses.replace(config, policy=PolicyConfig(aesthetic=AestheticConfig((0.8, 0.5, 0.2))))
    label.run(edited)
    changed = {path for path, time in before.items() if not path.exists() or path.stat().st_mtime_ns != time}
    assert {path.parent.name for path in changed} <= {"labels", dataset_dir(config).name}
    assert any(path.parent.name == "labels" for path in changed)


def test_empirical_thresholds_are_frozen(tmp_path: Path) -> None:
    policy = PolicyConfig(quality=QualityConfig(source="empirical", min_group=50))
    config = _world(tmp_path, policy=policy)
    ingest.run(config)
    label.run(config)
    first = {row["key"]: row["quality"] for row in _labels(config)}
    for rating in "gs":
        tags = [row["quality"] for row in _labels(config) if rating_of(row) == rating]
        assert 0 < tags.count("masterpiece") <= 0.05 * len(tags)
    with open(tmp_path / "posts.jsonl", "a") as file:
        for index in range(1000, 1400):
            post = {"id": index, "rating": "g", "score": 100_000 + index, "tag_string_general": "x", "file_ext": "png"}
            file.write(json.dumps(post) + "\n")
    ingest.run(config)
    label.run(config)
    assert {key: tag for key, tag in ((r["key"], r["quality"]) for r in _labels(config)) if key in first} == first


def rating_of(row: dict[str, Any]) -> str:
    return {"safe": "g", "sensitive": "s"}[row["rating_tags"][0]]


def test_small_groups_use_the_pool_or_nothing(tmp_path: Path) -> None:
    small = PolicyConfig(quality=QualityConfig(source="empirical", min_group=250))
    pooled = _world(tmp_path / "a", policy=small)
    ingest.run(pooled)
    label.run(pooled)
    lock = json.loads((dataset_dir(pooled) / "labels" / "policy.lock.json").read_text())
    assert list(lock["thresholds"]) == ["*"]
    assert "masterpiece" in {row["quality"] for row in _labels(pooled)}
    none = _world(tmp_path / "b", policy=PolicyConfig(quality=QualityConfig(source="empirical", min_group=400)))
    ingest.run(none)
    label.run(none)
    assert {row["quality"] for row in _labels(none)} == {None}


def test_young_posts_get_no_quality(tmp_path: Path) -> None:
    config = _world(tmp_path, policy=PolicyConfig(quality=QualityConfig(min_age_days=90)))
    ingest.run(config)
    label.run(config)
    by_year = {(row["year"], row["quality"] is None) for row in _labels(config)}
    assert by_year == {("early", False), ("newest", True)}  # the newest post's day is day 0


def test_strict_preset_stops_with_the_key(tmp_path: Path) -> None:
    config = _world(tmp_path, policy=PolicyConfig(preset="animagine31"))
    with open(tmp_path / "posts.jsonl", "a") as file:
        file.write(json.dumps({"id": 9999, "rating": "g", "tag_string": "x"}) + "\n")
    ingest.run(config)
    with pytest.raises(Halt, match="s:9999 has no score") as stopped:
        label.run(config)
    assert stopped.value.code == ExitCode.MISMATCH


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000))
def test_order_and_number_of_processes_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    policy = PolicyConfig(quality=QualityConfig(source="empirical", min_group=50))
    folder = tmp_path_factory.mktemp("worlds")
    one, two = (_world(folder / name, seed=seed, policy=policy) for name in ("one", "two"))
    posts_file = folder / "two" / "posts.jsonl"
    lines = posts_file.read_text().splitlines()
    random.Random(seed).shuffle(lines)
    posts_file.write_text("\n".join(lines))
    for config in (one, two):
        ingest.run(config)
        label.run(config)
    files = [
        {path.name: path.read_bytes() for path in sorted((dataset_dir(config) / table).glob("*.parquet"))}
        for config in (one, two) for table in ("records", "labels")
    ]  # fmt: skip
    assert files[0] == files[2]
    assert files[1] == files[3]


def test_aesthetic_scores_join_by_key(tmp_path: Path) -> None:
    config = _world(tmp_path, number=4)
    config = dataclasses.replace(
        config, score=dataclasses.replace(config.score, source="column", path=str(tmp_path / "scores.csv"))
    )
    (tmp_path / "scores.csv").write_text("key,score\ns:3,0.71\ns:0,0.27\ns:1,\nother:1,0.9\n")
    from train.prepare import score

    ingest.run(config)
    score.run(config)
    label.run(config)
    assert [row["aesthetic"] for row in _labels(config)] == ["very displeasing", None, None, "aesthetic"]
    pq.write_table(
        pa.table({"key": ["s:0"], "score": pa.array([0.27], pa.float32())}), tmp_path / "scores.parquet"
    )
    widened = dataclasses.replace(config.score, path=str(tmp_path / "scores.parquet"))
    config = dataclasses.replace(config, score=widened)
    score.run(config)
    label.run(config)
    assert _labels(config)[0]["aesthetic"] == "displeasing"  # a float32 0.27 is a little more


@given(st.lists(st.one_of(st.integers(-3, 9), st.sampled_from([2.5, 7.25])), min_size=1, max_size=60))
def test_thresholds_of_counted_scores_are_those_of_sorted_scores(scores: list[float]) -> None:
    values, counts = np.unique(np.array(scores, np.float64), return_counts=True)
    assert counted_thresholds(values, counts).tolist() == list(percentile_thresholds(sorted(scores)))


def test_key_range_of_a_unit(tmp_path: Path) -> None:
    keys = ["b:1", "b:10", "b:9", "b:é"]
    pq.write_table(pa.table({"other": [1, 2, 3, 4], "key": keys}), tmp_path / "some.parquet", row_group_size=3)
    assert label._key_range(tmp_path / "some.parquet") == ("b:1", "b:é")
    pq.write_table(pa.table({"key": keys}), tmp_path / "plain.parquet", row_group_size=3, write_statistics=False)
    assert label._key_range(tmp_path / "plain.parquet") == ("b:1", "b:é")
    pq.write_table(pa.table({"key": keys[:0]}), tmp_path / "none.parquet")
    assert label._key_range(tmp_path / "none.parquet") == ("~", "")


@pytest.mark.slow
def test_benchmark_runs_in_small(tmp_path: Path) -> None:
    from train.testing.labels import label_rows, label_seconds, write_records

    (table, empirical) = label_rows(tmp_path, 60_000)  # two units
    assert read_table(tmp_path / "labels", "labels", ["key"])["key"].length() == 60_000
    assert "empirical" in empirical["what"]
    assert table["sides"]["ours"]["cpu_s"] < 60
    write_records(tmp_path / "six", 300_000)
    few, many = (label_seconds(tmp_path / name)["rss_mb"] for name in ("labels", "six"))
    assert many < 2000
    assert many < few + 150, "the table is held whole: 300,000 rows of labels and records are 350 MB"
