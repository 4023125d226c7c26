"""The tagging policy for one post, as one reads it: the oracle of the vectorised form that preparation uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.recipe.tag_policy import (
    COUNT_TAGS,
    META_BLACKLIST,
    PERCENTILES,
    QUALITY_TAGS,
    RATING_TAGS,
    RATING_WORDS,
    LabelError,
    Policy,
    aesthetic_tag,
    keep_artists,
    spaced,
    thresholds_of,
    year_tag,
)

_COUNT_SET = frozenset(COUNT_TAGS)


@dataclass(frozen=True)
class Post:
    """What the policy reads of one record; tags as in the source, underscored."""

    rating: str | None = None
    score: float | None = None
    created_year: int | None = None
    media_year: int | None = None
    age_days: int | None = None  # only needed with quality_min_age_days
    aesthetic_score: float | None = None
    general: Sequence[str] = ()
    character: Sequence[str] = ()
    copyright: Sequence[str] = ()
    artist: Sequence[str] = ()
    meta: Sequence[str] = ()
    species: Sequence[str] = ()
    caption_fixed: Sequence[str] = ()  # of an imported caption, before its separator
    caption_flex: Sequence[str] = ()


@dataclass(frozen=True)
class Labels:
    """The two lists of a caption, and the special tags among them."""

    fixed_tags: tuple[str, ...]
    flex_tags: tuple[str, ...]
    quality: str | None
    rating_tags: tuple[str, ...]
    year: str | None
    aesthetic: str | None


def label_post(post: Post, policy: Policy) -> Labels:
    """Label one post.

    Raises LabelError where the policy says so (preset `animagine31`: missing rating or score, rating as a word).
    """
    rating = rating_of(post.rating, policy)
    year_number = media_or_post_year(post.media_year, post.created_year, policy)
    quality = quality_tag(post.score, rating, year_number, post.age_days, policy)
    year = year_tag(year_number, policy)
    ratings = RATING_TAGS[rating] if rating else ()
    fixed = [
        *post.caption_fixed,
        *(tag for tag in post.general if tag in _COUNT_SET),
        *post.character,
        *post.copyright,
        *keep_artists(post.artist, policy),
    ]
    flex = [
        *ratings,
        *post.caption_flex,
        *(tag for tag in post.general if tag not in _COUNT_SET),
        *post.species,
        *([year] if year else []),
        *keep_meta(post.meta, policy),
        *([quality] if quality else []),
    ]
    fixed, flex = ([spaced(tag, policy) for tag in group] for group in (fixed, flex))
    aesthetic = aesthetic_tag(post.aesthetic_score, policy)
    if policy.aesthetic_skip_substring and "aesthetic" in ", ".join(fixed + flex):
        aesthetic = None
    if aesthetic:
        flex.append(aesthetic)
    fixed, flex = _clean(fixed, flex, policy)
    return Labels(tuple(fixed), tuple(flex), quality, ratings, year, aesthetic)


def rating_of(rating: str | None, policy: Policy) -> str | None:
    """`g`, `s`, `q`, `e` or None for a missing or unknown rating."""
    if rating in RATING_TAGS:
        return rating
    if policy.missing_rating_or_score == "raise":
        raise LabelError(f"rating is {rating!r}, expected one of g, s, q, e")
    return RATING_WORDS.get(rating or "")


def quality_tag(
    score: float | None, rating: str | None, year: int | None, age_days: int | None, policy: Policy
) -> str | None:
    """The quality tag of a score within its rating, or None where one of them is missing."""
    if not policy.quality:
        return None
    if score is None or (isinstance(score, float) and math.isnan(score)):
        if policy.missing_rating_or_score == "raise":
            raise LabelError("score is missing")
        return None
    too_young = policy.quality_min_age_days > 0 and age_days is not None and age_days < policy.quality_min_age_days
    if rating is None or too_young:
        return None
    thresholds = thresholds_of(rating, year, policy)
    if thresholds is None:
        return None
    for tag, threshold in zip(QUALITY_TAGS, reversed(thresholds), strict=False):
        if score > threshold:
            return tag
    return QUALITY_TAGS[-1]


def percentile_thresholds(sorted_scores: Sequence[float]) -> tuple[float, ...]:
    """The smallest value v with count(x <= v) / n >= p / 100 for each percentile, in integer arithmetic.

    With the strict rule `score > threshold` at most 5 % are masterpiece and equal scores are never parted.
    """
    n = len(sorted_scores)
    return tuple(sorted_scores[-(-p * n // 100) - 1] for p in PERCENTILES)


def media_or_post_year(media_year: int | None, created_year: int | None, policy: Policy) -> int | None:
    """Year of the media asset; of the post where that is missing and the policy allows it."""
    if media_year is None and policy.year_source == "media_or_post":
        return created_year
    return media_year


def keep_meta(tags: Sequence[str], policy: Policy) -> list[str]:
    """Meta tags without the blacklisted ones; `whole_group` drops all of them at one hit."""
    if policy.meta_blacklist == "whole_group":
        text = ", ".join(tags)
        return [] if any(word in text for word in META_BLACKLIST) else list(tags)
    return [tag for tag in tags if not any(word in tag for word in META_BLACKLIST)]


def _clean(fixed: list[str], flex: list[str], policy: Policy) -> tuple[list[str], list[str]]:
    if policy.empty_tags == "remove":
        fixed, flex = ([tag for tag in group if tag.strip()] for group in (fixed, flex))
    if policy.duplicate_tags == "first":
        fixed = list(dict.fromkeys(fixed))
        present = set(fixed)
        flex = [tag for tag in dict.fromkeys(flex) if tag not in present]
    return fixed, flex
