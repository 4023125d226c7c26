"""Confidence intervals over pictures, most by the bootstrap. One fixed seed: the same pictures give the same digits.

Every statistic here is a ratio of two sums over pictures (a mean divides by their number), so a resample is how often
each picture counts. Percentile intervals (Efron and Tibshirani 1993, chapter 13); with fewer than about twenty pictures
they are somewhat too narrow. A share of few pictures has Wilson's interval, because two of two, resampled, stay two of two.
Shape legend: N pictures, D resamples, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DRAWS = 4000
SEED = 0
LEVEL = 0.95
Z_975 = 1.959964  # of the normal distribution
_CHUNK = 4_000_000  # counts held at once

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A statistic, its 95 % interval (None for fewer than two pictures) and the number of pictures behind it."""

    value: float | None
    low: float | None
    high: float | None
    pictures: int


def mean(values: Sequence[float] | F64) -> Estimate:
    """The mean of one number per picture."""
    return ratio(values, np.ones(len(values)))


def ratio(parts: Sequence[float] | F64, wholes: Sequence[float] | F64) -> Estimate:
    """sum(parts) / sum(wholes) over the same pictures; None where no picture has a whole."""
    columns_NK = np.stack([np.asarray(parts, np.float64), np.asarray(wholes, np.float64)], axis=1)
    whole = float(columns_NK[:, 1].sum())
    value = float(columns_NK[:, 0].sum()) / whole if whole else None
    return _estimate(value, columns_NK, ((0, 1),))


def share(hits: int, trials: int) -> Estimate:
    """hits / trials with Wilson's score interval (Wilson 1927); None of none."""
    if trials == 0:
        return Estimate(None, None, None, 0)
    p, z2 = hits / trials, Z_975**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_975 * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0), trials)


def change(
    before: tuple[Sequence[float] | F64, Sequence[float] | F64],
    after: tuple[Sequence[float] | F64, Sequence[float] | F64],
) -> Estimate:
    """ratio(*after) - ratio(*before) where row n of both is the same prompt and seed: resampled together."""
    columns_NK = np.stack([np.asarray(column, np.float64) for column in (*before, *after)], axis=1)
    sums_K = columns_NK.sum(axis=0)
    value = float(sums_K[2] / sums_K[3] - sums_K[0] / sums_K[1]) if sums_K[1] and sums_K[3] else None
    return _estimate(value, columns_NK, ((2, 3), (0, 1)))


def resampled_sums(columns_NK: F64, draws: int = DRAWS, seed: int = SEED) -> F64:
    """Column sums of `draws` resamples with replacement, [D,K]: a function of the number of pictures and the seed."""
    pictures = len(columns_NK)
    generator = np.random.default_rng([seed, pictures])
    step = max(_CHUNK // max(pictures, 1), 1)
    parts = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts_DN = generator.multinomial(pictures, np.full(pictures, 1.0 / pictures), size=size)
        parts.append(counts_DN @ columns_NK)
    return np.concatenate(parts)


def _estimate(value: float | None, columns_NK: F64, ratios: Sequence[tuple[int, int]]) -> Estimate:
    """`value` with the interval of ratios[0], less ratios[1] where there is one; (part, whole) name columns."""
    pictures = len(columns_NK)
    if value is None or pictures < 2:
        return Estimate(value, None, None, pictures)
    sums_DK = resampled_sums(columns_NK)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without any whole says nothing: left out below
        found = [sums_DK[:, part] / sums_DK[:, whole] for part, whole in ratios]
    values = found[0] - found[1] if len(found) == 2 else found[0]
    values = values[np.isfinite(values)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, (tail, 1 - tail)).tolist()
    return Estimate(value, low, high, pictures)
