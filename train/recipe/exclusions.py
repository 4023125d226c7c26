"""Hard exclusions: records whose tags sexualise minors never enter a training set. Standard library only.

Always on: no switch, no allow list, no override. The same function stands at three gates: ingest, selection and the
index writer. The lists are constants with a version that enters the dataset fingerprint; they may only grow.

R1, any rating: a general, meta, species or uncategorised tag, or the caption, contains one of R1_WORDS.
R2, rating q or e: one of R2_WORDS, or exactly one of R2_TAGS, or a character name with one of R2_QUALIFIERS.
A record whose own tags or caption say so counts as q or e; one without any rating too, unless its source declares
one. Names of artists, copyrights and (save for the qualifiers) characters are not split into words.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

EXCLUSIONS_VERSION = 2  # 2: quotes, digits and what is not seen hide no word

R1_WORDS = frozenset(
    ["loli", "lolis", "lolicon", "lolidom", "lolibaba", "shota", "shotas", "shotacon", "shotadom", "toddlercon",
     "ロリ", "ロリコン", "ショタ", "ショタコン"]
)  # fmt: skip
R1_WORDS_E621 = frozenset(["cub"])
R2_WORDS = frozenset(
    ["child", "children", "kid", "kids", "toddler", "toddlers", "baby", "babies", "infant", "infants", "newborn",
     "preschool", "preschooler", "kindergarten", "kindergartener", "elementary", "preteen", "preteens", "underage",
     "young"]
)  # fmt: skip
R2_TAGS = frozenset(
    ["aged_down", "age_regression", "randoseru", "mesugaki", "cub", "middle_schooler", "middle_school_student",
     "junior_high_school_student"]
)  # fmt: skip
R2_QUALIFIERS = frozenset(["child", "young", "kid", "toddler", "baby", "infant"])
RATING_WORDS = frozenset(["nsfw", "explicit", "questionable"])

_QE = frozenset(["q", "e", "questionable", "explicit"])
_GS = frozenset(["g", "s", "general", "sensitive", "safe"])
# Apostrophes stay inside words; digits and every other sign of punctuation part them, quotes around a word too.
# Katakana is written without spaces, so a run of it is a word.
_LETTERS = r"[^\W\d_ァ-ヺー]+"
_PARTS = re.compile(rf"[ァ-ヺー]+|\d+|{_LETTERS}(?:'{_LETTERS})*")
_UNSEEN = frozenset(["Cf", "Mn", "Me", "Cn", "Co"])  # categories of what takes no room of its own, or is no letter
_FILLERS = "\u115f\u1160"  # letters by category, and blank
_WEIGHT = re.compile(r":\s*[+-]?\d*\.?\d+(?=\s*[)\]>])")
_QUALIFIER = re.compile(r"\(\s*([^()]*?)\s*\)")
_RULE_WORDS = R1_WORDS | R1_WORDS_E621 | R2_WORDS | RATING_WORDS
_PHRASES = frozenset(tuple(tag.split("_")) for tag in R2_TAGS)


def excluded_by(
    *,
    rating: str | None,
    tags: Iterable[str],
    characters: Iterable[str] = (),
    caption: str | None = None,
    assume_rating: str | None = None,
    e621: bool = False,
) -> str | None:
    """The id of the rule that excludes a record, `R1` or `R2`, or None.

    `tags`: general, meta, species, tagger output, and every tag of a source that has no categories.
    `characters`: character names of a source that has. `caption`: an imported caption, read as uncategorised.
    `rating`: g, s, q, e or its word; None or unknown counts as q or e unless the source declares `assume_rating`.
    """
    match = excluded_match(
        rating=rating, tags=tags, characters=characters, caption=caption, assume_rating=assume_rating, e621=e621
    )
    return match[0] if match else None


def excluded_match(
    *,
    rating: str | None,
    tags: Iterable[str],
    characters: Iterable[str] = (),
    caption: str | None = None,
    assume_rating: str | None = None,
    e621: bool = False,
) -> tuple[str, str] | None:
    """As `excluded_by`, with the word that matched: what the report counts, in numbers only."""
    seen = [marks for marks in map(tag_marks, tags) if marks is not None]
    if caption:
        seen.append(text_marks(caption))
    first_rule = R1_WORDS | R1_WORDS_E621 if e621 else R1_WORDS
    for words, _ in seen:
        if hit := words & first_rule:
            return "R1", min(hit)
    explicit = any(words & RATING_WORDS for words, _ in seen)
    if not (explicit or _counts_as_explicit(rating, assume_rating)):
        return None
    for words, exact in seen:
        if hit := (words & R2_WORDS) | exact:
            return "R2", min(hit)
    for name in characters:
        if hit := name_qualifiers(name):
            return "R2", min(hit)
    return None


def _counts_as_explicit(rating: str | None, assume_rating: str | None) -> bool:
    if rating in _QE:
        return True
    return rating not in _GS and assume_rating not in _GS


@lru_cache(maxsize=1 << 18)
def tag_marks(tag: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """Words of a tag, and the exact tags of R2 that it is; None where no rule reads any of them."""
    words = _words(tag)
    exact = _exact(words, whole=True)
    return (frozenset(words), exact) if exact or not _RULE_WORDS.isdisjoint(words) else None


def text_marks(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Words of a text, and the exact tags of R2 that occur in it, written with spaces or underscores."""
    words = _words(text)
    return frozenset(words), _exact(words, whole=False)


@lru_cache(maxsize=1 << 18)
def name_qualifiers(name: str) -> frozenset[str]:
    """The qualifiers of R2 that stand in brackets in a character name."""
    found = (" ".join(_words(part)) for part in _QUALIFIER.findall(_plain(name)))
    return R2_QUALIFIERS & frozenset(found)


def _exact(words: tuple[str, ...], *, whole: bool) -> frozenset[str]:
    if whole:
        return frozenset(["_".join(words)]) if words in _PHRASES else frozenset()
    hits = (
        phrase for phrase in _PHRASES
        if any(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))
    )  # fmt: skip
    return frozenset("_".join(phrase) for phrase in hits)


def _words(text: str) -> tuple[str, ...]:
    found = _PARTS.findall(_plain(text))
    return tuple(owner if (owner := word.removesuffix("'s")) in R1_WORDS else word for word in found)


def _plain(text: str) -> str:
    """NFKC, lower case, without escapes, weights, invisible characters, and marks that no letter is written with."""
    text = unicodedata.normalize("NFKC", html.unescape(text).replace("\\", "")).lower()
    if not text.isascii():
        text = "".join(c for c in text if unicodedata.category(c) not in _UNSEEN and c not in _FILLERS)
    return _WEIGHT.sub("", text)
