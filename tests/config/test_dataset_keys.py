"""The dataset config: everything that is wrong with it, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.base.errors import ExitCode, Halt
from train.config.dataset import load_settings

ROOT = Path(__file__).resolve().parents[2]


def refusal(*overrides: str) -> str:
    with pytest.raises(Halt) as caught:
        load_settings([ROOT / "configs/dataset.yaml"], overrides)
    assert caught.value.code == ExitCode.USAGE
    return caught.value.message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["workers=-1", "seed=x", "sources.0.keep_tokens=-1", "dedupe.phash_distance=5", "policy=3"],
         ["workers is -1, must be at least 0", "seed is 'x'", "keep_tokens is -1", "in [0, 4]", "policy must hold keys"]),
        (["buckets.step_px=12", "latents.batch=0", "tag.source=wd", "exclude.tags=[' ']"],
         ["buckets.step_px is 12, must be a multiple of 8", "latents.batch is 0", "tag.source: wd needs", "empty tag"]),
        (["sources=[1, {name: a, adapter: sidecar, keep_tokens: 2, caption_ext: .json}]"],
         ["sources[0] must hold keys and values", "missing value for sources[1].path"]),
        (["select={a: {quota: {by: x, shares: {g: y}, totl: 3}}}"],
         ["select.a.quota.shares.g is 'y'", "did you mean select.a.quota.total?", "missing value for select.a.quota.total"]),
        (["select={a: {quota: {by: x, shares: {g: 0.5, s: 0.7}, total: 0}}}"],
         ["select.a.quota.total is 0, must be at least 1", "shares are parts of 1"]),
        (["select={1: {repeats: 2}}"], ["the name 1 must be text"]),
        (["policy.year.ranges=[{tag: a}]"], ["policy.year.ranges[0].first, policy.year.ranges[0].last"]),
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_told_at_once(overrides: list[str], told: list[str]) -> None:
    message = refusal(*overrides)
    assert [words for words in told if words not in message] == [], message


def test_a_key_that_went_is_passed_over_where_it_said_nothing(tmp_path: Path) -> None:
    """A copy of the dataset.yaml of before has it with null."""
    path = tmp_path / "d.yaml"
    text = "name: d\nsources: [{name: a, adapter: sidecar, path: x}]\npolicy: {rating_words: %s, preset: animagine31}\n"
    path.write_text(text % "null")
    assert load_settings([path]).policy.preset == "animagine31"
    path.write_text(text % "raise")
    with pytest.raises(Halt, match=r"policy\.rating_words is 'raise', and is no key any more: ingest reads letters and words"):
        load_settings([path])
