"""The images that a plan is made for: a prepared selection, a number, or the card's own. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.base.errors import ExitCode, Halt
from train.config import derived
from train.config.derived import Order
from train.recipe.buckets import check_buckets
from train.recipe.order import Plan
from train.storage.objects import is_url

_CARD_IMAGES = {
    ("animagine31", "pretrain"): (873_504, "assumed: card"),
    ("animagine31_as_run", "pretrain"): (873_504, "assumed: card"),
    ("animagine30", "pretrain"): (1_271_990, "assumed: card"),
    ("animagine30", "ft1"): (2_500, "assumed: card"),
    ("animagine30", "ft2"): (3_500, "assumed: card"),
    ("animagine31", "ft1"): (13_680, "assumed: unpublished; between 2,000 and 15,000 is likely"),
    ("animagine31", "ft2"): (13_680, "assumed: unpublished; between 2,000 and 15,000 is likely"),
}


@dataclass(frozen=True)
class Images:
    """The selection to plan for; `buckets` is None where only a count is known."""

    count: int
    source: str
    buckets: dict[tuple[int, int], int] | None
    plan: Plan | None
    latents_bytes: int | None = None  # of the prepared cache, held-out images included


def find_images(wanted: derived.Images, stage: str, given: int | None) -> Images:
    """The prepared selection, else the number given, else the card's for its own configs.

    Raises Halt(MISMATCH) naming both ways out when there is none of these.
    """
    if given is not None:
        if given < 1:
            raise Halt(ExitCode.USAGE, f"--images is {given}, must be at least 1")
        return Images(given, "--images", None, None)
    folder = Path(wanted.folder)
    if is_url(wanted.folder) or (folder / "dataset.json").is_file():
        return _prepared(wanted)
    share = wanted.held_out_share
    known = _CARD_IMAGES.get((folder.name, stage))
    if known is None:
        raise Halt(
            ExitCode.MISMATCH,
            f"data.path {folder} is not a prepared dataset: run scripts/prepare.py all --config <dataset.yaml>, "
            "or plan for a number of images with --images N",
        )
    count, source = known
    if share:
        count, source = round(count * (1 - share)), f"{source}, less validation.share {share:g}"
    return Images(count, source, None, None)


def _prepared(wanted: derived.Images) -> Images:
    # needs pyarrow, which a plan for a bare number does not
    from train.data.selection import bucket_counts, held_out, make_plan, open_index

    whole = open_index(wanted)
    _, first = np.unique(whole.images, return_index=True)  # an image that is repeated has one latent
    pictures = whole.select(np.sort(first))
    sizes = bucket_counts(pictures) + bucket_counts(pictures.select(pictures.flips))
    values = sum(count * (8 if whole.content == "moments" else 4) * (w // 8) * (h // 8) for (w, h), count in sizes.items())
    index = whole.select(~held_out(whole.uids, wanted.held_out_share, whole.images))
    check_buckets(bucket_counts(index), wanted.min_bucket)
    plan = make_plan(index, wanted.order)
    source = f"dataset {wanted.folder}"
    if len(index) > (once := len(np.unique(index.images))):
        source += f", {once:,} pictures, some visited several times an epoch"
    return Images(len(index), source, dict(sorted(bucket_counts(index).items())), plan, 2 * values)


def visits(order: Order, images: Images, per_epoch: int, total: int) -> int:
    """Images seen in all; where tiles are short, the share of all epochs' images that `total` updates are."""
    plan = images.plan
    if plan is None or not (plan.short_buckets or order.remainder == "keep"):
        return total * order.update_images
    if plan.short_buckets:
        return round(images.count * total / plan.exact_updates_per_epoch)
    return round(images.count * total / per_epoch)


def lengths(order: Order, images: Images) -> tuple[int, int]:
    """(updates per epoch, updates in all); without bucket counts as if no tile were short."""
    if images.plan is not None:
        return images.plan.updates_per_epoch, images.plan.total_updates
    per_epoch = images.count // order.update_images
    if per_epoch == 0:
        raise Halt(
            ExitCode.MISMATCH,
            f"{images.count} images do not fill one update of batch.effective {order.update_images}",
        )
    total = per_epoch * order.epochs
    return per_epoch, min(total, order.max_updates) if order.max_updates is not None else total
