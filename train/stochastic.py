"""Training with 16-bit weights and no fp32 copy of them: the update is computed in fp32 and rounded at random.

At learning rates of 1e-6 most updates are smaller than half the distance between two bf16 numbers, so rounding to the
nearest would lose them all. Rounding up with a probability equal to the remainder keeps them on average. The random
bits depend on (seed, update), so a resumed run rounds alike. Opt-in: half the memory for weights and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from train import rng

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


def step(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], *, seed: int, update: int) -> None:
    """`optimizer.step()` in fp32 for bf16 parameters, rounded stochastically; gradients are gone afterwards.

    Works with any optimizer that skips parameters without a gradient, chunk by chunk, so its own state is fp32 (or
    8 bit) as if the weights were. `update`: number of updates applied before this one.
    """
    held = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in held:
        parameter.grad = None
    word = int(rng.words(seed, rng.Stream.ROUNDING, update, 0, 1)[0])
    generators: dict[torch.device, torch.Generator] = {}
    for chunk in _chunks(held):
        for parameter, gradient in chunk:
            parameter.data = parameter.data.float()
            parameter.grad = gradient.float()
        optimizer.step()
        for parameter, _ in chunk:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(word)
            parameter.grad = None
            parameter.data = round_stochastic(parameter.data, generators[device])


def _chunks(
    held: list[tuple[nn.Parameter, torch.Tensor]],
) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
    chunk: list[tuple[nn.Parameter, torch.Tensor]] = []
    size = 0
    for parameter, gradient in held:
        if chunk and size + 4 * parameter.numel() > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((parameter, gradient))
        size += 4 * parameter.numel()
    if chunk:
        yield chunk
