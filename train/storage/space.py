"""Room for checkpoints: what is needed, what there is, and waiting for it. No torch."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from train.base.errors import ExitCode, Halt
from train.config.stage import CheckpointConfig
from train.storage import manifest
from train.storage.manifest import Damaged, Manifest
from train.storage.rundir import RunDir, free_bytes, leftover_bytes

SPACE_FACTOR = 1.05  # file systems need room for their own records
_DISK_POLL_S = 0.5  # with on_full_disk: wait
_DISK_WARN_S = 60.0


def lacking_space(run: RunDir, one_bytes: float, settings: CheckpointConfig) -> str | None:
    """What is wrong when the disk cannot hold `keep` checkpoints of that size and the one being written; else None."""
    one = one_bytes * SPACE_FACTOR
    there = sum(m.total_bytes for _, _, m in committed(run.checkpoints))
    need = max(one, (settings.keep + 1) * one - there)
    have = free_bytes(run.checkpoints) + leftover_bytes(run.path)
    if have >= need:
        return None
    return (
        f"output_dir {run.path}: checkpoints need {gb(need)} more ({settings.keep} kept + 1 being written, "
        f"{gb(one)} each), the disk has {gb(have)}. Free some, or lower checkpoint.keep (least 2)"
    )


def permanent_every(settings: CheckpointConfig, updates_per_epoch: int) -> int:
    """Plan steps between checkpoints that are kept for ever: as configured, else one epoch."""
    return settings.permanent_every_steps or max(updates_per_epoch, 1)


def permanent_count(settings: CheckpointConfig, updates: int, updates_per_epoch: int) -> int:
    """Checkpoints that a run of `updates` keeps for ever: the first at or after each multiple, and the stage's end."""
    every = max(permanent_every(settings, updates_per_epoch), settings.every_steps)
    return -(-updates // every)


def permanent_warning(
    run: RunDir, one_bytes: float, settings: CheckpointConfig, *, updates: int, updates_per_epoch: int
) -> str | None:
    """What to tell when the checkpoints that this run keeps for ever will not fit; the run may start all the same."""
    one = one_bytes * SPACE_FACTOR
    every = permanent_every(settings, updates_per_epoch)
    there = list(committed(run.checkpoints))
    to_come = max(permanent_count(settings, updates, updates_per_epoch) - sum(m.permanent for *_, m in there), 0)
    need = to_come * one + max((settings.keep + 1) * one - sum(m.total_bytes for *_, m in there if not m.permanent), 0)
    have = free_bytes(run.checkpoints) + leftover_bytes(run.path)
    if have >= need:
        return None
    return (
        f"output_dir {run.path}: {to_come} more checkpoints will be kept for ever (checkpoint.permanent_every_steps: "
        f"{every}), {gb(one)} each; with the last {settings.keep} and the one being written that is {gb(need)}, the disk "
        f"has {gb(have)}. The run starts; when the disk is full, checkpoint.on_full_disk ({settings.on_full_disk}) "
        "decides. Raise checkpoint.permanent_every_steps, or move old ones away in time"
    )


def least_checkpoint_bytes(optimizer: str, weights: str, shapes: Iterable[tuple[int, ...]], *, averaged: bool) -> int:
    """What a checkpoint of parameters of these shapes takes at least: weights, optimizer state, average."""
    total = 0
    for shape in shapes:
        values = math.prod(shape)
        state = {"adamw": 8 * values, "adamw8bit": 2 * values}.get(optimizer, 4 * values)
        if optimizer == "adafactor" and len(shape) > 1:
            state = 4 * (values // shape[-1] + values // shape[-2]) if values else 0
        total += values * (2 if weights == "bf16" else 4) + state + (4 * values if averaged else 0)
    return total


def require_space(
    folder: Path, one_bytes: int, settings: CheckpointConfig, step: int, give_up: Callable[[], bool]
) -> None:
    """Return once a checkpoint of that size has room; what happens without is `checkpoint.on_full_disk`.

    Raises OSError(ENOSPC) (skip, or `give_up` while waiting) or Halt(CANNOT_WRITE) (stop).
    """
    need = int(one_bytes * SPACE_FACTOR)
    warned_at = float("-inf")
    while (have := free_bytes(folder)) < need:
        text = f"checkpoint step-{step:08d} needs {gb(need)}, the disk has {gb(have)}; nothing old is deleted for it"
        if settings.on_full_disk == "stop":
            raise Halt(ExitCode.CANNOT_WRITE, text)
        if settings.on_full_disk == "skip" or give_up():
            raise OSError(errno.ENOSPC, text)
        if time.monotonic() - warned_at > _DISK_WARN_S:
            print(f"warning: {text}; waiting for space", file=sys.stderr)
            warned_at = time.monotonic()
        time.sleep(_DISK_POLL_S)


def committed(folder: Path) -> Iterator[tuple[int, Path, Manifest]]:
    """(step, path, manifest) of every directory with a sound manifest; the files are not read."""
    for name in os.listdir(folder):
        step = manifest.step_of(name)
        if step is not None:
            with contextlib.suppress(Damaged, OSError):
                yield step, folder / name, manifest.read(folder / name)


def gb(count: float) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else re.sub(r"\.0$", "", f"{count / 1e3:.1f}") + " kB"
