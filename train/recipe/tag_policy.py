"""The tagging policy: words, thresholds, switches, and what each tag is made of. Standard library only.

`fixed_tags` (count, characters, copyrights, artists) open the caption in this order; `flex_tags` (rating, the
remaining general tags, year, meta, quality, aesthetic) follow the separator and are shuffled in training; what a
vocabulary puts into the tail follows them and is never shuffled. Preparation puts them together over whole tables
(`prepare/tagging/vectorised.py`); the tests do it post by post.

Sources: words and ranges of the special tags: model card of Animagine XL 3.1. Score table: KohakuBlueleaf/HakuBooru,
credited there. Preset `animagine31`: behaviour of the original labelling functions, bugs included.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
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


class LabelError(ValueError):
    """A post that the preset refuses to label."""


@dataclass(frozen=True)
class Words:
    """The words and the order of a caption, as a vocabulary says them; the defaults are Animagine XL 3.1's."""

    quality: tuple[str, ...] = QUALITY_TAGS  # best first; "" = posts of that class get no tag
    percentiles: tuple[float, ...] = PERCENTILES  # rising, one fewer than the words
    rating: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: RATING_TAGS)
    year_format: str | None = None  # `year {year}`; None = by ranges
    aesthetic: tuple[str, ...] = AESTHETIC_TAGS  # best first; "" as above
    fixed: tuple[str, ...] = ("count", "character", "series", "artist")
    flexible: tuple[str, ...] = ("rating", "general", "time", "meta", "quality", "aesthetic")
    tail: tuple[str, ...] = ()


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
    aesthetic_thresholds: tuple[float, ...] = (0.71, 0.45, 0.27)  # card; falling, empty = no aesthetic tags
    underscore: Literal["len3", "kaomoji"] = "len3"
    words: Words = field(default_factory=Words)

    def hash(self) -> str:
        """sha256 over version, switches and words; equal hashes give equal labels."""
        content = asdict(self)
        # A switch that nothing read, of before ingest made letters of rating words; labels of then are still these.
        content["rating_words"] = "raise" if self.missing_rating_or_score == "raise" else "accept"
        if self.words == Words():  # labels of before there were vocabularies are still these
            del content["words"]
        elif not self.words.tail:  # nor did a vocabulary have a tail
            del content["words"]["tail"]
        text = json.dumps([POLICY_VERSION, content], sort_keys=True, separators=(",", ":"))
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
        missing_rating_or_score="raise", empty_tags="keep", duplicate_tags="all",
    )  # fmt: skip


def thresholds_of(rating: str, year: int | None, policy: Policy) -> tuple[float, ...] | None:
    """The rising thresholds of a group, else the pooled ones, else None."""
    group = f"{rating}/{year}" if policy.quality_by_year else rating
    return policy.quality_thresholds.get(group) or policy.quality_thresholds.get(POOLED)


def year_tag(year: int | None, policy: Policy) -> str | None:
    """The year tag, None outside of the ranges unless the policy clamps or falls back."""
    if policy.words.year_format is not None:
        return None if year is None else policy.words.year_format.format(year=year)
    if not policy.year_ranges:
        return None
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
    words, thresholds = policy.words.aesthetic, policy.aesthetic_thresholds
    if score is None or math.isnan(score) or not thresholds:
        return None
    # The original compares with > and < only, so the upper edges of its middle words fall through to the last.
    if policy.aesthetic_edges == "very_displeasing" and score in thresholds[:-1]:
        return words[-1] or None
    return next((word for word, least in zip(words, thresholds, strict=False) if score > least), words[-1]) or None


def keep_artists(tags: Iterable[str], policy: Policy) -> list[str]:
    """Artists without markers such as `banned_artist`."""
    return [tag for tag in tags if policy.banned_artist == "keep" or "banned" not in tag]


def spaced(tag: str, policy: Policy) -> str:
    """The tag as written in a caption: underscores become spaces in tags longer than three characters."""
    if len(tag) <= 3 or (policy.underscore == "kaomoji" and tag in KAOMOJI):
        return tag
    return tag.replace("_", " ")


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
