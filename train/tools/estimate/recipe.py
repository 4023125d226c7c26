"""Several stages planned as one: each from its predecessor, which need not be trained yet, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.base.errors import ExitCode, Halt
from train.config.derived import Start
from train.tools.estimate import estimate, page
from train.tools.estimate.estimate import Request


def plan_stages(starts: Sequence[Start], request: Request) -> list[dict[str, Any]]:
    """The plan of each stage. One that starts from another of them is planned for the model that this one starts from.

    Raises the Halts of `plan_stage`, with the stage's name; USAGE where two share an output_dir.
    """
    directories = [start.identity.output_dir for start in starts]
    if len(set(directories)) != len(directories):
        raise Halt(ExitCode.USAGE, f"two stages share an output_dir: {directories}")
    plans, origins = [], dict[str, str]()
    for start in starts:
        path = start.origin.path
        looked_at = origins.get(path, path) if not Path(path).exists() else path
        origins[start.identity.output_dir] = looked_at
        try:
            plan = estimate.plan_stage(replace(start, origin=replace(start.origin, path=looked_at)), request)
            plans.append(plan | {"finished": page.finished_before(start), "data": start.images.folder})
        except Halt as halt:
            raise Halt(halt.code, f"{start.identity.stage}: {halt.message}") from halt
    return plans


def total(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the stages; None where one of them is unknown. A set's latents are counted once."""
    disk, time = [plan["disk"] for plan in plans], [plan["time"] for plan in plans]
    latents: dict[str, int] = {}
    for plan in plans:  # of one set that is not prepared each stage guesses anew
        latents[plan["data"]] = max(latents.get(plan["data"], 0), plan["disk"]["latents_bytes"])
    left = [_sum(one[key] for one in disk) for key in ("checkpoints_bytes", "export_bytes", "epoch_files_bytes")]
    need, free = _sum([*left, sum(latents.values())]), disk[-1]["free_bytes"]
    hours = {key: _sum(one and one[key] for one in time) for key in ("wall_hours", "gpu_hours")}
    return {
        "stages": [plan["stage"] for plan in plans],
        "total_updates": sum(plan["total_updates"] for plan in plans),
        "image_visits": sum(plan["image_visits"] for plan in plans),
        "latents_bytes": sum(latents.values()),
        "disk_bytes": need,
        "free_bytes": free,
        # What there is already was counted with what is to come: latents are not asked for again.
        "fits": need - sum(latents.values()) <= free if need is not None and free is not None else None,
        **hours,
        "cost": _sum(one and one.get("cost") for one in time),
        "memory_gib": max((plan["memory"].get("total_gib") or 0.0 for plan in plans), default=0.0) or None,
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The sums, for the eye."""
    yield f"all {len(found['stages'])} stages: {found['total_updates']:,} updates, {found['image_visits']:,} image visits"
    if found["memory_gib"] is not None:
        yield f"  memory  {found['memory_gib']:.1f} GiB at most"
    if found["disk_bytes"] is not None:
        free = f"; {found['free_bytes'] / 1e9:.0f} GB free" if found["free_bytes"] is not None else ""
        yield f"  disk    {found['disk_bytes'] / 1e9:.0f} GB with latents of {found['latents_bytes'] / 1e9:.2f} GB, each set once{free}"
    if found["wall_hours"] is not None:
        yield f"  time    {found['wall_hours']:.1f} h, {found['gpu_hours']:.1f} GPU hours"
    if found["cost"] is not None:
        yield f"  cost    {found['cost']:,.2f}"


def problems(found: Mapping[str, Any]) -> list[str]:
    """Why the stages could not come to their end one after the other although each alone might."""
    if found["fits"] is False:
        return [f"all stages together need {found['disk_bytes'] / 1e9:.0f} GB of disk: lower checkpoint.keep, or raise checkpoint.permanent_every_steps"]
    return []


def _sum(values: Any) -> Any:
    known = list(values)
    return None if any(value is None for value in known) else sum(known)
