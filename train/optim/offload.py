"""Masters in host memory: fp32 weights, gradients and optimizer state lie there; the card holds what autocast would make.

The working copy is 16-bit where autocast casts (linear and convolution layers) and fp32 where it does not, so forward and
backward compute what they compute over fp32 weights. A parameter's gradient leaves as its accumulation ends and adds up in
fp32 in host memory over parts and tiles, as autocast's own cast adds it to an fp32 weight's; then the card's is forgotten.
Clipping, step and average see the masters alone. One process: each would need the host memory again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from train.recipe.optimizer_state import state_bytes

CASTS = (nn.Linear, nn.Conv2d)  # layers whose weights and biases autocast turns into 16 bit
HOST = torch.device("cpu")


class HostMasters:
    """Owner of the fp32 weights of `trained` by name, whose places in `networks` working copies on `device` take."""

    group = None  # every tensor is whole, as `optim.zero1.Shares` says it

    def __init__(self, networks: nn.Module, trained: Mapping[str, nn.Parameter], device: torch.device, dtype: torch.dtype) -> None:
        self.parameters, self.device = dict(trained), device
        self.working: dict[str, nn.Parameter] = {}
        self._sums: dict[str, torch.Tensor] = {}  # kept from update to update: 13.5 GB are not asked for anew each time
        names = {id(master): name for name, master in trained.items()}
        for module in networks.modules():
            for inner, master in list(module._parameters.items()):
                if master is not None and id(master) in names:
                    name = names[id(master)]
                    kind = dtype if isinstance(module, CASTS) else torch.float32
                    working = nn.Parameter(master.detach().to(device, kind, copy=True))
                    working.register_post_accumulate_grad_hook(lambda p, name=name: self._leaves(name, p))
                    module._parameters[inner] = self.working[name] = working

    def mine(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The masters of these working copies, in their order: what the optimizer holds."""
        return {name: self.parameters[name] for name in parameters}

    def pending_bytes(self, optimizer: str) -> int:
        """Host memory that the first update takes: gradients and the state of `optimizer`."""
        shapes = [tuple(master.shape) for master in self.parameters.values()]
        return sum(4 * math.prod(shape) for shape in shapes) + state_bytes(optimizer, shapes)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint's weights, and give them to the working copies. Raises KeyError for a missing name."""
        for name, master in self.parameters.items():
            master.copy_(tensors[name])
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Working copies become the masters' values, rounded as autocast rounds."""
        for name, working in self.working.items():
            working.copy_(self.parameters[name])

    @torch.no_grad()
    def _leaves(self, name: str, working: torch.Tensor) -> None:
        """Add a gradient that is ready to the master's in fp32 and forget it where it was made."""
        master, gradient = self.parameters[name], working.grad
        assert gradient is not None
        if master.grad is not None:
            master.grad.add_(gradient.to(HOST))
        else:
            if name not in self._sums:
                self._sums[name] = torch.empty_like(master)
            master.grad = self._sums[name].copy_(gradient)
        working.grad = None
