"""What each speed and memory option may change in the numbers: the limits that tests hold and the planner prints."""

from __future__ import annotations

from typing import NamedTuple

from train.config.stage import StageConfig


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


def of(config: StageConfig) -> dict[str, Tolerance]:
    """The options in force that can change a number, by their key; those with the same bits are left out."""
    model = config.model
    limits = {
        "batch.split": (config.batch.split != 1, RETILED),
        "model.channels_last": (model.channels_last, REORDERED),
        "model.compile": (model.compile, REORDERED),
        "model.attention": (model.attention != "auto", REORDERED),
        "precision": (config.precision == "bf16", ROUNDED),
        "optimizer.name": (config.optimizer.name == "adamw8bit", ROUNDED),
        "model.weights": (model.weights == "bf16", COARSE),
        "model.float8": (model.float8, COARSE),
    }
    return {key: limit for key, (on, limit) in limits.items() if on}
