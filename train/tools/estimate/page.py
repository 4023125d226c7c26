"""A plan for the eye: the text plan.py prints, and the learning-rate curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.derived import Rates, Start
from train.engine.finished import answer
from train.model.memory import GIB
from train.tools.estimate.estimate import lr_row
from train.tools.report.charts import COLOURS, as_file

CURVE_POINTS = 4000


def describe(plan: dict[str, Any]) -> str:
    """The plan as aligned text, origins of assumed numbers beside them."""
    batch = plan["batch"]
    lines = [
        f"stage {plan['stage']}: {plan['images']:,} images ({plan['images_source']}), {plan['epochs']} epochs",
        f"  update  {batch['micro']} images x {batch['accumulation']} tiles x {batch['processes']} processes "
        f"= {batch['effective']}; {plan['updates_per_epoch']:,} per epoch, {plan['total_updates']:,} in all, "
        f"{plan['image_visits']:,} image visits",
        *_bucket_lines(plan["buckets"]),
        *_memory_lines(plan["memory"]),
        *_disk_lines(plan["disk"]),
        *_time_lines(plan["time"]),
        *_tolerance_lines(plan["tolerances"]),
    ]
    if (before := plan.get("finished")) and before["allowed"]:
        lines.append(f"  run     {before['text']}")
    every = plan["schedule"]["updates_per_restart"]
    lines.append(f"  lr      {plan['schedule']['name']}" + (f", cycle of {every:,.10g} updates" if every else ""))
    for row in plan["lr"]:
        text = f", text encoders {row['text_encoder_lr']:.9g}" if "text_encoder_lr" in row else ""
        text += "".join(f", {key.removeprefix('groups ')} {rate:.9g}" for key, rate in row.items() if key.startswith(("groups ", "text_encoder_2")))
        cycle = f", cycle {row['cycle']}" if "cycle" in row else ""
        lines.append(f"          update {row['update']:>8,}: {row['lr']:.9g}{text}{cycle}")
    for pattern, saved in plan["groups"].items():
        lines.append(
            f"  frozen  {pattern}: {saved['parameters']:,} parameters, spares {saved['state_bytes'] / GIB:.2f} GiB of optimizer state "
            f"and {saved['gradient_bytes'] / GIB:.2f} GiB of gradients"
        )
    return "\n".join(lines)


def finished_before(start: Start) -> dict[str, Any] | None:
    """What a start would be answered by the finished stage that lies in `output_dir`; None where there is none."""
    try:
        found = answer(start)
    except Halt as halt:
        return {"allowed": False, "goes_on": False, "text": halt.message}
    return {"allowed": True, "goes_on": found.goes_on, "text": found.text} if found is not None else None


def problems(plan: dict[str, Any]) -> list[str]:
    """Why a start with this plan would end with exit 7, or could not come to its end."""
    found = []
    if plan["memory"]["fits"] is False:
        found.append(plan["memory"]["problem"])
    if plan["disk"]["fits"] is False:
        found.append(
            "checkpoints and export do not fit the disk: lower checkpoint.keep or raise checkpoint.permanent_every_steps"
            + (" or export.every_epochs" if plan["disk"]["epoch_files"] else "")
        )
    if (before := plan.get("finished")) and not before["allowed"]:
        found.append(before["text"])
    return found


def _bucket_lines(report: dict[str, Any]) -> list[str]:
    if report["images"] is None:
        return [f"  buckets {report['note']}"]
    lines = [f"  buckets {', '.join(f'{name}: {count:,}' for name, count in report['images'].items())}"]
    if report["short_note"]:
        lines.append(f"          {report['short_note']}")
    if report["dropped_per_epoch"]:
        lines.append(f"          {report['dropped_per_epoch']:,} images of every epoch are dropped (batch.remainder)")
    return lines


def _memory_lines(report: dict[str, Any]) -> list[str]:
    head = f"  memory  {report['gpu']} ({report['gpu_source']}), {report['free_gib']:.0f} GiB free: "
    if report["fits"] is None:
        return [head + report["note"]]
    modes = ", ".join(f"{name} {total:.0f}" for name, total in report["modes"].items())
    table = f"          GiB by checkpointing, {report['modes_images_at_once']} images at once: {modes}"
    if not report["fits"]:
        return [head + report["problem"], table]
    parts = ", ".join(f"{name} {size:.1f}" for name, size in report["parts_gib"].items() if size)
    drawing = [f"          {report['previews_gib']:.1f} GiB while previews are drawn" + (
        "" if report["previews_fit"] else ": too much, the run goes on without them; set sampling.every_steps: 0, or leave out ema.decay"
    )] if report["previews_gib"] else []  # fmt: skip
    return [
        head + f"{report['total_gib']:.1f} GiB predicted with checkpointing {report['checkpointing']}, "
        f"{report['images_at_once']} images of {report['largest_bucket']} at once (split {report['split']})",
        f"          {parts}",
        table,
        *drawing,
        *([f"          {report['host_gb']:.0f} GB of host memory hold weights, gradients and optimizer state"] if report["host_gb"] else []),
    ]


def _disk_lines(disk: dict[str, Any]) -> list[str]:
    line = f"  disk    latents {disk['latents_bytes'] / 1e9:.2f} GB ({disk['latents_note']})"
    if disk["checkpoint_bytes"] is not None:
        line += (
            f", checkpoint {disk['checkpoint_bytes'] / 1e9:.1f} GB x at most {disk['checkpoints_at_most']} "
            f"= {disk['checkpoints_bytes'] / 1e9:.0f} GB, export {disk['export_bytes'] / 1e9:.1f} GB"
        )
        if disk["epoch_files"]:
            line += f", {disk['epoch_files']} files of epochs {disk['epoch_files_bytes'] / 1e9:.2f} GB"
    if disk["free_bytes"] is not None:
        line += f"; {disk['free_bytes'] / 1e9:.0f} GB free"
    return [line]


def _tolerance_lines(tolerances: dict[str, dict[str, float]]) -> list[str]:
    """What the chosen options may change, each beside its key."""
    if not tolerances:
        return []
    told = ", ".join(f"{key} {limit['loss']:g}" for key, limit in tolerances.items())
    return [f"  numbers relative change of the loss within: {told} (docs/speed.md)"]


def _time_lines(time: dict[str, Any] | None) -> list[str]:
    if time is None:
        return []
    lines = [
        f"  time    {time['images_per_s_per_gpu']:.2f} images/s per GPU ({time['source']}): "
        f"{time['wall_hours']:.1f} h, {time['gpu_hours']:.1f} GPU hours",
        f"          {time['tflop_per_image']:.2f} TFLOP per image, MFU {time['mfu']:.0%} of {time['peak_tflops']:g} "
        f"TFLOP/s ({time['peak_source']})",
    ]
    if "cost" in time:
        lines.append(f"  cost    {time['cost']:,.2f} at {time['price_per_gpu_hour']:g} per GPU hour")
    return lines


def write_files(folder: Path, rates: Rates, plan: dict[str, Any]) -> None:
    """`plan.json` and `lr.svg` in `folder`. Raises Halt(CANNOT_WRITE)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
        title = f"{plan['stage']}: {plan['schedule']['name']}, learning rate over updates"
        write_curve(folder / "lr.svg", rates, title, plan["total_updates"], plan["schedule"]["cycle_updates"])
    except OSError as error:
        raise Halt(ExitCode.CANNOT_WRITE, f"cannot write the plan into {folder}: {error}") from error


def write_curve(path: Path, rates: Rates, title: str, total_updates: int, cycle_updates: int | None) -> None:
    """The learning rate of every group over the run as an SVG."""
    step = max(1, total_updates // CURVE_POINTS)
    names = {"unet_lr": "U-Net", "text_encoder_lr": "text encoders", "text_encoder_2_lr": "text encoder 2"}
    rows = [lr_row(rates, update, cycle_updates or 1, total_updates) for update in range(0, total_updates, step)]
    lines = [
        (names.get(key, key.removeprefix("groups ")), COLOURS[number % len(COLOURS)], [(float(row["update"]), row[key]) for row in rows])
        for number, key in enumerate(key for key in rows[0] if key not in ("update", "lr", "cycle"))
    ]
    highest = max((rate for _, _, points in lines for _, rate in points), default=0.0) or 1.0
    path.write_text(as_file(title, lines, y_range=(0.0, highest)))
