"""Training sizes, which of them an image gets, how it is resized and cropped, and what the network is told about it.

The rules are those of the original trainer, floors and float comparisons included: rounding elsewhere would move
border images into another bucket. Standard library only, so all sizes are (width, height) of plain integers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from train.base.errors import ExitCode, Halt

Size = tuple[int, int]
CropCondition = Literal["actual", "kohya", "zero"]


@dataclass(frozen=True)
class Placement:
    """An image of `bucket_w` x `bucket_h` cut out of the image resized to `resized_w` x `resized_h`."""

    bucket_w: int
    bucket_h: int
    resized_w: int
    resized_h: int
    crop_top: int
    crop_left: int
    kept: float  # share of the resized picture inside the crop


def make_buckets(
    area_px: int = 1024 * 1024, min_px: int = 512, max_px: int = 2048, step_px: int = 64
) -> tuple[Size, ...]:
    """Sorted (width, height) with sides from `min_px` to `max_px` in `step_px` and at most `area_px`; defaults give 33.

    Raises Halt(USAGE) naming the `buckets` key when no bucket is possible.
    """
    if step_px < 1 or step_px % 8:
        raise Halt(ExitCode.USAGE, f"buckets.step_px is {step_px}, must be a multiple of 8 (pixels per latent)")
    if not step_px <= min_px <= max_px:
        raise Halt(
            ExitCode.USAGE, f"buckets.min_px is {min_px}, must lie between step_px {step_px} and max_px {max_px}"
        )
    if min_px % step_px:
        raise Halt(ExitCode.USAGE, f"buckets.min_px is {min_px}, must be a multiple of step_px {step_px}")
    square = math.isqrt(max(area_px, 0)) // step_px * step_px
    if square < min_px:
        raise Halt(ExitCode.USAGE, f"buckets.area_px is {area_px}, too small for a square of min_px {min_px}")
    sizes = {(square, square)}
    for width in range(min_px, max_px + 1, step_px):
        height = min(max_px, area_px // width // step_px * step_px)
        if height >= min_px:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def assign(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket of an image: its own size if that is one, else the least |difference of width/height|.

    `buckets` sorted as make_buckets returns them: the first wins a tie. The difference is absolute, so a wide image
    and its upright twin need not get mirrored buckets.
    """
    _check_size(width, height)
    at = bisect_left(buckets, (width, height))
    if at < len(buckets) and buckets[at] == (width, height):
        return buckets[at]
    aspect = width / height
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def assign_many(
    widths: Sequence[int], heights: Sequence[int], tables: Sequence[Sequence[Size]]
) -> list[tuple[int, Size]]:
    """`assign_among` for many images, each distinct size looked up once."""
    sizes = [(int(w), int(h)) for w, h in zip(widths, heights, strict=True)]
    found = {size: assign_among(*size, tables) for size in set(sizes)}
    return [found[size] for size in sizes]


def tables_of(
    areas_px: int | Sequence[int], min_px: int = 512, max_px: int = 2048, step_px: int = 64
) -> tuple[tuple[Size, ...], ...]:
    """`make_buckets` of every area, the largest first: one table for a number. Raises Halt(USAGE) as it does."""
    areas = [areas_px] if isinstance(areas_px, int) else sorted(set(areas_px), reverse=True)
    return tuple(make_buckets(area, min_px, max_px, step_px) for area in areas)


def assign_among(width: int, height: int, tables: Sequence[Sequence[Size]]) -> tuple[int, Size]:
    """(number of the table, bucket) of an image: in the first table whose bucket it fills without being enlarged, else
    in the last. `tables` as `tables_of` gives them, so one place per image, of the largest area that it has pixels for.
    """
    for number, table in enumerate(tables):
        bucket_w, bucket_h = bucket = assign(width, height, table)
        if number + 1 == len(tables) or (bucket_w <= width and bucket_h <= height):
            return number, bucket
    raise ValueError("no table of buckets")


def place(width: int, height: int, bucket: Size) -> Placement:
    """Resize until the image just covers the bucket, then crop the centre."""
    _check_size(width, height)
    bucket_w, bucket_h = bucket
    scale = bucket_h / height if width / height > bucket_w / bucket_h else bucket_w / width
    resized_w, resized_h = math.floor(width * scale + 0.5), math.floor(height * scale + 0.5)
    return Placement(
        bucket_w=bucket_w,
        bucket_h=bucket_h,
        resized_w=resized_w,
        resized_h=resized_h,
        crop_top=(resized_h - bucket_h) // 2,
        crop_left=(resized_w - bucket_w) // 2,
        kept=bucket_w * bucket_h / (resized_w * resized_h),
    )


def crop_condition(
    mode: CropCondition, orig_w: int, orig_h: int, bucket_w: int, bucket_h: int, crop_top: int, crop_left: int
) -> tuple[int, int]:
    """(top, left) given to the network as the crop.

    `actual`: the real crop, `crop_top` and `crop_left`. `kohya`: what the released run was told, the margins of the
    image letterboxed inside the bucket, wrong in axis and size (kohya-ss/sd-scripts#1443). `zero`: (0, 0).
    """
    if mode == "actual":
        return crop_top, crop_left
    if mode == "zero":
        return 0, 0
    if mode != "kohya":
        raise Halt(ExitCode.USAGE, f"data.crop_conditioning is {mode!r}, must be actual, kohya or zero")
    aspect = orig_w / orig_h
    if bucket_w / bucket_h > aspect:
        inside_w, inside_h = bucket_h * aspect, float(bucket_h)
    else:
        inside_w, inside_h = float(bucket_w), bucket_w / aspect
    return int((bucket_h - inside_h) // 2), int((bucket_w - inside_w) // 2)


def square_of(buckets: Sequence[Size]) -> int:
    """Side in px of the square that stands for what was trained: its largest square, else one of its largest area.

    SDXL's table gives 1024, whichever of its buckets hold images; sides in between are rounded to the table's step.
    """
    area_px = max(w * h for w, h in buckets)
    squares = [w for w, h in buckets if w == h and w * h > area_px / 2]  # a smaller one is of another resolution
    step_px = math.gcd(64, *(side for bucket in buckets for side in bucket))
    return max(squares, default=max(round(math.sqrt(area_px) / step_px), 1) * step_px)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"image size {width}x{height} is not positive")


def merge_small_buckets(
    counts: Mapping[Size, int], min_bucket: int, may: Callable[[Size, Size], bool] = lambda bucket, target: True
) -> dict[Size, Size]:
    """Final bucket of every non-empty bucket, itself included, when those of fewer than `min_bucket` images merge.

    The smallest (then the smaller size) joins, whole, the bucket of nearest ln(w/h) (then larger area, then smaller
    size) that all its images may go to, until all are large enough or find none. may(bucket, target): whether the
    images that were `bucket`'s at first may go to `target`.
    """
    left = {size: count for size, count in counts.items() if count > 0}
    members = {size: [size] for size in left}
    settled: set[Size] = set()  # for good: what joins a bucket only adds conditions, and targets only become fewer
    while small := [size for size, count in left.items() if count < min_bucket and size not in settled]:
        moving = min(small, key=lambda size: (left[size], size))
        targets = [size for size in left if size != moving and all(may(member, size) for member in members[moving])]
        if not targets:
            settled.add(moving)
            continue
        nearest = min(targets, key=lambda size: (_aspect_distance(moving, size), -size[0] * size[1], size))
        left[nearest] += left.pop(moving)
        members[nearest] += members.pop(moving)
    return {member: final for final, joined in members.items() for member in joined}


def _aspect_distance(one: Size, other: Size) -> float:
    return round(abs(math.log(one[0] / one[1]) - math.log(other[0] / other[1])), 9)


def check_buckets(counts: Mapping[Size, int], min_bucket: int | None) -> None:
    """Refuse a prepared selection in which a bucket is smaller than asked for; null takes the buckets as prepared.

    Merging means another crop, so other latents. Raises Halt(MISMATCH) naming the steps to rerun and the
    `batch.min_bucket` that takes the buckets as they are.
    """
    small = {size: count for size, count in sorted(counts.items()) if 0 < count < (min_bucket or 1)}
    if small and sum(count > 0 for count in counts.values()) > 1:  # a single bucket has nothing to merge with
        names = ", ".join(f"{w}x{h} ({count} images)" for (w, h), count in small.items())
        raise Halt(
            ExitCode.MISMATCH,
            f"batch.min_bucket is {min_bucket}, and these buckets hold fewer images: {names}: set batch.min_bucket=null or "
            f"batch.min_bucket={min(small.values())} to train with the buckets as they are, or set select.<stage>.min_bucket: "
            f"{min_bucket} with a merge_crop that lets them merge, and rerun prepare.py select and prepare.py latents",
        )
