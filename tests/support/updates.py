"""One update taken apart: its gradients, and how far two of them differ."""

from __future__ import annotations

import torch

from train.engine.session import Session
from train.engine.step import Outcome, compute_update


def one_update(session: Session, step: int = 0, *, tiles_here: int | None = None) -> Outcome:
    """Gradients of a plan step, not clipped, not applied; `tiles_here` of its tiles are this process's (None: all)."""
    tiles = session.data.plan.update(step)
    return compute_update(
        session.trained.gradients, session.data.loader.next_update(), diffusion=session.trained.diffusion, scale=session.trained.scale,
        images=sum(len(tile.rows) for tile in tiles), tiles_here=tiles_here or len(tiles), tiles_in_update=len(tiles), step=step,
        max_grad_norm=0.0, stop_asked=lambda: False,
    )  # fmt: skip


def gradients(session: Session) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in session.trained.parameters.items() if p.grad is not None}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Distance of two sets of gradients over the norm of the second."""
    assert a.keys() == b.keys()
    distance = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return (distance / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5
