"""Small buckets joined to ones of like shape, what that costs the pictures, and what the crop costs in all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.recipe.buckets import Size, assign_many, merge_small_buckets

Numbers = npt.NDArray[np.float64]
_ROUNDING = 1e-9  # of two shares that are equal on paper


@dataclass(frozen=True)
class Cost:
    """What merging did to a selection; shares are of a picture's area, over the pictures that moved."""

    pictures: int
    moved: int
    mean: float
    worst: float
    small_buckets: int  # that found none of like shape, and are trained as they are
    small_pictures: int


def merge(
    widths: Sequence[int], heights: Sequence[int], repeats: Sequence[int], tables: Sequence[Sequence[Size]], *, least: int, crop: float
) -> tuple[list[Size], dict[Size, Size], Cost]:
    """(bucket of each picture, final bucket of every bucket that merged, cost) for pictures of these true sizes.

    Buckets with fewer than `least` visits an epoch join another as a whole, where none of their pictures loses more
    than `crop` of its area to that, beside what its own bucket cuts, and never one of another of the `tables` (a table
    per area): there they would be enlarged, or lose pixels. Independent of the pictures' order.
    """
    w, h = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    sizes = sorted({size for table in tables for size in table})
    of_size = {size: {place for place, table in enumerate(tables) if size in table} for size in sizes}
    number = {size: place for place, size in enumerate(sizes)}
    own = np.asarray([number[size] for _, size in assign_many(widths, heights, tables)], np.int64)
    table = np.asarray(sizes, np.int64).reshape(-1, 2)
    own_loss = crop_losses(w, h, table[own, 0], table[own, 1])
    visits = np.bincount(own, np.asarray(repeats), len(sizes)).astype(np.int64)

    @functools.cache
    def rows_of(bucket: Size) -> npt.NDArray[np.int64]:
        return np.flatnonzero(own == number[bucket])

    @functools.cache
    def may(bucket: Size, target: Size) -> bool:
        if not of_size[bucket] & of_size[target]:
            return False
        rows = rows_of(bucket)
        extra = crop_losses(w[rows], h[rows], *target) - own_loss[rows]
        return bool((extra <= crop + _ROUNDING).all())

    final = merge_small_buckets(dict(zip(sizes, visits.tolist(), strict=True)), least, may)
    into = np.asarray([number[final.get(size, size)] for size in sizes], np.int64)[own]
    moved = into != own
    extra = np.maximum(crop_losses(w, h, table[into, 0], table[into, 1]) - own_loss, 0)[moved]
    small = np.flatnonzero(np.bincount(into, np.asarray(repeats), len(sizes)) < least)
    cost = Cost(
        pictures=len(w),
        moved=int(moved.sum()),
        mean=round(float(extra.mean()), 6) if len(extra) else 0.0,
        worst=round(float(extra.max()), 6) if len(extra) else 0.0,
        small_buckets=len(np.intersect1d(small, into)),
        small_pictures=int(np.isin(into, small).sum()),
    )
    return [sizes[place] for place in into.tolist()], {a: b for a, b in sorted(final.items()) if a != b}, cost


def crop_losses(widths: npt.ArrayLike, heights: npt.ArrayLike, bucket_w: npt.ArrayLike, bucket_h: npt.ArrayLike) -> Numbers:
    """Share of each resized picture that the crop cuts away, float64[N]: `1 - buckets.place(...).kept` for many."""
    w, h, bw, bh = (np.asarray(sides, np.float64) for sides in (widths, heights, bucket_w, bucket_h))
    scale = np.where(w / h > bw / bh, bh / h, bw / w)
    resized: Numbers = np.floor(w * scale + 0.5) * np.floor(h * scale + 0.5)
    return 1 - bw * bh / resized


def told(cost: Cost, least: int, crop: float) -> str:
    """One line for people; empty where every bucket was large enough."""
    parts = []
    if cost.moved:
        parts.append(
            f"{cost.moved} of {cost.pictures} pictures moved from buckets of fewer than {least} (min_bucket) into the one of nearest "
            f"shape, which cuts {100 * cost.mean:.1f} % more of their area on average, {100 * cost.worst:.1f} % at most "
            f"(merge_crop {crop:g})"
        )
    if cost.small_buckets:
        buckets = "1 bucket" if cost.small_buckets == 1 else f"{cost.small_buckets} buckets"
        parts.append(f"{cost.small_pictures} pictures stay in {buckets} of fewer than {least}, and are trained in short tiles")
    return "; ".join(parts)
