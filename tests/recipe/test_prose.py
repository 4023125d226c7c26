"""Sentences are told from lists of tags; what could be either is read as tags."""

from __future__ import annotations

import pytest

from train.recipe.prose import parted, prose_reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A girl, a boy, and a dog.", "ended"),
        ("The girl stands in a field, looking up at the sky. She is smiling.", "ended"),
        ('A sign says "open", and the door is closed.', "ended"),
        ("a girl with red hair standing on the beach, looking at viewer", "wordy"),
        ("少女が傘を持って立っている。", "eastern"),
    ],
)
def test_sentences(text: str, reason: str) -> None:
    assert prose_reason(text) == reason
    assert parted(text) == ("", text)


@pytest.mark.parametrize(
    "text",
    [
        "1girl, solo, looking at viewer, hand on own hip, standing on one leg, love live!",
        "The Legend of Zelda, Link, male focus, K-On!", "the legend of zelda: breath of the wild", "is the order a rabbit?",
        "1girl, gochuumon wa usagi desu ka?, smile", "holding_a_cat, the_girl_is_a_cat_and_a_dog", "", "...", "smile", "!?", "a, b, c, d, e, f",
        "1girl, dr. stone, mr. x, d.va, re:zero kara hajimeru isekai seikatsu", "Masterpiece, Best Quality, 1girl, A-line dress.",
    ],
)  # fmt: skip
def test_tags(text: str) -> None:
    assert prose_reason(text) is None
    assert parted(text) == (text, "")


def test_a_line_of_both_is_parted_where_one_ends() -> None:
    told = "A girl is standing on the beach, smiling. The sky is blue."
    assert parted(f"1girl, solo, long hair, {told}") == ("1girl, solo, long hair", told)
    assert parted(f"{told} 1girl, solo, long hair, smile, hat, bag, looking at viewer, blue sky") == (
        "1girl, solo, long hair, smile, hat, bag, looking at viewer, blue sky", told,
    )  # fmt: skip
