"""The tagging policy: every boundary of the card's special tags, every switch, and the cases that are easy to miss."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onepost import Post, label_post, percentile_thresholds, quality_tag

from train.recipe.captions import render, split
from train.recipe.tag_policy import (
    COUNT_TAGS,
    KAOMOJI,
    POOLED,
    QUALITY_TABLES,
    LabelError,
    Policy,
    aesthetic_tag,
    parse_date,
    preset,
    spaced,
    year_tag,
)

DEFAULT, ORIGINAL = preset("default"), preset("animagine31")
# Lowest score of masterpiece, best, great, good, normal, low; typed from the table of the score percentiles.
LOWEST = {
    "g": (34, 20, 15, 8, 4, 2), "s": (63, 32, 21, 10, 5, 2), "q": (135, 74, 50, 24, 10, 5), "e": (212, 116, 79, 36, 14, 5),
}  # fmt: skip
WORDS = ("masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality")


def quality(score: float | None, rating: str | None = "g", policy: Policy = DEFAULT, **more: Any) -> str | None:
    return quality_tag(score, rating, more.get("year"), more.get("age_days"), policy)


@pytest.mark.parametrize("rating", "gsqe")
def test_quality_boundaries(rating: str) -> None:
    upper = "masterpiece"
    for lowest, word in zip(LOWEST[rating], WORDS, strict=True):
        assert quality(lowest, rating) == word
        assert quality(lowest + 1000 * (word == "masterpiece"), rating) == word
        assert quality(lowest - 1, rating) != upper or word == "masterpiece"
        upper = word
    below = [quality(lowest - 1, rating) for lowest in LOWEST[rating]]
    assert below == [*WORDS[1:], "worst quality"]
    assert quality(-50, rating) == "worst quality"


def test_quality_needs_score_and_rating() -> None:
    assert quality(None) is None
    assert quality(float("nan")) is None
    assert quality(33, None) is None
    with pytest.raises(LabelError, match="score"):
        quality(None, policy=ORIGINAL)
    assert quality(500, policy=dataclasses.replace(DEFAULT, quality=False)) is None


def test_second_table_and_young_posts() -> None:
    newer = dataclasses.replace(DEFAULT, quality_thresholds=QUALITY_TABLES["after_5m"])
    assert [quality(38, policy=newer), quality(39, policy=newer)] == ["best quality", "masterpiece"]
    settled = dataclasses.replace(DEFAULT, quality_min_age_days=90)
    assert [quality(99, policy=settled, age_days=days) for days in (89, 90, None)] == [None, "masterpiece", "masterpiece"]


def test_empirical_ties_stay_whole() -> None:
    thresholds = percentile_thresholds([0] * 95 + [9] * 5)
    policy = dataclasses.replace(DEFAULT, quality_thresholds={"g": thresholds})
    assert thresholds == (0, 0, 0, 0, 0, 0)
    assert [quality(0, policy=policy), quality(9, policy=policy)] == ["worst quality", "masterpiece"]


def test_thresholds_fall_back_to_the_pool() -> None:
    policy = dataclasses.replace(DEFAULT, quality_thresholds={"g/2020": (9,) * 6, POOLED: (1,) * 6}, quality_by_year=True)
    assert quality(5, policy=policy, year=2020) == "worst quality"
    assert quality(5, policy=policy, year=2019) == "masterpiece"
    assert quality(5, policy=dataclasses.replace(policy, quality_thresholds={})) is None


@given(st.lists(st.integers(-20, 60), min_size=1, max_size=300))
def test_empirical_shares(scores: list[int]) -> None:
    policy = dataclasses.replace(DEFAULT, quality_thresholds={"g": percentile_thresholds(sorted(scores))})
    shuffled = random.Random(0).sample(scores, len(scores))
    assert percentile_thresholds(sorted(shuffled)) == policy.quality_thresholds["g"]
    tags = [quality(score, policy=policy) for score in scores]
    assert tags.count("masterpiece") <= 0.05 * len(scores)
    by_score: dict[int, set[str | None]] = {}
    for score, tag in zip(scores, tags, strict=True):
        by_score.setdefault(score, set()).add(tag)
    assert all(len(found) == 1 for found in by_score.values())


def test_ratings() -> None:
    tags = {rating: label_post(Post(rating=rating, score=5), DEFAULT).rating_tags for rating in "gsqe"}
    assert tags == {"g": ("safe",), "s": ("sensitive",), "q": ("nsfw",), "e": ("explicit", "nsfw")}
    assert label_post(Post(rating="e"), DEFAULT).flex_tags == ("explicit", "nsfw")
    assert label_post(Post(rating="sensitive"), DEFAULT).rating_tags == ("sensitive",)
    assert label_post(Post(rating="x"), DEFAULT).rating_tags == ()
    for rating in ("general", None, "x"):
        with pytest.raises(LabelError, match="rating"):
            label_post(Post(rating=rating, score=1), ORIGINAL)


def test_years() -> None:
    found = {year: year_tag(year, DEFAULT) for year in range(2003, 2027)}
    edges = {2005: "oldest", 2010: "oldest", 2011: "early", 2014: "early", 2015: "mid", 2017: "mid",
             2018: "recent", 2020: "recent", 2021: "newest", 2024: "newest"}  # fmt: skip
    assert {year: found[year] for year in edges} == edges
    assert [found[2004], found[2025], year_tag(None, DEFAULT), year_tag(1999, DEFAULT)] == [None] * 4
    assert [year_tag(year, ORIGINAL) for year in (None, 1999, 2004, 2005, 2025)] == ["early"] * 3 + ["oldest", None]
    clamped = dataclasses.replace(DEFAULT, year_before="clamp", year_after="clamp")
    assert [year_tag(year, clamped) for year in (1999, 2030)] == ["oldest", "newest"]


def test_year_as_written() -> None:
    day = parse_date("2020-12-31T23:30:00-05:00")
    assert day is not None
    assert day.year == 2020
    old = parse_date("Wed Jul 01 10:00:00 -0400 2009")
    assert old is not None
    assert old.isoformat() == "2009-07-01T10:00:00-04:00"
    dump = parse_date("2017-03-10 23:30:00.25 UTC")
    assert dump is not None
    assert dump.isoformat() == "2017-03-10T23:30:00.250000+00:00"
    assert [parse_date(text) for text in ("", "soon", "0000-00-00", None, 5)] == [None] * 5


def test_year_source() -> None:
    post = Post(rating="g", score=1, created_year=2022, media_year=2012)
    assert label_post(post, DEFAULT).year == "early"
    only_post = dataclasses.replace(post, media_year=None, created_year=2016)
    assert label_post(only_post, DEFAULT).year == "mid"
    assert label_post(only_post, ORIGINAL).year == "early"  # the fallback, not the post's year


def test_aesthetic_boundaries() -> None:
    above = math.nextafter
    scores = [above(0.71, 1), 0.71, above(0.45, 1), 0.45, above(0.27, 1), 0.27, 0.0]
    words = ["very aesthetic", "aesthetic", "aesthetic", "displeasing", "displeasing", "very displeasing", "very displeasing"]
    assert [aesthetic_tag(score, DEFAULT) for score in scores] == words
    assert aesthetic_tag(0.71, ORIGINAL) == aesthetic_tag(0.45, ORIGINAL) == "very displeasing"
    assert aesthetic_tag(0.2700000107, DEFAULT) == "displeasing"  # 0.27 as a float32, widened
    assert aesthetic_tag(float("nan"), DEFAULT) is None
    assert aesthetic_tag(None, DEFAULT) is None


def test_order_of_groups() -> None:
    post = Post(
        rating="e", score=300, created_year=2019, aesthetic_score=0.9, general=["solo", "1girl", "long_hair"],
        character=["hero"], copyright=["series"], artist=["painter"], meta=["highres"], species=["cat"],
    )  # fmt: skip
    labels = label_post(post, DEFAULT)
    assert labels.fixed_tags == ("1girl", "hero", "series", "painter")
    assert labels.flex_tags == (
        "explicit", "nsfw", "solo", "long hair", "cat", "recent", "highres", "masterpiece", "very aesthetic",
    )  # fmt: skip
    assert label_post(Post(general=["1boy", "1girl", "solo"]), DEFAULT).fixed_tags == ("1boy", "1girl")
    assert len(COUNT_TAGS) == len(set(COUNT_TAGS)) == 23


def test_no_fixed_tag_parses_back() -> None:
    labels = label_post(Post(general=["smile"]), DEFAULT)
    text = render(labels.fixed_tags, labels.flex_tags)
    assert text == ", ||| smile"
    assert split(text) == ([], ["smile"])


def test_meta_blacklist() -> None:
    meta = ["absurdres", "commentary_request", "highres"]
    assert label_post(Post(meta=meta), DEFAULT).flex_tags == ("absurdres", "highres")
    original = label_post(Post(rating="g", score=0, created_year=2012, meta=meta), ORIGINAL)
    assert original.flex_tags == ("safe", "early", "worst quality")
    assert "bad anatomy" in label_post(Post(general=["bad_anatomy"]), DEFAULT).flex_tags


def test_strings() -> None:
    assert [spaced(tag, DEFAULT) for tag in ("^_^", ">_<", "a_b", "a_bc")] == ["^_^", ">_<", "a_b", "a bc"]
    assert spaced("makima_(chainsaw_man)", DEFAULT) == "makima (chainsaw man)"
    kaomoji = dataclasses.replace(DEFAULT, underscore="kaomoji")
    assert spaced("(o)_(o)", DEFAULT) == "(o) (o)"
    assert spaced("(o)_(o)", kaomoji) == "(o)_(o)"
    assert len(KAOMOJI) == 19
    assert label_post(Post(general=["Upper_Case", "é_è_ê"]), DEFAULT).flex_tags == ("Upper Case", "é è ê")


def test_duplicates_and_empty_tags() -> None:
    post = Post(rating="g", score=0, general=["long_hair", "long hair", "", "hero"], character=["hero"], media_year=2012)
    assert label_post(post, DEFAULT).flex_tags == ("safe", "long hair", "early", "worst quality")
    assert label_post(post, ORIGINAL).flex_tags == ("safe", "long hair", "long hair", "", "hero", "early", "worst quality")


def test_banned_artist() -> None:
    post = Post(rating="g", score=1, artist=["banned_artist", "painter"])
    assert label_post(post, DEFAULT).fixed_tags == ("painter",)
    assert label_post(post, ORIGINAL).fixed_tags == ("banned artist", "painter")


def test_aesthetic_skipped_where_the_word_is() -> None:
    post = Post(rating="g", score=1, media_year=2015, general=["traditional_aesthetics"], aesthetic_score=0.9)
    assert label_post(post, DEFAULT).aesthetic == "very aesthetic"
    assert label_post(post, ORIGINAL).aesthetic is None


def test_imported_caption() -> None:
    post = Post(rating="g", caption_fixed=["1girl", "hero"], caption_flex=["smile"])
    labels = label_post(post, DEFAULT)
    assert (labels.fixed_tags, labels.flex_tags) == (("1girl", "hero"), ("safe", "smile"))


def test_a_switch_alone_changes_the_hash() -> None:
    hashes = {preset(name).hash() for name in ("default", "animagine31")}
    hashes |= {dataclasses.replace(DEFAULT, **{name: getattr(ORIGINAL, name)}).hash() for name in (
        "meta_blacklist", "year_source", "year_fallback", "aesthetic_edges", "aesthetic_skip_substring",
        "banned_artist", "missing_rating_or_score", "empty_tags", "duplicate_tags")}  # fmt: skip
    assert len(hashes) == 11
    with pytest.raises(ValueError, match="unknown preset"):
        preset("other")
