"""The predicates, caps and quota of a selection, and a line for each that can do nothing with this set.

A filter that a set can never satisfy, or that names what no picture has, is a filter that its writer believes in: it is
said once, with the reason and the way out, and stands in the selection's table beside the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from train.config.dataset import QuotaConfig
from train.prepare.choosing.candidates import Candidates
from train.prepare.choosing.predicates import Outcome, Predicate, evaluate, parse, word_of
from train.prepare.tables.schemas import TAG_GROUPS

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
_SOURCE_OF = {  # where a column's values come from: what somebody who misses them would look at
    "quality": "it comes from a record's score and rating, see policy.quality",
    "score": "no record has a score", "rating": "no record has a rating", "rating_tags": "no record has a rating",
    "year": "no record has a date in policy.year.ranges", "created_year": "no record has a date",
    "created_at": "no record has a date", "media_year": "no record has a date of its file",
    "aesthetic": "see score.source", "aesthetic_score": "see score.source", "n_tokens": "tokenizers is null",
    "caption": "no record has a caption", "tags": "no record has tags",
}  # fmt: skip


def where(
    candidates: Candidates, texts: Iterable[str], kept: Mask, allowed: Mask
) -> tuple[Mask, list[tuple[str, int]], list[str]]:
    """(rows left, (predicate, rows after it) in order, what is to be said of predicates that do nothing)."""
    counts, notes = [], []
    for text in texts:
        predicate = parse(text)
        outcome = evaluate(predicate, candidates.parts(predicate.column))
        notes += [f"where `{predicate.text}`: {note}" for note in _notes(predicate, outcome)]
        if outcome.known or not predicate.if_known:
            kept = kept & (outcome.holds | allowed)
        counts.append((predicate.text, int(kept.sum())))
    return kept, counts, notes


def _notes(predicate: Predicate, outcome: Outcome) -> Iterable[str]:
    if not len(outcome.holds):
        return
    if outcome.known == 0:
        why = _SOURCE_OF.get(predicate.column)
        empty = f"no picture has any {predicate.column}" + (f" ({why})" if why else "")
        if predicate.if_known:
            yield f"passed over: {empty}"
        elif predicate.negative:
            yield f"leaves nothing out: {empty}"
        else:
            yield f"can never hold: {empty}. Give the set these values, remove it, or end it with ` if known` to pass it over"
    elif outcome.absent and (predicate.op.startswith("has") or len(outcome.absent) == len(predicate.values)):
        words = [word_of(word) for word in outcome.absent]
        named = " or ".join(map(repr, words)) if predicate.op.startswith("has") else f"{predicate.column} {' or '.join(words)}"
        yield f"no picture that may be selected has {named}"


def capped(candidates: Candidates, name: str, order: Rows, limit: int) -> tuple[Rows, list[str]]:
    """(those whose every value has been taken fewer than `limit` times before, a note when there are no values)."""
    taken: Counter[Any] = Counter()
    kept = []
    for row, mine in zip(order.tolist(), candidates.values(name, order), strict=True):
        if all(taken[value] < limit for value in mine):
            taken.update(mine)
            kept.append(row)
    notes = []
    if len(order) and not taken:
        why = " (a caption does not say which of its tags are one)" if name in TAG_GROUPS else ""
        notes.append(f"caps.{name}: limits nothing: no picture has any {name}{why}")
    return np.array(kept, np.int64), notes


def by_quota(candidates: Candidates, order: Rows, quota: QuotaConfig) -> tuple[Rows, list[str]]:
    """(the first of each value up to its share of `total`, rounded down, a note of shares that no picture can fill)."""
    left = {value: int(share * quota.total + 1e-9) for value, share in quota.shares.items()}
    kept, seen = [], set[str]()
    for row, mine in zip(order.tolist(), candidates.values(quota.by, order), strict=True):
        value = str(mine[0]) if mine else ""
        seen.add(value)
        if left.get(value, 0) > 0:
            left[value] -= 1
            kept.append(row)
    nobody = [value for value, share in quota.shares.items() if share > 0 and value not in seen]
    notes = [f"quota: no picture has {quota.by} {' or '.join(nobody)}"] if nobody and len(order) else []
    return np.array(kept, np.int64), notes
