"""ZeRO-1: every process keeps the optimizer state of its share of the parameters, and updates only those.

Weights and gradients stay whole on every process, and the one all-reduce of gradients stays as it is; after the step
each process broadcasts the weights it has updated. A parameter belongs to one process as a whole, and AdamW, its
8-bit form and Adafactor without momentum look at one tensor at a time, so weights and state are those of an unsharded
run to the last bit, and a checkpoint, to which the state is gathered, is the same file. (Adafactor's step by shape: on a CPU.
A card may split a sum by how many tensors are summed at once, and shares cut chunks elsewhere; `strict` takes one by one.)

Why not torch's ZeroRedundancyOptimizer: to gather, it sends state dicts as pickles (`torch.save` into a buffer,
`torch.load(weights_only=False)` at the other end), all of a process's state at once and by position instead of name.
Here the state travels as bytes, one tensor at a time, after a JSON header that is checked against the shares.

What it costs: a process alone cannot save. After a failure, when no collective may be called any more, the last
regular checkpoint is what remains (`train.engine.loop.leave`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from train.base.errors import ExitCode, Halt
from train.optim.collectives import Place
from train.recipe.optimizer_state import state_bytes
from train.storage.state_files import DTYPE_NAMES, DTYPES


def assign(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Parameter name to the rank that keeps its state: largest first, each to the rank with least so far.

    Ties go to the smaller name and the lower rank, so every process computes the same. Ranks differ by at most the
    largest parameter. Raises Halt(MISMATCH) when some rank would get nothing.
    """
    if world > len(sizes):
        raise Halt(
            ExitCode.MISMATCH,
            f"optimizer.sharding: zero1 on {world} processes, but only {len(sizes)} tensors are trained; use none",
        )
    loads, owners = [0] * world, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world), key=lambda rank: (loads[rank], rank))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


class Shares:
    """Owner of the division of the trained parameters, by canonical name, among the processes."""

    name = "zero1"
    group = None  # every tensor that a process updates is whole

    def __init__(self, parameters: Mapping[str, nn.Parameter], place: Place) -> None:
        self.place = place
        self.owners = assign({name: parameter.numel() for name, parameter in parameters.items()}, place.world)

    def mine(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of `parameters` that this process updates, in their order."""
        return {name: p for name, p in parameters.items() if self.owners[name] == self.place.rank}

    @torch.no_grad()
    def spread(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give every process the weights that the others updated, in place. Call it on all after the step."""
        handles = [
            dist.broadcast(_bytes(parameters[name]), src=owner, async_op=True)
            for name, owner in sorted(self.owners.items())
        ]
        for handle in handles:
            handle.wait()

    def gather(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole optimizer state on the main process, what was another's in host memory; {} elsewhere.

        Call it on all processes. `state`: `<parameter name>/<state key>` of this one (`optim.state_tensors`).
        """
        if not self.place.is_main:
            self._send(state)
            return {}
        whole = dict(state)
        for rank in range(1, self.place.world):
            whole |= self._receive(rank)
        return whole

    def whole(self, found: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Groups of named tensors with the optimizer's state whole on the main process. Call it on all processes."""
        return {group: self.gather(named) if group == "optimizer" else dict(named) for group, named in found.items()}

    def replicas(self, parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dist.ProcessGroup | None]:
        """(what other processes hold alike, the group of those processes; None: all): the weights."""
        return dict(parameters), None

    def gathered_bytes(self, optimizer: str, parameters: Mapping[str, nn.Parameter], checkpoint_bytes: int) -> int:
        """Host memory that a save takes on the main process: the state of `optimizer` that others keep."""
        others = [tuple(p.shape) for name, p in parameters.items() if self.owners[name] != self.place.rank]
        return state_bytes(optimizer, others)

    def _send(self, state: Mapping[str, torch.Tensor]) -> None:
        device = self.place.device
        specs = {name: [DTYPE_NAMES[state[name].dtype], list(state[name].shape)] for name in sorted(state)}
        text = torch.frombuffer(bytearray(json.dumps(specs).encode()), dtype=torch.uint8).to(device)
        dist.send(torch.tensor([text.numel()], dtype=torch.int64, device=device), dst=0)
        dist.send(text, dst=0)
        for name in sorted(state):
            dist.send(_bytes(state[name].detach().contiguous().to(device)), dst=0)

    def _receive(self, rank: int) -> dict[str, torch.Tensor]:
        device = self.place.device
        length = torch.zeros(1, dtype=torch.int64, device=device)
        dist.recv(length, src=rank)
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
        dist.recv(text, src=rank)
        found = {}
        for name, (dtype, shape) in self._offered(rank, bytes(text.cpu().numpy())).items():
            values = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(_bytes(values), src=rank)
            found[name] = values.cpu()
        return found

    def _offered(self, rank: int, header: bytes) -> dict[str, tuple[torch.dtype, list[int]]]:
        """What `rank` is about to send, in order. Raises RuntimeError for state that is not of its share."""
        specs = json.loads(header)
        for name in specs:
            if self.owners.get(name.rpartition("/")[0]) != rank:
                raise RuntimeError(f"rank {rank} sends {name}, which is not of its share")
        return {name: (DTYPES[specs[name][0]], specs[name][1]) for name in sorted(specs)}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as uint8, in whatever order its elements lie: collectives want contiguous tensors."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)
