"""The one room that applies an update: what trains, chunk by chunk, gathered, stepped and written back.

What trains is a list of entries (name, tensor, group of the optimizer), and nothing here asks what a tensor is part of.
`chunks` cuts the list into runs of equal shape; `rows` makes of a chunk's tensors one fp32 tensor [n, *shape], which is a
view where they already lie one behind the other; a step of a chunk changes such rows in place; what was a copy is
written back. So the number of launches goes with the number of shapes (44 in SDXL's U-Net), not of tensors (1,680).

Who comes through here, and what each of them decides:
- Adafactor: the step of a chunk; gradients and state as rows, weights where they are.
- 16-bit weights: rows are fp32 copies, a twin of the optimizer, with the same state, steps them by its own class's
  step, and writing back rounds at random (`optim.rounding`).
- Shards (`optim.fsdp2`): an entry's tensor is the local part of one. Elementwise optimizers need nothing else; Adafactor's
  means and norms, which alone look across a tensor, are sums over the processes that hold the rest: three or four a
  chunk, where the class's step on shards takes as many for each tensor.
Made for one more, which is not here yet:
- Masters in host memory: as 16-bit weights are, with copies on another device instead of in another dtype; state is
  then gathered and written back like the weights. A chunk is also what is in flight while the next one is copied.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import optimization

from train.optim import rounding

CHUNK_BYTES = 256 * 2**20  # of fp32 values in a chunk; rows of weights, gradients and an update are all that a step adds


class Entry(NamedTuple):
    """A trained tensor as a step sees it. `group` is the optimizer's: learning rate, decay and the like."""

    name: str
    tensor: torch.Tensor
    group: dict[str, Any]

    @property
    def gradient(self) -> torch.Tensor:
        """Of the update; every entry has one."""
        assert self.tensor.grad is not None
        return self.tensor.grad


def entries(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[Entry]:
    """What `optimizer` steps: of what it holds (with ZeRO-1 a share of `parameters`) all that has a gradient."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    held = ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])
    return [Entry(names.get(id(p), ""), p, group) for p, group in held if p.grad is not None]


def chunks(
    found: Sequence[Entry],
    alike: Callable[[Entry], Hashable] = lambda entry: None,
    numel: Callable[[Entry], int] = lambda entry: entry.tensor.numel(),
) -> Iterator[list[Entry]]:
    """Entries of one group, shape, layout, dtype and device, and equal in `alike`; at most CHUNK_BYTES in fp32, or one."""
    kinds: dict[Hashable, list[Entry]] = {}
    for entry in found:
        tensor = entry.tensor
        kind = (id(entry.group), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, alike(entry))
        kinds.setdefault(kind, []).append(entry)
    for members in kinds.values():
        most = max(1, CHUNK_BYTES // max(1, 4 * numel(members[0])))
        yield from (members[start : start + most] for start in range(0, len(members), most))


def rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 [n, *shape] of n tensors of one shape and layout, which each row keeps: themselves if they lie so, or a copy."""
    first = tensors[0]
    shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    if first.dtype == torch.float32 and _one_behind_the_other(tensors):
        return first.as_strided(shape, strides)
    whole = torch.empty(len(tensors) * first.numel(), dtype=torch.float32, device=first.device).as_strided(shape, strides)
    torch._foreach_copy_(list(whole.unbind()), list(tensors))
    return whole


def _one_behind_the_other(tensors: Sequence[torch.Tensor]) -> bool:
    first, last = tensors[0], tensors[-1]
    # Neighbours by address alone may be two pieces of memory: with both ends in one, all between are in it too.
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return False
    start, length, stride = first.data_ptr(), first.numel() * first.element_size(), first.stride()
    return all(t.data_ptr() == start + n * length and t.stride() == stride for n, t in enumerate(tensors))


# --- the step of a chunk -------------------------------------------------------------------------------


class Adafactor(optimization.Adafactor):
    """transformers' class with its step batched by shape: its formulas and its state, a twentieth of its launches.

    The class steps one tensor after the other: 33,000 kernels for SDXL's U-Net, launched after the update's only wait
    for the device, so that none of their cost is hidden. State has the same keys, shapes and dtypes: either goes on from
    the other's. Results differ in last bits (sums are taken in another order); on a CPU not with how tensors form chunks.
    `group`: the processes among which the first dimension of every tensor is cut; state is then of this one's rows.
    """

    group: dist.ProcessGroup | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on all parameters that have a gradient; what `closure` gives."""
        found = entries(self, {})
        if any(e.group["relative_step"] or e.group["beta1"] is not None or e.tensor.dtype != torch.float32 for e in found):
            return super().step(closure)  # no stage of ours asks for these
        loss = closure() if closure is not None else None
        states = {id(entry.tensor): self.state[entry.tensor] for entry in found}
        shapes = {id(entry.tensor): tuple(entry.tensor.shape) for entry in found}
        if self.group is not None:  # chunks of equal whole shapes: every process must form the same
            parts = [_part(entry) for entry in found]
            for whole, part in zip(found, parts, strict=True):
                states[id(part.tensor)], shapes[id(part.tensor)] = states[id(whole.tensor)], shapes[id(whole.tensor)]
            found = parts
        for chunk in chunks(
            found,
            alike=lambda e: (shapes[id(e.tensor)], states[id(e.tensor)].get("step", 0)),
            numel=lambda e: math.prod(shapes[id(e.tensor)]) // (self.group.size() if self.group is not None else 1),
        ):
            across = None if self.group is None else Across(self.group, shapes[id(chunk[0].tensor)])
            _adafactor(chunk, [states[id(entry.tensor)] for entry in chunk], across)
        return loss


@dataclass(frozen=True)
class Across:
    """Sums over the processes that hold the other rows of tensors of `shape`."""

    group: dist.ProcessGroup
    shape: tuple[int, ...]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """In place: of all processes."""
        dist.all_reduce(values, group=self.group)
        return values


def _part(entry: Entry) -> Entry:
    """What lies here of an entry whose tensor and gradient are cut (DTensors): views, changed in place."""
    part = entry.tensor.to_local().detach()  # type: ignore[attr-defined]
    part.grad = entry.gradient.to_local()  # type: ignore[attr-defined]
    return Entry(entry.name, part, entry.group)


def _adafactor(chunk: Sequence[Entry], states: Sequence[dict[str, Any]], across: Across | None) -> None:
    """The class's step on n tensors at once. Shapes: N of a chunk, R rows and C columns of its factored tensors."""
    group = chunk[0].group
    weights: list[torch.Tensor] = [entry.tensor for entry in chunk]
    gradients_N = rows([entry.gradient for entry in chunk])
    number = states[0].get("step", 0) + 1
    sizes = torch._foreach_norm(weights)
    if across is not None:
        sizes = across.sum(torch.stack(sizes).square_()).sqrt_().unbind()
    sizes = torch._foreach_div(sizes, math.sqrt(math.prod(weights[0].shape if across is None else across.shape)))
    for state, rms in zip(states, sizes, strict=True):
        state["step"], state["RMS"] = number, rms
    rate = group["lr"] * torch.stack(sizes).clamp_(min=group["eps"][1]) if group["scale_parameter"] else group["lr"]

    share = math.pow(number, group["decay_rate"])  # of the newest in the running averages, 1 - beta2
    squared_N = gradients_N.square().add_(group["eps"][0])
    if gradients_N.ndim > 2:
        rows_N = _follow(states, "exp_avg_sq_row", squared_N.mean(-1), share)
        cut = across if gradients_N.ndim == 3 else None  # of a matrix the rows themselves, of a convolution what lies above
        columns_N = _follow(states, "exp_avg_sq_col", _mean(squared_N, -2, cut), share)
        r_factor = (rows_N / _mean(rows_N, -1, cut).unsqueeze(-1)).rsqrt_().unsqueeze(-1)
        update_N = torch.mul(r_factor, columns_N.rsqrt().unsqueeze(-2), out=squared_N).mul_(gradients_N)
    else:
        update_N = _follow(states, "exp_avg_sq", squared_N, share).rsqrt().mul_(gradients_N)

    scale_N = rate / _excess(update_N, group["clip_threshold"], across)
    update_N.mul_(scale_N.view(-1, *[1] * (update_N.ndim - 1)))
    if group["weight_decay"]:
        kept = 1.0 - group["weight_decay"] * rate
        torch._foreach_mul_(weights, list(kept.unbind()) if isinstance(kept, torch.Tensor) else kept)
    torch._foreach_sub_(weights, list(update_N.unbind()))


def _follow(states: Sequence[dict[str, Any]], key: str, newest_N: torch.Tensor, share: float) -> torch.Tensor:
    """The running averages `key` after `newest_N`, as rows, of which each state keeps its own as a view."""
    if key in states[0]:
        average_N = rows([state[key] for state in states])
        average_N.lerp_(newest_N, share)
    else:
        average_N = newest_N.clone(memory_format=torch.contiguous_format)  # the share of the first is 1
    if key not in states[0] or states[0][key].data_ptr() != average_N.data_ptr():
        for state, row in zip(states, average_N.unbind(), strict=True):
            state[key] = row
    return average_N


def _mean(values_N: torch.Tensor, dim: int, across: Across | None) -> torch.Tensor:
    """Mean along a dimension, of which other processes hold the rest where `across` says so."""
    return values_N.mean(dim) if across is None else across.sum(values_N.sum(dim)).div_(across.shape[0])


def _excess(values_N: torch.Tensor, limit: float, across: Across | None) -> torch.Tensor:
    """[n]: how many times `limit` the root mean square of each tensor of a chunk is, at least 1."""
    within, numel = tuple(range(1, values_N.ndim)), values_N[0].numel()
    norm_N = torch.linalg.vector_norm(values_N, dim=within) if within else values_N.abs()
    if across is not None:
        norm_N, numel = across.sum(norm_N.square_()).sqrt_(), math.prod(across.shape)
    return norm_N.div_(limit * math.sqrt(numel)).clamp_(min=1.0)


# --- the step of an update -----------------------------------------------------------------------------


@torch.no_grad()
def apply(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, update: int, rounding_seed: int | None
) -> None:
    """One step on the gradients that are there. `update`: number of updates applied before this one.

    With `rounding_seed` the weights are 16-bit: computed in fp32, rounded at random by (seed, update, place in
    `parameters`: all that train, of which the optimizer may hold a share). State is fp32 (or 8 bit) as if they were.
    """
    if rounding_seed is None:
        optimizer.step()
        return
    seeds = rounding.seeds(parameters, seed=rounding_seed, update=update)
    for chunk in chunks(entries(optimizer, parameters)):
        weights_N = rows([entry.tensor for entry in chunk])
        _twin(optimizer, chunk, weights_N, rows([entry.gradient for entry in chunk])).step()
        rounded_N = rounding.round_stochastic(weights_N, [seeds[entry.name] for entry in chunk])
        torch._foreach_copy_([entry.tensor for entry in chunk], list(rounded_N.unbind()))


def _twin(
    optimizer: torch.optim.Optimizer, chunk: Sequence[Entry], weights_N: torch.Tensor, gradients_N: torch.Tensor
) -> torch.optim.Optimizer:
    """An optimizer like `optimizer` that holds the rows alone, with the state of those whose values they are.

    The parameters themselves stay as they are: one whose data changes its dtype gets a new gradient accumulator, on
    which DDP has no hook, and its gradients would not be reduced from then on.
    """
    stand_ins = [nn.Parameter(row) for row in weights_N.unbind()]
    for stand_in, gradient in zip(stand_ins, gradients_N.unbind(), strict=True):
        stand_in.grad = gradient
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.param_groups = [{**chunk[0].group, "params": stand_ins}]
    twin.state = defaultdict(dict)
    for stand_in, entry in zip(stand_ins, chunk, strict=True):
        twin.state[stand_in] = optimizer.state[entry.tensor]  # the same dict: what a first step adds is there in both
    return twin
