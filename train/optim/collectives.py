"""Gradient sums whose bits do not depend on the number of processes.

The tiles of an update belong to V virtual ranks, V = largest power of two dividing T. Each virtual rank adds its
tiles one after the other; the V sums combine as a balanced binary tree. A process holds V/W neighbouring virtual
ranks and builds its subtree alone; the upper levels are single pairwise additions between processes, which commute.
So 1, 2, 4 .. processes add the same numbers in the same order.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from train.base.errors import ExitCode, Halt


class FlatGradients:
    """Owner of one flat fp32 buffer in which every trained parameter's `.grad` is a view."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        total = sum(parameter.numel() for parameter in self.parameters)
        self.flat = torch.zeros(total, dtype=torch.float32, device=self.parameters[0].device)
        offset = 0
        for parameter in self.parameters:
            view = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            # Gradients keep their parameter's memory layout, or autograd replaces the view by a new tensor.
            if not parameter.is_contiguous():
                view = view.flatten().as_strided(parameter.shape, parameter.stride())
            parameter.grad = view
            offset += parameter.numel()

    def zero(self) -> None:
        """Clear the gradients without letting go of the views."""
        self.flat.zero_()

    def check(self) -> None:
        """Fails loudly if autograd replaced a view: the sum would silently miss that parameter."""
        start, end = self.flat.data_ptr(), self.flat.data_ptr() + self.flat.numel() * 4
        for parameter in self.parameters:
            if parameter.grad is None or not start <= parameter.grad.data_ptr() < end:
                raise RuntimeError("a gradient left the flat buffer")


class BinaryCounter:
    """Sums of 2^k virtual ranks, combined whenever two of equal size meet; the earlier one is the left operand."""

    def __init__(self) -> None:
        self.partials: list[tuple[int, torch.Tensor]] = []

    def push(self, flat: torch.Tensor) -> None:
        """Add the finished sum of one virtual rank."""
        size = 1
        while self.partials and self.partials[-1][0] == size:
            _, earlier = self.partials.pop()
            flat = earlier.add_(flat)
            size *= 2
        self.partials.append((size, flat))

    def total(self) -> torch.Tensor:
        """The one sum left after a power of two of pushes."""
        if len(self.partials) != 1:
            raise RuntimeError("not a power of two of virtual ranks")
        return self.partials.pop()[1]


def control_group(world: int, timeout_s: float) -> dist.ProcessGroup | None:
    """A group of all for the control vector, where DDP uses the default one; None where that one serves.

    gloo ends a process without a word when collectives of different sizes meet in one group, as they do when a process
    left one out; in two groups both sides run into the timeout, and say where they stood.
    """
    if world == 1 or dist.get_backend() != "gloo":
        return None
    return dist.new_group(timeout=datetime.timedelta(seconds=timeout_s))


def pair_groups(world: int, timeout_s: float | None = None) -> dict[int, dict[int, dist.ProcessGroup]]:
    """Distance 1, 2, 4 .. to {lower rank: group of the pair}; all ranks create them in the same order.

    A new group does not inherit the timeout of the process group: without one a hanging peer is waited for for long.
    """
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    groups: dict[int, dict[int, dist.ProcessGroup]] = {}
    distance = 1
    while distance < world:
        lower = [rank for rank in range(world) if rank < rank ^ distance]
        groups[distance] = {rank: dist.new_group([rank, rank ^ distance], timeout=timeout) for rank in lower}
        distance *= 2
    return groups


def reduce_pairwise(flat: torch.Tensor, rank: int, groups: Mapping[int, Mapping[int, dist.ProcessGroup]]) -> None:
    """Sum `flat` over all processes, in place, one partner at a time."""
    for distance in sorted(groups):
        dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=groups[distance][min(rank, rank ^ distance)])


@dataclass(frozen=True)
class Place:
    """Which process this is, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes."""
        return self.rank == 0


def stop_if_asked(asked: bool, device: torch.device, step: int) -> None:
    """Halt(STOPPED) on every process alike when any of them was asked to stop. One collective, before update `step`.

    Inside the loop the control vector carries the flag; this is for loading and trial, where nothing is lost.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flag = torch.tensor([float(asked)], device=device)
        dist.all_reduce(flag)
        asked = bool(flag.item() > 0)
    if asked:
        saved = f"after update {step}, which is saved" if step else "before the first update"
        raise Halt(ExitCode.STOPPED, f"stopped by a signal {saved}: the same command goes on")


_BIT_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes per element: integer dtype


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


def differing_replicas(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> list[str]:
    """Names whose bits are not the same on all processes (of `group`); [] on one process. One collective."""
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    own = checksums(tensors)
    both = torch.cat([own, -own])  # max of the negated sums is minus their min: one collective instead of two
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = both[: len(own)], -both[len(own) :]
    differ = (highest != lowest).to(torch.int64)
    if group is not None:  # every process learns of it, those of other groups too
        dist.all_reduce(differ, op=dist.ReduceOp.MAX)
    different = differ.cpu().tolist()
    return [name for name, differs in zip(sorted(tensors), different, strict=True) if differs]


def check_replicas(tensors: Mapping[str, torch.Tensor], step: int, group: dist.ProcessGroup | None = None) -> None:
    """Halt(PEER_LOST) on every process when any parameter differs between them; nothing is saved then."""
    names = differing_replicas(tensors, group)
    if names:
        raise ReplicasDiffer(
            ExitCode.PEER_LOST,
            f"update {step}: the processes hold different weights in {len(names)} of {len(tensors)} tensors, such as "
            f"{', '.join(names[:3])}. One device computes wrongly; nothing was saved. Test the devices, then start "
            "again from the last checkpoint",
        )
