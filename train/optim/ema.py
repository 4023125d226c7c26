"""Moving average of the trained weights, kept in fp32; part of the checkpoint, exported beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch


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
        """Follow the weights after update number `updates` (1-based)."""
        if updates % self.every_steps:
            return
        for name, parameter in parameters.items():
            average = self.average[name]
            average.lerp_(parameter.detach().to(average.device, torch.float32), 1.0 - self.decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's averages. Raises KeyError for a missing name."""
        for name, average in self.average.items():
            average.copy_(tensors[name])
