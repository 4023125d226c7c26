"""`scripts/show.py keys` and docs/keys.md: what is said of a key, where it is declared."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import MISSING

from train.base.errors import ExitCode, Halt
from train.config.key import range_problems
from train.config.schema import all_keys, fits, keys_of, plainly
from train.tools.show.keys import FILES, markdown, report

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_schema_says() -> None:
    assert (ROOT / "docs/keys.md").read_text() == markdown(), "scripts/show.py keys --markdown > docs/keys.md"


@pytest.mark.parametrize(("file", "schema"), FILES)
def test_every_key_says_what_it_means_and_holds_a_default_within_its_range(file: str, schema: type) -> None:
    found = keys_of(schema)
    sections = {key for key in all_keys(schema) if any(other.startswith((f"{key}.", f"{key}[]")) for other in all_keys(schema))}
    assert set(all_keys(schema)) - set(found) <= sections, "a key without `key(...)`"
    for key, one in found.items():
        assert one.said.meaning.strip(), key
        if one.default != MISSING:
            assert fits(one.hint, plainly(one.default)), key
            assert list(range_problems(one.said, plainly(one.default), key)) == []


def test_a_pattern_picks_keys_of_all_files() -> None:
    assert set(report("noise.off*")["stage"]) == {"noise.offset", "noise.offset_adaptive"}
    assert set(report("separator")) == {"stage", "dataset"}
    assert report("seed")["stage"]["seed"] == {
        "default": "must be set", "values": "a whole number, at least 0",
        "meaning": "of order, captions, noise and timesteps", "resume": "refuse",
    }  # fmt: skip
    assert list(report("prompts.guidance")) == ["prompts"]
    with pytest.raises(Halt, match="no key fits 'noise_offset'") as halt:
        report("noise_offset")
    assert halt.value.code == ExitCode.USAGE
