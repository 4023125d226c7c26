"""Loss scaling for fp16 as a pure record: every process computes the same one from the same control vector.

torch's GradScaler exists to spare the host a read of the overflow flag; our update reads one control vector anyway,
so the scale can live on the host: no extra synchronisation, and two numbers are its whole state.
Factors are powers of two, hence scaling changes no bits of a gradient that neither over- nor underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from train.base.errors import ExitCode, Halt

GROWTH_INTERVAL = 2000  # updates without overflow before the scale doubles, as torch's default
MAX_SKIPS_IN_A_ROW = 20
SMALLEST = 2.0**-14


@dataclass(frozen=True)
class LossScale:
    """Current scale and how long it has held. `enabled` False keeps the scale at 1."""

    scale: float = 65536.0
    good_updates: int = 0
    skips_in_a_row: int = 0
    enabled: bool = True

    def after(self, *, overflowed: bool) -> LossScale:
        """The scale for the next update."""
        if not self.enabled:
            return self
        if overflowed:
            lower = max(self.scale / 2, SMALLEST)
            return replace(self, scale=lower, good_updates=0, skips_in_a_row=self.skips_in_a_row + 1)
        if self.good_updates + 1 >= GROWTH_INTERVAL:
            return replace(self, scale=self.scale * 2, good_updates=0, skips_in_a_row=0)
        return replace(self, good_updates=self.good_updates + 1, skips_in_a_row=0)

    @property
    def exhausted(self) -> bool:
        """True when so many updates in a row overflowed that lowering the scale does not help."""
        return self.skips_in_a_row >= MAX_SKIPS_IN_A_ROW


def loss_scale(precision: str, state: dict[str, float | int | bool] | None = None) -> LossScale:
    """A fresh scale for `precision`, or the one a checkpoint's state holds. Halt(MISMATCH) for one that is none."""
    if state:
        try:
            found = LossScale(**state)  # type: ignore[arg-type]
            if math.frexp(found.scale)[0] == 0.5 and found.good_updates >= 0 and found.skips_in_a_row >= 0:
                return found
        except TypeError:
            pass
        raise Halt(ExitCode.MISMATCH, f"state.json: scaler is {str(state)[:200]}, which is no loss scale of ours")
    return LossScale() if precision == "fp16" else LossScale(scale=1.0, enabled=False)
