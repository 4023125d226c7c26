"""The tagging policy over a table: each distinct tag is looked at once, the rest is arithmetic on its number.

Equal to labelling post by post, as `tests/support/onepost.py` does; a property test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from train.recipe.captions import Tags as Told
from train.recipe.captions import read_stored, written_variant
from train.recipe.tag_policy import (
    COUNT_TAGS,
    META_BLACKLIST,
    RATING_TAGS,
    LabelError,
    Policy,
    keep_artists,
    spaced,
    thresholds_of,
    year_tag,
)

_RATINGS = tuple(RATING_TAGS)
TokenCount = Callable[[str], int]


class Vocabulary:
    """Numbers for the tags of one table, as written in captions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.numbers: dict[str, int] = {}

    def number(self, tag: str) -> int:
        """Number of a raw tag's written form."""
        return self.numbers.setdefault(spaced(tag, self.policy), len(self.numbers))

    def word(self, word: str) -> int:
        """Number of a word of the policy's, which is written as it stands: `score_9` keeps its underscore."""
        return self.numbers.setdefault(word, len(self.numbers))

    def texts(self) -> list[str]:
        """The written forms in the order of their numbers."""
        return list(self.numbers)


@dataclass
class Tags:
    """Tags of many rows: `rows` int64[n] rising, `tags` int64[n] numbers in a Vocabulary."""

    rows: np.ndarray
    tags: np.ndarray

    def where(self, mask: np.ndarray) -> Tags:
        """Those of the tags where the mask is set."""
        return Tags(self.rows[mask], self.tags[mask])


@dataclass
class Inputs:
    """What the policy reads of the records that no list column holds; float64[n] with NaN for a missing value."""

    rating: np.ndarray  # int64[n], number in g s q e, -1 for none
    score: np.ndarray
    created_year: np.ndarray
    media_year: np.ndarray
    age_days: np.ndarray
    aesthetic: np.ndarray


def label_table(
    records: pa.Table, inputs: Inputs, policy: Policy, count_tokens: TokenCount | None = None
) -> dict[str, pa.Array]:
    """Columns fixed_tags, flex_tags, quality, rating_tags, year, aesthetic, n_tokens, tail_tags, prose, tag_variants.

    A further caption of tags is labelled as the first one is. Raises LabelError naming the first key that the policy refuses.
    """
    _refuse_missing(records, inputs, policy)
    told = [read_stored(text) if text else ([], []) for text in records["caption"].to_pylist()]
    columns = _tag_columns(records, [tags[0] if tags else ([], [], []) for tags, _ in told], inputs, policy, count_tokens)
    prose = pa.array([texts for _, texts in told], pa.list_(pa.string()))
    return columns | {"prose": prose, "tag_variants": _variants(records, [tags for tags, _ in told], inputs, policy)}


def _variants(records: pa.Table, told: Sequence[Sequence[Told]], inputs: Inputs, policy: Policy) -> pa.Array:
    """list<string>: every caption of tags but the first, labelled, in its written form."""
    found: list[list[str]] = [[] for _ in told]
    for number in range(1, max(map(len, told), default=0)):
        rows = np.array([row for row, tags in enumerate(told) if len(tags) > number], np.int64)
        mine = Inputs(**{name: values[rows] for name, values in vars(inputs).items()})
        columns = _tag_columns(records.take(pa.array(rows)), [told[row][number] for row in rows.tolist()], mine, policy, None)
        parts = (columns[name].to_pylist() for name in ("fixed_tags", "flex_tags", "tail_tags"))
        for row, fixed, flex, tail in zip(rows.tolist(), *parts, strict=True):
            found[row].append(written_variant((fixed, flex, tail)))
    return pa.array(found, pa.list_(pa.string()))


def _tag_columns(
    records: pa.Table, told: Sequence[Told], inputs: Inputs, policy: Policy, count_tokens: TokenCount | None
) -> dict[str, pa.Array]:
    """What `label_table` says of one caption of tags a row."""
    vocabulary = Vocabulary(policy)
    year_number = inputs.media_year
    if policy.year_source != "media":
        year_number = np.where(np.isnan(inputs.media_year), inputs.created_year, inputs.media_year)
    words = policy.words
    quality = _words(words.quality, _quality(inputs, year_number, policy))
    years = _words(*_years(year_number, policy))
    parts = _parts(records, told, policy, vocabulary)
    ratings = [list(words.rating.get(letter, ())) for letter in _RATINGS] + [[]]
    places = range(max(map(len, ratings)))
    parts["rating"] = merged(
        [
            _special(_words([dict(enumerate(tags)).get(place) for tags in ratings[:-1]], inputs.rating), vocabulary)
            for place in places
        ]
    )
    parts["time"], parts["quality"] = _special(years, vocabulary), _special(quality, vocabulary)
    number = _aesthetic(inputs.aesthetic, policy)
    if policy.aesthetic_skip_substring:
        hit = np.array(["aesthetic" in text for text in vocabulary.texts()], bool)
        for part in parts.values():
            number[part.rows[hit[part.tags]]] = -1
    aesthetic = _words(words.aesthetic, number)
    parts["aesthetic"] = _special(aesthetic, vocabulary)
    fixed, flex, tail = _clean(_lists(parts, policy), policy, vocabulary)
    size, texts = len(records), vocabulary.texts()
    return {
        "fixed_tags": _list_array(fixed, texts, size),
        "flex_tags": _list_array(flex, texts, size),
        "quality": pa.array(quality, pa.string()),
        "rating_tags": pa.array([ratings[code] for code in inputs.rating.tolist()], pa.list_(pa.string())),
        "year": pa.array(years, pa.string()),
        "aesthetic": pa.array(aesthetic, pa.string()),
        "n_tokens": _n_tokens((fixed, flex, tail), texts, size, count_tokens),
        "tail_tags": _list_array(tail, texts, size),
    }


def _refuse_missing(records: pa.Table, inputs: Inputs, policy: Policy) -> None:
    if policy.missing_rating_or_score != "raise":
        return
    for name, missing in (("rating", inputs.rating < 0), ("score", np.isnan(inputs.score) & policy.quality)):
        if missing.any():
            key = records["key"][int(np.argmax(missing))].as_py()
            raise LabelError(f"{key} has no {name}")


def _quality(inputs: Inputs, year: np.ndarray, policy: Policy) -> np.ndarray:
    """Number among the quality words, -1 for none."""
    result = np.full(len(inputs.score), -1)
    usable = (inputs.rating >= 0) & ~np.isnan(inputs.score)
    if policy.quality_min_age_days > 0:
        usable &= ~(inputs.age_days < policy.quality_min_age_days)
    if not policy.quality:
        return result
    year_codes = np.where(np.isnan(year) | (not policy.quality_by_year), -1, year).astype(np.int64)
    for code, letter in enumerate(_RATINGS):
        mine = usable & (inputs.rating == code)
        for number in np.unique(year_codes[mine]).tolist():
            thresholds = thresholds_of(letter, None if number == -1 else number, policy)
            group = mine & (year_codes == number)
            if thresholds is not None:
                above = np.searchsorted(np.asarray(thresholds, np.float64), inputs.score[group], side="left")
                result[group] = len(thresholds) - above
    return result


def _years(year: np.ndarray, policy: Policy) -> tuple[list[str], np.ndarray]:
    """(year tags, number of each row's among them or -1)."""
    distinct, codes = np.unique(np.where(np.isnan(year), -1e9, year), return_inverse=True)
    tags = [year_tag(None if value == -1e9 else int(value), policy) for value in distinct.tolist()]
    names = list(dict.fromkeys(tag for tag in tags if tag))
    return names, np.array([names.index(tag) if tag else -1 for tag in tags], np.int64)[codes]


def _aesthetic(score: np.ndarray, policy: Policy) -> np.ndarray:
    """Number among the aesthetic words, -1 for none."""
    if not policy.aesthetic_thresholds:
        return np.full(len(score), -1)
    falling = np.asarray(policy.aesthetic_thresholds, np.float64)
    result = len(falling) - np.searchsorted(falling[::-1], score, side="left")
    if policy.aesthetic_edges == "very_displeasing":
        result[np.isin(score, falling[:-1])] = len(falling)
    return np.where(np.isnan(score), -1, result)


def _parts(records: pa.Table, told: Sequence[Told], policy: Policy, vocabulary: Vocabulary) -> dict[str, Tags]:
    """Tags of each part of a caption that the record itself has, in written order, before cleaning."""
    fixed_text, flex_text, tail_text = _captions(told, vocabulary)
    general, is_count = _group(records, "general", vocabulary, set(COUNT_TAGS).__contains__)
    artist, kept = _group(records, "artist", vocabulary, lambda tag: bool(keep_artists([tag], policy)))
    meta, bad = _group(records, "meta", vocabulary, lambda tag: any(word in tag for word in META_BLACKLIST))
    if policy.meta_blacklist == "whole_group":
        bad = np.isin(meta.rows, meta.rows[bad])
    plain = {name: _group(records, name, vocabulary)[0] for name in ("character", "copyright", "species")}
    return {
        "caption_fixed": fixed_text,
        "caption_tail": tail_text,
        "count": general.where(is_count),
        "character": plain["character"],
        "series": plain["copyright"],
        "artist": artist.where(kept),
        "general": merged([flex_text, general.where(~is_count), plain["species"]]),
        "meta": meta.where(~bad),
    }


def _lists(parts: dict[str, Tags], policy: Policy) -> tuple[Tags, Tags, Tags]:
    """(fixed, flex, tail) in the vocabulary's order; the fixed tags of an imported caption lead, so do those of its tail."""
    fixed = merged([parts["caption_fixed"], *(parts[name] for name in policy.words.fixed)])
    tail = merged([parts["caption_tail"], *(parts[name] for name in policy.words.tail)])
    return fixed, merged([parts[name] for name in policy.words.flexible]), tail


def _group(
    records: pa.Table, name: str, vocabulary: Vocabulary, test: Callable[[str], bool] | None = None
) -> tuple[Tags, np.ndarray]:
    """(tags of one list column, mask of those whose raw form passes the test)."""
    column = records[f"tags_{name}"].combine_chunks()
    rows = np.repeat(np.arange(len(column)), column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    encoded = column.flatten().dictionary_encode()
    raw = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    numbers = np.array([vocabulary.number(tag) for tag in raw], np.int64)
    passed = np.array([test(tag) if test else True for tag in raw], bool)
    return Tags(rows, numbers[codes]), passed[codes]


def _captions(told: Sequence[Told], vocabulary: Vocabulary) -> tuple[Tags, Tags, Tags]:
    """(fixed, flex, tail) of the imported captions."""
    found: tuple[list[tuple[int, int]], ...] = ([], [], [])
    for row, lists in enumerate(told):
        for pairs, tags in zip(found, lists, strict=True):
            pairs += [(row, vocabulary.number(tag)) for tag in tags]
    fixed, flex, tail = (np.array(pairs, np.int64).reshape(-1, 2) for pairs in found)
    return Tags(fixed[:, 0], fixed[:, 1]), Tags(flex[:, 0], flex[:, 1]), Tags(tail[:, 0], tail[:, 1])


def _words(names: Sequence[str | None], numbers: np.ndarray) -> list[str | None]:
    table = [*(name or None for name in names), None]
    return [table[number] for number in numbers.tolist()]


def _special(words: Sequence[str | None], vocabulary: Vocabulary) -> Tags:
    """At most one tag per row."""
    numbers = np.array([-1 if word is None else vocabulary.word(word) for word in words], np.int64)
    rows = np.flatnonzero(numbers >= 0)
    return Tags(rows, numbers[rows])


def merged(parts: Sequence[Tags]) -> Tags:
    """All parts, row by row, inside a row in the order of the parts."""
    if not parts:
        return Tags(np.zeros(0, np.int64), np.zeros(0, np.int64))
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    return Tags(rows[order], np.concatenate([part.tags for part in parts])[order])


def _clean(parts: tuple[Tags, ...], policy: Policy, vocabulary: Vocabulary) -> list[Tags]:
    """The parts without empty tags, each tag where it stands first."""
    kept = list(parts)
    if policy.empty_tags == "remove":
        written = np.array([bool(text.strip()) for text in vocabulary.texts()], bool)
        kept = [part.where(written[part.tags]) for part in kept]
    if policy.duplicate_tags == "first":
        width = max(len(vocabulary.numbers), 1)
        pairs = np.concatenate([part.rows * width + part.tags for part in kept])
        first = np.zeros(len(pairs), bool)
        first[np.unique(pairs, return_index=True)[1]] = True
        masks = np.split(first, np.cumsum([len(part.rows) for part in kept])[:-1])
        kept = [part.where(mask) for part, mask in zip(kept, masks, strict=True)]
    return kept


def _list_array(tags: Tags, texts: list[str], size: int) -> pa.Array:
    offsets = np.searchsorted(tags.rows, np.arange(size + 1)).astype(np.int32)
    values = pa.array(texts, pa.string()).take(pa.array(tags.tags))
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _n_tokens(
    parts: Sequence[Tags], texts: list[str], size: int, count_tokens: TokenCount | None
) -> pa.Array:
    """Tokens of the written order without the separator; a tag counts together with its comma, the last one bare."""
    if count_tokens is None:
        return pa.nulls(size, pa.int16())
    every = merged(parts)
    last = np.ones(len(every.rows), bool)
    last[:-1] = every.rows[1:] != every.rows[:-1]
    with_comma = np.array([count_tokens(text + ",") for text in texts], np.int64)
    bare = np.zeros(len(texts), np.int64)
    for number in np.unique(every.tags[last]).tolist():
        bare[number] = count_tokens(texts[number])
    counts = np.where(last, bare[every.tags], with_comma[every.tags]) if len(every.rows) else np.zeros(0)
    sums = np.bincount(every.rows, weights=counts, minlength=size)
    return pa.array(np.minimum(sums, np.iinfo(np.int16).max).astype(np.int16))
