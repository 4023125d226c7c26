"""The hard exclusions over rows of the table `records`: what a gate after ingest reads of one, and what it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from train.config.dataset import DatasetConfig
from train.recipe.exclusions import excluded_match

_TAG_LISTS = ("tags_general", "tags_meta", "tags_species")
SEEN_COLUMNS = ("source", "rating", *_TAG_LISTS, "tags_character", "caption")


def refused_by(row: Mapping[str, Any], settings: DatasetConfig, tags: Iterable[str] = ()) -> tuple[str, str] | None:
    """(rule, word) of a row with SEEN_COLUMNS and further `tags`, None where no rule refuses it."""
    source = next((source for source in settings.sources if source.name == row["source"]), None)
    return excluded_match(
        rating=row["rating"], tags=[*(tag for name in _TAG_LISTS for tag in row[name]), *tags],
        characters=row["tags_character"], caption=row["caption"],
        assume_rating=source.assume_rating if source else None, e621=source is not None and source.adapter == "e621",
    )  # fmt: skip
