"""How latents are made and which is stored where: shards of one bucket, at most 1,024 images, never changed once assigned.

`latents/plan.parquet` holds the assignment and is written before any picture is encoded, so every process and every
restart sees the same one. Pictures that are new get new shards; an assignment is a function of the one before and of
what is wanted, never of what happens to be finished.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from train.data.shards import SHARD_IMAGES
from train.prepare.tables.units import config_id, row_hash, write_parquet

FOLDER = "latents"
LATENTS_VERSION = 1
_SCHEMA = pa.schema([("shard", pa.string()), ("slot", pa.int32()), ("key", pa.string()), ("entry", pa.uint64()),
                     ("bucket_w", pa.int16()), ("bucket_h", pa.int16()), ("flip", pa.bool_())])  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How every latent of the dataset is made."""

    vae_id: str
    preproc_hash: str
    content: str
    dtype: str
    encode: str
    seed: int

    @property
    def identity(self) -> str:
        """Latents of another identity cannot be used."""
        return config_id(**asdict(self), code=LATENTS_VERSION)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One picture in one bucket, or its mirror image."""

    key: str
    bucket_w: int
    bucket_h: int
    entry: int  # `entry_of`
    flip: bool = False


def entry_of(key: str, bucket_w: int, bucket_h: int, sha256: str, *, flip: bool = False) -> int:
    """Identity of the stored latent: another file under the same key is another latent, and so is its mirror image."""
    return row_hash(key, bucket_w, bucket_h, sha256, *(["flip"] if flip else []))


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a shard and what belongs there."""

    shard: str
    slot: int
    key: str
    entry: int
    bucket_w: int
    bucket_h: int
    flip: bool = False


def make_plan(dataset: Path, wanted: Iterable[Wanted], identity: str) -> tuple[list[Slot], list[Slot]]:
    """(slots of every shard in use, those of them that are wanted), and the plan on disk brought up to date.

    `identity` covers VAE, preprocessing and content: under another one nothing that exists can be used.
    """
    path = dataset / FOLDER / "plan.parquet"
    slots = _read(path, identity)
    placed = {slot.entry for slot in slots}
    new: dict[tuple[int, int], list[Wanted]] = defaultdict(list)
    entries = set()
    for one in wanted:
        entries.add(one.entry)
        if one.entry not in placed:
            new[one.bucket_w, one.bucket_h].append(one)
    next_number = _next_numbers(slots)
    for (width, height), images in sorted(new.items()):
        images.sort(key=lambda one: (one.key, one.flip))
        for start in range(0, len(images), SHARD_IMAGES):
            number = next_number[width, height]
            next_number[width, height] += 1
            name = f"{FOLDER}/{width}x{height}-{number:05d}.safetensors"
            slots += [
                Slot(name, slot, one.key, one.entry, width, height, one.flip)
                for slot, one in enumerate(images[start : start + SHARD_IMAGES])
            ]
    if new or not path.exists() or _identity(path) != identity:
        slots.sort(key=lambda slot: (slot.shard, slot.slot))
        rows = [(s.shard, s.slot, s.key, s.entry, s.bucket_w, s.bucket_h, s.flip) for s in slots]
        columns = [list(values) for values in zip(*rows, strict=True)] or [[] for _ in _SCHEMA]
        write_parquet(path, pa.table(columns, schema=_SCHEMA), {"identity": identity})
    used = {slot.shard for slot in slots if slot.entry in entries}
    return [slot for slot in slots if slot.shard in used], [slot for slot in slots if slot.entry in entries]


def by_shard(slots: Iterable[Slot]) -> Iterator[tuple[str, list[Slot]]]:
    """(shard, its slots in order), by name."""
    shards: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        shards[slot.shard].append(slot)
    for name in sorted(shards):
        yield name, sorted(shards[name], key=lambda slot: slot.slot)


def shard_mark(slots: list[Slot], identity: str) -> str:
    """Fingerprint of a shard: its pictures in order, and how they were made."""
    return config_id(identity=identity, entries=[slot.entry for slot in slots])


def _identity(path: Path) -> str:
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return ""
    return bytes(metadata.get(b"identity", b"")).decode()


def _read(path: Path, identity: str) -> list[Slot]:
    if _identity(path) != identity:
        return []
    slots: list[Slot] = []
    with pq.ParquetFile(path) as file:
        names = [name for name in _SCHEMA.names[1:] if name in file.schema_arrow.names]  # flip came later: none
        for batch in file.iter_batches(columns=["shard", *names]):
            shards = map(sys.intern, batch["shard"].to_pylist())  # a thousand rows share each name
            slots += map(Slot, shards, *(batch[name].to_pylist() for name in names))
    return slots


def _next_numbers(slots: list[Slot]) -> dict[tuple[int, int], int]:
    numbers: dict[tuple[int, int], int] = defaultdict(int)
    for slot in slots:
        match = re.search(r"-(\d+)\.safetensors$", slot.shard)
        assert match is not None
        size = slot.bucket_w, slot.bucket_h
        numbers[size] = max(numbers[size], int(match[1]) + 1)
    return numbers
