"""Held-out loss: the same images, noise and timesteps in every stage and run, so that the numbers compare.

Nothing here depends on a stage's seed, its noise options or its loss weights: plain noise, captions in their written
order, the mean squared error of the prediction. Shape legend: B images of a batch, C H W latent, N held-out images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from train.base.errors import Halt
from train.data.dataset import assembled, naming_the_picture, read_rows, size_numbers, synthetic_part
from train.data.index import Index
from train.data.shards import ShardReader
from train.diffusion.objective import Batch
from train.model.text import TagTokenizer
from train.model.vae_file import LatentScale
from train.recipe import rng
from train.recipe.captions import Caption
from train.recipe.order import Tile
from train.recipe.rng import Stream

SEED = 0  # of the validation's noise and timesteps; the same for every stage, on purpose
TIMESTEPS = (0, 1000)  # upper end exclusive
BANDS = 4  # of timesteps, as further strata: most of what makes one image's loss larger than another's
LABELS = ("quality", "rating", "year", "aesthetic")
CAPTIONS = ("tags", "tags_prose", "prose", "variant")  # ways to tell a picture; variant = its second caption of tags
Z_975 = 1.959964  # of the normal distribution
T_975 = (12.7062, 4.3027, 3.1824, 2.7764)  # of Student's t with 1 to 4 degrees of freedom

U64 = npt.NDArray[np.uint64]


def chosen(uids: U64, count: int) -> npt.NDArray[np.int64]:
    """Positions of the `count` held-out images to measure, by rising uid: a smaller count is part of a larger."""
    return np.argsort(uids, kind="stable")[:count].astype(np.int64)


def fixed_timesteps(uids: U64) -> npt.NDArray[np.int64]:
    """One timestep per image, int64[N], a function of the uid alone."""
    return rng.timesteps(SEED, uids, 0, *TIMESTEPS, stream=Stream.VALIDATION_TIMESTEP)


def fixed_noise(uid: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """The noise of one image, float32 of `shape` (C,H,W), a function of the uid alone."""
    return rng.normals(SEED, Stream.VALIDATION_NOISE, uid, 0, shape)


@dataclass(frozen=True)
class Making:
    """How a held-out image becomes a batch row: the stage's conventions, without its randomness."""

    scale: LatentScale  # of the VAE
    max_tokens: int = 225
    crop_conditioning: Literal["actual", "kohya", "zero"] = "actual"


def batches(index: Index, micro: int) -> Iterator[npt.NDArray[np.int64]]:
    """Positions in `index` cut into runs of one bucket, at most `micro` long; the same for any number of processes."""
    order = np.lexsort((index.uids, index.bucket_h, index.bucket_w))
    sizes = list(zip(index.bucket_w[order].tolist(), index.bucket_h[order].tolist(), strict=True))
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or sizes[end] != sizes[start] or end - start == micro:
            yield order[start:end].astype(np.int64)
            start = end


def make_batch(
    index: Index, reader: ShardReader, tokens: TagTokenizer, rows: npt.NDArray[np.int64], making: Making,
    kind: str | None = None,
) -> Batch:  # fmt: skip
    """The held-out images `rows` (of one bucket) with their fixed noise and timesteps; `kind`: one of CAPTIONS, None = as written."""
    try:
        raw_BCHW = read_rows(index, reader, rows.tolist())
    except Halt as halt:
        raise naming_the_picture(halt, index, reader, rows.tolist()) from halt
    if index.content == "moments":
        raw_BCHW = raw_BCHW.chunk(2, dim=1)[0]  # the mean: nothing is drawn
    shape = tuple(raw_BCHW.shape[1:])
    uids = index.uids[rows]
    noise_BCHW = np.stack([fixed_noise(uid, shape) for uid in uids.tolist()])
    said = [caption_of(index.record(row), kind) for row in rows.tolist()]
    contents = [tokens.fit(fixed, flex, making.max_tokens, after=after)[0] for fixed, flex, after in said]
    ids = tokens.chunk_ids_many(contents, making.max_tokens)
    size = int(index.bucket_w[rows[0]]), int(index.bucket_h[rows[0]])
    tile = Tile(*size, 0, rows, uids, np.zeros(len(rows), dtype=np.int64))
    sizes = size_numbers(index, tile, making.crop_conditioning)
    return assembled(tile, making.scale.to_model(raw_BCHW), (noise_BCHW, noise_BCHW), fixed_timesteps(uids), ids, sizes, rows)


def caption_of(record: Caption, kind: str | None = None) -> tuple[Sequence[str], Sequence[str], list[str]]:
    """(fixed, flexible, what follows them) of a record as written, with its first text of prose, or of one kind of its captions."""
    if kind == "variant":
        fixed, flex, tail = record.variants[0]
        return fixed, flex, tail
    text = [] if kind == "tags" else list(record.prose[:1])
    return ([], [], text) if kind == "prose" else (record.fixed, record.flex, [*record.tail, *text])


def captions_of(index: Index) -> dict[str, tuple[list[int], list[int]]]:
    """{kind: (positions whose caption of it is the one as written, positions of another)} of what can be said in several ways."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in range(len(index)):
        record = index.record(row)
        tagged = bool(record.fixed or record.flex or record.tail)
        there = (tagged, tagged and bool(record.prose), bool(record.prose), bool(record.variants))
        if record.prose or record.variants:
            for kind in itertools.compress(CAPTIONS, there):
                other = caption_of(record, kind) != caption_of(record)
                found.setdefault(kind, ([], []))[other].append(row)
    return found


def stopping(asked: bool, device: torch.device) -> bool:
    """Whether any process was asked to stop. A collective."""
    flag = torch.tensor([float(asked)], device=device)
    dist.all_reduce(flag)
    return bool(flag.item() > 0)


def evaluate(
    loss_of: Callable[[Batch], torch.Tensor],
    index: Index,
    reader: ShardReader,
    tokens: TagTokenizer,
    making: Making,
    *,
    micro: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
    skip_unreadable: bool = False,
    together: bool = False,
) -> dict[str, Any] | None:
    """The record of one measurement of `index` (the chosen held-out images); None when a process was told to stop.

    `loss_of(batch)` gives the loss of each image [B] without gradients. Every process measures its share of the
    batches; one all-reduce of exact zeros and values makes the result the same for any number of processes. With
    `skip_unreadable` an image whose latent cannot be read is left out and named under "unreadable", else its Halt passes.
    `together`: a forward is a collective, so all processes make equally many and stop at the same one. Pictures that can be
    told in several ways are measured in each (CAPTIONS): strata `caption/tags` and so on.
    """
    count, kinds = len(index), captions_of(index)
    # losses as written, unreadable images, losses of each kind of caption, processes that stopped
    sums = torch.zeros((2 + len(kinds)) * count + 1, dtype=torch.float64)
    turns: list[tuple[str | None, int, npt.NDArray[np.int64]]] = [(None, 0, rows) for rows in batches(index, micro)]
    for place, (name, (_, others)) in enumerate(kinds.items(), 2):
        positions = np.array(others, np.int64)
        turns += [(name, place * count, positions[rows]) for rows in batches(index.select(positions), micro)]
    with torch.no_grad():
        for first in range(0, len(turns), world):
            if stopping(stop(), device) if together else stop():
                sums[-1] = 1.0
                break
            kind, start, rows = turns[first + rank] if first + rank < len(turns) else (None, 0, turns[0][2][:0])
            if skip_unreadable:
                bad = unreadable(index, reader, rows)
                sums[torch.from_numpy(rows[bad]) + count] = 1.0
                rows = rows[~bad]
            if len(rows):
                batch = make_batch(index, reader, tokens, rows, making, kind)
                sums[torch.from_numpy(rows) + start] = loss_of(batch.to(device)).double().cpu()
            elif together:
                width, height = int(index.bucket_w[0]), int(index.bucket_h[0])
                loss_of(synthetic_part(width, height, 1, tokens, making.max_tokens).to(device))
    if world > 1:
        shared = sums.to(device)
        dist.all_reduce(shared)
        sums = shared.cpu()
    if sums[-1] > 0:
        return None
    losses, lost, *of_kinds = sums[:-1].numpy().reshape(-1, count)
    read = lost == 0
    record = summary(index.uids[read], losses[read], [index.labels(i) for i in np.flatnonzero(read).tolist()])
    for (name, (same, others)), values in zip(kinds.items(), of_kinds, strict=True):
        told = [*losses[same][read[same]].tolist(), *values[others][read[others]].tolist()]
        record["strata"][f"caption/{name}"] = mean_and_interval(told)
    return record if read.all() else record | {"unreadable": [f"{uid:016x}" for uid in index.uids[~read].tolist()]}


def unreadable(index: Index, reader: ShardReader, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of `rows` have a latent that cannot be read, bool[B]."""
    places = [index.latent(row) for row in rows.tolist()]
    bad = np.zeros(len(rows), dtype=bool)
    try:
        read_rows(index, reader, rows.tolist())
    except Halt:  # of one of them: which
        for number, (shard, place) in enumerate(places):
            try:
                reader.read([shard], [place])
            except Halt:
                bad[number] = True
    return bad


def summary(uids: U64, losses: npt.NDArray[np.float64], labels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean loss, 95 % half-width and count, overall and per stratum `quality/best quality`; every image's loss."""
    strata: dict[str, list[float]] = {}
    for value, one, timestep in zip(losses.tolist(), labels, fixed_timesteps(uids).tolist(), strict=True):
        for name in strata_of(one, timestep):
            strata.setdefault(name, []).append(value)
    return {
        **mean_and_interval(losses.tolist()),
        "strata": {name: mean_and_interval(strata[name]) for name in sorted(strata)},
        "losses": {f"{uid:016x}": value for uid, value in zip(uids.tolist(), losses.tolist(), strict=True)},
    }


def strata_of(labels: Mapping[str, Any], timestep: int) -> list[str]:
    """The strata one image belongs to; a label it lacks gives none, its timestep always one."""
    rating = labels.get("rating_tags")
    first = rating if isinstance(rating, str) or not rating else rating[0]  # explicit images carry nsfw as well
    values = {**labels, "rating": first}
    return [*(f"{name}/{values[name]}" for name in LABELS if values.get(name)), band_of(timestep)]


def band_of(timestep: int) -> str:
    """`timestep/250-499`."""
    width = 1000 // BANDS
    start = timestep // width * width
    return f"timestep/{start:03d}-{start + width - 1:03d}"


def mean_and_interval(values: Sequence[float]) -> dict[str, Any]:
    """{"images", "loss", "interval"}: mean and half-width of its 95 % interval over images (None for fewer than 2).

    Student's t, because a stratum may hold a handful of images.
    """
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    interval = None
    if count > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        interval = t_975(count - 1) * math.sqrt(variance / count)
    return {"images": count, "loss": mean, "interval": interval}


def t_975(freedom: int) -> float:
    """97.5 % quantile of Student's t, right to 0.2 %: a table, from 5 degrees on the normal's with three corrections.

    Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z, n = Z_975, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def paired_change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any] | None:
    """Mean change of the loss over the images that two records share, with its interval; None without such images.

    Pairing takes out what makes one image harder than another, which is most of the spread.
    """
    common = sorted(set(before) & set(after))
    if not common:
        return None
    return mean_and_interval([after[uid] - before[uid] for uid in common])
