"""What each speed and memory option may change in the numbers: the limits that tests hold and the planner prints."""

from __future__ import annotations

from typing import NamedTuple

from train.config.derived import Running


class Tolerance(NamedTuple):
    """Limits against the plain path over 20 updates of the tiny SDXL.

    loss: largest relative difference of an update's loss. weights: distance of the final weights over the distance
    they have travelled; 0 = the same bits.
    """

    loss: float
    weights: float


SAME_BITS = Tolerance(0.0, 0.0)
RETILED, REORDERED = Tolerance(1e-6, 5e-3), Tolerance(1e-5, 5e-3)
ROUNDED, COARSE = Tolerance(1e-2, 0.25), Tolerance(5e-2, 0.5)


def of(running: Running) -> dict[str, Tolerance]:
    """The options in force that can change a number, by their key; those with the same bits are left out."""
    limits = {
        "batch.split": (running.split != 1, RETILED),
        "model.channels_last": (running.channels_last, REORDERED),
        "model.compile": (running.compile, REORDERED),
        "model.attention": (running.attention != "auto", REORDERED),
        "precision": (running.precision == "bf16", ROUNDED),
        "optimizer.name": (running.optimizer.endswith("8bit"), ROUNDED),
        "model.weights": (running.weights == "bf16", COARSE),
        "model.float8": (running.float8, COARSE),
    }
    return {key: limit for key, (on, limit) in limits.items() if on}
