"""Moving average of the trained weights, kept in fp32; part of the checkpoint, exported beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from train.optim import stepping


class Ema:
    """Owner of the averaged copy. average += (1 - decay) * (weight - average) after every `every_steps` updates."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float, every_steps: int, device: str) -> None:
        self.decay, self.every_steps = decay, every_steps
        self.average = {
            name: parameter.detach().to("cpu" if device == "cpu" else parameter.device, torch.float32, copy=True)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], updates: int) -> None:
        """Follow the weights after update number `updates` (1-based); those elsewhere or of 16 bit come chunk by chunk."""
        if updates % self.every_steps:
            return
        group: dict[str, Any] = {}
        for chunk in stepping.chunks([stepping.Entry(name, weight, group) for name, weight in parameters.items()]):
            averages, weights = [self.average[entry.name] for entry in chunk], [entry.tensor.detach() for entry in chunk]
            if (weights[0].dtype, weights[0].device) != (averages[0].dtype, averages[0].device):
                weights = list(_beside(averages[0].device, stepping.rows(weights)).unbind())
            torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's averages. Raises KeyError for a missing name."""
        for name, average in self.average.items():
            average.copy_(tensors[name])


def _beside(device: torch.device, weights_N: torch.Tensor) -> torch.Tensor:
    """The rows on `device`: from a card to the host by one copy into page-locked memory, which torch keeps for the next."""
    if weights_N.device == device:
        return weights_N
    found = torch.empty_like(weights_N, device=device, pin_memory=weights_N.is_cuda)
    found.copy_(weights_N, non_blocking=True)
    torch.cuda.current_stream(weights_N.device).synchronize()
    return found
