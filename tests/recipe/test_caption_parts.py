"""Captions of four parts: what an epoch shows of them, and that no part of one is cut, shuffled or lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from train.base.errors import Halt
from train.recipe.captions import (
    KINDS,
    Caption,
    Drawn,
    DrawOptions,
    draw,
    draw_captions,
    protect_identity,
    protected,
    read_stored,
    read_variant,
    stored,
    written_variant,
)

PROSE = ["A girl stands in the rain, holding an umbrella.", "She smiles, and the sky is grey."]
FULL = Caption(["1girl", "miku"], list("abcdefgh"), ["masterpiece"], PROSE)


def one(caption: Caption, options: DrawOptions, uid: int = 1, epoch: int = 0) -> Drawn:
    return draw_captions([caption], options, seed=7, uids=[uid], epochs=[epoch], update=0)[0]


def test_sentences_and_tails_are_whole_and_in_place_in_every_draw_of_20_epochs() -> None:
    seen = set()
    for epoch in range(20):
        drawn = one(FULL, DrawOptions(tag_dropout=0.5), epoch=epoch)
        assert drawn.after in (["masterpiece", PROSE[0]], ["masterpiece", PROSE[1]])
        assert drawn.fixed == ["1girl", "miku"] and set(drawn.flex) <= set("abcdefgh")
        seen.add(drawn.text)
    assert seen == {0, 1}, "each of several texts has its turn"


def test_shares_of_a_mix_by_chi_square() -> None:
    mix = {"tags": 50, "tags_prose": 30, "prose": 20}
    found = Counter(one(FULL, DrawOptions(mix=mix), uid, epoch).kind for uid in range(200) for epoch in range(20))
    expected = {kind: 4000 * share / 100 for kind, share in mix.items()}
    assert sum((found[kind] - expected[kind]) ** 2 / expected[kind] for kind in KINDS) < 13.8  # p = 0.001, 2 degrees
    assert {one(FULL, DrawOptions(mix={"prose": 1}), uid).flex == [] for uid in range(50)} == {True}


def test_a_kind_that_a_picture_lacks_gives_what_there_is() -> None:
    only_prose = Caption(prose=PROSE)
    assert one(only_prose, DrawOptions(mix={"tags": 1})).after == PROSE[one(only_prose, DrawOptions()).text :][:1]
    tags = Caption(["x"], ["a"])
    assert one(tags, DrawOptions(mix={"prose": 1})) == Drawn(["x"], ["a"], [], [])


def test_without_further_parts_the_draw_is_that_of_tags_alone() -> None:
    for epoch in range(5):
        plain = draw(["x"], list("abcdefgh"), DrawOptions(tag_dropout=0.3), seed=7, uid=3, epoch=epoch, update=0)
        drawn = one(Caption(["x"], list("abcdefgh")), DrawOptions(tag_dropout=0.3, mix={"tags": 1, "prose": 5}), 3, epoch)
        assert (drawn.fixed, drawn.flex) == plain
        assert one(FULL, DrawOptions(tag_dropout=0.3), 3, epoch).flex == plain[1], "prose changes no shuffle"


@pytest.mark.parametrize("options", [{"tag_dropout": 0.99}, {"warmup_min": 1, "warmup_updates": 100}])
def test_protected_tags_are_never_dropped(options: dict[str, float]) -> None:
    drawn = [one(FULL, DrawOptions(protect=frozenset("ch"), **options), uid).flex for uid in range(200)]  # type: ignore[arg-type]
    assert all({"c", "h"} <= set(flex) for flex in drawn)
    assert min(map(len, drawn)) < 8


def test_the_trigger_opens_every_caption_once_and_no_dropped_one() -> None:
    assert one(FULL, DrawOptions(trigger="mark")).fixed == ["mark", "1girl", "miku"]
    assert one(FULL, DrawOptions(trigger="miku")).fixed == ["1girl", "miku"]
    assert one(FULL, DrawOptions(trigger="mark", mix={"prose": 1})).fixed == ["mark"]
    dropped = one(FULL, DrawOptions(trigger="mark", caption_dropout_every_epochs=1))
    assert (dropped.fixed, dropped.flex, dropped.after) == ([], [], [])


def test_each_of_several_captions_of_tags_has_its_turn() -> None:
    caption = Caption([], ["a"], variants=[(["x"], ["b"], ["t"])])
    found = {(*d.fixed, *d.flex, *d.after) for d in (one(caption, DrawOptions(), epoch=epoch) for epoch in range(20))}
    assert found == {("a",), ("x", "b", "t")}


def test_stored_captions_are_read_back() -> None:
    assert stored([("1girl, ||| smile", [])], []) == "1girl, ||| smile", "as version 1 stored it"
    text = stored([("1girl, ||| smile", ["best", "new"]), ("2girls", [])], PROSE)
    assert read_stored(text) == ([(["1girl"], ["smile"], ["best", "new"]), ([], ["2girls"], [])], PROSE)
    assert read_stored(stored([], PROSE)) == ([([], [], [])], PROSE)
    assert read_variant(written_variant((["a", "b"], [], ["c"]))) == (["a", "b"], [], ["c"])


def test_protected_tags_of_a_list_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kept.txt"
    file.write_text("\ufefflong_hair\n\n hat,\r\n", encoding="utf-8")
    assert protected(str(file)) == protected(["long_hair", "hat"]) == {"long_hair", "long hair", "hat"}
    caption = Caption(["1girl"], ["long hair", *"abcdefgh", "hat"])
    for epoch in range(20):
        drawn = one(caption, DrawOptions(tag_dropout=0.9, protect=protected(str(file))), epoch=epoch)
        assert {"long hair", "hat"} <= set(drawn.flex)
    assert protect_identity(["hat"]) is None, "a list stands in the config"
    before = protect_identity(str(file))
    file.write_text("hat\nlong_hair")
    assert protect_identity(str(file)) == before
    file.write_text("hat")
    assert protect_identity(str(file)) != before
    for bad in (str(tmp_path / "none.txt"), [1], {"a": 1}):
        with pytest.raises(Halt, match=r"data\.protect"):
            protected(bad)  # type: ignore[arg-type]
