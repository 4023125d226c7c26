"""How often a picture of a selection is visited beyond its source's repeats: boosts by predicate, then rare values raised.

`boost` multiplies. `balance` looks at the visits that are then there: values of one column that are visited fewer than
`to` times an epoch are raised to it, the rarest first, by visiting their pictures again, each at most `most` times as
often as before. Nothing is visited less often (that is what `caps` are for). A picture of several values raises all of
them, so a frequent companion may grow too; the counts before and after say so. The same inputs give the same visits.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from train.config.dataset import BalanceConfig, BoostConfig
from train.prepare.choosing.candidates import Candidates
from train.prepare.choosing.filters import where

Rows = npt.NDArray[np.int64]
_SHOWN = 40  # values whose counts stand in the table: the rarest and the most frequent


@dataclass(frozen=True)
class Mixed:
    """What was made of a selection's visits, as its table keeps it."""

    before: int  # visits an epoch without boost and balance
    after: int
    boosts: list[dict[str, Any]] = field(default_factory=list)  # where, times, pictures, visits after it
    balance: dict[str, Any] | None = None  # by, to, most, values, raised, short, shown: (value, visits before, after)


def boosted(
    candidates: Candidates, boosts: list[BoostConfig], rows: Rows, visits: Rows
) -> tuple[Rows, list[dict[str, Any]], list[str]]:
    """(visits of the rows, what each boost met, what is to be said of those that do nothing)."""
    told: list[dict[str, Any]] = []
    notes: list[str] = []
    everything, nothing = np.ones(len(candidates.keys), bool), np.zeros(len(candidates.keys), bool)
    for boost in boosts:
        kept, _, found = where(candidates, boost.where, everything, nothing)
        mine = kept[rows]
        visits = np.where(mine, visits * boost.times, visits)
        told.append({"where": list(boost.where), "times": boost.times, "pictures": int(mine.sum()), "visits": int(visits.sum())})
        notes += [f"boost {note}" for note in found]
        if len(rows) and not mine.any() and not found:
            notes.append(f"boost {' and '.join(boost.where)}: no picture of this selection meets it")
    return visits, told, notes


def balanced(candidates: Candidates, config: BalanceConfig, order: Rows, visits: Rows) -> tuple[Rows, dict[str, Any], list[str]]:
    """(visits[N] of the candidates in `order`, what was done, a note where no picture has a value).

    Every value visited fewer than `to` times before is afterwards visited min(to, most x before) times or more; of
    pictures that could be visited again, each round takes those that come first in `order`.
    """
    places: dict[Any, list[int]] = defaultdict(list)
    for place, mine in enumerate(candidates.values(config.by, order)):
        for value in mine:
            places[value].append(place)
    before = {value: int(visits[mine].sum()) for value, mine in places.items()}
    now, most = visits.copy(), visits * config.most
    for value in sorted(before, key=lambda value: (before[value], str(value))):
        able = np.asarray(places[value])
        missing = config.to - int(now[able].sum())
        while missing > 0 and len(able := able[now[able] < most[able]]):
            # Round by round, so that no picture is repeated far more often than its neighbours of the same value.
            again = able[:missing]
            now[again] += 1
            missing -= len(again)
    after = {value: int(now[mine].sum()) for value, mine in places.items()}
    ranked = sorted(before, key=lambda value: (before[value], str(value)))
    shown = ranked if len(ranked) <= _SHOWN else [*ranked[: _SHOWN // 2], *ranked[-_SHOWN // 2 :]]
    told = {
        "by": config.by, "to": config.to, "most": config.most, "values": len(ranked),
        "raised": sum(after[value] > before[value] for value in ranked), "short": sum(after[value] < config.to for value in ranked),
        "without": len(order) - len(set().union(*places.values())), "shown": [(str(value), before[value], after[value]) for value in shown],
    }  # fmt: skip
    notes = [f"balance: raises nothing: no picture has any {config.by}"] if len(order) and not ranked else []
    return now, told, notes


def told_of(mixed: Mixed) -> str:
    """One line for people; empty where there is neither boost nor balance."""
    parts = [f"boost {' and '.join(one['where'])}: {one['pictures']} pictures {one['times']} times" for one in mixed.boosts]
    if (found := mixed.balance) is not None:
        short = f", {found['short']} stay below it (most {found['most']})" if found["short"] else ""
        parts.append(f"balance by {found['by']} to {found['to']}: {found['raised']} of {found['values']} values raised{short}")
    return "; ".join([*parts, f"{mixed.before} visits an epoch became {mixed.after}"]) if parts else ""
