"""Vocabularies: captions by hand from each base's published words, a vocabulary of one's own, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from train.base.errors import ExitCode, Halt
from train.config.dataset import AestheticConfig, PolicyConfig, QualityConfig, SourceConfig, YearConfig, YearRange
from train.config.prompts import load_prompts
from train.config.vocabulary import Vocabulary, load_vocabulary
from train.prepare.posts.caption_remarks import CaptionTally
from train.prepare.posts.caption_text import caption_rules, read_caption
from train.prepare.tagging.policy import counted_thresholds, open_words, resolve
from train.prepare.tagging.vectorised import Inputs, label_table
from train.recipe.captions import tags_of
from train.recipe.exclusions import R1_WORDS
from train.recipe.tag_policy import Policy

ROOT = Path(__file__).resolve().parents[2]
R1 = sorted(R1_WORDS)[0]

# One post: 2016, score 120, questionable, aesthetic 0.8.
LISTS = {
    "general": ["1girl", "solo", "smile"], "character": ["hatsune_miku"], "copyright": ["vocaloid"],
    "artist": ["someone"], "meta": ["highres"], "species": [],
}  # fmt: skip


def caption(config: PolicyConfig, score: float = 120, rating: int = 2, year: float = 2016, **change: object) -> str:
    policy = dataclasses.replace(resolve(config), **change)  # type: ignore[arg-type]
    return labelled(LISTS, policy, rating, score, year, 0.8)


def labelled(
    lists: dict[str, list[str]], policy: Policy, rating: int, score: float, year: float, aesthetic: float, told: str | None = None
) -> str:
    """fixed ||| flexible, and ||| tail where there is one, of one post."""
    columns = {f"tags_{name}": pa.array([lists.get(name, [])], pa.list_(pa.string())) for name in LISTS}
    records = pa.table({"key": ["a:1"], "caption": pa.array([told], pa.string()), **columns})
    floats = [np.array([value], float) for value in (score, year, year, np.nan, aesthetic)]
    found = label_table(records, Inputs(np.array([rating]), *floats), policy)
    parts = [", ".join(found[name][0].as_py()) for name in ("fixed_tags", "flex_tags", "tail_tags")]
    return " ||| ".join(parts if parts[2] else parts[:2])


GOLDEN = yaml.safe_load((Path(__file__).parents[1] / "golden/vocabularies/posts.yaml").read_text())


def golden(name: str, post: dict[str, Any]) -> str:
    policy = resolve(PolicyConfig(vocabulary=name))
    if name == "noobai":  # thresholds as the page of posts says
        policy = dataclasses.replace(policy, quality_thresholds={"*": (10, 50, 100, 150)})
    source = SourceConfig(name="a", on_second_separator="tail")
    told = read_caption(post["caption"], caption_rules(source), CaptionTally())[0] if "caption" in post else None
    numbers = [np.nan if post[key] is None else post[key] for key in ("score", "year", "aesthetic")]
    return labelled(post, policy, "gsqe".find(post["rating"] or "-"), *numbers, told)


@pytest.mark.parametrize("name", GOLDEN["captions"])
@pytest.mark.parametrize("post", GOLDEN["posts"])
def test_posts_in_the_words_of_each_base(name: str, post: str) -> None:
    assert golden(name, GOLDEN["posts"][post]) == GOLDEN["captions"][name][post]


def test_every_shipped_vocabulary_has_its_goldens() -> None:
    assert set(GOLDEN["captions"]) == {file.stem for file in (ROOT / "configs/vocabularies").glob("*.yaml")}
    assert all(set(captions) == set(GOLDEN["posts"]) for captions in GOLDEN["captions"].values())


def test_labels_of_animagine31_are_those_of_before() -> None:
    """The hashes that the policies had before vocabularies were data: equal hashes, equal labels, nothing made anew."""
    before = {
        "default": "e73989f244b7fd120f34e942fd0f5121474196ed9ce81c55ee0d1c699872fc8d",
        "animagine31": "c8545591223e40a45990d7a5c68992f0301c0e335ca0e3560bc5bba1658717dc",
    }
    for name in ("default", "animagine31"):
        assert resolve(PolicyConfig(preset=name)).hash() == before[name]  # type: ignore[arg-type]


@pytest.mark.parametrize(("score", "word"), [
    (151, "masterpiece"), (150, "best quality"), (101, "best quality"), (100, "high quality"), (75, "medium quality"),
    (26, "medium quality"), (25, "normal quality"), (1, "normal quality"), (0, "low quality"), (-5, "low quality"),
    (-6, "worst quality"),
])  # fmt: skip
@pytest.mark.parametrize("rating", [0, 3])
def test_absolute_scores_know_no_rating(score: int, word: str, rating: int) -> None:
    assert caption(PolicyConfig(vocabulary="animagine30"), score, rating).endswith(word)


def test_percentiles_of_noobai() -> None:
    """Of the scores 1..100: 96 to 100 masterpiece, 86 to 95 best, 61 to 85 good, 31 to 60 normal, else worst quality."""
    config = PolicyConfig(vocabulary="noobai")
    numbers = np.arange(1, 101)
    thresholds = counted_thresholds(numbers, np.ones(100, int), resolve(config).words.percentiles)
    assert thresholds.tolist() == [30, 60, 85, 95]
    words = {96: "masterpiece", 95: "best quality", 86: "best quality", 85: "good quality", 61: "good quality",
             60: "normal quality", 31: "normal quality", 30: "worst quality", 1: "worst quality"}  # fmt: skip
    for score, word in words.items():
        assert f" {word}," in caption(config, score, quality_thresholds={"*": tuple(thresholds)})


def test_what_a_set_says_wins_over_its_vocabulary() -> None:
    config = PolicyConfig(
        vocabulary="noobai", quality=QualityConfig(source="none"), aesthetic=AestheticConfig(thresholds=[0.7, 0.1]),
        year=YearConfig(ranges=[YearRange("old", 2005, 2017)]),
    )  # fmt: skip
    assert caption(config).endswith("||| nsfw, old, very awa, solo, smile, highres")
    assert "2016" not in caption(dataclasses.replace(config, vocabulary="animagine40", aesthetic=AestheticConfig()))
    # Between the two words of the scorer there is none.
    assert "awa" not in caption(dataclasses.replace(config, aesthetic=AestheticConfig(thresholds=[0.9, 0.1])))


OWN = (ROOT / "docs/vocabularies.md").read_text().split("```yaml\n")[1].split("```")[0]  # the page's, as a reader takes it


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    assert OWN.count("\n") <= 20
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    mine = PolicyConfig(vocabulary=str(path))
    assert caption(mine) == (
        "hatsune miku, 1girl ||| from 2016, solo, smile, vocaloid, someone, highres ||| adult, rating: q, top_1"
    )
    assert caption(mine, score=99.5).endswith(" ||| adult, rating: q")
    assert caption(mine, score=3, rating=1).endswith(" ||| flop")
    assert caption(mine, score=50, rating=1).endswith("someone, highres")  # no tail at all
    assert golden(str(path), GOLDEN["posts"]["told"]) == "my oc ||| from 2021, standing, smile, solo ||| grainy, all ages"
    first = resolve(mine).hash()
    path.write_text(OWN.replace("flop", "worst"))
    assert resolve(mine).hash() != first  # the content, not the name, is the labels' identity


@pytest.mark.parametrize(("old", "new", "told"), [
    ("criterion", "criterium", "unknown key quality.criterium"),
    ("[99.5, 10]", "[10, 99.5]", "quality.cuts must fall"),
    ("[99.5, 10]", "[10]", "3 words need 2 cuts"),
    ("from {year}", "from {yaer}", "time.format"),
    ("series, artist", "series", "order leaves out artist"),
    ("series, artist", "series, count, artist", "order: count"),
    ("{g: [all ages]", "{x: [all ages]", "the ratings are g, s, q, e"),
    ("all ages", '"all, ages"', "no single tag"),
])  # fmt: skip
def test_errors_name_file_and_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(Halt) as halted:
        resolve(PolicyConfig(vocabulary=str(path)))
    assert halted.value.code == ExitCode.USAGE
    assert told in str(halted.value)
    assert str(path) in str(halted.value)


@pytest.mark.parametrize(("old", "new"), [
    ("top_1", R1), ("all ages", R1), ("from {year}", f"{R1} {{year}}"), ("flop", "child"),
    ('"from {year}"', f"null\n  ranges: [{{tag: {R1}, first: 2000, last: 2001}}]"),
])  # fmt: skip
def test_a_word_that_the_hard_exclusions_refuse_is_no_vocabulary_word(tmp_path: Path, old: str, new: str) -> None:
    """A vocabulary's words may stand in the fixed part, whose words the gates take for names."""
    path = tmp_path / "mine.yaml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(Halt, match="one of its words is one that the hard exclusions refuse") as halted:
        resolve(PolicyConfig(vocabulary=str(path)))
    assert halted.value.code == ExitCode.USAGE
    with pytest.raises(Halt, match=r"policy\.year\.ranges"):
        resolve(PolicyConfig(year=YearConfig(ranges=[YearRange(R1, 2000, 2001)])))


def test_what_does_not_fit_a_vocabulary_is_refused_by_its_key() -> None:
    for config, told in (
        (PolicyConfig(vocabulary="nobai"), "policy.vocabulary"),
        (PolicyConfig(vocabulary="none.yaml"), "none.yaml does not exist"),
        (PolicyConfig(vocabulary="noobai", quality=QualityConfig(source="table")), "policy.quality.source"),
        (PolicyConfig(vocabulary="animagine30", quality=QualityConfig(source="empirical")), "policy.quality.source"),
        (PolicyConfig(vocabulary="pony", aesthetic=AestheticConfig(thresholds=[0.5])), "policy.aesthetic.thresholds"),
    ):
        with pytest.raises(Halt, match=told):
            resolve(config)


def test_what_a_vocabulary_leaves_open_is_said() -> None:
    assert open_words(PolicyConfig()) == []
    assert [note.split()[1] for note in open_words(PolicyConfig(vocabulary="noobai"))] == ["time", "aesthetic"]
    assert [note.split()[1] for note in open_words(PolicyConfig(vocabulary="animagine40"))] == ["quality", "aesthetic"]


def test_thresholds_of_another_scorer_are_said(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    text = (Path(__file__).parents[2] / "configs/vocabularies/animagine31.yaml").read_text()
    file.write_text(text.replace("  scorer: null", "  scorer: one"))
    own = PolicyConfig(vocabulary=str(file))
    assert open_words(own, "one") == open_words(own) == []
    assert "thresholds are of one, and score.model is two" in open_words(own, "two")[0]
    assert open_words(dataclasses.replace(own, aesthetic=AestheticConfig([0.7, 0.5, 0.3])), "two") == []


PROMPTS = {"animagine31": "", "animagine30": "animagine_3_0/", "animagine40": "animagine_4_0/"}


@pytest.mark.parametrize("name", GOLDEN["captions"])
def test_prompts_of_each_base_are_in_its_own_words(name: str) -> None:
    """Sampler, CFG, prefix and negative of its own, the last two told by their keys; no quality or rating word of another base."""
    files = sorted((ROOT / "configs" / PROMPTS.get(name, f"{name}/")).glob("prompts*.yaml"))
    assert files
    own, others = (load_vocabulary(other) for other in (name, "animagine31"))
    every = {word for other in GOLDEN["captions"] for word in _words_of(load_vocabulary(other))}
    known = _words_of(own) or _words_of(others)  # illustrious has none of its own
    for file in files:
        said = yaml.safe_load(file.read_text())
        assert {"sampler", "steps", "guidance", "quality_prefix", "negative"} <= set(said), file
        settings = load_prompts(file)
        used = {tag for text in (settings.quality_prefix, *(prompt.text for prompt in settings.prompts)) for tag in tags_of(text)}
        assert used & every <= known, file
        for line in file.read_text().splitlines():
            if line.split(":")[0] in ("sampler", "steps", "guidance"):
                assert "#" in line, "a number says where it comes from"


def _words_of(vocabulary: Vocabulary) -> set[str]:
    return {*filter(None, vocabulary.quality.words), *(word for words in vocabulary.rating.values() for word in words)}
