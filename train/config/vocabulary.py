"""A vocabulary: the words, criteria and order of captions that one base was trained with; `configs/vocabularies/`.

It says what the tags are called and when a picture gets them. How records with flaws are treated are the switches of
`policy.preset`, which go with any vocabulary.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from train.base.errors import ExitCode, Halt
from train.config import shipped
from train.config.key import key
from train.config.schema import load_into
from train.config.sound import judged

PARTS = ("count", "character", "series", "artist", "general", "meta", "rating", "quality", "time", "aesthetic")
TABLE_WORDS = 7  # what the score tables tell apart


@dataclass(frozen=True)
class QualityWords:
    """Quality tags and what earns them."""

    words: list[str] = key(list, "best first; an empty text = pictures of that class get no tag")
    criterion: Literal["table", "percentile", "absolute", "none"] = key("none", "table = fixed scores by rating; percentile = of the set's scores within the rating; absolute = the score itself")
    cuts: list[float] = key(list, "a score above the first earns the first word, and so on: percentiles, or scores of `absolute`; one fewer than words")


@dataclass(frozen=True)
class TimeRange:
    """Posts of the years first..last get `tag`."""

    tag: str = key("", "the word")
    first: int = key(0, "first year of its posts")
    last: int = key(0, "last year of its posts")


@dataclass(frozen=True)
class TimeWords:
    """Tags of a post's year: by ranges, or written by a format."""

    ranges: list[TimeRange] = key(list, "rising, without overlap")
    format: str | None = key(None, "text with {year} in it, in the place of ranges")


@dataclass(frozen=True)
class AestheticWords:
    """Aesthetic tags; thresholds belong to one scorer."""

    words: list[str] = key(list, "best first; an empty text = pictures of that class get no tag")
    thresholds: list[float] = key(list, "falling, one fewer than words; empty = not known: no tags without policy.aesthetic.thresholds", at_least=0, at_most=1)
    scorer: str | None = key(None, "the model whose scores these are")


@dataclass(frozen=True)
class OrderWords:
    """Where each part of a caption stands; a part that is left out is not written."""

    fixed: list[str] = key(lambda: ["count", "character", "series", "artist"], "in this order before the separator")
    flexible: list[str] = key(lambda: ["rating", "general", "time", "meta", "quality", "aesthetic"], "after it, shuffled in training")
    tail: list[str] = key(list, "after the flexible part, never shuffled")


@dataclass(frozen=True)
class Vocabulary:
    """Every key of a vocabulary's file."""

    quality: QualityWords = field(default_factory=QualityWords)
    rating: dict[str, list[str]] = key(dict, "tags of g, s, q and e; one that is left out gets none")
    time: TimeWords = field(default_factory=TimeWords)
    aesthetic: AestheticWords = field(default_factory=AestheticWords)
    order: OrderWords = field(default_factory=OrderWords)

    @property
    def best_first(self) -> list[str]:
        """Its words by kind, each kind from its best down: quality, the first of each rating, time from the newest, aesthetic."""
        ratings, times = [tags[0] for tags in self.rating.values() if tags], [one.tag for one in reversed(self.time.ranges)]
        return [word for word in (*self.quality.words, *ratings, *times, *self.aesthetic.words) if word]


@cache
def shipped_vocabularies() -> tuple[Vocabulary, ...]:
    """Those of configs/vocabularies, Animagine XL 3.1's first."""
    names = sorted((file.stem for file in (shipped.folder() / "vocabularies").glob("*.yaml")), key=lambda name: (name != "animagine31", name))
    return tuple(map(load_vocabulary, names))


def load_vocabulary(name: str) -> Vocabulary:
    """The shipped vocabulary of that name, or the file.

    Raises Halt(USAGE) naming the file and the key.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        folder = shipped.folder() / "vocabularies"
        path = folder / f"{name}.yaml"
        if "/" in name or not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise Halt(ExitCode.USAGE, f"policy.vocabulary is {name!r}: one of {known}, or a .yaml file of your own")
    elif not path.is_file():
        raise Halt(ExitCode.USAGE, f"policy.vocabulary: {path} does not exist")
    try:
        return load_into(Vocabulary, [path], (), (_problems,))
    except Halt as halt:
        raise Halt(halt.code, f"vocabulary {path}: {halt}") from halt


def _problems(vocabulary: Vocabulary) -> Iterator[str]:
    yield from judged(vocabulary, _RULES)


def _cuts(vocabulary: Vocabulary) -> str | None:
    quality = vocabulary.quality
    if quality.criterion == "none":
        return None
    if quality.criterion == "table" and len(quality.words) != TABLE_WORDS:
        return f"quality.words: the tables tell {TABLE_WORDS} classes apart, these are {len(quality.words)} words"
    if (quality.criterion != "table" or quality.cuts) and len(quality.cuts) != len(quality.words) - 1:
        return f"quality.cuts: {len(quality.words)} words need {len(quality.words) - 1} cuts, these are {len(quality.cuts)}"
    if any(a <= b for a, b in itertools.pairwise(quality.cuts)):
        return "quality.cuts must fall"
    outside = quality.criterion != "absolute" and any(not 0 < cut < 100 for cut in quality.cuts)
    return "quality.cuts are percentiles, so between 0 and 100" if outside else None


def _time(vocabulary: Vocabulary) -> str | None:
    time = vocabulary.time
    if time.format is not None:
        both = "; ranges and format exclude each other" if time.ranges else ""
        plain = time.format.replace("{year}", "", 1)
        return f"time.format must hold {{year}} once and no other braces{both}" if both or "{year}" not in time.format or set(plain) & set("{}") else None
    falling = any(r.first > r.last or not r.tag for r in time.ranges)
    falling |= any(a.last >= b.first for a, b in itertools.pairwise(time.ranges))
    return "time.ranges need a tag each and must rise without overlap" if falling else None


def _aesthetic(vocabulary: Vocabulary) -> str | None:
    aesthetic = vocabulary.aesthetic
    if not aesthetic.thresholds:
        return None
    if len(aesthetic.thresholds) != len(aesthetic.words) - 1:
        return f"aesthetic.thresholds: {len(aesthetic.words)} words need {len(aesthetic.words) - 1} of them"
    return "aesthetic.thresholds must fall" if any(a <= b for a, b in itertools.pairwise(aesthetic.thresholds)) else None


def _order(vocabulary: Vocabulary) -> str | None:
    named = [*vocabulary.order.fixed, *vocabulary.order.flexible, *vocabulary.order.tail]
    wrong = [part for part, count in Counter(named).items() if part not in PARTS or count > 1]
    missing = [part for part in PARTS[:6] if part not in named]
    if wrong:
        return f"order: {', '.join(wrong)}: each part once, they are {', '.join(PARTS)}"
    return f"order leaves out {', '.join(missing)}: a picture's own tags are never dropped" if missing else None


def _texts(vocabulary: Vocabulary) -> str | None:
    ratings = [word for words in vocabulary.rating.values() for word in words]
    words = [*vocabulary.quality.words, *ratings, *vocabulary.aesthetic.words, vocabulary.time.format or ""]
    bad = [w for w in [*words, *(r.tag for r in vocabulary.time.ranges)] if w != w.strip() or set(w) & set(",\n\0") or "|||" in w]
    return f"{bad[0]!r} is no single tag: no comma, separator, line break or space around it" if bad else None


_RULES: tuple[Callable[[Vocabulary], str | None], ...] = (
    _cuts, _time, _aesthetic, _order, _texts,
    lambda v: None if set(v.rating) <= set("gsqe") else f"rating: {', '.join(sorted(set(v.rating) - set('gsqe')))}: the ratings are g, s, q, e",
)  # fmt: skip
