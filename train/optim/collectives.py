"""Gradient sums whose bits do not depend on the number of processes.

The tiles of an update belong to V virtual ranks, V = largest power of two dividing T. Each virtual rank adds its
tiles one after the other; the V sums combine as a balanced binary tree. A process holds V/W neighbouring virtual
ranks and builds its subtree alone; the upper levels are single pairwise additions between processes, which commute.
So 1, 2, 4 .. processes add the same numbers in the same order.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn


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
