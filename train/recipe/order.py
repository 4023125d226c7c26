"""Which images form update s: a pure function of the selection, the seed and the batch shape.

    perm(b, e)  images of bucket b sorted by (ORDER(e, uid), uid)
    stream(b)   perm(b, 0) + perm(b, 1) + ...; the epoch of position p is p // n_b
    m_b         min(m, n_b): a bucket smaller than a tile makes one tile of n_b images an epoch
    tile k of b positions k*m_b .. (k+1)*m_b-1 of stream(b); it belongs to the epoch in which it ends
    tiles(e)    all tiles of epoch e sorted by (TILE(e, id), id), id = w << 48 | h << 32 | k
    update s    tiles s*T .. s*T+T-1 of tiles(0) + tiles(1) + ...

It knows nothing of ranks, workers or time: they only slice it. A sample's key is (uid, epoch of its position), and no
pair occurs twice. That is `carry`; with `keep` (short tiles, as in the original) and `drop` every epoch stands alone,
and m_b is m.
Numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from train.base.errors import ExitCode, Halt
from train.config.stage import BatchConfig
from train.recipe import rng
from train.recipe.rng import Stream

Remainder = Literal["carry", "keep", "drop"]
Size = tuple[int, int]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

PLAN_VERSION = 1  # every tile of `carry` is full
SHORT_TILES_VERSION = 2  # buckets smaller than a tile have tiles of their own; version 1 never filled one from them


@dataclass(frozen=True)
class Tile:
    """Images of one shape that run through the network together: the slots of one micro-batch."""

    width: int
    height: int
    number: int  # k, counted per bucket over the whole run
    rows: I64  # [n] positions in the arrays the plan was made from
    uids: U64  # [n]
    epochs: I64  # [n] epoch of each slot; two values where the tile spans an epoch boundary


class Plan:
    """Update number -> tiles. Epochs are sorted when first asked for, so any update is quick from cold."""

    def __init__(
        self,
        uids: npt.ArrayLike,
        widths: npt.ArrayLike,
        heights: npt.ArrayLike,
        *,
        seed: int,
        tile_images: int,
        tiles_per_update: int,
        epochs: int,
        remainder: Remainder = "carry",
        max_updates: int | None = None,
    ) -> None:
        """`uids` uint64[N], bucket `widths` and `heights` [N]; tile_images = m, tiles_per_update = T.

        Raises Halt(MISMATCH) when two uids are equal (naming their positions) or when the images do not fill one
        update and max_updates is not given.
        """
        self._uids = np.asarray(uids, dtype=np.uint64)
        self._seed, self._m, self._t, self._remainder = seed, tile_images, tiles_per_update, remainder
        ascending = np.argsort(self._uids)  # the only sort of all images; unstable is faster, and no two are equal:
        if (self._uids[ascending[1:]] == self._uids[ascending[:-1]]).any():
            same = duplicate_uids(self._uids)
            pairs = ", ".join(f"{first} and {second}" for first, second in same[:5])
            raise Halt(
                ExitCode.MISMATCH, f"{len(same)} equal uids, at positions {pairs}: each image may come only once"
            )
        self._buckets, self._rows = _group_by_bucket(ascending, np.asarray(widths), np.asarray(heights))
        self._counts = [len(rows) for rows in self._rows]
        self._sizes = [min(self._m, count) if remainder == "carry" else self._m for count in self._counts]
        self._perms: dict[tuple[int, int], I64] = {}  # (bucket index, epoch) -> rows
        self._orders: dict[int, tuple[I64, I64]] = {}  # epoch -> (bucket index, tile number) of each of its tiles
        self.images = len(self._uids)
        self.updates_per_epoch, self.total_updates = self._lengths(epochs, max_updates)

    @property
    def buckets(self) -> list[Size]:
        """Sizes that hold images, sorted by (w, h)."""
        return list(self._buckets)

    @property
    def largest_tiles(self) -> dict[Size, int]:
        """Most images of a tile, per bucket."""
        return {size: min(self._m, count) for size, count in zip(self._buckets, self._counts, strict=True)}

    @property
    def short_buckets(self) -> dict[Size, int]:
        """Buckets that hold fewer images than a tile and make one of their own each epoch, with their images."""
        made = zip(self._buckets, self._counts, self._sizes, strict=True)
        return {bucket: count for bucket, count, size in made if size < self._m}

    @property
    def version(self) -> int:
        """What a checkpoint must have been written under: plans without short buckets are those of version 1."""
        return SHORT_TILES_VERSION if self.short_buckets else PLAN_VERSION

    @property
    def cycle_updates(self) -> int:
        """Updates of a schedule's cycle that lasts an epoch: at least 1, and never more cycles than epochs."""
        if self.short_buckets:
            return -(-self._full_images // (self._m * self._t))
        return max(1, self.images // (self._m * self._t))

    @property
    def exact_updates_per_epoch(self) -> float:
        """Updates per epoch of `carry`, the fraction included."""
        return self._full_images / (self._m * self._t)

    @property
    def _full_images(self) -> int:
        """Images of an epoch if every short tile of `carry` were full: tiles an epoch, fractions included, times m."""
        return self.images + sum(self._m - size for size in self._sizes)

    def _lengths(self, epochs: int, max_updates: int | None) -> tuple[int, int]:
        """(updates per epoch, total). `carry`: the carried tiles of epochs to come fill the last update up.

        With short buckets as many updates as all tiles of the epochs need: an epoch may be few tiles, and what the
        division leaves over would add up to whole epochs unseen.
        """
        if self._remainder == "carry":
            per_epoch = self._full_images // (self._m * self._t)
            total = -(-self._tiles_before(epochs) // self._t) if self.short_buckets else epochs * per_epoch
        else:
            tiles = self._tiles_before(1)
            per_epoch, total = tiles // self._t, epochs * tiles // self._t
        if per_epoch == 0 and max_updates is None:
            tiles = self._tiles_before(1)
            raise Halt(
                ExitCode.MISMATCH,
                f"{self.images} images do not fill one update of {self._m * self._t} (batch.effective): "
                + (f"they make {tiles} of its {self._t} tiles (batch.micro {self._m}) an epoch: " if tiles else "")
                + "select more images, lower batch.effective"
                + (f" (to {self._m * tiles} at most)" if tiles else "")
                + ", or give max_updates",
            )
        if self._tiles_before(1) == 0:
            raise Halt(
                ExitCode.MISMATCH, f"no tile of {self._m} images (batch.micro) can be filled: select more images"
            )
        if max_updates is not None:
            total = min(total, max_updates) if per_epoch else max_updates
        return per_epoch, total

    def _tiles_before(self, epoch: int) -> int:
        """Number of tiles in all epochs before this one."""
        return sum(self._tile_bound(bucket, epoch) for bucket in range(len(self._counts)))

    def _tile_bound(self, bucket: int, epoch: int) -> int:
        """First tile number of a bucket that belongs to this epoch or a later one."""
        count = self._counts[bucket]
        if self._remainder == "carry":
            return epoch * count // self._sizes[bucket]
        per_epoch = -(-count // self._m) if self._remainder == "keep" else count // self._m
        return epoch * per_epoch

    def epoch_of(self, update: int) -> int:
        """Epoch of an update's first tile."""
        position, above = update * self._t, 1
        while self._tiles_before(above) <= position:
            above *= 2
        return bisect_right(range(above + 1), position, key=self._tiles_before) - 1

    def ends_of(self, every: int | None) -> dict[int, int]:
        """{updates done: epochs done} at the end of every so many epochs, the run's own end apart; {} for None.

        An epoch is done with the update that holds its last tile, which may hold tiles of the next one too.
        """
        ends: dict[int, int] = {}
        epoch = every or 0
        while epoch and (done := -(-self._tiles_before(epoch) // self._t)) < self.total_updates:
            ends[done] = epoch  # several epochs that one update ends: the last
            epoch += every or 0
        return ends

    def update(self, s: int) -> tuple[Tile, ...]:
        """The T tiles of update s, 0 <= s < total_updates, in order."""
        if not 0 <= s < self.total_updates:
            raise IndexError(f"update {s} is outside the plan's 0..{self.total_updates - 1}")
        tiles: list[Tile] = []
        epoch = self.epoch_of(s)
        at = s * self._t - self._tiles_before(epoch)
        while len(tiles) < self._t:
            buckets, numbers = self._order(epoch)
            part = slice(at, at + self._t - len(tiles))
            pairs = zip(buckets[part].tolist(), numbers[part].tolist(), strict=True)
            tiles += [self._tile(bucket, number) for bucket, number in pairs]
            epoch, at = epoch + 1, 0
        return tuple(tiles)

    def _order(self, epoch: int) -> tuple[I64, I64]:
        """Bucket index and number of each tile of an epoch, in training order."""
        if epoch not in self._orders:
            bounds = [(self._tile_bound(b, epoch), self._tile_bound(b, epoch + 1)) for b in range(len(self._counts))]
            numbers = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in bounds])
            buckets = np.repeat(np.arange(len(bounds)), [high - low for low, high in bounds])
            ids = np.array([w << 48 | h << 32 for w, h in self._buckets], dtype=np.uint64)[buckets]
            ids |= numbers.astype(np.uint64)
            # ids ascend already (buckets are sorted), so a stable sort settles equal keys by id
            order = np.argsort(rng.sort_keys(self._seed, Stream.TILE, ids, epoch), kind="stable")
            self._orders[epoch] = buckets[order], numbers[order]
            self._forget(epoch)
        return self._orders[epoch]

    def _tile(self, bucket: int, number: int) -> Tile:
        count = self._counts[bucket]
        if self._remainder == "carry":
            size = self._sizes[bucket]
            positions = np.arange(number * size, (number + 1) * size)
        else:
            per_epoch = self._tile_bound(bucket, 1)
            epoch, inside = divmod(number, per_epoch)
            first = epoch * count + inside * self._m
            positions = np.arange(first, min(first + self._m, (epoch + 1) * count))
        epochs, places = np.divmod(positions, count)
        rows = np.empty(len(positions), dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            rows[here] = self._permutation(bucket, epoch)[places[here]]
        width, height = self._buckets[bucket]
        return Tile(width, height, number, rows, self._uids[rows], epochs)

    def _permutation(self, bucket: int, epoch: int) -> I64:
        if (bucket, epoch) not in self._perms:
            rows = self._rows[bucket]
            # rows ascend by uid, so a stable sort settles equal keys by uid
            order = np.argsort(rng.sort_keys(self._seed, Stream.ORDER, self._uids[rows], epoch), kind="stable")
            self._perms[bucket, epoch] = rows[order]
        return self._perms[bucket, epoch]

    def _forget(self, epoch: int) -> None:
        """Drop what lies far from this epoch; it would be made again if asked for."""
        self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 1}
        self._perms = {(b, e): rows for (b, e), rows in self._perms.items() if abs(e - epoch) <= 1}


def _group_by_bucket(
    ascending: I64, widths: npt.NDArray[Any], heights: npt.NDArray[Any]
) -> tuple[list[Size], list[I64]]:
    """Sizes present, sorted by (w, h), and per size its rows in the order of `ascending`, the rows by uid."""
    if not len(ascending) == len(widths) == len(heights):
        raise ValueError(f"lengths differ: {len(ascending)} uids, {len(widths)} widths, {len(heights)} heights")
    order = ascending
    for sides in (heights, widths):  # stable, so the last one leads; numpy counts 16-bit keys instead of comparing
        small = sides.astype(np.uint16 if len(sides) and 0 <= sides.min() <= sides.max() < 1 << 16 else np.int64)
        order = order[np.argsort(small[order], kind="stable")]
    if not len(order):
        return [], []
    w, h = widths[order], heights[order]
    starts = np.flatnonzero((w[1:] != w[:-1]) | (h[1:] != h[:-1])) + 1
    firsts = [0, *starts.tolist()]
    return [(int(w[first]), int(h[first])) for first in firsts], np.split(order, starts)


def duplicate_uids(uids: npt.ArrayLike) -> list[tuple[int, int]]:
    """Pairs of positions that hold the same uid, each against the first of its kind; empty when all differ."""
    array = np.asarray(uids, dtype=np.uint64)
    order = np.argsort(array, kind="stable")
    equal = np.flatnonzero(array[order][1:] == array[order][:-1])
    if not len(equal):
        return []
    first: dict[int, int] = {}
    for at in equal.tolist():
        first.setdefault(int(array[order[at]]), int(order[at]))
    return sorted((first[int(array[order[at + 1]])], int(order[at + 1])) for at in equal.tolist())


def tiles_per_update(micro: int, effective: int, world: int) -> tuple[int, int]:
    """(T, accumulation): tiles per update = effective / micro, and how many of them each of `world` processes runs.

    Raises Halt(MISMATCH) listing the valid choices unless micro x accumulation x world = effective.
    """
    if effective % micro:
        valid = ", ".join(str(choice) for choice in divisors(effective))
        raise Halt(ExitCode.MISMATCH, f"batch.micro {micro} does not divide batch.effective {effective}: use {valid}")
    tiles = effective // micro
    if tiles % world:
        valid = ", ".join(str(choice) for choice in divisors(tiles))
        micros = ", ".join(str(choice) for choice in divisors(effective) if (effective // choice) % world == 0)
        raise Halt(
            ExitCode.MISMATCH,
            f"{world} processes cannot share the {tiles} tiles of an update (batch.effective {effective} / "
            f"batch.micro {micro}): valid numbers of processes are {valid}; with {world} processes "
            + (f"batch.micro may be {micros}" if micros else f"batch.effective must be a multiple of {world}"),
        )
    return tiles, tiles // world


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def virtual_ranks(tiles: int) -> int:
    """Largest power of two dividing T: the fixed number of partial sums in which `strict` adds gradients."""
    return tiles & -tiles


def partial_sums(virtual_per_rank: int) -> int:
    """Gradients that `strict` keeps beside the one being summed, at most, while a tile is run: set bits of V - 1."""
    return virtual_per_rank.bit_length() - 1


def check_strict_world(tiles_per_update: int, world: int) -> int:
    """Virtual ranks per process of `determinism: strict`. Raises Halt(MISMATCH) unless the world is a power of two up to V."""
    virtual = virtual_ranks(tiles_per_update)
    if world & (world - 1) or world > virtual:
        choices = [2**k for k in range(virtual.bit_length())]
        raise Halt(
            ExitCode.MISMATCH,
            f"batch.determinism: strict with {tiles_per_update} tiles per update runs on "
            f"{', '.join(map(str, choices))} processes, not {world}; a smaller batch.micro allows more",
        )
    return virtual // world


def share_of(batch: BatchConfig, world: int) -> tuple[int, int]:
    """(tiles of every update per process, virtual ranks per process: strict only).

    Raises Halt(MISMATCH) with the valid choices when the tiles do not divide among `world` processes.
    """
    tiles, accumulation = tiles_per_update(batch.micro, batch.effective, world)
    if batch.accumulation not in (None, accumulation):
        raise Halt(
            ExitCode.MISMATCH,
            f"batch.accumulation {batch.accumulation} x micro {batch.micro} x {world} processes is not "
            f"batch.effective {batch.effective}: leave it null, or give {accumulation}",
        )
    return accumulation, check_strict_world(tiles, world) if batch.determinism == "strict" else 1


def plan_fingerprint(
    *,
    seed: int,
    tile_images: int,
    tiles_per_update: int,
    remainder: str,
    min_bucket: int,
    dataset: str,
    selection: str,
    tokenizers: str,
    version: int = PLAN_VERSION,
    law_file: str | None = None,
    flips: str | None = None,
    protect: str | None = None,
) -> str:
    """sha256 hex over everything that decides the plan and the captions; not ranks, workers, paths or `batch.split`.

    `version`: the plan's own. `min_bucket` is micro where the config leaves it null, which is what that meant when the
    first checkpoints were written. `dataset`: the dataset fingerprint; `selection`: sha256 of the selection after the held-out split; `tokenizers`:
    their identity hash; `law_file`: sha256 of what noise.law reads, where it reads a file; `flips`: of which images
    have a mirror image, where data.flip draws it; `protect`: sha256 of the tags of data.protect, where that is a file.
    """
    fields = {
        "plan_version": version,
        "seed": seed,
        "m": tile_images,
        "T": tiles_per_update,
        "remainder": remainder,
        "min_bucket": min_bucket,
        "dataset": dataset,
        "selection": selection,
        "tokenizers": tokenizers,
        **({"law_file": law_file} if law_file else {}),
        **({"flips": flips} if flips else {}),
        **({"protect": protect} if protect else {}),
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
