"""What a stage will do and cost, before anything is spent: updates, learning rates, memory, disk, time. No torch."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.derived import Rates, Running, Start
from train.config.stage import load_stage
from train.model import memory
from train.model.memory import GIB, Prediction, Setup
from train.recipe import schedule
from train.recipe.buckets import make_buckets
from train.recipe.groups import NETWORKS
from train.recipe.order import share_of
from train.storage import space
from train.tools.estimate import tolerances
from train.tools.estimate.images import Images, find_images, lengths, visits
from train.tools.estimate.machines import IMPLIED_BY_CARD, Gpu, find_gpu, find_speed

log = logging.getLogger("anix")

MODES = (
    "full",
    "off mid",
    "off mid, down 2",
    "off 1280 channels",
    "off 1280 and 640 channels",
    "none",
)  # by exempt steps
EXPORT_BYTES = 2 * 6_940_000_000  # fp16 single file and folder; fp32 twice that
TABLE_ROWS = 11


@dataclass(frozen=True)
class Request:
    """What plan.py was asked beside the config."""

    updates: tuple[int, ...] = ()
    images: int | None = None
    gpu: str | None = None
    memory_gib: float | None = None
    world: int = 1
    images_per_s: float | None = None
    bench: Path | None = None
    price_per_hour: float | None = None
    disk_gb: float | None = None


def plan_stage(start: Start, request: Request) -> dict[str, Any]:
    """The whole plan as JSON values. `memory.fits` is False when it cannot run; the caller turns that into exit 7.

    Raises Halt(MISMATCH) for a dataset that is not prepared and whose size nobody gave, or for a number of
    processes that training refuses; Halt(USAGE) for updates outside the run and for numbers that make no sense.
    """
    check_request(request)
    accumulation, _ = share_of(start.batch, request.world)
    identity, rates, running, order = start.identity, start.rates, start.running, start.images.order
    images = find_images(start.images, identity.stage, request.images)
    per_epoch, total = lengths(order, images)
    epoch_updates = per_epoch if images.plan is None else images.plan.cycle_updates
    cycle = schedule.cycle_length(rates.schedule, epoch_updates=epoch_updates)
    schedule.check(rates.schedule, schedule.peak_keys(rates.optimizer), cycle_updates=cycle, total_updates=total, epochs=rates.epochs)
    told = schedule.facts(rates.schedule, cycle_updates=cycle)
    if warning := schedule.long_warmup(rates.schedule, total_updates=total):
        log.warning("%s", warning)
    gpu, how = find_gpu(request.gpu, request.memory_gib)
    setup = memory.setup_of(running, request.world)
    foreign = _foreign_size(start.origin.path)  # what is counted below is SDXL's own size
    memory_plan = memory_report(start, request.world, images, gpu, how)
    checkpointing = memory_plan.get("checkpointing")
    return {
        "stage": identity.stage,
        "config_hash": identity.hash,
        "images": images.count,
        "images_source": images.source,
        "epochs": order.epochs,
        "batch": {
            "micro": order.tile_images,
            "accumulation": accumulation,
            "processes": request.world,
            "effective": order.update_images,
            "tiles_per_update": accumulation * request.world,
        },
        "updates_per_epoch": per_epoch,
        "total_updates": total,
        "image_visits": visits(order, images, per_epoch, total),
        "buckets": _bucket_report(start, images),
        "schedule": told,
        "lr": [lr_row(rates, update, cycle, total) for update in _rows(request.updates, total, told["updates_per_restart"] or total)],
        "groups": _groups_report(running) if foreign is None and running.adapter is None else {},
        "tolerances": {key: limit._asdict() for key, limit in tolerances.of(running).items()},
        "memory": memory_plan,
        "disk": _disk_report(start, None if foreign else setup, images, per_epoch, total, _free_disk(identity.output_dir, request, how)),
        "time": _time_report(start, setup, images, request, gpu, per_epoch, total, checkpointing) if foreign is None else None,
    }


def _groups_report(running: Running) -> dict[str, Any]:
    """What each pattern of `optimizer.groups` that freezes spares."""
    if not running.groups:
        return {}
    from train.model.networks import saves  # with torch

    return {
        pattern: {"parameters": sum(found.values.values()), "state_bytes": found.state_bytes, "gradient_bytes": found.gradient_bytes}
        for pattern, found in saves(running).items()
    }


def check_request(request: Request) -> None:
    """Halt(USAGE) naming the flag whose number is none, not finite or not above 0."""
    numbers = {
        "--world": request.world, "--memory-gib": request.memory_gib, "--images-per-s": request.images_per_s,
        "--price-per-hour": request.price_per_hour, "--disk-gb": request.disk_gb,
    }  # fmt: skip
    free = ("--price-per-hour", "--disk-gb")  # these may be 0
    for flag, number in numbers.items():
        if number is not None and not (math.isfinite(number) and (number > 0 or (number == 0 and flag in free))):
            raise Halt(ExitCode.USAGE, f"{flag} is {number:g}, must be a number {'of 0 or more' if flag in free else 'above 0'}")


def _rows(asked: Sequence[int], total: int, cycle: float) -> list[int]:
    """Updates to tabulate: those asked for, else an even spread with the restarts' first updates."""
    outside = [update for update in asked if not 0 <= update < total]
    if outside:
        raise Halt(ExitCode.USAGE, f"--updates {outside[0]} is outside the run's 0..{total - 1}")
    if asked:
        return list(asked)
    spread = {round(i * (total - 1) / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)}
    restarts = {math.ceil(cycle * c) for c in range(1, min(int(total / cycle), TABLE_ROWS) + 1)}
    return sorted(update for update in spread | restarts | {0, 1} if update < total)


def lr_row(rates: Rates, update: int, cycle: int, total: int) -> dict[str, Any]:
    """Learning rates of one update (its 0-based number = updates applied before it) and its restart cycle."""
    rates_of = schedule.rates_at(
        update, peaks=schedule.peaks(rates.optimizer), config=rates.schedule, cycle_updates=cycle, total_updates=total,
        rules=rates.optimizer.groups,
    )  # fmt: skip
    keys = {network: f"{network}_lr" for network in NETWORKS if f"optimizer.{network}_lr" in schedule.peak_keys(rates.optimizer)}
    found = {keys.get(group, f"groups {group}"): rate for group, rate in rates_of.items() if group in keys or group not in NETWORKS}
    row: dict[str, Any] = {"update": update, "lr": found["unet_lr"], **found}
    if (cycles := schedule.facts(rates.schedule, cycle_updates=cycle)["updates_per_restart"]) is not None:
        row["cycle"] = int(update // cycles)
    return row


def _bucket_report(start: Start, images: Images) -> dict[str, Any]:
    """Images per bucket, which are smaller than a tile, and what an epoch drops."""
    if images.buckets is None or images.plan is None:
        return {"images": None, "short": None, "dropped_per_epoch": None, "note": "needs the prepared dataset"}
    from train.data.selection import short_tiles_note  # needs pyarrow, which a plan for a bare number does not

    micro, drop = start.images.order.tile_images, start.images.order.remainder == "drop"
    return {
        "images": {_name(bucket): count for bucket, count in images.buckets.items()},
        "short": {_name(bucket): count for bucket, count in images.plan.short_buckets.items()},
        "short_note": short_tiles_note(start.images, images.plan),
        "dropped_per_epoch": sum(count % micro for count in images.buckets.values()) if drop else 0,
    }


def memory_report(start: Start, world: int, images: Images, gpu: Gpu, how: str) -> dict[str, Any]:
    """Peak memory by part for the mode in force, and the total of every mode, on one card."""
    report: dict[str, Any] = {"gpu": gpu.name, "gpu_source": how, "free_gib": gpu.free_gib}
    if (size := _foreign_size(start.origin.path)) is not None:
        return report | {"fits": None, "note": f"predicted for full-size SDXL only; this model's blocks are {size}"}
    setup = memory.setup_of(start.running, world)
    buckets = list(images.buckets or make_buckets())
    split = start.running.split
    micro = start.running.tile_images if images.plan is None else max(images.plan.largest_tiles.values())
    at_once = -(-micro // (1 if isinstance(split, str) else split))
    bucket = memory.largest(buckets)
    drawing = memory.previews_bytes(setup)
    report |= {
        "previews_gib": _gib(drawing) if drawing else None,
        "previews_fit": drawing <= gpu.free_gib * GIB * memory.USABLE_SHARE,
        "usable_share": memory.USABLE_SHARE,
        "host_gb": memory.host_bytes(setup) / 1e9 if setup.offload else None,
        "largest_bucket": _name(bucket),
        "modes": {
            name: _gib(
                memory.predict(setup, bucket, at_once, exempt, text_checkpointing=exempt < memory.ALL_STEPS).total
            )
            for exempt, name in enumerate(MODES)
        },
        "modes_images_at_once": at_once,
        "activation_bytes_per_image": {
            _name(b): [memory.kept_bytes(*b, exempt, setup)[0] for exempt in range(len(MODES))] for b in buckets
        },
    }
    try:
        choice = memory.settle(start.running, int(gpu.free_gib * GIB), buckets, world, tile_images=micro)
    except Halt as halt:
        return report | {"fits": False, "problem": halt.message}
    return report | {
        "fits": True,
        "checkpointing": MODES[choice.exempt_steps],
        "split": choice.split,
        "images_at_once": -(-micro // choice.split),
        "text_encoders_checkpointed": choice.text_checkpointing if setup.trains_text else None,
        "parts_gib": _parts(choice.prediction),
        "total_gib": _gib(choice.prediction.total),
        "assumed": "0.25 GiB per image recomputed and 2 GiB workspace are estimates; the rest is counted for SDXL's own size"
        + ("; an adapter's activations are taken to be those of training the weights" if setup.adapter is not None else ""),
    }


def _foreign_size(init_from: str) -> list[int] | None:
    """Channels of the U-Net to start from when it lies here and is not SDXL's size, else None."""
    for folder in (Path(init_from), Path(init_from) / "model"):
        file = folder / "unet" / "config.json"
        if file.is_file():
            channels = list(json.loads(file.read_text()).get("block_out_channels", []))
            return None if channels == [320, 640, 1280] else channels
    run = Path(init_from)
    if (run / "lora").is_dir() and (run / "config.yaml").is_file():  # a stage that left an adapter: what that stands on
        return _foreign_size(load_stage([run / "config.yaml"]).origin.path)
    return None


def _parts(prediction: Prediction) -> dict[str, float]:
    return {name: _gib(size) for name, size in asdict(prediction).items()}


def _disk_report(
    start: Start, setup: Setup | None, images: Images, per_epoch: int, total: int, free_bytes: int | None
) -> dict[str, Any]:
    """Bytes of the latent cache, the run's checkpoints at their most, and the export; None where `setup` is unknown.

    `fits`: whether checkpoints and export find room in `free_bytes`; None where either is unknown.
    """
    counts = images.buckets or {memory.largest(make_buckets()): images.count}
    counted = sum(count * 2 * 4 * (width // 8) * (height // 8) for (width, height), count in counts.items())
    latents = counted if images.latents_bytes is None else images.latents_bytes
    one = memory.checkpoint_bytes(setup) if setup is not None else None
    permanent = space.permanent_count(start.checkpoint, total, per_epoch)
    export = EXPORT_BYTES * (2 if start.origin.export.dtype == "fp32" else 1) if one is not None else None
    if export is not None and setup is not None and setup.adapter is not None:  # both forms of it, and the model where that is asked for
        export = 2 * setup.adapter.values * (4 if start.origin.export.dtype == "fp32" else 2) + (export if start.origin.export.merged else 0)
    elif export is not None and start.running.average:
        export += export // 2  # the average as a single file
    most = space.most_at_once(start.checkpoint) + permanent
    every, plan = start.origin.files_every_epochs, images.plan
    files = len(plan.ends_of(every)) if plan is not None else (math.ceil(total / per_epoch) - 1) // every if every else 0
    file = _epoch_file_bytes(start, setup) if setup is not None else None
    need = one * most + (export or 0) + files * (file or 0) if one is not None else None
    return {
        "free_bytes": free_bytes,
        "fits": need <= free_bytes if need is not None and free_bytes is not None else None,
        "latents_bytes": latents,
        "latents_note": "16 bit" if images.buckets else "16 bit, all images at 1024x1024",
        "checkpoint_bytes": one,
        "checkpoints_at_most": most,
        "permanent_checkpoints": permanent,
        "checkpoints_bytes": one * most if one is not None else None,
        "export_bytes": export,
        "epoch_files": files,
        "epoch_files_bytes": files * file if file is not None else None,
    }


def _epoch_file_bytes(start: Start, setup: Setup) -> int:
    """Of what one epoch leaves behind: a single file or an adapter, and their average where that is kept."""
    wide, both = start.origin.export.dtype == "fp32", 1 + start.running.average
    return both * (setup.adapter.values * (4 if wide else 2) if setup.adapter is not None else EXPORT_BYTES // 2 * (1 + wide))


def _free_disk(output_dir: str, request: Request, how: str) -> int | None:
    """Room for the run: as given, or of output_dir's disk when the plan is for the GPU of this machine."""
    if request.disk_gb is not None:
        return int(request.disk_gb * 1e9)
    if not how.startswith("present"):
        return None  # planned for another machine, whose disk is unknown
    folder = Path(output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _time_report(
    start: Start,
    setup: Setup,
    images: Images,
    request: Request,
    gpu: Gpu,
    per_epoch: int,
    total: int,
    checkpointing: str | None,
) -> dict[str, Any]:
    """Hours, use of the card and cost, with the origin of the speed they rest on."""
    counts, running = images.buckets or {(1024, 1024): 1}, start.running
    useful = sum(memory.image_flops(setup, *bucket) * count for bucket, count in counts.items()) // sum(counts.values())
    speed = find_speed(
        gpu,
        start.identity.stage,
        trains_text=setup.trains_text,
        flops_per_image=useful,
        given=request.images_per_s,
        bench=request.bench,
        settings={"compile": running.compile, "channels_last": running.channels_last, "float8": running.float8}
        | {"strict": running.strict, "dtype": running.precision, "optimizer": running.optimizer}
        | ({"checkpointing": checkpointing} if checkpointing else {}),
    )
    gpu_hours = visits(start.images.order, images, per_epoch, total) / speed.images_per_s / 3600
    report: dict[str, Any] = {
        "images_per_s_per_gpu": speed.images_per_s,
        "source": speed.source,
        "wall_hours": gpu_hours / request.world,
        "gpu_hours": gpu_hours,
        "tflop_per_image": useful / 1e12,
        "mfu": speed.images_per_s * useful / (gpu.peak_tflops * 1e12),
        "peak_tflops": gpu.peak_tflops,
        "peak_source": gpu.peak_source,
    }
    if setup.trains_text and gpu.name.startswith("A100"):
        report["original_images_per_s_per_gpu"] = IMPLIED_BY_CARD
    if request.price_per_hour is not None:
        report["cost"] = gpu_hours * request.price_per_hour
        report["price_per_gpu_hour"] = request.price_per_hour
    return report


def _gib(size: int) -> float:
    return round(size / GIB, 2)


def _name(bucket: tuple[int, int]) -> str:
    return f"{bucket[0]}x{bucket[1]}"
