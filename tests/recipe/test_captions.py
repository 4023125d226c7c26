"""Splitting, drawing and writing captions: the trainer's measured examples and the properties of a draw."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.recipe import rng
from train.recipe.captions import DrawOptions, draw, draw_many, join, render, split
from train.recipe.schedule import steps_of

tag = (
    st.text(st.sampled_from("abc (:)_|-é"), min_size=1, max_size=6)
    .map(str.strip)
    .filter(lambda text: text and "|||" not in text)
)
# "|" at the end of the fixed part or the start of the flex part is kept apart by the spaces that render writes
tags = st.lists(tag, max_size=8)
u64s = st.integers(0, 2**64 - 1)
PLAIN = DrawOptions(shuffle=False)


@pytest.mark.parametrize(
    ("text", "fixed", "flex"),
    [
        ("1girl, miku, vocaloid ||| smile, outdoors", ["1girl", "miku", "vocaloid"], ["smile", "outdoors"]),
        (", ||| smile, outdoors", [], ["smile", "outdoors"]),
        ("1girl,miku|||smile", ["1girl", "miku"], ["smile"]),
        ("1girl, smile,, outdoors,", [], ["1girl", "smile", "outdoors"]),
        ("1girl, miku, |||", ["1girl", "miku"], []),
        ("|||", [], []),
        ("", [], []),
        (" , ,", [], []),
        ("a || b", [], ["a || b"]),
    ],
)
def test_split_examples(text, fixed, flex):
    assert split(text) == (fixed, flex)


def test_the_separator_is_a_setting_and_only_its_first_place_counts():
    assert split("a, b ;; c", ";;") == (["a", "b"], ["c"])
    assert split("a ;; b ;; c", ";;") == (["a"], ["b ;; c"])  # refused at ingest; the first place decides


def test_two_texts_and_never_a_third():
    fixed, flex = split("1girl, miku, vocaloid ||| smile, outdoors")
    drawn = {
        join([tag for part in draw(fixed, flex, DrawOptions(), seed=31, uid=7, epoch=epoch, update=0) for tag in part])
        for epoch in range(64)
    }
    assert drawn == {"1girl, miku, vocaloid, smile, outdoors", "1girl, miku, vocaloid, outdoors, smile"}


@settings(max_examples=100, deadline=None)
@given(tags, tags)
def test_what_is_written_reads_back(fixed, flex):
    assert split(render(fixed, flex)) == (fixed, flex)


def test_written_form():
    assert render(["1girl", "miku"], ["smile"]) == "1girl, miku, ||| smile"
    assert render([], ["smile", "outdoors"]) == ", ||| smile, outdoors"


@settings(max_examples=100, deadline=None)
@given(tags, tags, u64s, st.integers(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_a_draw_never_touches_fixed_tags_nor_invents_any(fixed, flex, uid, epoch, tag_p, caption_p):
    options = DrawOptions(tag_dropout=tag_p, caption_dropout=caption_p)
    got = draw(fixed, flex, options, seed=31, uid=uid, epoch=epoch, update=0)
    assert got == draw(fixed, flex, options, seed=31, uid=uid, epoch=epoch, update=0)
    if got != ([], []):
        assert got[0] == fixed
    for one in got[1]:
        assert got[1].count(one) <= flex.count(one)


@settings(max_examples=50, deadline=None)
@given(tags, tags, u64s, st.integers(0, 100))
def test_shuffle_alone_is_the_generators_shuffle(fixed, flex, uid, epoch):
    got = draw(fixed, flex, DrawOptions(), seed=31, uid=uid, epoch=epoch, update=0)
    assert got == (fixed, rng.shuffled(flex, 31, uid, epoch))
    assert draw(fixed, flex, PLAIN, seed=31, uid=uid, epoch=epoch, update=0) == (fixed, flex)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(tags, tags, u64s, st.integers(0, 100)), max_size=6),
    st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.4]), st.booleans(),
)  # fmt: skip
def test_the_images_of_a_tile_get_what_each_would_get_alone(images, tag_p, caption_p, shuffle):
    options = DrawOptions(shuffle=shuffle, tag_dropout=tag_p, caption_dropout=caption_p, warmup_updates=9)
    captions, uids, epochs = [(a, b) for a, b, _, _ in images], [i[2] for i in images], [i[3] for i in images]
    together = draw_many(captions, options, seed=31, uids=uids, epochs=epochs, update=4)
    assert together == [
        draw(fixed, flex, options, seed=31, uid=uid, epoch=epoch, update=4) for fixed, flex, uid, epoch in images
    ]


def test_known_shuffle_reaches_the_caption():
    uid = rng.uid_of("danbooru:6814120")
    assert "".join(draw([], list("abcdefgh"), DrawOptions(), seed=31, uid=uid, epoch=0, update=0)[1]) == "aedhgbfc"


@settings(max_examples=50, deadline=None)
@given(u64s, st.integers(0, 50), st.floats(0.05, 0.95))
def test_dropped_tags_do_not_depend_on_the_shuffle(uid, epoch, share):
    flex = [f"tag {number}" for number in range(20)]
    same = {"seed": 31, "uid": uid, "epoch": epoch, "update": 0}
    shuffled = draw([], flex, DrawOptions(tag_dropout=share), **same)[1]
    plain = draw([], flex, DrawOptions(shuffle=False, tag_dropout=share), **same)[1]
    assert sorted(shuffled) == sorted(plain)
    assert plain == sorted(plain, key=flex.index)
    assert shuffled == [tag for tag in rng.shuffled(flex, 31, uid, epoch) if tag in plain]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_happens_as_often_as_asked(share):
    images, flex = 2000, list("abcdefghij")
    spread = 4 * math.sqrt(share * (1 - share))
    options = DrawOptions(shuffle=False, tag_dropout=share)
    kept = [draw(["x"], flex, options, seed=31, uid=uid, epoch=0, update=0)[1] for uid in range(images)]
    for one in flex:
        dropped = sum(one not in tags for tags in kept) / images
        assert abs(dropped - share) < spread / math.sqrt(images)
    whole = DrawOptions(caption_dropout=share)
    empty = sum(draw(["x"], flex, whole, seed=31, uid=uid, epoch=0, update=0) == ([], []) for uid in range(images))
    assert abs(empty / images - share) < spread / math.sqrt(images)


def test_dropout_of_one_drops_everything():
    assert draw(["x"], ["a", "b"], DrawOptions(tag_dropout=1), seed=1, uid=1, epoch=0, update=0) == (["x"], [])
    assert draw(["x"], ["a", "b"], DrawOptions(caption_dropout=1), seed=1, uid=1, epoch=0, update=0) == ([], [])


@pytest.mark.parametrize(("every", "empty"), [(0, []), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5])])
def test_every_nth_epoch_has_no_captions(every, empty):
    options = DrawOptions(caption_dropout_every_epochs=every)
    drawn = [draw(["x"], ["a"], options, seed=1, uid=1, epoch=epoch, update=0) for epoch in range(6)]
    assert [epoch for epoch, tags in enumerate(drawn) if tags == ([], [])] == empty


@pytest.mark.parametrize(("update", "kept"), [(0, 1), (50, 5), (99, 9), (100, 10), (5000, 10)])
def test_token_warmup_keeps_the_first_tags(update, kept):
    flex = list("abcdefghij")
    options = DrawOptions(shuffle=False, warmup_min=1, warmup_updates=100)
    assert draw([], flex, options, seed=1, uid=1, epoch=0, update=update)[1] == flex[:kept]
    shuffling = DrawOptions(warmup_min=1, warmup_updates=100)  # the cut comes before the shuffle
    assert sorted(draw([], flex, shuffling, seed=1, uid=1, epoch=0, update=update)[1]) == flex[:kept]


def test_token_warmup_never_cuts_below_its_minimum():
    options = DrawOptions(shuffle=False, warmup_min=3, warmup_updates=10)
    for update in range(12):
        assert draw([], ["a", "b"], options, seed=1, uid=1, epoch=0, update=update)[1] == ["a", "b"]


@pytest.mark.parametrize(("steps", "updates"), [(0, 0), (0.05, 4549), (0.5, 45_495), (1, 1), (100, 100)])
def test_warmup_below_one_is_a_share_of_all_updates(steps, updates):
    assert steps_of(steps, 90_990) == updates
