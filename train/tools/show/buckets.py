"""Where one image lands: bucket, resize, crop, and the six numbers the U-Net is told in each mode."""

from __future__ import annotations

import re
from typing import Any

from train.base.errors import ExitCode, Halt
from train.recipe.buckets import CropCondition, assign, crop_condition, make_buckets, place

MODES: tuple[CropCondition, ...] = ("actual", "kohya", "zero")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "1500x2000"."""
    match = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise Halt(ExitCode.USAGE, f"--size {text!r}: give width x height in px, e.g. 1500x2000")
    return int(match[1]), int(match[2])


def report(size: str | None, area_px: int, min_px: int, max_px: int, step_px: int) -> dict[str, Any]:
    """Placement of one size; without one, the table alone."""
    table = make_buckets(area_px, min_px, max_px, step_px)
    if size is None:
        return {"buckets": [f"{width}x{height}" for width, height in table], "count": len(table)}
    width, height = parse_size(size)
    found = place(width, height, assign(width, height, table))
    crops = {
        mode: crop_condition(mode, width, height, found.bucket_w, found.bucket_h, found.crop_top, found.crop_left)
        for mode in MODES
    }
    return {
        "size": f"{width}x{height}",
        "bucket": f"{found.bucket_w}x{found.bucket_h}",
        "resized": f"{found.resized_w}x{found.resized_h}",
        "crop_top": found.crop_top,
        "crop_left": found.crop_left,
        "kept": round(found.kept, 6),
        "original_hw": [height, width],
        "target_hw": [found.bucket_h, found.bucket_w],
        "crop_top_left": {mode: list(crop) for mode, crop in crops.items()},
        "time_ids": {
            mode: [height, width, top, left, found.bucket_h, found.bucket_w]  # text.size_vector, without torch
            for mode, (top, left) in crops.items()
        },
        "buckets": len(table),
    }
