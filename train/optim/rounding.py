"""Training with 16-bit weights and no fp32 copy of them: the update is computed in fp32 and rounded at random.

At learning rates of 1e-6 most updates are smaller than half the distance between two bf16 numbers, so rounding to the
nearest would lose them all. Rounding up with a probability equal to the remainder keeps them on average. The random
bits depend on (seed, update, parameter), so a resumed run rounds alike, however the parameters are divided among
processes or put together in chunks (`optim.stepping`). Opt-in: half the memory for weights and gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import nn

from train.recipe import rng

_UNUSED_LOW_BITS = 16  # of an fp32 number that bf16 drops


def seeds(names: Collection[str], *, seed: int, update: int) -> dict[str, int]:
    """Of each parameter's rounding at this update, by name; `names`: all that train, in their order."""
    numbers = np.arange(len(names))
    words_N4 = rng.first_words(seed, rng.Stream.ROUNDING, np.full(len(names), update), numbers)
    return {name: int(low) | int(high) << 32 for name, (low, high) in zip(names, words_N4[:, :2], strict=True)}


def round_stochastic(values_N: torch.Tensor, seeds_N: Sequence[int]) -> torch.Tensor:
    """bf16 of the same shape: the two neighbours of each fp32 value, chosen so that the mean is the value.

    Every row of `values_N` draws from its own seed.
    """
    chance_N = torch.empty(values_N.shape, dtype=torch.int32, device=values_N.device)
    generator = torch.Generator(values_N.device)
    for chance, row_seed in zip(chance_N.unbind(), seeds_N, strict=True):
        torch.randint(0, 1 << _UNUSED_LOW_BITS, chance.shape, generator=generator.manual_seed(row_seed), out=chance)
    kept_N = values_N.view(torch.int32) + chance_N  # in the layout of the values
    return kept_N.bitwise_and_(-(1 << _UNUSED_LOW_BITS)).view(torch.float32).bfloat16()  # exact: dropped bits are zero


def to_16_bit(parameters: Iterable[nn.Parameter]) -> None:
    """Turn the parameters into bf16, in place and rounded to nearest: once, when a stage starts from fp32 weights."""
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
