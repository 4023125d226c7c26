"""One optimizer step: the tiles of this process, the sum over processes, the decision, the step.

loss = sum over the update's images of the per-image mean / number of images in the update, so neither the number
of processes nor the cutting of tiles changes it. Shape legend: B images, C H W latent, G images of an update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from train.base import faults
from train.base.errors import ExitCode, Halt
from train.base.files import json_number, write_json
from train.diffusion.objective import Batch, Diffusion, image_losses
from train.model.sdxl import canonical_name
from train.observe.times import OFF, Times
from train.optim import optimizers, schedule_free, stepping
from train.optim.collectives import BinaryCounter, FlatGradients, Place, check_replicas, reduce_pairwise
from train.optim.ema import Ema
from train.optim.loss_scale import LossScale
from train.optim.offload import HostMasters
from train.optim.zero1 import Shares
from train.recipe.order import Tile, partial_sums
from train.storage.rundir import RunDir

if TYPE_CHECKING:
    from train.optim.fsdp2 import FullShards

Rates = Callable[[int], dict[str, float]]  # updates applied -> learning rate of every parameter group

@dataclass(frozen=True)
class Outcome:
    """What one control vector told every process alike."""

    losses_G: torch.Tensor  # float64 on the host, plan order
    grad_norm: float  # before clipping, unscaled
    stop_asked: bool
    save_due: bool
    tags_cut: int  # tags of this update's captions that lost tokens at the limit

    @property
    def losses_finite(self) -> bool:
        """False when any image of any process gave NaN or Inf."""
        return bool(torch.isfinite(self.losses_G).all())

    @property
    def mean_loss(self) -> float:
        """Mean over the update's images, summed in plan order: the same digits for any number of processes."""
        return float(self.losses_G.sum() / len(self.losses_G))


class Gradients:
    """Owner of an update's gradients: DDP's in fast mode, a flat buffer with a fixed order of sums in strict mode.

    Under DDP they lie in its buckets from the first backward on (`adopted_by_buckets`) and are cleared in place: a gradient
    of None would be allocated beside its bucket by every backward that does not reduce, and held twice until one does.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        place: Place,
        *,
        strict_groups: dict[int, dict[int, dist.ProcessGroup]] | None = None,
        virtual_per_rank: int = 1,
        control: dist.ProcessGroup | None = None,
        shards: FullShards | None = None,
    ) -> None:
        self.model, self.place, self.control = model, place, control
        self.wrapped = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        self.parameters = list(parameters)
        self.groups, self.virtual_per_rank, self.shards = strict_groups, virtual_per_rank, shards
        self.flat = FlatGradients(self.parameters) if strict_groups is not None else None

    @property
    def factor(self) -> int:
        """DDP and FSDP2 average over processes; our constant is the number of images, so its division is undone."""
        return self.place.world if self.flat is None else 1

    @property
    def partial_sums_bytes(self) -> int:
        """What `strict` keeps beside the gradients while a tile is run."""
        return self.flat.flat.nbytes * partial_sums(self.virtual_per_rank) if self.flat is not None else 0

    def clear(self) -> None:
        """Forget what was accumulated; on one process in fast mode its memory is given back too."""
        if self.flat is not None:
            self.flat.zero()
        elif self.wrapped is not None:
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        else:
            for parameter in self.parameters:
                parameter.grad = None

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """A context whose backwards add to this process's gradients and to no other's: no collective."""
        return self.wrapped.no_sync() if self.wrapped is not None else contextlib.nullcontext()

    def accumulate(self, batches: Iterable[Batch], tiles: int, step: int, backward: TileBackward) -> None:
        """Run every tile forward and backward and leave the sum over all processes in `.grad`."""
        if self.flat is None:
            self._accumulate_ddp(batches, tiles, step, backward)
        else:
            self._accumulate_strict(batches, tiles, step, backward, self.flat)

    def _accumulate_ddp(self, batches: Iterable[Batch], tiles: int, step: int, backward: TileBackward) -> None:
        self.clear()
        for number, batch in enumerate(batches, 1):
            backward.times.mark("data")
            parts = batch.parts(backward.diffusion.split)
            for part_number, part in enumerate(parts, 1):
                last = number == tiles and part_number == len(parts)
                skip = last and faults.skips("reduce", step)
                with contextlib.nullcontext() if last and not skip else self.alone():
                    backward(self.model, part, factor=self.factor)
            for _ in range(backward.diffusion.split - len(parts) if self.shards is not None else 0):
                # Every process gathers and reduces equally often; a short tile has fewer parts than the others.
                backward(self.model, replace(parts[-1], tags_dropped=0), factor=0)

    def _accumulate_strict(
        self, batches: Iterable[Batch], tiles: int, step: int, backward: TileBackward, flat: FlatGradients
    ) -> None:
        counter = BinaryCounter()
        per_virtual = tiles // self.virtual_per_rank
        flat.zero()
        for number, batch in enumerate(batches, 1):
            backward.times.mark("data")
            for part in batch.parts(backward.diffusion.split):
                backward(self.model, part, factor=1)
            if self.virtual_per_rank > 1 and number % per_virtual == 0:
                counter.push(flat.flat.clone())
                flat.zero()
        if self.virtual_per_rank > 1:
            flat.flat.copy_(counter.total())
        flat.check()
        if not faults.skips("reduce", step):
            reduce_pairwise(flat.flat, self.place.rank, self.groups or {})
        backward.times.mark("communication")


def adopted_by_buckets(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of zeros: DDP with `gradient_as_bucket_view` takes those that exist when it is made into its buckets."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


@dataclass
class Trained:
    """What is trained, and by what arithmetic. `scale` changes with every update."""

    gradients: Gradients
    diffusion: Diffusion
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    parameters: dict[str, torch.nn.Parameter]  # by canonical name
    ema: Ema | None
    shares: Shares | FullShards | None  # ZeRO-1: which process steps which parameter; FSDP2: its part of everything
    scale: LossScale
    rates_at: Rates
    max_grad_norm: float
    rounding_seed: int | None = None  # of 16-bit weights
    masters: HostMasters | None = None  # owner of `parameters` where the networks hold copies of them

    def step(self, updates: int, times: Times = OFF) -> None:
        """Apply the gradients that are ready after `updates` updates: own share, the others' shares, the average."""
        stepping.apply(self.optimizer, self.parameters, update=updates, rounding_seed=self.rounding_seed)
        times.mark("optimizer")
        if self.shares is not None:
            self.shares.spread(self.parameters)
            times.mark("communication")
        if self.masters is not None:
            self.masters.follow()
            times.mark("optimizer")
        if self.ema is not None:
            self.ema.update(self.parameters, updates + 1)
            times.mark("optimizer")

    def tensors_here(self) -> dict[str, dict[str, torch.Tensor]]:
        """The part of `tensors` that this process has."""
        found = {"model": {name: parameter.detach() for name, parameter in self.parameters.items()}}
        if optimizers.keeps_average(self.optimizer):
            found["model"] = schedule_free.averages(self.optimizer, self.parameters)
        found["optimizer"] = optimizers.state_tensors(self.optimizer, self.parameters)
        if self.ema is not None:
            found["ema"] = dict(self.ema.average)
        return found

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds beside its numbers; whole on the main process. With shares all must call it."""
        found = self.tensors_here()
        return found if self.shares is None else self.shares.whole(found)

    def networks_whole(self) -> dict[str, dict[str, torch.Tensor]] | None:
        """With FSDP2 all that the networks and the average hold, whole on the main process; None where they are whole."""
        shards = self.gradients.shards
        if shards is None:
            return None
        every = {canonical_name(name): p.detach() for name, p in self.gradients.model.named_parameters()}
        return shards.whole({"model": every, **({"ema": self.ema.average} if self.ema is not None else {})})

    def check_replicas(self, step: int) -> None:
        """Halt(PEER_LOST) on every process where those that should hold the same weights do not."""
        alike, group = (self.parameters, None) if self.shares is None else self.shares.replicas(self.parameters)
        check_replicas(alike, step, group)


class TileBackward:
    """Forward, loss and backward of one part of a tile; collects on the device what the host reads once per update.

    `control` is [per-image losses | stop flag | save flag | tags cut | gradient norm]: zeros for other processes' images and whole
    numbers, so that its sum over the processes, all but the norm, is exact.
    """

    def __init__(
        self, diffusion: Diffusion, scale: LossScale, images: int, tiles: int, device: torch.device,
        *, average: str, times: Times = OFF,
    ) -> None:  # fmt: skip
        self.times = times
        self.diffusion, self.scale, self.images, self.tiles, self.average = diffusion, scale, images, tiles, average
        self.control = torch.zeros(images + 4, dtype=torch.float32, device=device)
        self.losses_G = self.control[:images]
        self.tags_cut = 0

    def __call__(self, model: nn.Module, part: Batch, *, factor: int) -> None:
        """Adds to the gradients the share of this part in the update's loss, times the loss scale and `factor`.

        Raises Halt(OUT_OF_MEMORY) naming update and bucket.
        """
        try:
            self._run(model, part, factor)
        except (torch.OutOfMemoryError, MemoryError) as error:
            tile = part.tile
            raise Halt(
                ExitCode.OUT_OF_MEMORY,
                f"update {part.step}: out of memory in bucket {tile.width}x{tile.height} with {len(part.slots_B)} images: "
                f"{error}; raise batch.split, set model.gradient_checkpointing=full, or use an overlay of configs/memory/",
            ) from error

    def _run(self, model: nn.Module, part: Batch, factor: int) -> None:
        faults.at("forward", part.step)
        self.tags_cut += part.tags_dropped
        losses_B = image_losses(model, part, self.diffusion)
        losses_B = faults.bend("loss", losses_B, part.step)
        self.losses_G[part.slots_B] = losses_B.detach()
        if self.average == "micro_batches":  # the original: a short last batch weighs as much as a full one
            share = 1.0 / (len(part.tile.rows) * self.tiles)
        else:
            share = 1.0 / self.images
        total = losses_B.sum() * (share * factor * self.scale.scale)
        summed = bool(getattr(model, "require_backward_grad_sync", False))  # DDP's, outside of no_sync
        if summed:
            self.times.mark_before_sum(total)
        total.backward(faults.bend("backward", torch.ones_like(total), part.step))
        self.times.mark("communication" if summed else "forward_backward")


def compute_update(
    gradients: Gradients,
    batches: Iterator[Batch],
    *,
    diffusion: Diffusion,
    scale: LossScale,
    images: int,
    tiles_here: int,
    tiles_in_update: int,
    step: int,
    max_grad_norm: float,
    stop_asked: Callable[[], bool],
    save_due: Callable[[], bool] = lambda: False,
    times: Times = OFF,
) -> Outcome:
    """Gradients of one update, clipped and ready, and what all processes agree on. Changes no weight."""
    place = gradients.place
    backward = TileBackward(
        diffusion, scale, images, tiles_in_update, place.device, average=diffusion.loss.average, times=times
    )
    with diffusion.kernels():
        gradients.accumulate(batches, tiles_here, step, backward)
    faults.at("control", step)
    control = backward.control
    control[-4].fill_(float(stop_asked()))  # numbers travel as a kernel's arguments: a copy of them would wait for the device
    control[-3].fill_(float(save_due()))
    control[-2].fill_(float(backward.tags_cut))
    if place.world > 1 and not faults.skips("control", step):
        dist.all_reduce(control[:-1], group=gradients.control)
        times.mark("communication")
    faults.at("clip", step)
    if scale.enabled:
        torch._foreach_mul_([p.grad for p in gradients.parameters if p.grad is not None], 1.0 / scale.scale)
    norm = optimizers.clip_grad_norm(gradients.parameters, max_grad_norm)
    control[-1].copy_(norm if gradients.shards is None else gradients.shards.full(norm))
    read = control.cpu().double()  # the one read of device memory per update
    return Outcome(
        losses_G=read[:images],
        grad_norm=float(read[-1]),
        stop_asked=bool(read[-4] > 0),
        save_due=bool(read[-3] > 0),
        tags_cut=int(read[-2]),
    )


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


def not_finite(slots: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """How many images of a `bad_step_record` have a loss that is not finite, and the first eight of them by name."""
    bad = [slot for slot in slots if isinstance(slot["loss"], str)]
    named = ", ".join(f"{slot['uid']}@{slot['epoch']} t {slot['t']} ({slot['loss']})" for slot in bad[:8])
    return len(bad), f"Images (uid@epoch): {named}{' ...' if len(bad) > 8 else ''}" if bad else ""


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
    bad, named = not_finite(record["slots"])
    what = f"the loss of {bad} images" if bad else f"the gradient (loss scale {scale:g})"
    where = "All is in bad_step.json"
    try:
        if run.rank == 0:
            write_json(run.path / "bad_step.json", record)
    except OSError as error:  # the update must not be applied all the same
        where = f"bad_step.json could not be written ({error.strerror})"
    return Halt(
        ExitCode.NON_FINITE,
        f"update {step}: {what} is not finite; the weights are those of the update before. "
        + (f"{named}. " if bad else "")
        + f"{where}; scripts/show.py step {run.path} --update {step} --recompute repeats it",
    )
