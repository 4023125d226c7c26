"""Stops before damage: non-finite updates are recorded and not applied, replicas are compared, spikes flagged.

Works with and without torch.distributed; every process takes the same decision from the same reduced numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train.base.console import ExitCode, Halt
from train.recipe.order import Tile
from train.storage.rundir import RunDir, write_json

SPIKE_SIGMAS = 6.0
SPIKE_WINDOW = 128  # updates
_SPIKE_LEAST = 8  # losses before anything can be called unusual
_BIT_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes per element: integer dtype


# --- non-finite updates ------------------------------------------------------------------------------


def bad_step_record(
    step: int, tiles: Sequence[Tile], timesteps: Sequence[int] | np.ndarray, losses: Sequence[float], **more: Any
) -> dict[str, Any]:
    """Everything needed to look at, and recompute, plan step `step`: one entry per image in plan order.

    JSON has no NaN: non-finite numbers become the strings nan, inf, -inf; finite ones keep all their digits.
    """
    slots: list[dict[str, Any]] = []
    for number, tile in enumerate(tiles):
        for row, uid, epoch in zip(tile.rows, tile.uids, tile.epochs, strict=True):
            slots.append(
                {
                    "tile": number,
                    "bucket": f"{tile.width}x{tile.height}",
                    "row": int(row),
                    "uid": f"{int(uid):016x}",
                    "epoch": int(epoch),
                    "t": int(timesteps[len(slots)]),
                    "loss": json_number(float(losses[len(slots)])),
                }
            )
    return {"step": step, **{k: json_number(v) if isinstance(v, float) else v for k, v in more.items()}, "slots": slots}


def may_apply(losses_finite: bool, grad_norm: float) -> bool:
    """Whether the weights may change: all losses and the norm over all gradients are finite."""
    return losses_finite and math.isfinite(grad_norm)


def bad_step(
    run: RunDir,
    *,
    step: int,
    updates: int,
    tiles: Sequence[Tile],
    timesteps: Sequence[int] | np.ndarray,
    losses: Sequence[float],
    grad_norm: float,
    scale: float = 1.0,
) -> Halt:
    """The Halt(NON_FINITE) to raise before the weights change; the main process leaves `bad_step.json`.

    `timesteps` and `losses` hold one number per image in plan order.
    """
    record = bad_step_record(step, tiles, timesteps, losses, updates=updates, grad_norm=grad_norm, loss_scale=scale)
    bad = [s for s in record["slots"] if isinstance(s["loss"], str)]
    named = ", ".join(f"{s['uid']}@{s['epoch']} t {s['t']} ({s['loss']})" for s in bad[:8])
    what = f"the loss of {len(bad)} images" if bad else f"the gradient (loss scale {scale:g})"
    where = "All is in bad_step.json"
    try:
        if run.rank == 0:
            write_json(run.path / "bad_step.json", record)
    except OSError as error:  # the update must not be applied all the same
        where = f"bad_step.json could not be written ({error.strerror})"
    return Halt(
        ExitCode.NON_FINITE,
        f"update {step}: {what} is not finite; the weights are those of the update before. "
        + (f"Images (uid@epoch): {named}{' ...' if len(bad) > 8 else ''}. " if bad else "")
        + f"{where}; scripts/show.py step {run.path} --update {step} --recompute repeats it",
    )


def json_number(value: float) -> float | str:
    """`value`, or its name when JSON has no such number."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


# --- a stop outside an update ------------------------------------------------------------------------


def stop_if_asked(asked: bool, device: torch.device, step: int) -> None:
    """Halt(STOPPED) on every process alike when any of them was asked to stop. One collective, before update `step`.

    Inside the loop the control vector carries the flag; this is for loading and preflight, where nothing is lost.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flag = torch.tensor([float(asked)], device=device)
        dist.all_reduce(flag)
        asked = bool(flag.item() > 0)
    if asked:
        saved = f"after update {step}, which is saved" if step else "before the first update"
        raise Halt(ExitCode.STOPPED, f"stopped by a signal {saved}: the same command goes on")


# --- loss spikes -------------------------------------------------------------------------------------


def spike_sigmas(history: Collection[float], loss: float) -> float | None:
    """How many standard deviations `loss` lies above the last 128 losses, if that is a spike, else None.

    A spike (6 sigma) is reported and counted; the run goes on unchanged. `history` excludes `loss`.
    """
    window = [value for value in list(history)[-SPIKE_WINDOW:] if math.isfinite(value)]
    if len(window) < _SPIKE_LEAST or not math.isfinite(loss):
        return None
    mean = math.fsum(window) / len(window)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in window) / (len(window) - 1))
    deviation = max(deviation, abs(mean) * 1e-6)  # equal losses: rounding is not a spike
    sigmas = (loss - mean) / deviation if deviation > 0 else 0.0
    return sigmas if sigmas > SPIKE_SIGMAS else None


class SpikeDetector:
    """Owner of the last losses. A resumed run may hand in those of its `metrics.jsonl`."""

    def __init__(self, history: Iterable[float] = ()) -> None:
        self.history = deque(history, maxlen=SPIKE_WINDOW)
        self.sigmas: float | None = None  # of the last loss, if it was a spike

    def check(self, loss: float) -> str | None:
        """What is unusual about this update's loss, else None; then it counts as seen."""
        self.sigmas, seen = spike_sigmas(self.history, loss), len(self.history)
        self.history.append(loss)
        return None if self.sigmas is None else f"loss {loss:.4g} lies {self.sigmas:.1f} sigma above the last {seen}"


# --- replicas ----------------------------------------------------------------------------------------


class ReplicasDiffer(Halt):
    """The processes hold different weights: the one failure after which nothing may be saved."""


@torch.no_grad()
def checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int64 [n]: per tensor the wrapping sum of its bit patterns, on the tensors' device, in sorted-name order."""
    sums = []
    for name in sorted(tensors):
        flat = tensors[name].detach().contiguous().reshape(-1)
        sums.append(flat.view(_BIT_VIEWS[flat.element_size()]).sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def differing_replicas(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names whose bits are not the same on all processes; [] on one process. One collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    own = checksums(tensors)
    both = torch.cat([own, -own])  # max of the negated sums is minus their min: one collective instead of two
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    highest, lowest = both[: len(own)], -both[len(own) :]
    different = (highest != lowest).cpu().tolist()
    return [name for name, differs in zip(sorted(tensors), different, strict=True) if differs]


def check_replicas(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Halt(PEER_LOST) on every process when any parameter differs between them; nothing is saved then."""
    names = differing_replicas(tensors)
    if names:
        raise ReplicasDiffer(
            ExitCode.PEER_LOST,
            f"update {step}: the processes hold different weights in {len(names)} of {len(tensors)} tensors, such as "
            f"{', '.join(names[:3])}. One device computes wrongly; nothing was saved. Test the devices, then start "
            "again from the last checkpoint",
        )
