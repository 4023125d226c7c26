"""The hard exclusions: which records a rule leaves out, and that nothing brings one back.

Only the bare words of the rules occur here.
"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.dataset import DatasetConfig, ExcludeConfig
from train.recipe import exclusions
from train.recipe.exclusions import EXCLUSIONS_VERSION, R1_WORDS, R2_QUALIFIERS, R2_TAGS, R2_WORDS, excluded_by


@pytest.mark.parametrize("word", sorted(R1_WORDS))
@pytest.mark.parametrize("rating", ["g", "s", "q", "e", None])
def test_rule_1_at_any_rating(word: str, rating: str | None) -> None:
    assert excluded_by(rating=rating, tags=["1girl", word], assume_rating="g") == "R1"
    assert excluded_by(rating=rating, tags=[f"x_{word}_(y)"], assume_rating="g") == "R1"
    assert excluded_by(rating=rating, tags=[], caption=f"a drawing, {word}", assume_rating="g") == "R1"


@pytest.mark.parametrize("word", sorted(R1_WORDS))
def test_rule_1_in_quotes_and_as_an_owner(word: str) -> None:
    for written in (f"'{word}'", f"['x', '{word}']", f"{word}'s x", f"1{word}", f"{word[:2]}\u034f{word[2:]}"):
        assert excluded_by(rating="g", tags=[written]) == "R1", written
        assert excluded_by(rating="g", tags=[], caption=written) == "R1", written


def test_an_apostrophe_inside_a_word_parts_nothing() -> None:
    assert excluded_by(rating="e", tags=["baby's_breath"]) is None  # a flower


@pytest.mark.parametrize("word", sorted(R2_WORDS | R2_TAGS))
def test_rule_2_by_rating(word: str) -> None:
    for rating in ("q", "e", "questionable", "explicit", None, "unknown"):
        assert excluded_by(rating=rating, tags=[word]) == "R2"
    for rating in ("g", "s", "general", "sensitive", "safe"):
        assert excluded_by(rating=rating, tags=[word]) is None
    assert excluded_by(rating=None, tags=[word], assume_rating="g") is None
    assert excluded_by(rating="q", tags=[], caption=f"a picture, {word.replace('_', ' ')} ||| b") == "R2"


@pytest.mark.parametrize("word", sorted(R2_QUALIFIERS))
def test_rule_2_by_qualifier(word: str) -> None:
    assert excluded_by(rating="e", tags=[], characters=[f"hero_({word})"]) == "R2"
    assert excluded_by(rating="e", tags=[], characters=[f"hero_({word})_(title)"]) == "R2"
    assert excluded_by(rating="g", tags=[], characters=[f"hero_({word})"]) is None
    assert excluded_by(rating="e", tags=[], characters=[f"{word}_hero"]) is None  # names are not split


@pytest.mark.parametrize("says", ["nsfw", "explicit", "questionable", "rating:explicit", "(nsfw:1.2)"])
def test_own_tags_count_as_a_rating(says: str) -> None:
    assert excluded_by(rating="g", tags=["kid", says]) == "R2"
    assert excluded_by(rating="s", tags=["kid"], caption=says) == "R2"
    assert excluded_by(rating=None, tags=["kid", says], assume_rating="s") == "R2"
    assert excluded_by(rating="g", tags=["kid"]) is None


@pytest.mark.parametrize(
    "written", ["KID", "ｋｉｄ", "(kid:1.3)", "((kid))", "\\(kid\\)", "[kid]", "k\u200bid", "kid-x", "x:kid", "x/kid.y", "&#107;id",
                "'kid'", "['1girl', 'kid']", "1kid", "kid2", "k\u034fid", "k\ufe0fid", "ki\u3164d", "k\u0336i\u0336d\u0336", "k\U000e0101id"]
)  # fmt: skip
def test_one_word_many_spellings(written: str) -> None:
    assert excluded_by(rating="q", tags=[written]) == "R2"


def test_japanese_words_stand_without_spaces() -> None:
    assert excluded_by(rating="g", tags=[], caption="ロリ巨乳") == "R1"
    assert excluded_by(rating="g", tags=["ﾛﾘ"]) == "R1"
    assert excluded_by(rating="g", tags=["グロリア", "ロリータ"]) is None


def test_names_and_longer_words_stay() -> None:
    kept = ["lolita_fashion", "hololive", "hololive_english", "childish", "kidnapped", "babydoll", "lollipop"]
    assert excluded_by(rating="e", tags=kept, characters=["lolita_(title)", "kid_icarus"]) is None


def test_cub_depends_on_the_site() -> None:
    assert excluded_by(rating="g", tags=["cub"], e621=True) == "R1"
    assert excluded_by(rating="g", tags=["cub"]) is None
    assert excluded_by(rating="e", tags=["cub"]) == "R2"
    assert excluded_by(rating="e", tags=["tiger_cub"]) is None  # exactly, outside of that site


@given(st.lists(st.text(max_size=12), max_size=6), st.sampled_from(["g", "s", "q", "e", None]))
def test_more_tags_never_bring_a_record_back(tags: list[str], rating: str | None) -> None:
    assert excluded_by(rating=rating, tags=[*tags, "loli"], assume_rating="g") == "R1"


def test_the_lists_only_grow() -> None:
    assert EXCLUSIONS_VERSION >= 1
    assert len(R1_WORDS) >= 14
    assert len(R2_WORDS) >= 20
    assert len(R2_TAGS) >= 8
    assert len(R2_QUALIFIERS) >= 6


def test_no_config_key_reaches_them() -> None:
    """The only config value the rules read is a source's declared rating."""
    parameters = set(inspect.signature(excluded_by).parameters)
    assert parameters == {"rating", "tags", "characters", "caption", "assume_rating", "e621"}
    assert {field.name for field in dataclasses.fields(ExcludeConfig)} == {"deleted", "banned", "tags"}
    assert not any("hard" in field.name for field in dataclasses.fields(DatasetConfig))
    assert "settings" not in inspect.getsource(exclusions)
