"""The policy of a dataset: preset, switches, thresholds, and the thresholds frozen in `labels/policy.lock.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train.base.errors import ExitCode, Halt
from train.config.dataset import PolicyConfig, QualityConfig
from train.config.vocabulary import TABLE_WORDS, Vocabulary, load_vocabulary
from train.prepare.tables.units import config_id, stream_table, write_text
from train.recipe.exclusions import excluded_by
from train.recipe.tag_policy import PERCENTILES, POOLED, QUALITY_TABLES, Policy, Words, preset

LOCK = "policy.lock.json"
Counted = tuple[np.ndarray, np.ndarray]  # rising scores, how often each occurs
# What a vocabulary's criterion is as policy.quality.source.
_SOURCES: dict[str, Literal["table", "empirical", "none"]] = {
    "percentile": "empirical", "absolute": "table", "table": "table", "none": "none",
}  # fmt: skip
_SCORE_COLUMNS = ["rating", "score", "score_real", "media_year", "created_year", "hard_exclusion"]


def resolve(config: PolicyConfig) -> Policy:
    """The policy with every switch resolved; empirical thresholds are still missing (`freeze`)."""
    vocabulary = load_vocabulary(config.vocabulary)
    quality = _sourced(config, vocabulary)
    thresholds = tuple(config.aesthetic.thresholds or vocabulary.aesthetic.thresholds)
    words = _words(vocabulary, config.vocabulary)
    if thresholds and len(thresholds) != len(words.aesthetic) - 1:
        raise Halt(
            ExitCode.USAGE,
            f"policy.aesthetic.thresholds: {len(thresholds)} for the {len(words.aesthetic)} aesthetic words of vocabulary "
            f"{config.vocabulary}, one fewer than words are needed",
        )
    by_year = config.year.ranges or vocabulary.time.ranges
    if any(excluded_by(rating="e", tags=[r.tag]) is not None for r in config.year.ranges):
        raise Halt(ExitCode.USAGE, "policy.year.ranges: one of its tags is one that the hard exclusions refuse: choose another")
    if config.year.ranges:
        words = dataclasses.replace(words, year_format=None)
    return dataclasses.replace(
        preset(config.preset),
        **{name: value for name, value in _switches(config).items() if value is not None},
        quality=quality.source != "none",
        quality_thresholds=_thresholds(quality, vocabulary, asked=config.quality.source is not None),
        quality_by_year=quality.source == "empirical" and "year" in quality.group_by,
        quality_min_age_days=quality.min_age_days,
        year_ranges=tuple((r.tag, r.first, r.last) for r in by_year),
        year_before=config.year.before,
        year_after=config.year.after,
        aesthetic_thresholds=thresholds,
        underscore=config.strings.underscore,
        words=words,
    )


def open_words(config: PolicyConfig, scored_by: str | None = None) -> list[str]:
    """What the vocabulary leaves open, so that no caption shows it, and thresholds of another scorer than the one that scored."""
    policy, vocabulary = resolve(config), load_vocabulary(config.vocabulary)
    missing = {
        "quality": not policy.quality and config.quality.source is None,
        "rating": not any(policy.words.rating.values()),
        "time": not policy.year_ranges and policy.words.year_format is None,
        "aesthetic": not policy.aesthetic_thresholds,
    }
    notes = [f"no {kind} words are written: it has none, or what earns them is not published" for kind, without in missing.items() if without]
    scorer = vocabulary.aesthetic.scorer
    if scorer and scored_by and scorer != scored_by and not config.aesthetic.thresholds:
        notes.append(
            f"its aesthetic thresholds are of {scorer}, and score.model is {scored_by}: another scorer's numbers want "
            "policy.aesthetic.thresholds of their own"
        )
    return notes


def _sourced(config: PolicyConfig, vocabulary: Vocabulary) -> QualityConfig:
    """The set's quality keys, where they leave the source open with the vocabulary's: `absolute` is a table of one row."""
    quality, words = config.quality, vocabulary.quality
    source = quality.source
    if source is None:
        source = _SOURCES[words.criterion]
    elif source == "table" and len(words.words) != TABLE_WORDS:
        raise Halt(
            ExitCode.USAGE,
            f"policy.quality.source: the tables tell {TABLE_WORDS} classes apart, vocabulary {config.vocabulary} has "
            f"{len(words.words)} quality words",
        )
    elif source == "empirical" and (words.criterion not in ("table", "percentile") or not words.cuts):
        raise Halt(
            ExitCode.USAGE, f"policy.quality.source: empirical needs percentiles, vocabulary {config.vocabulary} has none"
        )
    return dataclasses.replace(quality, source=source)


def _thresholds(quality: QualityConfig, vocabulary: Vocabulary, asked: bool) -> dict[str, tuple[float, ...]]:
    if quality.source != "table":
        return {}
    if vocabulary.quality.criterion == "absolute" and not asked:
        return {POOLED: tuple(reversed(vocabulary.quality.cuts))}
    return _table(quality)


def _words(vocabulary: Vocabulary, name: str) -> Words:
    """The policy's words. Raises Halt(USAGE) for one that the hard exclusions refuse: no gate reads the words of a fixed part."""
    order = vocabulary.order
    ratings = [tag for tags in vocabulary.rating.values() for tag in tags]
    written = [*vocabulary.quality.words, *ratings, *(r.tag for r in vocabulary.time.ranges), *vocabulary.aesthetic.words,
               (vocabulary.time.format or "").replace("{year}", "2000")]  # fmt: skip
    if any(excluded_by(rating="e", tags=[word], caption=word) is not None for word in written):
        raise Halt(ExitCode.USAGE, f"policy.vocabulary {name}: one of its words is one that the hard exclusions refuse: choose another")
    cuts = vocabulary.quality.cuts if vocabulary.quality.criterion in ("table", "percentile") else []
    return Words(
        quality=tuple(vocabulary.quality.words),
        percentiles=tuple(int(cut) if cut == int(cut) else cut for cut in reversed(cuts)),
        rating={rating: tuple(tags) for rating, tags in vocabulary.rating.items()},
        year_format=vocabulary.time.format,
        aesthetic=tuple(vocabulary.aesthetic.words),
        fixed=tuple(order.fixed),
        flexible=tuple(order.flexible),
        tail=tuple(order.tail),
    )


def _switches(config: PolicyConfig) -> dict[str, Any]:
    return {
        "meta_blacklist": config.meta_blacklist,
        "year_source": config.year_source,
        "year_fallback": config.year_fallback,
        "aesthetic_edges": config.aesthetic_edges,
        "aesthetic_skip_substring": config.aesthetic_skip_substring,
        "banned_artist": config.banned_artist,
        "missing_rating_or_score": config.missing_rating_or_score,
        "empty_tags": config.empty_tags,
        "duplicate_tags": config.duplicate_tags,
    }


def _table(config: QualityConfig) -> dict[str, tuple[float, ...]]:
    if config.table in QUALITY_TABLES:
        return dict(QUALITY_TABLES[config.table])
    path = Path(config.table)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = {str(rating): tuple(float(value) for value in values) for rating, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Halt(ExitCode.USAGE, f"policy.quality.table: full, after_5m, or a readable JSON file: {error}") from error
    for rating, values in table.items():
        if rating not in "gsqe" or len(values) != len(PERCENTILES) or list(values) != sorted(values):
            raise Halt(
                ExitCode.USAGE,
                f"policy.quality.table {path}: {rating!r} must be one of g, s, q, e with the rising thresholds of "
                f"percentiles {', '.join(map(str, PERCENTILES))}",
            )
    return table


def freeze(config: PolicyConfig, dataset: Path) -> tuple[Policy, date | None]:
    """(policy with its thresholds, the day that post ages count to).

    Computed from the records once and kept in the lock file, so that images added later get the same label for the
    same score; another quality config makes a new lock.
    """
    policy = resolve(config)
    vocabulary = load_vocabulary(config.vocabulary)
    quality = _sourced(config, vocabulary)
    if quality.source != "empirical" and quality.min_age_days == 0:
        return policy, None
    other = {} if policy.words.percentiles == PERCENTILES else {"percentiles": policy.words.percentiles}
    identity = config_id(
        quality=dataclasses.asdict(quality), year_source=policy.year_source, missing=policy.missing_rating_or_score, **other
    )
    path = dataset / "labels" / LOCK
    lock = _read_lock(path)
    if lock is None or lock.get("identity") != identity:
        lock = {"identity": identity, "newest": _newest_day(dataset)}
        if quality.source == "empirical":
            lock["thresholds"] = {name: list(values) for name, values in empirical(quality, policy, dataset).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(lock, indent=1, sort_keys=True) + "\n")
    if quality.source == "empirical":
        frozen = {name: tuple(values) for name, values in lock["thresholds"].items()}
        policy = dataclasses.replace(policy, quality_thresholds=frozen)
    return policy, date.fromisoformat(lock["newest"]) if lock["newest"] else None


def _read_lock(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise Halt(ExitCode.MISMATCH, f"{path} is damaged ({error}): delete it to compute new thresholds") from error


def _newest_day(dataset: Path) -> str | None:
    """The newest post's day: the day the metadata was fetched, as far as the data can tell."""
    newest: str | None = None
    for unit in stream_table(dataset, "records", ["created_at"]):
        days = post_days(unit["created_at"])
        top = pc.max(days).as_py()
        if top is not None and (newest is None or top.isoformat() > newest):
            newest = top.isoformat()
    return newest


def post_days(created_at: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """date32 as written, null where the text is no date."""
    days = pc.utf8_slice_codeunits(created_at, 0, 10)
    return pc.strptime(days, "%Y-%m-%d", "s", error_is_null=True).cast(pa.date32())


def empirical(config: QualityConfig, policy: Policy, dataset: Path) -> dict[str, tuple[float, ...]]:
    """Thresholds per group of the records' scores, and the pooled ones, where the guards allow them.

    Holds how often each score occurs, never one value per record: scores repeat, whatever the size of the set.
    """
    counted: dict[str, Counted] = {}
    for unit in stream_table(dataset, "records", _SCORE_COLUMNS):
        for group, scores in _grouped(unit, policy):
            values, counts = np.unique(scores, return_counts=True)
            counted[group] = _added([counted[group], (values, counts)]) if group in counted else (values, counts)
    groups = dict(sorted(counted.items()))
    if groups:
        groups[POOLED] = _added(list(groups.values()))
    return {
        name: tuple(float(value) for value in counted_thresholds(values, counts, policy.words.percentiles))
        for name, (values, counts) in groups.items()
        if counts.sum() >= config.min_group and len(values) >= config.min_distinct
    }


def counted_thresholds(
    values: np.ndarray, counts: np.ndarray, percentiles: Sequence[float] = PERCENTILES
) -> np.ndarray:
    """The smallest value v with count(x <= v) / n >= p / 100 for each percentile, of rising values and how often each occurs.

    With the strict rule `score > threshold` at most 5 % are masterpiece and equal scores are never parted.
    """
    last = np.cumsum(counts)  # rank of the last of each value, from 1
    ranks = [int(-(-p * int(last[-1]) // 100)) for p in percentiles]
    found: np.ndarray = values[np.searchsorted(last, ranks, side="left")]
    return found


def _added(parts: Sequence[Counted]) -> Counted:
    values, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, place, np.concatenate([part[1] for part in parts]))
    return values, counts


def _grouped(unit: pa.Table, policy: Policy) -> list[tuple[str, np.ndarray]]:
    scores = pc.coalesce(unit["score"].cast(pa.float64()), unit["score_real"])
    rating = unit["rating"].cast(pa.string())
    group = rating
    if policy.quality_by_year:
        media = unit["media_year"]
        year = media if policy.year_source == "media" else pc.coalesce(media, unit["created_year"])
        text = pc.coalesce(year.cast(pa.string()), pa.scalar("None"))
        group = pc.binary_join_element_wise(rating, text, "/")
    usable = pc.and_(pc.and_(pc.is_valid(scores), pc.is_valid(group)), pc.is_null(unit["hard_exclusion"]))
    groups = pc.dictionary_encode(group.filter(usable)).combine_chunks()
    values = scores.filter(usable).to_numpy()
    codes = groups.indices.to_numpy()
    return [(name, values[codes == code]) for code, name in enumerate(groups.dictionary.to_pylist())]
