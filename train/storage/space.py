"""Room for checkpoints: what a run needs and what there is, asked before it begins. No torch."""

from __future__ import annotations

import re

from train.base.files import free_bytes
from train.config.stage import CheckpointConfig
from train.storage.manifest import committed
from train.storage.rundir import RunDir, leftover_bytes

SPACE_FACTOR = 1.05  # file systems need room for their own records


def lacking_space(run: RunDir, one_bytes: float, settings: CheckpointConfig) -> str | None:
    """What is wrong when the disk cannot hold `keep` checkpoints of that size and the one being written; else None."""
    one = one_bytes * SPACE_FACTOR
    there = sum(m.total_bytes for _, _, m in committed(run.checkpoints))
    need = max(one, most_at_once(settings) * one - there)
    have = free_bytes(run.checkpoints) + leftover_bytes(run.path)
    if have >= need:
        return None
    return (
        f"output_dir {run.path}: checkpoints need {gb(need)} more ({settings.keep} kept + 1 being written, "
        f"{gb(one)} each), the disk has {gb(have)}. Free some, or lower checkpoint.keep (least 2)"
    )


def most_at_once(settings: CheckpointConfig) -> int:
    """Checkpoints beside the permanent ones while one is being written."""
    return settings.keep + 1


def permanent_every(settings: CheckpointConfig, updates_per_epoch: int) -> int:
    """Plan steps between checkpoints that are kept for ever: as configured, else one epoch."""
    return settings.permanent_every_steps or max(updates_per_epoch, 1)


def permanent_count(settings: CheckpointConfig, updates: int, updates_per_epoch: int) -> int:
    """Checkpoints that a run of `updates` keeps for ever: the first at or after each multiple, and the stage's end."""
    every = permanent_every(settings, updates_per_epoch)
    if settings.every_minutes is None:
        every = max(every, settings.every_steps)
    return -(-updates // every)


def permanent_warning(
    run: RunDir, one_bytes: float, settings: CheckpointConfig, *, updates: int, updates_per_epoch: int, files_bytes: int = 0
) -> str | None:
    """What to tell when what this run keeps for ever will not fit: checkpoints, and the usable files of its epochs.

    `files_bytes`: of those files that are still to come. The run may start all the same.
    """
    one = one_bytes * SPACE_FACTOR
    every = permanent_every(settings, updates_per_epoch)
    there = list(committed(run.checkpoints))
    to_come = max(permanent_count(settings, updates, updates_per_epoch) - sum(m.permanent for *_, m in there), 0)
    need = files_bytes + to_come * one + max(most_at_once(settings) * one - sum(m.total_bytes for *_, m in there if not m.permanent), 0)
    have = free_bytes(run.checkpoints) + leftover_bytes(run.path)
    if have >= need:
        return None
    files = f", and {gb(files_bytes)} of files by export.every_epochs" if files_bytes else ""
    return (
        f"output_dir {run.path}: {to_come} more checkpoints will be kept for ever (checkpoint.permanent_every_steps: "
        f"{every}), {gb(one)} each{files}; with the last {settings.keep} and the one being written that is {gb(need)}, the disk "
        f"has {gb(have)}. The run starts; when the disk is full, checkpoint.on_full_disk "
        f"decides. Raise checkpoint.permanent_every_steps{' or export.every_epochs' if files else ''}, or move old ones away in time"
    )


def gb(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else re.sub(r"\.0$", "", f"{count / 1e3:.1f}") + " kB"
