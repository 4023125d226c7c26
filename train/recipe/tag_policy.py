"""The tagging policy for one post: metadata in, two lists of tags out. Standard library only.

`fixed_tags` (count, characters, copyrights, artists) open the caption in this order; `flex_tags` (rating, the
remaining general tags, year, meta, quality, aesthetic) follow the separator and are shuffled in training. The
vectorised form of the dataset preparation is tested against this file, post by post.

Sources: words and ranges of the special tags: model card of Animagine XL 3.1. Score table: KohakuBlueleaf/HakuBooru,
credited there. Preset `animagine31`: behaviour of the original labelling functions, bugs included.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Literal

POLICY_VERSION = 1

COUNT_TAGS = (
    "1girl", "2girls", "3girls", "4girls", "5girls", "6+girls", "multiple_girls",
    "1boy", "2boys", "3boys", "4boys", "5boys", "6+boys", "multiple_boys", "male_focus",
    "1other", "2others", "3others", "4others", "5others", "6+others", "multiple_others", "other_focus",
)  # fmt: skip
META_BLACKLIST = (  # substrings
    "(medium)", "commentary", "bad", "translat", "request", "mismatch", "revision", "audio", "video",
)  # fmt: skip
RATING_TAGS = {"g": ("safe",), "s": ("sensitive",), "q": ("nsfw",), "e": ("explicit", "nsfw")}  # card
RATING_WORDS = {"general": "g", "safe": "g", "sensitive": "s", "questionable": "q", "explicit": "e"}
QUALITY_TAGS = (  # card; the last has no threshold
    "masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality", "worst quality",
)  # fmt: skip
AESTHETIC_TAGS = ("very aesthetic", "aesthetic", "displeasing", "very displeasing")  # card
PERCENTILES = (10, 25, 50, 75, 85, 95)
# Highest score of worst, low, normal, good, great, best; above the last: masterpiece.
QUALITY_TABLES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "full": {
        "g": (1, 3, 7, 14, 19, 33), "s": (1, 4, 9, 20, 31, 62),
        "q": (4, 9, 23, 49, 73, 134), "e": (4, 13, 35, 78, 115, 211),
    },
    "after_5m": {
        "g": (1, 4, 8, 17, 23, 38), "s": (4, 13, 24, 48, 67, 118),
        "q": (9, 24, 52, 98, 136, 228), "e": (11, 28, 63, 124, 174, 296),
    },
}  # fmt: skip
YEAR_RANGES = (  # card; never `old`, which is a real general tag
    ("oldest", 2005, 2010), ("early", 2011, 2014), ("mid", 2015, 2017), ("recent", 2018, 2020), ("newest", 2021, 2024),
)  # fmt: skip
KAOMOJI = frozenset((  # list of the WD tagger
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
    "o_o", "u_u", "x_x", "|_|", "||_||",
))  # fmt: skip
POOLED = "*"  # group whose thresholds stand in for small groups

_COUNT_SET = frozenset(COUNT_TAGS)


class LabelError(ValueError):
    """A post that the preset refuses to label."""


@dataclass(frozen=True)
class Policy:
    """Every switch, resolved. The defaults are the preset `default`; `preset()` gives the others."""

    meta_blacklist: Literal["per_tag", "whole_group"] = "per_tag"
    year_source: Literal["media_or_post", "media"] = "media_or_post"
    year_fallback: Literal["none", "early"] = "none"
    aesthetic_edges: Literal["lower_bin", "very_displeasing"] = "lower_bin"
    aesthetic_skip_substring: bool = False
    banned_artist: Literal["drop", "keep"] = "drop"
    missing_rating_or_score: Literal["omit", "raise"] = "omit"
    rating_words: Literal["accept", "raise"] = "accept"
    empty_tags: Literal["remove", "keep"] = "remove"
    duplicate_tags: Literal["first", "all"] = "first"
    quality: bool = True
    # Thresholds by group: a rating ("g"), a rating and a year ("g/2020"), or POOLED.
    quality_thresholds: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: QUALITY_TABLES["full"])
    quality_by_year: bool = False
    quality_min_age_days: int = 0
    year_ranges: tuple[tuple[str, int, int], ...] = YEAR_RANGES
    year_before: Literal["none", "clamp"] = "none"
    year_after: Literal["none", "clamp"] = "none"
    aesthetic_thresholds: tuple[float, float, float] = (0.71, 0.45, 0.27)  # card
    underscore: Literal["len3", "kaomoji"] = "len3"

    def hash(self) -> str:
        """sha256 over version and switches; equal hashes give equal labels."""
        text = json.dumps([POLICY_VERSION, asdict(self)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def preset(name: str) -> Policy:
    """`default` (bugs fixed) or `animagine31` (the released labels, bug for bug)."""
    if name == "default":
        return Policy()
    if name != "animagine31":
        raise ValueError(f"unknown preset {name!r}")
    return replace(
        Policy(),
        meta_blacklist="whole_group", year_source="media", year_fallback="early",
        aesthetic_edges="very_displeasing", aesthetic_skip_substring=True, banned_artist="keep",
        missing_rating_or_score="raise", rating_words="raise", empty_tags="keep", duplicate_tags="all",
    )  # fmt: skip


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
    if rating in RATING_WORDS and policy.rating_words == "accept":
        return RATING_WORDS[rating]
    if policy.missing_rating_or_score == "raise" or (rating in RATING_WORDS and policy.rating_words == "raise"):
        raise LabelError(f"rating is {rating!r}, expected one of g, s, q, e")
    return None


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


def thresholds_of(rating: str, year: int | None, policy: Policy) -> tuple[float, ...] | None:
    """The six thresholds of a group, else the pooled ones, else None."""
    group = f"{rating}/{year}" if policy.quality_by_year else rating
    return policy.quality_thresholds.get(group) or policy.quality_thresholds.get(POOLED)


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


def year_tag(year: int | None, policy: Policy) -> str | None:
    """The year tag, None outside of the ranges unless the policy clamps or falls back."""
    first, last = policy.year_ranges[0], policy.year_ranges[-1]
    if policy.year_fallback == "early" and (year is None or year < first[1]):
        return "early"
    if year is None:
        return None
    if year < first[1]:
        return first[0] if policy.year_before == "clamp" else None
    if year > last[2]:
        return last[0] if policy.year_after == "clamp" else None
    return next((tag for tag, start, end in policy.year_ranges if start <= year <= end), None)


def aesthetic_tag(score: float | None, policy: Policy) -> str | None:
    """The aesthetic tag of a classifier's probability; None for a missing score or NaN."""
    if score is None or math.isnan(score):
        return None
    high, middle, low = policy.aesthetic_thresholds
    if policy.aesthetic_edges == "very_displeasing" and score in (high, middle):
        return AESTHETIC_TAGS[3]  # the original compares with > and < only, so both edges fall through
    if score > high:
        return AESTHETIC_TAGS[0]
    if score > middle:
        return AESTHETIC_TAGS[1]
    return AESTHETIC_TAGS[2] if score > low else AESTHETIC_TAGS[3]


def keep_meta(tags: Sequence[str], policy: Policy) -> list[str]:
    """Meta tags without the blacklisted ones; `whole_group` drops all of them at one hit."""
    if policy.meta_blacklist == "whole_group":
        text = ", ".join(tags)
        return [] if any(word in text for word in META_BLACKLIST) else list(tags)
    return [tag for tag in tags if not any(word in tag for word in META_BLACKLIST)]


def keep_artists(tags: Iterable[str], policy: Policy) -> list[str]:
    """Artists without markers such as `banned_artist`."""
    return [tag for tag in tags if policy.banned_artist == "keep" or "banned" not in tag]


def spaced(tag: str, policy: Policy) -> str:
    """The tag as written in a caption: underscores become spaces in tags longer than three characters."""
    if len(tag) <= 3 or (policy.underscore == "kaomoji" and tag in KAOMOJI):
        return tag
    return tag.replace("_", " ")


def _clean(fixed: list[str], flex: list[str], policy: Policy) -> tuple[list[str], list[str]]:
    if policy.empty_tags == "remove":
        fixed, flex = ([tag for tag in group if tag.strip()] for group in (fixed, flex))
    if policy.duplicate_tags == "first":
        fixed = list(dict.fromkeys(fixed))
        present = set(fixed)
        flex = [tag for tag in dict.fromkeys(flex) if tag not in present]
    return fixed, flex


def parse_date(text: object) -> datetime | None:
    """A date as sources write it, in its own offset: ISO, with a space and `UTC`, or `Wed Jul 01 10:00:00 -0400 2009`.

    None when it cannot be read.
    """
    if not isinstance(text, str):
        return None
    text = text.strip()
    compact = re.sub(r"\s*UTC$", "+00:00", text)
    compact = re.sub(r"\s+([+-]\d\d:?\d\d)$", r"\1", compact)
    try:
        return datetime.fromisoformat(compact)
    except ValueError:
        pass
    try:
        return datetime.strptime(text, "%a %b %d %H:%M:%S %z %Y")
    except ValueError:
        return None
