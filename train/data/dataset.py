"""One tile of the plan as tensors: latents, noise, timesteps, token ids and size numbers.

Everything random about a slot is a function of (seed, uid, epoch), so it does not matter which process or worker
makes it. Shape legend: B images of a tile, C latent channels, H W latent rows and columns, N text chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.config.stage import DataConfig, NoiseConfig
from train.data.index import Index, mask_shard
from train.data.shards import ShardReader
from train.diffusion.noise import needs_means, tile_noise
from train.diffusion.objective import Batch
from train.model.text import TagTokenizer, size_vector
from train.model.vae_file import LatentScale
from train.recipe import rng
from train.recipe.buckets import crop_condition
from train.recipe.captions import SEPARATOR, Drawn, DrawOptions, draw_captions, protected, tags_of
from train.recipe.exclusions import excluded_by
from train.recipe.order import Plan, Tile
from train.recipe.rng import Stream
from train.recipe.schedule import steps_of
from train.recipe.timesteps import Law

Places = Sequence[tuple[int, bool]]  # row of the index, whether its mirror image


class TileDataset(Dataset[Batch | Halt]):
    """Map-style dataset over (plan step, tile of the update)."""

    def __init__(
        self,
        index: Index,
        plan: Plan,
        reader: ShardReader,
        tokenizer: TagTokenizer,
        *,
        seed: int,
        data: DataConfig,
        noise: NoiseConfig,
        scale: LatentScale,
        total_updates: int,
        masked: bool = False,
    ) -> None:
        self.index, self.plan, self.reader, self.tokenizer = index, plan, reader, tokenizer
        self.seed, self.data, self.noise, self.scale, self.masked = seed, data, noise, scale, masked
        self.options = draw_options(data, total_updates)
        self.max_tokens, self.overflow, self.law = data.max_tokens, data.overflow, Law.of(noise)

    def __getitem__(self, place: tuple[int, int]) -> Batch | Halt:
        """Tile `place[1]` of plan step `place[0]`, or the reason why it cannot be made.

        A Halt is returned, not raised: the loader rebuilds a worker's exception from its text and loses the code.
        """
        step, number = place
        try:
            if torch.utils.data.get_worker_info() is not None:
                faults.at("worker", step)
            tiles = self.plan.update(step)
            return self.make(tiles, number, step)
        except Halt as halt:
            return halt

    def make(self, tiles: Sequence[Tile], number: int, step: int) -> Batch:
        """The tensors of tile `number` of those of update `step`."""
        tile, first_slot = tiles[number], sum(len(before.rows) for before in tiles[:number])
        flips = self._flips(tile)
        latents_BCHW, places, substituted = self._latents(tile, step, flips)
        shape = tuple(latents_BCHW.shape[1:])
        means_BC = latents_BCHW.mean(dim=(2, 3)).numpy() if needs_means(self.noise) else None
        noises = tile_noise(
            self.noise, self.seed, tile.uids.tolist(), tile.epochs.tolist(), shape, latent_means_BC=means_BC
        )
        timesteps_B = self.law.timesteps(self.seed, tiles)[first_slot : first_slot + len(tile.rows)]
        ids, dropped = self._token_ids(tile, step)
        sizes = size_numbers(self.index, tile, self.data.crop_conditioning, flips)
        slots_B = np.arange(first_slot, first_slot + len(tile.rows))
        batch = assembled(tile, latents_BCHW, noises, timesteps_B, ids, sizes, slots_B)
        if (weights := self.index.weights) is not None:
            batch = replace(batch, weights_B=torch.from_numpy(weights[tile.rows]))
        if self.masked:
            batch = replace(batch, masks_B1HW=read_masks(self.index, self.reader, places, latents_BCHW))
        return replace(batch, step=step, tags_dropped=dropped, substituted=substituted)

    def _flips(self, tile: Tile) -> list[bool]:
        """Which of the tile's pictures are their mirror image in this visit: half of the visits of those that have one."""
        if not self.data.flip:
            return [False] * len(tile.rows)
        drawn_B = rng.first_words(self.seed, Stream.FLIP, tile.uids, tile.epochs)[:, 0] < rng.threshold(0.5)
        mirrored: list[bool] = (drawn_B & self.index.flips[tile.rows]).tolist()
        return mirrored

    def _latents(self, tile: Tile, step: int, flips: list[bool]) -> tuple[torch.Tensor, Places, tuple[str, ...]]:
        """(latents, the (row of the index, whether mirrored) that each is of, keys of those that were replaced)."""
        faults.at("read", step)
        rows: list[int] = tile.rows.tolist()
        substituted: list[str] = []
        try:
            raw_BCHW, first = self._read(rows, flips)
        except Halt as halt:
            if self.data.on_read_error == "stop":
                raise naming_the_picture(halt, self.index, self.reader, rows, flips) from halt
            rows, substituted, flips = self._readable(rows, tile, flips)
            raw_BCHW, first = self._read(rows, flips)
        expected = (tile.height // 8, tile.width // 8)
        if tuple(raw_BCHW.shape[2:]) != expected:
            raise Halt(
                ExitCode.MISMATCH,
                f"latents of bucket {tile.width}x{tile.height} in {first} are {tuple(raw_BCHW.shape[2:])}, "
                f"not {expected}: run scripts/prepare.py latents again",
            )
        if self.index.content == "moments":
            raw_BCHW = _draw_moments(raw_BCHW, self.seed, tile)
        return self.scale.to_model(raw_BCHW), list(zip(rows, flips, strict=True)), tuple(substituted)

    def _read(self, rows: Sequence[int], flips: Sequence[bool]) -> tuple[torch.Tensor, str]:
        return read_rows(self.index, self.reader, rows, flips), self.index.latent(rows[0], flip=flips[0])[0]

    def _readable(self, rows: list[int], tile: Tile, flips: Sequence[bool]) -> tuple[list[int], list[str], list[bool]]:
        """Each unreadable row replaced by the next uid of its bucket, in uid order and not mirrored; the slot's key stays."""
        in_bucket = np.flatnonzero((self.index.bucket_w == tile.width) & (self.index.bucket_h == tile.height))
        order = in_bucket[np.argsort(self.index.uids[in_bucket])].tolist()
        result, replaced, mirrored = [], [], []
        for row, flip in zip(rows, flips, strict=True):
            start = order.index(row)
            candidates = order[start:] + order[:start]
            good = next((c for c in candidates if self._can_read(c, flip and c == row)), None)
            if good is None:
                raise Halt(
                    ExitCode.MISMATCH,
                    f"no readable latents in bucket {tile.width}x{tile.height}, such as those of {self.index.named(row)}: run "
                    "scripts/prepare.py latents again",
                )
            if good != row:
                replaced.append(self.index.named(row))
            result.append(good)
            mirrored.append(flip and good == row)
        return result, replaced, mirrored

    def _can_read(self, row: int, flip: bool) -> bool:
        try:
            self._read([row], [flip])
        except Halt:
            return False
        return True

    def _token_ids(self, tile: Tile, step: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        protect = self.options.protect
        fitted = [
            self.tokenizer.fit(one.fixed, one.flex, self.max_tokens, self.overflow, after=one.after, protect=protect)
            for one in self.drawn(tile, step)
        ]
        ids = self.tokenizer.chunk_ids_many([content for content, _ in fitted], self.max_tokens)
        return ids, sum(cut for _, cut in fitted)

    def drawn(self, tile: Tile, step: int) -> list[Drawn]:
        """What each image of the tile is called in plan step `step`."""
        records = [self.index.record(row) for row in tile.rows.tolist()]
        uids, epochs = tile.uids.tolist(), tile.epochs.tolist()
        return draw_captions(records, self.options, seed=self.seed, uids=uids, epochs=epochs, update=step)


def assembled(
    tile: Tile,
    latents_BCHW: torch.Tensor,
    noises: tuple[np.ndarray, np.ndarray],
    timesteps_B: np.ndarray,
    ids: tuple[np.ndarray, np.ndarray],
    sizes: Sequence[Sequence[int]],
    slots_B: np.ndarray,
) -> Batch:
    """A batch of no step, from what one of its sources brings: the plan, the held-out images, or the trial of a shape.

    noises: of the target and as added, float32 [B,C,H,W], one array where they are equal. ids: of both encoders, [B,N,77]. sizes: six numbers each.
    """
    noise, added = noises
    ids_1_BN77, ids_2_BN77 = map(torch.from_numpy, ids)
    return Batch(
        latents_BCHW=latents_BCHW,
        noise_BCHW=torch.from_numpy(noise),
        input_noise_BCHW=None if added is noise else torch.from_numpy(added),  # else pinned and copied twice
        timesteps_B=torch.from_numpy(timesteps_B),
        ids_1_BN77=ids_1_BN77,
        ids_2_BN77=ids_2_BN77,
        size_B6=torch.tensor(sizes, dtype=torch.float32),
        slots_B=torch.from_numpy(slots_B),
        step=-1,
        tile=tile,
        tags_dropped=0,
    )


def read_rows(index: Index, reader: ShardReader, rows: Sequence[int], flips: Sequence[bool] | None = None) -> torch.Tensor:
    """What is stored of these rows of the index, or of their mirror images, fp32 [B,C,H,W]. Raises Halt(MISMATCH) as `ShardReader.read`."""
    places = [index.latent(row, flip=flip) for row, flip in zip(rows, flips or [False] * len(rows), strict=True)]
    return reader.read([shard for shard, _ in places], [place for _, place in places])


def read_masks(index: Index, reader: ShardReader, images: Places, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """The masks of these images, fp32 [B,1,H,W] of the latents' size; ones for one without."""
    masks_B1HW = torch.ones((len(images), 1, *latents_BCHW.shape[2:]))
    having = [number for number, (row, _) in enumerate(images) if index.masked is not None and index.masked[row]]
    if having:
        shards, places = zip(*(index.latent(images[number][0], flip=images[number][1]) for number in having), strict=True)
        found = reader.read(list(map(mask_shard, shards)), list(places))
        if found.shape[1:] != masks_B1HW.shape[1:]:
            raise Halt(ExitCode.MISMATCH, f"masks of {index.named(images[having[0]][0])} are {tuple(found.shape[2:])}, its latents "
                       f"{tuple(latents_BCHW.shape[2:])}: run scripts/prepare.py latents again")  # fmt: skip
        masks_B1HW[having] = found
    return masks_B1HW


def size_numbers(
    index: Index, tile: Tile, crop_conditioning: Literal["actual", "kohya", "zero"], flips: Sequence[bool] | None = None
) -> list[tuple[int, ...]]:
    """The six numbers by which each image of a tile tells the U-Net its size and crop; of a mirror image the mirrored crop."""
    found: list[tuple[int, ...]] = []
    for row, flip in zip(tile.rows.tolist(), flips or [False] * len(tile.rows), strict=True):
        original = (int(index.orig_w[row]), int(index.orig_h[row]))
        left = int(index.crop_left[row])
        crop = (int(index.crop_top[row]), int(index.resized_w[row]) - tile.width - left if flip else left)
        top, left = crop_condition(crop_conditioning, *original, tile.width, tile.height, *crop)
        found.append(size_vector(*original, top, left, tile.width, tile.height))
    return found


def naming_the_picture(halt: Halt, index: Index, reader: ShardReader, rows: Sequence[int], flips: Sequence[bool] | None = None) -> Halt:
    """The refusal of one of `rows` with the picture that it is about: shard and row say nothing to who looks for it."""
    for row, flip in zip(rows, flips or [False] * len(rows), strict=True):
        shard, place = index.latent(row, flip=flip)
        try:
            reader.read([shard], [place])
        except Halt:
            instead = "with data.on_read_error=substitute a run goes on without it"
            return Halt(halt.code, f"{index.named(row)}: {halt.message}; {instead}")
    return halt


def draw_options(data: DataConfig, total_updates: int) -> DrawOptions:
    """What is drawn from a caption; a warmup below 1 is a share of all updates.

    Raises Halt(USAGE) for a trigger that is no tag, or one that the hard exclusions refuse: it would open every caption.
    """
    if data.trigger is not None:
        if excluded_by(rating="e", tags=[data.trigger], caption=data.trigger) is not None:
            raise Halt(ExitCode.USAGE, "data.trigger is a word that the hard exclusions refuse: choose another")
        if tags_of(data.trigger) != [data.trigger] or SEPARATOR in data.trigger:
            raise Halt(ExitCode.USAGE, f"data.trigger is {data.trigger!r}: one tag without commas and {SEPARATOR}")
    return DrawOptions(
        shuffle=data.shuffle_tags,
        tag_dropout=data.tag_dropout,
        caption_dropout=data.caption_dropout,
        caption_dropout_every_epochs=data.caption_dropout_every_epochs,
        warmup_min=data.token_warmup_min,
        warmup_updates=steps_of(data.token_warmup_steps, total_updates),
        protect=protected(data.protect),
        trigger=data.trigger,
        mix=data.mix,
    )


def _draw_moments(moments_BCHW: torch.Tensor, seed: int, tile: Tile) -> torch.Tensor:
    """A fresh VAE sample for each (image, epoch) from stored mean and log-variance."""
    mean, logvar = moments_BCHW.chunk(2, dim=1)
    shape = tuple(mean.shape[1:])
    normals = rng.normals_many(seed, Stream.VAE_SAMPLE, tile.uids.tolist(), tile.epochs.tolist(), shape)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * torch.from_numpy(normals)


def synthetic_part(width: int, height: int, images: int, tokenizer: TagTokenizer, max_tokens: int) -> Batch:
    """A batch of that shape with the longest possible caption; values are fixed and unimportant."""
    shape = (images, 4, height // 8, width // 8)
    noise_BCHW = torch.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)
    rows = np.zeros(images, dtype=np.int64)
    tile = Tile(width, height, 0, rows, rows.astype(np.uint64), rows)
    ids = tokenizer.chunk_ids_many([[tokenizer.eos - 2] * max_tokens] * images, max_tokens)
    sizes = [size_vector(width, height, 0, 0, width, height)] * images
    return assembled(tile, noise_BCHW.flip(0) * 0.5, (noise_BCHW.numpy(),) * 2, np.full(images, 500), ids, sizes, np.arange(images))
