"""Training with 16-bit weights and no fp32 copy of them: the update is computed in fp32 and rounded at random.

At learning rates of 1e-6 most updates are smaller than half the distance between two bf16 numbers, so rounding to the
nearest would lose them all. Rounding up with a probability equal to the remainder keeps them on average. The random
bits depend on (seed, update, parameter), so a resumed run rounds alike, however the parameters are divided among
processes. Opt-in: half the memory for weights and gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from train.recipe import rng

CHUNK_BYTES = 256 * 2**20  # of fp32 copies at a time; the only memory this adds
_UNUSED_LOW_BITS = 16  # of an fp32 number that bf16 drops


def round_stochastic(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bf16 of the same shape: the two neighbours of each fp32 value, chosen so that the mean is the value."""
    bits = values.view(torch.int32)
    chance = torch.randint(
        0, 1 << _UNUSED_LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    kept = (bits + chance) & -(1 << _UNUSED_LOW_BITS)
    return kept.view(torch.float32).to(torch.bfloat16)  # exact: the dropped bits are zero


def to_16_bit(parameters: Iterable[nn.Parameter]) -> None:
    """Turn the parameters into bf16, in place and rounded to nearest: once, when a stage starts from fp32 weights."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()


def step(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, seed: int, update: int
) -> None:
    """`optimizer.step()` in fp32 for bf16 parameters, rounded stochastically; their gradients stay where they are.

    Works with any optimizer that skips parameters without a gradient, chunk by chunk, so its own state is fp32 (or
    8 bit) as if the weights were. `parameters`: all that train, of which the optimizer may hold a share; their order
    decides the random bits. `update`: number of updates applied before this one.
    """
    numbers = np.arange(len(parameters))
    words_N4 = rng.first_words(seed, rng.Stream.ROUNDING, np.full(len(parameters), update), numbers)
    seeds_N = [int(low) | int(high) << 32 for low, high in words_N4[:, :2]]
    in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    held: list[_Held] = []
    for parameter, rounding_seed in zip(parameters.values(), seeds_N, strict=True):
        if parameter.grad is not None and id(parameter) in in_optimizer:
            held.append((parameter, parameter.grad, rounding_seed))
    generators: dict[torch.device, torch.Generator] = {}
    for chunk in _chunks(held):
        # Stand-ins, because a parameter whose own data changes its dtype gets a new gradient accumulator, on which
        # DDP has no hook: from then on its gradients would not be reduced.
        stand_ins = {}
        for parameter, gradient, _ in chunk:
            stand_ins[parameter] = nn.Parameter(parameter.detach().float())
            stand_ins[parameter].grad = gradient.float()
        with _standing_in(optimizer, stand_ins):
            optimizer.step()
        for parameter, _, rounding_seed in chunk:
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device)).manual_seed(rounding_seed)
            with torch.no_grad():
                parameter.copy_(round_stochastic(stand_ins[parameter].detach(), generator))


_Held = tuple[nn.Parameter, torch.Tensor, int]  # parameter, its gradient, seed of its rounding


@contextlib.contextmanager
def _standing_in(optimizer: torch.optim.Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """The optimizer holds the stand-ins alone, with the state of those they stand for; afterwards as before."""
    members = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [stand_ins[parameter] for parameter in group["params"] if parameter in stand_ins]
    _move_state(optimizer, stand_ins)
    try:
        yield
    finally:
        _move_state(optimizer, {stand_in: parameter for parameter, stand_in in stand_ins.items()})
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            group["params"] = parameters


def _move_state(optimizer: torch.optim.Optimizer, moves: Mapping[nn.Parameter, nn.Parameter]) -> None:
    for one, other in moves.items():
        if one in optimizer.state:
            optimizer.state[other] = optimizer.state.pop(one)


def _chunks(held: list[_Held]) -> Iterator[list[_Held]]:
    chunk: list[_Held] = []
    size = 0
    for entry in held:
        parameter = entry[0]
        if chunk and size + 4 * parameter.numel() > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += 4 * parameter.numel()
    if chunk:
        yield chunk
