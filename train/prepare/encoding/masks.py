"""Which part of each picture counts in the loss: masks of the size of its latents, in shards beside theirs.

`masks/` has the names and the rows of `latents/`; a row without a mask is one. They are made after the latents and by
themselves, so that a mask that changes costs no encoding. Whose picture has no mask counts whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from train.base.errors import Halt
from train.config.dataset import DatasetConfig, ProbeConfig, SourceConfig, dataset_dir
from train.data.index import mask_shard
from train.data.shards import read_meta, write_shard
from train.prepare.choosing.facts import Facts
from train.prepare.encoding.shard_plan import Slot
from train.prepare.folders.kinds import is_image
from train.prepare.images.looks import Look, Veil, file_stamp, mask_one
from train.prepare.tables.pool import Pool
from train.prepare.tables.units import config_id
from train.prepare.tables.workers import Peers
from train.recipe.buckets import place

MASKS_VERSION = 1
Shard = tuple[str, list[Slot]]


@dataclass
class Masks:
    """What was made: of each latent shard {row: digest of its mask}, what is to be said, and (key, why) of what failed."""

    digests: dict[str, dict[int, int]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def make_masks(
    settings: DatasetConfig, shards: Sequence[Shard], entries: set[int], facts: Facts, peers: Peers
) -> Masks:
    """Make every mask shard that is missing or stale; nothing at all where no source has masks."""
    if all(source.mask is None for source in settings.sources):
        return Masks()
    _names.cache_clear()
    dataset, total = dataset_dir(settings), Counter[tuple[str, bool]]()
    marks: dict[int, str] = {}
    for number, shard in enumerate(shards):
        jobs = dict(_jobs(settings, shard, entries, facts, total))
        if jobs:
            marks[number] = _mark(dataset / shard[0], jobs)

    def ready(number: int, path: Path) -> bool:
        return _meta(path).get("fingerprint") == marks[number]

    files = [(number, dataset / mask_shard(shards[number][0])) for number in marks]
    missing = [number for number, path in files if not ready(number, path)]
    if missing:
        ours = sum(len(dict(_jobs(settings, shards[n], entries, facts))) for n in missing if peers.owns(n))
        with Pool.of_pictures(mask_one, settings) as pool, peers.progress(ours, "latents: masks", "masks") as bar:

            def make(number: int) -> None:
                if not ready(number, dataset / mask_shard(shards[number][0])):
                    _make(dataset, shards[number][0], dict(_jobs(settings, shards[number], entries, facts)), pool, bar)

            for number in missing:
                if peers.owns(number):
                    make(number)
            peers.wait_for(files, make, ready)
    return _read(dataset, {shards[number][0] for number in marks}, total)


def _read(dataset: Path, shards: set[str], total: Counter[tuple[str, bool]]) -> Masks:
    found, black = Masks(), 0
    for name in sorted(shards):
        meta = read_meta(dataset / mask_shard(name))
        found.digests[name] = {int(row): int(digest, 16) for row, digest in json.loads(meta["masks"]).items()}
        found.unreadable += [(str(key), str(why)) for key, why in json.loads(meta["unreadable"])]
        black += int(meta["black"])
    for source in sorted({source for source, _ in total}):
        found.said.append(f"{total[source, True]} pictures of {source} have a mask, {total[source, False]} have none and count whole")
    if black:
        found.said.append(f"{black} masks are black all over: with loss.mask nothing is learnt of their pictures")
    return found


def _jobs(
    settings: DatasetConfig, shard: Shard, entries: set[int], facts: Facts, total: Counter[tuple[str, bool]] | None = None
) -> Iterator[tuple[int, tuple[str, Veil]]]:
    """(row, (key, its mask to make)) of those pictures of a shard that have one; `total` counts by source."""
    name, slots = shard
    stored = {slot: row for row, slot in enumerate(json.loads(read_meta(dataset_dir(settings) / name)["slots"]))}
    sources = {source.name: source for source in settings.sources if source.mask is not None}
    for slot in slots:
        if slot.slot not in stored or slot.entry not in entries or (fact := facts[slot.key])["source"] not in sources:
            continue
        job = _veil(sources[fact["source"]], settings.probe, fact, slot)
        if total is not None and not slot.flip:
            total[fact["source"], job is not None] += 1
        if job is not None:
            yield stored[slot.slot], (slot.key, job)


def _veil(source: SourceConfig, rules: ProbeConfig, fact: Mapping[str, Any], slot: Slot) -> Veil | None:
    size = (fact["width"], fact["height"])
    placement = place(*size, (slot.bucket_w, slot.bucket_h))
    if source.mask == "alpha":
        look = Look(source, rules, fact["uri"], fact["member"])
        return Veil(look, placement, size, fact["sha256"], slot.flip) if fact["has_alpha"] else None
    name = _beside(str(source.mask), fact["member"] or fact["uri"])
    if name is None:
        return None
    folder = SourceConfig(name=source.name, path=str(source.mask), follow_links=source.follow_links)
    return Veil(Look(folder, replace(rules, min_area_px=None), name, None), placement, size, None, slot.flip)


def _beside(folder: str, name: str) -> str | None:
    """The picture in the mask folder at the same place: of the same name, or else the first of another ending."""
    path = PurePosixPath(name)
    there = _names(os.path.join(folder, str(path.parent)))
    found = path.name if path.name in there.get(path.stem, ()) else min(there.get(path.stem, ()), default=None)
    return None if found is None else str(path.parent / found)


@lru_cache(maxsize=16)
def _names(folder: str) -> Mapping[str, tuple[str, ...]]:
    """Pictures of a folder by their name without ending."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        for name in os.listdir(folder):
            if is_image(name):
                stem = PurePosixPath(name).stem
                found[stem] = (*found.get(stem, ()), name)
    except OSError:  # told as pictures without a mask
        pass
    return found


def _mark(latents: Path, jobs: Mapping[int, tuple[str, Veil]]) -> str:
    """Fingerprint of a mask shard: its latents, and the files that say the masks."""
    said = [[row, job.look.uri, *(file_stamp(job.look.source, job.look.uri) if job.sha256 is None else [job.sha256])]
            for row, (_, job) in sorted(jobs.items())]  # fmt: skip
    meta = read_meta(latents)
    return config_id(code=MASKS_VERSION, latents=[meta["fingerprint"], meta["slots"]], masks=said)


def _meta(path: Path) -> Mapping[str, str]:
    """Of a mask shard; nothing of one that is missing or damaged, which is made anew."""
    try:
        return read_meta(path)
    except Halt:
        return {}


def _make(dataset: Path, name: str, jobs: Mapping[int, tuple[str, Veil]], pool: Pool[Veil, Any], bar: Any) -> None:
    first = next(iter(jobs.values()))[1].place
    rows = len(json.loads(read_meta(dataset / name)["slots"]))
    masks_N1HW = np.ones((rows, 1, first.bucket_h // 8, first.bucket_w // 8), np.float16)
    digests: dict[int, str] = {}
    unreadable: list[tuple[str, str]] = []
    black = 0
    for (row, (key, _)), mask in zip(jobs.items(), pool.map([job for _, job in jobs.values()]), strict=True):
        bar.update(1)
        if not isinstance(mask, np.ndarray):
            unreadable.append((key, mask.message))
            continue
        masks_N1HW[row, 0] = mask
        digests[row] = hashlib.blake2b(mask.tobytes(), digest_size=8).hexdigest()
        black += not mask.any()
    path = dataset / mask_shard(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, torch.from_numpy(masks_N1HW), {
        "fingerprint": _mark(dataset / name, jobs), "masks": json.dumps(digests), "black": str(black),
        "unreadable": json.dumps(sorted(unreadable)),
    })  # fmt: skip
