"""FSDP2: every process holds a part of every trained tensor, gradient and state; a block is whole only while it runs.

torch's `fully_shard`, called directly: accelerate's plugin falls back to DDP on a CPU without a word. A unit is one
transformer block list, one resnet, one layer of a text encoder; what is left belongs to the root. Gradients are
reduced after every backward: held back until an update's last one they would be whole on every process.
With HSDP the processes of a group share, and the groups are replicas of one another.

Checkpoints are those of every other engine: `whole` gathers one tensor at a time on the main process's host.

What it costs: a process alone cannot save. After a failure, when no collective may be called any more, the last
regular checkpoint is what remains (`train.engine.loop.leave`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from train.base.errors import ExitCode, Halt
from train.optim.collectives import Place
from train.optim.offload import UNITS


def open_mesh(kind: str, place: Place, group: int | None, local_world: int) -> DeviceMesh:
    """The processes in one line (fsdp2), or as groups that share x replicas of them (hsdp).

    `group`: processes that share, None for the `local_world` of one machine. Raises Halt(MISMATCH) when the processes
    do not divide into such groups.
    """
    if kind == "fsdp2":
        return init_device_mesh(place.device.type, (place.world,), mesh_dim_names=("share",))
    size = group or local_world
    if place.world % size or size == place.world or size == 1:
        raise Halt(
            ExitCode.MISMATCH,
            f"optimizer.sharding: hsdp on {place.world} processes in groups of {size} (optimizer.shard_group, null: the "
            "processes of a machine): it takes several groups of several processes; use fsdp2, or another shard_group",
        )
    return init_device_mesh(place.device.type, (place.world // size, size), mesh_dim_names=("replica", "share"))


def shard(networks: nn.Module, mesh: DeviceMesh, gather: str) -> None:
    """Cut the parameters of every unit, in place, then those of the root. `gather` bf16 halves what travels."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if gather == "bf16" else MixedPrecisionPolicy()
    for module in list(networks.modules()):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # Frozen 16-bit encoders lie in the root's unit beside fp32 ones; a policy would cast what their dtype decides.
    fully_shard(networks, mesh=mesh)


class FullShards:
    """Owner of the division of everything among the processes; stands where ZeRO-1's `Shares` stands.

    `plain_state`: the optimizer keeps its state as tensors of this process's rows (Adafactor), not as shards that torch
    knows (AdamW).
    """

    def __init__(self, mesh: DeviceMesh, place: Place, *, plain_state: bool) -> None:
        self.mesh, self.place, self.plain_state = mesh, place, plain_state
        self.name = "hsdp" if "replica" in (mesh.mesh_dim_names or ()) else "fsdp2"

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes among which this one's parts are cut."""
        return self.mesh["share"].get_group()

    @property
    def fraction(self) -> float:
        """Part of every tensor that this process holds."""
        return 1.0 / self.mesh["share"].size()

    def mine(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those of `parameters` that this process updates, in their order: all, as far as it holds them."""
        return dict(parameters)

    def spread(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing: the next forward gathers."""

    def whole(self, found: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Groups of named tensors with every shard gathered, on the main process's host; empty groups elsewhere.

        Call it on all processes. One tensor at a time is whole on the device.
        """
        parameters = found["model"]
        gathered: dict[str, dict[str, torch.Tensor]] = {}
        for group, named in found.items():
            gathered[group] = {}
            for name in sorted(named):
                owner, _, key = name.rpartition("/")
                part = self._of_state(key, named[name], parameters[owner]) if group == "optimizer" else named[name]
                tensor = full(part)
                if self.place.is_main:
                    gathered[group][name] = tensor.cpu() if isinstance(part, DTensor) else tensor
        return gathered

    def _of_state(self, key: str, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Adafactor's state, which lies as plain rows, as the part of a whole that it is."""
        if isinstance(value, DTensor) or not isinstance(parameter, DTensor) or not _is_cut(key, value, parameter):
            return value
        shape = (parameter.shape[0], *value.shape[1:])
        stride = tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))
        return DTensor.from_local(
            value.contiguous(), parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def gathered_bytes(self, optimizer: str, parameters: Mapping[str, nn.Parameter], checkpoint_bytes: int) -> int:
        """Host memory that a save takes on the main process: all that a checkpoint holds."""
        return checkpoint_bytes

    def replicas(self, parameters: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dist.ProcessGroup | None]:
        """(what other processes hold alike, the group of those processes): with hsdp this one's shards, else nothing."""
        if self.name == "fsdp2":
            return {}, None
        return {name: local(p) for name, p in parameters.items()}, self.mesh.get_group("replica")

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a shard, on its device; any other tensor as it is. A collective for a shard."""
        return full(tensor)

    def cut(self, tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's parts of whole tensors, as `like` of the same names is cut; no communication."""
        return {name: cut(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}

    def cut_one(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of one whole tensor; no communication."""
        return cut(tensor, like)

    def cut_state(self, key: str, tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This process's part of the optimizer's state `key` of a parameter; Adafactor's lies as plain rows."""
        whole = tensor.to(parameter.device, copy=True)
        if not isinstance(parameter, DTensor) or not _is_cut(key, whole, parameter):
            return whole
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return part.to_local().clone() if self.plain_state else part


def _is_cut(key: str, state: torch.Tensor, parameter: DTensor) -> bool:
    """Whether the state of a parameter is cut along its rows: all but single numbers and the column means of a matrix."""
    return state.ndim > 0 and not (key == "exp_avg_sq_col" and parameter.ndim == 2)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a shard, on its device; any other tensor as it is. A collective for a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this process holds of `like`; one of another shape stays whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
