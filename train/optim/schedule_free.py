"""Schedule-free AdamW: the weights that train are not those that a model is judged, drawn and exported by.

Gradients are taken at y, between the plain iterate z and the average x of all its iterates (Defazio et al., arXiv
2405.15682, eq. 3 to 5); x is what the method promises something about. The library moves the weights from one to the other by
interpolating in place, which does not come back to the same bits, so here y is put aside and put back. A checkpoint's model is
x, so that whoever opens one finds what the stage would export; its optimizer state keeps y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

TRAINED = "y"  # state key, in a checkpoint, of the weights that train


def averages(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """x of each parameter, a copy on the host: a second set of weights is more than a card has room for while gradients exist."""
    share = {id(p): 1.0 - 1.0 / group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        z = optimizer.state.get(parameter, {}).get("z")
        y = parameter.detach().cpu()
        found[name] = y.clone() if z is None else torch.lerp(y, z.cpu(), share[id(parameter)])
    return found


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are the average; afterwards they are those that train, to the bit."""
    held = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, trained in held:
                parameter.copy_(trained)
        for group in optimizer.param_groups:
            group["train_mode"] = True
