"""The images a stage trains on: its selection opened, those held out set apart, the plan over the rest. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from train.base.errors import ExitCode, Halt
from train.base.files import read_json, replace_file
from train.config.derived import Images, Order
from train.data.index import U64, Index, mask_shard
from train.data.published import Cache, Published, default_cache, local_set
from train.model.source import LocalModel, vae_identity
from train.model.vae_file import LatentScale
from train.recipe.buckets import Size, check_buckets
from train.recipe.captions import SEPARATOR
from train.recipe.order import Plan


@dataclass(frozen=True)
class Selection:
    """`index` is the whole selection, `kept` what trains of it, `held_out` what is measured."""

    folder: str  # of the prepared dataset
    index: Index
    kept: Index
    held_out: Index
    plan: Plan


def open_selection(images: Images) -> Selection:
    """The stage's images and their plan. Raises Halt(MISMATCH) for a dataset that is not prepared for this."""
    images = brought(images)
    index, share = open_index(images), images.held_out_share
    kept = index.select(~held_out(index.uids, share, index.images))
    measured = index if images.held_out_selection == images.selection else Index.open(images.folder, images.held_out_selection)
    check_buckets(bucket_counts(index), images.min_bucket)
    _check_what_is_kept(bucket_counts(kept), images.min_bucket, share)
    refuse_missing_shards(images.folder, index.shards())
    if images.flip:
        _refuse_without_flips(images.folder, index)
        refuse_missing_shards(images.folder, index.shards(flip=True))
    if images.masked:
        refuse_missing_masks(images, kept)
    held = once(measured.select(held_out(measured.uids, share, measured.images)))
    return Selection(images.folder, index, kept, held, make_plan(kept, images.order))


def brought(images: Images) -> Images:
    """The same images in a folder of this machine, where their set lies in a store. Raises Halt as `local_set`."""
    if "://" not in images.folder:
        return images
    cache = default_cache()
    wanted = Cache(Path(images.cache_dir) if images.cache_dir else cache.folder, images.cache_gb)
    folder = local_set(images.folder, wanted, (images.selection, images.held_out_selection))
    return replace(images, folder=folder)


def open_index(images: Images) -> Index:
    """The whole selection, held-out images too."""
    images = brought(images)
    index = Index.open(images.folder, images.selection)
    refuse_other_separator(images.folder, images.separator)
    return index


def once(index: Index) -> Index:
    """Each image once: one that is repeated is measured once."""
    _, first = np.unique(index.images, return_index=True)
    return index.select(np.sort(first))


def refuse_other_separator(folder: str, own: str | None) -> None:
    """Halt(MISMATCH) where the stage names another separator than the one that the set's captions were read with."""
    known = (read_json(Path(folder) / "dataset.json") or {}).get("separator", SEPARATOR)
    if own not in (None, known):
        raise Halt(
            ExitCode.MISMATCH,
            f"data.separator is {own!r}, but the captions of data.path {folder} were read with {known!r}: set "
            f"data.separator=null, which means the set's, or prepare it with separator: {own!r} in its dataset.yaml",
        )


def bucket_counts(index: Index) -> Counter[Size]:
    """Images per bucket (width, height)."""
    return Counter(zip(index.bucket_w.tolist(), index.bucket_h.tolist(), strict=True))


def _check_what_is_kept(counts: Counter[Size], least: int | None, share: float) -> None:
    """Halt(MISMATCH) where only holding images out leaves a bucket too small, which preparing again would not mend."""
    try:
        check_buckets(counts, least)
    except Halt as halt:
        small = ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(counts.items()) if count < (least or 1))
        raise Halt(
            halt.code,
            f"validation.share {share:g} leaves buckets with fewer images than batch.min_bucket, {least} ({small}): set "
            f"batch.min_bucket=null or batch.min_bucket={min(counts.values())}, a smaller share, or prepare with a larger "
            "select.<stage>.min_bucket",
        ) from halt


def held_out(uids: U64, share: float, images: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.bool_]:
    """Which entries never train: bool[N], true where the key's hash lies in the lowest `share` of all hashes.

    A uid is such a hash, so the answer depends on the key alone: the same in every stage, and a larger share holds
    out the same images and more. `images` (any number per image, equal for its repeats) makes the repeats of an
    image follow its first entry. Raises Halt(USAGE) for a share outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise Halt(ExitCode.USAGE, f"validation.share is {share}, must be at least 0 and below 1")
    uids = np.asarray(uids, dtype=np.uint64)
    if images is not None:
        _, first, inverse = np.unique(images, return_index=True, return_inverse=True)
        uids = uids[first][inverse]
    return uids < np.uint64(int(share * 2.0**64))


def make_plan(index: Index, order: Order) -> Plan:
    """The plan of a stage over its selection."""
    return Plan(
        index.uids,
        index.bucket_w,
        index.bucket_h,
        seed=order.seed,
        tile_images=order.tile_images,
        tiles_per_update=order.tiles_per_update,
        epochs=order.epochs,
        remainder=order.remainder,
        max_updates=order.max_updates,
    )


def _refuse_without_flips(folder: str, index: Index) -> None:
    """Halt(MISMATCH) for a set that holds no mirror images; where some images have none, nothing is wrong."""
    if not index.flips.any():
        raise Halt(ExitCode.MISMATCH, f"data.flip is true, but data.path {folder} holds no mirror images: set latents.flip: all in its dataset.yaml "
                                      "and run scripts/prepare.py latents, or leave data.flip out")  # fmt: skip


def flips_note(index: Index) -> str:
    """How many of the images have a mirror image."""
    return f"data.flip: {int(index.flips.sum())} of {len(index)} images have a mirror image; the others have tags of latents.flip_not"


def short_tiles_note(images: Images, plan: Plan) -> str | None:
    """What the start and the planner say of buckets smaller than a tile; None where there is nothing to say.

    loss.average: images weighs every image of an update alike, so their size shows only where an update is one tile.
    """
    order, micro, largest = images.order, images.order.tile_images, max(plan.largest_tiles.values())
    small = {size: count for size, count in plan.largest_tiles.items() if count < micro}
    names = ", ".join(f"{w}x{h}: {count}" for (w, h), count in small.items())
    if small and order.remainder == "drop":
        return f"batch.remainder: drop never trains the {sum(small.values())} images of buckets smaller than batch.micro ({names})"
    if not (short := plan.short_buckets):
        return None
    note = (
        f"{len(short)} of {len(plan.buckets)} buckets hold fewer images than a tile, {micro} (batch.micro), and make one "
        f"short tile an epoch ({names})"
    )
    alone = order.tiles_per_update == 1
    weights = sorted({largest / count for count in short.values() if count < largest})
    if not weights or (not alone and images.average == "images"):
        return note
    times = " to ".join(f"{weight:.3g}" for weight in dict.fromkeys((weights[0], weights[-1])))
    why = "an update is one tile and averages over its images" if alone else "loss.average: micro_batches"
    than = "a full tile" if largest == micro else f"the largest, of {largest}"
    return f"{note}: {why}, so a picture in a smaller one weighs {times} times as much as one in {than}"


def refuse_missing_shards(folder: str, shards: Iterable[str]) -> None:
    """Halt(MISMATCH) naming latent shards that are not there; what a shard holds is checked where it is read."""
    missing = _absent(folder, shards)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise Halt(
            ExitCode.MISMATCH, f"data.path {folder} lacks {len(missing)} latent shards: {shown}: run scripts/prepare.py latents"
        )


def _absent(folder: str, files: Iterable[str]) -> list[str]:
    """Those of a set's files that are neither here nor in the store that the folder stands for."""
    missing = sorted(name for name in set(files) if not (Path(folder) / name).is_file())
    published = Published.of(Path(folder)) if missing else None
    return missing if published is None else published.lacks(missing)


def refuse_missing_masks(images: Images, kept: Index) -> None:
    """Halt(MISMATCH) for loss.mask over a set without masks, or whose masks are not there."""
    folder = images.folder
    if kept.masked is None or not kept.masked.any():
        raise Halt(
            ExitCode.MISMATCH,
            f"loss.mask: no picture that this stage trains on has a mask in data.path {folder}: give its sources the key mask and run "
            "scripts/prepare.py latents (nothing is encoded twice), or set loss.mask=false",
        )
    masked = kept.select(kept.masked)
    shards = [*masked.shards(), *(masked.shards(flip=True) if images.flip else ())]
    missing = _absent(folder, map(mask_shard, shards))
    if missing:
        raise Halt(ExitCode.MISMATCH, f"data.path {folder} lacks masks, such as {missing[0]}: run scripts/prepare.py latents")


def masks_note(images: Images, kept: Index) -> str | None:
    """How many of the images have no mask; None without loss.mask, or where all have one."""
    if not images.masked or kept.masked is None or kept.masked.all():
        return None
    return f"loss.mask: {int((~kept.masked).sum())} of {len(kept)} pictures have no mask and count whole"


def refuse_other_vae(folder: str, index: Index, source: LocalModel) -> None:
    """Halt(MISMATCH) when the latents in `folder` were made with another VAE than the stage's."""
    own_vae = vae_identity(source) if index.vae_id else ""
    if index.vae_id != own_vae:
        raise Halt(
            ExitCode.MISMATCH,
            f"data.path {folder}: its latents were made with another VAE (identity {index.vae_id[:12]}) than "
            f"the stage's ({own_vae[:12]}): set model.vae to that VAE, or run scripts/prepare.py latents with this one",
        )


def vae_mark(source: LocalModel) -> str:
    """What a model's VAE is, wherever it lies: its weights' identity, its scaling factor and shift."""
    return f"{vae_identity(source)}/{LatentScale.of(source.configs['vae']).mark()}"


def save_selection(path: Path, index: Index) -> None:
    """Remember which images with which captions a run trains on: what `changes_since` compares with."""
    image, caption = index.digests()
    columns = {"uid": index.uids, "image": np.array(image), "caption": np.array(caption)}
    replace_file(path, safetensors.numpy.save({name: value.view(np.int64) for name, value in columns.items()}))


def _in_both(first: U64, second: U64) -> int:
    """How many values the two have in common, each as often as both have it."""
    (one, ones), (two, twos) = np.unique(first, return_counts=True), np.unique(second, return_counts=True)
    _, i, j = np.intersect1d(one, two, return_indices=True)
    return int(np.minimum(ones[i], twos[j]).sum())


def changes_since(path: Path, index: Index) -> str:
    """What changed in the selection since `save_selection`, in counts per kind; empty when nothing did, or is known."""
    if not path.is_file():
        return ""
    try:
        saved = safetensors.numpy.load(path.read_bytes())
        before, old_image, old_caption = (saved[name].view(np.uint64) for name in ("uid", "image", "caption"))
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError):
        return ""  # only a note: whether the data changed at all, the checkpoint says
    if before.ndim != 1 or not before.shape == old_image.shape == old_caption.shape:
        return ""
    now = index.uids
    image, caption = index.digests()
    _, old, new = np.intersect1d(before, now, return_indices=True)
    same_image = old_image[old] == image[new]
    same_caption = old_caption[old] == caption[new]
    gone = np.setdiff1d(np.arange(len(before)), old, assume_unique=True)
    came = np.setdiff1d(np.arange(len(now)), new, assume_unique=True)
    renamed = _in_both(old_image[gone], image[came])
    counts = {
        "images added": len(came) - renamed,
        "images removed": len(gone) - renamed,
        "images renamed": renamed,
        "images changed": int((~same_image).sum()),
        "captions edited": int((~same_caption).sum()),
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def in_plan_order(kept: Index, held_out: Index, plan: Plan, first_step: int, most_steps: int = 4_000) -> list[str]:
    """The shards in the order in which training asks for them, those of held-out images first; each once.

    What no update of the next `most_steps` asks for follows by name.
    """
    wanted = dict.fromkeys(held_out.shards())
    whole = {*kept.shards(), *(kept.shards(flip=True) if kept.flips.any() else ())}
    for step in range(first_step, min(first_step + most_steps, plan.total_updates)):
        if whole <= wanted.keys():
            break
        for tile in plan.update(step):
            wanted |= {kept.latent(row)[0]: None for row in tile.rows.tolist()}
    shards = [*wanted, *sorted(whole - wanted.keys())]
    masks = set(map(mask_shard, kept.select(kept.masked).shards())) if kept.masked is not None and kept.masked.any() else ()
    return [name for shard in shards for name in (shard, mask_shard(shard)) if name == shard or name in masks]
