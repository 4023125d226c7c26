"""Sizes of pictures from their headers, equal files, and pictures that look alike; how many were looked at is part of the result."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.config.dataset import ProbeConfig, SourceConfig
from train.prepare.dedupe import near_groups
from train.prepare.folders.files import UnsafePath, read_image, resolve_inside, source_root
from train.prepare.images.decode import Refused, peek
from train.prepare.images.looks import Look, probe_one
from train.recipe.buckets import assign_many, make_buckets
from train.tools.new.facts import Pictures

LOOK_HEADERS = 2000
LOOK_PIXELS = 64  # decoded
_HASH_FILES, _HASH_BYTES = 1000, 1 << 30  # read to compare files of equal length
_HEADER_BYTES = 1 << 16
_ALIKE_BITS = 3  # as dedupe.phash_distance


Found = tuple[SourceConfig, Mapping[str, Any]]  # a record and where it is from


def look(found: Sequence[Found], side_px: int, buckets: Mapping[str, int]) -> Pictures:
    """The pictures of these records; side_px: of the base, buckets: the keys of the table of sizes for it."""
    some = found[:: max(1, -(-len(found) // LOOK_HEADERS))]
    sizes, refused = [], Counter[str]()
    for source, row in some:
        try:
            sizes.append(_size(source, row))
        except (Refused, UnsafePath, OSError, ValueError, KeyError) as error:
            refused[error.reason if isinstance(error, Refused) else "missing_file"] += 1
    areas = sorted(width * height for width, height in sizes) or [0]
    usable = [size for size in sizes if max(size) <= ProbeConfig().max_aspect * min(size)]
    placed = Counter(bucket for _, bucket in assign_many([w for w, _ in usable], [h for _, h in usable], [make_buckets(**buckets)]))
    middle = sorted(sizes, key=lambda size: size[0] * size[1])[len(sizes) // 2] if sizes else (0, 0)
    own_px = side_px * side_px
    alike, compared = _alike(found)
    return Pictures(
        looked=len(some), unreadable=refused.total(), reasons=tuple(f"{count} {reason}" for reason, count in sorted(refused.items())),
        median_px=middle, areas_px=(areas[len(areas) // 10], areas[len(areas) // 2], areas[-1 - len(areas) // 10]),
        enlarged=_share(areas, own_px * 0.9), half=_share(areas, own_px * 9 / 16), extreme=refused["aspect_ratio"], animated=refused["animated"],
        sizes=tuple(size for size, _ in sorted(placed.items(), key=lambda one: (-one[1], one[0]))), doubles=_doubles(found),
        alike=alike, compared=compared,
    )  # fmt: skip


def _share(areas: Sequence[int], least: float) -> float:
    return round(sum(0 < area < least for area in areas) / len(areas), 3)


def _size(source: SourceConfig, row: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) in px, upright."""
    if row["member"] is not None:
        return peek(io.BytesIO(read_image(source, row["uri"], row["member"])), ProbeConfig())
    with open(resolve_inside(source_root(source), row["uri"], source.follow_links), "rb") as file:
        return peek(file, ProbeConfig())


def _doubles(found: Sequence[Found]) -> int:
    """Files beyond the first of each content, among those of equal length."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for name in _files(found):
        by_length[os.stat(name).st_size].append(name)
    content, read, files = Counter[tuple[int, bytes]](), 0, 0
    for length, names in sorted(by_length.items()):
        if len(names) < 2:
            continue
        for name in names:
            read, files = read + length, files + 1
            if read > _HASH_BYTES or files > _HASH_FILES:
                return sum(count - 1 for count in content.values())
            with open(name, "rb") as file:
                content[length, hashlib.file_digest(file, "sha256").digest()] += 1
    return sum(count - 1 for count in content.values())


def _files(found: Sequence[Found]) -> Iterator[str]:
    names = (str(source_root(source) / row["uri"]) for source, row in found if row["member"] is None)
    yield from (name for name in dict.fromkeys(names) if os.path.isfile(name))


def _alike(found: Sequence[Found]) -> tuple[int, int]:
    """(pictures that look like another one, pictures compared)."""
    some = found[:: max(1, -(-len(found) // LOOK_PIXELS))]
    looks = [probe_one(Look(source, ProbeConfig(), row["uri"], row["member"])) for source, row in some]
    seen = {one["pixel_hash"]: one["phash"] for one in looks if isinstance(one, dict)}
    groups = near_groups(np.array(list(seen.values()), np.uint64), _ALIKE_BITS)
    return sum(len(group) - 1 for group in groups), len(some)
